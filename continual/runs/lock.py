"""Bind a run folder to one configuration, and lock it for one process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from continual.config.run_config import flatten_keys, read_config
from continual.distributed.processes import is_main_process
from continual.errors import ConfigError
from continual.io.atomic import write_atomically
from continual.io.untrusted import check_links_inside

# Keys, or their sections, that change nothing in what is learned and scored.
FREE = (
    "out",
    "track",
    "checkpoint",
    "stop_if",
    "score.every_steps",
    "score.monitor_examples",
)


def claim(out: Path, config: DictConfig) -> None:
    """Write the configuration to the folder, or check it against the run that the folder holds.

    Raises ConfigError with the names of keys that differ, except those of FREE. A run that has
    written no results yet may change its configuration.
    """
    if not is_main_process():
        return
    path = out / "config.yaml"
    text = OmegaConf.to_yaml(config, resolve=True)
    results = ("events.jsonl", "matrix.json", "checkpoints", "predictions")
    if not any((out / name).exists() for name in results):
        write_atomically(path, text)
        return
    if not path.exists():
        raise ConfigError(
            f"{out} holds a run without its config.yaml, which tells whether these "
            "are its keys; restore that file, or give another out="
        )
    before = flatten_keys(OmegaConf.to_container(read_config(path)))
    now = flatten_keys(OmegaConf.to_container(OmegaConf.create(text)))
    differences = [
        f"{key}: {before.get(key, 'absent')} there, {now.get(key, 'absent')} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not _is_free(key)
    ]
    if differences:
        raise ConfigError(
            f"{out} holds a run with another configuration; give it the same keys "
            "to resume, or another out=\n  " + "\n  ".join(differences)
        )


def _is_free(key: str) -> bool:
    """Return True if the key, or a section of it, is one of FREE."""
    return any(f"{key}.".startswith(f"{free}.") for free in FREE)


@contextmanager
def run_folder_lock(out: Path) -> Iterator[None]:
    """Hold the lock of a run folder; create the folder if it does not exist.

    The lock ends with the process. Of several processes of one run, the main process holds it for
    all. Raises ConfigError if another process has it.
    """
    import fcntl

    if not is_main_process():
        yield
        return
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out={out} is a file; give a folder, new or of an unfinished run")
    out.mkdir(parents=True, exist_ok=True)
    check_links_inside(out)
    with (out / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                f"{out} is in use by process {file.read().strip() or 'unknown'}; "
                "wait for it, or give another out="
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
