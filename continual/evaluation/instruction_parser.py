"""Find checkable constraints in an instruction's own words, and its composition level.

A table of patterns finds constraints of `continual.evaluation.constraints`. Requests in other words
are not found, and no model is used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from continual.data.types import Constraint

COMPOSITION_LEVELS = ("single step", "conditional", "multi-step")  # in increasing order
ASKING_VERBS = (
    r"(?:say|tell|know|check|decide|determine|see|ask|judge|predict|answer|find out|happens?)"
    r"(?: me| us)?"
)
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
    """Return the highest of COMPOSITION_LEVELS that matches the instruction's words.

    Levels follow the compositions of ComplexBench (Wen et al. 2024). "multi-step" (its chain): one
    action follows another ("then", "after that", "finally", "first, ...", two or more numbered
    lines). "conditional" (its selection): the action depends on a condition ("if", "unless",
    "otherwise", "in case", "depending on", "or else"; not "tell me if", which asks a question, nor
    "as if"); one "then" of such an instruction is not a step. "single step": any other.
    """
    is_conditional = bool(CONDITION_WORDS.search(INDIRECT_QUESTION.sub("", instruction)))
    step_words = [m[0].casefold() for m in SEQUENCE_WORDS.finditer(instruction)]
    max_then = 1 if is_conditional else 0
    if (
        len(NUMBERED_LINE.findall(instruction)) > 1
        or any(word != "then" for word in step_words)
        or len(step_words) > max_then
    ):
        return "multi-step"
    return "conditional" if is_conditional else "single step"


@dataclass(frozen=True)
class Demand:
    """The constraints in one passage of an instruction, from character `start` to `end`."""

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
}  # not keywords

ConstraintSpecs = list[tuple[str, dict[str, object]]]


def _parse_number(text: str) -> int:
    return int(text) if text.isdecimal() else NUMBER_BY_WORD[text.casefold()]


def _parse_bounds(m: re.Match[str], bare: str) -> list[tuple[str, int]]:
    """Convert "at least 3", "exactly 3" or "3 or more" to (relation, number) pairs.

    `bare` is the relation of a number without one; if it is "", such a number gives no pair.
    """
    n = _parse_number(m["n"])
    relation = (m["how"] or m["after"] or bare).casefold()
    if re.fullmatch(rf"{AT_LEAST}|more", relation):
        return [("at least", n)]
    if relation in ("more than", "over"):
        return [("at least", n + 1)]
    if relation in ("less than", "fewer than", "under", "below"):
        return [("less than", n)]
    if re.fullmatch(rf"{AT_MOST}|less|fewer", relation):
        return [("less than", n + 1)]
    return [("at least", n), ("less than", n + 1)] if relation == "exactly" else []


def _relation_parser(
    id: str, name: str, relation: str, bare: str = ""
) -> Callable[[re.Match[str]], ConstraintSpecs]:
    """Return a function that makes constraints of a number and its relation from a match."""
    return lambda m: [(id, {name: n, relation: bound}) for bound, n in _parse_bounds(m, bare)]


def _constant_parser(id: str) -> Callable[[re.Match[str]], ConstraintSpecs]:
    """Return a function that makes a constraint without kwargs from a match."""
    return lambda m: [(id, {})]


def _quantity_parser(id: str, name: str) -> Callable[[re.Match[str]], ConstraintSpecs]:
    """Return a function that makes a constraint of one number from a match."""
    return lambda m: [(id, {name: _parse_number(m["n"])})]


def _parse_items(text: str) -> list[str]:
    """Return the quoted texts of a list, or else its words; [] if one is a function word."""
    quoted = [(a or b).rstrip(",.") for a, b in re.findall(QUOTED_TEXT, text)]
    if quoted:
        return quoted
    words = re.split(r", and |, or |, | and | or ", text)
    has_function_word = FUNCTION_WORDS & set(map(str.casefold, words))
    return [] if has_function_word else words


def _parse_keywords(m: re.Match[str]) -> ConstraintSpecs:
    words = _parse_items(m["items"])
    if not words:
        return []
    if m["not"] or m["verb"].casefold().startswith(("avoid", "exclud")):
        return [("keywords:forbidden_words", {"forbidden_words": words})]
    return [("keywords:existence", {"keywords": words})]


def _parse_frequency(m: re.Match[str]) -> ConstraintSpecs:
    keyword = m["q1"] or m["q2"] or m["bare"]
    bounds = _parse_bounds(m, "")
    if m["kind"].casefold() != "letter":
        return [
            ("keywords:frequency", {"keyword": keyword, "frequency": n, "relation": relation})
            for relation, n in bounds
        ]
    if len(keyword) != 1:
        return []
    return [
        (
            "keywords:letter_frequency",
            {"letter": keyword, "let_frequency": n, "let_relation": relation},
        )
        for relation, n in bounds
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
COMPILED_PATTERNS = [(re.compile(pattern, re.IGNORECASE), parse) for pattern, parse in PATTERNS]


def find_demands(instruction: str) -> list[Demand]:
    """Find an instruction's checkable demands, in the order of PATTERNS; passages do not overlap.

    A demand without a relation to a number is left out if an earlier one has the same id: the
    brackets of "less than 3 sentences (1 sentence or 2 sentences)" add nothing.
    """
    demands: list[Demand] = []
    seen_ids: set[str] = set()
    for pattern, parse in COMPILED_PATTERNS:
        for m in pattern.finditer(instruction):
            constraints = [Constraint(id, kwargs) for id, kwargs in parse(m)]
            if not constraints or any(m.start() < d.end and d.start < m.end() for d in demands):
                continue
            # "exactly" gives two constraints.
            is_exact_or_constant = len(constraints) > 1 or not constraints[0].kwargs
            if constraints[0].id in seen_ids and is_exact_or_constant:
                continue
            demands.append(Demand(tuple(constraints), m.start(), m.end()))
            seen_ids |= {c.id for c in constraints}
    return demands
