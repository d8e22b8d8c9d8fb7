"""Checkable constraints on an answer, after IFEval (Zhou et al. 2023, table 1 and section 2.2).

A row carries them as {"constraints": [{"id": ID, "kwargs": {...}}, ...]}. CHECKS maps each id to a
function that returns True if an answer satisfies the constraint; the keyword parameters of this
function, with their types, are the kwargs of the id. Words and phrases are compared without case,
unless the constraint is about case. A blank answer satisfies nothing.

The published definition leaves two choices to libraries. Here sentences are those of
`text_normalization.split_sentences`, and py3langid detects the language.
"""

from __future__ import annotations

import inspect
import json
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from continual.data.types import Constraint
from continual.errors import brief, unknown
from continual.evaluation.text_normalization import split_sentences, split_words

Count: TypeAlias = int
Relation: TypeAlias = str
Letter: TypeAlias = str
Text: TypeAlias = str
Texts: TypeAlias = Sequence[str]
LanguageCode: TypeAlias = str
RELATIONS: Mapping[str, Callable[[int, int], bool]] = {
    "at least": operator.ge,
    "less than": operator.lt,
}
# The ISO 639-1 codes that py3langid detects.
LANGUAGE_CODES_TEXT = (
    "af am an ar as az be bg bn br bs ca cs cy da de dz el en eo es et eu fa fi fo fr ga gl gu "
    "he hi hr ht hu hy id is it ja jv ka kk km kn ko ku ky la lb lo lt lv mg mk ml mn mr ms mt "
    "nb ne nl nn no oc or pa pl ps pt qu ro ru rw se si sk sl sq sr sv sw ta te th tl tr ug uk "
    "ur vi vo wa xh zh zu"
)
LANGUAGE_CODES = frozenset(LANGUAGE_CODES_TEXT.split())
# The types of kwargs, by annotation: a test of a value, and its description in messages.
KWARG_TYPES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "Count": (lambda v: type(v) is int and v >= 1, "a whole number of at least 1"),
    "Relation": (
        lambda v: isinstance(v, str) and v in RELATIONS,
        " or ".join(map(repr, RELATIONS)),
    ),
    "Letter": (lambda v: isinstance(v, str) and len(v) == 1, "one character"),
    "Text": (lambda v: isinstance(v, str) and bool(v.strip()), "text"),
    "Texts": (
        lambda v: (
            isinstance(v, list) and bool(v) and all(isinstance(t, str) and t.strip() for t in v)
        ),
        "a list of texts",
    ),
    "LanguageCode": (
        lambda v: isinstance(v, str) and v in LANGUAGE_CODES,
        "an ISO 639-1 code such as 'en'",
    ),
}


def existence(answer: str, *, keywords: Texts) -> bool:
    """Check that every keyword occurs, also within a longer word."""
    return all(k.casefold() in answer.casefold() for k in keywords)


def frequency(answer: str, *, keyword: Text, frequency: Count, relation: Relation) -> bool:
    """Compare the number of occurrences of the keyword, also within longer words."""
    return RELATIONS[relation](answer.casefold().count(keyword.casefold()), frequency)


def forbidden_words(answer: str, *, forbidden_words: Texts) -> bool:
    """Check that none of these occurs as a whole word."""
    return not any(
        re.search(rf"(?<!\w){re.escape(w)}(?!\w)", answer, re.IGNORECASE) for w in forbidden_words
    )


def letter_frequency(
    answer: str, *, letter: Letter, let_frequency: Count, let_relation: Relation
) -> bool:
    """Compare the number of occurrences of the character, in either case."""
    return RELATIONS[let_relation](answer.casefold().count(letter.casefold()), let_frequency)


def detect_language(text: str) -> str:
    """Return the ISO 639-1 code of a text's most likely language, "" if it has no letters."""
    from py3langid import classify

    return str(classify(text.casefold())[0]) if any(map(str.isalpha, text)) else ""


def response_language(answer: str, *, language: LanguageCode) -> bool:
    """Check that the most likely language of the answer is this one."""
    return detect_language(answer) == language


def english_capital(answer: str) -> bool:
    """Check that the answer is in English and has no lowercase letter."""
    return answer.isupper() and detect_language(answer) == "en"


def english_lowercase(answer: str) -> bool:
    """Check that the answer is in English and has no capital letter."""
    return answer.islower() and detect_language(answer) == "en"


