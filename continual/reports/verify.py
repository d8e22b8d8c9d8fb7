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
from continual.reports.figures import MEANINGS, NONE
from continual.results.matrix import Score, mean
from continual.results.published import Told, read
from continual.results.run_folder import Run, grouped
from continual.results.uncertainty import NEAR, marked, over_runs
from continual.results.variants import VARIANTS, forms

ASKED = {"json=true": True, "json=false": False}
STATED = (
    0.5001e-4  # what a stated figure may be off: it is a percentage with two decimals, at least
)


@dataclass(frozen=True)
class Line:
    """One strategy's matrices over one stream: a value of each form from each that is finished."""

    label: str
    runs: tuple[Run, ...]
    values: dict[str, list[Score]]

    @property
    def tasks(self) -> str:
        """How many tasks: one number, or each that there is."""
        return ", ".join(map(str, sorted({len(run.matrix.tasks) for run in self.runs})))

    def mean(self, name: str) -> Score:
        """None where one of the matrices lacks it."""
        return mean(self.values[name])

    def spread(self, name: str) -> Score:
        """The sample standard deviation (n - 1); None of fewer than two."""
        known = [value for value in self.values[name] if value is not None]
        return (
            statistics.stdev(known)
            if len(known) > 1 and len(known) == len(self.values[name])
            else None
        )


def verify(words: Sequence[str], console: Console) -> None:
    """Print every form of every summary, with its definition; with json=true as JSON.

    Matrices of one strategy are repetitions of it. Raises DataError, after all is printed, where a
    file states another summary than its scores give, or where a run's answers were marked otherwise
    than its matrix says.
    """
    paths = [Path(word) for word in words if word not in ASKED]
    if not paths:
        raise MissingError(
            "continual verify needs a matrix.json, a .csv of scores, or a folder of them"
        )
    told = read(paths)
    if any(ASKED.get(word) for word in words):
        print(json.dumps(_json(told), indent=1, ensure_ascii=False, allow_nan=False))
    else:
        _show(told, console)
    if problems := [
        problem for one in told for problem in (*_misstated(one), *_mismarked(one.run))
    ]:
        raise DataError(gathered(problems))


def _lines(told: Sequence[Told]) -> list[Line]:
    """Repetitions over seeds and orders are one line; unfinished runs are in no figure."""
    lines = []
    for group in grouped([one.run for one in told]):
        each = [forms(run.matrix) for run in group.runs if run.matrix.finished]
        lines.append(
            Line(
                untrusted.CONTROL.sub("?", group.label),
                group.runs,
                {name: [values[name] for values in each] for name in VARIANTS},
            )
        )
    return lines


def _show(told: Sequence[Told], console: Console) -> None:
    lines = _lines(told)
    console.print(
        Text(
            f"{len(told)} {'matrix' if len(told) == 1 else 'matrices'}; scores in percent, ± one "
            "standard deviation over the matrices of a strategy (seeds, orders)",
            style="dim",
        ),
        soft_wrap=True,
    )
    for summary, meaning in MEANINGS.items():
        names = [name for name, variant in VARIANTS.items() if variant.of == summary]
        if not names:
            continue
        console.print()
        console.print(
            Text(f"{meaning.title} {meaning.arrow}: {meaning.says}", style="bold"), soft_wrap=True
        )
        table = Table(box=None, padding=(0, 2, 0, 0))
        for head in ("strategy", "n", "tasks", *(VARIANTS[name].title for name in names)):
            table.add_column(
                head, justify="left" if head == "strategy" else "right", overflow="fold"
            )
        for line in lines:
            figures = [_figure(line, name) for name in names]
            table.add_row(Text(line.label), str(len(line.values[summary])), line.tasks, *figures)
        console.print(table)
        for variant in map(VARIANTS.get, names):
            assert variant
            console.print(
                Text(f"  {variant.title}: {variant.formula}; {variant.source}", style="dim"),
                soft_wrap=True,
            )
    for text in _notes(told):
        console.print(Text(text, style="yellow"), soft_wrap=True)


