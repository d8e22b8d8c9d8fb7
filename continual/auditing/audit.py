"""What is amiss in a stream's rows, counted before anything is learned: nothing is changed, and no
model is asked.

Training rows are what the stages learn and what a model made for the stream is pre-trained on; a
replay buffer holds nothing else.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

from continual.auditing.duplicates import RowMatch, find_matches, hash_rows, train_rows_by_task
from continual.auditing.lengths import Lengths
from continual.data.types import Example, Stream, Task
from continual.errors import ConfigError, unknown
from continual.evaluation.metrics import REFERENCE_METRICS
from continual.evaluation.scoring import SPLITS
from continual.evaluation.text_normalization import normalize_text

MAX_CLASSES = 20  # answers at most, each ten times on average, make a task without labels a classification task
FINDING_TEXTS = {  # the gravest first
    "leaked": "{n} prompts stand in training rows, {same} with the same answers",
    "input leaked": "{n} inputs stand in training rows under another instruction",
    "seen in dev": "{n} prompts stand in dev rows",
    "conflicting": "{n} rows have a prompt to which no answer is right in all rows that ask it",
    "empty": "{n} rows have an empty answer",
    "left out": "{n} rows do not fit, or have no answer: data.on_unusable",
    "too long": "{n} answers take more than score.max_new_tokens",
    "shortened": "{n} inputs are shortened to fit",
    "repeated": "{n} rows repeat the prompt of an earlier one, {same} with the same answers",
}


@dataclass(frozen=True)
class Finding:
    """One thing amiss in one task, in words: how many rows it concerns, and one of them with its
    file and line.
    """

    kind: str
    task: str
    count: int
    says: str
    example: str = ""


@dataclass(frozen=True)
class Audit:
    """Every task's counts by name, and the findings; `fits` says how many tokens do, and why."""

    stream: str
    split: str
    tasks: Mapping[str, Mapping[str, Any]]
    findings: tuple[Finding, ...]
    fits: Mapping[str, int | None] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As audit.json holds it."""
        return {"schema": 1, **asdict(self)}


def audit_stream(
    stream: Stream,
    split: str = "test",
    *,
    metric: str | None = None,
    max_examples: int | None = None,
    lengths: Mapping[str, Lengths] | None = None,
    token_limits: Mapping[str, int | None] | None = None,
) -> Audit:
    """Count what is amiss; `split`, `metric` and `limit` are those of score, `lengths` each task's
    rows in tokens.

    Raises ConfigError where there is no such split.
    """
    if split not in SPLITS:
        raise ConfigError(unknown("score.split", split, SPLITS))
    rows, train, lengths = hash_rows(stream), train_rows_by_task(stream), lengths or {}
    total, matches = Counter(row.task_split for row in rows), find_matches(rows)
    scored = {t.name: getattr(t, split)[:max_examples] for t in stream.tasks}
    one_sided = {
        t.name: majority_baseline(t, train[t.name], scored[t.name], metric or t.metric)
        for t in stream.tasks
    }
    found = [
        _make_finding(
            kind,
            place,
            [(a.example, b.example) for a, b, _ in some],
            total[place],
            sum(same for *_, same in some),
        )
        for kind, every in matches.items()
        for place, some in _group_by_split(every).items()
    ]
    for name, told in lengths.items():
        for part, of, kinds in (
            ("train", len(train[name]), told.train_by_kind),
            (split, len(scored[name]), told.scored_by_kind),
        ):
            found += [
                _make_finding(kind, (name, part), [(e, e) for e in some], of)
                for kind, some in kinds.items()
                if some
            ]
    found.sort(key=lambda f: [*FINDING_TEXTS].index(f.kind))
    found += [
        Finding("unscored", t.name, 0, f"there are no {split} rows to score")
        for t in stream.tasks
        if not scored[t.name]
    ]
    found += [
        f
        for name, told in one_sided.items()
        if told
        for f in _imbalance_findings(name, split, told)
    ]
    counts = {kind: Counter(a.example.task for a, *_ in every) for kind, every in matches.items()}
    tasks = {
        name: {
            **{s: total[name, s] for s in SPLITS},
            **{kind: n[name] for kind, n in counts.items()},
            "majority": one_sided[name],
            "tokens": lengths[name].summarize() if name in lengths else None,
        }
        for name in scored
    }
    return Audit(stream.name, split, tasks, tuple(found), token_limits or {})


def _group_by_split(matches: Sequence[RowMatch]) -> dict[tuple[str, str], list[RowMatch]]:
    groups: dict[tuple[str, str], list[RowMatch]] = defaultdict(list)
    for match in matches:
        groups[match[0].task_split].append(match)
    return groups


def _make_finding(
    kind: str,
    task_split: tuple[str, str],
    pairs: Sequence[tuple[Example, Example]],
    of: int,
    same: int = 0,
) -> Finding:
    task, split = task_split
    says = FINDING_TEXTS[kind].format(n=f"{len(pairs):,} of {of:,} {split}", same=f"{same:,}")
    return Finding(
        kind, task, len(pairs), says, " and ".join(dict.fromkeys(map(_describe_example, pairs[0])))
    )


def _describe_example(e: Example) -> str:
    """An example's id, and where it stands."""
    return e.id if e.location in ("", e.id) else f"{e.id} ({e.location})"


def majority_baseline(
    task: Task[Example], train: Sequence[Example], scored: Sequence[Example], metric: str
) -> dict[str, Any] | None:
    """What always giving one answer scores, for a task with labels or at most FEW answers; None for
    any other.

    `share` is the part of the training rows with their commonest answer, of `classes`; `score` and
    `own_score` are what it, and the scored rows' own commonest answer, get on those: None where the
    metric marks no answers.
    """
    firsts = [e.outputs[0] for e in train or scored if "".join(e.outputs[:1]).strip()]
    named, counts = cache(normalize_text), Counter[str]()
    for text in firsts:
        counts[named(text)] += 1
        if not task.labels and len(counts) > MAX_CLASSES:
            return None
    if not counts or (not task.labels and len(firsts) < 10 * len(counts)):
        return None
    answer, n = counts.most_common(1)[0]
    own = Counter(a for e in scored for a in {named(o) for o in e.outputs} if a)
    best = own.most_common(1)[0][0] if own else None
    return {
        "classes": max(len(counts), len({*map(named, task.labels)})),
        "answer": answer,
        "share": n / len(firsts),
        "score": score_constant_answer(answer, scored, metric),
        "own_answer": best,
        "own_score": None if best is None else score_constant_answer(best, scored, metric),
    }


def score_constant_answer(answer: str, rows: Sequence[Example], metric: str) -> float | None:
    """The score of giving this answer to every row; None without rows, or where the metric marks no
    answers.
    """
    if metric not in REFERENCE_METRICS or not rows:
        return None
    mark = cache(lambda reference: REFERENCE_METRICS[metric](answer, reference))
    return sum(max((mark(o) for o in e.outputs), default=0.0) for e in rows) / len(rows)


def _imbalance_findings(name: str, split: str, told: Mapping[str, Any]) -> list[Finding]:
    """Where the commonest answer has two thirds of the training rows, or twice its part among the
    classes.
    """
    if told["share"] < min(2 / 3, 2 / told["classes"]):
        return []
    score = (
        ""
        if told["score"] is None
        else f"; giving it to all {split} rows scores {100 * told['score']:.1f}"
    )
    return [
        Finding(
            "imbalance",
            name,
            0,
            f"{told['answer'][:40]!r}, one of {told['classes']} answers, is that of "
            f"{100 * told['share']:.1f} % of the train rows{score}",
        )
    ]
