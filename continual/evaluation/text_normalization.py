"""Normalize texts for comparison, and split them into words, terms and sentences."""

from __future__ import annotations

import re
import unicodedata

# Abbreviations whose full stop ends no sentence. "etc." and "no." are absent: they may end one.
ABBREVIATIONS = (
    "mr mrs ms dr prof st vs jr sr fig e.g i.e cf approx dept est inc ltd u.s u.k a.m p.m"
)
ABBREVIATION_SET = frozenset(ABBREVIATIONS.split())
SENTENCE_END = re.compile(r"""[.!?…]+["'”’»)\]*_]*(?=\s|$)|[。！？؟।]+["”’」』]*|\n\s*\n""")
# Characters of Han, kana, Thai, Lao, Burmese and Khmer.
UNSPACED_SCRIPTS = re.compile(
    "[\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff]"
)


def normalize_text(text: str) -> str:
    """Normalize a text for comparison.

    Applies Unicode form NFKC and case folding, joins white space, and drops final full stops.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    joined = re.sub(r"\s+", " ", folded).strip()
    # An answer of full stops alone stays as it is.
    return joined.rstrip(".").strip() or joined


def split_words(text: str) -> list[str]:
    """Split a text into runs of letters, digits and underscores.

    IFEval counts words in this way (Zhou et al. 2023): "isn't" is two words.
    """
    return re.findall(r"\w+", text)


def split_terms(text: str) -> list[str]:
    """Split the normalized text into runs of letters, digits and their combining marks.

    In scripts without spaces each character is a term.
    """
    spaced = "".join(
        c if unicodedata.category(c)[0] in "LMN" else " " for c in normalize_text(text)
    )
    return UNSPACED_SCRIPTS.sub(r" \g<0> ", spaced).split()


def split_sentences(text: str) -> list[str]:
    """Split a text into sentences of at least one word.

    A sentence ends at full stops, exclamation marks or question marks (with the closing quotes and
    brackets after them) before white space or the end of the text, or at a blank line. The full
    stop of an abbreviation, of a single capital letter, or of a number that begins a line does not
    end a sentence.
    """
    sentences = []
    start = 0
    for end in SENTENCE_END.finditer(text):
        if end[0].startswith(".") and _is_abbreviation_stop(text[start : end.start()]):
            continue
        sentences.append(text[start : end.end()].strip())
        start = end.end()
    sentences.append(text[start:].strip())
    return [sentence for sentence in sentences if split_words(sentence)]


def _is_abbreviation_stop(before: str) -> bool:
    """Return True if a full stop after this text belongs to its last word."""
    last = re.split(r"[\s(\[\"'“‘*]", before)[-1]
    begins_line = before.rpartition("\n")[2].strip() == last
    return (
        last.casefold() in ABBREVIATION_SET
        or bool(re.fullmatch(r"[A-Z]", last))
        or (begins_line and last.isdecimal())
    )
