"""What the probes beside the matrix found, read and shown: a line of figures for each series, a
column a stage.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from continual.io.untrusted import CONTROL, is_number, load_json_with_schema
from continual.reports.figures import format_percent

PROBES_FILE = "probes.json"
MAX_PRINTED_SERIES = 8  # series of one table in the terminal


def load_probes(folder: Path) -> dict[str, Any] | None:
    """The run's probes.json, None where there is none; raises DataError where it is damaged."""
    path = folder / PROBES_FILE
    if not path.is_file():
        return None
    return load_json_with_schema(path, "probes", "remove it, or run again", _check_probes)


def _check_probes(document: dict[str, Any]) -> None:
    if any(
        not _is_valid_entry(name, entry, len(document["stages"]))
        for name, entry in document["probes"].items()
    ):
        raise ValueError("a figure for each stage was expected, and what it says")
    if not all(
        isinstance(stage, str) and not CONTROL.search(stage) for stage in document["stages"]
    ):
        raise ValueError("stages should be names")


def _is_valid_entry(name: str, entry: Any, stages: int) -> bool:
    """Whether an entry has its texts, and a number or none for each stage."""
    texts = (name, entry["says"], entry["source"], *entry["series"])
    return (
        all(isinstance(text, str) and not CONTROL.search(text) for text in texts)
        and entry["better"] in ("higher", "lower")
        and all(
            len(values) == stages and all(v is None or is_number(v) for v in values)
            for values in entry["series"].values()
        )
    )


def print_probes(console: Console, document: dict[str, Any]) -> None:
    """A table for each entry: its first series, before training and after each stage."""
    for name, entry in document["probes"].items():
        arrow = "↑" if entry["better"] == "higher" else "↓"
        console.print(Text.assemble((f"{name} {arrow} ", "bold"), (entry["says"], "dim")))
        table = Table(box=None, padding=(0, 1, 0, 0))
        table.add_column("in percent", no_wrap=True)
        for stage in range(len(document["stages"])):
            table.add_column(str(stage), justify="right", no_wrap=True)
        for label, values in [*entry["series"].items()][:MAX_PRINTED_SERIES]:
            table.add_row(Text(label), *map(format_percent, values))
        console.print(table)
        if (more := len(entry["series"]) - MAX_PRINTED_SERIES) > 0:
            console.print(Text(f"and {more} more series in {PROBES_FILE}", style="dim"))
