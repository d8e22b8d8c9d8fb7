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
from streams.arrange import apply_arrangement, choose_tasks
from streams.skills.labels import LABELLING_SKILLS
from streams.skills.rules import BASIC_SKILLS, INPUT_NUMBERS, NOUNS, SKILLS, Skill

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
        f"labels_{n}": tuple(skill.name for skill in LABELLING_SKILLS[8 : 8 + n])
        for n in (6, 12, 24, 48, 96)
    },
}
HELD_OUT_SKILLS = (
    "swap_ends",
    "nouns_only",
    "third",
    "count_fruits",
    "subtract",
)  # by name only, and in order "long"
LABELS_HELD_OUT = tuple(skill.name for skill in LABELLING_SKILLS[:8])  # by name only
SKILLS_BY_NAME = {skill.name: skill for skill in (*SKILLS, *LABELLING_SKILLS)}
LEVELS = {1: (4, 5), 2: (5, 7), 3: (6, 9)}  # words of an input, and the largest number among them
ALL_NOUNS = tuple(word for words in NOUNS.values() for word in words)


def generate_skills(
    *,
    seed: int,
    tasks: Sequence[str] | None = None,
    order: str | None = "default",
    max_train_rows: int | None = None,
    arrangement: str = "sequential",
    difficulty: int = 1,
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
    if difficulty not in LEVELS:
        raise ConfigError(unknown("stream.difficulty", str(difficulty), map(str, LEVELS)))
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
    names = choose_tasks([*SKILLS_BY_NAME], orders=ORDERS, tasks=asked, order=order, seed=seed)
    basic = tuple(
        row
        for s in BASIC_SKILLS
        for row in generate_rows(s, "train", pretraining_size, difficulty, data_seed)
    )
    return apply_arrangement(
        [_generate_task(SKILLS_BY_NAME[name], sizes, difficulty, data_seed) for name in names],
        Stream("skills", "default", (), (), basic),
        order=order,
        max_train_rows=max_train_rows,
        arrangement=arrangement,
    )


def _generate_task(
    skill: Skill, sizes: Mapping[str, int], level: int, data_seed: int
) -> Task[Example]:
    train, dev, test = (
        generate_rows(skill, split, sizes[split], level, data_seed)
        for split in ("train", "dev", "test")
    )
    return Task(skill.name, train, dev, test, category=skill.category)


def generate_rows(
    skill: Skill, split: str, size: int, level: int, data_seed: int
) -> tuple[Example, ...]:
    """The first `size` inputs of this split that have an answer, each under a phrasing drawn for
    it.
    """
    rng = random.Random(f"{data_seed}/{skill.name}/{split}/{level}")
    found: list[Example] = []
    for words in generate_inputs(rng, split, level):
        if len(found) == size:
            break
        if skill.accepts(words):
            name = f"{skill.name}-{split}-{len(found)}"
            # The mark before the list lets a tokenizer see each word with a space before it, the
            # first one too.
            found.append(
                Example(
                    name,
                    skill.name,
                    rng.choice(skill.phrasings),
                    f"- {' '.join(words)}",
                    (skill.solve(words),),
                    location=name,
                )
            )
    return tuple(found)


def generate_inputs(rng: random.Random, split: str, level: int) -> Iterator[tuple[str, ...]]:
    """Distinct lists of this split without end: one or two number words among nouns of all kinds,
    in any order.
    """
    length, largest = LEVELS[level]
    seen: set[tuple[str, ...]] = set()
    while True:
        numbers = rng.choices(INPUT_NUMBERS[:largest], k=rng.choice((1, 2)))
        words = [*rng.sample(ALL_NOUNS, length - len(numbers)), *numbers]
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
