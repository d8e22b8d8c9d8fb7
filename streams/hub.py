"""A stream of datasets on the Hugging Face Hub, or of local parquet, csv and json files, through
`datasets`.

Each task says where its rows are and which columns are instruction, input and output:

    sst2: {path: nyu-mll/glue, name: sst2, splits: {train: "train[:1000]", dev: validation},
           instruction_text: "Is the review positive or negative?", columns: {input: sentence, output: label}}
    own:  {path: csv, data_files: {train: own/train.csv, dev: own/dev.csv}}

A column is named (`sentence`; a nested one by its path, `answers.text`) or written into a template
(`"Premise: {premise}\\nHypothesis: {hypothesis}"`). A class number becomes its label's name: of
`labels` if given, or else of the dataset's own. Without `columns` the rows are read as those of a
stream folder are (`streams.rows`). Repositories that need their own code to be loaded are refused,
as `datasets` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

from continual.data.types import Example, Stream, Task
from continual.errors import ConfigError, DataError, MissingError, gathered, unknown
from streams.arrange import apply_arrangement, choose_tasks
from streams.rows import parse_row

SPLITS = ("train", "dev", "test")
EXAMPLE_FIELDS = ("instruction", "input", "output", "messages")
ENTRY_KEYS = (
    "path",
    "name",
    "revision",
    "data_files",
    "splits",
    "columns",
    "instruction_text",
    "labels",
    "metric",
    "category",
)
FILE_FORMATS = (
    "parquet",
    "csv",
    "json",
)  # `datasets` would read the working directory where these are given no files


def load_hub(
    *,
    datasets: Mapping[str, Mapping[str, Any]],
    seed: int,
    name: str = "hub",
    orders: Mapping[str, Sequence[str]] | None = None,
    tasks: Sequence[str] | None = None,
    order: str | None = None,
    max_train_rows: int | None = None,
    arrangement: str = "sequential",
) -> Stream:
    """The stream of these `datasets`, by task name; only the tasks that are asked for are loaded.

    An entry's keys: `path` (a Hub id, a local folder, or parquet, csv or json with `data_files`),
    `name` (its configuration), `revision`, `data_files`, `splits` ({train, dev, test: a split,
    sliced if need be, such as "train[:90%]"}; `data_files` by split make it needless), `columns`
    ({instruction, input, output or messages: column or template}), `instruction_text` (one
    instruction for all rows), `labels`, `metric` (exact_match), `category`. The other arguments are
    those of `arrange`. Raises ConfigError for a wrong entry, MissingError for data that is not
    there, DataError for rows that are wrong.
    """
    if problems := [
        f"stream.datasets.{task}: {p}"
        for task, spec in datasets.items()
        for p in _entry_problems(spec)
    ]:
        raise ConfigError(gathered(problems))
    chosen = choose_tasks(list(datasets), orders=orders or {}, tasks=tasks, order=order, seed=seed)
    loaded = tuple(_load_task(task, datasets[task]) for task in chosen)
    return apply_arrangement(
        loaded,
        Stream(name, order or "default", loaded, loaded),
        order=order,
        max_train_rows=max_train_rows,
        arrangement=arrangement,
    )


def _entry_problems(spec: Any) -> list[str]:
    """All that is wrong with one entry, before anything is loaded."""
    if not isinstance(spec, Mapping):
        return [f"found {spec!r}, expected {{path: ..., splits: ..., columns: ...}}; write it so"]
    problems = [unknown("key", str(key), ENTRY_KEYS) for key in spec if key not in ENTRY_KEYS]
    if not spec.get("path"):
        problems.append(
            "found no path, expected a Hub id, a folder, or one of parquet, csv, json; add it"
        )
    if spec.get("path") in FILE_FORMATS and not spec.get("data_files"):
        problems.append(
            f"found no data_files beside path={spec['path']}, expected the files to read; add them"
        )
    labels = spec.get("labels") or []
    if isinstance(labels, str) or not all(isinstance(label, str) for label in labels):
        problems.append(f"found labels {labels!r}, expected a list of texts; quote them")
    return problems + (_mapping_problems(spec) or [*_split_problems(spec), *_column_problems(spec)])


def _mapping_problems(spec: Mapping[str, Any]) -> list[str]:
    """Keys that must map names to texts and do not."""
    return [
        f"found {key} {spec[key]!r}, expected {{name: text, ...}}; write it so"
        for key in ("splits", "columns")
        if spec.get(key)
        and not (
            isinstance(spec[key], Mapping)
            and all(isinstance(text, str) for text in spec[key].values())
        )
    ]


def _split_problems(spec: Mapping[str, Any]) -> list[str]:
    """Splits that are none of ours, or none at all."""
    splits = _dataset_splits(spec)
    if not splits:
        return [
            'found no splits, expected such as {train: "train[:90%]", dev: "train[90%:]"}; add them'
        ]
    return [unknown("split", split, SPLITS) for split in splits if split not in SPLITS]


def _column_problems(spec: Mapping[str, Any]) -> list[str]:
    """Fields that are none of an example's, and those that an example lacks."""
    columns, literal = spec.get("columns") or {}, bool(spec.get("instruction_text"))
    problems = [
        unknown("field in columns", field, EXAMPLE_FIELDS)
        for field in columns
        if field not in EXAMPLE_FIELDS
    ]
    if not (columns or literal) or "messages" in columns:
        return problems
    if "output" not in columns:
        problems.append("found no output in columns, expected the column of the answers; add it")
    if ("instruction" in columns) == literal:
        found = ("both {} and {}" if literal else "neither {} nor {}").format(
            "columns.instruction", "instruction_text"
        )
        problems.append(
            f"found {found}, expected one of them; the first names a column, the second is one "
            "text for all rows"
        )
    return problems


