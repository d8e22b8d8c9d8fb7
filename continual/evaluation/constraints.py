"""Checkable constraints on an answer, after IFEval (Zhou et al. 2023, table 1 and section 2.2).

A row carries them as {"constraints": [{"id": ID, "kwargs": {...}}, ...]}. CHECKS says for each id
whether an answer keeps to it; the keywords of a check, with their types, are the kwargs of its id.
Words and phrases are compared without case, except where the case is asked for. A blank answer
keeps to nothing.

Where the published definition leaves a choice to a library, this is ours: sentences are those of
`wording.sentences`, the language is told by py3langid.
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
# ISO 639-1, those that py3langid tells.
LANGUAGE_CODES_TEXT = (
    "af am an ar as az be bg bn br bs ca cs cy da de dz el en eo es et eu fa fi fo fr ga gl gu "
    "he hi hr ht hu hy id is it ja jv ka kk km kn ko ku ky la lb lo lt lv mg mk ml mn mr ms mt "
    "nb ne nl nn no oc or pa pl ps pt qu ro ru rw se si sk sl sq sr sv sw ta te th tl tr ug uk "
    "ur vi vo wa xh zh zu"
)
LANGUAGE_CODES = frozenset(LANGUAGE_CODES_TEXT.split())
# The kinds of kwargs: which values are of each, and what it is called.
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
    """Each of these stands somewhere in it, also within a longer word."""
    return all(k.casefold() in answer.casefold() for k in keywords)


def frequency(answer: str, *, keyword: Text, frequency: Count, relation: Relation) -> bool:
    """The keyword stands so often in it, also within longer words."""
    return RELATIONS[relation](answer.casefold().count(keyword.casefold()), frequency)


def forbidden_words(answer: str, *, forbidden_words: Texts) -> bool:
    """None of these stands in it as a whole word."""
    return not any(
        re.search(rf"(?<!\w){re.escape(w)}(?!\w)", answer, re.IGNORECASE) for w in forbidden_words
    )


def letter_frequency(
    answer: str, *, letter: Letter, let_frequency: Count, let_relation: Relation
) -> bool:
    """The character stands so often in it, in either case."""
    return RELATIONS[let_relation](answer.casefold().count(letter.casefold()), let_frequency)


def detect_language(text: str) -> str:
    """The ISO 639-1 code of a text's likeliest language; empty where it has no letters."""
    from py3langid import classify

    return str(classify(text.casefold())[0]) if any(map(str.isalpha, text)) else ""


def response_language(answer: str, *, language: LanguageCode) -> bool:
    """All in all it is in this language."""
    return detect_language(answer) == language


def english_capital(answer: str) -> bool:
    """It is in English, and none of its letters is small."""
    return answer.isupper() and detect_language(answer) == "en"


def english_lowercase(answer: str) -> bool:
    """It is in English, and none of its letters is a capital."""
    return answer.islower() and detect_language(answer) == "en"


def capital_word_frequency(
    answer: str, *, capital_frequency: Count, capital_relation: Relation
) -> bool:
    """So many of its words have capitals only; "I" is one, and so are "U.S." and "T-SHIRT"."""
    found = [w for w in re.findall(r"\w+(?:[-.'’]\w+)*", answer) if w.isupper()]
    return RELATIONS[capital_relation](len(found), capital_frequency)


def number_words(answer: str, *, num_words: Count, relation: Relation) -> bool:
    """It has so many words."""
    return RELATIONS[relation](len(split_words(answer)), num_words)


def number_sentences(answer: str, *, num_sentences: Count, relation: Relation) -> bool:
    """It has so many sentences."""
    return RELATIONS[relation](len(split_sentences(answer)), num_sentences)


def number_paragraphs(answer: str, *, num_paragraphs: Count) -> bool:
    """It has exactly so many paragraphs, set apart by `***`; there may be one before the first and
    after the last.
    """
    return len(_split_parts(answer, r"\*\*\*")) == num_paragraphs


def nth_paragraph_first_word(
    answer: str, *, first_word: Text, num_paragraphs: Count, nth_paragraph: Count
) -> bool:
    """It has exactly so many paragraphs, set apart by blank lines, and the n-th begins with this
    word.
    """
    found = [p.strip() for p in answer.split("\n\n") if p.strip()]
    if len(found) != num_paragraphs or nth_paragraph > len(found):
        return False
    begins = re.split(r"[.,?!'\"]", found[nth_paragraph - 1].split()[0].lstrip("'\""))[0]
    return begins.casefold() == first_word.casefold()


def _split_parts(answer: str, separator: str) -> list[str]:
    """What stands between these marks, empty at neither end; an empty part inside makes it no list
    of parts at all.
    """
    parts = [p.strip() for p in re.split(rf"\s?{separator}\s?", answer)]
    parts = parts[not parts[0] :]
    parts = parts[: len(parts) - (not parts[-1])] if parts else []
    return parts if all(parts) else []


def number_placeholders(answer: str, *, num_placeholders: Count) -> bool:
    """It has at least so many places to fill in, each in [square brackets]."""
    return len(re.findall(r"\[[^\]\n]*\]", answer)) >= num_placeholders


