"""Skills of one make, as many as are wanted: to call each kind of word by a label, "animals as kiwi
, fruits as saw".

They differ by their labels alone, which the instruction tells: some of them can prepare a model for
the others.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from streams.skills.rules import DIGITS, KIND, NOUNS, Skill, join


def labelling(labels: Sequence[str]) -> Skill:
    """The skill that calls animals, fruits, tools and numbers by these four words."""
    a, b, c, d = labels
    called = dict(zip((*NOUNS, "number"), labels, strict=True))
    return Skill(
        f"call_{'_'.join(labels)}",
        "labelling",
        (
            f"name each animal {a} , each fruit {b} , each tool {c} and each number {d}",
            f"for an animal say {a} , for a fruit {b} , for a tool {c} and for a number {d}",
            f"classify animals as {a} , fruits as {b} , tools as {c} and numbers as {d}",
        ),
        lambda w: join(*(called[KIND.get(x, "number")] for x in w)),
    )


def drawn(n: int) -> list[Skill]:
    """So many of them, the same ones each time, with words for labels that stand in lists of level
    1.
    """
    rng = random.Random(0)
    return [labelling(rng.sample((*KIND, *DIGITS[:5]), 4)) for _ in range(n)]


LABELS = drawn(104)
