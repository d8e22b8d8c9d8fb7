"""Save the checkpoints of one stage, as often as the configuration asks."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from continual.distributed.processes import is_main_process
from continual.results.matrix import Matrix
from continual.runs.session import RunSession
from continual.tracking.events import EventLog
from continual.training import checkpoint


@dataclass
class Checkpointer:
    """Save checkpoints of stage `stage_number` to the run folder `out`, and remove old ones."""

    out: Path
    session: RunSession
    stage_number: int
    events: EventLog
    last_save_time: float = field(default_factory=time.monotonic)

    def is_due(self, step: int) -> bool:
        """Return True if checkpoint.every_steps or every_seconds asks for one after this step."""
        settings = self.session.settings.checkpoint
        if settings.every_steps is not None and step % settings.every_steps == 0:
            return True
        elapsed = time.monotonic() - self.last_save_time
        return settings.every_seconds is not None and elapsed >= settings.every_seconds

    def save_step(self, step: int, matrix: Matrix, stage_state: Mapping[str, Any]) -> None:
        """Save a checkpoint within the stage."""
        self._save(f"stage-{self.stage_number:02d}-step-{step:08d}", matrix, stage_state)

    def save_stage(self, matrix: Matrix) -> None:
        """Save the checkpoint of the trained stage."""
        self._save(f"stage-{self.stage_number:02d}", matrix, None)

    def _save(self, name: str, matrix: Matrix, stage_state: Mapping[str, Any] | None) -> None:
        """Save a checkpoint, remove what it supersedes, and log its size.

        With a sharded model all processes take part, otherwise the main process alone.
        """
        session = self.session
        folder = self.out / "checkpoints" / name
        if is_main_process() or session.model.sharded:
            checkpoint.save(folder, session.model, session.strategy, matrix, stage_state)
        if is_main_process():
            checkpoint.prune(self.out, session.settings.checkpoint.keep, folder)
            self.events(
                {
                    "event": "checkpoint",
                    "bytes": checkpoint.size_bytes(folder),
                    "memory_bytes": checkpoint.size_bytes(folder, "memory.*"),
                }
            )
        self.last_save_time = time.monotonic()