def postscript(answer: str, *, postscript_marker: Text) -> bool:
    """The marker stands in it; a space may follow each of its full stops."""
    marker = postscript_marker.strip()
    end = r"(?!\w)" if marker[-1].isalnum() else ""
    told = re.escape(marker).replace(r"\.", r"\.\s?")
    return re.search(rf"(?<!\w){told}{end}", answer, re.IGNORECASE) is not None


def number_bullet_lists(answer: str, *, num_bullets: Count) -> bool:
    """Exactly so many of its lines are bullets: they begin with * (not with **) or with -."""
    return len(re.findall(r"^\s*(?:\*[^*\n]|-)", answer, re.MULTILINE)) == num_bullets


def number_highlighted_sections(answer: str, *, num_highlights: Count) -> bool:
    """At least so many passages of a line stand between single or double asterisks."""
    found = re.findall(r"\*\*([^\n*]*)\*\*|\*([^\n*]*)\*", answer)
    return sum(bool((double or single).strip()) for double, single in found) >= num_highlights


def title(answer: str) -> bool:
    """It has a title in <<double angular brackets>>."""
    return any(t.strip(" <>") for t in re.findall(r"<<([^\n]+?)>>", answer))


def multiple_sections(answer: str, *, section_spliter: Text, num_sections: Count) -> bool:
    """At least so many sections begin with this word and a number: "SECTION 1"."""
    return len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", answer)) >= num_sections


def json_format(answer: str) -> bool:
    """All of it is JSON; it may stand in a fence of three backticks."""
    bare = re.sub(r"^```(?:json)?|```$", "", answer.strip(), flags=re.IGNORECASE).strip()
    try:
        json.loads(bare)
    except (ValueError, RecursionError):
        return False
    return True


def constrained_response(answer: str) -> bool:
    """It says "My answer is yes.", "My answer is no." or "My answer is maybe."."""
    return any(f"My answer is {said}." in answer for said in ("yes", "no", "maybe"))


def two_responses(answer: str) -> bool:
    """It has exactly two parts, which differ, set apart by `******`."""
    parts = _split_parts(answer, r"\*{6}")
    return len(parts) == 2 and parts[0] != parts[1]


def repeat_prompt(answer: str, *, prompt_to_repeat: Text) -> bool:
    """It begins with this text."""
    return answer.strip().casefold().startswith(prompt_to_repeat.strip().casefold())


def end_checker(answer: str, *, end_phrase: Text) -> bool:
    """It ends with this phrase; quotation marks around all of it do not count."""
    return answer.strip().strip('"').casefold().endswith(end_phrase.strip().casefold())


def quotation(answer: str) -> bool:
    """It begins and ends with a double quotation mark."""
    bare = answer.strip()
    return len(bare) > 1 and bare[0] == bare[-1] == '"'


def no_comma(answer: str) -> bool:
    """It has no comma."""
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
    """Whether the answer keeps to it, strictly (Zhou et al. 2023, equation 1)."""
    return bool(answer.strip()) and CHECKS[constraint.id](answer, **constraint.kwargs)


def satisfies_loosely(answer: str, constraint: Constraint) -> bool:
    """Whether it, or what is left of it without its first line, last line or asterisks, does
    (equation 2).
    """
    lines = answer.split("\n")
    cut = [answer, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return any(
        satisfies(told, constraint)
        for told in dict.fromkeys([*cut, *(c.replace("*", "") for c in cut)])
    )


def parse_constraints(entries: Any, problems: list[str]) -> tuple[Constraint, ...]:
    """The constraints of a row; what is wrong with them is added to `problems`. Keywords that are
    null are left out.
    """
    if not isinstance(entries, list):
        problems.append(
            f"found {brief(entries, 60)} as 'constraints', expected a list; write "
            '[{"id": ..., "kwargs": {...}}]'
        )
        return ()
    made = []
    for n, entry in enumerate(entries, 1):
        kwargs = (entry.get("kwargs") or {}) if isinstance(entry, dict) else None
        if not isinstance(kwargs, dict) or not isinstance(entry.get("id"), str):
            problems.append(
                f"found {brief(entry, 60)} as constraint {n}, expected "
                '{"id": text, "kwargs": {...}}; write it so'
            )
            continue
        made.append(Constraint(entry["id"], {k: v for k, v in kwargs.items() if v is not None}))
        problems += _constraint_problems(made[-1], n)
    return tuple(made)


def _constraint_problems(constraint: Constraint, n: int) -> list[str]:
    """All that is wrong with the n-th constraint of a row."""
    if constraint.id not in CHECKS:
        return [f"constraint {n}: " + unknown("id", constraint.id, CHECKS)]
    told = f"constraint {n} ({constraint.id})"
    wanted = {
        k: p
        for k, p in inspect.signature(CHECKS[constraint.id]).parameters.items()
        if k != "answer"
    }
    names = ", ".join(wanted) or "none"
    return [
        *(
            f"{told}: found the keyword {brief(k)}, expected {names}; rename or remove it"
            for k in constraint.kwargs
            if k not in wanted
        ),
        *(
            f"{told}: found no {k}, expected {KWARG_TYPES[p.annotation][1]}; add it"
            for k, p in wanted.items()
            if k not in constraint.kwargs
        ),
        *(
            f"{told}: found {k}={brief(v, 60)}, expected {KWARG_TYPES[wanted[k].annotation][1]}; fix it"
            for k, v in constraint.kwargs.items()
            if k in wanted and not KWARG_TYPES[wanted[k].annotation][0](v)
        ),
    ]
