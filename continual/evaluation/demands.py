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

LEVELS = ("single step", "conditional", "multi-step")  # rising
ASKS = r"(?:say|tell|know|check|decide|determine|see|ask|judge|predict|answer|find out|happens?)(?: me| us)?"
IF = re.compile(
    r"\b(?<!as )(?:if|unless|otherwise|in case|depending on|provided that|or else)\b", re.IGNORECASE
)
WHETHER = re.compile(rf"\b{ASKS} if\b", re.IGNORECASE)
THEN = re.compile(
    r"\b(?:then|after that|afterwards|thereafter|finally|lastly|secondly|firstly|step \d+)\b|"
    r"\b(?:first|second|third|next),",
    re.IGNORECASE,
)
LISTED = re.compile(r"^\s*\d+[.)]\s", re.MULTILINE)


@lru_cache(maxsize=4096)
def level(instruction: str) -> str:
    """How an instruction is composed, by its own words: the highest of LEVELS that fits.

    After the compositions of ComplexBench (Wen et al. 2024): "multi-step" (its chain) where one
    thing is to follow another ("then", "after that", "finally", "first, ...", two or more numbered
    lines); "conditional" (its selection) where what is to be done depends on something ("if",
    "unless", "otherwise", "in case", "depending on", "or else"; not "tell me if", which asks, nor
    "as if"), and then its "then" is no step; "single step" for any other.
    """
    depends = bool(IF.search(WHETHER.sub("", instruction)))
    steps = [m[0].casefold() for m in THEN.finditer(instruction)]
    if (
        len(LISTED.findall(instruction)) > 1
        or any(s != "then" for s in steps)
        or len(steps) > depends
    ):
        return LEVELS[2]
    return LEVELS[depends]


@dataclass(frozen=True)
class Demand:
    """What one passage of an instruction, from `start` to `end`, asks for."""

    constraints: tuple[Constraint, ...]
    start: int
    end: int


