"""Stop a run at the end of a step after SIGINT or SIGTERM."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from continual.config.quoting import quote_value
from continual.distributed.processes import (
    all_reduce_max,
    barrier,
    is_main_process,
    num_started_processes,
)
from continual.errors import ContinualError


class RunInterrupted(ContinualError):
    """A signal stopped the run; everything finished is saved."""

    def __init__(self, message: str, signal_number: int) -> None:
        """Keep the number of the signal, for the exit status."""
        super().__init__(message)
        self.signal_number = signal_number


class StopSignal:
    """Record SIGINT and SIGTERM within a `with` block; a second one ends the process at once."""

    def __init__(self) -> None:
        """Start without a signal."""
        self.signal_number: int | None = None
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        """Install the signal handlers; only the main thread can."""
        if threading.current_thread() is threading.main_thread():
            self._previous_handlers = {
                n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM)
            }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Record the first signal, and tell the user; raise KeyboardInterrupt at the second."""
        if self.signal_number is not None:
            raise KeyboardInterrupt
        self.signal_number = number
        if is_main_process():
            print(
                "\nstopping once this is kept; the same signal again stops at once", file=sys.stderr
            )

    def raise_if_received(self, position: str, out: Path, signal_number: int | None = None) -> None:
        """Raise RunInterrupted, with the command that resumes, if any process received a signal.

        `position` says where the run is, such as "after step 5 of stage 2". `signal_number` is what
        all processes know already, 0 for none; None asks them.
        """
        if signal_number is None:
            signal_number, _ = self.any()
        if signal_number:
            barrier()  # the main process may still be saving
            raise RunInterrupted(
                f"stopped {position}; nothing is lost. Go on with:\n  {resume_command(out)}",
                signal_number,
            )

    def any(self, due: bool = False) -> tuple[int, bool]:
        """Return the signal that any process received (0: none), and whether `due` in any process.

        All processes get the same answer.
        """
        signal_number, is_due = all_reduce_max(self.signal_number or 0, due)
        return signal_number, bool(is_due)


def resume_command(out: Path) -> str:
    """Return the command line of this process, with the run's folder as `out`."""
    words = [w for w in sys.argv[1:] if not w.startswith("out=")]
    start = []
    if num_started_processes() > 1:
        start = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1"), "-m"]
    return shlex.join([*start, "continual", *words, f"out={quote_value(str(out))}"])
