"""One optimizer step of masked SFT on 32 examples: this engine, a padded batch of its own, and the
stock trainers.

Llamas of random weights with LoRA (r=8 on q and v) or wholly trained, AdamW, the same learning
rate, clipping and order of examples in every arm; an arm makes its batches within its step. The
arms:

- continual: the engine's step as it comes; low memory: the same with at most 1024 tokens in a
  forward pass.
- padded: the engine's padded batch, the LM head on response positions only. padded sorted: the same
  cut at the engine's budget of tokens after sorting by length, what a model gets that cannot read
  flat rows.
- trl: SFTTrainer on prompts and completions, the loss on completions only. trainer: transformers'
  Trainer, prompts labelled -100. Both log, save and evaluate nothing, and keep activations (no
  checkpointing).

padded, trl and trainer run at their best micro-batch of 8, 16 and 32, accumulated to the same 32
examples; full fine-tuning at the one that was best with LoRA at the same size. The losses of the
first steps stand beside each arm; a run in which they differ by more than rounding fails. Peak
share: the step's executed FLOPs a second against a large matrix product's in the same dtype, run in
the same rounds. Memory is measured in a process of its own. "ratio to" is in examples a second.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import works
from benchmarks.common import (
    ASKED,
    Row,
    Step,
    flops,
    interleaved,
    matmul,
    medians,
    peaks,
    ratios,
    row,
)
from continual.data.types import Encoded
from continual.models.loss import accumulate, nll
from continual.models.model import Model
from continual.packing.batch import Batch
from continual.strategy.interface import Strategy

EXAMPLES, CYCLE = 32, 3
COMPARED = 4  # steps whose losses are compared
MICRO = (8, 16, 32)
LOW = 1024  # tokens in a forward pass of the low-memory arm
WHOLE = 10**9
STOCK = ("trl", "trainer")
PEERS = ("padded", *STOCK)


@dataclass(frozen=True)
class Work:
    """What all arms do: CYCLE steps' examples, over and over, in this order."""

    name: str
    examples: tuple[Encoded, ...]
    shape: works.Shape
    adapter: str = "lora"
    bf16: bool = False
    device: str = "cpu"
    memory: bool = True  # whether it is measured too

    def model(self, **layout: Any) -> Model:
        """The model before its first step, its batches laid out so."""
        made = works.model(self.shape, self.adapter, bf16=self.bf16, device=self.device)
        made.layout = replace(made.layout, **layout)
        return made

    def batches(self) -> Iterator[Sequence[Encoded]]:
        """The examples of one step after another."""
        steps = [self.examples[i : i + EXAMPLES] for i in range(0, len(self.examples), EXAMPLES)]
        return itertools.cycle(steps)


def engine(work: Work, tokens: int | None = None) -> Step:
    """This project's step: what `continual.training.stage.train_stage` does between two logs; the
    engine's own budget of tokens.
    """
    model = work.model(**({"tokens_per_microbatch": tokens} if tokens else {}))
    return _step(work, model, Strategy().backward)


def padded(work: Work, micro: int) -> Step:
    """The engine's step on padded batches of `micro` examples in the order given."""

    def backward(model: Model, batch: Batch) -> Tensor:
        return accumulate(
            nll, model, [batch.select(range(i, i + micro)) for i in range(0, EXAMPLES, micro)]
        )

    return _step(work, work.model(packed=False, tokens_per_microbatch=WHOLE), backward)


def padded_sorted(work: Work) -> Step:
    """The engine's step on padded batches that it cuts itself."""
    return _step(work, work.model(packed=False), Strategy().backward)


def _step(work: Work, model: Model, backward: Callable[[Model, Batch], Tensor]) -> Step:
    return works.stepper(
        model, [p for p in model.net.parameters() if p.requires_grad], backward, work.batches()
    )


def settings(work: Work, micro: int, **more: Any) -> dict[str, Any]:
    """The arguments that both stock trainers take."""
    return {
        "output_dir": tempfile.gettempdir(),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": EXAMPLES // micro,
        "learning_rate": works.LR,
        "weight_decay": 0.0,
        "max_grad_norm": works.CLIP,
        "optim": "adamw_torch_fused",
        "lr_scheduler_type": "constant",
        "bf16": work.bf16,
        "use_cpu": work.device == "cpu",
        "train_sampling_strategy": "sequential",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": work.device != "cpu",
        **more,
    }


