"""Instruction fidelity: the share of an instruction's concrete elements that the answer preserves.

The elements of an instruction, none counted twice:

- **form**: a checkable demand (`continual.evaluation.instruction_parser`), preserved if the answer
  satisfies it; or a phrase of FORM_CHECKS (a list, a table, "yes or no", ...), preserved if the
  answer has that form;
- **quote**: a text in quotation marks, preserved if it occurs in the answer;
- **number**: a number in digits, or a word from two to twenty, preserved if the answer has it in
  digits or as a word, or has that many lines, list items, or parts between commas;
- **name**: adjacent capitalized words, without the first word of a sentence, preserved if they
  occur in the answer.

Texts are compared after `normalize_text`. The measure follows the recall of entities by which Nan
et al. (2021) measure the faithfulness of a summary, with the instruction in place of the source.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from continual.evaluation.constraints import satisfies
from continual.evaluation.instruction_parser import (
    NUMBER_BY_WORD,
    QUOTED_TEXT,
    Demand,
    find_demands,
)
from continual.evaluation.text_normalization import normalize_text, split_words

LIST_ITEM = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s", re.MULTILINE)


def _count_lines(answer: str) -> int:
    return sum(bool(line.strip()) for line in answer.splitlines())


FORM_CHECKS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    (
        r"(?:numbered|ordered) list",
        lambda a: len(re.findall(r"^\s*\d+[.)]\s", a, re.MULTILINE)) > 1,
    ),
    (
        r"bullet(?:ed)?(?: ?points?|s| list)",
        lambda a: bool(re.search(r"^\s*[-*•]\s", a, re.MULTILINE)),
    ),
    (
        r"(?:make|give|write|create|generate|as|in) an? (?:\w+ )?list",
        lambda a: len(LIST_ITEM.findall(a)) > 1 or "," in a,
    ),
    (
        r"(?:as|in|into) an? (?:\w+ )?table",
        lambda a: sum("|" in line for line in a.splitlines()) > 1,
    ),
    (r"code block", lambda a: "```" in a),
    (r"(?:one|a single|single|1)[ -]word", lambda a: len(split_words(a)) == 1),
    (r"yes or no", lambda a: split_words(a.casefold())[:1] in (["yes"], ["no"])),
    (r"true or false", lambda a: split_words(a.casefold())[:1] in (["true"], ["false"])),
    (r"as a question", lambda a: a.strip().endswith("?")),
    (r"haiku", lambda a: _count_lines(a) == 3),
    (r"limerick", lambda a: _count_lines(a) == 5),
)
DIGIT_NUMBER = re.compile(r"(?<![\w.,])\d+(?:[.,]\d+)*")
WORD_NUMBER = re.compile(
    rf"\b(?:{'|'.join(n for n in NUMBER_BY_WORD if n != 'one')})\b", re.IGNORECASE
)  # without "one", which is also a pronoun
NAME_PATTERN = re.compile(r"(?<!\w)[A-Z][\w-]+(?: [A-Z][\w-]+)*")
EMPHASIS_WORDS = {
    "ALL",
    "AND",
    "ANY",
    "DO",
    "DON",
    "EACH",
    "MUST",
    "NO",
    "NOT",
    "ONLY",
    "OR",
}  # words in capitals that are not names


@dataclass(frozen=True)
class Element:
    """One concrete element of an instruction: its kind, its text, and a test of an answer."""

    kind: str
    text: str
    is_preserved: Callable[[str], bool]


def find_elements(instruction: str) -> list[Element]:
    """Find all elements of an instruction; each passage belongs to one element."""
    elements = []
    rest = instruction
    for d in find_demands(instruction):
        elements.append(_demand_element(d, instruction))
        rest = _blank_out(rest, d.start, d.end)
    for pattern, check in FORM_CHECKS:
        for m in re.finditer(rf"\b{pattern}\b", rest, re.IGNORECASE):
            elements.append(Element("form", m[0], check))
            rest = _blank_out(rest, *m.span())
    for m in re.finditer(QUOTED_TEXT, rest):
        elements.append(_text_element("quote", m[1] or m[2]))
        rest = _blank_out(rest, *m.span())
    elements += [
        _number_element(m[0])
        for pattern in (DIGIT_NUMBER, WORD_NUMBER)
        for m in pattern.finditer(rest)
    ]
    elements += [_text_element("name", name) for name in _iter_names(rest)]
    return list({(e.kind, normalize_text(e.text)): e for e in elements}.values())


def _blank_out(text: str, start: int, end: int) -> str:
    """Replace a passage by spaces; the length stays."""
    return text[:start] + " " * (end - start) + text[end:]


def _demand_element(d: Demand, instruction: str) -> Element:
    return Element(
        "form", instruction[d.start : d.end], lambda a: all(satisfies(a, c) for c in d.constraints)
    )


def _text_element(kind: str, text: str) -> Element:
    pattern = re.compile(rf"(?<!\w){re.escape(normalize_text(text))}(?!\w)")
    return Element(kind, text, lambda a: pattern.search(normalize_text(a)) is not None)


def _number_element(text: str) -> Element:
    value = _parse_value(text)
    return Element("number", text, lambda answer: value in _numbers_of(answer))


def _numbers_of(answer: str) -> list[float]:
    """Return the numbers in an answer, and its counts of list items, lines, and parts."""
    return [
        *map(_parse_value, DIGIT_NUMBER.findall(answer)),
        *map(_parse_value, WORD_NUMBER.findall(answer)),
        len(LIST_ITEM.findall(answer)),
        _count_lines(answer),
        len(re.split(r",(?: and)? | and ", answer)),
    ]


def _parse_value(text: str) -> float:
    """Convert a number in digits or as a word; NaN for a version or date such as 1.2.3.

    A comma before three digits groups thousands; any other comma is a decimal comma.
    """
    if text.casefold() in NUMBER_BY_WORD:
        return float(NUMBER_BY_WORD[text.casefold()])
    digits = re.sub(r",(?=\d{3}(?:\D|$))", "", text).replace(",", ".")
    try:
        return float(digits)
    except ValueError:
        return float("nan")


def _iter_names(text: str) -> Iterator[str]:
    """Yield adjacent capitalized words, without words that begin a sentence."""
    for m in NAME_PATTERN.finditer(text):
        words = m[0].split(" ")
        before = text[: m.start()].rstrip(" \"'“‘(*")
        if not before or before[-1] in ".!?:\n-":
            words = words[1:]
        words = [word for word in words if word not in EMPHASIS_WORDS]
        if words:
            yield " ".join(words)


def score_fidelity(answer: str, instruction: str) -> tuple[float, list[str]]:
    """Return the share of preserved elements, and a text for each lost one.

    The share is 1 if the instruction has no elements, and 0 for a blank answer.
    """
    elements = find_elements(instruction)
    is_blank = not answer.strip()
    lost = [f"{e.kind}: {e.text}" for e in elements if is_blank or not e.is_preserved(answer)]
    if is_blank:
        return 0.0, lost
    return 1 - len(lost) / len(elements) if elements else 1.0, lost
