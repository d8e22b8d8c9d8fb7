"""Processes of their own for tests, forked from one that has all the imports of a run: to import
them takes seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from pathlib import Path

TIMEOUT_SECONDS = 900  # seconds, after which something hangs

forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(
    [
        "continual.cli.main",
        "continual.runs.run",
        "continual.runs.adapt",
        "continual.runs.compare",
        "continual.reports.plots",
        "continual.reports.pages",
        "streams.folder",
        "peft",
        "transformers.models.llama.modeling_llama",
        "hypothesis",
        "pytest",
        *(
            f"strategies.{p.stem}"
            for p in (Path(__file__).parents[2] / "strategies").glob("[!_]*.py")
        ),
    ]
)


class Subprocess:
    """A process that does `work(*args)`, a function of a module, in this environment; what it says
    goes to a file.
    """

    def __init__(self, log: Path, work, *args, **environment: str) -> None:
        self.log = log
        self.process = forkserver.Process(target=_child_main, args=(log, environment, work, args))
        self.process.start()

    def wait(self) -> tuple[int, str]:
        """Wait for it: its exit code, negative where a signal ended it, and what it said."""
        self.process.join(TIMEOUT_SECONDS)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(self.log.read_text())
        return self.process.exitcode, self.log.read_text()


def _child_main(said: Path, environment: dict[str, str], work, args) -> None:
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    work(*args)


def run_command(*words) -> None:
    """The command line."""
    from continual.cli.main import main

    sys.argv = ["continual", *map(str, words)]
    main()


def start_two_ranks(folder: Path, work, *args) -> list[Subprocess]:
    """Two processes that share the work, as torchrun starts them; what they say goes to the folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [
        Subprocess(
            folder / f"said-{rank}",
            work,
            *args,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE="2",
            LOCAL_WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        for rank in (0, 1)
    ]
