"""A language model of a few thousand weights and seeded tasks of random tokens, for tests of strategies."""

from __future__ import annotations

import json
import random
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch
from hydra import compose as compose_config
from hydra import initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from small import network

from continual import build
from continual.data import Encoded, Task
from continual.matrix import Matrix
from continual.model import Model
from continual.packing import Layout
from continual.probe import probe
from continual.stage import Recipe, learn
from continual.strategy import Strategy
from continual.values import to_json

VOCABULARY = 64
NAMES = ("a", "b", "c", "d")
CONF = Path(__file__).parents[1] / "conf" / "strategy"
RECIPE = Recipe(lr=3e-3, epochs=2, batch_size=4)


def spelled(ids, skip_special_tokens=False) -> str:
    """What a tokenizer's `decode` would give."""
    return " ".join(map(str, ids))


def model(dtype: torch.dtype = torch.float32, seed: int = 0, kind: str = "llama", **layout) -> Model:
    """A network of two layers, hidden 32; transformers' Llama norms and rotates in float32 whatever its dtype."""
    net = network(kind, VOCABULARY, context=32, seed=seed).to(dtype)
    tokenizer = SimpleNamespace(all_special_ids=[0, 1], eos_token_id=0, decode=spelled)
    flat, last = probe(net)
    made = Layout(**{"pad": 1, "device": torch.device("cpu"), "flat": flat, **layout})
    return Model(net.eval(), tokenizer, made, context=32, last=last)


def examples(task: int, n: int = 12, seed: int = 0) -> list[Encoded]:
    """Prompts of one to six tokens, responses of one to four that say what the task is: the prompt's first token + k.

    Their lengths differ, so that means over examples and over tokens do.
    """
    rng = random.Random(f"{seed}/{task}")
    found = []
    for i in range(n):
        prompt = [rng.randrange(2, VOCABULARY) for _ in range(rng.randint(1, 6))]
        response = [(prompt[0] + 7 * task + j) % (VOCABULARY - 2) + 2 for j in range(rng.randint(1, 4))]
        mask = (False,) * len(prompt) + (True,) * len(response)
        found.append(Encoded(f"{NAMES[task]}/{i}", task, (*prompt, *response), mask, f"task {NAMES[task]}, row {i}"))
    return found


def task(index: int, n: int = 12) -> Task[Encoded]:
    return Task(NAMES[index], tuple(examples(index, n)), columns=NAMES)


def train(made: Model, strategy: Strategy, *indices: int, n: int = 12, recipe: Recipe = RECIPE) -> None:
    """A stage for each task index."""
    for i in indices:
        learn(made, task(i, n), strategy, recipe, seed=i, log=lambda event: None)


@cache
def config(*overrides: str) -> DictConfig:
    """The configuration of `continual run` on a stream folder that no one opens; Hydra's global state stays clean."""
    with initialize_config_module("conf", version_base=None):
        return compose_config("run", ["stream=folder", "stream.path=x", "out=x", *overrides])


def configured(names: str, *overrides: str) -> Strategy:
    """The strategy of these configs, such as "replay" or "replay,ewc"; their files alone are read, which is quick."""
    made = OmegaConf.create({"seed": 0, "strategy": {}})
    for name in names.split(","):
        made.strategy.merge_with(OmegaConf.load(CONF / f"{name}.yaml"))
    for told in OverridesParser.create().parse_overrides(list(overrides)):
        OmegaConf.update(made, told.key_or_group, told.value(), force_add=told.is_add())
    return build.strategy(made)


def matrix() -> Matrix:
    return Matrix("toy", "given", "s", 0, NAMES, dict.fromkeys(NAMES, "exact_match"), (), ())


def everything(made: Model) -> dict[str, torch.Tensor]:
    """A copy of every parameter, frozen or not."""
    return {n: p.detach().clone() for n, p in made.net.named_parameters()}


def gradients(made: Model) -> dict[str, torch.Tensor | None]:
    """A copy of every parameter's gradient."""
    return {n: None if p.grad is None else p.grad.clone() for n, p in made.net.named_parameters()}


def same(one: dict, other: dict) -> bool:
    """Whether two {name: tensor} agree bit for bit."""
    def equal(a, b):
        return a is b if a is None or b is None else torch.equal(a, b)

    return one.keys() == other.keys() and all(equal(one[n], other[n]) for n in one)


def close(one: dict, other: dict, rtol: float = 1e-9, atol: float = 1e-10) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[n], other[n], rtol, atol) for n in one)


def in_micro_batches(made: Model, tokens: int) -> Model:
    return replace(made, layout=replace(made.layout, tokens=tokens))


def log_likelihood(net, e: Encoded) -> torch.Tensor:
    """The response's, straight from the network's own logits at every position; a scalar."""
    logits = net(input_ids=torch.tensor([e.ids])).logits[0]
    return sum(logits[t - 1].log_softmax(-1)[e.ids[t]] for t in range(1, len(e.ids)) if e.response[t])


def mean_loss(net, chosen: list[Encoded]) -> torch.Tensor:
    """The mean over the response tokens of all of them, one example at a time; a scalar."""
    return -sum(log_likelihood(net, e) for e in chosen) / sum(sum(e.response) for e in chosen)


@contextmanager
def no_fused_attention():
    """Fused attention has no second derivative."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield


def memory_tensors(strategy: Strategy) -> dict[str, torch.Tensor]:
    """Every tensor in the strategy's memory, by its path."""
    def walk(value, path):
        if isinstance(value, torch.Tensor):
            return {path: value}
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        return {k: v for key, part in items for k, v in walk(part, f"{path}/{key}").items()}

    return walk(strategy.state_dict(), "")


def remembered(strategy: Strategy) -> tuple[str, dict[str, bytes]]:
    """What a checkpoint would hold of a strategy, to the bit."""
    tensors: dict[str, torch.Tensor] = {}
    told = json.dumps(to_json(strategy.state_dict(), "memory", tensors))
    return told, {n: t.reshape(-1).view(torch.uint8).numpy().tobytes() for n, t in tensors.items()}
