"""Load matrices published by others: a matrix.json, with or without schema, or a CSV of scores.

The first line of the CSV is `stage` and the tasks. Each further line is one stage, named after the
task that was learned in it, with one cell per task, empty if not measured. `base` may be the first
stage (before training), and a line `counts` may hold the number of test examples of each task:

    stage,dbpedia,amazon
    dbpedia,0.97,
    amazon,0.89,0.55
    counts,7600,7600

Scores are in [0, 1], or in percent if the first cell is `stage (percent)` or every nonzero score is
above 1. The file name gives the strategy, and `NAME_seed3.csv` the seed too.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from continual.errors import DataError, MissingError, brief, gathered
from continual.io import untrusted
from continual.results.matrix import Matrix, Score
from continual.results.run_folder import Run

COUNTS_ROW = "counts"
PERCENT_HEAD = "stage (percent)"
FIRST_CELLS = ("stage", "", PERCENT_HEAD)
SEED_SUFFIX = re.compile(r"(.+?)[-_]seed[-_]?(\d{1,9})")


@dataclass(frozen=True)
class PublishedMatrix:
    """One matrix as a run, with the summaries stated in its file.

    `is_percent` says that the file gives scores in percent.
    """

    run: Run
    stated_summary: Mapping[str, Any]
    is_percent: bool = False


def load_published(paths: Sequence[Path]) -> list[PublishedMatrix]:
    """Load the matrices of files and folders, each once.

    Raises MissingError, or DataError with the problems of all files.
    """
    matrices: list[PublishedMatrix] = []
    problems: list[str] = []
    for path in dict.fromkeys(file for source in paths for file in _find_files(source)):
        try:
            matrices.append(_load_csv(path) if path.suffix == ".csv" else _load_json(path))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError(gathered(problems))
    return matrices


def _find_files(path: Path) -> list[Path]:
    """Return a file itself; for a folder its matrix.json, those of its runs, or its .json and .csv
    files.
    """
    if path.is_file():
        if path.suffix not in (".json", ".csv"):
            raise DataError(
                f"{path}: found a {path.suffix or 'nameless'} file, expected a matrix.json or a "
                ".csv of scores; give one of these, or a folder of them"
            )
        return [path]
    if not path.is_dir():
        raise MissingError(
            f"{path}: there is no such file or folder; give a matrix.json, a .csv of scores, or a "
            "folder of them"
        )
    untrusted.check_links_inside(path)
    matrix_files = (
        [path / "matrix.json"]
        if (path / "matrix.json").is_file()
        else sorted(path.glob("*/matrix.json"))
    )
    files = matrix_files or sorted(
        p for p in path.iterdir() if p.suffix in (".json", ".csv") and p.is_file()
    )
    if not files:
        raise MissingError(
            f"{path}: no matrix in it; expected a matrix.json, runs with one, or .json and .csv "
            "files"
        )
    return files


def _load_json(path: Path) -> PublishedMatrix:
    data = untrusted.load_json(path)
    try:
        matrix = Matrix.from_dict(data)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    if not matrix.stages:
        raise DataError(f"{path}: no stage has been scored; give a matrix with at least one row")
    return PublishedMatrix(
        Run(path.parent if path.name == "matrix.json" else path, matrix), data.get("summary") or {}
    )


def _load_csv(path: Path) -> PublishedMatrix:
    """Load a CSV; raise DataError that names the file and every out_of_range line."""
    if invalid_names := [
        name for name in (path.name, path.parent.resolve().name) if untrusted.CONTROL.search(name)
    ]:
        raise DataError(
            f"{path}: a control character in the name {brief(invalid_names[0])}; rename it"
        )
    lines = list(_csv_rows(path))
    if not lines:
        raise DataError(
            f"{path}: found no line, expected a first line of 'stage' and the tasks; see "
            "continual verify --help"
        )
    (number, (head, *tasks)), body = lines[0], lines[1:]
    problems = (
        [
            f"{path}:{number}: the first cell is {brief(head)}; expected 'stage', or 'stage "
            "(percent)' where the scores are in percent"
        ]
        if head.strip().lower() not in FIRST_CELLS
        else []
    )
    problems += [
        f"{path}:{n}: found {len(cells)} cells, expected {len(tasks) + 1}, as the first line "
        "has; leave empty what was not measured"
        for n, cells in body
        if len(cells) != len(tasks) + 1
    ]
    problems += [
        f"{path}:{n}: {brief(cell)} is no number; write a score, or leave the cell empty"
        for n, cells in body
        for cell in cells[1:]
        if not _is_number(cell)
    ]
    if problems:
        raise DataError(gathered(problems))
    count_rows = [(n, cells) for n, cells in body if cells[0] == COUNTS_ROW]
    rows = [
        (n, cells[0], [_parse_score(cell) for cell in cells[1:]])
        for n, cells in body
        if cells[0] != COUNTS_ROW
    ]
    percent = _is_percent(path, head, rows)
    maximum = 100 if percent else 1
    if out_of_range := [
        f"{path}:{n}: the score {score:g} is not in [0, {maximum}]; fix it"
        for n, _, scores in rows
        for score in scores
        if score is not None and not 0 <= score <= maximum
    ]:
        raise DataError(gathered(out_of_range))
    if not rows:
        raise DataError(
            f"{path}: found no stage below the first line, expected one line per stage; add them"
        )
    seed_match = SEED_SUFFIX.fullmatch(path.stem)
    try:
        matrix = Matrix(
            stream=path.parent.resolve().name,
            order="",
            strategy=seed_match[1] if seed_match else path.stem,
            seed=int(seed_match[2]) if seed_match else None,
            tasks=tuple(tasks),
            metrics=dict.fromkeys(tasks, "score"),
            stages=tuple(stage for _, stage, _ in rows),
            counts=_parse_counts(path, count_rows),
            scores=tuple(
                tuple(score if score is None else score / maximum for score in scores)
                for _, _, scores in rows
            ),
        )
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return PublishedMatrix(Run(path, matrix), {}, percent)


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the line number and cells of each line that is not blank."""
    reader = csv.reader(io.StringIO(untrusted.read_text(path), newline=""), strict=True)
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                names = [cell.strip() for cell in cells]
                if strange := [c for c in names if untrusted.CONTROL.search(c)]:
                    raise DataError(
                        f"{path}:{reader.line_num}: a control character in {brief(strange[0])}; "
                        "remove it"
                    )
                yield reader.line_num, names
    except csv.Error as error:
        raise DataError(
            f"{path}:{reader.line_num}: found broken CSV ({error}), expected cells separated by "
            "commas; fix the line"
        ) from error


