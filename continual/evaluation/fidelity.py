"""Instruction fidelity: the share of an instruction's concrete elements that the answer preserves.

The elements of an instruction, each found by its own words and none counted twice:

- **form**: a checkable demand (`continual.evaluation.instruction_parser`), kept where the answer keeps to it;
  and a word of FORMS (a list, a table, "yes or no", ...), kept where the answer has that form;
- **quote**: a text in quotation marks, kept where it stands in the answer;
- **number**: one in digits, or a word from two to twenty, kept where the answer says it in digits
  or as a word, or has so many items: lines, listed ones, or parts between commas;
- **name**: capitalised words side by side, but for the first of a sentence, kept where they stand
  in the answer.

Texts are compared normalised: Unicode forms, case and white space aside. After the recall of
entities by which Nan et al. (2021) measure whether a summary is faithful, with the instruction as
the text to be faithful to.
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
)  # "one" is a pronoun too
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
}  # capitals that are no name


@dataclass(frozen=True)
class Element:
    """One concrete element of an instruction: its kind, its own words, and whether an answer keeps
    it.
    """

    kind: str
    text: str
    is_preserved: Callable[[str], bool]


def find_elements(instruction: str) -> list[Element]:
    """All elements of an instruction, by kind."""
    found = []
    rest = instruction
    for d in find_demands(instruction):
        found.append(_demand_element(d, instruction))
        rest = _blank_out(rest, d.start, d.end)
    for pattern, check in FORM_CHECKS:
        for m in re.finditer(rf"\b{pattern}\b", rest, re.IGNORECASE):
            found.append(Element("form", m[0], check))
            rest = _blank_out(rest, *m.span())
    for m in re.finditer(QUOTED_TEXT, rest):
        found.append(_text_element("quote", m[1] or m[2]))
        rest = _blank_out(rest, *m.span())
    found += [
        _number_element(m[0])
        for pattern in (DIGIT_NUMBER, WORD_NUMBER)
        for m in pattern.finditer(rest)
    ]
    found += [_text_element("name", name) for name in _iter_names(rest)]
    return list({(e.kind, normalize_text(e.text)): e for e in found}.values())


def _blank_out(text: str, start: int, end: int) -> str:
    """The text with a passage blanked, of the same length."""
    return text[:start] + " " * (end - start) + text[end:]


def _demand_element(d: Demand, instruction: str) -> Element:
    return Element(
        "form", instruction[d.start : d.end], lambda a: all(satisfies(a, c) for c in d.constraints)
    )


def _text_element(kind: str, told: str) -> Element:
    whole = re.compile(rf"(?<!\w){re.escape(normalize_text(told))}(?!\w)")
    return Element(kind, told, lambda a: whole.search(normalize_text(a)) is not None)


def _number_element(told: str) -> Element:
    value = _parse_value(told)
    return Element(
        "number",
        told,
        lambda a: (
            value
            in (
                *map(_parse_value, DIGIT_NUMBER.findall(a)),
                *map(_parse_value, WORD_NUMBER.findall(a)),
                len(LIST_ITEM.findall(a)),
                _count_lines(a),
                len(re.split(r",(?: and)? | and ", a)),
            )
        ),
    )


def _parse_value(told: str) -> float:
    """The number that is written: commas before three digits group them, any other is a decimal
    one.
    """
    if told.casefold() in NUMBER_BY_WORD:
        return float(NUMBER_BY_WORD[told.casefold()])
    bare = re.sub(r",(?=\d{3}(?:\D|$))", "", told).replace(",", ".")
    try:
        return float(bare)
    except ValueError:  # 1.2.3, a version or a date
        return float("nan")


def _iter_names(text: str) -> Iterator[str]:
    """Capitalised words side by side; the first word of a sentence is capitalised whatever it is."""
    for m in NAME_PATTERN.finditer(text):
        told = m[0].split(" ")
        before = text[: m.start()].rstrip(" \"'“‘(*")
        if not before or before[-1] in ".!?:\n-":
            told = told[1:]
        if told := [t for t in told if t not in EMPHASIS_WORDS]:
            yield " ".join(told)


def score_fidelity(answer: str, instruction: str) -> tuple[float, list[str]]:
    """The share of the elements that are kept, and those that are lost, each with its kind.

    1 where the instruction has none, as nothing can be lost; 0 for a blank answer.
    """
    if not answer.strip():
        return 0.0, [f"{e.kind}: {e.text}" for e in find_elements(instruction)]
    found = find_elements(instruction)
    lost = [f"{e.kind}: {e.text}" for e in found if not e.is_preserved(answer)]
    return 1 - len(lost) / len(found) if found else 1.0, lost
