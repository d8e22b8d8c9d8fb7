"""The toy model and tasks of `continual.testing.toy`, and what tests of strategies measure them by."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from hydra import compose as compose_config
from hydra import initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from continual.data.types import Encoded, Task
from continual.models.model import Model
from continual.runs import build
from continual.runs.rehearse import CostCounterMode, StageCost, rehearse
from continual.strategy.interface import Strategy
from continual.testing import toy
from continual.testing.toy import (
    RECIPE,
    SHORT_TASK_SIZE,
    TASK_NAMES,
    VOCAB_SIZE,
    all_close,
    bitwise_equal,
    copy_gradients,
    copy_parameters,
    empty_matrix,
    limit_micro_batch,
    make_examples,
    make_task,
    memory_tensors,
    train_stages,
)
from continual.training.recipe import Recipe
from tests.support.models import make_network

__all__ = [
    "RECIPE",
    "SHORT_TASK_SIZE",
    "TASK_NAMES",
    "VOCAB_SIZE",
    "Task",
    "all_close",
    "bitwise_equal",
    "copy_gradients",
    "copy_parameters",
    "empty_matrix",
    "limit_micro_batch",
    "make_examples",
    "make_task",
    "memory_tensors",
    "replace",
    "train_stages",
]
STRATEGY_CONF = Path(__file__).parents[2] / "conf" / "strategy"


def make_model(
    dtype: torch.dtype = torch.float32, seed: int = 0, kind: str = "llama", **more
) -> Model:
    """A network of two layers, hidden 32, of this architecture."""
    return toy.make_model(
        dtype, net=make_network(kind, VOCAB_SIZE, context=toy.CONTEXT_LENGTH, seed=seed), **more
    )


def make_prompt_model(
    dtype: torch.dtype = torch.float32, virtual_tokens: int = 2, kind: str = "llama", **layout
) -> Model:
    """The same model with so many virtual tokens, which alone train."""
    return toy.add_virtual_tokens(make_model(dtype, kind=kind, **layout), virtual_tokens)


@cache
def compose_run_config(*overrides: str) -> DictConfig:
    """The configuration of `continual run` on a stream folder that no one opens; Hydra's global
    state stays clean.
    """
    with initialize_config_module("conf", version_base=None):
        return compose_config("run", ["stream=folder", "stream.path=x", "out=x", *overrides])


def strategy_from_config(names: str, *overrides: str) -> Strategy:
    """The strategy of these configs, such as "replay" or "replay,ewc"; their files alone are read,
    which is quick.
    """
    made = OmegaConf.create({"seed": 0, "strategy": {}})
    for name in names.split(","):
        made.strategy.merge_with(OmegaConf.load(STRATEGY_CONF / f"{name}.yaml"))
    for told in OverridesParser.create().parse_overrides(list(overrides)):
        OmegaConf.update(made, told.key_or_group, told.value(), force_add=told.is_add())
    return build.strategy(made)


def rehearse_stages(
    network, strategy: Strategy, recipe: Recipe, stages: int = 2
) -> list[StageCost]:
    """Stages without numbers, of at most two steps each, on the model that `network` makes."""
    ghosts = CostCounterMode()
    with ghosts.meta_device():
        made = network()
    ghosts.convert_to_fake(made.net)
    return [
        rehearse(ghosts, made, make_task(i), strategy, recipe, steps=2, seed=i)
        for i in range(stages)
    ]


def log_likelihood(net, e: Encoded) -> torch.Tensor:
    """The response's, straight from the network's own logits at every position; a scalar."""
    logits = net(input_ids=torch.tensor([e.ids])).logits[0]
    return sum(
        logits[t - 1].log_softmax(-1)[e.ids[t]] for t in range(1, len(e.ids)) if e.response_mask[t]
    )


def mean_loss(net, examples: list[Encoded]) -> torch.Tensor:
    """The mean over the response tokens of all of them, one example at a time; a scalar."""
    return -sum(log_likelihood(net, e) for e in examples) / sum(
        sum(e.response_mask) for e in examples
    )


@contextmanager
def no_fused_attention():
    """Fused attention has no second derivative."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield
