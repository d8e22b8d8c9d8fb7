"""The pages of the API: for each folder its modules, from their docstrings."""

from __future__ import annotations

import ast

from docs.generate import folders
from docs.generate.keys import escape

ROOT = folders.ROOT


def pages() -> dict[str, str]:
    """Return the Markdown pages by their path below `reference/api/`, in the order of imports."""
    return {f"{name}.md": page(name) for name in folders.imports()}


def page(folder: str) -> str:
    """Return the page of a folder: its docstring, then each of its modules."""
    package = folder if folder in folders.CONFIGURED else f"continual.{folder}"
    base = ROOT.joinpath(*package.split("."))
    parts = [f"# {package}"]
    if not base.is_dir():
        return "\n\n".join([*parts, _module(package)]) + "\n"
    text = ast.get_docstring(ast.parse((base / "__init__.py").read_text("utf-8"))) or ""
    parts.append("\n".join(escape(line) for line in text.splitlines()))
    for path in sorted(base.rglob("*.py")):
        if path.name != "__init__.py":
            parts.append(_module(".".join(path.relative_to(ROOT).with_suffix("").parts)))
    return "\n\n".join(parts) + "\n"


def _module(name: str) -> str:
    return f"::: {name}"
