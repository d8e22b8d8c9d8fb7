"""Write files completely or not at all."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path


def write_atomically(path: Path, content: bytes | str) -> Path:
    """Write `content` to `path` by way of a temporary file; return `path`.

    The content is flushed to disk before the rename, so a process that dies at any moment leaves
    either the complete old file or the complete new one. Missing parent folders are made.
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
    """Wait until a file, or the list of names in a folder, is on disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def task_file_name(task: str) -> str:
    """Return a file name for a task's name: one to one, whatever characters the name has."""
    return re.sub(r"^\.|[^\w .-]", lambda m: f"%{ord(m[0]):02X}", task)
