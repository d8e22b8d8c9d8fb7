"""A stream in a folder: stream.json, which names its tasks and orders, and
TASK/{train,dev,test}.jsonl.

    {"stream": NAME, "tasks": [{"name", "dir", "category", "metric", "labels"}, ...], "orders":
    {NAME: [TASK, ...]}}

Of a task only the name is needed: `dir` is the name if left out, `metric` exact_match. Other keys
are metadata.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from continual.data.types import Example, Stream, Task
from continual.errors import ConfigError, DataError, MissingError, brief, gathered, listed, unknown
from continual.io import untrusted
from streams.arrange import apply_arrangement, choose_tasks
from streams.rows import find_misspellings, load_jsonl

MAX_SUGGESTIONS = 20  # unknown names that are looked up among the known ones
SPLITS = ("train", "dev", "test")
TEXT_KEYS = ("dir", "category", "metric")
ENTRY_KEYS = ("name", *TEXT_KEYS, "labels")


def load_folder(
    *,
    path: str,
    seed: int,
    tasks: Sequence[str] | None = None,
    order: str | None = None,
    max_train_rows: int | None = None,
    arrangement: str = "sequential",
    split_files: Mapping[str, str] | None = None,
) -> Stream:
    """The stream in the folder `path`; only the tasks that are asked for are read, each with the
    splits it has.

    `files` names another file for a split, without .jsonl: {"test": "test_unseen_wording"}. The
    other arguments are those of `arrange`. Raises MissingError for what is not there, DataError for
    what is there and wrong, ConfigError for a name that the folder does not know.
    """
    root = Path(path).expanduser()
    split_files = _split_files(split_files or {})
    name, entries, orders = load_index(root)
    chosen = choose_tasks(list(entries), orders=orders, tasks=tasks, order=order, seed=seed)
    loaded = _load_tasks(root, [entries[task] for task in chosen], split_files)
    stream = Stream(name, order or "default", loaded, loaded)
    return apply_arrangement(
        loaded, stream, order=order, max_train_rows=max_train_rows, arrangement=arrangement
    )


def load_index(root: Path) -> tuple[str, dict[str, dict[str, Any]], dict[str, list[str]]]:
    """What stream.json says: the stream's name, its tasks by name, its orders. All that is wrong is
    raised at once.
    """
    file = root / "stream.json"
    index = _load_index_object(root, file)
    problems = [*_task_problems(index.get("tasks")), *_order_problems(index)]
    if not isinstance(name := index.get("stream", root.resolve().name), str):
        problems.append(f"found the stream's name {brief(name)}, expected text")
    if problems:
        raise DataError(gathered([f"{file}: {problem}" for problem in problems]))
    return name, {entry["name"]: entry for entry in index["tasks"]}, index.get("orders") or {}


def _load_index_object(root: Path, file: Path) -> dict[str, Any]:
    """stream.json as an object."""
    if not root.is_dir():
        raise MissingError(
            f"found no folder {root} (looked in {Path.cwd()}), expected a stream folder; "
            "set stream.path to one"
        )
    if not file.is_file():
        near = sorted(str(p.parent) for p in root.glob("*/stream.json"))
        fix = (
            f"set stream.path to {' or '.join(near)}"
            if near
            else "write it, or set stream.path to a stream folder"
        )
        raise MissingError(
            f"found no {file}, expected the file that names the stream's tasks; {fix}"
        )
    _check_inside(root, [file])
    index = untrusted.load_json(file)
    if not isinstance(index, dict):
        raise DataError(
            f'{file}: found no object, expected {{"tasks": [...], "orders": {{...}}}}; write it so'
        )
    return index


def _task_problems(entries: Any) -> list[str]:
    """All that is wrong with the list of tasks."""
    if not isinstance(entries, list) or not entries:
        return ['found no list of tasks, expected "tasks": [{"name": ...}, ...]; name at least one']
    problems = [
        problem for n, entry in enumerate(entries, 1) for problem in _entry_problems(n, entry)
    ]
    names = Counter(str(entry.get("name")) for entry in entries if isinstance(entry, dict))
    return problems + [
        f"found {n} tasks named {brief(name)}, expected each name once; rename or remove the others"
        for name, n in names.items()
        if n > 1
    ]


def _entry_problems(n: int, entry: Any) -> list[str]:
    """All that is wrong with one task's entry, the n-th."""
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or not entry["name"]:
        return [f'found no name in task {n}, expected {{"name": text, ...}}; name it']
    task = f"task {brief(entry['name'])}"
    if untrusted.CONTROL.search(entry["name"]):
        return [
            f"found a control character in the name of {task}, expected letters, digits and "
            "signs; rename it"
        ]
    problems = [
        f"found {brief(entry[key])} as {key!r} of {task}, expected text; quote it or leave it out"
        for key in TEXT_KEYS
        if not isinstance(entry.get(key) or "", str)
    ]
    labels = entry.get("labels") or []
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        problems.append(
            f"found {brief(labels)} as 'labels' of {task}, expected null or a list of texts; "
            "quote them"
        )
    return problems + [
        f"found the key {brief(found)} in {task}, expected {meant!r}; rename it"
        for found, meant in find_misspellings(entry, ENTRY_KEYS)
    ]