def trl(work: Work, micro: int) -> Step:
    """TRL's SFTTrainer, on prompts and completions as ids."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    rows = [
        {"input_ids": list(e.ids), "completion_mask": [int(r) for r in e.response_mask]}
        for e in work.examples
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
        config = SFTConfig(
            **settings(
                work,
                micro,
                completion_only_loss=True,
                max_length=None,
                gradient_checkpointing=False,
            )
        )  # it is on by default, and costs a forward pass
    net = work.model()
    return _trainer_step(
        SFTTrainer(
            net.net,
            config,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=net.tokenizer,
        )
    )


def trainer(work: Work, micro: int) -> Step:
    """transformers' Trainer and its collator for labelled rows."""
    import datasets
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    rows = [
        {
            "input_ids": list(e.ids),
            "attention_mask": [1] * len(e.ids),
            "labels": [t if r else -100 for t, r in zip(e.ids, e.response_mask, strict=True)],
        }
        for e in work.examples
    ]
    net = work.model()
    return _trainer_step(
        Trainer(
            net.net,
            TrainingArguments(**settings(work, micro)),
            train_dataset=datasets.Dataset.from_list(rows),
            data_collator=DataCollatorForSeq2Seq(net.tokenizer),
        )
    )


def _trainer_step(made: Any) -> Step:
    """An optimizer step as the body of Trainer.train's loop takes it, without its callbacks,
    counters and logs.
    """
    made.create_optimizer()
    model, made.optimizer = made.accelerator.prepare(made.model, made.optimizer)
    parts = made.args.gradient_accumulation_steps
    made.current_gradient_accumulation_steps = parts
    loader = made.get_train_dataloader()
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def step() -> Tensor:
        micro, tokens = made.get_batch_samples(batches, parts, made.args.device)
        loss = torch.stack([made.training_step(model, m, tokens) for m in micro]).sum()
        made.accelerator.clip_grad_norm_(model.parameters(), works.CLIP)
        made.optimizer.step()
        model.zero_grad()
        return loss

    return step


BUILDERS: Mapping[str, Callable[..., Step]] = {
    "continual": engine,
    "low memory": partial(engine, tokens=LOW),
    "padded sorted": padded_sorted,
    "padded": padded,
    "trl": trl,
    "trainer": trainer,
}


def build(arm: str, micro: int | None, work: Work) -> Step:
    """One arm's step; those with a choice of micro-batch are told theirs."""
    return BUILDERS[arm](work, micro) if micro else BUILDERS[arm](work)


def run() -> list[Row]:
    """All works; raises RuntimeError where two arms' losses differ by more than rounding."""
    found: list[Row] = []
    for work, arms, seconds in _works():
        found += measure(work, arms, seconds, _chosen(found) if work.adapter == "none" else {})
    return found


def _chosen(rows: Sequence[Row]) -> dict[str, int]:
    """The micro-batch at which each peer was best in the work before."""
    return {r["arm"]: r["micro_batch"] for r in rows if r["micro_batch"]}


