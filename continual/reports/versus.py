"""What a comparison shows: groups of runs side by side, as a page and as comparison.json."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from continual.reports import beside, figures
from continual.reports.charts import SCORE_AXIS, Axis, Chart, Point, ScatterChart, Series
from continual.reports.figures import SUMMARY_INFO, format_mean_std, format_percent
from continual.reports.sections import (
    Cell,
    ColumnHead,
    Page,
    PageTable,
    Row,
    Section,
    heat_map,
    learned_points,
    mean_matrix,
    stage_axis,
    task_points,
)
from continual.results.matrix import (
    BASE_STAGE,
    Matrix,
    forgetting_by_stage,
    mean_or_none,
    performance_by_stage,
)
from continual.results.run_folder import Run, RunGroup, find_joint_reference
from continual.results.uncertainty import (
    PairedDifference,
    differences_from_baseline,
    interval_over_runs,
)

SUMMARY_ORDER = (
    "average_performance",
    "forgetting",
    "learning_accuracy",
    "backward_transfer",
    "forward_transfer",
    "intransigence",
)
MIN_RUNS_FOR_BAND = 3  # runs of which an interval is drawn: of two it is as wide as the chart
TIME_HEAD = ColumnHead("Time", "wall time of the run")


def comparison_to_dict(
    runs: Sequence[Run], groups: Sequence[RunGroup], out: Path
) -> dict[str, Any]:
    """The content of comparison.json; paths are relative to `out`."""
    told = []
    for group in groups:
        for run, summary in zip(group.runs, group.summaries, strict=True):
            told.append(
                {
                    "path": os.path.relpath(run.path, out),
                    "group": group.label,
                    "finished": run.matrix.is_finished,
                    "strategy": run.matrix.strategy,
                    "order": run.matrix.order,
                    "seed": run.matrix.seed,
                    "summary": summary,
                    "cost": dict(run.matrix.cost),
                }
            )
    names = [*SUMMARY_INFO, *dict.fromkeys(key for run in runs for key in run.matrix.cost)]
    other, differences = differences_from_baseline(groups)
    return {
        "schema": 1,
        "runs": told,
        "groups": [
            {
                "strategy": group.label,
                "n": group.num_finished,
                "mean": {name: group.mean(name) for name in names},
                "spread": {name: group.std(name) for name in names},
                "interval": {
                    name: [span.low, span.high]
                    if (span := interval_over_runs(group.finished_values(name)))
                    else None
                    for name in names
                },
            }
            for group in groups
        ],
        "against": {
            "strategy": other,
            "differences": {label: asdict(told) for label, told in differences.items()},
        },
    }


def available_summaries(groups: Sequence[RunGroup]) -> list[str]:
    """The summaries that some group has."""
    return [name for name in SUMMARY_ORDER if any(group.mean(name) is not None for group in groups)]


def build_comparison_page(
    runs: Sequence[Run],
    groups: Sequence[RunGroup],
    pending: Sequence[str],
    out: Path,
    unfinished: Sequence[str] = (),
) -> Page:
    """Runs side by side; links are relative to `out`, `left` says what is to be finished and how."""
    streams = ", ".join(dict.fromkeys(run.matrix.stream for run in runs))
    arms = [group for group in groups if not group.is_joint]
    looks: dict[str, int | str] = {group.label: i for i, group in enumerate(arms)}
    looks.update({group.label: "ceiling" for group in groups if group.is_joint})
    sections = [
        _curves_section(groups, looks),
        _summary_section(groups, looks),
        _scatter_section(groups),
        _task_charts_section(groups, looks),
        beside.probe_comparison_section(groups, looks),
        _heat_map_section(groups),
        beside.flip_comparison_section(groups),
        _settings_section(groups),
        _runs_section(groups, out),
    ]
    chosen = [
        (
            group.label,
            looks[group.label],
            " ".join([group.label, *(_search_text(run) for run in group.runs)]),
        )
        for group in groups
    ]
    return Page(
        f"{len(arms)} strategies on {streams}" if len(arms) > 1 else f"Runs on {streams}",
        "Comparison",
        _facts(runs),
        [*_notices(runs, pending), *unfinished],
        sections,
        chosen,
        list(dict.fromkeys(task for run in runs for task in run.matrix.tasks)),
    )


def _search_text(run: Run) -> str:
    """What a reader may look for a run by."""
    return f"{run.path.name} {run.matrix.order} seed={run.matrix.seed}"


def _facts(runs: Sequence[Run]) -> list[str]:
    seeds = {run.matrix.seed for run in runs}
    orders = dict.fromkeys(run.matrix.order for run in runs if run.matrix.order)
    tasks = {task for run in runs for task in run.matrix.tasks}
    return [
        f"{len(runs)} runs",
        f"{len(tasks)} tasks",
        f"{len(seeds)} seed{'s' * (len(seeds) != 1)}",
        *([f"order{'s' * (len(orders) != 1)} {', '.join(orders)}"] if orders else []),
    ]


def _notices(runs: Sequence[Run], pending: Sequence[str]) -> list[str]:
    half = [run.path.name for run in runs if not run.matrix.is_finished]
    told = [f"Unfinished, and in no mean: {', '.join(half)}."] if half else []
    told += [f"Nothing scored yet: {', '.join(pending)}."] if pending else []
    if any(run.is_joint for run in runs) and (
        alone := [r for r in runs if not r.is_joint and not find_joint_reference(r, runs)]
    ):
        told.append(
            "No joint run over the same tasks, so no intransigence: "
            f"{', '.join(run.path.name for run in alone)}."
        )
    return told


def _curves_section(groups: Sequence[RunGroup], styles: dict[str, int | str]) -> Section:
    """The mean score, and the mean fall, of the tasks learned so far: a line a group, with its
    interval.
    """
    learned = [
        line
        for group in groups
        if not group.is_joint
        for line in _stage_series(group, performance_by_stage, styles)
    ]
    fallen = [
        line
        for group in groups
        if not group.is_joint
        for line in _stage_series(group, forgetting_by_stage, styles)
    ]
    last = max((x for s in learned for x, _ in s.points), default=1.0)
    ceilings = [
        Series(group.label, [(1.0, top), (last, top)], "ceiling", dots=False)
        for group in groups
        if group.is_joint and (top := group.mean("average_performance")) is not None
    ]
    charts = [
        Chart(
            "Average over the tasks learned so far",
            [*ceilings, *learned],
            Axis("stage", "count", (1.0, last)),
            by="group",
            says="mean over the tasks learned so far of their score, after each stage",
        )
    ]
    if fallen:
        charts.append(
            Chart(
                "Forgetting so far",
                fallen,
                Axis("stage", "count", (1.0, last)),
                Axis("forgetting, %", span=_padded_span(fallen)),
                by="group",
                says="mean over the tasks learned before of their best score so far less that now",
            )
        )
    notes = [
        "Percent, after each stage; the mean over runs.",
        "The grey broken line is joint training at its end." if ceilings else "",
        "A band is the 95% interval (Student's t) of a mean over three runs or more, drawn "
        "around few lines."
        if any(s.band for s in learned)
        else "",
    ]
    return Section("Through the stages", " ".join(filter(None, notes)), charts)


def _stage_series(
    group: RunGroup, measure: Callable[[Matrix], list[float | None]], styles: dict[str, int | str]
) -> list[Series]:
    told = [measure(run.matrix) for run in group.runs]
    points, band = [], []
    for i in range(max(map(len, told), default=0)):
        there = [values[i] for values in told if i < len(values)]
        known = [value for value in there if value is not None]
        if known and len(known) == len(there):
            points.append((i + 1.0, sum(known) / len(known)))
            band += _band_at(i + 1.0, known)
    return [Series(group.label, points, styles[group.label], band)] if points else []


def _band_at(x: float, values: Sequence[float]) -> list[tuple[float, float, float]]:
    found = interval_over_runs(values) if len(values) >= MIN_RUNS_FOR_BAND else None
    return [(x, max(-1.0, found.low), min(1.0, found.high))] if found else []


def _padded_span(series: Sequence[Series]) -> Point:
    """From 0, or what is below, to what is above."""
    ys = [y for s in series for _, y in s.points]
    return min(0.0, *ys) if ys else 0.0, max(0.1, *ys) * 1.05


def _summary_section(groups: Sequence[RunGroup], styles: dict[str, int | str]) -> Section:
    """A row a group; the best figure of a column is marked, the joint arm aside."""
    arms = [group for group in groups if not group.is_joint]
    names, rows, (other, differences) = (
        available_summaries(groups),
        [],
        differences_from_baseline(groups),
    )
    for group in groups:
        of = f" of {len(group.runs)}" if group.num_finished != len(group.runs) else ""
        cells = [
            Cell(group.label, group.label),
            Cell(f"{group.num_finished}{of}", group.num_finished),
        ]
        for name in names:
            means = [value for value in (arm.mean(name) for arm in arms) if value is not None]
            best = (max if SUMMARY_INFO[name].better == "higher" else min)(means, default=None)
            value = group.mean(name)
            cells.append(
                Cell(
                    format_mean_std(value, group.std(name), SUMMARY_INFO[name].signed),
                    value,
                    len(means) > 1 and value == best and not group.is_joint,
                )
            )
        if differences:
            cells.append(_difference_cell(differences.get(group.label)))
        took = group.mean("seconds")
        rows.append(
            Row(
                [*cells, Cell(figures.format_seconds(took), took)],
                group.label,
                style=styles[group.label],
            )
        )
    beyond = (
        [
            ColumnHead(
                f"Over {other}",
                f"average performance less that of {other} on the same test examples, with its 95% "
                "interval",
            )
        ]
        if differences
        else []
    )
    heads = [
        ColumnHead("Strategy"),
        ColumnHead("Runs", "finished runs, over seeds and orders"),
        *map(_summary_head, names),
        *beyond,
        TIME_HEAD,
    ]
    return Section(
        "Side by side",
        "Percent, mean ± standard deviation over seeds and orders; the best of a column is "
        "bold. A heading sorts, and says what it means.",
        table=PageTable("groups", heads, rows),
    )


def _difference_cell(difference: PairedDifference | None) -> Cell:
    """How a strategy differs from another on the same examples."""
    return Cell(
        f"{format_percent(difference.difference, True)} {figures.format_interval(difference.low, difference.high, True)}"
        if difference
        else figures.NO_VALUE,
        difference.difference if difference else None,
    )


def _summary_head(name: str) -> ColumnHead:
    meaning = SUMMARY_INFO[name]
    return ColumnHead(
        f"{meaning.title}\u00a0{meaning.arrow}",
        f"{meaning.description}; {meaning.better} is better",
    )


def _scatter_section(groups: Sequence[RunGroup]) -> Section | None:
    """A dot a run: plasticity against stability, and any summary against any cost."""
    told: list[dict[str, Any]] = [
        {
            "group": group.label,
            "text": f"{group.label} {_search_text(run)}",
            "values": {
                **{name: summary[name] for name in SUMMARY_INFO if name in summary},
                **run.matrix.cost,
            },
        }
        for group in groups
        for run, summary in zip(group.runs, group.summaries, strict=True)
    ]
    names = [
        name for name in SUMMARY_INFO if any(run["values"].get(name) is not None for run in told)
    ]
    costs = list(
        dict.fromkeys(key for group in groups for run in group.runs for key in run.matrix.cost)
    )
    axes = {
        **{
            name: Axis(f"{SUMMARY_INFO[name].title}, %", better=SUMMARY_INFO[name].better)
            for name in names
        },
        **{
            key: Axis(
                figures.format_cost(key, 0)[0].capitalize(), _cost_format(key), better="lower"
            )
            for key in costs
        },
    }
    charts = []
    if {"forgetting", "learning_accuracy"} <= set(names):
        charts.append(
            ScatterChart(
                "Plasticity against stability",
                told,
                axes,
                "forgetting",
                "learning_accuracy",
                small=True,
                says="High: new tasks are learned well. Left: old ones are kept.",
            )
        )
    if names and costs:
        charts.append(
            ScatterChart(
                "Score against cost",
                told,
                axes,
                "seconds" if "seconds" in costs else costs[0],
                names[0],
                free=True,
                small=True,
                says="Choose what is drawn against what.",
            )
        )
    return (
        Section("Trade-offs", "A dot a run. The best place is named at each axis.", charts)
        if charts
        else None
    )


def _cost_format(key: str) -> str:
    return {"seconds": "seconds", "bytes": "bytes"}.get(key.rpartition("_")[2], "count")


def _commonest_stages(groups: Sequence[RunGroup]) -> tuple[str, ...]:
    """The stages that most sequential runs went through; the finished ones first."""
    told = [run.matrix for group in groups for run in group.runs if run.matrix.is_sequential]
    most = Counter(m.stages for m in told if m.is_finished) or Counter(m.stages for m in told)
    return most.most_common(1)[0][0] if most else ()


def _task_charts_section(
    groups: Sequence[RunGroup], styles: dict[str, int | str]
) -> Section | None:
    """One small chart a task, a line a group: the mean over its finished runs of the commonest
    order.
    """
    names = _commonest_stages(groups)
    lines: list[tuple[str, list[Run], Matrix]] = []
    for group in groups:
        there = [run for run in group.runs if run.matrix.stages == names]
        begun = [run for run in group.runs if run.matrix.stages == names[: len(run.matrix.stages)]]
        there = there or sorted(begun, key=lambda run: len(run.matrix.stages))[-1:]
        lines += [(group.label, there, mean_matrix(there))] if there else []
    if not (tasks := [stage for stage in names if stage != BASE_STAGE]):
        return None
    across, charts = (float(BASE_STAGE not in names), float(len(tasks))), []
    for task in tasks:
        series = [
            Series(
                label,
                task_points(m, task),
                styles[label],
                _task_band(there, m, task),
                learned_points(m, task),
                len(names) <= 10,
            )
            for label, there, m in lines
            if task in m.tasks
        ]
        tops = [
            (
                g.label,
                mean_or_none(r.matrix.score(-1, task) for r in g.runs if task in r.matrix.tasks),
            )
            for g in groups
            if g.is_joint
        ]
        series += [
            Series(label, [(0.0, top), (float(len(tasks)), top)], "ceiling", dots=False)
            for label, top in tops
            if top is not None
        ]
        charts.append(
            Chart(
                task,
                series,
                stage_axis(names, across),
                SCORE_AXIS,
                small=True,
                by="group",
                task=task,
            )
        )
    orders = {
        run.matrix.stages
        for g in groups
        for run in g.runs
        if run.matrix.is_finished and run.matrix.is_sequential
    }
    order = next((r.matrix.order for g in groups for r in g.runs if r.matrix.stages == names), "")
    more = (
        f" Runs of order {order}; the other orders are in the runs' own reports."
        if len(orders) > 1
        else ""
    )
    return Section(
        "Each task through the stages",
        f"Score in percent by stage; the rings stand at the task's own stage.{more}",
        charts,
    )


def _task_band(runs: Sequence[Run], matrix: Matrix, task: str) -> list[tuple[float, float, float]]:
    """The interval of each point, where enough runs measured it."""
    first, found = int(BASE_STAGE not in matrix.stages), []
    for row in range(len(matrix.stages)):
        known = [score for run in runs if (score := run.matrix.score(row, task)) is not None]
        found += [(x, max(0.0, low), high) for x, low, high in _band_at(float(row + first), known)]
    return found


def _heat_map_section(groups: Sequence[RunGroup]) -> Section | None:
    """The mean matrix of each group, over its finished runs of the commonest order."""
    told = []
    for group in groups:
        names = Counter(
            run.matrix.stages for run in group.runs if run.matrix.is_finished
        ).most_common(1)
        there = [run for run in group.runs if names and run.matrix.stages == names[0][0]]
        told += [heat_map(mean_matrix(there), group.label)] if there else []
    return (
        Section(
            "Retained-task matrices",
            "Stages down, tasks across; the mean over runs.",
            kind="heats",
            body=told,
        )
        if told
        else None
    )


def _settings_section(groups: Sequence[RunGroup]) -> Section | None:
    """A row for each key in which the groups' configurations differ, with each value and who has
    it.
    """
    told = {group.label: group.runs[0].settings for group in groups}
    rows = []
    for key in dict.fromkeys(key for settings in told.values() for key in settings):
        having: dict[str, list[str]] = {}
        for label, settings in told.items():
            having.setdefault(settings.get(key, figures.NO_VALUE), []).append(label)
        if len(having) > 1:
            most = max(having, key=lambda value: len(having[value]))
            most = most if len(having[most]) > 1 else ""
            others = "; ".join(
                f"{value}: {', '.join(labels)}" for value, labels in having.items() if value != most
            )
            rows.append(Row([key, most, others]))
    heads = [
        ColumnHead("Key"),
        ColumnHead("Most have", "the value that most strategies have; – is none"),
        ColumnHead("Others"),
    ]
    return (
        Section(
            "What differs in the configurations",
            "By key of config.yaml; seeds and orders aside.",
            table=PageTable("settings", heads, rows),
            kind="wrapped",
        )
        if rows
        else None
    )


def _runs_section(groups: Sequence[RunGroup], out: Path) -> Section:
    """A row a run, with a link to its own report."""
    rows, names = [], available_summaries(groups)
    for group in groups:
        for run, summary in zip(group.runs, group.summaries, strict=True):
            took, path, m = (
                run.matrix.cost.get("seconds"),
                os.path.relpath(run.path, out),
                run.matrix,
            )
            cells: list[Cell | str] = [
                Cell(
                    path + ("" if m.is_finished else " (unfinished)"),
                    path,
                    href=f"{quote(path)}/report.html",
                ),
                group.label,
                m.order,
                Cell(figures.NO_VALUE if m.seed is None else str(m.seed), m.seed),
            ]
            cells += [
                Cell(format_percent(summary.get(n), SUMMARY_INFO[n].signed), summary.get(n))
                for n in names
            ]
            cells.append(Cell(figures.format_seconds(took), took))
            rows.append(Row(cells, group.label, search_text=f"{group.label} {_search_text(run)}"))
    heads = [
        ColumnHead("Run"),
        ColumnHead("Strategy"),
        ColumnHead("Order"),
        ColumnHead("Seed"),
        *map(_summary_head, names),
        TIME_HEAD,
    ]
    return Section("Every run", table=PageTable("runs", heads, rows))
