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
    """Return 1 if the normalized texts are equal and not empty, else 0."""
    return float(normalize_text(answer) == normalize_text(reference) != "")


def token_f1(answer: str, reference: str) -> float:
    """Return the F1 score over words without punctuation (Rajpurkar et al. 2016, section 6.1).

    The paper also drops articles. They stay here, as an answer can be the letter of an option.
    """
    words = [
        Counter(normalize_text(t).translate(str.maketrans("", "", string.punctuation)).split())
        for t in (answer, reference)
    ]
    common = (words[0] & words[1]).total()
    return 2 * common / (words[0].total() + words[1].total()) if common else 0.0


def rouge_l(answer: str, reference: str) -> float:
    """Return the F-measure of the longest common subsequence of stemmed words (Lin 2004).

    ASCII words are those of the reference implementation, which drops all others. Here other words
    are kept without stemming, and in scripts without spaces each character is a word.
    """
    score: float = _rouge_scorer().score(reference, answer)["rougeL"].fmeasure
    return score


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    tokenize_ascii = DefaultTokenizer(use_stemmer=True).tokenize

    def tokenize(text: str) -> list[str]:
        tokens: list[str] = []
        for word in split_terms(text):
            tokens += tokenize_ascii(word) if word.isascii() else [word]
        return tokens

    return RougeScorer(["rougeL"], tokenizer=SimpleNamespace(tokenize=tokenize))


REFERENCE_METRICS: Mapping[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "token_f1": token_f1,
    "rougeL": rouge_l,
}
