"""Changes of an instruction's words or format that leave what it asks: seeded, each with a name."""

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
    """All letters small."""
    return text.lower()


def uppercase(text: str, rng: random.Random) -> str:
    """All letters capital."""
    return text.upper()


def strip_punctuation(text: str, rng: random.Random) -> str:
    """Without any punctuation."""
    return " ".join(text.translate(str.maketrans("", "", string.punctuation)).split()) or text


def add_typos(text: str, rng: random.Random) -> str:
    """In every fifth word of four letters or more, at least one, two neighbouring letters within it
    are swapped.
    """
    words = text.split(" ")
    long = [i for i, word in enumerate(words) if len(word) > 3 and word.isalpha()]
    for i in rng.sample(long, -(-len(long) // 5)):
        at = rng.randrange(1, len(words[i]) - 2)
        words[i] = words[i][:at] + words[i][at + 1] + words[i][at] + words[i][at + 2 :]
    return " ".join(words)


def add_polite_phrase(text: str, rng: random.Random) -> str:
    """Behind a polite phrase."""
    return rng.choice(POLITE_PHRASES).format(text)


def break_lines(text: str, rng: random.Random) -> str:
    """A line break in place of the space behind every third to sixth word."""
    every, words = rng.randint(3, 6), text.split(" ")
    return "\n".join(" ".join(words[i : i + every]) for i in range(0, len(words), every))


def add_heading(text: str, rng: random.Random) -> str:
    """Behind a heading."""
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
