"""The embedded stream: instruction types over short word lists, by seeded rules of our own, each
learned in seconds.

Inputs are drawn alike for every task, so only the instruction says what to do and a later task
competes with the earlier ones. An input's hash decides its split: what one task tests, no task has
trained on, nor has pre-training.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Mapping, Sequence

from continual.data.types import Example, Stream, Task
from continual.errors import ConfigError, unknown
from streams.arrange import choose, stage
from streams.skills.labels import LABELS
from streams.skills.rules import BASIC, DIGITS, NOUNS, SKILLS, Skill

ORDERS = {
    "default": (
        "count_animals",
        "reverse",
        "add",
        "first_and_third",
        "majority",
        "alphabetical_last",
    ),
    "reverse": (
        "alphabetical_last",
        "majority",
        "first_and_third",
        "add",
        "reverse",
        "count_animals",
    ),
    "easy_first": (
        "first_and_third",
        "majority",
        "add",
        "alphabetical_last",
        "count_animals",
        "reverse",
    ),
    "long": tuple(skill.name for skill in SKILLS),
    **{
        f"labels_{n}": tuple(skill.name for skill in LABELS[8 : 8 + n]) for n in (6, 12, 24, 48, 96)
    },
}
HELD_OUT = (
    "swap_ends",
    "nouns_only",
    "third",
    "count_fruits",
    "subtract",
)  # by name only, and in order "long"
LABELS_HELD_OUT = tuple(skill.name for skill in LABELS[:8])  # by name only
BY_NAME = {skill.name: skill for skill in (*SKILLS, *LABELS)}
LEVELS = {1: (4, 5), 2: (5, 7), 3: (6, 9)}  # words of an input, and the largest number among them
WORDS = tuple(word for words in NOUNS.values() for word in words)


def skills(
    *,
    seed: int,
    tasks: Sequence[str] | None = None,
    order: str | None = "default",
    limit: int | None = None,
    arrangement: str = "sequential",
    level: int = 1,
    train_size: int = 600,
    dev_size: int = 100,
    test_size: int = 100,
    pretraining_size: int = 1500,
    data_seed: int = 0,
) -> Stream:
    """Six skills in the default order, more by name; `level` 1 is easy, 3 hard (longer lists,
    larger numbers).

    The orders labels_6 to labels_96 are of that many skills of one make, the shorter ones a part of
    the longer.

    The sizes are rows a task. All rows depend on `data_seed`, `level` and the sizes alone; `seed`
    shuffles order=random. Raises ConfigError for a level, size, task or order that cannot be.
    """
    if level not in LEVELS:
        raise ConfigError(unknown("stream.level", str(level), map(str, LEVELS)))
    sizes = {"train": train_size, "dev": dev_size, "test": test_size}
    wrong = [f"{split}_size={n}" for split, n in sizes.items() if not 0 < n <= 5000]
    if wrong or not 0 <= pretraining_size <= 5000:
        raise ConfigError(
            f"found stream.{', '.join(wrong) or f'pretraining_size={pretraining_size}'}, "
            "expected 1 to 5000 rows a task (0 only for pretraining_size)"
        )
    order = (
        None if tasks is not None and order == "default" else order
    )  # named tasks need not be of that order
    asked = ORDERS["long"] if tasks is None and order == "random" else tasks
    names = choose([*BY_NAME], orders=ORDERS, tasks=asked, order=order, seed=seed)
    basic = tuple(
        row for s in BASIC for row in rows(s, "train", pretraining_size, level, data_seed)
    )
    return stage(
        [_task(BY_NAME[name], sizes, level, data_seed) for name in names],
        Stream("skills", "default", (), (), basic),
        order=order,
        limit=limit,
        arrangement=arrangement,
    )


def _task(skill: Skill, sizes: Mapping[str, int], level: int, data_seed: int) -> Task[Example]:
    train, dev, test = (
        rows(skill, split, sizes[split], level, data_seed) for split in ("train", "dev", "test")
    )
    return Task(skill.name, train, dev, test, category=skill.category)


def rows(skill: Skill, split: str, size: int, level: int, data_seed: int) -> tuple[Example, ...]:
    """The first `size` inputs of this split that have an answer, each under a phrasing drawn for
    it.
    """
    rng = random.Random(f"{data_seed}/{skill.name}/{split}/{level}")
    found: list[Example] = []
    for words in inputs(rng, split, level):
        if len(found) == size:
            break
        if skill.fits(words):
            name = f"{skill.name}-{split}-{len(found)}"
            # The mark before the list lets a tokenizer see each word with a space before it, the
            # first one too.
            found.append(
                Example(
                    name,
                    skill.name,
                    rng.choice(skill.phrasings),
                    f"- {' '.join(words)}",
                    (skill.answer(words),),
                    where=name,
                )
            )
    return tuple(found)


def inputs(rng: random.Random, split: str, level: int) -> Iterator[tuple[str, ...]]:
    """Distinct lists of this split without end: one or two number words among nouns of all kinds,
    in any order.
    """
    length, largest = LEVELS[level]
    seen: set[tuple[str, ...]] = set()
    while True:
        numbers = rng.choices(DIGITS[:largest], k=rng.choice((1, 2)))
        words = [*rng.sample(WORDS, length - len(numbers)), *numbers]
        rng.shuffle(words)
        drawn = tuple(words)
        if drawn not in seen and split_of(drawn) == split:
            seen.add(drawn)
            yield drawn


def split_of(words: Sequence[str]) -> str:
    """The split that an input belongs to, whichever task asks about it: a tenth test, a tenth dev,
    the rest train.
    """
    return {0: "test", 1: "dev"}.get(zlib.crc32(" ".join(words).encode()) % 10, "train")