def _figure(line: Line, name: str) -> str:
    """A mean in percent with two decimals, and its spread."""
    value, spread = line.mean(name), line.spread(name)
    told = NONE if value is None else f"{round(100 * value, 2) + 0.0:.2f}".replace("-", "−")
    return told + (f" ± {100 * spread:.2f}" if spread is not None else "")


def _notes(told: Sequence[Told]) -> list[str]:
    """What a reader must know beside the figures."""
    percent = [str(one.run.path) for one in told if one.percent]
    half = [str(one.run.path) for one in told if not one.run.matrix.finished]
    unknown = sorted(
        {f"{key} of {one.run.path}" for one in told for key in one.stated if key not in VARIANTS}
    )
    bare = [one for one in told if not one.run.matrix.counts]
    return [
        untrusted.CONTROL.sub("?", text)
        for text in (
            *([f"read as percent: {', '.join(percent)}"] if percent else []),
            *([f"unfinished, and in no figure: {', '.join(half)}"] if half else []),
            *([f"stated, and not computed here: {', '.join(unknown)}"] if unknown else []),
            *(
                [
                    f"no counts of test examples in {len(bare)} of {len(told)} matrices, so "
                    "nothing is averaged over examples"
                ]
                if bare
                else []
            ),
        )
    ]


def _json(told: Sequence[Told]) -> dict[str, Any]:
    """All of it, for machines: scores in [0, 1], null where a matrix lacks what a form needs."""
    matrices = []
    for one in told:
        matrix, found = one.run.matrix, forms(one.run.matrix)
        matrices.append(
            {
                "path": str(one.run.path),
                "stream": matrix.stream,
                "strategy": matrix.strategy,
                "order": matrix.order,
                "seed": matrix.seed,
                "tasks": list(matrix.tasks),
                "finished": matrix.finished,
                "percent": one.percent,
                "summary": matrix.summary(),
                "forms": found,
                "problems": [*_misstated(one), *_mismarked(one.run)],
            }
        )
    groups = []
    for line in _lines(told):
        spans = {name: over_runs(line.values[name]) for name in VARIANTS}
        groups.append(
            {
                "strategy": line.label,
                "stream": line.runs[0].matrix.stream,
                "n": len(line.values["average_performance"]),
                "mean": {name: line.mean(name) for name in VARIANTS},
                "spread": {name: line.spread(name) for name in VARIANTS},
                "interval": {
                    name: [span.low, span.high] if span else None for name, span in spans.items()
                },
            }
        )
    definitions = {
        name: {"of": v.of, "title": v.title, "formula": v.formula, "source": v.source}
        for name, v in VARIANTS.items()
    }
    return {"schema": 1, "definitions": definitions, "matrices": matrices, "groups": groups}


def _misstated(one: Told) -> list[str]:
    """The summaries that a file states and its scores do not give, up to two decimals of a
    percentage.
    """
    found, told = forms(one.run.matrix), []
    for name, stated in one.stated.items():
        if name not in VARIANTS or (stated is None and found[name] is None):
            continue
        value = found[name]
        if value is None or not untrusted.is_number(stated) or abs(stated - value) > STATED:
            told.append(
                f"{one.run.path}: it states a {name} of {brief(stated)}, and its scores give "
                f"{'none' if value is None else f'{value:.6f}'}: {VARIANTS[name].formula}; "
                "correct the one or the other"
            )
    return told


def _mismarked(run: Run) -> list[str]:
    """The cells of a run's matrix that its answers in predictions/, where there are any, do not
    come to.
    """
    told, matrix = [], run.matrix
    for row, stage in enumerate(matrix.stages if run.path.is_dir() else ()):
        for task in matrix.tasks:
            marks, score = marked(run, stage, task)[1], matrix.at(row, task)
            found = statistics.fmean(marks) if marks else score
            if found is not None and (score is None or abs(found - score) > NEAR):
                told.append(
                    f"{run.path}: the {len(marks)} answers to {task!r} after {stage!r} come to "
                    f"{found:.6f}, and its matrix says {score}; score the stage again"
                )
    return told
