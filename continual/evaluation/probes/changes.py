"""Seeded changes of an instruction's words or format that keep its meaning."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Mapping

POLITE_PHRASES = (
    "Please {}",
    "Could you please do this: {}",
    "I would be grateful if you could help. {}",
)


def lowercase(text: str, rng: random.Random) -> str:
    """Return the text in lowercase."""
    return text.lower()


def uppercase(text: str, rng: random.Random) -> str:
    """Return the text in capitals."""
    return text.upper()


def strip_punctuation(text: str, rng: random.Random) -> str:
    """Remove punctuation; a text of punctuation alone stays."""
    return " ".join(text.translate(str.maketrans("", "", string.punctuation)).split()) or text


def add_typos(text: str, rng: random.Random) -> str:
    """Swap two adjacent inner letters in a fifth of the words of four or more letters.

    At least one such word is changed, if there is any.
    """
    words = text.split(" ")
    long = [i for i, word in enumerate(words) if len(word) > 3 and word.isalpha()]
    for i in rng.sample(long, -(-len(long) // 5)):
        word = words[i]
        at = rng.randrange(1, len(word) - 2)
        words[i] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)


def add_polite_phrase(text: str, rng: random.Random) -> str:
    """Put a polite phrase before the text."""
    return rng.choice(POLITE_PHRASES).format(text)


def break_lines(text: str, rng: random.Random) -> str:
    """Replace the space after every n-th word by a line break, for an n from 3 to 6."""
    every = rng.randint(3, 6)
    words = text.split(" ")
    return "\n".join(" ".join(words[i : i + every]) for i in range(0, len(words), every))


def add_heading(text: str, rng: random.Random) -> str:
    """Put a heading before the text."""
    return f"Task: {text}"


CHANGES: Mapping[str, Callable[[str, random.Random], str]] = {
    "lower": lowercase,
    "upper": uppercase,
    "bare": strip_punctuation,
    "typos": add_typos,
    "polite": add_polite_phrase,
    "lines": break_lines,
    "headed": add_heading,
}
