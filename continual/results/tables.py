"""Tables in long form from run folders. docs/data.md lists their columns."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from continual.errors import ConfigError, DataError, listed, unknown
from continual.results.run_folder import Run, RunGroup, find_runs, group_runs

if TYPE_CHECKING:
    import pandas
    import pyarrow

PARQUET_FILE = "comparison.parquet"

ColumnSpecs = dict[str, tuple[str, str]]  # name -> (type, description)
SummaryValues = Mapping[str, float | None]
TableRows = Iterator[dict[str, Any]]

RUN_COLUMNS: ColumnSpecs = {
    "run": ("text", "the folder's name"),
    "group": ("text", "what the report calls this run and its repetitions over seeds and orders"),
    "stream": ("text", "the stream's name"),
    "order": ("text", "the order of its tasks, by name"),
    "strategy": ("text", "the strategy, or several with + between them"),
    "seed": ("whole number", "the run's seed"),
    "joint": ("true or false", "whether it learned all tasks in one stage"),
    "finished": ("true or false", "whether it came to its end"),
    "path": ("text", "the run's folder; in comparison.parquet as seen from that file"),
}
STAGE_COLUMNS: ColumnSpecs = {
    "stage": (
        "text",
        "the stage's name, which is that of the task learned in it; base: before any training",
    ),
    "stage_index": ("whole number", "the stage's number; 0: before any training"),
}
TASK_COLUMNS: ColumnSpecs = {"task": ("text", "the task that was scored")}


def load_table(paths: Sequence[str | Path], table_name: str) -> pandas.DataFrame:
    """Load one table of several folders, for `continual.load_runs`."""
    import pandas
    import pyarrow

    if table_name not in TABLES:
        raise ConfigError(unknown("what", table_name, TABLES))
    if not paths:
        raise ConfigError(
            "load_runs needs folders made by continual run or compare; give their paths"
        )
    runs, pending = find_runs([Path(path) for path in paths])
    if pending:
        warnings.warn(
            f"not in the table, for they have scored nothing yet: {listed(pending, 5)}",
            stacklevel=3,
        )
    nullable = {pyarrow.int64(): pandas.Int64Dtype()}  # whole numbers that can be missing
    return build_table(group_runs(runs), table_name).to_pandas(types_mapper=nullable.get)


def encode_parquet(groups: Sequence[RunGroup], out: Path) -> bytes:
    """Return the content of comparison.parquet: the cells of all runs, with paths relative to
    `out`.
    """
    from pyarrow.parquet import write_table

    target = io.BytesIO()
    write_table(build_table(groups, "cells", out), target)
    return target.getvalue()


def build_table(
    groups: Sequence[RunGroup], table_name: str, out: Path | None = None
) -> pyarrow.Table:
    """Build one table of `TABLES`, run after run; column descriptions are in the metadata.

    Raises DataError for a run that holds a value which its column cannot.
    """
    import pyarrow as pa

    kinds = {
        "text": pa.string(),
        "texts": pa.list_(pa.string()),
        "whole number": pa.int64(),
        "number": pa.float64(),
        "true or false": pa.bool_(),
    }
    columns, rows = TABLES[table_name]
    schema = pa.schema(
        [
            pa.field(name, kinds[kind], metadata={"says": says})
            for name, (kind, says) in {**RUN_COLUMNS, **columns}.items()
        ]
    )
    parts = []
    for group in groups:
        for run, summary in zip(group.runs, group.summaries, strict=True):
            head = _run_values(run, group, out)
            try:
                parts.append(
                    pa.Table.from_pylist([{**head, **row} for row in rows(run, summary)], schema)
                )
            except (pa.ArrowException, OverflowError) as e:
                raise DataError(
                    f"{run.path}: found a value that its column cannot hold ({e}), expected the "
                    "kinds of docs/data.md; restore the folder, or leave it out"
                ) from e
    return pa.concat_tables(parts)


def _run_values(run: Run, group: RunGroup, out: Path | None) -> dict[str, Any]:
    m = run.matrix
    return {
        "path": str(run.path) if out is None else os.path.relpath(run.path, out),
        "run": run.path.absolute().name,
        "group": group.label,
        "stream": m.stream,
        "order": m.order,
        "strategy": m.strategy,
        "seed": m.seed,
        "joint": run.is_joint,
        "finished": m.is_finished,
    }


def _cell_rows(run: Run, _: SummaryValues) -> TableRows:
    m = run.matrix
    counts = m.counts or (None,) * len(m.tasks)
    for stage, scores in zip(m.stages, m.scores, strict=True):
        for task, score, n in zip(m.tasks, scores, counts, strict=True):
            yield {
                "stage": stage,
                "stage_index": run.stage_number(stage),
                "task": task,
                "learned": run.stage_number(task) if task in m.stages else None,
                "metric": m.metrics[task],
                "score": score,
                "n": n,
            }


def _summary_rows(run: Run, summary: SummaryValues) -> TableRows:
    for kind, told in (("summary", summary), ("cost", run.matrix.cost)):
        for name, value in told.items():
            yield {"kind": kind, "name": name, "value": value}


def _setting_rows(run: Run, _: SummaryValues) -> TableRows:
    for key, value in run.settings.items():
        yield {"key": key, "value": value}


def _example_rows(run: Run, _: SummaryValues) -> TableRows:
    for stage in run.matrix.stages:
        for task in run.matrix.tasks:
            for prediction in run.load_predictions(stage, task):
                yield {
                    "stage": stage,
                    "stage_index": run.stage_number(stage),
                    "task": task,
                    "id": prediction.id,
                    "prompt": prediction.prompt,
                    "answer": prediction.answer,
                    "references": list(prediction.references),
                    "score": prediction.score,
                }


def _step_rows(run: Run, _: SummaryValues) -> TableRows:
    for event in run.events("step"):
        if parts := [
            key for key in ("stage", "step", "steps") if isinstance(event.get(key), float)
        ]:
            raise DataError(
                f"{run.path / 'events.jsonl'}: found a step with {parts[0]} {event[parts[0]]}, "
                "expected a whole number; remove the line"
            )  # Arrow would cut the fraction off
        yield {**event, "stage": event.get("task"), "stage_index": event.get("stage")}


TABLES: dict[str, tuple[ColumnSpecs, Callable[[Run, SummaryValues], TableRows]]] = {
    "cells": (
        {
            **STAGE_COLUMNS,
            **TASK_COLUMNS,
            "learned": (
                "whole number",
                "the number of the task's own stage; missing where that has not been, or never is",
            ),
            "metric": ("text", "the metric"),
            "score": ("number", "`R[stage][task]` in [0, 1]; missing where it was not measured"),
            "n": (
                "whole number",
                "how many test examples it is the mean over; missing where unknown",
            ),
        },
        _cell_rows,
    ),
    "summaries": (
        {
            "kind": ("text", "summary or cost"),
            "name": (
                "text",
                "the summary's name, as continual/results/matrix.py defines it, or the cost's",
            ),
            "value": (
                "number",
                "missing of an unfinished run's summaries; a cost is in the unit that its name "
                "says",
            ),
        },
        _summary_rows,
    ),
    "settings": (
        {
            "key": ("text", "a key of config.yaml in dotted form; seed, order and out stand above"),
            "value": ("text", "its value, as JSON where it is no text"),
        },
        _setting_rows,
    ),
    "examples": (
        {
            **STAGE_COLUMNS,
            **TASK_COLUMNS,
            "id": ("text", "the test example's id"),
            "prompt": ("text", "what was asked"),
            "answer": ("text", "what the model said"),
            "references": ("texts", "the accepted answers"),
            "score": ("number", "the score of the answer in [0, 1]"),
        },
        _example_rows,
    ),
    "steps": (
        {
            **STAGE_COLUMNS,
            "step": (
                "whole number",
                "the optimizer step within the stage, of those that were logged (train.log_every_steps)",
            ),
            "steps": ("whole number", "how many the stage has"),
            "loss": ("number", "the step's loss; missing where it was not finite"),
            "lr": ("number", "the learning rate"),
            "tokens": ("number", "supervised tokens that the stage has learned from so far"),
            "seconds": ("number", "seconds that the stage has taken so far"),
        },
        _step_rows,
    ),
}
