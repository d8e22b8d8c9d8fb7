"""How long a page of many runs takes to write, and to open in a browser.

`python -m benchmarks.page [--runs 100] [--tasks 15] [--out PATH]`. The runs have matrices of
invented scores, as twenty strategies over five seeds, and as a strategy each. Chromium opens the
page headless, in a window of 1200 x 900, and the clock says when it has loaded, when the first
chart stands, and when all do, those too that nobody has scrolled to.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import time
from pathlib import Path

from benchmarks.common import machine
from continual.reports import write
from continual.results.matrix import BASE_STAGE, Matrix

RESULT = Path(__file__).parent / "results" / "page-cpu.md"


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.page",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--tasks", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULT, metavar="PATH")
    asked = parser.parse_args()
    lines = [
        "| runs | strategies | MB | s to write | s to load | s to the first chart | s to all "
        "charts |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for strategies in (asked.runs // 5, asked.runs):
        with tempfile.TemporaryDirectory() as folder:
            seconds, page = written(Path(folder), asked.runs, strategies, asked.tasks)
            figures = [
                f"{page.stat().st_size / 1e6:.2f}",
                *(f"{s:.2f}" for s in (seconds, *opened(page))),
            ]
        lines.append(
            "| " + " | ".join([f"{asked.runs} x {asked.tasks}", str(strategies), *figures]) + " |"
        )
    asked.out.write_text(
        f"# page\n\n{(__doc__ or '').strip()}\n\nOn {machine()}.\n\n" + "\n".join(lines) + "\n"
    )
    print(asked.out.read_text())


def written(root: Path, runs: int, strategies: int, tasks: int) -> tuple[float, Path]:
    """The seconds that the page of a comparison takes, each run's own page aside, and where it is."""
    folders = [root / f"{i:03d}" for i in range(runs)]
    for i, folder in enumerate(folders):
        folder.mkdir()
        matrix(f"strategy {i % strategies:03d}", i // strategies, tasks).save(
            folder / "matrix.json"
        )
        (folder / write.PAGE_FILE).touch()
    began = time.perf_counter()
    write.write_comparison(folders, root)
    return time.perf_counter() - began, root / write.PAGE_FILE


def matrix(strategy: str, seed: int, count: int) -> Matrix:
    """Scores that rise at a task's own stage and fall after it."""
    rng = random.Random(f"{strategy}/{seed}")
    tasks = tuple(f"task {i:02d}" for i in range(count))
    rows = [
        [
            rng.uniform(0, 0.1) if i <= j else 0.97 * rng.uniform(0.7, 1) ** (i - j - 1)
            for j in range(count)
        ]
        for i in range(count + 1)
    ]
    return Matrix(
        "invented",
        "given",
        strategy,
        seed,
        tasks,
        dict.fromkeys(tasks, "exact_match"),
        (BASE_STAGE, *tasks),
        tuple(map(tuple, rows)),
        (100,) * count,
        {"seconds": rng.uniform(20, 200), "peak_bytes": 1e9},
    )


def opened(page: Path) -> list[float]:
    """The seconds until the page has loaded, until its first chart stands, and until all do."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome"),
            args=["--no-sandbox"],
        )
        tab = browser.new_page(viewport={"width": 1200, "height": 900})
        tab.set_default_timeout(120_000)
        began, told = time.perf_counter(), []
        tab.goto(page.as_uri(), wait_until="load")
        told.append(time.perf_counter() - began)
        for there in ("figure.chart svg", "body[data-drawn]"):
            tab.locator(there).first.wait_for()
            told.append(time.perf_counter() - began)
        browser.close()
    return told


if __name__ == "__main__":
    main()
