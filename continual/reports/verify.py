"""Every summary of published matrices, recomputed: each in all its published forms, side by side
under their names.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from continual.errors import DataError, MissingError, brief, gathered
from continual.io import untrusted
from continual.reports.figures import NO_VALUE, SUMMARY_INFO
from continual.results.matrix import Score, mean_or_none
from continual.results.published import PublishedMatrix, load_published
from continual.results.run_folder import Run, group_runs
from continual.results.uncertainty import MEAN_TOLERANCE, interval_over_runs
from continual.results.variants import VARIANTS, compute_variants

JSON_ARGUMENTS = {"json=true": True, "json=false": False}
SUMMARY_TOLERANCE = (
    0.5001e-4  # what a stated figure may be off: it is a percentage with two decimals, at least
)


@dataclass(frozen=True)
class VariantRow:
    """One strategy's matrices over one stream: a value of each form from each that is finished."""

    label: str
    runs: tuple[Run, ...]
    values: dict[str, list[Score]]

    @property
    def task_counts(self) -> str:
        """How many tasks: one number, or each that there is."""
        return ", ".join(map(str, sorted({len(run.matrix.tasks) for run in self.runs})))

    def mean(self, name: str) -> Score:
        """None where one of the matrices lacks it."""
        return mean_or_none(self.values[name])

    def std(self, name: str) -> Score:
        """The sample standard deviation (n - 1); None of fewer than two."""
        known = [value for value in self.values[name] if value is not None]
        return (
            statistics.stdev(known)
            if len(known) > 1 and len(known) == len(self.values[name])
            else None
        )


def verify(arguments: Sequence[str], console: Console) -> None:
    """Print every form of every summary, with its definition; with json=true as JSON.

    Matrices of one strategy are repetitions of it. Raises DataError, after all is printed, where a
    file states another summary than its scores give, or where a run's answers were marked otherwise
    than its matrix says.
    """
    paths = [Path(word) for word in arguments if word not in JSON_ARGUMENTS]
    if not paths:
        raise MissingError(
            "continual verify needs a matrix.json, a .csv of scores, or a folder of them"
        )
    told = load_published(paths)
    if any(JSON_ARGUMENTS.get(word) for word in arguments):
        print(json.dumps(_to_dict(told), indent=1, ensure_ascii=False, allow_nan=False))
    else:
        _print_variants(told, console)
    if problems := [
        problem
        for one in told
        for problem in (*_summary_problems(one), *_prediction_problems(one.run))
    ]:
        raise DataError(gathered(problems))


def _group_rows(published: Sequence[PublishedMatrix]) -> list[VariantRow]:
    """Repetitions over seeds and orders are one line; unfinished runs are in no figure."""
    lines = []
    for group in group_runs([one.run for one in published]):
        each = [compute_variants(run.matrix) for run in group.runs if run.matrix.is_finished]
        lines.append(
            VariantRow(
                untrusted.CONTROL.sub("?", group.label),
                group.runs,
                {name: [values[name] for values in each] for name in VARIANTS},
            )
        )
    return lines


def _print_variants(published: Sequence[PublishedMatrix], console: Console) -> None:
    lines = _group_rows(published)
    console.print(
        Text(
            f"{len(published)} {'matrix' if len(published) == 1 else 'matrices'}; scores in percent, ± one "
            "standard deviation over the matrices of a strategy (seeds, orders)",
            style="dim",
        ),
        soft_wrap=True,
    )
    for summary, meaning in SUMMARY_INFO.items():
        names = [name for name, variant in VARIANTS.items() if variant.summary == summary]
        if not names:
            continue
        console.print()
        console.print(
            Text(f"{meaning.title} {meaning.arrow}: {meaning.description}", style="bold"),
            soft_wrap=True,
        )
        table = Table(box=None, padding=(0, 2, 0, 0))
        for head in ("strategy", "n", "tasks", *(VARIANTS[name].title for name in names)):
            table.add_column(
                head, justify="left" if head == "strategy" else "right", overflow="fold"
            )
        for line in lines:
            figures = [_format_figure(line, name) for name in names]
            table.add_row(
                Text(line.label), str(len(line.values[summary])), line.task_counts, *figures
            )
        console.print(table)
        for variant in map(VARIANTS.get, names):
            assert variant
            console.print(
                Text(f"  {variant.title}: {variant.formula}; {variant.source}", style="dim"),
                soft_wrap=True,
            )
    for text in _notices(published):
        console.print(Text(text, style="yellow"), soft_wrap=True)


