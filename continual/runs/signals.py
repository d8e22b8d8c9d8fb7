"""Stop a run at a step's end when a signal asks for it."""

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
    """The user or the system asked for an end; all is kept."""

    def __init__(self, message: str, signal_number: int) -> None:
        """`number` is the signal's."""
        super().__init__(message)
        self.signal_number = signal_number


class StopSignal:
    """Within it SIGINT and SIGTERM are noted in `caught`; a second one ends the process at once."""

    def __init__(self) -> None:
        """Nothing caught yet."""
        self.signal_number: int | None = None
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        """Take the signals over, in the main thread, which alone may."""
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
        """Give them back."""
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:
            raise KeyboardInterrupt
        self.signal_number = number
        if is_main_process():
            print(
                "\nstopping once this is kept; the same signal again stops at once", file=sys.stderr
            )

    def raise_if_received(self, position: str, out: Path, signal_number: int | None = None) -> None:
        """Raise Stopped, with the command that goes on, if a signal came, here or to a process that
        shares the work.

        `caught` is what all of them know of already, 0 for none.
        """
        signal_number = self.any()[0] if signal_number is None else signal_number
        if signal_number:
            barrier()  # whoever keeps the work has kept it
            raise RunInterrupted(
                f"stopped {position}; nothing is lost. Go on with:\n  {resume_command(out)}",
                signal_number,
            )

    def any(self, due: bool = False) -> tuple[int, bool]:
        """The signal that came to any process, 0 for none, and whether something is due in any: the
        same in all.
        """
        caught, is_due = all_reduce_max(self.signal_number or 0, due)
        return caught, bool(is_due)


def resume_command(out: Path) -> str:
    """The command that was given, with the run's folder."""
    words = [w for w in sys.argv[1:] if not w.startswith("out=")]
    start = (
        ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1"), "-m"]
        if num_started_processes() > 1
        else []
    )
    return shlex.join([*start, "continual", *words, f"out={quote_value(str(out))}"])