def _dataset_splits(spec: Mapping[str, Any]) -> dict[str, str]:
    """Our splits by name, each with the dataset's split that it is."""
    files = spec.get("data_files")
    return dict(
        spec.get("splits")
        or ({split: split for split in files} if isinstance(files, Mapping) else {})
    )


def _load_task(task: str, spec: Mapping[str, Any]) -> Task[Example]:
    """One task, its splits loaded and read."""
    rows, labels = {}, tuple(spec.get("labels") or ())
    for split, of in _dataset_splits(spec).items():
        source = SplitSource(task, split, of, spec)
        data = _load_split(source)
        names = _class_names(data, spec)
        rows[split] = _parse_rows(data, names, source)
        labels = labels or tuple(names.get(_output_column(spec), ()))
    return Task(
        task,
        rows.get("train", ()),
        rows.get("dev", ()),
        rows.get("test", ()),
        spec.get("metric") or "exact_match",
        labels,
        spec.get("category") or "",
    )


@dataclass(frozen=True)
class SplitSource:
    """Where the rows of one of our splits come from: split `of` the dataset that the entry `spec`
    names.
    """

    task: str
    split: str
    dataset_split: str
    entry: Mapping[str, Any]

    def __str__(self) -> str:
        """The file or dataset and the slice of it, for messages."""
        files = self.entry.get("data_files")
        if isinstance(files, Mapping):
            files = files.get(self.dataset_split.split("[")[0])
        return f"{files or '/'.join(filter(None, (self.entry['path'], self.entry.get('name'))))} [{self.dataset_split}]"