def capital_word_frequency(
    answer: str, *, capital_frequency: Count, capital_relation: Relation
) -> bool:
    """Compare the number of words in capitals; "I", "U.S." and "T-SHIRT" are such words."""
    capital_words = [w for w in re.findall(r"\w+(?:[-.'’]\w+)*", answer) if w.isupper()]
    return RELATIONS[capital_relation](len(capital_words), capital_frequency)


def number_words(answer: str, *, num_words: Count, relation: Relation) -> bool:
    """Compare the number of words."""
    return RELATIONS[relation](len(split_words(answer)), num_words)


def number_sentences(answer: str, *, num_sentences: Count, relation: Relation) -> bool:
    """Compare the number of sentences."""
    return RELATIONS[relation](len(split_sentences(answer)), num_sentences)


def number_paragraphs(answer: str, *, num_paragraphs: Count) -> bool:
    """Check for exactly this many paragraphs, separated by `***`.

    A separator may also precede the first paragraph and follow the last.
    """
    return len(_split_parts(answer, r"\*\*\*")) == num_paragraphs


def nth_paragraph_first_word(
    answer: str, *, first_word: Text, num_paragraphs: Count, nth_paragraph: Count
) -> bool:
    """Check for exactly this many paragraphs, and the first word of the n-th.

    Paragraphs are separated by blank lines.
    """
    paragraphs = [p.strip() for p in answer.split("\n\n") if p.strip()]
    if len(paragraphs) != num_paragraphs or nth_paragraph > len(paragraphs):
        return False
    first = paragraphs[nth_paragraph - 1].split()[0].lstrip("'\"")
    return re.split(r"[.,?!'\"]", first)[0].casefold() == first_word.casefold()


def _split_parts(answer: str, separator: str) -> list[str]:
    """Split an answer at a separator; return [] if a part other than the first or last is blank.

    A blank first or last part is dropped.
    """
    parts = [p.strip() for p in re.split(rf"\s?{separator}\s?", answer)]
    if not parts[0]:
        parts = parts[1:]
    if parts and not parts[-1]:
        parts = parts[:-1]
    return parts if all(parts) else []


def number_placeholders(answer: str, *, num_placeholders: Count) -> bool:
    """Check for at least this many placeholders in [square brackets]."""
    return len(re.findall(r"\[[^\]\n]*\]", answer)) >= num_placeholders


def postscript(answer: str, *, postscript_marker: Text) -> bool:
    """Check that the marker occurs; a space may follow each of its full stops."""
    marker = postscript_marker.strip()
    end = r"(?!\w)" if marker[-1].isalnum() else ""
    pattern = re.escape(marker).replace(r"\.", r"\.\s?")
    return re.search(rf"(?<!\w){pattern}{end}", answer, re.IGNORECASE) is not None


def number_bullet_lists(answer: str, *, num_bullets: Count) -> bool:
    """Check for exactly this many bullets: lines that begin with * (not with **) or with -."""
    return len(re.findall(r"^\s*(?:\*[^*\n]|-)", answer, re.MULTILINE)) == num_bullets


def number_highlighted_sections(answer: str, *, num_highlights: Count) -> bool:
    """Check for at least this many passages, within a line, in single or double asterisks."""
    passages = re.findall(r"\*\*([^\n*]*)\*\*|\*([^\n*]*)\*", answer)
    return sum(bool((double or single).strip()) for double, single in passages) >= num_highlights


def title(answer: str) -> bool:
    """Check for a title in <<double angular brackets>>."""
    return any(t.strip(" <>") for t in re.findall(r"<<([^\n]+?)>>", answer))


def multiple_sections(answer: str, *, section_spliter: Text, num_sections: Count) -> bool:
    """Check for at least this many sections that begin with this word and a number: "SECTION 1"."""
    return len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", answer)) >= num_sections


def json_format(answer: str) -> bool:
    """Check that the whole answer is JSON; it may be fenced by three backticks."""
    bare = re.sub(r"^```(?:json)?|```$", "", answer.strip(), flags=re.IGNORECASE).strip()
    try:
        json.loads(bare)
    except (ValueError, RecursionError):
        return False
    return True


def constrained_response(answer: str) -> bool:
    """Check for "My answer is yes.", "My answer is no." or "My answer is maybe."."""
    return any(f"My answer is {choice}." in answer for choice in ("yes", "no", "maybe"))


def two_responses(answer: str) -> bool:
    """Check for exactly two different parts, separated by `******`."""
    parts = _split_parts(answer, r"\*{6}")
    return len(parts) == 2 and parts[0] != parts[1]


