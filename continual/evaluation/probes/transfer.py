"""Cross-task generalization: the effect of a stage on tasks with similar and other instructions."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from continual.data.types import Example, Task
from continual.errors import ConfigError
from continual.evaluation.probes.base import (
    Probe,
    ProbeEntry,
    ProbeResult,
    RunSetup,
    StageContext,
    mean_or_none,
)
from continual.results.matrix import Matrix

MAX_SAMPLED_ROWS = 128  # train rows of a task that cluster_tasks uses
SOURCE = (
    "mean_j (R[i][j] - R[i-1][j]), the step of the matrix at a stage; tasks grouped by their "
    "instructions as cross-task generalisation asks (Mishra et al. 2022; Wang et al. 2022)"
)
SERIES_LABELS = {
    (
        seen,
        same,
    ): f"{'learned' if seen else 'not learned'}, {'same cluster' if same else 'other clusters'}"
    for seen in (True, False)
    for same in (True, False)
}


@dataclass(kw_only=True)
class Transfer(Probe):
    """Change of the other tasks' scores by a stage, within the learned task's cluster and beyond.

    After the stage of task i it is the mean over tasks j of R[i][j] - R[i-1][j], read off the
    matrix: for j learned before, below 0 is forgetting; for j not learned yet, above 0 is
    generalisation. `transfer overall` is the mean over all such pairs up to this stage. Clusters
    are found from the instructions alone: a task is the share of its train prompts that hold each
    word, times log((1 + T) / (1 + tasks with the word)) + 1, and average linkage joins the tasks as
    long as the cosine between two clusters is at least `min_similarity`.
    """

    min_similarity: float = 0.3
    clusters: list[list[str]] = field(init=False, repr=False, default_factory=list)

    def prepare(self, setup: RunSetup) -> None:
        """Cluster the tasks."""
        if not 0 <= self.min_similarity <= 1:
            raise ConfigError(
                f"probe.transfer.min_similarity={self.min_similarity}: expected a cosine in [0, 1]"
            )
        self.clusters = cluster_tasks(setup.stream.tasks, self.min_similarity)

    @property
    def entries(self) -> Mapping[str, ProbeEntry]:
        """Describe the changes of the stage, and of all stages so far."""
        told = " ".join(f"[{', '.join(names)}]" for names in self.clusters)
        return {
            "transfer": ProbeEntry(
                "change of the other tasks' scores by this stage, by whether a task's instructions "
                f"are like those of the one learned (clusters: {told})",
                SOURCE,
            ),
            "transfer overall": ProbeEntry(
                "the same, mean over all pairs of stage and task so far", SOURCE
            ),
        }

    def measure(self, context: StageContext) -> ProbeResult:
        """Compute the changes; None before training, and for a stage of several tasks."""
        stages = len(context.matrix.stages)
        every = [self._score_changes(context.matrix, row) for row in range(1, stages)]
        last = every[-1] if every else {}
        return {
            "transfer": {
                label: mean_or_none(last.get(key, [])) for key, label in SERIES_LABELS.items()
            },
            "transfer overall": {
                label: mean_or_none(v for steps in every for v in steps.get(key, []))
                for key, label in SERIES_LABELS.items()
            },
        }

    def _score_changes(self, matrix: Matrix, row: int) -> dict[tuple[bool, bool], list[float]]:
        """Return the other tasks' score changes at a row, by (learned before, same cluster)."""
        own, found = matrix.stages[row], dict[tuple[bool, bool], list[float]]()
        if own not in matrix.tasks:
            return found
        near = next(names for names in self.clusters if own in names)
        for task in matrix.tasks:
            before, after = matrix.score(row - 1, task), matrix.score(row, task)
            if task != own and before is not None and after is not None:
                found.setdefault((task in matrix.stages[:row], task in near), []).append(
                    after - before
                )
        return found


def cluster_tasks(tasks: Sequence[Task[Example]], min_similarity: float) -> list[list[str]]:
    """Group task names by similar instructions, in the order of the tasks."""
    from scipy.cluster.hierarchy import fcluster, linkage

    names, vectors = [t.name for t in tasks], _tfidf_vectors(tasks)
    if len(names) < 2:
        return [names]
    cosine = np.clip(vectors @ vectors.T, 0, 1)
    pairs = np.triu_indices(len(names), 1)
    label = fcluster(linkage(1 - cosine[pairs], "average"), 1 - min_similarity + 1e-9, "distance")
    groups: dict[int, list[str]] = {}
    for name, at in zip(names, label.tolist(), strict=True):
        groups.setdefault(at, []).append(name)
    return list(groups.values())


def _tfidf_vectors(tasks: Sequence[Task[Example]]) -> NDArray[Any]:
    """Return (T, words) vectors of norm 1."""
    shares = [_word_shares(t) for t in tasks]
    common = Counter(word for told in shares for word in told)
    words = sorted(common)
    weight = np.array([math.log((1 + len(tasks)) / (1 + common[w])) + 1 for w in words])
    rows = (
        np.array([[told.get(w, 0.0) for w in words] for told in shares]).reshape(len(tasks), -1)
        * weight
    )
    made: NDArray[Any] = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return made


def _word_shares(task: Task[Example]) -> dict[str, float]:
    """Return for each word the share of sampled train instructions that hold it."""
    rows = task.train or task.dev or task.test
    chosen = rows[:: max(1, -(-len(rows) // MAX_SAMPLED_ROWS))]
    found = Counter(
        word for e in chosen for word in set(re.findall(r"\w+", "\n".join(e.user_turns).casefold()))
    )
    return {word: n / len(chosen) for word, n in found.items()}
