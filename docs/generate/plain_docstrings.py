"""An extension of mkdocstrings: docstrings are plain text with lists, code blocks and backticks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import griffe

sys.path.insert(0, str(Path(__file__).parents[2]))

from docs.generate.keys import escape

CODE_INDENT = "    "


class PlainDocstrings(griffe.Extension):
    """Escape what Markdown would read as markup, such as the brackets of `R[i][j]`."""

    def on_object(self, *, obj: griffe.Object, **context: Any) -> None:
        """Escape the docstring of a module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = escape_docstring(obj.docstring.value)


def escape_docstring(text: str) -> str:
    """Return a docstring as Markdown; lines indented by four spaces stay code."""
    lines = text.splitlines()
    return "\n".join(line if line.startswith(CODE_INDENT) else escape(line) for line in lines)
