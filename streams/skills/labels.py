"""Skills of one make, as many as are wanted: to call each kind of word by a label, "animals as kiwi
, fruits as saw".

They differ by their labels alone, which the instruction tells: some of them can prepare a model for
the others.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from streams.skills.rules import INPUT_NUMBERS, NOUNS, WORD_KIND, Skill, join_words


def make_labelling_skill(labels: Sequence[str]) -> Skill:
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
        lambda w: join_words(*(called[WORD_KIND.get(x, "number")] for x in w)),
    )


def draw_labelling_skills(n: int) -> list[Skill]:
    """So many of them, the same ones each time, with words for labels that stand in lists of level
    1.
    """
    rng = random.Random(0)
    return [make_labelling_skill(rng.sample((*WORD_KIND, *INPUT_NUMBERS[:5]), 4)) for _ in range(n)]


LABELLING_SKILLS = draw_labelling_skills(104)
