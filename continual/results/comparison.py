"""Record the commands of a comparison, its planned runs, and why a run failed."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from continual.config.quoting import quote_value
from continual.errors import DataError
from continual.io.atomic import write_atomically
from continual.io.terminal import escape_control
from continual.io.untrusted import CONTROL, load_json, read_bytes

CELLS_FILE = "cells.json"
FAILED_FILE = "failed.txt"  # in a run's folder


def record_command(out: Path, arguments: Sequence[str], run_names: Sequence[str]) -> None:
    """Record a command and the runs it plans; replace earlier commands that it covers."""
    earlier = [
        entry for entry in _load_recorded_commands(out) if not set(entry["cells"]) <= set(run_names)
    ]
    plans = [*earlier, {"words": list(arguments), "cells": list(run_names)}]
    write_atomically(
        out / CELLS_FILE,
        json.dumps({"schema": 1, "commands": plans}, indent=1, ensure_ascii=False) + "\n",
    )


def resume_command(out: Path, arguments: Sequence[str]) -> str:
    """Return the shell command that resumes the comparison in `out`."""
    return shlex.join(["continual", "compare", *arguments, f"out={quote_value(str(out))}"])


def load_commands(out: Path) -> list[str]:
    """Return the shell commands that produced a comparison folder."""
    return [resume_command(out, entry["words"]) for entry in _load_recorded_commands(out)]


def find_pending_runs(out: Path) -> list[str]:
    """Return the sorted names of planned runs without a matrix.json."""
    return sorted(
        {
            name
            for entry in _load_recorded_commands(out)
            for name in entry["cells"]
            if not (out / name / "matrix.json").is_file()
        }
    )


def describe_unfinished(out: Path) -> list[str]:
    """Return one text per command with unfinished runs: their states and the resume command.

    Raises DataError.
    """
    texts = []
    for entry in _load_recorded_commands(out):
        if states := unfinished_states(out, entry["cells"]):
            runs = "".join(f"\n  {name}: {state}" for name, state in states.items())
            texts.append(
                escape_control(
                    f"{len(states)} of {len(entry['cells'])} runs are not finished:{runs}\nThis "
                    f"finishes them:\n  {resume_command(out, entry['words'])}"
                )
            )
    return texts


def unfinished_states(out: Path, run_names: Sequence[str]) -> dict[str, str]:
    """Return the state of each unfinished run: failed with a reason, interrupted, or not started."""
    return {name: state for name in run_names if (state := _run_state(out / name))}


def _run_state(run: Path) -> str:
    """Return why a run is unfinished, or an empty text if it is finished."""
    if (run / "finished").exists():
        return ""
    if (run / FAILED_FILE).is_file():
        return "failed: " + read_bytes(run / FAILED_FILE).decode("utf-8", "replace").strip()
    return "started, but not finished" if (run / "config.yaml").exists() else "not started"


def _load_recorded_commands(out: Path) -> list[dict[str, Any]]:
    path = out / CELLS_FILE
    if not path.is_file():
        return []
    try:
        document = load_json(path)
        plans = [
            {"words": list(map(str, entry["words"])), "cells": list(map(str, entry["cells"]))}
            for entry in document["commands"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} cannot be read ({error!r}); remove it: the same continual compare writes it "
            "again"
        ) from error
    if invalid_names := [
        name
        for entry in plans
        for name in entry["cells"]
        if name in ("", ".", "..") or "/" in name or CONTROL.search(name)
    ]:
        raise DataError(
            f"{path} names {escape_control(', '.join(invalid_names))}, which are no folders in it; remove the "
            "file: the same continual compare writes it again"
        )
    return plans
