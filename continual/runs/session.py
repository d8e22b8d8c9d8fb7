"""All that a run works with, built as its configuration says: the weights last, for a large model's
take minutes.
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
from continual.strategy.interface import Strategy
from continual.tracking.events import EventLog
from continual.training.recipe import Recipe


@dataclass
class RunSession:
    """All that a run works with; until `load` the model only tokenises."""

    config: DictConfig
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
        """Give the model its network; raises ContinualError for what is wrong with it."""
        self.model = build.model(self.config, self.stream)


def prepare_session(config: DictConfig, out: Path) -> RunSession:
    """Build what the configuration names but the network; raises ContinualError for whatever is
    wrong with it.
    """
    validate.check(config)
    strategy, recipe = (
        build.strategy(config),
        build.recipe(config),
    )  # before anything that takes long
    validate.refuse_shards(config, strategy)
    validate.refuse_optimizer(config, strategy)
    stream = build.stream(config)
    if recipe.patience and (bare := [stage.name for stage in stream.stages if not stage.dev]):
        raise ConfigError(
            f"train.patience={recipe.patience} stops by the loss on dev rows, and "
            f"there are none of {listed(bare)}; add some, or set "
            "train.patience=null"
        )
    model = build.reader(config, stream)
    encoder = build.encoder(config, model)
    tests = [build.test(config, t, encoder, i) for i, t in enumerate(stream.tasks)]
    probes = build.probes(config)
    for probe in probes.values():
        probe.prepare(RunSetup(config, stream, encoder, build.judge(config)))
    tokens = load_or_tokenize(
        out / "tokens.safetensors", encoder, stream, include_dev=recipe.patience is not None
    )
    return RunSession(config, stream, model, strategy, recipe, encoder, tests, tokens, probes)


def make_forgetting_monitor(out: Path, session: RunSession) -> ForgettingMonitor:
    """What looks at forgetting within stages, as the configuration asks."""
    s = session.config.score
    return ForgettingMonitor(
        session.model,
        session.strategy,
        session.stream,
        session.test_sets,
        partial(predictions_folder, out),
        s.every_steps,
        s.monitor_examples,
        s.batch_size,
        session.config.seed,
    )


def predictions_folder(out: Path, stage_number: int) -> Path:
    """Where the answers after a stage stand."""
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
