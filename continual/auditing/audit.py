"""Find problems in a stream's rows before training, without changing them or using a model.

Training rows are those of the stages, and those on which a model made for the stream is
pre-trained. A replay buffer holds no others.
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

# A task without labels is a classification task if it has at most this many distinct answers, each
# ten times on average.
MAX_CLASSES = 20
FINDING_TEXTS = {  # the most severe first
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
    """One problem in one task: the number of rows, a text, and one row with its file and line."""

    kind: str
    task: str
    count: int
    says: str
    example: str = ""


@dataclass(frozen=True)
class Audit:
    """Counts by task name, and the findings; `fits` holds the limits on tokens by their origin."""

    stream: str
    split: str
    tasks: Mapping[str, Mapping[str, Any]]
    findings: tuple[Finding, ...]
    fits: Mapping[str, int | None] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the document of audit.json."""
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
    """Find the problems in a stream's rows.

    `split`, `metric` and `max_examples` are those of the score section; `lengths` are each task's
    rows in tokens. Raises ConfigError for an unknown split.
    """
    if split not in SPLITS:
        raise ConfigError(unknown("score.split", split, SPLITS))
    lengths = lengths or {}
    rows = hash_rows(stream)
    train = train_rows_by_task(stream)
    scored = {t.name: getattr(t, split)[:max_examples] for t in stream.tasks}
    row_counts = Counter(row.task_split for row in rows)
    matches = find_matches(rows)
    majorities = {
        t.name: majority_baseline(t, train[t.name], scored[t.name], metric or t.metric)
        for t in stream.tasks
    }

    findings = _match_findings(matches, row_counts)
    for name, task_lengths in lengths.items():
        findings += _length_findings((name, "train"), len(train[name]), task_lengths.train_by_kind)
        findings += _length_findings((name, split), len(scored[name]), task_lengths.scored_by_kind)
    severity = list(FINDING_TEXTS)
    findings.sort(key=lambda finding: severity.index(finding.kind))
    findings += [
        Finding("unscored", t.name, 0, f"there are no {split} rows to score")
        for t in stream.tasks
        if not scored[t.name]
    ]
    for name, majority in majorities.items():
        if majority:
            findings += _imbalance_findings(name, split, majority)

    match_counts = {
        kind: Counter(row.example.task for row, *_ in some) for kind, some in matches.items()
    }
    tasks = {
        name: {
            **{s: row_counts[name, s] for s in SPLITS},
            **{kind: counts[name] for kind, counts in match_counts.items()},
            "majority": majorities[name],
            "tokens": lengths[name].summarize() if name in lengths else None,
        }
        for name in scored
    }
    return Audit(stream.name, split, tasks, tuple(findings), token_limits or {})


def _match_findings(
    matches: Mapping[str, Sequence[RowMatch]], row_counts: Mapping[tuple[str, str], int]
) -> list[Finding]:
    """Make one finding per kind of match, task and split."""
    findings = []
    for kind, some in matches.items():
        for task_split, group in _group_by_split(some).items():
            pairs = [(row.example, other.example) for row, other, _ in group]
            same_answers = sum(same for *_, same in group)
            findings.append(
                _make_finding(kind, task_split, pairs, row_counts[task_split], same_answers)
            )
    return findings


def _length_findings(
    task_split: tuple[str, str], num_rows: int, rows_by_kind: Mapping[str, Sequence[Example]]
) -> list[Finding]:
    """Make one finding per kind of length problem that concerns any row."""
    return [
        _make_finding(kind, task_split, [(e, e) for e in some], num_rows)
        for kind, some in rows_by_kind.items()
        if some
    ]


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
    example = " and ".join(dict.fromkeys(map(_describe_example, pairs[0])))
    return Finding(kind, task, len(pairs), says, example)


def _describe_example(e: Example) -> str:
    """Return an example's id and its location."""
    return e.id if e.location in ("", e.id) else f"{e.id} ({e.location})"


def majority_baseline(
    task: Task[Example], train: Sequence[Example], scored: Sequence[Example], metric: str
) -> dict[str, Any] | None:
    """Score always giving one answer, for a task with labels or at most MAX_CLASSES answers.

    None for any other task. `share` is the part of the training rows with their most common
    `answer`, one of `classes`. `score` is what this answer gets on the scored rows, and `own_score`
    what their own most common answer gets; None if the metric does not score answers.
    """
    first_answers = [e.outputs[0] for e in train or scored if "".join(e.outputs[:1]).strip()]
    normalize = cache(normalize_text)
    counts = Counter[str]()
    for text in first_answers:
        counts[normalize(text)] += 1
        if not task.labels and len(counts) > MAX_CLASSES:
            return None
    if not counts or (not task.labels and len(first_answers) < 10 * len(counts)):
        return None
    answer, n = counts.most_common(1)[0]
    own_counts = Counter(a for e in scored for a in {normalize(o) for o in e.outputs} if a)
    own_answer = own_counts.most_common(1)[0][0] if own_counts else None
    own_score = None
    if own_answer is not None:
        own_score = score_constant_answer(own_answer, scored, metric)
    return {
        "classes": max(len(counts), len({*map(normalize, task.labels)})),
        "answer": answer,
        "share": n / len(first_answers),
        "score": score_constant_answer(answer, scored, metric),
        "own_answer": own_answer,
        "own_score": own_score,
    }


def score_constant_answer(answer: str, rows: Sequence[Example], metric: str) -> float | None:
    """Return the score of giving one answer to every row.

    None without rows, or if the metric does not compare answers with references.
    """
    if metric not in REFERENCE_METRICS or not rows:
        return None
    score = cache(lambda reference: REFERENCE_METRICS[metric](answer, reference))
    return sum(max((score(o) for o in e.outputs), default=0.0) for e in rows) / len(rows)


def _imbalance_findings(name: str, split: str, majority: Mapping[str, Any]) -> list[Finding]:
    """Report a most common answer with 2/3 of the train rows, or twice an equal share."""
    if majority["share"] < min(2 / 3, 2 / majority["classes"]):
        return []
    score = ""
    if majority["score"] is not None:
        score = f"; giving it to all {split} rows scores {100 * majority['score']:.1f}"
    text = (
        f"{majority['answer'][:40]!r}, one of {majority['classes']} answers, is that of "
        f"{100 * majority['share']:.1f} % of the train rows{score}"
    )
    return [Finding("imbalance", name, 0, text)]