SPELLED = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
)
NUMBERS = {name: n for n, name in enumerate(SPELLED.split(), 1)}
LANGUAGE = {
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

N = rf"(?<!\d-)(?<!\d–)(?P<n>\d{{1,6}}|{'|'.join(NUMBERS)})"
LEAST = r"at least|no (?:less|fewer) than|a minimum of"
MOST = r"at most|no more than|a maximum of|up to|not exceed(?:ing)?"
HOW = rf"(?:(?P<how>{LEAST}|{MOST}|less than|fewer than|under|below|more than|over|exactly) )?"
AFTER = r"(?: or (?P<after>less|fewer|more))?"
QUOTED = r"[\"“]([^\"”\n]+)[\"”]|(?<!\w)['‘]([^'’\n]+)['’](?!\w)"
ITEM = rf"(?:{QUOTED}|\w+)"
ITEMS = rf"(?P<items>{ITEM}(?:(?:, and |, or |, | and | or ){ITEM})*)"
NOT = r"(?P<not>(?:\b(?:not|no|without|avoid|refrain from)\b|n't\b)[^.\n]{0,40}?)?"
SMALL = {
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

Made = list[tuple[str, dict[str, object]]]


def _number(told: str) -> int:
    return int(told) if told.isdecimal() else NUMBERS[told.casefold()]


def _bounds(m: re.Match[str], bare: str) -> list[tuple[str, int]]:
    """The relations that "at least 3", "exactly 3", "3 or more" say; of a bare number what `bare`
    says, "" for none.
    """
    n, how = _number(m["n"]), (m["how"] or m["after"] or bare).casefold()
    if re.fullmatch(rf"{LEAST}|more", how):
        return [("at least", n)]
    if how in ("more than", "over"):
        return [("at least", n + 1)]
    if how in ("less than", "fewer than", "under", "below"):
        return [("less than", n)]
    if re.fullmatch(rf"{MOST}|less|fewer", how):
        return [("less than", n + 1)]
    return [("at least", n), ("less than", n + 1)] if how == "exactly" else []


def _counted(id: str, name: str, relation: str, bare: str = "") -> Callable[[re.Match[str]], Made]:
    return lambda m: [(id, {name: n, relation: how}) for how, n in _bounds(m, bare)]


def _plain(id: str) -> Callable[[re.Match[str]], Made]:
    return lambda m: [(id, {})]


def _quantity(id: str, name: str) -> Callable[[re.Match[str]], Made]:
    return lambda m: [(id, {name: _number(m["n"])})]


def _items(told: str) -> list[str]:
    """The quoted texts of a list, or else its words; none where one of those is a small word."""
    quoted = [(a or b).rstrip(",.") for a, b in re.findall(QUOTED, told)]
    bare = re.split(r", and |, or |, | and | or ", told)
    return quoted or ([] if SMALL & set(map(str.casefold, bare)) else bare)


def _keywords(m: re.Match[str]) -> Made:
    found = _items(m["items"])
    if m["not"] or m["verb"].casefold().startswith(("avoid", "exclud")):
        return [("keywords:forbidden_words", {"forbidden_words": found})] if found else []
    return [("keywords:existence", {"keywords": found})] if found else []


def _often(m: re.Match[str]) -> Made:
    what = next(filter(None, (m["q1"], m["q2"], m["bare"])))
    if m["kind"].casefold() == "letter":
        return [
            ("keywords:letter_frequency", {"letter": what, "let_frequency": n, "let_relation": how})
            for how, n in _bounds(m, "")
            if len(what) == 1
        ]
    return [
        ("keywords:frequency", {"keyword": what, "frequency": n, "relation": how})
        for how, n in _bounds(m, "")
    ]


PATTERNS: Sequence[tuple[str, Callable[[re.Match[str]], Made]]] = (
    (
        rf"\b(?P<kind>letter|(?:key)?word) (?:\"(?P<q1>[^\"\n]+)\"|'(?P<q2>[^'\n]+)'|(?P<bare>\w+|#))"
        rf"[^.\n]{{0,40}}?\b{HOW}{N} times{AFTER}",
        _often,
    ),
    (
        rf"\b{HOW}{N} words?\b[^.\n]{{0,40}}?\b(?:in|with) all (?:capital letters|capitals|caps)\b{AFTER}",
        _counted("change_case:capital_word_frequency", "capital_frequency", "capital_relation"),
    ),
    (
        rf"\b{HOW}{N} words{AFTER}\b(?! (?:in|with|that|which))",
        _counted("length_constraints:number_words", "num_words", "relation"),
    ),
    (
        r"\b(?P<n>\d{1,6})\+[ -]words?\b",
        lambda m: [
            ("length_constraints:number_words", {"num_words": int(m["n"]), "relation": "at least"})
        ],
    ),
    (
        rf"\b{HOW}{N}[ -]sentences?{AFTER}\b",
        _counted("length_constraints:number_sentences", "num_sentences", "relation", "exactly"),
    ),
    (
        rf"\b(?:exactly )?{N} paragraphs?\b(?=[\s\S]*\*\*\*)",
        _quantity("length_constraints:number_paragraphs", "num_paragraphs"),
    ),
    (
        rf"(?<!at least )(?<!at most )\b(?:exactly )?{N} (?:\w+ )?bullet(?: ?point)?s?\b",
        _quantity("detectable_format:number_bullet_lists", "num_bullets"),
    ),
    (
        rf"\bhighlight(?:ed)?\b[^.\n]{{0,40}}?\bat least {N}\b",
        _quantity("detectable_format:number_highlighted_sections", "num_highlights"),
    ),
    (
        rf"\bat least {N}\b[^.\n]{{0,40}}?\bhighlight",
        _quantity("detectable_format:number_highlighted_sections", "num_highlights"),
    ),
    (
        rf"\b(?:at least )?{N} (?:\w+ )?placeholders?\b",
        _quantity("detectable_content:number_placeholders", "num_placeholders"),
    ),
    (
        r"(?:\bno\b|\bwithout\b|\bnot\b|n't\b|\bavoid\b|\brefrain from\b)[^.\n]{0,30}?\bcommas?\b",
        _plain("punctuation:no_comma"),
    ),
    (
        r"(?<!words )\b(?:all |in |only )?(?:lower ?case|lower-case)\b(?! letter\b)|"
        r"\b(?:no|without(?: using)?(?: any)?) capital letters?\b",
        _plain("change_case:english_lowercase"),
    ),
    (
        r"(?<!words in )(?<!words with )(?<!words )\b(?:in all|all in|in only|only in|in|all)"
        r" (?:capital letters|capitals|caps|upper ?case)\b",
        _plain("change_case:english_capital"),
    ),
    (r"\bjson\b", _plain("detectable_format:json_format")),
    (r"\bdouble angular brackets\b", _plain("detectable_format:title")),
    (
        r"\b(?:postscript|post script)\b[^.\n]{0,40}?\b(?P<marker>P\.\s?P\.\s?S\.?|P\.\s?S\.?)",
        lambda m: [("detectable_content:postscript", {"postscript_marker": m["marker"]})],
    ),
    (r"\b(?:wrap|put|enclose|surround)[^.\n]{0,50}\bdouble quot", _plain("startend:quotation")),
    (r"\*{6}|\b(?:6|six) asterisk", _plain("combination:two_responses")),
    (
        rf"{NOT}\b(?P<verb>includ\w+|contain\w*|us(?:e|es|ing)|mention\w*|avoid\w*|exclud\w+)(?: the| these| following)*"
        rf" (?:key)?words?:? {ITEMS}(?!\w)(?! (?:at|less|fewer|more|no|exactly|once|twice)\b)",
        _keywords,
    ),
    (
        r"\b(?:end|finish|conclude)s?\b[^.\"“\n]{0,60}[\"“](?P<phrase>[^\"”\n]+)[\"”]",
        lambda m: [("startend:end_checker", {"end_phrase": m["phrase"]})],
    ),
    (
        rf"\b(?:in|into)(?: the)? (?P<language>{'|'.join(LANGUAGE)})\b(?! (?:class|history|literature))",
        lambda m: [
            ("language:response_language", {"language": LANGUAGE[m["language"].casefold()]})
        ],
    ),
    (
        rf"\b{N} sections\b[^.\n]{{0,80}}?['\"]?(?P<mark>[A-Z]\w+) X\b",
        lambda m: [
            (
                "detectable_format:multiple_sections",
                {"section_spliter": m["mark"], "num_sections": _number(m["n"])},
            )
        ],
    ),
    (r"\bMy answer is (?:yes|no|maybe)\b", _plain("detectable_format:constrained_response")),
)
TABLE = [(re.compile(pattern, re.IGNORECASE), made) for pattern, made in PATTERNS]


def demands(instruction: str) -> list[Demand]:
    """The checkable demands of an instruction in the order of the patterns; no passage makes two of
    them.

    What is said again without a relation to a number is left out: "less than 3 sentences (1
    sentence or 2 sentences)".
    """
    found: list[Demand] = []
    said: set[str] = set()
    for pattern, make in TABLE:
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
