"""What there is to choose from, one line each with its source; of a strategy also its moments and
what it stores.

Read from the configuration groups, and of strategies from their source code: nothing is imported.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import yaml
from rich.console import Console

from continual.config.plugins import plugins
from continual.errors import ConfigError, unknown

GROUPS = {"strategies": "strategy", "streams": "stream", "models": "model", "probes": "probe"}
PARTS = {"adapters"}  # not a choice of its own
FACTS = ("stores", "costs")  # texts that a strategy's class may hold
MOMENTS = ("begin", "loss", "backward", "end", "route", "dispatch")
ROOT = "continual.strategy.interface.Strategy"
KEY = (
    "P trainable weights, E remembered examples, S response tokens of one, T tasks, V vocabulary; "
    "numbers are bytes"
)
ASKED = {"json=true": True, "json=false": False}


@dataclass(frozen=True)
class Choice:
    """One of what there is; of a strategy also the dotted path of its class, and what that says and
    overrides.
    """

    name: str
    source: str
    target: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)  # stores, costs
    moments: Sequence[str] = ()

    def to_dict(self) -> dict[str, object]:
        """All of it, for machines."""
        of_strategies = {"class": self.target, "moments": list(self.moments), **self.facts}
        return {"name": self.name, "source": self.source, **(of_strategies if self.facts else {})}


def print_catalogue(words: Sequence[str], console: Console) -> None:
    """Print the choices of the named groups, all of them by default; with json=true as JSON.

    Raises ConfigError for an unknown group.
    """
    names = [w for w in words if w not in ASKED]
    for name in names:
        if name not in GROUPS:
            raise ConfigError(unknown("list", name, [*GROUPS, *ASKED]))
    found = {name: list_choices(GROUPS[name]) for name in names or GROUPS}
    if any(ASKED.get(word) for word in words):
        print(
            json.dumps(
                {name: [c.to_dict() for c in told] for name, told in found.items()},
                indent=1,
                ensure_ascii=False,
            )
        )
        return
    for name, told in found.items():
        rows = [
            (
                c.name,
                *([", ".join(c.moments) or "none", c.facts["stores"]] if c.facts else []),
                c.source,
            )
            for c in told
        ]
        heads = (
            ("name", "moments", "stores", "what it is")
            if len(rows[0]) > 2
            else ("name", "what it is")
        )
        wide = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
        console.print(f"{name} ({GROUPS[name]}=...)", style="italic", highlight=False)
        for row in (heads, *rows):  # the last column as long as it is: no cell is broken
            line = "  ".join(cell.ljust(n) for cell, n in zip(row[:-1], wide, strict=False))
            console.print(
                f"{line}  {row[-1]}",
                style="dim" if row == heads else None,
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
        if len(heads) > 2:
            console.print(KEY, style="dim", highlight=False, soft_wrap=True)
        console.print()


def list_choices(group: str) -> list[Choice]:
    """The configurations of a group, each with the first comment line of its file, and strategies
    of other packages.
    """
    found = []
    for path in sorted(files("conf").joinpath(group).iterdir(), key=lambda p: p.name):
        name = path.name.removesuffix(".yaml")
        if path.name.endswith(".yaml") and name not in PARTS:
            text = path.read_text("utf-8")
            comments = [line[1:].strip() for line in text.splitlines() if line.startswith("#")]
            source = next((c for c in comments if c and not c.startswith("@package")), "")
            found.append(
                _describe_strategy(name, source, _strategy_target(text, name))
                if group == "strategy"
                else Choice(name, source)
            )
    if group != "strategy":
        return found
    own = {c.name for c in found}
    return found + [
        _describe_plugin(name, path) for name, path in plugins().items() if name not in own
    ]


def _strategy_target(text: str, name: str) -> str:
    """The class that a strategy's configuration names; an arrangement's sets the stream's keys too."""
    told = yaml.safe_load(text)
    return str(told.get("strategy", told)[name]["_target_"])


def _describe_plugin(name: str, target: str) -> Choice:
    """Another package's strategy, with the first line of its class's docstring; or why it cannot be
    read.
    """
    try:
        said = ast.get_docstring(_class_node(target)[0]) or target
        return _describe_strategy(name, said.splitlines()[0], target)
    except ConfigError as error:
        return Choice(name, str(error), target, dict.fromkeys(FACTS, "?"))


def _describe_strategy(name: str, source: str, target: str) -> Choice:
    """A strategy, with what its class and those it inherits from say."""
    moments: set[str] = set()
    said: dict[str, str] = {}
    for path, node in (*iter_class_nodes(target), (ROOT, _class_node(ROOT)[0])):
        if path != ROOT:
            moments |= {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
        told = (
            n
            for n in node.body
            if isinstance(n, ast.AnnAssign) and isinstance(n.value, ast.Constant)
        )
        said = {
            **{ast.unparse(n.target): str(ast.literal_eval(n.value)) for n in told if n.value},
            **said,
        }
    return Choice(
        name,
        source,
        target,
        {fact: said[fact] for fact in FACTS},
        [m for m in MOMENTS if m in moments],
    )


def iter_class_nodes(target: str) -> Iterator[tuple[str, ast.ClassDef]]:
    """A class's dotted path and code, then those of each class it inherits from, as far as the
    source can be read.

    Raises ConfigError where the class itself cannot be found.
    """
    node, known = _class_node(target)
    yield target, node
    for path in (known.get(ast.unparse(base)) for base in node.bases):
        if path:
            yield from iter_class_nodes(path)


@cache
def _class_node(target: str) -> tuple[ast.ClassDef, dict[str, str]]:
    """A class's code, and the dotted path of each class that its module defines or takes from its
    own or our packages.

    Raises ConfigError where it cannot be found. What is found is read; but for packages around it
    nothing is imported.
    """
    module, _, name = target.rpartition(".")
    try:
        spec = find_spec(module)
        tree = ast.parse(Path(str(spec and spec.origin)).read_text("utf-8"))
    except (ImportError, OSError, ValueError, SyntaxError) as error:
        raise ConfigError(
            f"the strategy {target} cannot be read ({error}); see that its package is installed "
            "whole"
        ) from error
    near = ("continual", "strategies", module.partition(".")[0])
    here = {n.name: n for n in tree.body if isinstance(n, ast.ClassDef)}
    if name not in here:
        raise ConfigError(
            f"the strategy {target} is no class that its module defines; name the module that does"
        )
    imported = {
        a.asname or a.name: f"{n.module}.{a.name}"
        for n in tree.body
        if isinstance(n, ast.ImportFrom)
        for a in n.names
        if n.module and n.module.partition(".")[0] in near
    }
    return here[name], {**imported, **{n: f"{module}.{n}" for n in here}}
