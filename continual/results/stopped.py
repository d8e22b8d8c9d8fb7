"""Describe why stop_if stopped a run, from the notice in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from continual.errors import DataError
from continual.io.untrusted import CONTROL, is_number, load_json

STOPPED_FILE = "stopped.json"


def describe_stop(out: Path) -> str | None:
    """Return the reason for which stop_if stopped the run, in one line, or None. Raises DataError."""
    notice = _load_stop(out)
    return _format_stop(notice, out) if notice else None


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
    notice = load_json(path)
    if not (
        isinstance(notice, dict)
        and notice.get("schema") == 1
        and isinstance(notice.get("task"), str)
        and all(is_number(notice.get(key)) for key in ("step", "forgetting", "limit"))
        and not CONTROL.search(notice["task"])
    ):
        raise DataError(
            f"{path}: found no task, step, forgetting and limit of schema 1, expected what "
            "stopped the run; remove it, and the run goes on"
        )
    return notice