def _format_figure(row: VariantRow, name: str) -> str:
    """A mean in percent with two decimals, and its spread."""
    value, spread = row.mean(name), row.std(name)
    told = NO_VALUE if value is None else f"{round(100 * value, 2) + 0.0:.2f}".replace("-", "−")
    return told + (f" ± {100 * spread:.2f}" if spread is not None else "")


def _notices(published: Sequence[PublishedMatrix]) -> list[str]:
    """What a reader must know beside the figures."""
    percent = [str(one.run.path) for one in published if one.is_percent]
    half = [str(one.run.path) for one in published if not one.run.matrix.is_finished]
    unknown = sorted(
        {
            f"{key} of {one.run.path}"
            for one in published
            for key in one.stated_summary
            if key not in VARIANTS
        }
    )
    bare = [one for one in published if not one.run.matrix.counts]
    return [
        untrusted.CONTROL.sub("?", text)
        for text in (
            *([f"read as percent: {', '.join(percent)}"] if percent else []),
            *([f"unfinished, and in no figure: {', '.join(half)}"] if half else []),
            *([f"stated, and not computed here: {', '.join(unknown)}"] if unknown else []),
            *(
                [
                    f"no counts of test examples in {len(bare)} of {len(published)} matrices, so "
                    "nothing is averaged over examples"
                ]
                if bare
                else []
            ),
        )
    ]


def _to_dict(published: Sequence[PublishedMatrix]) -> dict[str, Any]:
    """All of it, for machines: scores in [0, 1], null where a matrix lacks what a form needs."""
    matrices = []
    for one in published:
        matrix, found = one.run.matrix, compute_variants(one.run.matrix)
        matrices.append(
            {
                "path": str(one.run.path),
                "stream": matrix.stream,
                "strategy": matrix.strategy,
                "order": matrix.order,
                "seed": matrix.seed,
                "tasks": list(matrix.tasks),
                "finished": matrix.is_finished,
                "percent": one.is_percent,
                "summary": matrix.summary(),
                "forms": found,
                "problems": [*_summary_problems(one), *_prediction_problems(one.run)],
            }
        )
    groups = []
    for line in _group_rows(published):
        spans = {name: interval_over_runs(line.values[name]) for name in VARIANTS}
        groups.append(
            {
                "strategy": line.label,
                "stream": line.runs[0].matrix.stream,
                "n": len(line.values["average_performance"]),
                "mean": {name: line.mean(name) for name in VARIANTS},
                "spread": {name: line.std(name) for name in VARIANTS},
                "interval": {
                    name: [span.low, span.high] if span else None for name, span in spans.items()
                },
            }
        )
    definitions = {
        name: {"of": v.summary, "title": v.title, "formula": v.formula, "source": v.source}
        for name, v in VARIANTS.items()
    }
    return {"schema": 1, "definitions": definitions, "matrices": matrices, "groups": groups}


def _summary_problems(published: PublishedMatrix) -> list[str]:
    """The summaries that a file states and its scores do not give, up to two decimals of a
    percentage.
    """
    found, told = compute_variants(published.run.matrix), []
    for name, stated in published.stated_summary.items():
        if name not in VARIANTS or (stated is None and found[name] is None):
            continue
        value = found[name]
        if (
            value is None
            or not untrusted.is_number(stated)
            or abs(stated - value) > SUMMARY_TOLERANCE
        ):
            told.append(
                f"{published.run.path}: it states a {name} of {brief(stated)}, and its scores give "
                f"{'none' if value is None else f'{value:.6f}'}: {VARIANTS[name].formula}; "
                "correct the one or the other"
            )
    return told


def _prediction_problems(run: Run) -> list[str]:
    """The cells of a run's matrix that its answers in predictions/, where there are any, do not
    come to.
    """
    told, matrix = [], run.matrix
    for row, stage in enumerate(matrix.stages if run.path.is_dir() else ()):
        for task in matrix.tasks:
            marks, score = run.example_scores(stage, task)[1], matrix.score(row, task)
            found = statistics.fmean(marks) if marks else score
            if found is not None and (score is None or abs(found - score) > MEAN_TOLERANCE):
                told.append(
                    f"{run.path}: the {len(marks)} answers to {task!r} after {stage!r} come to "
                    f"{found:.6f}, and its matrix says {score}; score the stage again"
                )
    return told
