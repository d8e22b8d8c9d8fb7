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
from continual.models.loading import add_adapter
from continual.models.model import Model
from continual.packing.batch import Batch, Layout
from continual.packing.support import detect_packing_support
from continual.results.matrix import Matrix
from continual.strategy.interface import Strategy
from continual.training.recipe import Recipe
from continual.training.stage import train_stage

VOCAB_SIZE, CONTEXT_LENGTH = 64, 32
TASK_NAMES = ("a", "b", "c", "d")
RECIPE = Recipe(lr=3e-3, epochs=2, batch_size=4)
SHORT_TASK_SIZE = 6  # examples of a stage that need not learn anything well


def make_llama(
    vocab_size: int = VOCAB_SIZE, context_length: int = CONTEXT_LENGTH, seed: int = 0
) -> Any:
    """A random Llama of two layers, hidden 32; transformers' norms and rotates in float32 whatever
    its dtype.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=64,
            max_position_embeddings=context_length,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=1,
        )
    )


def make_model(
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    net: Any = None,
    lora_rank: int = 0,
    **layout: Any,
) -> Model:
    """A network, by default a `llama`, as a Model on the CPU that spells its tokens as numbers.

    With a rank for `lora` that is all that trains, at a scale that learns as fast as the whole
    network.
    """
    net = (make_llama(seed=seed) if net is None else net).to(dtype)
    if lora_rank:
        settings = {"r": lora_rank, "lora_alpha": 16 * lora_rank, "target_modules": "all-linear"}
        net = add_adapter(net, "lora", {"lora": settings}, seq2seq=False)
    tokenizer = SimpleNamespace(all_special_ids=[0, 1], eos_token_id=0, decode=_decode)
    flat, last = detect_packing_support(net)
    made = Layout(**{"pad_token_id": 1, "device": torch.device("cpu"), "packed": flat, **layout})
    return Model(net.eval(), tokenizer, made, context_length=CONTEXT_LENGTH, last_layer=last)


def add_virtual_tokens(model: Model, tokens: int = 2) -> Model:
    """A model that gets so many virtual tokens, which alone train."""
    settings = {"num_virtual_tokens": tokens, "prompt_tuning_init": "SAMPLE_VOCAB"}
    dtype = next(model.net.parameters()).dtype
    model.net = (
        add_adapter(model.net, "prompt_tuning", {"prompt_tuning": settings}, seq2seq=False)
        .to(dtype)
        .eval()
    )
    model.set_prompt_prefix(())
    return model


def _decode(ids: Sequence[int], skip_special_tokens: bool = False) -> str:
    """What a tokenizer's `decode` would give."""
    return " ".join(map(str, ids))


def make_examples(task: int, n: int = 12, seed: int = 0) -> list[Encoded]:
    """Prompts of one to six tokens, responses of one to four that say what the task is: the
    prompt's first token + k.

    Their lengths differ, so that means over examples and over tokens do.
    """
    rng = random.Random(f"{seed}/{task}")
    found = []
    for i in range(n):
        prompt = [rng.randrange(2, VOCAB_SIZE) for _ in range(rng.randint(1, 6))]
        response = [
            (prompt[0] + 7 * task + j) % (VOCAB_SIZE - 2) + 2 for j in range(rng.randint(1, 4))
        ]
        mask = (False,) * len(prompt) + (True,) * len(response)
        found.append(
            Encoded(
                f"{TASK_NAMES[task]}/{i}",
                task,
                (*prompt, *response),
                mask,
                f"task {TASK_NAMES[task]}, row {i}",
            )
        )
    return found


def make_task(index: int, n: int = 12) -> Task[Encoded]:
    """The task of that index, with `n` training examples."""
    return Task(TASK_NAMES[index], tuple(make_examples(index, n)), task_names=TASK_NAMES)


def train_stages(
    model: Model,
    strategy: Strategy,
    *indices: int,
    size: int = 12,
    recipe: Recipe = RECIPE,
    **more: Any,
) -> None:
    """A stage for each task index; `more` goes to `continual.training.stage.train_stage`."""
    for i in indices:
        train_stage(
            model,
            make_task(i, size),
            strategy,
            recipe,
            seed=i,
            log_event=lambda event: None,
            **more,
        )


def empty_matrix() -> Matrix:
    """A matrix without a row, for checkpoints."""
    return Matrix(
        "toy", "given", "s", 0, TASK_NAMES, dict.fromkeys(TASK_NAMES, "exact_match"), (), ()
    )


def copy_parameters(model: Model) -> dict[str, torch.Tensor]:
    """A copy of every parameter, frozen or not."""
    return {n: p.detach().clone() for n, p in model.net.named_parameters()}


def copy_gradients(model: Model) -> dict[str, torch.Tensor | None]:
    """A copy of every parameter's gradient."""
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.net.named_parameters()}


def bitwise_equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two {name: tensor or None} agree bit for bit."""

    def equal(a: Any, b: Any) -> bool:
        return a is b if a is None or b is None else torch.equal(a, b)

    return one.keys() == other.keys() and all(equal(one[n], other[n]) for n in one)


def all_close(
    one: Mapping[str, Any], other: Mapping[str, Any], rtol: float = 1e-9, atol: float = 1e-10
) -> bool:
    """Whether two {name: tensor} agree but for rounding."""
    return one.keys() == other.keys() and all(
        torch.allclose(one[n], other[n], rtol, atol) for n in one
    )


def limit_micro_batch(model: Model, tokens: int) -> Model:
    """The same model with so many tokens at most in a forward pass."""
    return replace(model, layout=replace(model.layout, tokens_per_microbatch=tokens))


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
class CallCounter(Strategy):
    """Naive, and counts which of its moments are reached where it is composed with another
    strategy.
    """

    calls: Counter[str] = field(init=False, repr=False, default_factory=Counter)

    def __post_init__(self) -> None:
        """Count it."""
        super().__post_init__()
        self.calls["__post_init__"] += 1

    def begin(self, model: Model, task: Task[Encoded]) -> list[Any]:
        """Count it."""
        self.calls["begin"] += 1
        return super().begin(model, task)

    def loss(self, model: Model, batch: Batch) -> torch.Tensor:
        """Count it."""
        self.calls["loss"] += 1
        return super().loss(model, batch)

    def end(self, model: Model, task: Task[Encoded]) -> None:
        """Count it."""
        self.calls["end"] += 1
        super().end(model, task)
