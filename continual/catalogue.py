"""What there is to choose from, read from the configuration groups: one line each, with its source."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

from rich.console import Console
from rich.table import Table

from continual.errors import ConfigError, unknown

GROUPS = {"strategies": "strategy", "streams": "stream", "models": "model"}
PARTS = {"adapters"}  # not a choice of its own


def show(names: Sequence[str], console: Console) -> None:
    """Print the choices of the named groups, all of them by default; raises ConfigError for an unknown group."""
    for name in names or GROUPS:
        if name not in GROUPS:
            raise ConfigError(unknown("list", name, GROUPS))
        table = Table(title=f"{name} ({GROUPS[name]}=...)", title_justify="left", box=None, padding=(0, 2, 0, 0))
        table.add_column("name", style="bold")
        table.add_column("what it is")
        for choice, line in choices(GROUPS[name]):
            table.add_row(choice, line)
        console.print(table)


def choices(group: str) -> list[tuple[str, str]]:
    """The configurations of a group, each with the first comment line of its file."""
    found = []
    for path in sorted(files("conf").joinpath(group).iterdir(), key=lambda p: p.name):
        name = path.name.removesuffix(".yaml")
        if path.name.endswith(".yaml") and name not in PARTS:
            comments = [line[1:].strip() for line in path.read_text("utf-8").splitlines() if line.startswith("#")]
            found.append((name, next((c for c in comments if c and not c.startswith("@package")), "")))
    return found
