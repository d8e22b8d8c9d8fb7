"""Stop a run whose forgetting exceeds the limit stop_if.forgetting.

The event that stopped it is written to the run folder, until the run is given a limit that it
passes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from continual.distributed.processes import barrier, broadcast, is_main_process
from continual.errors import ContinualError
from continual.io.atomic import write_atomically
from continual.results.stopped import STOPPED_FILE, _format_stop, _load_stop

EXIT_STATUS = 3  # exit status of the command line


class ForgettingLimitExceeded(ContinualError):
    """A limit of stop_if stopped the run; everything finished is saved."""


def check(event: Mapping[str, Any], stage_name: str, limit: float | None) -> dict[str, Any] | None:
    """Return the event that stops the run here, or None if forgetting is not above the limit.

    `event` is one of the ForgettingMonitor.
    """
    forgetting = event["forgetting"]
    if limit is None or forgetting is None or forgetting <= limit:
        return None
    return {
        "event": "gate",
        "task": stage_name,
        "step": event["step"],
        "forgetting": forgetting,
        "limit": limit,
    }


def halt(out: Path, event: Mapping[str, Any]) -> NoReturn:
    """Write the event to the run folder, and raise ForgettingLimitExceeded."""
    if is_main_process():
        write_atomically(
            out / STOPPED_FILE, json.dumps({"schema": 1, **event}, ensure_ascii=False) + "\n"
        )
    barrier()  # the main process may still be saving
    raise ForgettingLimitExceeded(_format_stop(event, out))


def clear(out: Path, limit: float | None) -> None:
    """Let a run continue that was stopped with forgetting not above this limit.

    Raises ForgettingLimitExceeded if its forgetting is above the limit.
    """
    event = broadcast(_load_stop(out) if is_main_process() else None)
    if event is None:
        return
    if limit is not None and event["forgetting"] > limit:
        raise ForgettingLimitExceeded(_format_stop({**event, "limit": limit}, out))
    if is_main_process():
        (out / STOPPED_FILE).unlink()
