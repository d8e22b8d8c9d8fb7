"""Processes of their own for tests, forked from one that has all the imports of a run: to import
them takes seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from pathlib import Path

LIMIT = 900  # seconds, after which something hangs

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
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


class Apart:
    """A process that does `work(*args)`, a function of a module, in this environment; what it says
    goes to a file.
    """

    def __init__(self, said: Path, work, *args, **environment: str) -> None:
        self.said = said
        self.process = context.Process(target=_do, args=(said, environment, work, args))
        self.process.start()

    def ended(self) -> tuple[int, str]:
        """Wait for it: its exit code, negative where a signal ended it, and what it said."""
        self.process.join(LIMIT)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(self.said.read_text())
        return self.process.exitcode, self.said.read_text()


def _do(said: Path, environment: dict[str, str], work, args) -> None:
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    work(*args)


def command(*words) -> None:
    """The command line."""
    from continual.cli.main import main

    sys.argv = ["continual", *map(str, words)]
    main()


def two(folder: Path, work, *args) -> list[Apart]:
    """Two processes that share the work, as torchrun starts them; what they say goes to the folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [
        Apart(
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
