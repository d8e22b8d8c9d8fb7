"""Files that others wrote, read with care: only a DataError comes out of any bytes, and nothing is
evaluated.
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
LARGEST = 2**28  # bytes of a file that is read whole
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # what no name needs, and terminals obey
HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # an escape that may be half of a surrogate pair


def parse_json(raw: bytes, where: str, *, line: bool = False) -> Any:
    """The JSON value of these bytes; DataError says where it ends to be one, by line and column
    unless it is a `line`.

    Text that no one can write down (half of a surrogate pair) and a key that stands twice are
    refused as well.
    """
    whole = (
        "one whole object a line; fix or remove the line"
        if line
        else ("one object; fix it there, or restore the file")
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
        raise DataError(
            f"{where}: found hundreds of brackets within one another, expected {whole}"
        ) from e
    except _DuplicateKey as e:
        raise DataError(
            f"{where}: found the key {e.args[0]!r} twice in one object, expected each once; "
            "remove one"
        ) from e
    except ValueError as e:  # Python reads no whole number of more than 4,300 digits
        raise DataError(f"{where}: found a number of thousands of digits, expected {whole}") from e


class _DuplicateKey(Exception):
    """A key that an object has already."""


def _refuse_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, each of whose keys stands once: of two values there is no telling which is meant."""
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        raise _DuplicateKey(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return made


def _error_position(raw: bytes, at: int, line: bool) -> str:
    """The column from 1, in bytes, and the line before it where there are several."""
    start = raw.rfind(b"\n", 0, at) + 1
    return f"{at + 1}" if line else f"{raw.count(bytes([10]), 0, at) + 1}:{at - start + 1}"


def read_bytes(path: Path) -> bytes:
    """The bytes of a file that is held whole; raises DataError where it is no file, or more than
    any of ours.
    """
    told = path.stat()
    if not stat.S_ISREG(told.st_mode):  # a pipe would be waited for
        raise DataError(
            f"{path}: found no regular file, expected one; remove it, and restore the file"
        )
    if told.st_size > LARGEST:  # not read(LARGEST + 1), which takes that much memory at once
        raise DataError(
            f"{path}: found more than {LARGEST >> 20} MiB, expected a file that can be held; "
            "restore it"
        )
    return path.read_bytes()


def load_json(path: Path) -> Any:
    """The JSON value that a file holds; raises DataError."""
    return parse_json(read_bytes(path), str(path))


def load_json_with_schema(
    path: Path, what: str, fix: str, check: Callable[[dict[str, Any]], object]
) -> dict[str, Any]:
    """The JSON object of schema 1 that a file holds; raises DataError where it is not, or where
    `check` fails.
    """
    told: dict[str, Any] = load_json(path)
    try:
        if told["schema"] != 1:
            raise ValueError(f"schema {brief(told['schema'])}; this version reads schema 1")
        check(told)
        return told
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: no {what} of schema 1 ({error!r}); {fix}") from error


def read_text(path: Path) -> str:
    """The text of a file, empty where there is none; raises DataError where it is no UTF-8."""
    raw = read_bytes(path) if path.is_file() else b""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise DataError(
            f"{path}:{_error_position(raw, e.start, False)}: found the byte 0x{raw[e.start]:02x}, "
            "expected UTF-8; save the file as UTF-8, or restore it"
        ) from e


def iter_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Each line that is not blank, with its number from 1; parted where a line feed stands, and
    nowhere else.

    Raises DataError for a line that is too long to be a row.
    """
    number = 0
    with path.open("rb") as file:
        while raw := file.readline(LONGEST + 1):
            number += 1
            if len(raw) > LONGEST:
                raise DataError(
                    f"{path}:{number}: found a line of more than {LONGEST >> 20} MiB, expected "
                    "one JSON object a line; part it by line feeds"
                )
            bare = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            if bare.strip():
                yield number, bare


class _Plain(yaml.SafeLoader):
    """YAML of plain values: no tag, no anchor that a few lines could unfold to fill the memory,
    each key once.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse what `OmegaConf.to_yaml` never writes."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "anchor", None) or getattr(event, "tag", None):
            raise yaml.MarkedYAMLError(None, None, "an anchor, alias or tag", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """Refuse a key that stands twice."""
        made = super().construct_mapping(node, deep)
        if len(made) != len(node.value):
            raise yaml.MarkedYAMLError(None, None, "a key that stands twice", node.start_mark)
        return made


_Plain.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)  # 1e-3, which YAML 1.1 takes for text and OmegaConf for a number


def load_yaml_mapping(path: Path) -> dict[str, Any]:
    """The plain values of a YAML file, a mapping; nothing in it is called, resolved or unfolded.
    Raises DataError.
    """
    told = read_text(path)
    try:
        loader = _Plain(told)
        made = loader.get_single_data() or {}
        if not isinstance(made, dict) or not all(isinstance(key, str) for key in made):
            raise ValueError("it holds no mapping of keys")
        return made
    except yaml.MarkedYAMLError as e:
        line = f" on line {e.problem_mark.line + 1}" if e.problem_mark else ""
        raise DataError(
            f"{path} cannot be read: found {e.problem}{line}, expected plain keys and values; "
            "restore it, or give another folder"
        ) from e
    except RecursionError as e:
        raise DataError(
            f"{path} cannot be read: found hundreds of brackets within one another; restore it, "
            "or give another folder"
        ) from e
    except (yaml.YAMLError, ValueError, OverflowError, TypeError) as e:
        raise DataError(
            f"{path} cannot be read: {str(e).splitlines()[0]}; restore it, or give another folder"
        ) from e


def is_inside(path: Path, root: Path) -> bool:
    """Whether a path, its links followed, lies in this folder; names that no file can have lie
    nowhere.
    """
    try:
        path.exists()  # a name too long is told here
        return path.resolve().is_relative_to(root.resolve())
    except (
        OSError,
        ValueError,
        RuntimeError,
    ):  # a name too long or with a NUL, links that go in a circle
        return False


def check_links_inside(folder: Path) -> None:
    """Raise DataError naming the symbolic links in a folder that lead out of it: through them
    others' files would be read, or written.
    """
    out = [
        f"{path} is a link to {os.readlink(path)}, outside of {folder}; put the file itself "
        "there, or remove it"
        for at, folders, files in os.walk(folder)
        for path in (Path(at, name) for name in (*folders, *files))
        if path.is_symlink() and not is_inside(path, folder)
    ]
    if out:
        raise DataError(gathered(sorted(out)))


def is_number(value: object, least: float = -1e15, most: float = 1e15) -> bool:
    """Whether a JSON value is a number that can be counted, drawn and written: finite, and of a
    size that means it.
    """
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
