"""What happens in a run: appended to events.jsonl for the report, and shown as it happens."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from continual.distributed.processes import is_main_process

if TYPE_CHECKING:
    from continual.tracking.trackers import Tracker


def _has_partial_last_line(path: Path) -> bool:
    """Whether the last line is only half there, as a killed run may leave it."""
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read() not in (b"", b"\n")


def silence_libraries() -> None:
    """Libraries' progress bars and advice have no place between ours."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # what it would speed up is no concern of a run's


class _PrefixedLines(io.StringIO):
    """Whole lines to stderr, each behind a name: several processes write there."""

    def __init__(self, name: str) -> None:
        self.name, self.partial_line = name, ""

    def write(self, text: str) -> int:
        *whole, self.partial_line = (self.partial_line + text).split("\n")
        sys.stderr.write("".join(f"{self.name}: {line}\n" for line in whole if line.strip()))
        return len(text)

    def flush(self) -> None:
        sys.stderr.flush()


def prefixed_console(name: str) -> Console:
    """A console for one of several runs side by side: no bar, and every line behind the run's name."""
    return Console(file=_PrefixedLines(name), force_terminal=False, width=200)


class EventLog:
    """An append-only log of JSON lines, and a progress bar fed by it.

    `stage` counts from 0, the scoring before any training. Of processes that share the work only
    one writes and shows.
    """

    def __init__(self, path: Path, console: Console, tracker: Tracker | None = None) -> None:
        """Append to `path`; show on `console`; and tell a tracker, if there is one."""
        if not is_main_process():
            path, console = Path(os.devnull), Console(quiet=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.console, self.stage, self.tracker = console, 0, tracker
        self._file = path.open("a", encoding="utf-8")
        self._file.write("\n" if _has_partial_last_line(path) else "")
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> EventLog:
        """Start to show."""
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop to show; write down why, if this is not the end; close the file."""
        self._bar.stop()
        if error is not None:
            with suppress(OSError):  # a disk that is full may be why
                self({"event": "stopped", "text": str(error)})
        if self.tracker:
            self._notify_tracker(lambda track: track.close(error is None))
        self._file.close()

    def __call__(self, event: dict[str, Any]) -> None:
        """Write one event down, and move the bar if it is a step."""
        line = {"time": time.time(), "stage": self.stage, **event}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()
        if self.tracker:
            self._notify_tracker(lambda track: track(line))
        if event["event"] == "step":
            rate = event["tokens"] / max(event["seconds"], 1e-9)
            loss = "not finite" if event["loss"] is None else f"{event['loss']:.3f}"
            self.update_bar(
                event["task"], event["steps"], event["step"], f"loss {loss}, {rate:,.0f} tokens/s"
            )
        elif event["event"] == "warning":
            self.print_line(event["text"])

    def _notify_tracker(self, what: Callable[[Tracker], None]) -> None:
        """A tracker that fails is left out from then on: it is no reason to lose a run."""
        assert self.tracker
        try:
            what(self.tracker)
        except Exception as trouble:  # of a library that is not ours, and of whatever it talks to
            self.tracker = None
            self(
                {
                    "event": "warning",
                    "text": f"the tracker failed, and the run goes on without it: {trouble}",
                }
            )

    def update_bar(self, text: str, total: int, completed: int, note: str = "") -> None:
        """Show a bar at `done` of `total`, in place of the one before."""
        if self._task is None or self._bar.tasks[0].description != text:
            self.clear_bar()
            self._task = self._bar.add_task(text, total=total, note=note)
        self._bar.update(self._task, completed=completed, total=total, note=note)

    def clear_bar(self) -> None:
        """Take the bar away."""
        for task in self._bar.task_ids:
            self._bar.remove_task(task)
        self._task = None

    def print_line(self, text: str) -> None:
        """One line that stays."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
