"""What a run tells beside its matrix: probes, scores within a stage, and the examples that it
forgot.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from continual.reports import measures, probed
from continual.reports.charts import SCORE, Axis, Chart, Point, Series
from continual.reports.flips import signed
from continual.reports.sections import Cell, Head, Row, Section, Table, cut, lines, stages
from continual.results.flips import Flip, counts, flips
from continual.results.matrix import BASE
from continual.results.run_folder import Group, Run

SHOWN = 10  # flips of a task, with their texts
TOLD = 12  # groups whose flips a comparison shows
FLIPS = (
    "An example flips where its answer was marked right after an earlier stage and is wrong "
    "after this one; the texts are the answers before and after."
)


def _found(run: Run) -> dict[str, Any] | None:
    """What probes measured after each stage, and what the predictions tell by level and by
    constraint.
    """
    told = probed.load(run.path) or {"stages": list(run.matrix.stages), "probes": {}}
    marked = measures.probes(run) if tuple(told["stages"]) == run.matrix.stages else {}
    return {**told, "probes": {**told["probes"], **marked}} if told["probes"] or marked else None


def probe_section(run: Run) -> Section | None:
    """A chart a probe, a line for each thing that it measures."""
    if not (told := _found(run)):
        return None
    charts = [
        _probe(
            name,
            probe,
            told["stages"],
            lines(
                {
                    label: _points(values, told["stages"])
                    for label, values in probe["series"].items()
                }
            ),
        )
        for name, probe in told["probes"].items()
    ]
    return Section("Beside the matrix", "What else was measured after each stage.", charts)


def probes_of(groups: Sequence[Group], looks: dict[str, int | str]) -> Section | None:
    """A chart a probe, a line a group: the mean over what it measures, and over the runs of the
    commonest stages.
    """
    told = [(group.label, probed.load(run.path)) for group in groups for run in group.runs]
    there = [(label, one) for label, one in told if one and one["probes"]]
    if not there:
        return None
    names = Counter(tuple(one["stages"]) for _, one in there).most_common(1)[0][0]
    alike = [(label, one["probes"]) for label, one in there if tuple(one["stages"]) == names]
    charts = []
    for name in dict.fromkeys(name for _, one in alike for name in one):
        series = []
        for group in groups:
            runs = [
                _mean_line(one[name]["series"], len(names))
                for label, one in alike
                if label == group.label and name in one
            ]
            if points := _points(_across(runs, len(names)), names):
                series.append(Series(group.label, points, looks[group.label]))
        probe = next(one[name] for _, one in alike if name in one)
        charts.append(_probe(name, probe, names, series, by="group"))
    return Section(
        "Beside the matrix",
        "What else was measured after each stage: the mean over what a probe measures, "
        "and over runs.",
        charts,
    )


def _probe(
    name: str, probe: dict[str, Any], names: Sequence[str], series: Sequence[Series], by: str = ""
) -> Chart:
    """A score's axis where all lies within [0, 1]."""
    share = all(0 <= y <= 1 for s in series for _, y in s.points)
    axis = Axis(SCORE.title, span=SCORE.span) if share else Axis("value", "number")
    arrow = "↑" if probe["better"] == "higher" else "↓"
    return Chart(
        f"{name} {arrow}",
        series,
        stages(names, _across_stages(names)),
        axis,
        small=True,
        by=by,
        says=f"{probe['says']} ({probe['source']})",
    )


def _points(values: Sequence[float | None], names: Sequence[str]) -> list[Point]:
    first = int(BASE not in names)
    return [(float(x), value) for x, value in enumerate(values, first) if value is not None]


def _across_stages(names: Sequence[str]) -> Point:
    first = int(BASE not in names)
    return float(first), float(first + len(names) - 1)


def _mean_line(series: dict[str, list[float | None]], length: int) -> list[float | None]:
    """The line called "mean" where there is one, else the mean over all lines."""
    return series["mean"] if "mean" in series else _across(list(series.values()), length)


def _across(rows: Sequence[Sequence[float | None]], length: int) -> list[float | None]:
    """The mean of each place, over the rows that have a value there."""
    found = ([row[i] for row in rows if row[i] is not None] for i in range(length))
    return [sum(known) / len(known) if known else None for known in found]  # type: ignore[arg-type]


