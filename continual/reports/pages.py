"""The page of one run: from its folder on disk to sections with charts and tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from continual.io import untrusted
from continual.reports import audits, beside, figures
from continual.reports.charts import Axis, Chart, Point, Series
from continual.reports.figures import SUMMARY_INFO, format_percent
from continual.reports.sections import (
    Page,
    Section,
    downsample,
    heat_map,
    learned_points,
    stage_axis,
    stage_span,
    task_points,
    text_table,
    to_series,
    truncate,
)
from continual.results.matrix import BASE_STAGE, Matrix
from continual.results.prediction import Prediction
from continual.results.run_folder import Run
from continual.results.stopped import describe_stop
from continual.results.uncertainty import Interval, bootstrap_intervals

MAX_SAMPLES_PER_SORT = 2  # of each sort a task
STEP_TITLE = "optimizer step"


def build_run_page(run: Run) -> Page:
    """Everything that there is to show of one run."""
    matrix = run.matrix
    return Page(
        f"{matrix.strategy} on {matrix.stream}",
        "One run",
        run_facts(matrix),
        run_notices(run),
        run_sections(run),
        tasks=matrix.tasks,
    )


def run_sections(run: Run) -> list[Section | None]:
    """The sections of one run, None for those that it has nothing for."""
    matrix = run.matrix
    steps, walls = locate_step_events(run)
    starts = {event.get("stage") or 0: x - event["step"] for x, event in steps}
    return [
        Section(
            "Summaries",
            kind="tiles",
            body=summary_tiles(matrix.summary(), bootstrap_intervals(run)),
        ),
        Section(
            "What is retained",
            "Score in percent on each task (column) after each stage (row).",
            kind="heats",
            body=[heat_map(matrix)],
        ),
        Section(
            "Each task through the stages",
            "Score in percent by stage; the ring is the task's own stage, the "
            "other tasks are grey.",
            [_task_chart(matrix, task) for task in matrix.tasks],
        ),
        beside.within_stage_section(run, starts, walls),
        beside.probe_section(run),
        beside.flip_section(run),
        training_section(steps, walls),
        *note_sections(steps, walls),
        cost_section(run),
        audit_section(run),
        sample_section(run),
        config_section(run.config_text),
    ]


def run_facts(matrix: Matrix) -> list[str]:
    """One phrase each: the order, the seed, how many tasks and examples, how far the run got."""
    learned = len([stage for stage in matrix.stages if stage != BASE_STAGE])
    told = [
        f"order {matrix.order}" if matrix.order else "",
        f"seed {matrix.seed}" if matrix.seed is not None else "",
        f"{len(matrix.tasks)} tasks",
        f"{sum(matrix.counts):,} test examples" if matrix.counts else "",
        ", ".join(sorted({matrix.metrics[task] for task in matrix.tasks})),
        "finished" if matrix.is_finished else f"unfinished: {learned} stages scored so far",
    ]
    return [fact for fact in told if fact]


def run_notices(run: Run) -> list[str]:
    """What a reader must know before the figures: an unfinished run, skipped or shortened examples,
    broken lines.
    """
    told = []
    if not run.matrix.is_finished:
        told.append(
            "This run is unfinished: the summaries need its last stage. "
            + (
                f"It was {stopped}."
                if (stopped := describe_stop(run.path))
                else "Start it again with the same out= and it goes on."
            )
        )
    counts: Counter[str] = Counter()
    for event in run.events("data"):
        counts.update(
            {
                key: event[key]
                for key in ("skipped", "shortened")
                if untrusted.is_number(event.get(key))
            }
        )
    if shown := [f"{n:,} {key}" for key, n in counts.items() if n]:
        told.append(f"Examples that did not fit the model's context: {', '.join(shown)}.")
    if skipped := sum(event.get("skipped_steps") or 0 for event in run.events("stage")):
        told.append(f"{skipped:,} steps were skipped: their loss or gradient was not finite.")
    if broken := run.parsed_log[1]:
        told.append(
            f"{broken} line{'s' * (broken > 1)} of events.jsonl could not be read; a run that "
            "was killed while writing leaves one."
        )
    return told


def summary_tiles(
    summary: Mapping[str, float | None], intervals: Mapping[str, Interval]
) -> list[dict[str, Any]]:
    """Each summary with its name, arrow and meaning, and its interval over test examples where
    there is one.
    """
    told = []
    for name in (name for name in SUMMARY_INFO if name in summary):
        meaning, span = SUMMARY_INFO[name], intervals.get(name)
        told.append(
            {
                "meaning": meaning,
                "figure": format_percent(summary[name], meaning.signed),
                "interval": figures.format_interval(span.low, span.high, meaning.signed)
                if span
                else "",
                "how": f"95% interval: {span.how}, n = {span.n:,}" if span else "",
            }
        )
    return told


def _task_chart(matrix: Matrix, task: str) -> Chart:
    """One task over the stages, the others faint behind it, a ring where it was learned."""
    behind = [
        Series(other, task_points(matrix, other), "faint", dots=False)
        for other in matrix.tasks
        if other != task
    ]
    own = Series(task, task_points(matrix, task), 0, rings=learned_points(matrix, task))
    return Chart(
        task, [*behind, own], stage_axis(matrix.stages, stage_span(matrix)), small=True, task=task
    )


StepEvents = list[tuple[float, dict[str, Any]]]
StageStarts = list[tuple[float, str]]


def locate_step_events(run: Run) -> tuple[StepEvents, StageStarts]:
    """Every step event at its place among all steps of the run, and where each stage begins."""
    events = sorted(run.events("step"), key=lambda e: (e.get("stage") or 0, e["step"]))
    walls: StageStarts = []
    told, start, last, stage = [], 0.0, 0.0, object()
    for event in events:
        if event.get("stage") != stage:
            stage, start = event.get("stage"), last
            walls.append((start, str(event.get("task", stage))))
        last = start + event["step"]
        told.append((last, event))
    return told, walls if len(walls) <= 8 else [(x, str(i)) for i, (x, _) in enumerate(walls, 1)]


def training_section(steps: StepEvents, stage_starts: StageStarts) -> Section | None:
    """The loss over all optimizer steps, a wall where each stage begins; None where no step was
    logged.
    """
    points = downsample([(x, event["loss"]) for x, event in steps if event.get("loss") is not None])
    return (
        Section(
            "Training loss",
            "By optimizer step; an upright line where a stage begins.",
            [_step_chart("loss", [Series("loss", points, 0, dots=False)], stage_starts)],
        )
        if points
        else None
    )


def note_sections(steps: StepEvents, stage_starts: StageStarts) -> list[Section]:
    """One chart for each kind of note ("weight" of "weight/agnews"), a line for each of its names."""
    named: dict[str, dict[str, list[Point]]] = {}
    for x, event in steps:
        for name, value in (event.get("notes") or {}).items():
            head, _, tail = name.partition("/")
            named.setdefault(head, {}).setdefault(tail or head, []).append((x, value))
    return [
        Section(
            f"Strategy: {head}",
            "What the strategy told of itself, by optimizer step.",
            [
                _step_chart(
                    head,
                    to_series(
                        {name: downsample(points) for name, points in told.items()}, markers=False
                    ),
                    stage_starts,
                )
            ],
        )
        for head, told in named.items()
    ]


def _step_chart(title: str, series: Sequence[Series], stage_starts: StageStarts) -> Chart:
    last = max(x for s in series for x, _ in s.points)
    return Chart(
        title, series, Axis(STEP_TITLE, "count", (0.0, last)), Axis(title, "number"), stage_starts
    )


def cost_section(run: Run) -> Section | None:
    """What the run took, in all and a stage."""
    told = [figures.format_cost(key, value) for key, value in run.matrix.cost.items()]
    heads = ("stage", "steps", "tokens", "time", "tokens / s", "strategy memory")
    rows = stage_cost_rows(run)
    return (
        Section(
            "Cost", kind="costs", body=told, table=text_table("cost", heads, rows) if rows else None
        )
        if told or rows
        else None
    )


def stage_cost_rows(run: Run) -> list[list[str]]:
    """A row a stage: name, steps, tokens, time, tokens a second, strategy memory."""
    rows = []
    memory = {event.get("stage"): event.get("memory_bytes") for event in run.events("checkpoint")}
    for event in run.events("stage"):
        took, tokens = event.get("seconds"), event.get("tokens")
        rate = figures.format_count(tokens / took) if took and tokens else figures.NO_VALUE
        rows.append(
            [
                str(event.get("task", event.get("stage"))),
                figures.format_count(event.get("steps")),
                figures.format_count(tokens),
                figures.format_seconds(took),
                rate,
                figures.format_bytes(memory.get(event.get("stage"))),
            ]
        )
    return rows


def audit_section(run: Run) -> Section | None:
    """Return the problems in the rows and the tasks the base solves; None if the run has no
    audit.
    """
    if (told := audits.load_audit(run.path)) is None:
        return None
    heads, *rows = audits.audit_table_rows(told)
    base = (
        dict(zip(run.matrix.tasks, run.matrix.scores[0], strict=True))
        if run.matrix.stages[:1] == (BASE_STAGE,)
        else {}
    )
    found = [*audits.finding_lines(told), *audits.solved_task_lines(told, base)]
    return Section(
        "Audit of the rows",
        audits.audit_caption(told),
        table=text_table("audit", heads, rows),
        kind="findings",
        body=found,
    )


def sample_section(run: Run) -> Section | None:
    """A few answers of the last stage."""
    told = sample_answers(run)
    lead = "From the last stage. Forgotten: marked right after the task's own stage, wrong now."
    return Section("Sample answers", lead, kind="samples", body=told) if told else None


def sample_answers(run: Run) -> list[dict[str, Any]]:
    """For each task a few final answers: right, forgotten (right after the task's own stage, wrong
    now) and wrong.
    """
    last, told = run.matrix.stages[-1], []
    for task, score in zip(run.matrix.tasks, run.matrix.scores[-1], strict=True):
        now = run.load_predictions(last, task)
        own = run.matrix.row_of(task)
        was = {p.id: p for p in run.load_predictions(task, task)} if own is not None else {}
        forgotten = [p for p in now if p.id in was and p.score < 0.5 <= was[p.id].score]
        forgotten_ids = {p.id for p in forgotten}
        sorts = {
            "right": [p for p in now if p.score >= 0.5],
            "forgotten": forgotten,
            "wrong": [p for p in now if p.score < 0.5 and p.id not in forgotten_ids],
        }
        shown = [
            _sample_entry(sort, p, was[p.id].answer if sort == "forgotten" else None)
            for sort, predictions in sorts.items()
            for p in predictions[:MAX_SAMPLES_PER_SORT]
        ]
        if shown:
            told.append(
                {
                    "task": task,
                    "score": format_percent(score),
                    "count": len(now),
                    "shown": shown,
                    "sorts": {sort: len(rows) for sort, rows in sorts.items()},
                }
            )
    return told


def _sample_entry(sort: str, prediction: Prediction, earlier_answer: str | None) -> dict[str, Any]:
    return {
        "sort": sort,
        "id": prediction.id,
        "mark": f"{prediction.score:.2f}",
        "prompt": truncate(prediction.prompt),
        "answer": truncate(prediction.answer),
        "before": truncate(earlier_answer),
        "references": truncate(" | ".join(map(str, prediction.references))),
    }


def config_section(text: str, title: str = "Configuration") -> Section | None:
    """The whole configuration, folded away."""
    return Section(title, kind="config", body=text) if text else None