def _order_problems(index: Mapping[str, Any]) -> list[str]:
    """All that is wrong with the named orders."""
    orders = index.get("orders") or {}
    entries = index.get("tasks")
    known = (
        {str(e.get("name")) for e in entries if isinstance(e, dict)}
        if isinstance(entries, list)
        else set()
    )
    if not isinstance(orders, dict) or not all(
        isinstance(order, list) for order in orders.values()
    ):
        return [
            'found "orders" in another form, expected {"order name": ["task", ...], ...}; write '
            "them so"
        ]
    strange = [
        (name, task)
        for name, order in orders.items()
        for task in order
        if not isinstance(task, str) or task not in known
    ]
    problems = [
        f"order {brief(name)}: "
        f"{unknown('task', str(task), known) if i < MAX_SUGGESTIONS else f'unknown {brief(task)}'}; name a "
        "task of the stream"
        for i, (name, task) in enumerate(strange)
    ]
    if "random" in orders:
        problems.append(
            "found an order named 'random', expected another name: stream.order=random shuffles; "
            "rename it"
        )
    return problems


def _split_files(named: Mapping[str, str]) -> dict[str, str]:
    """The file of each split; raises ConfigError for a split that is none, or a name that is not a
    file's alone.
    """
    wrong = [
        unknown("split in stream.split_files", split, SPLITS)
        for split in named
        if split not in SPLITS
    ]
    wrong += [
        f"stream.files.{split}={name}: expected the name of a file in each task's folder, "
        "without .jsonl"
        for split, name in named.items()
        if not isinstance(name, str) or Path(name).name != name
    ]
    if wrong:
        raise ConfigError(gathered(wrong))
    return {split: f"{named.get(split, split)}.jsonl" for split in SPLITS}


def _load_tasks(
    root: Path, entries: Sequence[Mapping[str, Any]], files: Mapping[str, str]
) -> tuple[Task[Example], ...]:
    """The tasks of these entries; all that are missing are raised at once, and before a row is
    read.
    """
    missing, places = [], []
    for entry in entries:
        try:
            places.append(_task_folder(root, entry, files))
        except MissingError as error:
            missing.append(str(error))
    if missing:
        raise MissingError(gathered(missing))
    return tuple(
        _load_task(place, entry, files) for place, entry in zip(places, entries, strict=True)
    )


def _task_folder(root: Path, entry: Mapping[str, Any], files: Mapping[str, str]) -> Path:
    """The folder of one task, inside the stream's and with rows of at least one split."""
    name, place = entry["name"], entry.get("dir") or entry["name"]
    where: Path = root / place
    if Path(place).is_absolute() or not untrusted.is_inside(where, root):
        raise DataError(
            f"{root / 'stream.json'}: found dir {brief(place)} of task {name!r}, expected a "
            f"folder inside {root}; move the data there"
        )
    if not where.is_dir():
        there = listed(sorted(p.name for p in root.iterdir() if p.is_dir()))
        raise MissingError(
            f"found no folder {where} for task {name!r}, expected the one that stream.json names "
            f"(folders there: {there}); add it, or fix its 'dir'"
        )
    _check_inside(root, [where / file for file in files.values()])
    if not any((where / file).is_file() for file in files.values()):
        raise MissingError(
            f"found none of {', '.join(files.values())} in {where}, expected the rows of "
            f"task {name!r}; add them, or leave the task out by stream.tasks"
        )
    return where


def _check_inside(root: Path, files: Sequence[Path]) -> None:
    """A stream folder may come from anyone: a link in it shows no file that lies elsewhere."""
    if out := [
        f"{file} is a link that leads out of {root}; put the file itself there"
        for file in files
        if file.is_symlink() and not untrusted.is_inside(file, root)
    ]:
        raise DataError(gathered(out))


def _load_task(where: Path, entry: Mapping[str, Any], files: Mapping[str, str]) -> Task[Example]:
    """One task with the splits that its folder has."""
    name = entry["name"]
    splits = {
        split: tuple(load_jsonl(where / file, name))
        for split, file in files.items()
        if (where / file).is_file()
    }
    return Task(
        name,
        splits.get("train", ()),
        splits.get("dev", ()),
        splits.get("test", ()),
        entry.get("metric") or "exact_match",
        tuple(entry.get("labels") or ()),
        entry.get("category") or "",
    )
