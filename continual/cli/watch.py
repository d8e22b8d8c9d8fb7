"""Live runs in the terminal, from what they write: events.jsonl is read on from where it was, never
from the start.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from continual.errors import DataError, MissingError
from continual.io.terminal import escape_control
from continual.io.untrusted import LONGEST, check_links_inside, parse_json
from continual.reports.figures import NO_VALUE, format_count, format_percent, format_seconds
from continual.results import comparison
from continual.results.matrix import BASE_STAGE, Matrix, forgetting, mean_or_none
from continual.results.run_folder import is_event

WATCH_DEFAULTS = {"once": "false", "every": "1"}
CHUNK_BYTES = 2**20  # bytes read at once
SPEED_WINDOW = 20  # events over which the speed is taken
SILENCE_SECONDS = 60  # seconds without an event that are worth a word


class EventTail:
    """The events that are added to a file; a line that is not whole yet is waited for."""

    def __init__(self, path: Path) -> None:
        """From the file's start, where there is one."""
        self.path, self.offset, self.partial_line, self.broken_lines = path, 0, b"", 0

    def read_new_events(self) -> Iterator[dict[str, Any]]:
        """What was added since the last call; from the start again where the file has become
        shorter.
        """
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            if self.path.stat().st_size < self.offset:
                self.offset, self.partial_line = 0, b""
            file.seek(self.offset)
            while more := file.read(CHUNK_BYTES):
                self.offset += len(more)
                *whole, self.partial_line = (self.partial_line + more).split(b"\n")
                self.partial_line = self.partial_line[: LONGEST + 1]
                yield from self._parse_lines(whole)

    def _parse_lines(self, whole: Sequence[bytes]) -> Iterator[dict[str, Any]]:
        for line in whole:
            if not line.strip():
                continue
            try:
                event = parse_json(line, str(self.path), line=True)
            except DataError:
                event = None
            if event is not None and is_event(event):
                yield event
            else:
                self.broken_lines += 1


@dataclass
class WatchedRun:
    """One run folder, and what is known of it so far."""

    folder: Path
    name: str
    tail: EventTail = field(init=False)
    stages: list[str] = field(default_factory=list)  # as the run's start told them
    last_step: dict[str, Any] = field(default_factory=dict)
    recent_steps: deque[tuple[float, float]] = field(
        default_factory=lambda: deque(maxlen=SPEED_WINDOW)
    )  # tokens, seconds
    stage_seconds: dict[int, float] = field(default_factory=dict)  # seconds of each learned stage
    score_seconds: dict[int, float] = field(default_factory=dict)  # and of the scoring behind it
    state: str = "waiting"
    last_event_time: float | None = None
    matrix: Matrix | None = None
    matrix_stamp: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        self.tail = EventTail(self.folder / "events.jsonl")

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state in ("finished", "failed", "stopped")

    def refresh(self) -> None:
        """Read what is new."""
        for event in self.tail.read_new_events():
            self._apply_event(event)
        path = self.folder / "matrix.json"
        if (
            path.is_file()
            and (stamp := (path.stat().st_mtime_ns, path.stat().st_size)) != self.matrix_stamp
        ):
            self.matrix, self.matrix_stamp = Matrix.load(path), stamp
        if (self.folder / "finished").exists() or (self.folder / "curve.json").is_file():
            self.state = "finished"
        elif (self.folder / comparison.FAILED_FILE).is_file():
            self.state = "failed"

    def _apply_event(self, event: dict[str, Any]) -> None:
        kind, stage = event["event"], int(event.get("stage") or 0)
        self.last_event_time = event.get("time") or self.last_event_time
        self.state = {
            "step": "learning",
            "stage": "scoring",
            "score": "learning",
            "start": "begun",
            "stopped": "stopped",
        }.get(kind, self.state)
        if kind == "start":
            told = event.get("stages")
            self.stages = (
                [s for s in told if isinstance(s, str)] if isinstance(told, list) else self.stages
            )
        elif kind == "step":
            if stage != self.last_step.get("stage") or event["step"] <= self.last_step["step"]:
                self.recent_steps.clear()
            self.last_step = {**event, "stage": stage}
            self.recent_steps.append((event.get("tokens") or 0, event.get("seconds") or 0))
        elif kind in ("stage", "score"):
            (self.stage_seconds if kind == "stage" else self.score_seconds)[stage] = (
                event.get("seconds") or 0
            )

    @property
    def tokens_per_second(self) -> float | None:
        """Supervised tokens a second, lately."""
        if not self.recent_steps:
            return None
        tokens, took = (
            b - a
            for a, b in zip(
                self.recent_steps[0] if len(self.recent_steps) > 1 else (0, 0),
                self.recent_steps[-1],
                strict=True,
            )
        )
        return float(tokens / took) if took > 0 else None

    @property
    def seconds_left(self) -> float | None:
        """Seconds to the run's end, if each stage takes as long as those before it; None where that
        cannot be told.
        """
        step, steps = self.last_step.get("step"), self.last_step.get("steps")
        if self.has_ended or not self.stages or not step or not steps:
            return None
        number, took = self.last_step["stage"], self.last_step.get("seconds") or 0
        ahead = max(len(self.stages) - number, 0)
        here = 0.0 if number in self.stage_seconds else took / step * max(steps - step, 0)
        learning = mean_or_none(list(self.stage_seconds.values()) or [took / step * steps]) or 0
        scores = mean_or_none(self.score_seconds.values()) or 0
        return float(
            here + ahead * learning + (ahead + (number not in self.score_seconds)) * scores
        )

    def table_row(self) -> list[str]:
        """Its line of the table."""
        step = (
            f"{self.last_step['step']:.0f}/{self.last_step.get('steps') or 0:.0f}"
            if self.last_step
            else NO_VALUE
        )
        loss = self.last_step.get("loss")
        told = NO_VALUE if loss is None else f"{loss:.3f}"
        now = learned_submatrix(self.matrix) if self.matrix else None
        average, lost = (mean_or_none(now.final_scores), forgetting(now)) if now else (None, None)
        return [
            self.name,
            self.activity(),
            step,
            told,
            format_count(self.tokens_per_second),
            format_percent(average),
            format_percent(lost),
            format_seconds(self.seconds_left),
        ]

    def activity(self) -> str:
        """What it does, and at which stage; and since when it has said nothing, where that is long."""
        number, total = self.last_step.get("stage", 0), len(self.stages)
        words = [self.state]
        if not self.has_ended and self.state != "waiting":
            words = ["scoring"] if self.state == "scoring" else []
            words.append(
                f"{number}/{total or '?'} {self.last_step.get('task')}"
                if self.last_step
                else BASE_STAGE
            )
        silent = (
            0.0
            if self.last_event_time is None or self.has_ended
            else time.time() - self.last_event_time
        )
        return " ".join(words) + (
            f", quiet for {format_seconds(silent)}" if silent > SILENCE_SECONDS else ""
        )


