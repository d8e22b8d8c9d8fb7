"""Build everything that a run works with, from its configuration.

The network comes last, since loading a large model takes minutes: mistakes are found before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from omegaconf import DictConfig

from continual.data.template import Encoder, Encoding
from continual.data.token_cache import TokenCache, load_or_tokenize
from continual.data.types import Stream
from continual.errors import ConfigError, listed
from continual.evaluation.probes.base import Probe, RunSetup
from continual.evaluation.scoring import EvalSet
from continual.models.model import Model
from continual.runs import build, validate
from continual.runs.forgetting_monitor import ForgettingMonitor
from continual.runs.settings import RunSettings
from continual.strategy.interface import Strategy
from continual.tracking.events import EventLog
from continual.training.recipe import Recipe


@dataclass
class RunSession:
    """Everything that a run works with; until `load_network` the model only tokenizes."""

    config: DictConfig
    settings: RunSettings
    stream: Stream
    model: Model
    strategy: Strategy
    recipe: Recipe
    encoder: Encoder
    test_sets: list[EvalSet]
    token_cache: TokenCache  # the rows of all stages
    probes: Mapping[str, Probe] = field(default_factory=dict)

    @property
    def test_encodings(self) -> list[Encoding]:
        """Return the encodings of all scored rows, also of those that were skipped."""
        return [encoding for test in self.test_sets for encoding in test.encodings]

    def load_network(self) -> None:
        """Load the network; raise ContinualError if that is not possible."""
        self.model = build.model(self.config, self.stream)


def prepare_session(config: DictConfig, out: Path) -> RunSession:
    """Build what the configuration names, except the network.

    Raises ContinualError for whatever is wrong with the configuration or the data.
    """
    settings = validate.check(config)
    # Before the stream, which may take long to read.
    strategy = build.strategy(config)
    recipe = build.recipe(config)
    validate.refuse_shards(config, strategy)
    validate.refuse_optimizer(config, strategy)
    stream = build.stream(config)
    without_dev = [stage.name for stage in stream.stages if not stage.dev]
    if recipe.patience and without_dev:
        raise ConfigError(
            f"train.patience={recipe.patience} stops by the loss on dev rows, and "
            f"there are none of {listed(without_dev)}; add some, or set "
            "train.patience=null"
        )
    model = build.reader(config, stream)
    encoder = build.encoder(config, model)
    test_sets = [build.test(config, t, encoder, i) for i, t in enumerate(stream.tasks)]
    probes = build.probes(config)
    for probe in probes.values():
        probe.prepare(RunSetup(config, stream, encoder, build.judge(config)))
    token_cache = load_or_tokenize(
        out / "tokens.safetensors", encoder, stream, include_dev=recipe.patience is not None
    )
    return RunSession(
        config,
        settings,
        stream,
        model,
        strategy,
        recipe,
        encoder,
        test_sets,
        token_cache,
        probes,
    )


def make_forgetting_monitor(out: Path, session: RunSession) -> ForgettingMonitor:
    """Make the monitor of forgetting within stages that the configuration asks for."""
    score = session.settings.score
    return ForgettingMonitor(
        session.model,
        session.strategy,
        session.stream,
        session.test_sets,
        partial(predictions_folder, out),
        score.every_steps,
        score.monitor_examples,
        score.batch_size,
        session.config.seed,
    )


def predictions_folder(out: Path, stage_number: int) -> Path:
    """Return the folder of the predictions after a stage."""
    return out / "predictions" / f"stage-{stage_number:02d}"


def report_unusable(encodings: Sequence[Encoding], events: EventLog) -> None:
    """Count and print the rows that were shortened, or skipped by data.on_unusable=skip."""
    skipped = [x.id for x in encodings if x.encoded is None]
    counts = {"skipped": len(skipped), "shortened": sum(x.shortened for x in encodings)}
    if any(counts.values()):
        events({"event": "data", **counts})
        events.print_line(
            f"inputs shortened to fit: {counts['shortened']}; examples skipped: "
            f"{counts['skipped']}" + (f" ({', '.join(skipped[:5])} ...)" if skipped else "")
        )
