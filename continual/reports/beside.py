"""What a run tells beside its matrix: probes, scores within a stage, and the examples that it
forgot.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from continual.reports import measures, probed
from continual.reports.charts import SCORE_AXIS, Axis, Chart, Point, Series
from continual.reports.flips import format_flip_counts
from continual.reports.sections import (
    Cell,
    ColumnHead,
    PageTable,
    Row,
    Section,
    stage_axis,
    to_series,
    truncate,
)
from continual.results.flips import Flip, count_flips, find_flips
from continual.results.matrix import BASE_STAGE
from continual.results.run_folder import Run, RunGroup

MAX_FLIP_SAMPLES = 10  # flips of a task, with their texts
MAX_FLIP_GROUPS = 12  # groups whose flips a comparison shows
FLIPS_CAPTION = (
    "An example flips where its answer was marked right after an earlier stage and is wrong "
    "after this one; the texts are the answers before and after."
)


def _run_probes(run: Run) -> dict[str, Any] | None:
    """What probes measured after each stage, and what the predictions tell by level and by
    constraint.
    """
    told = probed.load_probes(run.path) or {"stages": list(run.matrix.stages), "probes": {}}
    marked = (
        measures.probes_from_predictions(run) if tuple(told["stages"]) == run.matrix.stages else {}
    )
    return {**told, "probes": {**told["probes"], **marked}} if told["probes"] or marked else None


def probe_section(run: Run) -> Section | None:
    """A chart a probe, a line for each thing that it measures."""
    if not (told := _run_probes(run)):
        return None
    charts = [
        _probe_chart(
            name,
            probe,
            told["stages"],
            to_series(
                {
                    label: _stage_points(values, told["stages"])
                    for label, values in probe["series"].items()
                }
            ),
        )
        for name, probe in told["probes"].items()
    ]
    return Section("Beside the matrix", "What else was measured after each stage.", charts)


def probe_comparison_section(
    groups: Sequence[RunGroup], styles: dict[str, int | str]
) -> Section | None:
    """A chart a probe, a line a group: the mean over what it measures, and over the runs of the
    commonest stages.
    """
    told = [(group.label, probed.load_probes(run.path)) for group in groups for run in group.runs]
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
                _mean_series(one[name]["series"], len(names))
                for label, one in alike
                if label == group.label and name in one
            ]
            if points := _stage_points(_mean_by_stage(runs, len(names)), names):
                series.append(Series(group.label, points, styles[group.label]))
        probe = next(one[name] for _, one in alike if name in one)
        charts.append(_probe_chart(name, probe, names, series, filter_by="group"))
    return Section(
        "Beside the matrix",
        "What else was measured after each stage: the mean over what a probe measures, "
        "and over runs.",
        charts,
    )


def _probe_chart(
    name: str,
    probe: dict[str, Any],
    names: Sequence[str],
    series: Sequence[Series],
    filter_by: str = "",
) -> Chart:
    """A score's axis where all lies within [0, 1]."""
    share = all(0 <= y <= 1 for s in series for _, y in s.points)
    axis = Axis(SCORE_AXIS.title, span=SCORE_AXIS.span) if share else Axis("value", "number")
    arrow = "↑" if probe["better"] == "higher" else "↓"
    return Chart(
        f"{name} {arrow}",
        series,
        stage_axis(names, _stage_span(names)),
        axis,
        small=True,
        by=filter_by,
        says=f"{probe['says']} ({probe['source']})",
    )


def _stage_points(values: Sequence[float | None], names: Sequence[str]) -> list[Point]:
    first = int(BASE_STAGE not in names)
    return [(float(x), value) for x, value in enumerate(values, first) if value is not None]


def _stage_span(names: Sequence[str]) -> Point:
    first = int(BASE_STAGE not in names)
    return float(first), float(first + len(names) - 1)


def _mean_series(series: dict[str, list[float | None]], length: int) -> list[float | None]:
    """The line called "mean" where there is one, else the mean over all lines."""
    return series["mean"] if "mean" in series else _mean_by_stage(list(series.values()), length)