def _is_number(cell: str) -> bool:
    return not cell or bool(
        re.fullmatch(r"[-+]?(\d{1,15}\.?\d{0,30}|\.\d{1,30})([eE][-+]?\d{1,2})?", cell)
    )


def _parse_score(cell: str) -> Score:
    return float(cell) if cell else None


def _is_percent(path: Path, head: str, rows: Sequence[tuple[int, str, list[Score]]]) -> bool:
    """Return True if scores are in percent.

    Raises DataError if some scores are above 1 and some between 0 and 1.
    """
    if head.strip().lower() == PERCENT_HEAD:
        return True
    above = [
        (n, score) for n, _, scores in rows for score in scores if score is not None and score > 1
    ]
    within = [
        (n, score)
        for n, _, scores in rows
        for score in scores
        if score is not None and 0 < score <= 1
    ]
    if above and within:
        raise DataError(
            f"{path}:{above[0][0]}: found the score {above[0][1]:g}, and {within[0][1]:g} on line "
            f"{within[0][0]}; expected all in [0, 1], or all in percent: begin the first line with "
            f"'{PERCENT_HEAD}' if they are percent"
        )
    return bool(above)


def _parse_counts(path: Path, lines: Sequence[tuple[int, list[str]]]) -> tuple[int, ...]:
    if len(lines) > 1:
        raise DataError(f"{path}:{lines[1][0]}: a second line of {COUNTS_ROW}; keep one")
    for number, (_, *cells) in lines:
        if wrong := [cell for cell in cells if not re.fullmatch(r"\d{1,15}", cell)]:
            raise DataError(
                f"{path}:{number}: {brief(wrong[0])} is no number of test examples; write a "
                "whole number for each task"
            )
        return tuple(map(int, cells))
    return ()
