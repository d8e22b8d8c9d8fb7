"""Matrices of known summaries: by hand, published, and random."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import strategies as st

from continual.results.matrix import Matrix

PUBLISHED = (
    Path(os.environ.get("CONTINUAL_DATA") or Path(__file__).parents[3] / "shared" / "data")
    / "published"
)
# In percent: average performance, backward transfer, forgetting, learning accuracy.
KNOWN = {
    "olora_order1_seqft": (67.77, -14.50, 14.50, 78.64),
    "olora_order1_icrlora": (68.62, -14.55, 14.55, 79.53),
    "olora_order1_olora": (78.37, -1.18, 1.18, 79.25),
    "olora_long_seqlora": (32.04, -47.96, 48.95, 76.81),
    "olora_long_icrlora": (58.44, -19.44, 20.38, 76.58),
    "olora_long_olora": (72.17, -0.73, 1.74, 72.86),
}
CITB = {
    "REPLAY": (40.1, 0.6, 0.9, 1.5),
    "EWC": (34.0, 1.3, -6.9, 1.3),
    "FT_NO_INSTR": (29.6, 2.1, -10.5, 2.0),
}


def made(scores, tasks=("a", "b", "c"), stages=("base", "a", "b", "c"), **more):
    """A matrix of these scores; what a test does not speak of has a plain value."""
    told = {
        "stream": "skills",
        "order": "default",
        "strategy": "naive",
        "seed": 0,
        "metrics": dict.fromkeys(tasks, "exact_match"),
        "counts": (10,) * len(tasks),
        **more,
    }
    return Matrix(
        tasks=tuple(tasks), stages=tuple(stages), scores=tuple(map(tuple, scores)), **told
    )


THREE = made(((0.1, 0.2, 0.0), (0.8, 0.3, 0.1), (0.9, 0.7, 0.25), (0.5, 0.4, 1.0)))
JOINT = made(((0.0, 0.0, 0.0), (0.9, 0.8, 1.0)), stages=("base", "joint"))


def published(name):
    if not PUBLISHED.is_dir():
        pytest.skip(
            "the published matrices (../shared/data/published, or CONTINUAL_DATA) are not there"
        )
    return Matrix.load(PUBLISHED / f"{name}.json")


@st.composite
def matrices(draw, holes=False, base=True):
    size = draw(st.integers(2, 5))
    tasks = tuple(f"t{i}" for i in range(size))
    stages = (("base",) if base else ()) + tasks
    score = st.floats(0, 1) | (st.none() if holes else st.nothing())
    rows = draw(st.lists(st.tuples(*[score] * size), min_size=len(stages), max_size=len(stages)))
    return made(rows, tasks=tasks, stages=stages, seed=draw(st.none() | st.integers()))
