"""Readers of files that may come from anyone.

Whatever the bytes, a reader returns plain values or raises DataError; nothing is evaluated.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from continual.errors import DataError, brief, gathered

LONGEST = 2**26  # bytes of a line
LARGEST = 2**28  # bytes of a file that is held in memory
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # control characters, which no name needs
HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # an escape that may be half of a surrogate pair


def parse_json(raw: bytes, where: str, *, line: bool = False) -> Any:
    """Parse JSON; raise DataError with line and column (only the column if `raw` is one `line`).

    Half of a surrogate pair and duplicate keys are refused too.
    """
    whole = (
        "one complete object per line; fix or remove the line"
        if line
        else "one object; fix it there, or restore the file"
    )
    try:
        text = (raw.rstrip(b"\r\n") if line else raw).decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_refuse_duplicate_keys)
        if HALF.search(raw):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except UnicodeEncodeError as e:
        raise DataError(
            f"{where}: found half of a surrogate pair ({e.object[e.start]!r}), expected "
            "characters; write the whole pair or remove it"
        ) from e
    except UnicodeDecodeError as e:
        raise DataError(
            f"{where}:{_error_position(raw, e.start, line)}: found the byte 0x{raw[e.start]:02x}, "
            "expected UTF-8; save the file as UTF-8"
        ) from e
    except json.JSONDecodeError as e:
        place = f"{e.colno}" if line else f"{e.lineno}:{e.colno}"
        raise DataError(f"{where}:{place}: found broken JSON ({e.msg}), expected {whole}") from e
    except RecursionError as e:
        raise DataError(f"{where}: found hundreds of nested brackets, expected {whole}") from e
    except _DuplicateKey as e:
        raise DataError(
            f"{where}: found the key {e.args[0]!r} twice in one object, expected each once; "
            "remove one"
        ) from e
    except ValueError as e:  # Python refuses integers of more than 4,300 digits
        raise DataError(f"{where}: found a number of thousands of digits, expected {whole}") from e


class _DuplicateKey(Exception):
    """Report a key that an object has twice."""


def _refuse_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict; raise _DuplicateKey if one of its keys occurs twice."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise _DuplicateKey(key)
        values[key] = value
    return values


def _error_position(raw: bytes, at: int, line: bool) -> str:
    """Return LINE:COLUMN of a byte offset, from 1; only the column if `raw` is one `line`."""
    start = raw.rfind(b"\n", 0, at) + 1
    return f"{at + 1}" if line else f"{raw.count(bytes([10]), 0, at) + 1}:{at - start + 1}"


def read_bytes(path: Path) -> bytes:
    """Read a whole file; raise DataError if it is not a regular file or larger than LARGEST."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
        raise DataError(
            f"{path}: expected a regular file, found something else; remove it and restore the file"
        )
    if status.st_size > LARGEST:  # read(LARGEST + 1) would take that much memory at once
        raise DataError(
            f"{path}: found more than {LARGEST >> 20} MiB, expected a smaller file; restore it"
        )
    return path.read_bytes()


def load_json(path: Path) -> Any:
    """Load the JSON value of a file; raises DataError."""
    return parse_json(read_bytes(path), str(path))


def load_json_with_schema(
    path: Path, what: str, fix: str, check: Callable[[dict[str, Any]], object]
) -> dict[str, Any]:
    """Load a JSON object of schema 1.

    Raises DataError, with `what` the file should hold and the `fix`, for another schema or if
    `check` raises.
    """
    document: dict[str, Any] = load_json(path)
    try:
        if document["schema"] != 1:
            raise ValueError(f"schema {brief(document['schema'])}; this version reads schema 1")
        check(document)
        return document
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: no {what} of schema 1 ({error!r}); {fix}") from error


def read_text(path: Path) -> str:
    """Read a text file, empty if it does not exist; raise DataError if it is not UTF-8."""
    raw = read_bytes(path) if path.is_file() else b""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise DataError(
            f"{path}:{_error_position(raw, e.start, False)}: found the byte 0x{raw[e.start]:02x}, "
            "expected UTF-8; save the file as UTF-8, or restore it"
        ) from e


def iter_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank with their numbers from 1, split at line feeds only.

    Raises DataError for a line longer than LONGEST.
    """
    number = 0
    with path.open("rb") as file:
        while raw := file.readline(LONGEST + 1):
            number += 1
            if len(raw) > LONGEST:
                raise DataError(
                    f"{path}:{number}: found a line of more than {LONGEST >> 20} MiB, expected "
                    "one JSON object per line; split it with line feeds"
                )
            bare = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            if bare.strip():
                yield number, bare


class _PlainLoader(yaml.SafeLoader):
    """Load YAML of plain values only.

    Tags, anchors (a few lines of which can expand to fill the memory) and duplicate keys are
    refused.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse tags, anchors and aliases, which `OmegaConf.to_yaml` never writes."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "anchor", None) or getattr(event, "tag", None):
            raise yaml.MarkedYAMLError(None, None, "an anchor, alias or tag", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """Refuse duplicate keys."""
        mapping = super().construct_mapping(node, deep)
        if len(mapping) != len(node.value):
            raise yaml.MarkedYAMLError(None, None, "a key that occurs twice", node.start_mark)
        return mapping


_PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)  # 1e-3 is text in YAML 1.1, and a number for OmegaConf


def load_yaml_mapping(path: Path) -> dict[str, Any]:
    """Load a YAML file that holds a mapping of plain values; raises DataError.

    Nothing in it is called, resolved or expanded.
    """
    text = read_text(path)
    try:
        mapping = _PlainLoader(text).get_single_data() or {}
        if not isinstance(mapping, dict) or not all(isinstance(key, str) for key in mapping):
            raise ValueError("it does not hold a mapping of keys")
        return mapping
    except yaml.MarkedYAMLError as e:
        line = f" on line {e.problem_mark.line + 1}" if e.problem_mark else ""
        raise DataError(
            f"{path} cannot be read: found {e.problem}{line}, expected plain keys and values; "
            "restore it, or give another folder"
        ) from e
    except RecursionError as e:
        raise DataError(
            f"{path} cannot be read: found hundreds of nested brackets; restore it, "
            "or give another folder"
        ) from e
    except (yaml.YAMLError, ValueError, OverflowError, TypeError) as e:
        raise DataError(
            f"{path} cannot be read: {str(e).splitlines()[0]}; restore it, or give another folder"
        ) from e


def is_inside(path: Path, root: Path) -> bool:
    """Return True if a path, after following links, lies in the folder `root`."""
    try:
        path.exists()  # raises for a name that is too long
        return path.resolve().is_relative_to(root.resolve())
    except (OSError, ValueError, RuntimeError):  # too long, a NUL character, or circular links
        return False


def check_links_inside(folder: Path) -> None:
    """Raise DataError naming the symbolic links in a folder that point outside of it.

    Through such links, files of others would be read or written.
    """
    problems = [
        f"{path} is a link to {os.readlink(path)}, outside of {folder}; put the file itself "
        "there, or remove it"
        for parent, folders, files in os.walk(folder)
        for path in (Path(parent, name) for name in (*folders, *files))
        if path.is_symlink() and not is_inside(path, folder)
    ]
    if problems:
        raise DataError(gathered(sorted(problems)))


def is_number(value: object, least: float = -1e15, most: float = 1e15) -> bool:
    """Return True if a JSON value is a finite number (not a bool) between `least` and `most`."""
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
