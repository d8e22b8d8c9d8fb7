"""The page of one run: from its folder on disk to sections with charts and tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from continual.io import untrusted
from continual.reports import audits, beside, figures
from continual.reports.charts import Axis, Chart, Point, Series
from continual.reports.figures import MEANINGS, percent
from continual.reports.sections import (
    Page,
    Section,
    curve,
    cut,
    heat,
    lines,
    rings,
    span,
    stages,
    table,
    thinned,
)
from continual.results.matrix import BASE, Matrix
from continual.results.prediction import Prediction
from continual.results.run_folder import Run
from continual.results.stopped import describe_stop
from continual.results.uncertainty import Interval, intervals

SAMPLES = 2  # of each sort a task
STEP = "optimizer step"


def run_page(run: Run) -> Page:
    """Everything that there is to show of one run."""
    matrix = run.matrix
    return Page(
        f"{matrix.strategy} on {matrix.stream}",
        "One run",
        facts(matrix),
        notices(run),
        run_sections(run),
        tasks=matrix.tasks,
    )


def run_sections(run: Run) -> list[Section | None]:
    """The sections of one run, None for those that it has nothing for."""
    matrix = run.matrix
    steps, walls = laid_out(run)
    starts = {event.get("stage") or 0: x - event["step"] for x, event in steps}
    return [
        Section("Summaries", kind="tiles", body=tiles(matrix.summary(), intervals(run))),
        Section(
            "What is retained",
            "Score in percent on each task (column) after each stage (row).",
            kind="heats",
            body=[heat(matrix)],
        ),
        Section(
            "Each task through the stages",
            "Score in percent by stage; the ring is the task's own stage, the "
            "other tasks are grey.",
            [_panel(matrix, task) for task in matrix.tasks],
        ),
        beside.during(run, starts, walls),
        beside.probe_section(run),
        beside.flip_section(run),
        training(steps, walls),
        *notes(steps, walls),
        costs(run),
        audit(run),
        answers(run),
        config(run.config),
    ]


def facts(matrix: Matrix) -> list[str]:
    """One phrase each: the order, the seed, how many tasks and examples, how far the run got."""
    learned = len([stage for stage in matrix.stages if stage != BASE])
    told = [
        f"order {matrix.order}" if matrix.order else "",
        f"seed {matrix.seed}" if matrix.seed is not None else "",
        f"{len(matrix.tasks)} tasks",
        f"{sum(matrix.counts):,} test examples" if matrix.counts else "",
        ", ".join(sorted({matrix.metrics[task] for task in matrix.tasks})),
        "finished" if matrix.finished else f"unfinished: {learned} stages scored so far",
    ]
    return [fact for fact in told if fact]


def notices(run: Run) -> list[str]:
    """What a reader must know before the figures: an unfinished run, skipped or shortened examples,
    broken lines.
    """
    told = []
    if not run.matrix.finished:
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
    if broken := run.log[1]:
        told.append(
            f"{broken} line{'s' * (broken > 1)} of events.jsonl could not be read; a run that "
            "was killed while writing leaves one."
        )
    return told


def tiles(
    summary: Mapping[str, float | None], spans: Mapping[str, Interval]
) -> list[dict[str, Any]]:
    """Each summary with its name, arrow and meaning, and its interval over test examples where
    there is one.
    """
    told = []
    for name in (name for name in MEANINGS if name in summary):
        meaning, span = MEANINGS[name], spans.get(name)
        told.append(
            {
                "meaning": meaning,
                "figure": percent(summary[name], meaning.signed),
                "interval": figures.interval(span.low, span.high, meaning.signed) if span else "",
                "how": f"95% interval: {span.how}, n = {span.n:,}" if span else "",
            }
        )
    return told


def _panel(matrix: Matrix, task: str) -> Chart:
    """One task over the stages, the others faint behind it, a ring where it was learned."""
    behind = [
        Series(other, curve(matrix, other), "faint", dots=False)
        for other in matrix.tasks
        if other != task
    ]
    own = Series(task, curve(matrix, task), 0, rings=rings(matrix, task))
    return Chart(task, [*behind, own], stages(matrix.stages, span(matrix)), small=True, task=task)


Steps = list[tuple[float, dict[str, Any]]]
Walls = list[tuple[float, str]]


def laid_out(run: Run) -> tuple[Steps, Walls]:
    """Every step event at its place among all steps of the run, and where each stage begins."""
    events = sorted(run.events("step"), key=lambda e: (e.get("stage") or 0, e["step"]))
    walls: Walls = []
    told, start, last, stage = [], 0.0, 0.0, object()
    for event in events:
        if event.get("stage") != stage:
            stage, start = event.get("stage"), last
            walls.append((start, str(event.get("task", stage))))
        last = start + event["step"]
        told.append((last, event))
    return told, walls if len(walls) <= 8 else [(x, str(i)) for i, (x, _) in enumerate(walls, 1)]


def training(steps: Steps, walls: Walls) -> Section | None:
    """The loss over all optimizer steps, a wall where each stage begins; None where no step was
    logged.
    """
    points = thinned([(x, event["loss"]) for x, event in steps if event.get("loss") is not None])
    return (
        Section(
            "Training loss",
            "By optimizer step; an upright line where a stage begins.",
            [_over_steps("loss", [Series("loss", points, 0, dots=False)], walls)],
        )
        if points
        else None
    )


def notes(steps: Steps, walls: Walls) -> list[Section]:
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
                _over_steps(
                    head,
                    lines({name: thinned(points) for name, points in told.items()}, dots=False),
                    walls,
                )
            ],
        )
        for head, told in named.items()
    ]


def _over_steps(title: str, series: Sequence[Series], walls: Walls) -> Chart:
    last = max(x for s in series for x, _ in s.points)
    return Chart(title, series, Axis(STEP, "count", (0.0, last)), Axis(title, "number"), walls)


def costs(run: Run) -> Section | None:
    """What the run took, in all and a stage."""
    told = [figures.cost(key, value) for key, value in run.matrix.cost.items()]
    heads = ("stage", "steps", "tokens", "time", "tokens / s", "strategy memory")
    rows = stage_costs(run)
    return (
        Section("Cost", kind="costs", body=told, table=table("cost", heads, rows) if rows else None)
        if told or rows
        else None
    )


def stage_costs(run: Run) -> list[list[str]]:
    """A row a stage: name, steps, tokens, time, tokens a second, strategy memory."""
    rows = []
    memory = {event.get("stage"): event.get("memory_bytes") for event in run.events("checkpoint")}
    for event in run.events("stage"):
        took, tokens = event.get("seconds"), event.get("tokens")
        rate = figures.count(tokens / took) if took and tokens else figures.NONE
        rows.append(
            [
                str(event.get("task", event.get("stage"))),
                figures.count(event.get("steps")),
                figures.count(tokens),
                figures.seconds(took),
                rate,
                figures.size(memory.get(event.get("stage"))),
            ]
        )
    return rows


def audit(run: Run) -> Section | None:
    """What was found amiss in the rows, and what the base already solved; None where the run has no
    audit.
    """
    if (told := audits.load(run.path)) is None:
        return None
    heads, *rows = audits.rows(told)
    base = (
        dict(zip(run.matrix.tasks, run.matrix.scores[0], strict=True))
        if run.matrix.stages[:1] == (BASE,)
        else {}
    )
    found = [*audits.lines(told), *audits.solved(told, base)]
    return Section(
        "Audit of the rows",
        audits.caption(told),
        table=table("audit", heads, rows),
        kind="findings",
        body=found,
    )


def answers(run: Run) -> Section | None:
    """A few answers of the last stage."""
    told = samples(run)
    lead = "From the last stage. Forgotten: marked right after the task's own stage, wrong now."
    return Section("Sample answers", lead, kind="samples", body=told) if told else None


def samples(run: Run) -> list[dict[str, Any]]:
    """For each task a few final answers: right, forgotten (right after the task's own stage, wrong
    now) and wrong.
    """
    last, told = run.matrix.stages[-1], []
    for task, score in zip(run.matrix.tasks, run.matrix.scores[-1], strict=True):
        now = run.predictions(last, task)
        own = run.matrix.stage_of(task)
        was = {p.id: p for p in run.predictions(task, task)} if own is not None else {}
        forgotten = [p for p in now if p.id in was and p.score < 0.5 <= was[p.id].score]
        forgotten_ids = {p.id for p in forgotten}
        sorts = {
            "right": [p for p in now if p.score >= 0.5],
            "forgotten": forgotten,
            "wrong": [p for p in now if p.score < 0.5 and p.id not in forgotten_ids],
        }
        shown = [
            _shown(sort, p, was[p.id].answer if sort == "forgotten" else None)
            for sort, predictions in sorts.items()
            for p in predictions[:SAMPLES]
        ]
        if shown:
            told.append(
                {
                    "task": task,
                    "score": percent(score),
                    "count": len(now),
                    "shown": shown,
                    "sorts": {sort: len(rows) for sort, rows in sorts.items()},
                }
            )
    return told


def _shown(sort: str, prediction: Prediction, earlier_answer: str | None) -> dict[str, Any]:
    return {
        "sort": sort,
        "id": prediction.id,
        "mark": f"{prediction.score:.2f}",
        "prompt": cut(prediction.prompt),
        "answer": cut(prediction.answer),
        "before": cut(earlier_answer),
        "references": cut(" | ".join(map(str, prediction.references))),
    }


def config(text: str, title: str = "Configuration") -> Section | None:
    """The whole configuration, folded away."""
    return Section(title, kind="config", body=text) if text else None
