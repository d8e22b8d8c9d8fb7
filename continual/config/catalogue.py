"""List the strategies, streams, models and probes that can be chosen.

Names and sources come from the configuration groups. What a strategy overrides and stores is read
from its source code with `ast` instead of from the imported class: importing any strategy imports
torch, and `continual list` would take seconds. For this the bases of a class are followed by hand;
`tests/config/test_configs.py` compares the result with the imported classes.
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
PARTS = {"adapters"}  # configurations that others include, not choices
FACTS = ("stores", "costs")  # class attributes of strategies that are shown
MOMENTS = ("begin", "loss", "backward", "end", "route", "dispatch")
ROOT = "continual.strategy.interface.Strategy"
KEY = (
    "P trainable weights, E remembered examples, S response tokens of one, T tasks, V vocabulary; "
    "numbers are bytes"
)
JSON_OPTIONS = {"json=true": True, "json=false": False}


@dataclass(frozen=True)
class Choice:
    """A name to choose with its source; for a strategy also its class, facts and moments.

    `target` is the dotted path of the class, `moments` the methods of the interface it overrides.
    """

    name: str
    source: str
    target: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)  # the texts of FACTS
    moments: Sequence[str] = ()

    def to_dict(self) -> dict[str, object]:
        """Return all fields as JSON values."""
        document: dict[str, object] = {"name": self.name, "source": self.source}
        if self.facts:
            document |= {"class": self.target, "moments": list(self.moments), **self.facts}
        return document


def print_catalogue(words: Sequence[str], console: Console) -> None:
    """Print the choices of the named groups, by default of all; as JSON with json=true.

    Raises ConfigError for an unknown group.
    """
    names = [w for w in words if w not in JSON_OPTIONS]
    for name in names:
        if name not in GROUPS:
            raise ConfigError(unknown("list", name, [*GROUPS, *JSON_OPTIONS]))
    catalogue = {name: list_choices(GROUPS[name]) for name in names or GROUPS}
    if any(JSON_OPTIONS.get(word) for word in words):
        document = {name: [c.to_dict() for c in choices] for name, choices in catalogue.items()}
        print(json.dumps(document, indent=1, ensure_ascii=False))
        return
    for name, choices in catalogue.items():
        console.print(f"{name} ({GROUPS[name]}=...)", style="italic", highlight=False)
        _print_table(choices, console)
        console.print()


def _print_table(choices: Sequence[Choice], console: Console) -> None:
    """Print choices as a table whose last column is as long as its text: no cell is wrapped."""
    header = ["name", "what it is"]
    rows = [[c.name, c.source] for c in choices]
    has_facts = any(c.facts for c in choices)
    if has_facts:
        header[1:1] = ["moments", "stores"]
        for row, choice in zip(rows, choices, strict=True):
            row[1:1] = [", ".join(choice.moments) or "none", choice.facts["stores"]]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for number, row in enumerate((header, *rows)):
        cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False)]
        console.print(
            "  ".join([*cells, row[-1]]),
            style="dim" if number == 0 else None,
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    if has_facts:
        console.print(KEY, style="dim", highlight=False, soft_wrap=True)


def list_choices(group: str) -> list[Choice]:
    """List the configurations of a group, and for strategies also those of other packages.

    The source of a configuration is the first comment line of its file.
    """
    choices = []
    for path in sorted(files("conf").joinpath(group).iterdir(), key=lambda p: p.name):
        name = path.name.removesuffix(".yaml")
        if path.name.endswith(".yaml") and name not in PARTS:
            text = path.read_text("utf-8")
            comments = [line[1:].strip() for line in text.splitlines() if line.startswith("#")]
            source = next((c for c in comments if c and not c.startswith("@package")), "")
            if group == "strategy":
                choices.append(_describe_strategy(name, source, _strategy_target(text, name)))
            else:
                choices.append(Choice(name, source))
    if group == "strategy":
        own = {c.name for c in choices}
        choices += [_describe_plugin(n, path) for n, path in plugins().items() if n not in own]
    return choices


def _strategy_target(text: str, name: str) -> str:
    """Return the class that a strategy's configuration names.

    Configurations of arrangements (joint, cumulative) have a `strategy` section beside `stream`.
    """
    config = yaml.safe_load(text)
    return str(config.get("strategy", config)[name]["_target_"])


def _describe_plugin(name: str, target: str) -> Choice:
    """Describe a strategy of another package by its docstring's first line, or by the error."""
    try:
        docstring = ast.get_docstring(_class_node(target)[0]) or target
        return _describe_strategy(name, docstring.splitlines()[0], target)
    except ConfigError as error:
        return Choice(name, str(error), target, dict.fromkeys(FACTS, "?"))


def _describe_strategy(name: str, source: str, target: str) -> Choice:
    """Describe a strategy by the methods and facts of its class and of the classes it inherits."""
    methods: set[str] = set()
    attributes: dict[str, str] = {}
    for path, node in (*iter_class_nodes(target), (ROOT, _class_node(ROOT)[0])):
        if path != ROOT:
            methods |= {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
        for n in node.body:
            if isinstance(n, ast.AnnAssign) and isinstance(n.value, ast.Constant):
                value = str(ast.literal_eval(n.value))
                attributes.setdefault(ast.unparse(n.target), value)  # a subclass comes first
    facts = {fact: attributes[fact] for fact in FACTS}
    return Choice(name, source, target, facts, [m for m in MOMENTS if m in methods])


def iter_class_nodes(target: str) -> Iterator[tuple[str, ast.ClassDef]]:
    """Yield (dotted path, syntax tree) of a class, then of the classes it inherits from.

    Bases whose source is not found are left out; raises ConfigError if `target` itself is not.
    """
    node, known = _class_node(target)
    yield target, node
    for path in (known.get(ast.unparse(base)) for base in node.bases):
        if path:
            yield from iter_class_nodes(path)


@cache
def _class_node(target: str) -> tuple[ast.ClassDef, dict[str, str]]:
    """Return the syntax tree of a class, and the dotted paths of the classes its module knows.

    These are the classes that the module defines, or imports from its own package or from ours.
    Only the packages around the module are imported, not the module. Raises ConfigError if the
    class is not found.
    """
    module, _, name = target.rpartition(".")
    try:
        spec = find_spec(module)
        tree = ast.parse(Path(str(spec and spec.origin)).read_text("utf-8"))
    except (ImportError, OSError, ValueError, SyntaxError) as error:
        raise ConfigError(
            f"the source of strategy {target} cannot be read ({error}); reinstall its package"
        ) from error
    packages = ("continual", "strategies", module.partition(".")[0])
    defined = {n.name: n for n in tree.body if isinstance(n, ast.ClassDef)}
    if name not in defined:
        raise ConfigError(
            f"strategy {target}: {module} does not define a class {name}; name the module that does"
        )
    imported = {
        a.asname or a.name: f"{n.module}.{a.name}"
        for n in tree.body
        if isinstance(n, ast.ImportFrom)
        for a in n.names
        if n.module and n.module.partition(".")[0] in packages
    }
    return defined[name], {**imported, **{n: f"{module}.{n}" for n in defined}}