def repeat_prompt(answer: str, *, prompt_to_repeat: Text) -> bool:
    """Check that the answer begins with this text."""
    return answer.strip().casefold().startswith(prompt_to_repeat.strip().casefold())


def end_checker(answer: str, *, end_phrase: Text) -> bool:
    """Check that the answer ends with this phrase; quotes around the whole answer are ignored."""
    return answer.strip().strip('"').casefold().endswith(end_phrase.strip().casefold())


def quotation(answer: str) -> bool:
    """Check that the answer begins and ends with a double quotation mark."""
    bare = answer.strip()
    return len(bare) > 1 and bare[0] == bare[-1] == '"'


def no_comma(answer: str) -> bool:
    """Check that the answer has no comma."""
    return "," not in answer


CHECKS: Mapping[str, Callable[..., bool]] = {
    f"{group}:{check.__name__}": check
    for group, checks in {
        "keywords": (existence, frequency, forbidden_words, letter_frequency),
        "language": (response_language,),
        "length_constraints": (
            number_words,
            number_sentences,
            number_paragraphs,
            nth_paragraph_first_word,
        ),
        "detectable_content": (number_placeholders, postscript),
        "detectable_format": (
            number_bullet_lists,
            constrained_response,
            number_highlighted_sections,
            multiple_sections,
            json_format,
            title,
        ),
        "combination": (two_responses, repeat_prompt),
        "startend": (end_checker, quotation),
        "change_case": (capital_word_frequency, english_capital, english_lowercase),
        "punctuation": (no_comma,),
    }.items()
    for check in checks
}


def satisfies(answer: str, constraint: Constraint) -> bool:
    """Return True if the answer satisfies the constraint (Zhou et al. 2023, equation 1)."""
    return bool(answer.strip()) and CHECKS[constraint.id](answer, **constraint.kwargs)


def satisfies_loosely(answer: str, constraint: Constraint) -> bool:
    """Return True if the answer or a shortened form of it satisfies the constraint (equation 2).

    Shortened forms lack the first line, the last line, the asterisks, or several of these.
    """
    lines = answer.split("\n")
    shortened = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    with_asterisks = [answer, *shortened]
    without_asterisks = [text.replace("*", "") for text in with_asterisks]
    variants = dict.fromkeys([*with_asterisks, *without_asterisks])
    return any(satisfies(variant, constraint) for variant in variants)


def parse_constraints(entries: Any, problems: list[str]) -> tuple[Constraint, ...]:
    """Read a row's constraints and append what is wrong with them to `problems`.

    Keywords whose value is null are left out.
    """
    if not isinstance(entries, list):
        problems.append(
            f"found {brief(entries, 60)} as 'constraints', expected a list; write "
            '[{"id": ..., "kwargs": {...}}]'
        )
        return ()
    constraints = []
    for n, entry in enumerate(entries, 1):
        kwargs = (entry.get("kwargs") or {}) if isinstance(entry, dict) else None
        if not isinstance(kwargs, dict) or not isinstance(entry.get("id"), str):
            problems.append(
                f"found {brief(entry, 60)} as constraint {n}, expected "
                '{"id": text, "kwargs": {...}}; write it so'
            )
            continue
        given = {key: value for key, value in kwargs.items() if value is not None}
        constraint = Constraint(entry["id"], given)
        constraints.append(constraint)
        problems += _constraint_problems(constraint, n)
    return tuple(constraints)


def _constraint_problems(constraint: Constraint, n: int) -> list[str]:
    """Return messages about the n-th constraint of a row."""
    if constraint.id not in CHECKS:
        return [f"constraint {n}: " + unknown("id", constraint.id, CHECKS)]
    name = f"constraint {n} ({constraint.id})"
    parameters = dict(inspect.signature(CHECKS[constraint.id]).parameters)
    del parameters["answer"]
    expected_names = ", ".join(parameters) or "none"

    problems = [
        f"{name}: found the keyword {brief(key)}, expected {expected_names}; rename or remove it"
        for key in constraint.kwargs
        if key not in parameters
    ]
    problems += [
        f"{name}: found no {key}, expected {KWARG_TYPES[parameter.annotation][1]}; add it"
        for key, parameter in parameters.items()
        if key not in constraint.kwargs
    ]
    for key, value in constraint.kwargs.items():
        if key in parameters:
            is_valid, description = KWARG_TYPES[parameters[key].annotation]
            if not is_valid(value):
                problems.append(
                    f"{name}: found {key}={brief(value, 60)}, expected {description}; fix it"
                )
    return problems
