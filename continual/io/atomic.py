"""Write files completely or not at all."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def write_folder_atomically(
    folder: Path, *, num_bytes: int = 0, keep_existing: bool = False
) -> Iterator[Path]:
    """Yield an empty folder to write into, which becomes `folder` at the end of the block.

    It stands beside `folder` under a temporary name, `.NAME.tmp`. At the end all that is in it is
    flushed to disk and it is renamed, so `folder` is never half written. If the block raises, it is
    removed and `folder` stays as it was. A folder that exists is replaced; with `keep_existing` it
    stays, for a folder that several machines may write at once.

    Raises OSError if fewer than `num_bytes` bytes are free.
    """
    owner = f".{os.getpid()}" if keep_existing else ""
    temporary = folder.with_name(f".{folder.name}{owner}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        check_disk_space(temporary, num_bytes)
        yield temporary
        for path in temporary.rglob("*"):
            flush_to_disk(path)
        flush_to_disk(temporary)
        if not keep_existing:
            shutil.rmtree(folder, ignore_errors=True)
        try:
            temporary.rename(folder)
        except OSError:
            if not keep_existing or not folder.exists():
                raise
        flush_to_disk(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_disk_space(folder: Path, num_bytes: int) -> None:
    """Raise OSError if the disk of `folder` has no room for `num_bytes` bytes and 1 MiB more."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes + 2**20:
        raise OSError(
            f"it takes {num_bytes / 1e6:,.1f} MB, and the disk has {free / 1e6:,.1f} MB left"
        )


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