def _works() -> Iterator[tuple[Work, Sequence[str], float]]:
    """Each work with its arms and the seconds that its rounds may take."""
    arms, n = list(BUILDERS), EXAMPLES * CYCLE
    source = works.source()
    if ASKED.gpu:
        long = works.behind(512, works.rows("agnews", n))
        for shape in ("0.5B", "1.5B"):
            for name, rows in [
                *((t, works.rows(t, n)) for t in ("agnews", "yelp")),
                ("512-token instruction", long),
            ]:
                yield (
                    Work(
                        f"{shape} LoRA bf16, {name}{source}",
                        tuple(rows),
                        works.SHAPES[shape],
                        bf16=True,
                        device="cuda",
                    ),
                    arms,
                    20,
                )
        return
    few = ("continual", *PEERS)
    for task in works.TASKS:
        whole = task == "agnews"
        yield (
            Work(
                f"3M LoRA, {task}{source}",
                tuple(works.rows(task, n)),
                works.SHAPES["3M"],
                memory=whole,
            ),
            arms if whole else few,
            6,
        )
    agnews = tuple(works.rows("agnews", n))
    long = works.behind(150, agnews)
    yield Work(f"3M LoRA, 150-token instruction{source}", tuple(long), works.SHAPES["3M"]), arms, 6
    for name, adapter, bf16, which in (
        ("LoRA", "lora", False, ("continual", "low memory", *PEERS)),
        ("full", "none", False, few),
        ("LoRA bf16", "lora", True, ("continual", "padded")),
    ):
        yield (
            Work(f"37M {name}, agnews{source}", agnews, works.SHAPES["37M"], adapter, bf16),
            which,
            10,
        )


def measure(
    work: Work, arms: Sequence[str], seconds: float, chosen: Mapping[str, int] | None = None
) -> list[Row]:
    """The work's rows: every candidate's first steps, the best of each arm in rounds, then their
    memory.

    A peer whose micro-batch is `chosen` is not tried at others.
    """
    tried = {arm: [chosen[arm]] if chosen and arm in chosen else MICRO for arm in PEERS}
    candidates = [(arm, micro) for arm in arms for micro in tried.get(arm, (None,))]
    losses: dict[Any, list[float]] = {c: [] for c in candidates}
    steps = {c: partial(_noted, build(*c, work), losses[c]) for c in candidates}
    first = interleaved(steps, seconds=0, least=1, warmup=0)
    best = {
        arm: min((c for c in candidates if c[0] == arm), key=lambda c: min(first[c]))
        for arm in arms
    }
    steps = {c: steps[c] for c in best.values()}
    dtype = torch.bfloat16 if work.bf16 else torch.float32
    product, product_flops = matmul(dtype, torch.device(work.device))
    spent = interleaved(
        {**{arm: steps[c] for arm, c in best.items()}, "matmul": product},
        seconds=seconds,
        least=CYCLE,
        warmup=0,
    )
    top = product_flops / statistics.median(spent.pop("matmul"))
    _compare(losses, work)
    share = {arm: _rate(steps[best[arm]], spent[arm]) / top for arm in arms if arm not in STOCK}
    steps.clear()
    weighed = {
        arm: (*c, work) for arm, c in best.items() if work.memory and not arm.startswith("padded")
    }
    memory = peaks(weighed, build)
    tokens, took = sum(len(e.ids) for e in work.examples) / CYCLE, medians(spent)
    return [
        row(
            "sft",
            work.name,
            arm,
            took[arm],
            EXAMPLES,
            memory.get(arm),
            ratios(arm, () if arm in PEERS else PEERS, took, memory),
            tokens_per_s=tokens / took[arm],
            peak_share=share.get(arm),
            micro_batch=c[1],
            first_losses=" ".join(f"{x:.4f}" for x in losses[c][:COMPARED]),
        )
        for arm, c in best.items()
    ]


def _rate(step: Step, seconds: Sequence[float]) -> float:
    """The median FLOPs a second of timed steps, each by its own batch's; one step went before them."""
    now = 1 + len(seconds)
    executed = {(now + i) % CYCLE: flops(step) for i in range(CYCLE)}
    return statistics.median(executed[(1 + i) % CYCLE] / s for i, s in enumerate(seconds))


def _noted(step: Step, losses: list[float]) -> None:
    """A step, and its loss to the others."""
    losses.append(float(step()))


def _compare(losses: Mapping[Any, Sequence[float]], work: Work) -> None:
    """Raise unless all candidates had the same losses, step by step."""
    allowed = 2e-2 if work.bf16 else 1e-4
    for i in range(COMPARED):
        step = [x[i] for x in losses.values() if i < len(x)]
        if max(step) - min(step) > allowed * abs(min(step)):
            told = "\n".join(f"{c}: {list(x[:COMPARED])}" for c, x in losses.items())
            raise RuntimeError(f"{work.name}: the arms do not learn the same\n{told}")
