"""What a comparison consists of, told in its folder: the runs that each command asked for, and why
one failed.
"""

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
    """Write down that the command of these words asks for these runs, beside what earlier commands
    asked for.
    """
    earlier = [
        told for told in _load_recorded_commands(out) if not set(told["cells"]) <= set(run_names)
    ]
    plans = [*earlier, {"words": list(arguments), "cells": list(run_names)}]
    write_atomically(
        out / CELLS_FILE,
        json.dumps({"schema": 1, "commands": plans}, indent=1, ensure_ascii=False) + "\n",
    )


def resume_command(out: Path, arguments: Sequence[str]) -> str:
    """What is typed to go on with the comparison in `out`."""
    return shlex.join(["continual", "compare", *arguments, f"out={quote_value(str(out))}"])


def load_commands(out: Path) -> list[str]:
    """The commands that made what is in a comparison's folder."""
    return [resume_command(out, told["words"]) for told in _load_recorded_commands(out)]


def find_pending_runs(out: Path) -> list[str]:
    """The planned runs that have scored nothing yet."""
    return sorted(
        {
            n
            for told in _load_recorded_commands(out)
            for n in told["cells"]
            if not (out / n / "matrix.json").is_file()
        }
    )


def describe_unfinished(out: Path) -> list[str]:
    """One text for each command that has runs to finish: which, why, and the command; raises
    DataError.
    """
    found = []
    for told in _load_recorded_commands(out):
        if left := unfinished_states(out, told["cells"]):
            runs = "".join(f"\n  {name}: {state}" for name, state in left.items())
            found.append(
                escape_control(
                    f"{len(left)} of {len(told['cells'])} runs are not finished:{runs}\nThis "
                    f"finishes them:\n  {resume_command(out, told['words'])}"
                )
            )
    return found


def unfinished_states(out: Path, run_names: Sequence[str]) -> dict[str, str]:
    """Why each of these runs failed, or that it is not finished."""
    return {name: state for name in run_names if (state := _run_state(out / name))}


def _run_state(run: Path) -> str:
    """Empty where the run is finished."""
    if (run / "finished").exists():
        return ""
    if (run / FAILED_FILE).is_file():
        return "failed: " + read_bytes(run / FAILED_FILE).decode("utf-8", "replace").strip()
    return "begun, and not at its end" if (run / "config.yaml").exists() else "not begun"


def _load_recorded_commands(out: Path) -> list[dict[str, Any]]:
    path = out / CELLS_FILE
    if not path.is_file():
        return []
    try:
        told = load_json(path)
        plans = [
            {"words": list(map(str, t["words"])), "cells": list(map(str, t["cells"]))}
            for t in told["commands"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} cannot be read ({error!r}); remove it: the same continual compare writes it "
            "again"
        ) from error
    if strange := [
        name
        for t in plans
        for name in t["cells"]
        if name in ("", ".", "..") or "/" in name or CONTROL.search(name)
    ]:
        raise DataError(
            f"{path} names {escape_control(', '.join(strange))}, which are no folders in it; remove the "
            "file: the same continual compare writes it again"
        )
    return plans
