"""The hook of MkDocs that adds the generated pages; mkdocs.yml names it.

Nothing that is generated here is kept in the repository, so no page can be out of date.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # so that `docs`, `continual` and the others are found

from mkdocs.structure.files import File, Files  # noqa: E402

from docs.generate import api, commands, folders, keys, repository  # noqa: E402

PICTURE = "<!-- picture of the folders -->"
TABLE = "<!-- table of the folders -->"
WIDE_PAGES = (
    "architecture.md",
    "benchmarks/",
    "leaderboard.md",
    "reference/commands.md",
    "strategies.md",
)


def generated_pages() -> dict[str, str]:
    """Return all generated pages by their path in the site."""
    found = {"reference/commands.md": commands.page()}
    found |= {f"reference/keys/{name}": text for name, text in keys.pages().items()}
    found |= {f"reference/api/{name}": text for name, text in api.pages().items()}
    return {**found, **repository.pages()}


def on_config(config: Any) -> Any:
    """Replace each folder that the navigation names, such as `reference/api/`, by its pages."""
    names = list(generated_pages())
    config.nav = _expanded(config.nav, names)
    config.watch += [str(ROOT / name) for name in ("conf", "continual", "benchmarks/results")]
    return config


def _expanded(entry: Any, names: list[str]) -> Any:
    if isinstance(entry, dict):
        return {title: _expanded(part, names) for title, part in entry.items()}
    if isinstance(entry, str):
        return [name for name in names if name.startswith(entry)] if entry[-1] == "/" else entry
    expanded = []
    for part in entry:
        pages = _expanded(part, names)
        expanded += pages if isinstance(pages, list) else [pages]
    return expanded


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    for name, text in generated_pages().items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **context: Any) -> str:
    """Insert the picture and the table of the folders; point links to pages of the site.

    Pages with wide tables have no table of contents beside them.
    """
    if page.file.src_uri.startswith(WIDE_PAGES):
        page.meta["hide"] = ["toc"]
    if PICTURE in markdown:
        markdown = markdown.replace(PICTURE, folders.svg())
    if TABLE in markdown:
        markdown = markdown.replace(TABLE, folders.table())
    return repository.rewrite_links(markdown)
