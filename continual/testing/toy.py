"""A language model of a few thousand weights and seeded tasks of random tokens: what a strategy is
tried on.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch

from continual.data.types import Encoded, Task
from continual.models.loading import adapt_with
from continual.models.model import Model
from continual.packing.batch import Batch, Layout
from continual.packing.support import probe
from continual.results.matrix import Matrix
from continual.strategy.interface import Strategy
from continual.training.recipe import Recipe
from continual.training.stage import learn

VOCABULARY, CONTEXT = 64, 32
NAMES = ("a", "b", "c", "d")
RECIPE = Recipe(lr=3e-3, epochs=2, batch_size=4)
SHORT = 6  # examples of a stage that need not learn anything well


def llama(vocabulary: int = VOCABULARY, context: int = CONTEXT, seed: int = 0) -> Any:
    """A random Llama of two layers, hidden 32; transformers' norms and rotates in float32 whatever
    its dtype.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=64,
            max_position_embeddings=context,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=1,
        )
    )


def model(
    dtype: torch.dtype = torch.float32, seed: int = 0, net: Any = None, lora: int = 0, **layout: Any
) -> Model:
    """A network, by default a `llama`, as a Model on the CPU that spells its tokens as numbers.

    With a rank for `lora` that is all that trains, at a scale that learns as fast as the whole
    network.
    """
    net = (llama(seed=seed) if net is None else net).to(dtype)
    if lora:
        settings = {"r": lora, "lora_alpha": 16 * lora, "target_modules": "all-linear"}
        net = adapt_with(net, "lora", {"lora": settings}, seq2seq=False)
    tokenizer = SimpleNamespace(all_special_ids=[0, 1], eos_token_id=0, decode=_spelled)
    flat, last = probe(net)
    made = Layout(**{"pad": 1, "device": torch.device("cpu"), "flat": flat, **layout})
    return Model(net.eval(), tokenizer, made, context=CONTEXT, last=last)


def prompted(made: Model, tokens: int = 2) -> Model:
    """A model that gets so many virtual tokens, which alone train."""
    settings = {"num_virtual_tokens": tokens, "prompt_tuning_init": "SAMPLE_VOCAB"}
    dtype = next(made.net.parameters()).dtype
    made.net = (
        adapt_with(made.net, "prompt_tuning", {"prompt_tuning": settings}, seq2seq=False)
        .to(dtype)
        .eval()
    )
    made.behind(())
    return made


def _spelled(ids: Sequence[int], skip_special_tokens: bool = False) -> str:
    """What a tokenizer's `decode` would give."""
    return " ".join(map(str, ids))


def examples(task: int, n: int = 12, seed: int = 0) -> list[Encoded]:
    """Prompts of one to six tokens, responses of one to four that say what the task is: the
    prompt's first token + k.

    Their lengths differ, so that means over examples and over tokens do.
    """
    rng = random.Random(f"{seed}/{task}")
    found = []
    for i in range(n):
        prompt = [rng.randrange(2, VOCABULARY) for _ in range(rng.randint(1, 6))]
        response = [
            (prompt[0] + 7 * task + j) % (VOCABULARY - 2) + 2 for j in range(rng.randint(1, 4))
        ]
        mask = (False,) * len(prompt) + (True,) * len(response)
        found.append(
            Encoded(
                f"{NAMES[task]}/{i}",
                task,
                (*prompt, *response),
                mask,
                f"task {NAMES[task]}, row {i}",
            )
        )
    return found


def task(index: int, n: int = 12) -> Task[Encoded]:
    """The task of that index, with `n` training examples."""
    return Task(NAMES[index], tuple(examples(index, n)), columns=NAMES)


def train(
    made: Model,
    strategy: Strategy,
    *indices: int,
    n: int = 12,
    recipe: Recipe = RECIPE,
    **more: Any,
) -> None:
    """A stage for each task index; `more` goes to `continual.training.stage.learn`."""
    for i in indices:
        learn(made, task(i, n), strategy, recipe, seed=i, log=lambda event: None, **more)


def matrix() -> Matrix:
    """A matrix without a row, for checkpoints."""
    return Matrix("toy", "given", "s", 0, NAMES, dict.fromkeys(NAMES, "exact_match"), (), ())


def everything(made: Model) -> dict[str, torch.Tensor]:
    """A copy of every parameter, frozen or not."""
    return {n: p.detach().clone() for n, p in made.net.named_parameters()}


def gradients(made: Model) -> dict[str, torch.Tensor | None]:
    """A copy of every parameter's gradient."""
    return {n: None if p.grad is None else p.grad.clone() for n, p in made.net.named_parameters()}


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two {name: tensor or None} agree bit for bit."""

    def equal(a: Any, b: Any) -> bool:
        return a is b if a is None or b is None else torch.equal(a, b)

    return one.keys() == other.keys() and all(equal(one[n], other[n]) for n in one)


def close(
    one: Mapping[str, Any], other: Mapping[str, Any], rtol: float = 1e-9, atol: float = 1e-10
) -> bool:
    """Whether two {name: tensor} agree but for rounding."""
    return one.keys() == other.keys() and all(
        torch.allclose(one[n], other[n], rtol, atol) for n in one
    )


def in_micro_batches(made: Model, tokens: int) -> Model:
    """The same model with so many tokens at most in a forward pass."""
    return replace(made, layout=replace(made.layout, tokens=tokens))


def memory_tensors(strategy: Strategy) -> dict[str, torch.Tensor]:
    """Every tensor in the strategy's memory, by its path."""

    def walk(value: Any, path: str) -> dict[str, torch.Tensor]:
        if isinstance(value, torch.Tensor):
            return {path: value}
        items = (
            value.items()
            if isinstance(value, dict)
            else enumerate(value)
            if isinstance(value, list | tuple)
            else ()
        )
        return {k: v for key, part in items for k, v in walk(part, f"{path}/{key}").items()}

    return walk(strategy.state_dict(), "")


@dataclass(kw_only=True)
class Counting(Strategy):
    """Naive, and counts which of its moments are reached where it is composed with another
    strategy.
    """

    reached: Counter[str] = field(init=False, repr=False, default_factory=Counter)

    def __post_init__(self) -> None:
        """Count it."""
        super().__post_init__()
        self.reached["__post_init__"] += 1

    def begin(self, model: Model, task: Task[Encoded]) -> list[Any]:
        """Count it."""
        self.reached["begin"] += 1
        return super().begin(model, task)

    def loss(self, model: Model, batch: Batch) -> torch.Tensor:
        """Count it."""
        self.reached["loss"] += 1
        return super().loss(model, batch)

    def end(self, model: Model, task: Task[Encoded]) -> None:
        """Count it."""
        self.reached["end"] += 1
        super().end(model, task)
