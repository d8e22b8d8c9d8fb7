"""A run folder belongs to one configuration and one process."""

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

# What changes nothing of what is learned and scored.
FREE = ("out.", "track.", "checkpoint.", "stop_if.", "score.every_steps")


def claim(out: Path, config: DictConfig) -> None:
    """Write the configuration, or check that the folder's run has the same one; raises ConfigError
    naming the keys.
    """
    if not is_main_process():
        return
    path = out / "config.yaml"
    text = OmegaConf.to_yaml(config, resolve=True)
    begun = any(
        (out / name).exists()
        for name in ("events.jsonl", "matrix.json", "checkpoints", "predictions")
    )
    if not begun:  # a run that was refused may be given again, put right
        write_atomically(path, text)
        return
    if not path.exists():
        raise ConfigError(
            f"{out} holds a run without its config.yaml, which tells whether these "
            "are its keys; restore that file, or give another out="
        )
    before, now = (
        flatten_keys(OmegaConf.to_container(c)) for c in (read_config(path), OmegaConf.create(text))
    )
    differ = [
        f"{k}: {before.get(k, 'absent')} there, {now.get(k, 'absent')} now"
        for k in sorted(before.keys() | now.keys())
        if before.get(k) != now.get(k) and not f"{k}.".startswith(FREE)
    ]
    if differ:
        raise ConfigError(
            f"{out} holds a run with another configuration; give it the same keys "
            "to resume, or another out=\n  " + "\n  ".join(differ)
        )


@contextmanager
def run_folder_lock(out: Path) -> Iterator[None]:
    """Hold the folder's lock, which ends with the process; raises ConfigError where another process
    has it.

    Of processes that share the work one holds it for all.
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