def _mean_by_stage(rows: Sequence[Sequence[float | None]], length: int) -> list[float | None]:
    """The mean of each place, over the rows that have a value there."""
    found = ([row[i] for row in rows if row[i] is not None] for i in range(length))
    return [sum(known) / len(known) if known else None for known in found]  # type: ignore[arg-type]


def within_stage_section(
    run: Run, stage_offsets: dict[float, float], stage_starts: Sequence[tuple[float, str]]
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
                at = stage_offsets.get(event.get("stage") or 0, 0.0) + (event.get("step") or 0)
                named.setdefault(task, []).append((at, score))
    if not named:
        return None
    series = [
        Series(task, named[task], i) for i, task in enumerate(run.matrix.tasks) if task in named
    ]
    last = max(x for points in named.values() for x, _ in points)
    across = Axis("optimizer step", "count", (0.0, last))
    chart = Chart("Score within the stages", series, across, walls=stage_starts, by="task")
    return Section(
        "When it is forgotten",
        "Score in percent on a small fixed sample of each task, within the stages.",
        [chart],
    )


def flip_section(run: Run) -> Section | None:
    """How many examples of each task went from right to wrong at which stage and came back, and
    some with their texts.
    """
    if not (found := find_flips(run)):
        return None
    told = count_flips(found)
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
                    *(Cell(format_flip_counts(*both), both[0] - both[1]) for both in mine),
                    Cell(
                        format_flip_counts(*map(sum, zip(*mine, strict=True))),
                        sum(lost for lost, _ in mine),
                    ),
                ],
                task=task,
            )
        )
    body = [
        {
            "label": task,
            "task": task,
            "group": "",
            **_select_flips([flip for flip in found if flip.task == task]),
        }
        for task in dict.fromkeys(flip.task for flip in found)
    ]
    heads = [
        ColumnHead("task"),
        *(ColumnHead(stage, f"lost (−) and regained (+) after {stage}") for stage in columns),
        ColumnHead("in all"),
    ]
    return Section(
        "Forgotten examples",
        f"How many answers were lost (−) and regained (+) at each stage. {FLIPS_CAPTION}",
        table=PageTable("flips", heads, rows),
        kind="flips",
        body=body,
    )


def flip_comparison_section(groups: Sequence[RunGroup]) -> Section | None:
    """The same for a comparison: some of a run of each of the first groups."""
    body = []
    for group in [group for group in groups if not group.is_joint][:MAX_FLIP_GROUPS]:
        run = next((run for run in group.runs if run.matrix.is_finished), group.runs[0])
        if found := find_flips(run):
            body.append(
                {"label": group.label, "task": "", "group": group.label, **_select_flips(found)}
            )
    more = (
        f" The first {MAX_FLIP_GROUPS} strategies; the runs' own reports have all."
        if len(groups) > MAX_FLIP_GROUPS
        else ""
    )
    return (
        Section(
            "Forgotten examples",
            f"{FLIPS_CAPTION} One run of each strategy.{more}",
            kind="flips",
            body=body,
        )
        if body
        else None
    )


def _select_flips(found: Sequence[Flip]) -> dict[str, Any]:
    """A few flips, of as many tasks as can be, those for good first, with their texts cut."""
    turn: Counter[str] = Counter()
    order = []
    for flip in sorted(found, key=lambda flip: bool(flip.regained_stage)):
        turn[flip.task] += 1
        order.append((turn[flip.task], flip))
    some = [flip for _, flip in sorted(order, key=lambda pair: pair[0])[:MAX_FLIP_SAMPLES]]
    return {
        "count": len(found),
        "shown": [
            {
                "task": flip.task,
                "id": flip.id,
                "learned": flip.last_correct_stage,
                "lost": flip.lost_stage,
                "back": flip.regained_stage,
                "prompt": truncate(flip.prompt),
                "before": truncate(flip.answer_before),
                "after": truncate(flip.answer_after),
                "references": truncate(" | ".join(flip.references)),
            }
            for flip in some
        ],
    }
