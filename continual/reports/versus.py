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
from continual.reports.charts import SCORE, Axis, Chart, Dots, Point, Series
from continual.reports.figures import MEANINGS, percent, with_spread
from continual.reports.sections import (
    Cell,
    Head,
    Page,
    Row,
    Section,
    Table,
    curve,
    heat,
    mean_matrix,
    rings,
    stages,
)
from continual.results.matrix import BASE, Matrix, forgotten, incremental, mean
from continual.results.run_folder import Group, Run, reference
from continual.results.uncertainty import Paired, against, over_runs

COLUMNS = (
    "average_performance",
    "forgetting",
    "learning_accuracy",
    "backward_transfer",
    "forward_transfer",
    "intransigence",
)
LEAST = 3  # runs of which an interval is drawn: of two it is as wide as the chart
TIME = Head("Time", "wall time of the run")


def to_json(runs: Sequence[Run], groups: Sequence[Group], out: Path) -> dict[str, Any]:
    """The content of comparison.json; paths are relative to `out`."""
    told = []
    for group in groups:
        for run, summary in zip(group.runs, group.summaries, strict=True):
            told.append(
                {
                    "path": os.path.relpath(run.path, out),
                    "group": group.label,
                    "finished": run.matrix.finished,
                    "strategy": run.matrix.strategy,
                    "order": run.matrix.order,
                    "seed": run.matrix.seed,
                    "summary": summary,
                    "cost": dict(run.matrix.cost),
                }
            )
    names = [*MEANINGS, *dict.fromkeys(key for run in runs for key in run.matrix.cost)]
    other, differences = against(groups)
    return {
        "schema": 1,
        "runs": told,
        "groups": [
            {
                "strategy": group.label,
                "n": group.done,
                "mean": {name: group.mean(name) for name in names},
                "spread": {name: group.spread(name) for name in names},
                "interval": {
                    name: [span.low, span.high] if (span := over_runs(group.values(name))) else None
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


def columns(groups: Sequence[Group]) -> list[str]:
    """The summaries that some group has."""
    return [name for name in COLUMNS if any(group.mean(name) is not None for group in groups)]


def comparison_page(
    runs: Sequence[Run],
    groups: Sequence[Group],
    waiting: Sequence[str],
    out: Path,
    left: Sequence[str] = (),
) -> Page:
    """Runs side by side; links are relative to `out`, `left` says what is to be finished and how."""
    streams = ", ".join(dict.fromkeys(run.matrix.stream for run in runs))
    arms = [group for group in groups if not group.joint]
    looks: dict[str, int | str] = {group.label: i for i, group in enumerate(arms)}
    looks.update({group.label: "ceiling" for group in groups if group.joint})
    sections = [
        _curves(groups, looks),
        _side_by_side(groups, looks),
        _trade_offs(groups),
        _panels(groups, looks),
        beside.probes_of(groups, looks),
        _heats(groups),
        beside.flips_of(groups),
        _settings(groups),
        _every_run(groups, out),
    ]
    chosen = [
        (
            group.label,
            looks[group.label],
            " ".join([group.label, *(_text(run) for run in group.runs)]),
        )
        for group in groups
    ]
    return Page(
        f"{len(arms)} strategies on {streams}" if len(arms) > 1 else f"Runs on {streams}",
        "Comparison",
        _facts(runs),
        [*_notices(runs, waiting), *left],
        sections,
        chosen,
        list(dict.fromkeys(task for run in runs for task in run.matrix.tasks)),
    )


def _text(run: Run) -> str:
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


def _notices(runs: Sequence[Run], waiting: Sequence[str]) -> list[str]:
    half = [run.path.name for run in runs if not run.matrix.finished]
    told = [f"Unfinished, and in no mean: {', '.join(half)}."] if half else []
    told += [f"Nothing scored yet: {', '.join(waiting)}."] if waiting else []
    if any(run.joint for run in runs) and (
        alone := [r for r in runs if not r.joint and not reference(r, runs)]
    ):
        told.append(
            "No joint run over the same tasks, so no intransigence: "
            f"{', '.join(run.path.name for run in alone)}."
        )
    return told


def _curves(groups: Sequence[Group], looks: dict[str, int | str]) -> Section:
    """The mean score, and the mean fall, of the tasks learned so far: a line a group, with its
    interval.
    """
    learned = [
        line
        for group in groups
        if not group.joint
        for line in _over_stages(group, incremental, looks)
    ]
    fallen = [
        line
        for group in groups
        if not group.joint
        for line in _over_stages(group, forgotten, looks)
    ]
    last = max((x for s in learned for x, _ in s.points), default=1.0)
    ceilings = [
        Series(group.label, [(1.0, top), (last, top)], "ceiling", dots=False)
        for group in groups
        if group.joint and (top := group.mean("average_performance")) is not None
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
                Axis("forgetting, %", span=_around(fallen)),
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


def _over_stages(
    group: Group, measure: Callable[[Matrix], list[float | None]], looks: dict[str, int | str]
) -> list[Series]:
    told = [measure(run.matrix) for run in group.runs]
    points, band = [], []
    for i in range(max(map(len, told), default=0)):
        there = [values[i] for values in told if i < len(values)]
        known = [value for value in there if value is not None]
        if known and len(known) == len(there):
            points.append((i + 1.0, sum(known) / len(known)))
            band += _interval(i + 1.0, known)
    return [Series(group.label, points, looks[group.label], band)] if points else []


def _interval(x: float, values: Sequence[float]) -> list[tuple[float, float, float]]:
    found = over_runs(values) if len(values) >= LEAST else None
    return [(x, max(-1.0, found.low), min(1.0, found.high))] if found else []


def _around(series: Sequence[Series]) -> Point:
    """From 0, or what is below, to what is above."""
    ys = [y for s in series for _, y in s.points]
    return min(0.0, *ys) if ys else 0.0, max(0.1, *ys) * 1.05


def _side_by_side(groups: Sequence[Group], looks: dict[str, int | str]) -> Section:
    """A row a group; the best figure of a column is marked, the joint arm aside."""
    arms = [group for group in groups if not group.joint]
    names, rows, (other, differences) = columns(groups), [], against(groups)
    for group in groups:
        of = f" of {len(group.runs)}" if group.done != len(group.runs) else ""
        cells = [Cell(group.label, group.label), Cell(f"{group.done}{of}", group.done)]
        for name in names:
            means = [value for value in (arm.mean(name) for arm in arms) if value is not None]
            best = (max if MEANINGS[name].better == "higher" else min)(means, default=None)
            value = group.mean(name)
            cells.append(
                Cell(
                    with_spread(value, group.spread(name), MEANINGS[name].signed),
                    value,
                    len(means) > 1 and value == best and not group.joint,
                )
            )
        if differences:
            cells.append(_difference(differences.get(group.label)))
        took = group.mean("seconds")
        rows.append(
            Row([*cells, Cell(figures.seconds(took), took)], group.label, look=looks[group.label])
        )
    beyond = (
        [
            Head(
                f"Over {other}",
                f"average performance less that of {other} on the same test examples, with its 95% "
                "interval",
            )
        ]
        if differences
        else []
    )
    heads = [
        Head("Strategy"),
        Head("Runs", "finished runs, over seeds and orders"),
        *map(_head, names),
        *beyond,
        TIME,
    ]
    return Section(
        "Side by side",
        "Percent, mean ± standard deviation over seeds and orders; the best of a column is "
        "bold. A heading sorts, and says what it means.",
        table=Table("groups", heads, rows),
    )


def _difference(told: Paired | None) -> Cell:
    """How a strategy differs from another on the same examples."""
    return Cell(
        f"{percent(told.difference, True)} {figures.interval(told.low, told.high, True)}"
        if told
        else figures.NONE,
        told.difference if told else None,
    )


def _head(name: str) -> Head:
    meaning = MEANINGS[name]
    return Head(
        f"{meaning.title}\u00a0{meaning.arrow}", f"{meaning.says}; {meaning.better} is better"
    )


def _trade_offs(groups: Sequence[Group]) -> Section | None:
    """A dot a run: plasticity against stability, and any summary against any cost."""
    told: list[dict[str, Any]] = [
        {
            "group": group.label,
            "text": f"{group.label} {_text(run)}",
            "values": {
                **{name: summary[name] for name in MEANINGS if name in summary},
                **run.matrix.cost,
            },
        }
        for group in groups
        for run, summary in zip(group.runs, group.summaries, strict=True)
    ]
    names = [name for name in MEANINGS if any(run["values"].get(name) is not None for run in told)]
    costs = list(
        dict.fromkeys(key for group in groups for run in group.runs for key in run.matrix.cost)
    )
    axes = {
        **{
            name: Axis(f"{MEANINGS[name].title}, %", better=MEANINGS[name].better) for name in names
        },
        **{
            key: Axis(figures.cost(key, 0)[0].capitalize(), _unit(key), better="lower")
            for key in costs
        },
    }
    charts = []
    if {"forgetting", "learning_accuracy"} <= set(names):
        charts.append(
            Dots(
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
            Dots(
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


def _unit(key: str) -> str:
    return {"seconds": "seconds", "bytes": "bytes"}.get(key.rpartition("_")[2], "count")


def _alike(groups: Sequence[Group]) -> tuple[str, ...]:
    """The stages that most sequential runs went through; the finished ones first."""
    told = [run.matrix for group in groups for run in group.runs if run.matrix.sequential]
    most = Counter(m.stages for m in told if m.finished) or Counter(m.stages for m in told)
    return most.most_common(1)[0][0] if most else ()


def _panels(groups: Sequence[Group], looks: dict[str, int | str]) -> Section | None:
    """One small chart a task, a line a group: the mean over its finished runs of the commonest
    order.
    """
    names = _alike(groups)
    lines: list[tuple[str, list[Run], Matrix]] = []
    for group in groups:
        there = [run for run in group.runs if run.matrix.stages == names]
        begun = [run for run in group.runs if run.matrix.stages == names[: len(run.matrix.stages)]]
        there = there or sorted(begun, key=lambda run: len(run.matrix.stages))[-1:]
        lines += [(group.label, there, mean_matrix(there))] if there else []
    if not (tasks := [stage for stage in names if stage != BASE]):
        return None
    across, charts = (float(BASE not in names), float(len(tasks))), []
    for task in tasks:
        series = [
            Series(
                label,
                curve(m, task),
                looks[label],
                _band(there, m, task),
                rings(m, task),
                len(names) <= 10,
            )
            for label, there, m in lines
            if task in m.tasks
        ]
        tops = [
            (g.label, mean(r.matrix.at(-1, task) for r in g.runs if task in r.matrix.tasks))
            for g in groups
            if g.joint
        ]
        series += [
            Series(label, [(0.0, top), (float(len(tasks)), top)], "ceiling", dots=False)
            for label, top in tops
            if top is not None
        ]
        charts.append(
            Chart(task, series, stages(names, across), SCORE, small=True, by="group", task=task)
        )
    orders = {
        run.matrix.stages
        for g in groups
        for run in g.runs
        if run.matrix.finished and run.matrix.sequential
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


def _band(there: Sequence[Run], matrix: Matrix, task: str) -> list[tuple[float, float, float]]:
    """The interval of each point, where enough runs measured it."""
    first, found = int(BASE not in matrix.stages), []
    for row in range(len(matrix.stages)):
        known = [score for run in there if (score := run.matrix.at(row, task)) is not None]
        found += [(x, max(0.0, low), high) for x, low, high in _interval(float(row + first), known)]
    return found


def _heats(groups: Sequence[Group]) -> Section | None:
    """The mean matrix of each group, over its finished runs of the commonest order."""
    told = []
    for group in groups:
        names = Counter(run.matrix.stages for run in group.runs if run.matrix.finished).most_common(
            1
        )
        there = [run for run in group.runs if names and run.matrix.stages == names[0][0]]
        told += [heat(mean_matrix(there), group.label)] if there else []
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


def _settings(groups: Sequence[Group]) -> Section | None:
    """A row for each key in which the groups' configurations differ, with each value and who has
    it.
    """
    told = {group.label: group.runs[0].settings for group in groups}
    rows = []
    for key in dict.fromkeys(key for settings in told.values() for key in settings):
        having: dict[str, list[str]] = {}
        for label, settings in told.items():
            having.setdefault(settings.get(key, figures.NONE), []).append(label)
        if len(having) > 1:
            most = max(having, key=lambda value: len(having[value]))
            most = most if len(having[most]) > 1 else ""
            others = "; ".join(
                f"{value}: {', '.join(labels)}" for value, labels in having.items() if value != most
            )
            rows.append(Row([key, most, others]))
    heads = [
        Head("Key"),
        Head("Most have", "the value that most strategies have; – is none"),
        Head("Others"),
    ]
    return (
        Section(
            "What differs in the configurations",
            "By key of config.yaml; seeds and orders aside.",
            table=Table("settings", heads, rows),
            kind="wrapped",
        )
        if rows
        else None
    )


def _every_run(groups: Sequence[Group], out: Path) -> Section:
    """A row a run, with a link to its own report."""
    rows, names = [], columns(groups)
    for group in groups:
        for run, summary in zip(group.runs, group.summaries, strict=True):
            took, path, m = (
                run.matrix.cost.get("seconds"),
                os.path.relpath(run.path, out),
                run.matrix,
            )
            cells: list[Cell | str] = [
                Cell(
                    path + ("" if m.finished else " (unfinished)"),
                    path,
                    href=f"{quote(path)}/report.html",
                ),
                group.label,
                m.order,
                Cell(figures.NONE if m.seed is None else str(m.seed), m.seed),
            ]
            cells += [
                Cell(percent(summary.get(n), MEANINGS[n].signed), summary.get(n)) for n in names
            ]
            cells.append(Cell(figures.seconds(took), took))
            rows.append(Row(cells, group.label, found=f"{group.label} {_text(run)}"))
    heads = [Head("Run"), Head("Strategy"), Head("Order"), Head("Seed"), *map(_head, names), TIME]
    return Section("Every run", table=Table("runs", heads, rows))
