"""The house's own rules: which module may import which, how long things may be, and what costs time at the door."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Low to high. A module imports only from layers below its own; those of one layer know nothing of one another.
LAYERS = (
    ("errors", "files", "wording"),
    ("reading", "parallel", "constraints", "terminal"),
    ("interrupt", "cells", "dealing", "claim", "sharding", "outside", "gate", "demands"),
    ("data", "fidelity"),
    ("attention", "rows", "virtual", "measures"),
    ("flash", "flex", "cache"),
    ("flat",),
    ("packing", "matrix", "template", "instructions"),
    ("model", "tokens", "variants"),
    ("weights",),
    ("loss", "lora"),
    ("memory", "importance", "answer", "precision", "interop"),
    ("strategy", "values"),
    ("progress",),
    ("stage", "score", "checkpoint", "duplicates"),
    ("lengths", "toy", "early", "judge"),
    ("rules",),
    ("testing",),
    ("reports.curves", "reports.figures", "reports.charts", "reports.vega"),
    ("reports.runs", "reports.reach"),
    ("reports.audits", "reports.sections", "reports.probed", "reports.measures", "reports.data", "flips",
     "uncertainty", "published"),
    ("reports.beside",),
    ("reports.pages",),
    ("reports.adaptations", "reports.versus"),
    ("reports.plots",),
    ("reports.tables",),
    ("report", "events", "track", "watch"),
    ("probes.base",),
    ("build", "scratch", "rehearse"),
    ("audit", "probes.record", "probes.changes"),
    ("probes.general", "probes.shots", "probes.transfer", "probes.turns", "probes.wordings"),
    ("bench",),
    ("run",),
    ("adapt", "compare", "catalogue", "plan", "verify"),
    ("reopen",),
    ("card", "chat"),
    ("export",),
    ("overrides",),
    ("cli",),
    ("__main__",),
)
LAYER = {name: height for height, names in enumerate(LAYERS) for name in names}

# What a package outside of the engine may import of the three.
ALLOWED = {
    "strategies": {f"continual.{m}" for m in LAYER if LAYER[m] <= LAYER["strategy"]}
    | {f"strategies.{base}" for base in ("replay", "anchor", "adapters", "incremental", "maml")},
    "streams": {"streams", *(f"continual.{m}" for m in ("constraints", "data", "errors", "reading", "template"))},
}
OURS = ("continual", "strategies", "streams")
EXTRAS = {"avalanche", "learn2learn"}
LINES, STATEMENT_LINES = 300, 45


def modules(*packages: str) -> list[Path]:
    return sorted(p for package in packages or OURS for p in (ROOT / package).rglob("*.py"))


def dotted(path: Path) -> str:
    """A file's module, without its package: reports.pages."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts[1:])


def typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports(path: Path) -> set[str]:
    """The modules that a file imports at run time, at its head or inside its functions: package.module."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text("utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} imports relatively; name the whole module"
            of = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {f if module_exists(f) else node.module or "" for f in of}
        waiting += node.orelse if typing_only(node) else ast.iter_child_nodes(node)
    return found


def module_exists(name: str) -> bool:
    return name.partition(".")[0] in OURS and (ROOT / (name.replace(".", "/") + ".py")).exists()


def internal(path: Path) -> set[str]:
    return {i for i in imports(path) if i.partition(".")[0] in OURS and i not in OURS}


def test_every_module_of_the_engine_has_its_layer():
    assert {dotted(p) for p in modules("continual") if p.stem != "__init__"} == set(LAYER)


@pytest.mark.parametrize("path", [p for p in modules("continual") if p.stem != "__init__"], ids=dotted)
def test_arrows_inside_the_engine_point_down(path):
    wrong = [i for i in internal(path) if i.startswith("continual.")
             and LAYER[i.removeprefix("continual.")] >= LAYER[dotted(path)]]
    assert not wrong, f"continual/{path.name} imports {', '.join(sorted(wrong))}, not below it"


@pytest.mark.parametrize("path", modules("continual"), ids=dotted)
def test_the_engine_knows_no_strategy_and_no_stream(path):
    assert not {i for i in internal(path) if not i.startswith("continual.")}


@pytest.mark.parametrize("path", modules("strategies", "streams"), ids=lambda p: f"{p.parent.name}.{p.stem}")
def test_strategies_and_streams_see_only_the_parts_of_the_engine_they_are_made_of(path):
    package = path.parent.name
    wrong = {i for i in internal(path) if i not in ALLOWED[package] and i.partition(".")[0] not in ALLOWED[package]}
    assert not wrong


@pytest.mark.parametrize("path", modules(), ids=lambda p: f"{p.parent.name}.{p.stem}")
def test_the_extras_are_imported_nowhere(path):
    assert not EXTRAS & {i.partition(".")[0] for i in imports(path)}


def names(path: Path) -> set[str]:
    """Every class and configuration that a strategy or stream module or file defines."""
    return {n.name for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.ClassDef)}


@pytest.mark.parametrize("path", modules("continual"), ids=dotted)
def test_the_engine_asks_no_strategy_and_no_stream_who_it_is(path):
    classes = {n for p in modules("strategies", "streams") for n in names(p)} | {"Strategy"}
    chosen = {p.stem for group in ("strategy", "stream") for p in (ROOT / "conf" / group).glob("*.yaml")}
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            kinds = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
            assert not kinds & classes, f"{path.name}:{node.lineno} asks for {kinds & classes}"
        if isinstance(node, ast.Compare):
            told = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
            assert not told & chosen, f"{path.name}:{node.lineno} compares with {told & chosen}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: f"{p.parent.name}.{p.stem}")
def test_files_and_functions_are_short(path):
    text = path.read_text("utf-8")
    assert len(text.splitlines()) <= LINES
    long = [f"{n.name} ({n.end_lineno - n.lineno + 1} lines)" for n in ast.walk(ast.parse(text))
            if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) and n.end_lineno - n.lineno >= STATEMENT_LINES]
    assert not long


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["list", "strategies"]], ids=" ".join)
def test_help_loads_nothing_heavy(arguments):
    code = ("import sys\nfrom continual.cli import main\n"
            f"sys.argv = ['continual', *{arguments}]\n"
            "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
            "heavy = {'torch', 'transformers', 'datasets', 'matplotlib', 'peft', 'pandas', 'pyarrow',\n"
            "         'avalanche', 'learn2learn'}\n"
            "print('loaded:', sorted(heavy & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded: []"
