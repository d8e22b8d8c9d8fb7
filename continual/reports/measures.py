"""What the predictions of a run say beyond one score a task: by level of the instruction, and by
kind of accuracy.

In the form of probes.json: {name: {"says", "source", "better", "series": {label: [a value or null a
stage]}}}.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from continual.evaluation.instruction_parser import COMPOSITION_LEVELS
from continual.evaluation.row_metrics import ifeval_accuracies
from continual.io.untrusted import CONTROL
from continual.reports.figures import format_percent
from continual.results.prediction import Prediction
from continual.results.run_folder import Run

PredictionRows = Sequence[Prediction]

COMPLEXITY_PROBE = {
    "says": "the mean score of the test rows of each level: how their instructions are composed, "
    "as the row says or else by the instruction's own words",
    "source": "after ComplexBench (Wen et al. 2024)",
    "better": "higher",
}
ADHERENCE_PROBE = {
    "says": "the share of prompts whose constraints are all kept to, and of all constraints; "
    "loosely: with or without the answer's first line, last line and asterisks",
    "source": "IFEval (Zhou et al. 2023)",
    "better": "higher",
}


def mean_scores_by_level(rows: PredictionRows) -> dict[str, tuple[float, int]]:
    """The mean score of the predictions of each level, and how many these are; the levels rise,
    others follow.

    Empty for predictions that do not say their level.
    """
    marks: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row.level is not None:
            marks[CONTROL.sub(" ", row.level)[:60]].append(row.score)
    return {
        name: (sum(marks[name]) / len(marks[name]), len(marks[name]))
        for name in sorted(marks, key=_level_order)
    }


def _level_order(name: str) -> tuple[int, str]:
    return COMPOSITION_LEVELS.index(name) if name in COMPOSITION_LEVELS else len(
        COMPOSITION_LEVELS
    ), name


def _constraint_accuracies(rows: PredictionRows) -> dict[str, tuple[float, int]]:
    """IFEval's accuracies of predictions that say which constraints they keep to; empty for any
    other.
    """
    told = [
        row.result
        for row in rows
        if all(_is_flag_list(row.result.get(how)) for how in ("strict", "loose"))
    ]
    counts = {"prompt": len(told), "instruction": sum(len(row["strict"]) for row in told)}
    return (
        {
            name: (value, counts[name.partition(",")[0]])
            for name, value in ifeval_accuracies(told).items()
        }
        if told
        else {}
    )


def _is_flag_list(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, bool) for v in value)


def probes_from_predictions(run: Run) -> dict[str, Any]:
    """The series of a run over its stages: of tasks with rows of several levels, and of those with
    constraints.
    """
    found: dict[str, dict[str, list[float | None]]] = {"complexity": {}, "direct adherence": {}}
    stages = run.matrix.stages
    for task in run.matrix.tasks:
        for number, stage in enumerate(stages):
            rows = run.load_predictions(stage, task)
            levels = mean_scores_by_level(rows)
            kinds = {
                "complexity": levels if len(levels) > 1 else {},
                "direct adherence": _constraint_accuracies(rows),
            }
            for name, told in kinds.items():
                for label, (value, n) in told.items():
                    series = found[name].setdefault(
                        f"{task}: {label} (n = {n})", [None] * len(stages)
                    )
                    series[number] = value
    about = {"complexity": COMPLEXITY_PROBE, "direct adherence": ADHERENCE_PROBE}
    return {name: {**about[name], "series": series} for name, series in found.items() if series}


def print_measures(console: Console, run: Run) -> None:
    """The same after the last stage, where there is something to show."""
    stage = run.matrix.stages[-1]
    rows = {task: run.load_predictions(stage, task) for task in run.matrix.tasks}
    levels = {
        task: told for task, some in rows.items() if len(told := mean_scores_by_level(some)) > 1
    }
    kinds = {task: told for task, some in rows.items() if (told := _constraint_accuracies(some))}
    for title, found in (
        ("score in percent by level of the instruction", levels),
        ("constraints kept to, in percent", kinds),
    ):
        if found:
            console.print(Text(f"{title}, after {stage} (n in brackets)", style="bold"))
            console.print(_measure_table(found))


def _measure_table(measures: Mapping[str, Mapping[str, tuple[float, int]]]) -> Table:
    """A row a task, a column a level or accuracy."""
    named = dict.fromkeys(name for told in measures.values() for name in told)
    names = sorted(named, key=_level_order) if set(COMPOSITION_LEVELS) & set(named) else list(named)
    table = Table(box=None, padding=(0, 1))
    table.add_column("task", no_wrap=True)
    for name in names:
        table.add_column(Text(name), justify="right")
    for task, told in measures.items():
        cells = [
            f"{format_percent(told[name][0])} ({told[name][1]})" if name in told else ""
            for name in names
        ]
        table.add_row(Text(task), *map(Text, cells))
    return table