def _load_split(source: SplitSource) -> Any:
    """One split as a Dataset, its nested columns flattened."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    spec, at = source.entry, f"stream.datasets.{source.task}: {source}"
    try:
        return load_dataset(
            spec["path"],
            spec.get("name"),
            data_files=spec.get("data_files"),
            split=source.dataset_split,
            revision=spec.get("revision"),
        ).flatten()
    except OSError as error:
        raise MissingError(
            f"{at}: found no data, expected to load it ({error}); fix path, name or data_files, "
            "or go online and log in if the Hub asks for it"
        ) from error
    except DatasetsError as error:
        raise DataError(
            f"{at}: found data that cannot be read, expected the format that path names "
            f"({error.__cause__ or error}); fix the files"
        ) from error
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{at}: found settings that do not fit the data, expected path, name and splits as the "
            f"dataset has them ({error}); fix them"
        ) from error


def _output_column(spec: Mapping[str, Any]) -> str:
    """The column of the answers."""
    return str((spec.get("columns") or {}).get("output", "output"))


def _class_names(data: Any, spec: Mapping[str, Any]) -> dict[str, Sequence[str]]:
    """The names of the classes of each column that holds class numbers; `labels` rename those of
    the output.
    """
    from datasets import ClassLabel

    names = {
        column: feature.names
        for column, feature in data.features.items()
        if isinstance(feature, ClassLabel)
    }
    given = spec.get("labels") and _output_column(spec) in data.column_names
    return {**names, **({_output_column(spec): spec["labels"]} if given else {})}


def _parse_rows(
    data: Any, names: Mapping[str, Sequence[str]], source: SplitSource
) -> tuple[Example, ...]:
    """The rows of one split, numbered from 0 as `datasets` does; all that is wrong with them is
    raised at once.
    """
    columns, literal = source.entry.get("columns") or {}, source.entry.get("instruction_text")
    as_it_is = not columns and not literal  # then only class numbers are changed, to names
    fields = {
        field: _field_getter(text, data.column_names, names, f"{source}: columns.{field}")
        for field, text in ({column: column for column in names} if as_it_is else columns).items()
    }
    examples, problems = [], []
    for n, row in enumerate(data):
        where = f"{source} row {n}"
        base = row if as_it_is else {"instruction": literal} if literal else {}
        try:
            whole = {**base, **{field: value(row) for field, value in fields.items()}}
            examples.append(
                parse_row(
                    whole, task=source.task, id=f"{source.task}/{source.split}/{n}", where=where
                )
            )
        except UnmappableValueError as error:
            problems.append(f"{where}: {error}")
        except DataError as error:
            problems += str(error).split("\n")
    if problems:
        raise DataError(gathered(problems))
    return tuple(examples)


class UnmappableValueError(DataError):
    """A value that a column has and a field cannot take; the message does not say where."""


def _field_getter(
    text: str, columns: Sequence[str], names: Mapping[str, Sequence[str]], where: str
) -> Callable[[Mapping[str, Any]], Any]:
    """How a field's value comes out of a row: one column as it is, or several written into a
    template.
    """
    try:
        pieces = list(Formatter().parse(text)) if "{" in text or "}" in text else []
        if any(piece[2] or piece[3] for piece in pieces):
            raise ValueError("a format or a conversion after the column")
    except ValueError as error:
        raise ConfigError(
            f'{where}: found the template {text!r} ({error}), expected such as "{{column}}"; '
            "write {{ and }} for braces that are meant"
        ) from error
    parts = [(literal, column) for literal, column, _, _ in pieces]
    used = [column for _, column in parts if column is not None] if parts else [text]
    if absent := [unknown("column", column, columns) for column in used if column not in columns]:
        raise ConfigError(gathered([f"{where}: {problem}" for problem in absent]))
    if not parts:
        return lambda row: _column_value(row, text, names)
    return lambda row: "".join(
        literal + (_template_value(row, column, names) if column else "")
        for literal, column in parts
    )


def _decode_class(row: Mapping[str, Any], column: str, names: Mapping[str, Sequence[str]]) -> Any:
    """The value of a column, a class number as its name."""
    value, classes = row[column], names.get(column)
    if classes is None or isinstance(value, bool) or not isinstance(value, int):
        return value
    if not 0 <= value < len(classes):
        raise UnmappableValueError(
            f"found class {value} in column {column!r}, expected 0 to {len(classes) - 1} "
            f"({', '.join(classes)}); fix labels, or leave the unlabelled rows or split out"
        )
    return classes[value]


def _column_value(row: Mapping[str, Any], column: str, names: Mapping[str, Sequence[str]]) -> Any:
    """The value of a column by itself: a number is no text, and must be named or written by a
    template.
    """
    value = _decode_class(row, column, names)
    if isinstance(value, int | float):
        raise UnmappableValueError(
            f"found the number {value} in column {column!r}, expected text; name the classes by "
            f'labels: [...], or write the number itself by the template "{{{column}}}"'
        )
    return value


def _template_value(row: Mapping[str, Any], column: str, names: Mapping[str, Sequence[str]]) -> str:
    """The value of a column inside a template."""
    value = _decode_class(row, column, names)
    if value is None or isinstance(value, list | dict):
        raise UnmappableValueError(
            f"found {'nothing' if value is None else 'a list'} in column {column!r}, expected "
            "text or a number to write into the template; fill it, or map the column by itself"
        )
    return str(value)
