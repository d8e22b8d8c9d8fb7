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
from continual.results.stopped import FILE, _read, _says

STATUS = 3  # what the command line exits with


class Gated(ContinualError):
    """A gate of the configuration stopped the run; all is kept."""


def over(point: Mapping[str, Any], stage: str, limit: float | None) -> dict[str, Any] | None:
    """The event that stops a run at this point within a stage; None where its forgetting is not
    above the limit.
    """
    forgetting = point["forgetting"]
    if limit is None or forgetting is None or forgetting <= limit:
        return None
    return {
        "event": "gate",
        "task": stage,
        "step": point["step"],
        "forgetting": forgetting,
        "limit": limit,
    }


def stop(out: Path, event: Mapping[str, Any]) -> NoReturn:
    """Write down what stopped the run, and raise Gated."""
    if is_main_process():
        write_atomically(out / FILE, json.dumps({"schema": 1, **event}, ensure_ascii=False) + "\n")
    barrier()  # whoever keeps the run has kept it
    raise Gated(_says(event, out))


def passed(out: Path, limit: float | None) -> None:
    """Let a run that a gate stopped go on, where its forgetting is not above this limit; else
    raises Gated again.
    """
    told = broadcast(_read(out) if is_main_process() else None)
    if told and limit is not None and told["forgetting"] > limit:
        raise Gated(_says({**told, "limit": limit}, out))
    if told and is_main_process():
        (out / FILE).unlink()
