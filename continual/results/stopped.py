"""The notice that a run leaves where stop_if stopped it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from continual.errors import DataError
from continual.io.untrusted import CONTROL, is_number, load_json

STOPPED_FILE = "stopped.json"


def describe_stop(out: Path) -> str | None:
    """What stopped the run in this folder, in a line; None where no gate did. Raises DataError."""
    told = _load_stop(out)
    return _format_stop(told, out) if told else None


def _format_stop(event: Mapping[str, Any], out: Path) -> str:
    return (
        f"stopped by stop_if.forgetting={event['limit']:g}: forgetting was "
        f"{event['forgetting']:.3f} after step {event['step']} of stage {event['task']}; all is "
        f"kept. The same command with out={out} and a higher stop_if.forgetting, or "
        "stop_if.forgetting=null, goes on from there"
    )


def _load_stop(out: Path) -> dict[str, Any] | None:
    path = out / STOPPED_FILE
    if not path.is_file():
        return None
    told = load_json(path)
    if not (
        isinstance(told, dict)
        and told.get("schema") == 1
        and isinstance(told.get("task"), str)
        and all(is_number(told.get(key)) for key in ("step", "forgetting", "limit"))
        and not CONTROL.search(told["task"])
    ):
        raise DataError(
            f"{path}: found no task, step, forgetting and limit of schema 1, expected what "
            "stopped the run; remove it, and the run goes on"
        )
    return told
