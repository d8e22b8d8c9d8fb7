"""The folder graph, each folder's public surface, and what `--help` may load."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("continual", "strategies", "streams")

# The folders of `continual/`, low to high: a folder imports only from folders before it in this
# list.
FOLDERS = (
    "errors",
    "io",
    "distributed",
    "config",
    "data",
    "packing",
    "results",
    "tracking",
    "models",
    "strategy",
    "interop",
    "evaluation",
    "training",
    "auditing",
    "reports",
    "runs",
    "testing",
    "inference",
    "cli",
)
RANK = {folder: rank for rank, folder in enumerate(FOLDERS)}

# The folders of the engine that strategies and streams are built from.
ALLOWED = {
    "strategies": {"errors", "distributed", "data", "packing", "models", "strategy", "interop"},
    "streams": {"errors", "io", "data", "evaluation"},
}
OPTIONAL_PACKAGES = {"avalanche", "learn2learn"}


def modules(*packages: str) -> list[Path]:
    return sorted(
        path for package in packages or PACKAGES for path in (ROOT / package).rglob("*.py")
    )


def dotted(path: Path) -> str:
    """Return a file's module, such as continual.packing.batch; a folder's `__init__` is the folder."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {dotted(path): path for path in modules()}


def folder_of(module: str) -> str:
    """Return the first part behind `continual.`, or the package's own name."""
    package, _, rest = module.partition(".")
    return rest.partition(".")[0] if package == "continual" else package


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports(path: Path, typing: bool = False) -> set[tuple[str, str]]:
    """Return the (module, name) pairs that a file imports anywhere in it; the name is empty for
    whole modules.

    Imports for type annotations only (under TYPE_CHECKING) are left out unless `typing` is set.
    """
    pairs: set[tuple[str, str]] = set()
    queue: list[ast.AST] = [ast.parse(path.read_text("utf-8"))]
    while queue:
        node = queue.pop()
        if isinstance(node, ast.Import):
            pairs |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"{path}:{node.lineno} imports relatively; name the whole module"
            )
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                pairs.add((whole, "") if whole in MODULES else (str(node.module), alias.name))
        queue += (
            node.orelse if is_type_checking(node) and not typing else ast.iter_child_nodes(node)
        )
    return pairs


def internal(path: Path, typing: bool = False) -> set[tuple[str, str]]:
    return {pair for pair in imports(path, typing) if pair[0].partition(".")[0] in PACKAGES}


def surface(folder: str) -> dict[str, set[str]]:
    """Return what a folder's `__init__` docstring lets other folders import: module -> names.

    The docstring ends in a list with a line for each module: `- batch: Batch, Layout`.
    """
    names: dict[str, set[str]] = {}
    for init in (ROOT / "continual" / folder).rglob("__init__.py"):
        text = ast.get_docstring(ast.parse(init.read_text("utf-8"))) or ""
        for module, listed in re.findall(r"^- ([\w.]+): ((?:[\w, ]|\n  )+)", text, re.MULTILINE):
            names[f"{dotted(init)}.{module}"] = set(re.findall(r"\w+", listed))
    return names


def test_every_folder_of_the_engine_has_its_place_in_the_order():
    folders = {
        path.stem
        for path in (ROOT / "continual").glob("[!_]*")
        if path.is_dir() or path.suffix == ".py"
    }
    assert folders == set(FOLDERS)


@pytest.mark.parametrize("path", modules("continual"), ids=dotted)
def test_a_folder_imports_only_from_folders_before_it(path):
    folder = folder_of(dotted(path))
    wrong = [
        module
        for module, _ in internal(path, typing=True)
        if module != "continual"
        and folder_of(module) != folder
        and RANK.get(folder_of(module), len(FOLDERS)) > RANK.get(folder, len(FOLDERS))
    ]
    assert not wrong


def test_no_modules_import_each_other_in_a_circle():
    TopologicalSorter(
        {dotted(path): {module for module, _ in internal(path)} for path in modules()}
    ).prepare()


@pytest.mark.parametrize("folder", FOLDERS[1:])
def test_other_folders_import_only_what_a_folder_s_docstring_names(folder):
    public = surface(folder)
    for path in modules():
        if folder_of(dotted(path)) == folder or path == ROOT / "continual" / "__init__.py":
            continue
        for module, name in internal(path, typing=True):
            if folder_of(module) == folder and name:
                where = f"{path.relative_to(ROOT)} imports {name} from {module}"
                assert name in public.get(module, set()), (
                    f"{where}; list it in the __init__ of continual/{folder}"
                )
            elif folder_of(module) == folder and module in MODULES:
                assert module in public, (
                    f"{path.relative_to(ROOT)} imports {module}, which its __init__ does not list"
                )


@pytest.mark.parametrize("folder", FOLDERS[1:])
def test_a_folder_s_docstring_names_only_what_there_is(folder):
    for module, names in surface(folder).items():
        tree = ast.parse(MODULES[module].read_text("utf-8"))
        defined = {name for node in tree.body for name in definitions(node)}
        assert names <= defined, module


def definitions(node: ast.stmt) -> list[str]:
    """Return the names that a top-level statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
    return [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]


@pytest.mark.parametrize("path", modules("continual"), ids=dotted)
def test_the_engine_knows_no_strategy_and_no_stream(path):
    assert not [
        module for module, _ in internal(path, typing=True) if not module.startswith("continual")
    ]


@pytest.mark.parametrize("path", modules("strategies", "streams"), ids=dotted)
def test_strategies_and_streams_are_built_from_these_folders_only(path):
    package = dotted(path).partition(".")[0]
    assert not [
        module
        for module, _ in internal(path, typing=True)
        if folder_of(module) not in {*ALLOWED[package], package}
    ]


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_the_optional_packages_are_imported_nowhere(path):
    assert not OPTIONAL_PACKAGES & {module.partition(".")[0] for module, _ in imports(path)}


def classes(path: Path) -> set[str]:
    return {
        n.name for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.ClassDef)
    }


@pytest.mark.parametrize("path", modules("continual"), ids=dotted)
def test_the_engine_asks_no_strategy_and_no_stream_who_it_is(path):
    kinds = {name for p in modules("strategies", "streams") for name in classes(p)} | {"Strategy"}
    configured = {
        p.stem for group in ("strategy", "stream") for p in (ROOT / "conf" / group).glob("*.yaml")
    }
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            checked = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
            assert not checked & kinds, f"{path.name}:{node.lineno} asks for {checked & kinds}"
        if isinstance(node, ast.Compare):
            texts = {
                n.value
                for n in ast.walk(node)
                if isinstance(n, ast.Constant) and isinstance(n.value, str)
            }
            assert not texts & configured, (
                f"{path.name}:{node.lineno} compares with {texts & configured}"
            )


def test_no_test_file_imports_from_another_test_file():
    tests = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    for path in (ROOT / "tests").rglob("*.py"):
        imported = {part for module, _ in imports(path) for part in module.split(".")}
        assert not imported & tests, path


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["list", "strategies"]], ids=" ".join
)
def test_help_loads_nothing_heavy(arguments):
    code = (
        "import sys\nfrom continual.cli.main import main\n"
        f"sys.argv = ['continual', *{arguments}]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib', 'peft', 'pandas', 'pyarrow',\n"
        "         'avalanche', 'learn2learn'}\n"
        "print('loaded:', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded: []"