def during(
    run: Run, starts: dict[float, float], walls: Sequence[tuple[float, str]]
) -> Section | None:
    """Scores of small samples within the stages, over all optimizer steps; `starts` says where each
    stage begins.
    """
    named: dict[str, list[Point]] = {}
    for event in sorted(
        run.events("during"), key=lambda e: (e.get("stage") or 0, e.get("step") or 0)
    ):
        for task, score in (event.get("scores") or {}).items():
            if task in run.matrix.tasks:
                at = starts.get(event.get("stage") or 0, 0.0) + (event.get("step") or 0)
                named.setdefault(task, []).append((at, score))
    if not named:
        return None
    series = [
        Series(task, named[task], i) for i, task in enumerate(run.matrix.tasks) if task in named
    ]
    last = max(x for points in named.values() for x, _ in points)
    across = Axis("optimizer step", "count", (0.0, last))
    chart = Chart("Score within the stages", series, across, walls=walls, by="task")
    return Section(
        "When it is forgotten",
        "Score in percent on a small fixed sample of each task, within the stages.",
        [chart],
    )


def flip_section(run: Run) -> Section | None:
    """How many examples of each task went from right to wrong at which stage and came back, and
    some with their texts.
    """
    if not (found := flips(run)):
        return None
    told = counts(found)
    columns = [
        stage
        for stage in run.matrix.stages
        if any((task, stage) in told for task in run.matrix.tasks)
    ]
    rows = []
    for task in dict.fromkeys(flip.task for flip in found):
        mine = [told.get((task, stage), (0, 0)) for stage in columns]
        rows.append(
            Row(
                [
                    task,
                    *(Cell(signed(*both), both[0] - both[1]) for both in mine),
                    Cell(signed(*map(sum, zip(*mine, strict=True))), sum(lost for lost, _ in mine)),
                ],
                task=task,
            )
        )
    body = [
        {
            "label": task,
            "task": task,
            "group": "",
            **_some([flip for flip in found if flip.task == task]),
        }
        for task in dict.fromkeys(flip.task for flip in found)
    ]
    heads = [
        Head("task"),
        *(Head(stage, f"lost (−) and regained (+) after {stage}") for stage in columns),
        Head("in all"),
    ]
    return Section(
        "Forgotten examples",
        f"How many answers were lost (−) and regained (+) at each stage. {FLIPS}",
        table=Table("flips", heads, rows),
        kind="flips",
        body=body,
    )


def flips_of(groups: Sequence[Group]) -> Section | None:
    """The same for a comparison: some of a run of each of the first groups."""
    body = []
    for group in [group for group in groups if not group.joint][:TOLD]:
        run = next((run for run in group.runs if run.matrix.finished), group.runs[0])
        if found := flips(run):
            body.append({"label": group.label, "task": "", "group": group.label, **_some(found)})
    more = (
        f" The first {TOLD} strategies; the runs' own reports have all."
        if len(groups) > TOLD
        else ""
    )
    return (
        Section(
            "Forgotten examples",
            f"{FLIPS} One run of each strategy.{more}",
            kind="flips",
            body=body,
        )
        if body
        else None
    )


def _some(found: Sequence[Flip]) -> dict[str, Any]:
    """A few flips, of as many tasks as can be, those for good first, with their texts cut."""
    turn: Counter[str] = Counter()
    order = []
    for flip in sorted(found, key=lambda flip: bool(flip.back)):
        turn[flip.task] += 1
        order.append((turn[flip.task], flip))
    some = [flip for _, flip in sorted(order, key=lambda pair: pair[0])[:SHOWN]]
    return {
        "count": len(found),
        "shown": [
            {
                "task": flip.task,
                "id": flip.id,
                "learned": flip.learned,
                "lost": flip.lost,
                "back": flip.back,
                "prompt": cut(flip.prompt),
                "before": cut(flip.before),
                "after": cut(flip.after),
                "references": cut(" | ".join(flip.references)),
            }
            for flip in some
        ],
    }
