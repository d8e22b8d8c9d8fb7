"""Metrics of an answer against a reference."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from types import SimpleNamespace
from typing import Any

from continual.evaluation.text_normalization import normalize_text, split_terms


def exact_match(answer: str, reference: str) -> float:
    """1 where the normalised texts are the same, else 0; an empty answer is wrong."""
    return float(normalize_text(answer) == normalize_text(reference) != "")


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over the words, punctuation aside (Rajpurkar et al.
    2016, section 6.1).

    There articles are left out too; here they stay, as an answer can be the letter of an option.
    """
    words = [
        Counter(normalize_text(t).translate(str.maketrans("", "", string.punctuation)).split())
        for t in (answer, reference)
    ]
    common = (words[0] & words[1]).total()
    return 2 * common / (words[0].total() + words[1].total()) if common else 0.0


def rouge_l(answer: str, reference: str) -> float:
    """The F-measure of the longest common subsequence of stemmed words (Lin 2004).

    Words of [a-z0-9] are those of the reference implementation, which knows no others; others are
    not stemmed, and in scripts without spaces each character is one.
    """
    score: float = _rouge_scorer().score(reference, answer)["rougeL"].fmeasure
    return score


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    theirs = DefaultTokenizer(use_stemmer=True).tokenize

    def tokenize(text: str) -> list[str]:
        return [
            t for word in split_terms(text) for t in (theirs(word) if word.isascii() else [word])
        ]

    return RougeScorer(["rougeL"], tokenizer=SimpleNamespace(tokenize=tokenize))


REFERENCE_METRICS: Mapping[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "token_f1": token_f1,
    "rougeL": rouge_l,
}
