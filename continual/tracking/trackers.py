"""A run's events beside events.jsonl: in TensorBoard, Weights & Biases, MLflow or trackio, each an
extra of its own.

The horizontal axis counts optimizer steps since the run began, over all its stages. A run that is
resumed goes on in the tracker's same run. A tracker that fails later than at its start is left out
from then on, with a line that says so.
"""

from __future__ import annotations

import os
import re
import secrets
import sys
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from omegaconf import DictConfig, OmegaConf

from continual.config.run_config import flatten_keys
from continual.distributed.processes import is_main_process
from continual.errors import ConfigError, unknown
from continual.io.atomic import write_atomically
from continual.io.untrusted import is_number, load_json
from continual.results.matrix import mean_or_none
from continual.results.run_folder import load_events

NO_TRACKER = "none"
DEFAULT_PROJECT = "continual"
TRACKER_ID_FILE = "track.json"  # in the run's folder: which of the tracker's runs it is


class TrackerClient(Protocol):
    """A tracker's own client, at one of its runs."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take these figures, at this step."""

    def close(self, finished: bool) -> None:
        """Take no more; whether the run came to its end."""


class TensorBoard:
    """Event files in OUT/tensorboard."""

    package = "tensorboard"

    def __init__(self, out: Path, name: str, id: str, settings: Mapping[str, Any]) -> None:
        from torch.utils import tensorboard

        self.writer_class: Any = tensorboard.SummaryWriter
        self.folder, self.settings = str(out / "tensorboard"), settings
        self.writer: Any = None

    def log(self, values: Mapping[str, float], step: int) -> None:
        """The first step tells TensorBoard what to forget of a run that was stopped after it."""
        if self.writer is None:
            self.writer = self.writer_class(self.folder, purge_step=step)
            rows = "\n".join(f"    {key}: {value}" for key, value in self.settings.items())
            self.writer.add_text("config", rows, step)
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def close(self, finished: bool) -> None:
        """Flush."""
        if self.writer is not None:
            self.writer.close()


class WandB:
    """Weights & Biases, as its own environment variables say.

    Its files are where it puts them, WANDB_DIR or the working folder: they hold links that lead out
    of a run's.
    """

    package = "wandb"

    def __init__(self, out: Path, name: str, id: str, settings: Mapping[str, Any]) -> None:
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", DEFAULT_PROJECT),
            name=name,
            id=id,
            resume="allow",
            config=dict(settings),
            settings=wandb.Settings(console="off"),
        )
        self.run.define_metric("*", step_metric="step")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """The step is a figure of its own: a resumed run may come to one again."""
        self.run.log({**values, "step": step})

    def close(self, finished: bool) -> None:
        """Upload what is left."""
        self.run.finish(exit_code=0 if finished else 1)


class MLflow:
    """MLflow, where MLFLOW_TRACKING_URI says or else its own default."""

    package = "mlflow"

    def __init__(self, out: Path, name: str, id: str, settings: Mapping[str, Any]) -> None:
        import mlflow
        from mlflow.entities import Metric, Param

        self.client, self.metric_class = mlflow.MlflowClient(), Metric
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", DEFAULT_PROJECT)
        at = self.client.get_experiment_by_name(project)
        where = at.experiment_id if at else self.client.create_experiment(project)
        found = self.client.search_runs([where], f"tags.continual = '{id}'", max_results=1)
        run = (
            found[0]
            if found
            else self.client.create_run(where, run_name=name, tags={"continual": id})
        )
        self.run_id = run.info.run_id
        self.client.update_run(self.run_id, status="RUNNING")
        params = (
            []
            if found
            else [Param(_mlflow_name(key), str(value)[:500]) for key, value in settings.items()]
        )
        for start in range(0, len(params), 100):  # as many as it takes at once
            self.client.log_batch(self.run_id, params=params[start : start + 100])

    def log(self, values: Mapping[str, float], step: int) -> None:
        """One batch."""
        now = int(1000 * time.time())
        self.client.log_batch(
            self.run_id,
            metrics=[self.metric_class(_mlflow_name(k), v, now, step) for k, v in values.items()],
        )

    def close(self, finished: bool) -> None:
        """Say how it ended."""
        self.client.set_terminated(self.run_id, status="FINISHED" if finished else "KILLED")


class Trackio:
    """trackio, in its own folder."""

    package = "trackio"

    def __init__(self, out: Path, name: str, id: str, settings: Mapping[str, Any]) -> None:
        import trackio

        with redirect_stdout(sys.stderr):  # on stdout there are the tables
            self.run = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", DEFAULT_PROJECT),
                name=f"{name} {id}",
                config=dict(settings),
                resume="allow",
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """One line."""
        self.run.log(dict(values), step=step)

    def close(self, finished: bool) -> None:
        """Write what is left."""
        with redirect_stdout(sys.stderr):
            self.run.finish()


