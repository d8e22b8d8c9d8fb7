"""A gate stops a run that forgets too much; what stopped it stands in its folder until a gate lets
it pass.
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

EXIT_STATUS = 3  # what the command line exits with


class ForgettingLimitExceeded(ContinualError):
    """A gate of the configuration stopped the run; all is kept."""


def check(event: Mapping[str, Any], stage_name: str, limit: float | None) -> dict[str, Any] | None:
    """The event that stops a run at this point within a stage; None where its forgetting is not
    above the limit.
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
    """Write down what stopped the run, and raise Gated."""
    if is_main_process():
        write_atomically(
            out / STOPPED_FILE, json.dumps({"schema": 1, **event}, ensure_ascii=False) + "\n"
        )
    barrier()  # whoever keeps the run has kept it
    raise ForgettingLimitExceeded(_format_stop(event, out))


def clear(out: Path, limit: float | None) -> None:
    """Let a run that a gate stopped go on, where its forgetting is not above this limit; else
    raises Gated again.
    """
    told = broadcast(_load_stop(out) if is_main_process() else None)
    if told and limit is not None and told["forgetting"] > limit:
        raise ForgettingLimitExceeded(_format_stop({**told, "limit": limit}, out))
    if told and is_main_process():
        (out / STOPPED_FILE).unlink()
