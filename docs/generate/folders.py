"""The folders of the project and what they import from each other: a picture and a table."""

from __future__ import annotations

import ast
import html
import textwrap
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
ORDER_FILE = ROOT / "tests" / "test_architecture.py"
CONFIGURED = ("strategies", "streams")  # named by configuration only
BOX_WIDTH, BOX_HEIGHT, GAP, ROW_GAP, MARGIN = 178, 72, 16, 38, 8
LINE_LENGTH, LINES = 30, 3  # characters of a description's line in a box, and how many lines


@dataclass(frozen=True)
class Box:
    """A folder's place in the picture: the left and upper edge, in SVG units."""

    x: float
    y: float

    @property
    def middle(self) -> float:
        """The horizontal centre."""
        return self.x + BOX_WIDTH / 2


@cache
def order() -> tuple[str, ...]:
    """Return the folders of `continual/`, low to high, as tests/test_architecture.py lists them."""
    for node in ast.parse(ORDER_FILE.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FOLDERS":
            return tuple(ast.literal_eval(node.value))
    raise ValueError(f"{ORDER_FILE}: found no list FOLDERS, expected the order of the folders")


@cache
def imports() -> dict[str, frozenset[str]]:
    """Return the folders that each folder imports from, directly."""
    names = (*order(), *CONFIGURED)
    return {name: frozenset(_imported_by(name) & set(names) - {name}) for name in names}


def _imported_by(folder: str) -> set[str]:
    """Return the folders named by the imports in a folder's files; all of them are absolute."""
    base = ROOT if folder in CONFIGURED else ROOT / "continual"
    files = [base / f"{folder}.py"] if (base / f"{folder}.py").is_file() else []
    found = set()
    for path in [*files, *(base / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom):
                modules = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            else:
                continue
            found |= {_folder(module) for module in modules}
    return found


def _folder(module: str) -> str:
    """Return the folder of a module of this project; empty for a module of another package."""
    package, _, rest = module.partition(".")
    if package == "continual":
        return rest.partition(".")[0]
    return package if package in CONFIGURED else ""


@cache
def reachable(folder: str) -> frozenset[str]:
    """Return all folders that a folder imports from, directly or through others."""
    direct = imports()[folder]
    return direct.union(*(reachable(other) for other in direct))


@cache
def level(folder: str) -> int:
    """Return the length of the longest chain of imports below a folder; 0 where it imports none."""
    return 1 + max((level(other) for other in imports()[folder]), default=-1)


def arrows(folder: str) -> list[str]:
    """Return the imports that no chain through another import implies, in the order of folders."""
    direct = imports()[folder]
    implied = frozenset().union(*(reachable(other) for other in direct))
    return [name for name in imports() if name in direct - implied]


def description(folder: str) -> str:
    """Return the first sentence of a folder's docstring, without the folder's own name before it."""
    base = ROOT if folder in CONFIGURED else ROOT / "continual"
    path = base / folder / "__init__.py"
    tree = ast.parse((path if path.is_file() else base / f"{folder}.py").read_text("utf-8"))
    text = (ast.get_docstring(tree) or "").partition("\n\n")[0]
    text = " ".join(text.split()).removesuffix(".")
    head, _, rest = text.partition(": ")
    text = rest if rest and head.lower() == folder else text
    return text[:1].upper() + text[1:]


def table() -> str:
    """Return a Markdown table of the folders in the order of their imports, low to high."""
    lines = ["| folder | holds | imports from |", "|---|---|---|"]
    for folder in imports():
        place = f"`{folder}/`" if folder in CONFIGURED else f"`continual/{folder}`"
        others = ", ".join(name for name in imports() if name in imports()[folder])
        lines.append(f"| {place} | {description(folder)} | {others or 'nothing of the project'} |")
    return "\n".join(lines)


def layout() -> dict[str, Box]:
    """Place the folders: a row for each level, the lowest level at the bottom.

    Within a row folders stand near those that they import from, to keep arrows short.
    """
    levels = sorted({level(folder) for folder in imports()})
    rows = [[f for f in imports() if level(f) == number] for number in levels]
    width = max(map(len, rows)) * (BOX_WIDTH + GAP) - GAP
    boxes: dict[str, Box] = {}
    for number, row in enumerate(rows):
        row.sort(key=lambda folder: _mean([boxes[other].middle for other in arrows(folder)]))
        start = MARGIN + (width - len(row) * (BOX_WIDTH + GAP) + GAP) / 2
        y = MARGIN + (len(rows) - 1 - number) * (BOX_HEIGHT + ROW_GAP)
        for place, folder in enumerate(row):
            boxes[folder] = Box(start + place * (BOX_WIDTH + GAP), y)
    return boxes


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def svg() -> str:
    """Return the picture as SVG; colours are those of the page, by its style sheet."""
    boxes = layout()
    width = max(box.x for box in boxes.values()) + BOX_WIDTH + MARGIN
    height = max(box.y for box in boxes.values()) + BOX_HEIGHT + MARGIN
    parts = [
        f'<svg class="folders" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        'aria-label="The folders and their imports" xmlns="http://www.w3.org/2000/svg">',
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z"/></marker></defs>',
    ]
    for folder, box in boxes.items():
        parts += [_arrow(box, boxes[other], list(boxes.values())) for other in arrows(folder)]
    parts += [_box(folder, box) for folder, box in boxes.items()]
    return "".join([*parts, "</svg>"])


def _arrow(upper: Box, lower: Box, boxes: list[Box]) -> str:
    """Draw an arrow; where it crosses a row of boxes it goes straight through a gap between them."""
    # Arrows leave and arrive a little off the middle, towards each other, so that they spread.
    shift = max(-60.0, min(60.0, (lower.middle - upper.middle) / 6))
    x = upper.middle + shift
    y = upper.y + BOX_HEIGHT
    path = f"M{x:.0f} {y:.0f}"
    for row in sorted({box.y for box in boxes if upper.y < box.y < lower.y}):
        gap = _nearest_gap(x, [box for box in boxes if box.y == row])
        path += f" {_bend(x, y, gap, row)} V{row + BOX_HEIGHT:.0f}"
        x = gap
        y = row + BOX_HEIGHT
    path += f" {_bend(x, y, lower.middle - shift, lower.y - 1)}"
    return f'<path class="arrow" d="{path}" marker-end="url(#arrow)"/>'


def _bend(x0: float, y0: float, x1: float, y1: float) -> str:
    middle = (y0 + y1) / 2
    return f"C{x0:.0f} {middle:.0f} {x1:.0f} {middle:.0f} {x1:.0f} {y1:.0f}"


def _nearest_gap(x: float, row: list[Box]) -> float:
    """Return the place beside a box of a row that is nearest to `x`."""
    sides = [box.x - GAP / 2 for box in row] + [box.x + BOX_WIDTH + GAP / 2 for box in row]
    return min(sides, key=lambda side: abs(side - x))


def _box(folder: str, box: Box) -> str:
    kind = "box configured" if folder in CONFIGURED else "box"
    lines = textwrap.wrap(description(folder), LINE_LENGTH, max_lines=LINES, placeholder=" …")
    first = box.y + 19 + 7 * (LINES - len(lines))  # few lines stand in the middle of the box
    texts = [f'<text class="name" x="{box.middle:.0f}" y="{first:.0f}">{folder}</text>']
    for number, line in enumerate(lines):
        y = first + 16 + 14 * number
        texts.append(f'<text x="{box.middle:.0f}" y="{y:.0f}">{html.escape(line)}</text>')
    return (
        f'<g class="{kind}"><rect x="{box.x:.0f}" y="{box.y:.0f}" width="{BOX_WIDTH}" '
        f'height="{BOX_HEIGHT}" rx="6"/>{"".join(texts)}</g>'
    )