def learned_submatrix(matrix: Matrix) -> Matrix | None:
    """The matrix of the tasks that are learned and scored so far, as if they were all; None before
    the first.
    """
    if not matrix.is_sequential:
        return matrix if matrix.is_finished else None
    tasks = tuple(task for task in matrix.tasks if task in matrix.stages)
    rows = tuple(tuple(matrix.score(i, task) for task in tasks) for i in range(len(matrix.stages)))
    return replace(matrix, tasks=tasks, scores=rows, counts=())


def watch(
    folders: Sequence[Path], console: Console, *, once: bool = False, every: float = 1.0
) -> None:
    """Show the runs in these run and comparison folders until all are over; their state alone, if
    `once`.

    Raises MissingError for a folder that is not there, DataError for a link that leads out of one.
    """
    if not folders:
        raise MissingError("continual watch needs a folder made by run, compare or adapt")
    runs: dict[Path, WatchedRun] = {}
    if once or not console.is_terminal:
        console.print(build_runs_table(refresh_runs(folders, runs)))
        return
    with (
        suppress(KeyboardInterrupt),
        Live(
            build_runs_table(refresh_runs(folders, runs), console),
            console=console,
            auto_refresh=False,
        ) as live,
    ):
        while not all(run.has_ended for run in runs.values()) or not runs:
            time.sleep(every)
            live.update(build_runs_table(refresh_runs(folders, runs), console), refresh=True)


def refresh_runs(folders: Sequence[Path], runs: dict[Path, WatchedRun]) -> list[WatchedRun]:
    """The runs of these folders as they are now; `runs` has what was read of them before."""
    for folder in folders:
        for path in find_run_folders(folder):
            if path not in runs:
                if path.is_dir():
                    check_links_inside(path)
                runs[path] = WatchedRun(path, str(path) if path == folder else path.name)
            runs[path].refresh()
    return list(runs.values())


def find_run_folders(folder: Path) -> list[Path]:
    """The run folders that a folder is or holds, those too that a comparison has not begun."""
    if not folder.is_dir():
        raise MissingError(
            f"{folder}: there is no such folder; give the out= of continual run, adapt or compare"
        )
    begun = [p.parent for p in sorted(folder.glob("*/config.yaml"))]
    planned = [folder / name for name in comparison.find_pending_runs(folder)]
    return list(dict.fromkeys([*begun, *planned])) or [folder]


IDLE_STATES = ("finished", "waiting")  # of these there may be hundreds, and they do nothing


def build_runs_table(runs: Sequence[WatchedRun], screen: Console | None = None) -> Table:
    """One row a run; on a screen with too little room only of those that do or want something: the
    rest is counted.

    Every text is shown as text.
    """
    broken, told = sum(run.tail.broken_lines for run in runs), list[str]()
    if screen and len(runs) > screen.height - 5:
        told = [
            f"{n} {state}"
            for state, n in Counter(run.state for run in runs).items()
            if state in IDLE_STATES
        ]
        runs = [run for run in runs if run.state not in IDLE_STATES]
    made = Table(box=None, padding=(0, 1))
    for head in ("run", "doing", "step", "loss", "tokens/s", "average", "forgetting", "left"):
        text = head in ("run", "doing")
        made.add_column(
            head,
            justify="left" if text else "right",
            no_wrap=not text,
            overflow="fold",
            min_width=10 if text else None,
        )
    for run in runs:
        made.add_row(*(Text(escape_control(cell)) for cell in run.table_row()))
    told += [f"{broken} broken lines of events are left out"] if broken else []
    made.caption = "; ".join(told) or None
    return made
