"""What an instruction asks for in its own words: constraints that can be checked, and how many
steps it takes.

The constraints are those of `continual.evaluation.constraints` that a table of patterns finds; what
an instruction asks for in other words is not found, and no model is asked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from continual.data.types import Constraint

COMPOSITION_LEVELS = ("single step", "conditional", "multi-step")  # rising
ASKING_VERBS = r"(?:say|tell|know|check|decide|determine|see|ask|judge|predict|answer|find out|happens?)(?: me| us)?"
CONDITION_WORDS = re.compile(
    r"\b(?<!as )(?:if|unless|otherwise|in case|depending on|provided that|or else)\b", re.IGNORECASE
)
INDIRECT_QUESTION = re.compile(rf"\b{ASKING_VERBS} if\b", re.IGNORECASE)
SEQUENCE_WORDS = re.compile(
    r"\b(?:then|after that|afterwards|thereafter|finally|lastly|secondly|firstly|step \d+)\b|"
    r"\b(?:first|second|third|next),",
    re.IGNORECASE,
)
NUMBERED_LINE = re.compile(r"^\s*\d+[.)]\s", re.MULTILINE)


@lru_cache(maxsize=4096)
def composition_level(instruction: str) -> str:
    """How an instruction is composed, by its own words: the highest of LEVELS that fits.

    After the compositions of ComplexBench (Wen et al. 2024): "multi-step" (its chain) where one
    thing is to follow another ("then", "after that", "finally", "first, ...", two or more numbered
    lines); "conditional" (its selection) where what is to be done depends on something ("if",
    "unless", "otherwise", "in case", "depending on", "or else"; not "tell me if", which asks, nor
    "as if"), and then its "then" is no step; "single step" for any other.
    """
    depends = bool(CONDITION_WORDS.search(INDIRECT_QUESTION.sub("", instruction)))
    steps = [m[0].casefold() for m in SEQUENCE_WORDS.finditer(instruction)]
    if (
        len(NUMBERED_LINE.findall(instruction)) > 1
        or any(s != "then" for s in steps)
        or len(steps) > depends
    ):
        return COMPOSITION_LEVELS[2]
    return COMPOSITION_LEVELS[depends]


@dataclass(frozen=True)
class Demand:
    """What one passage of an instruction, from `start` to `end`, asks for."""

    constraints: tuple[Constraint, ...]
    start: int
    end: int


NUMBER_WORDS = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
)
NUMBER_BY_WORD = {name: n for n, name in enumerate(NUMBER_WORDS.split(), 1)}
CODE_BY_LANGUAGE = {
    "arabic": "ar",
    "bengali": "bn",
    "bulgarian": "bg",
    "chinese": "zh",
    "czech": "cs",
    "danish": "da",
    "dutch": "nl",
    "english": "en",
    "finnish": "fi",
    "french": "fr",
    "german": "de",
    "greek": "el",
    "gujarati": "gu",
    "hebrew": "he",
    "hindi": "hi",
    "hungarian": "hu",
    "indonesian": "id",
    "italian": "it",
    "japanese": "ja",
    "kannada": "kn",
    "korean": "ko",
    "marathi": "mr",
    "nepali": "ne",
    "norwegian": "no",
    "persian": "fa",
    "polish": "pl",
    "portuguese": "pt",
    "punjabi": "pa",
    "romanian": "ro",
    "russian": "ru",
    "spanish": "es",
    "swahili": "sw",
    "swedish": "sv",
    "tamil": "ta",
    "telugu": "te",
    "thai": "th",
    "turkish": "tr",
    "ukrainian": "uk",
    "urdu": "ur",
    "vietnamese": "vi",
}

NUMBER = rf"(?<!\d-)(?<!\d–)(?P<n>\d{{1,6}}|{'|'.join(NUMBER_BY_WORD)})"
AT_LEAST = r"at least|no (?:less|fewer) than|a minimum of"
AT_MOST = r"at most|no more than|a maximum of|up to|not exceed(?:ing)?"
RELATION = (
    rf"(?:(?P<how>{AT_LEAST}|{AT_MOST}|less than|fewer than|under|below|more than|over|exactly) )?"
)
RELATION_AFTER = r"(?: or (?P<after>less|fewer|more))?"
QUOTED_TEXT = r"[\"“]([^\"”\n]+)[\"”]|(?<!\w)['‘]([^'’\n]+)['’](?!\w)"
ITEM = rf"(?:{QUOTED_TEXT}|\w+)"
ITEMS = rf"(?P<items>{ITEM}(?:(?:, and |, or |, | and | or ){ITEM})*)"
NEGATION = r"(?P<not>(?:\b(?:not|no|without|avoid|refrain from)\b|n't\b)[^.\n]{0,40}?)?"
FUNCTION_WORDS = {
    "in",
    "with",
    "that",
    "which",
    "from",
    "of",
    "to",
    "like",
    "such",
    "for",
    "on",
    "as",
    "by",
}  # no keywords

ConstraintSpecs = list[tuple[str, dict[str, object]]]


def _parse_number(told: str) -> int:
    return int(told) if told.isdecimal() else NUMBER_BY_WORD[told.casefold()]


def _parse_bounds(m: re.Match[str], bare: str) -> list[tuple[str, int]]:
    """The relations that "at least 3", "exactly 3", "3 or more" say; of a bare number what `bare`
    says, "" for none.
    """
    n, how = _parse_number(m["n"]), (m["how"] or m["after"] or bare).casefold()
    if re.fullmatch(rf"{AT_LEAST}|more", how):
        return [("at least", n)]
    if how in ("more than", "over"):
        return [("at least", n + 1)]
    if how in ("less than", "fewer than", "under", "below"):
        return [("less than", n)]
    if re.fullmatch(rf"{AT_MOST}|less|fewer", how):
        return [("less than", n + 1)]
    return [("at least", n), ("less than", n + 1)] if how == "exactly" else []


def _relation_parser(
    id: str, name: str, relation: str, bare: str = ""
) -> Callable[[re.Match[str]], ConstraintSpecs]:
    return lambda m: [(id, {name: n, relation: how}) for how, n in _parse_bounds(m, bare)]


def _constant_parser(id: str) -> Callable[[re.Match[str]], ConstraintSpecs]:
    return lambda m: [(id, {})]


def _quantity_parser(id: str, name: str) -> Callable[[re.Match[str]], ConstraintSpecs]:
    return lambda m: [(id, {name: _parse_number(m["n"])})]


def _parse_items(told: str) -> list[str]:
    """The quoted texts of a list, or else its words; none where one of those is a small word."""
    quoted = [(a or b).rstrip(",.") for a, b in re.findall(QUOTED_TEXT, told)]
    bare = re.split(r", and |, or |, | and | or ", told)
    return quoted or ([] if FUNCTION_WORDS & set(map(str.casefold, bare)) else bare)


def _parse_keywords(m: re.Match[str]) -> ConstraintSpecs:
    found = _parse_items(m["items"])
    if m["not"] or m["verb"].casefold().startswith(("avoid", "exclud")):
        return [("keywords:forbidden_words", {"forbidden_words": found})] if found else []
    return [("keywords:existence", {"keywords": found})] if found else []


def _parse_frequency(m: re.Match[str]) -> ConstraintSpecs:
    what = next(filter(None, (m["q1"], m["q2"], m["bare"])))
    if m["kind"].casefold() == "letter":
        return [
            ("keywords:letter_frequency", {"letter": what, "let_frequency": n, "let_relation": how})
            for how, n in _parse_bounds(m, "")
            if len(what) == 1
        ]
    return [
        ("keywords:frequency", {"keyword": what, "frequency": n, "relation": how})
        for how, n in _parse_bounds(m, "")
    ]


PATTERNS: Sequence[tuple[str, Callable[[re.Match[str]], ConstraintSpecs]]] = (
    (
        rf"\b(?P<kind>letter|(?:key)?word) (?:\"(?P<q1>[^\"\n]+)\"|'(?P<q2>[^'\n]+)'|(?P<bare>\w+|#))"
        rf"[^.\n]{{0,40}}?\b{RELATION}{NUMBER} times{RELATION_AFTER}",
        _parse_frequency,
    ),
    (
        rf"\b{RELATION}{NUMBER} words?\b[^.\n]{{0,40}}?\b(?:in|with) all (?:capital letters|capitals|caps)\b{RELATION_AFTER}",
        _relation_parser(
            "change_case:capital_word_frequency", "capital_frequency", "capital_relation"
        ),
    ),
    (
        rf"\b{RELATION}{NUMBER} words{RELATION_AFTER}\b(?! (?:in|with|that|which))",
        _relation_parser("length_constraints:number_words", "num_words", "relation"),
    ),
    (
        r"\b(?P<n>\d{1,6})\+[ -]words?\b",
        lambda m: [
            ("length_constraints:number_words", {"num_words": int(m["n"]), "relation": "at least"})
        ],
    ),
    (
        rf"\b{RELATION}{NUMBER}[ -]sentences?{RELATION_AFTER}\b",
        _relation_parser(
            "length_constraints:number_sentences", "num_sentences", "relation", "exactly"
        ),
    ),
    (
        rf"\b(?:exactly )?{NUMBER} paragraphs?\b(?=[\s\S]*\*\*\*)",
        _quantity_parser("length_constraints:number_paragraphs", "num_paragraphs"),
    ),
    (
        rf"(?<!at least )(?<!at most )\b(?:exactly )?{NUMBER} (?:\w+ )?bullet(?: ?point)?s?\b",
        _quantity_parser("detectable_format:number_bullet_lists", "num_bullets"),
    ),
    (
        rf"\bhighlight(?:ed)?\b[^.\n]{{0,40}}?\bat least {NUMBER}\b",
        _quantity_parser("detectable_format:number_highlighted_sections", "num_highlights"),
    ),
    (
        rf"\bat least {NUMBER}\b[^.\n]{{0,40}}?\bhighlight",
        _quantity_parser("detectable_format:number_highlighted_sections", "num_highlights"),
    ),
    (
        rf"\b(?:at least )?{NUMBER} (?:\w+ )?placeholders?\b",
        _quantity_parser("detectable_content:number_placeholders", "num_placeholders"),
    ),
    (
        r"(?:\bno\b|\bwithout\b|\bnot\b|n't\b|\bavoid\b|\brefrain from\b)[^.\n]{0,30}?\bcommas?\b",
        _constant_parser("punctuation:no_comma"),
    ),
    (
        r"(?<!words )\b(?:all |in |only )?(?:lower ?case|lower-case)\b(?! letter\b)|"
        r"\b(?:no|without(?: using)?(?: any)?) capital letters?\b",
        _constant_parser("change_case:english_lowercase"),
    ),
    (
        r"(?<!words in )(?<!words with )(?<!words )\b(?:in all|all in|in only|only in|in|all)"
        r" (?:capital letters|capitals|caps|upper ?case)\b",
        _constant_parser("change_case:english_capital"),
    ),
    (r"\bjson\b", _constant_parser("detectable_format:json_format")),
    (r"\bdouble angular brackets\b", _constant_parser("detectable_format:title")),
    (
        r"\b(?:postscript|post script)\b[^.\n]{0,40}?\b(?P<marker>P\.\s?P\.\s?S\.?|P\.\s?S\.?)",
        lambda m: [("detectable_content:postscript", {"postscript_marker": m["marker"]})],
    ),
    (
        r"\b(?:wrap|put|enclose|surround)[^.\n]{0,50}\bdouble quot",
        _constant_parser("startend:quotation"),
    ),
    (r"\*{6}|\b(?:6|six) asterisk", _constant_parser("combination:two_responses")),
    (
        rf"{NEGATION}\b(?P<verb>includ\w+|contain\w*|us(?:e|es|ing)|mention\w*|avoid\w*|exclud\w+)(?: the| these| following)*"
        rf" (?:key)?words?:? {ITEMS}(?!\w)(?! (?:at|less|fewer|more|no|exactly|once|twice)\b)",
        _parse_keywords,
    ),
    (
        r"\b(?:end|finish|conclude)s?\b[^.\"“\n]{0,60}[\"“](?P<phrase>[^\"”\n]+)[\"”]",
        lambda m: [("startend:end_checker", {"end_phrase": m["phrase"]})],
    ),
    (
        rf"\b(?:in|into)(?: the)? (?P<language>{'|'.join(CODE_BY_LANGUAGE)})\b(?! (?:class|history|literature))",
        lambda m: [
            ("language:response_language", {"language": CODE_BY_LANGUAGE[m["language"].casefold()]})
        ],
    ),
    (
        rf"\b{NUMBER} sections\b[^.\n]{{0,80}}?['\"]?(?P<mark>[A-Z]\w+) X\b",
        lambda m: [
            (
                "detectable_format:multiple_sections",
                {"section_spliter": m["mark"], "num_sections": _parse_number(m["n"])},
            )
        ],
    ),
    (
        r"\bMy answer is (?:yes|no|maybe)\b",
        _constant_parser("detectable_format:constrained_response"),
    ),
)
COMPILED_PATTERNS = [(re.compile(pattern, re.IGNORECASE), made) for pattern, made in PATTERNS]


def find_demands(instruction: str) -> list[Demand]:
    """The checkable demands of an instruction in the order of the patterns; no passage makes two of
    them.

    What is said again without a relation to a number is left out: "less than 3 sentences (1
    sentence or 2 sentences)".
    """
    found: list[Demand] = []
    said: set[str] = set()
    for pattern, make in COMPILED_PATTERNS:
        for m in pattern.finditer(instruction):
            made = [Constraint(id, kwargs) for id, kwargs in make(m)]
            again = bool(made) and made[0].id in said and (len(made) > 1 or not made[0].kwargs)
            if (
                made
                and not again
                and not any(m.start() < d.end and d.start < m.end() for d in found)
            ):
                found.append(Demand(tuple(made), m.start(), m.end()))
                said |= {c.id for c in made}
    return found
