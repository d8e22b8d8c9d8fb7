"""The models and rows that the benchmarks work on: random weights, and rows of a stream or of
random tokens.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import ASKED, Step
from continual.data.template import Encoder
from continual.data.types import Encoded, Example
from continual.models.loading import assemble
from continual.models.model import Model
from continual.packing.batch import Batch
from continual.packing.layout import common_prefix_length
from continual.training.scratch import train_byte_bpe

VOCABULARY, CONTEXT, LIMIT = 8192, 1024, 512
LR, CLIP = 1e-3, 1.0
TASKS = ("agnews", "MNLI", "dbpedia", "amazon", "yelp")
LORA = {
    "lora": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
}
# What a strategy needs of a run beside its own configuration.
NEEDED = {
    "avalanche": [
        "strategy.avalanche.plugin=SynapticIntelligencePlugin",
        "+strategy.avalanche.args.si_lambda=1",
    ],
    "incremental_lora": ["model.adapter=lora", "strategy.incremental_lora.rank=1"],
    "olora": ["model.adapter=lora", "strategy.olora.rank=1"],
    "slao": ["model.adapter=lora"],
    "gain_lora": ["model.adapter=lora", "strategy.gain_lora.rank=1"],
    "la_maml": ["train.optimizer=sgd", "train.lr=3"],
    "progressive_prompts": ["model.adapter=prompt_tuning"],
}
# Tokens by an 8k BPE trained on the five tasks' training rows (cut at 512): the instruction, then
# deciles of the inputs and quintiles of the responses.
LENGTHS = {
    "agnews": (30, (27, 48, 54, 59, 63, 67, 71, 76, 81, 88, 164), (2, 2, 2, 2, 4, 4)),
    "MNLI": (35, (12, 23, 29, 34, 40, 45, 51, 57, 65, 80, 278), (2, 2, 2, 2, 2, 2)),
    "dbpedia": (54, (20, 41, 52, 64, 78, 90, 102, 116, 127, 138, 373), (2, 2, 2, 2, 3, 4)),
    "amazon": (32, (28, 44, 57, 72, 89, 109, 128, 151, 175, 211, 439), (2, 2, 2, 2, 3, 3)),
    "yelp": (32, (4, 38, 59, 84, 111, 137, 173, 220, 293, 398, 478), (2, 2, 2, 3, 3, 3)),
}


@dataclass(frozen=True)
class Shape:
    """A Llama's."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = VOCABULARY


SHAPES = {
    "3M": Shape(192, 512, 4, 6, 6),
    "37M": Shape(512, 1024, 8, 8, 8, 32768),
    "0.5B": Shape(896, 4864, 24, 14, 2, 151936),
    "1.5B": Shape(1536, 8960, 28, 12, 2, 151936),
}


def model(shape: Shape, adapter: str = "lora", *, bf16: bool = False, device: str = "cpu") -> Model:
    """A Llama of random weights, the same at every call, with LoRA on q and v or wholly trained
    ("none").
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    with torch.device(device):
        net = LlamaForCausalLM(config)
    made = assemble(net, tokenizer(None), device=device, adapter=adapter, adapters=LORA)
    made.bf16 = bf16
    made.net.train()
    return made


def stirred(shape: Shape, adapter: str, bf16: bool, device: str) -> Model:
    """The same with LoRA's second half away from its zeros, where the first would have no gradient."""
    made = model(shape, adapter, bf16=bf16, device=device)
    for name, p in made.net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)
    return made


def stepper(
    model: Model,
    groups: Sequence[Any],
    backward: Callable[[Model, Batch], Tensor],
    batches: Iterable[Sequence[Encoded]],
) -> Step:
    """What `continual.training.stage.train_stage` does between two logs, on one batch after another;
    `groups` is what it trains.
    """
    model.net.train()
    optimizer = torch.optim.AdamW(groups, lr=LR, weight_decay=0.0, fused=True)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    following = iter(batches)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = backward(model, model.batch(next(following)))
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        return loss

    return step


def write_small(
    root: Path, rows: Mapping[str, Mapping[str, Sequence[Mapping[str, str]]]]
) -> list[str]:
    """A stream of these rows, by task and split, and a small random Llama for it, written into
    `root`; a run's keys.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from streams.folder import load_folder

    stream = root / "stream"
    for task, splits in rows.items():
        (stream / task).mkdir(parents=True, exist_ok=True)
        for split, told in splits.items():
            (stream / task / f"{split}.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in told)
            )
    (stream / "stream.json").write_text(json.dumps({"tasks": [{"name": task} for task in rows]}))
    words = train_byte_bpe(
        [e for t in load_folder(path=str(stream), seed=0).tasks for e in t.train], 400, 64
    )
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=words.eos_token_id,
        )
    ).save_pretrained(root / "model")
    words.save_pretrained(root / "model")
    return [
        "stream=folder",
        f"stream.path={stream}",
        "model=hf",
        f"model.name={root / 'model'}",
        "device=cpu",
    ]


@cache
def tokenizer(data: Path | None) -> Any:
    """A byte-level BPE trained on the stream's training rows; without a stream one that only knows
    bytes.
    """
    corpus = [e for task in TASKS for e in _stream(data)[task]] if data else []
    return train_byte_bpe(corpus, VOCABULARY, CONTEXT)


@cache
def _stream(data: Path) -> dict[str, Sequence[Example]]:
    from streams.folder import load_folder

    stream = load_folder(path=str(data), seed=0, tasks=list(TASKS))
    return {task.name: task.train for task in stream.tasks}


def source() -> str:
    """What stands behind a work's name."""
    return "" if ASKED.data else " (synthetic)"


def rows(task: str, n: int) -> list[Encoded]:
    """`n` training rows in random order: of the stream that was asked for, or synthetic."""
    rng = random.Random(task)
    if not ASKED.data:
        return _synthetic(task, n, rng)
    encoder = Encoder(tokenizer(ASKED.data), "plain", LIMIT)
    chosen = rng.sample(list(_stream(ASKED.data)[task]), n)
    return [encoder.encode_example(e, 0).require() for e in chosen]


def behind(instruction: int, examples: Sequence[Encoded]) -> list[Encoded]:
    """The rows with what their prompts share replaced by one instruction of so many tokens."""
    asked = [e.ids[: e.response_mask.index(True) - 1] for e in examples]
    shared = common_prefix_length(min(asked), max(asked))  # what these two begin with, all do
    ids = _draw(random.Random(0), instruction)
    return [
        Encoded(
            e.id,
            e.task_index,
            (*ids, *e.ids[shared:]),
            (*[False] * instruction, *e.response_mask[shared:]),
        )
        for e in examples
    ]


def _synthetic(task: str, n: int, rng: random.Random) -> list[Encoded]:
    """Rows of random tokens of this task's lengths, behind one instruction."""
    length, inputs, responses = LENGTHS[task]
    instruction = _draw(rng, length)
    made = []
    for i in range(n):
        asked, answer = (_draw(rng, _quantile(q, rng)) for q in (inputs, responses))
        ids = (*instruction, *asked, *answer)
        made.append(
            Encoded(
                f"{task}/{i}", 0, ids, (*[False] * (length + len(asked)), *[True] * len(answer))
            )
        )
    return made


def _draw(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(1, VOCABULARY) for _ in range(n)]


def _quantile(quantiles: Sequence[int], rng: random.Random) -> int:
    """A number of the distribution with these evenly spaced quantiles, linear between them."""
    at, part = divmod(rng.random() * (len(quantiles) - 1), 1)
    low, high = quantiles[int(at)], quantiles[int(at) + 1]
    return round(low + part * (high - low))
