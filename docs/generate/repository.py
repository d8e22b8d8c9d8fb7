"""Pages from files outside `docs/`: benchmarks, the notebook, changelog, contributing."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
NOTEBOOK = ROOT / "examples" / "compare.ipynb"
# A link from a page of docs/ to one of these files -> the page of the site, seen from docs/.
LINKS = (
    (re.compile(r"\]\(((?:\.\./)*)\.\./benchmarks/results/([\w-]+\.md)"), r"](\1benchmarks/\2"),
    (re.compile(r"\]\(((?:\.\./)*)\.\./examples/compare\.ipynb"), r"](\1examples/compare.md"),
)


def pages() -> dict[str, str]:
    """Return the Markdown pages by their path in the site."""
    found = {f"benchmarks/{path.name}": path.read_text("utf-8") for path in RESULTS.glob("*.md")}
    return {
        **dict(sorted(found.items())),
        "examples/compare.md": notebook(),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text("utf-8"),
        "contributing.md": _inside_docs((ROOT / "CONTRIBUTING.md").read_text("utf-8")),
    }


def _inside_docs(markdown: str) -> str:
    """Return a page of the repository's root as one of `docs/`: its links lose that folder."""
    return markdown.replace("](docs/", "](")


def notebook() -> str:
    """Return the notebook as a page: its texts, and its code in blocks."""
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    parts = []
    for cell in cells:
        text = "".join(cell["source"])
        parts.append(f"```python\n{text}\n```" if cell["cell_type"] == "code" else text)
    return "\n\n".join(parts).replace("](../docs/", "](../") + "\n"


def rewrite_links(markdown: str) -> str:
    """Point links to files outside `docs/` to the pages of the site that show them."""
    for pattern, replacement in LINKS:
        markdown = pattern.sub(replacement, markdown)
    return markdown
