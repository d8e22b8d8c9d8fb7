"""Matrices that others publish: a matrix.json, with or without our schema, or a CSV of scores.

The CSV's first line is `stage` and the tasks; then comes a line a stage, named by the task that was
learned in it, with a cell a task: empty where it was not measured. `base` may be the first stage,
from before training, and a line `counts` may hold each task's number of test examples:

    stage,dbpedia,amazon
    dbpedia,0.97,
    amazon,0.89,0.55
    counts,7600,7600

Scores are in [0, 1]; in percent where the first cell is `stage (percent)`, or where every score but
0 is above 1. The file's name says the strategy, and `NAME_seed3.csv` the seed too.
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
    """One matrix, as a run of one file or folder, and the summaries that its file states; `percent`
    if it held such.
    """

    run: Run
    stated_summary: Mapping[str, Any]
    is_percent: bool = False


def load_published(paths: Sequence[Path]) -> list[PublishedMatrix]:
    """The matrices of these files and folders, each once; raises MissingError or DataError, for all
    files at once.
    """
    told: list[PublishedMatrix] = []
    problems: list[str] = []
    for path in dict.fromkeys(found for given in paths for found in _find_files(given)):
        try:
            told.append(_load_csv(path) if path.suffix == ".csv" else _load_json(path))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError(gathered(problems))
    return told


def _find_files(path: Path) -> list[Path]:
    """A file; of a folder its matrix.json, those of the runs in it, or else every .json and .csv
    file in it.
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
    named = (
        [path / "matrix.json"]
        if (path / "matrix.json").is_file()
        else sorted(path.glob("*/matrix.json"))
    )
    found = named or sorted(
        p for p in path.iterdir() if p.suffix in (".json", ".csv") and p.is_file()
    )
    if not found:
        raise MissingError(
            f"{path}: no matrix in it; expected a matrix.json, runs with one, or .json and .csv "
            "files"
        )
    return found


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
    """Raises DataError that names the file and every line that is wrong."""
    if strange := [
        name for name in (path.name, path.parent.resolve().name) if untrusted.CONTROL.search(name)
    ]:
        raise DataError(f"{path}: a control character in the name {brief(strange[0])}; rename it")
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
    counted = [(n, cells) for n, cells in body if cells[0] == COUNTS_ROW]
    rows = [
        (n, cells[0], [_parse_score(cell) for cell in cells[1:]])
        for n, cells in body
        if cells[0] != COUNTS_ROW
    ]
    percent = _is_percent(path, head, rows)
    most = 100 if percent else 1
    if wrong := [
        f"{path}:{n}: the score {score:g} is not in [0, {most}]; fix it"
        for n, _, scores in rows
        for score in scores
        if score is not None and not 0 <= score <= most
    ]:
        raise DataError(gathered(wrong))
    if not rows:
        raise DataError(
            f"{path}: found no stage below the first line, expected a line a stage; add them"
        )
    named = SEED_SUFFIX.fullmatch(path.stem)
    try:
        matrix = Matrix(
            stream=path.parent.resolve().name,
            order="",
            strategy=named[1] if named else path.stem,
            seed=int(named[2]) if named else None,
            tasks=tuple(tasks),
            metrics=dict.fromkeys(tasks, "score"),
            stages=tuple(stage for _, stage, _ in rows),
            counts=_parse_counts(path, counted),
            scores=tuple(
                tuple(score if score is None else score / most for score in scores)
                for _, _, scores in rows
            ),
        )
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return PublishedMatrix(Run(path, matrix), {}, percent)


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Each line's number and cells, without blank lines."""
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
            f"{path}:{reader.line_num}: found broken CSV ({error}), expected cells parted by "
            "commas; fix the line"
        ) from error


def _is_number(cell: str) -> bool:
    return not cell or bool(
        re.fullmatch(r"[-+]?(\d{1,15}\.?\d{0,30}|\.\d{1,30})([eE][-+]?\d{1,2})?", cell)
    )


def _parse_score(cell: str) -> Score:
    return float(cell) if cell else None


def _is_percent(path: Path, head: str, rows: Sequence[tuple[int, str, list[Score]]]) -> bool:
    """Whether the scores are in percent; raises DataError where some are above 1 and some are
    between 0 and 1.
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
