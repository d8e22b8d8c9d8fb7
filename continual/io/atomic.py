"""Files are written whole or not at all."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path


def write_atomically(path: Path, content: bytes | str) -> Path:
    """Put `content` at `path`, flushed to disk before the rename, and make its folder where there
    is none.

    Whenever the process dies, the whole old file is there or the whole new one; returns `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def flush_to_disk(path: Path) -> None:
    """Wait until a file or a folder's list of names is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def task_file_name(task: str) -> str:
    """A task's name as a file's, whatever it holds: no two names give the same one."""
    return re.sub(r"^\.|[^\w .-]", lambda m: f"%{ord(m[0]):02X}", task)
