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

from continual.distributed.processes import leads

if TYPE_CHECKING:
    from continual.tracking.trackers import Tracker


def _cut(path: Path) -> bool:
    """Whether the last line is only half there, as a killed run may leave it."""
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read() not in (b"", b"\n")


def quiet() -> None:
    """Libraries' progress bars and advice have no place between ours."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # what it would speed up is no concern of a run's


class _Lines(io.StringIO):
    """Whole lines to stderr, each behind a name: several processes write there."""

    def __init__(self, name: str) -> None:
        self.name, self.half = name, ""

    def write(self, text: str) -> int:
        *whole, self.half = (self.half + text).split("\n")
        sys.stderr.write("".join(f"{self.name}: {line}\n" for line in whole if line.strip()))
        return len(text)

    def flush(self) -> None:
        sys.stderr.flush()


def lines_of(name: str) -> Console:
    """A console for one of several runs side by side: no bar, and every line behind the run's name."""
    return Console(file=_Lines(name), force_terminal=False, width=200)


class Events:
    """An append-only log of JSON lines, and a progress bar fed by it.

    `stage` counts from 0, the scoring before any training. Of processes that share the work only
    one writes and shows.
    """

    def __init__(self, path: Path, console: Console, track: Tracker | None = None) -> None:
        """Append to `path`; show on `console`; and tell a tracker, if there is one."""
        if not leads():
            path, console = Path(os.devnull), Console(quiet=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.console, self.stage, self.track = console, 0, track
        self._file = path.open("a", encoding="utf-8")
        self._file.write("\n" if _cut(path) else "")
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

    def __enter__(self) -> Events:
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
        if self.track:
            self._tell(lambda track: track.close(error is None))
        self._file.close()

    def __call__(self, event: dict[str, Any]) -> None:
        """Write one event down, and move the bar if it is a step."""
        line = {"time": time.time(), "stage": self.stage, **event}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()
        if self.track:
            self._tell(lambda track: track(line))
        if event["event"] == "step":
            rate = event["tokens"] / max(event["seconds"], 1e-9)
            loss = "not finite" if event["loss"] is None else f"{event['loss']:.3f}"
            self.bar(
                event["task"], event["steps"], event["step"], f"loss {loss}, {rate:,.0f} tokens/s"
            )
        elif event["event"] == "warning":
            self.say(event["text"])

    def _tell(self, what: Callable[[Tracker], None]) -> None:
        """A tracker that fails is left out from then on: it is no reason to lose a run."""
        assert self.track
        try:
            what(self.track)
        except Exception as trouble:  # of a library that is not ours, and of whatever it talks to
            self.track = None
            self(
                {
                    "event": "warning",
                    "text": f"the tracker failed, and the run goes on without it: {trouble}",
                }
            )

    def bar(self, text: str, total: int, done: int, note: str = "") -> None:
        """Show a bar at `done` of `total`, in place of the one before."""
        if self._task is None or self._bar.tasks[0].description != text:
            self.clear()
            self._task = self._bar.add_task(text, total=total, note=note)
        self._bar.update(self._task, completed=done, total=total, note=note)

    def clear(self) -> None:
        """Take the bar away."""
        for task in self._bar.task_ids:
            self._bar.remove_task(task)
        self._task = None

    def say(self, text: str) -> None:
        """One line that stays."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
