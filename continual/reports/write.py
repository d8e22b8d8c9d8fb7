"""Reports from folders on disk: tables in the terminal, one self-contained HTML page, curves.png.

A report is of any set of folders: a run, a comparison (one comparison folder, or several paths),
adaptations, or these together.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from continual.errors import ConfigError
from continual.io.atomic import write_atomically
from continual.results import comparison
from continual.results.curve import Curve
from continual.results.run_folder import Run, find_runs, folder_kind, group_runs
from continual.results.tables import PARQUET_FILE, encode_parquet

if TYPE_CHECKING:
    from rich.console import Console

    from continual.reports.sections import Page, Section

PAGE_FILE = "report.html"
CURVES_FILE = "curves.png"


def print_tables(console: Console, *folders: Path) -> None:
    """Show in the terminal a run, a comparison (one folder of runs, or several folders), and
    adaptations.

    Raises MissingError for a folder that is none of these, DataError for a broken file in it.
    """
    from continual.reports import reach
    from continual.reports import tables as show

    matrices, curves = _split_folders(folders)
    if [folder_kind(folder) for folder in matrices] == ["run"]:
        show.print_run(console, Run.load(matrices[0]))
    elif matrices:
        runs, waiting = find_runs(matrices)
        show.print_comparison(console, group_runs(runs), waiting, _unfinished_texts(matrices))
    for curve in curves:
        show.print_curve(console, curve)
    reach.print_reach(console, curves)


def write_report(*folders: Path, out: Path | None = None) -> list[Path]:
    """Write report.html and curves.png, for a comparison comparison.json and .parquet too; returns
    what was written.

    They go to `out`, by default the folder itself; several folders need an `out`. Raises as
    `tables` does.
    """
    if not folders or (len(folders) > 1 and out is None):
        raise ConfigError("a report over several folders needs a place of its own; say out=DIR")
    target = out or folders[0]
    matrices, curves = _split_folders(folders)
    if not matrices:
        return _write_adaptations(curves, target)
    if [folder_kind(folder) for folder in matrices] == ["run"]:
        return _write_run(Run.load(matrices[0]), target, curves)
    return write_comparison(matrices, target, curves)


def write_comparison(
    folders: Sequence[Path], out: Path, curves: Sequence[Curve] = ()
) -> list[Path]:
    """Set side by side the runs of these run and comparison folders; their own missing or stale
    pages are written too.

    Adaptations stand below them. Raises MissingError, or DataError where a folder is an adaptation.
    """
    from continual.reports import plots
    from continual.reports.versus import build_comparison_page, comparison_to_dict

    runs, waiting = find_runs(folders)
    for run in runs:
        page, matrix = run.path / PAGE_FILE, run.path / "matrix.json"
        if not page.is_file() or page.stat().st_mtime < matrix.stat().st_mtime:
            _write_run(run, run.path)
    groups = group_runs(runs)
    told = json.dumps(comparison_to_dict(runs, groups, out), indent=1, allow_nan=False) + "\n"
    shown = build_comparison_page(runs, groups, waiting, out, _unfinished_texts(folders))
    shown.sections = [*shown.sections, *_adaptation_sections(curves)]
    return [
        write_atomically(out / "comparison.json", told.encode()),
        write_atomically(out / PARQUET_FILE, encode_parquet(groups, out)),
        write_atomically(out / PAGE_FILE, render_page(shown)),
        write_atomically(out / CURVES_FILE, plots.plot_comparison(groups)),
    ]


def _split_folders(folders: Sequence[Path]) -> tuple[list[Path], list[Curve]]:
    """Folders with matrices, and the curves of those that are adaptations."""
    adapted = [folder for folder in folders if folder_kind(folder) == "adapt"]
    return [folder for folder in folders if folder not in adapted], [
        Curve.load(folder) for folder in adapted
    ]


def _unfinished_texts(folders: Sequence[Path]) -> list[str]:
    """What is left of the comparisons among these folders, and the commands that finish it."""
    return [told for folder in folders for told in comparison.describe_unfinished(folder)]


def _write_run(run: Run, out: Path, curves: Sequence[Curve] = ()) -> list[Path]:
    from continual.reports import plots
    from continual.reports.pages import build_run_page

    shown = build_run_page(run)
    shown.sections = [*shown.sections, *_adaptation_sections(curves)]
    return [
        write_atomically(out / PAGE_FILE, render_page(shown)),
        write_atomically(out / CURVES_FILE, plots.plot_run(run.matrix)),
    ]


def _write_adaptations(curves: Sequence[Curve], out: Path) -> list[Path]:
    from continual.reports import plots
    from continual.reports.adaptations import build_adaptation_page

    return [
        write_atomically(out / PAGE_FILE, render_page(build_adaptation_page(curves))),
        write_atomically(out / CURVES_FILE, plots.plot_adaptations(curves)),
    ]


def _adaptation_sections(curves: Sequence[Curve]) -> Sequence[Section | None]:
    from continual.reports.adaptations import adaptation_sections

    return adaptation_sections(curves) if curves else ()


def render_page(page: Page) -> bytes:
    """The page, all in one file; all text is escaped, and only the two scripts of ours may run,
    known by their sums.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    from continual.reports import vega

    folder = Path(__file__).parent / "templates"
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    style, *parts = (
        (folder / name).read_text("utf-8") for name in ("style.css", "page.js", "charts.js")
    )
    script = "".join(parts)
    library, known = vega.load_vega_script()
    ours = {
        "policy": Markup(f"'sha256-{known}' 'sha256-{vega.csp_digest(script.encode())}'"),
        "vega": library,
        "script": Markup(script),
        "style": Markup(style),
    }
    return (
        environment.get_template("page.html.j2").render({**page.template_values(), **ours}).encode()
    )