TRACKERS: dict[str, Any] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def check_tracker_installed(kind: str) -> None:
    """Raise ConfigError for a tracker that is not known, or whose package is not installed."""
    if kind != NO_TRACKER and kind not in TRACKERS:
        raise ConfigError(unknown("track", kind, [NO_TRACKER, *TRACKERS]))
    if kind != NO_TRACKER and not find_spec(TRACKERS[kind].package):
        raise ConfigError(
            f"track={kind} needs {TRACKERS[kind].package}, which is not installed; install the "
            f"extra: uv sync --extra {kind}, or pip install 'continual[{kind}]', or set "
            "track=none"
        )


def start_tracker(config: DictConfig, out: Path) -> Tracker | None:
    """What follows the run in `out`; None where none is asked for, and in all processes but the one
    that writes.

    Raises ConfigError where the tracker cannot begin.
    """
    if config.track == NO_TRACKER or not is_main_process():
        return None
    settings = flatten_keys(OmegaConf.to_container(config, resolve=True))
    try:
        sink = TRACKERS[config.track](
            out, "/".join(out.absolute().parts[-2:]), _load_run_id(out), settings
        )
    except Exception as e:  # of a library that is not ours, and of whatever it talks to
        raise ConfigError(
            f"track={config.track} cannot begin: {e}; see to its login and address, or set "
            "track=none"
        ) from e
    return Tracker(sink, out)


class Tracker:
    """Turns events into figures for a sink."""

    def __init__(self, client: TrackerClient, out: Path) -> None:
        """At a run that may have been begun before: its events tell how long its stages were."""
        self.client = client
        self.stage_steps: dict[int, int] = {}
        self.last_step: tuple[int, float, float] = (0, 0.0, 0.0)  # stage, tokens, seconds
        for event in load_events(out)[0]:
            self._record_stage_steps(event)

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Log what figures an event has."""
        self._record_stage_steps(event)
        values = {key: float(v) for key, v in self._metrics(event).items() if is_number(v)}
        if values:
            self.client.log(values, self._global_step(event))

    def close(self, finished: bool) -> None:
        """End the tracker's run; whether ours came to its end."""
        self.client.close(finished)

    def _record_stage_steps(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "stage":
            self.stage_steps[int(event["stage"])] = int(event.get("steps") or 0)

    def _global_step(self, event: Mapping[str, Any]) -> int:
        """Steps since the run began; what tells no step of its own came behind its stage."""
        stage = int(event["stage"])
        step = event.get("step")
        return sum(n for s, n in self.stage_steps.items() if s < stage) + int(
            self.stage_steps.get(stage, 0) if step is None else step
        )

    def _metrics(self, event: Mapping[str, Any]) -> dict[str, Any]:
        kind = event["event"]
        if kind == "step":
            stage, tokens, took = event["stage"], event["tokens"], event["seconds"]
            before = (
                self.last_step[1:]
                if self.last_step[0] == stage and self.last_step[2] < took
                else (0.0, 0.0)
            )
            self.last_step = (stage, tokens, took)
            return {
                "train/loss": event["loss"],
                "train/lr": event["lr"],
                "train/stage": stage,
                "train/tokens_per_second": (tokens - before[0]) / max(took - before[1], 1e-9),
                **{f"notes/{name}": value for name, value in event["notes"].items()},
            }
        if kind in ("score", "during"):
            scores = event["scores"]
            return {
                **{f"{kind}/{task}": value for task, value in scores.items()},
                f"{kind}/average": mean_or_none(scores.values()),
            }
        if kind == "checkpoint":
            return {
                "checkpoint/bytes": event["bytes"],
                "checkpoint/memory_bytes": event["memory_bytes"],
            }
        return (
            {f"summary/{name}": value for name, value in event["summary"].items()}
            if kind == "end"
            else {}
        )


def _load_run_id(out: Path) -> str:
    """What the tracker knows this run by, the same whenever it is resumed."""
    path = out / TRACKER_ID_FILE
    told = load_json(path) if path.is_file() else {}
    known = told.get("id") if isinstance(told, dict) else None
    if isinstance(known, str) and re.fullmatch(r"[0-9a-f]{12}", known):
        return known
    made = secrets.token_hex(6)
    write_atomically(path, f'{{"id": "{made}"}}\n')
    return made


def _mlflow_name(text: str) -> str:
    """As MLflow takes names."""
    return re.sub(r"[^\w\-. /:]", "_", text)
