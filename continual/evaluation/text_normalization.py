"""Texts as people count them: normalised for comparison, as words, and as sentences."""

from __future__ import annotations

import re
import unicodedata

# With a full stop that ends no sentence; "etc." and "no." may end one.
ABBREVIATIONS = (
    "mr mrs ms dr prof st vs jr sr fig e.g i.e cf approx dept est inc ltd u.s u.k a.m p.m"
)
ABBREVIATION_SET = frozenset(ABBREVIATIONS.split())
SENTENCE_END = re.compile(r"""[.!?…]+["'”’»)\]*_]*(?=\s|$)|[。！？؟।]+["”’」』]*|\n\s*\n""")
# Han and kana; Thai, Lao, Burmese and Khmer.
UNSPACED_SCRIPTS = re.compile(
    "[\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff]"
)


def normalize_text(text: str) -> str:
    """What both sides of a comparison go through: compatible Unicode forms, case, white space and a
    final full stop.
    """
    told = re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()
    return told.rstrip(".").strip() or told  # an answer of full stops is one


def split_words(text: str) -> list[str]:
    """Runs of letters, digits and underscores, as IFEval counts words (Zhou et al. 2023): "isn't"
    is two.
    """
    return re.findall(r"\w+", text)


def split_terms(text: str) -> list[str]:
    """The normalised text's runs of letters, digits and their marks; each character alone in
    scripts without spaces.
    """
    kept = (c if unicodedata.category(c)[0] in "LMN" else " " for c in normalize_text(text))
    return UNSPACED_SCRIPTS.sub(r" \g<0> ", "".join(kept)).split()


def split_sentences(text: str) -> list[str]:
    """The text's sentences, each of at least one word.

    One ends at full stops, exclamation or question marks (with the quotes and brackets that close
    behind them) before white space or the text's end, or at a blank line. The full stop of an
    abbreviation, of a single capital letter or of a number that begins a line ends none.
    """
    found, start = [], 0
    for end in SENTENCE_END.finditer(text):
        if end[0].startswith(".") and _is_abbreviation_stop(text[start : end.start()]):
            continue
        found.append(text[start : end.end()].strip())
        start = end.end()
    return [told for told in (*found, text[start:].strip()) if split_words(told)]


def _is_abbreviation_stop(before: str) -> bool:
    """Whether the full stop behind this text belongs to its last word."""
    last = re.split(r"[\s(\[\"'“‘*]", before)[-1]
    begins = before.rpartition("\n")[2].strip() == last
    return (
        last.casefold() in ABBREVIATION_SET
        or bool(re.fullmatch(r"[A-Z]", last))
        or (begins and last.isdecimal())
    )
