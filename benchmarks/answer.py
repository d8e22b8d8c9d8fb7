"""Greedy answers to 192 prompts: this engine's, and those of transformers' `generate` on
left-padded batches of 16.

A Llama of random weights without adapter reads agnews prompts. It hardly ever ends an answer, so
each has 4 tokens, as the longest labels have. Both arms must answer in the same tokens, or the run
fails. On a GPU the weights are bf16 once that was compared: before, in fp32, since rounding to bf16
decides between tokens of nearly the same logit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch

from benchmarks import works
from benchmarks.common import ASKED, Row, Step, interleaved, medians, peaks, ratios, row
from continual.data.types import Encoded
from continual.models.generation import generate_answers
from continual.models.model import Model

PROMPTS, NEW = 192, 4
TOGETHER, BATCH = 128, 16  # prompts at a time: as score.batch_size has it, and of generate


class Numbers:
    """A tokenizer whose text is the tokens' numbers: two answers read the same where they are the
    same tokens.
    """

    def __init__(self, end: int) -> None:
        self.eos_token_id = end

    def batch_decode(self, rows: Sequence[Sequence[int]], skip_special_tokens: bool) -> list[str]:
        """The tokens before the end of each answer; those after it are padding."""
        return [
            " ".join(map(str, takewhile(lambda token: token != self.eos_token_id, row)))
            for row in rows
        ]


def model(shape: works.Shape, device: str, dtype: torch.dtype) -> Model:
    """What both arms answer with."""
    made = works.model(shape, "none", device=device)
    made.tokenizer = Numbers(made.tokenizer.eos_token_id)
    made.net.eval().to(dtype)
    return made


def engine(made: Model, prompts: Sequence[Encoded]) -> Step:
    """Ours."""
    return lambda: generate_answers(made, prompts, NEW, TOGETHER)


def generate(made: Model, prompts: Sequence[Encoded]) -> Step:
    """The peer, on the prompts as they come."""
    pad, device = made.layout.pad_token_id, made.layout.device

    def step() -> list[str]:
        said: list[str] = []
        for start in range(0, len(prompts), BATCH):
            rows = [p.ids for p in prompts[start : start + BATCH]]
            longest = max(map(len, rows))
            ids = torch.tensor([[pad] * (longest - len(r)) + [*r] for r in rows], device=device)
            mask = torch.tensor(
                [[0] * (longest - len(r)) + [1] * len(r) for r in rows], device=device
            )
            with torch.inference_mode():
                out = made.net.generate(
                    input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW
                )
            said += made.tokenizer.batch_decode(out[:, longest:].tolist(), skip_special_tokens=True)
        return said

    return step


ARMS: Mapping[str, Callable[[Model, Sequence[Encoded]], Step]] = {
    "continual": engine,
    "generate": generate,
}


def build(arm: str, prompts: Sequence[Encoded], *of: Any) -> Step:
    """One arm's step on a model of its own."""
    return ARMS[arm](model(*of), prompts)


def run() -> list[Row]:
    """All works; raises RuntimeError where the arms answer differently."""
    return [
        one
        for shape, name, prompts in _works()
        for one in measure(shape, name, prompts, seconds=12)
    ]


def _works() -> Iterator[tuple[str, str, Sequence[Encoded]]]:
    rows = works.rows("agnews", PROMPTS)
    length = 512 if ASKED.gpu else 150
    for shape in ("0.5B", "1.5B") if ASKED.gpu else ("3M",):
        for name, chosen in (
            ("agnews", rows),
            (f"{length}-token instruction", works.behind(length, rows)),
        ):
            yield shape, name, [_asked(e) for e in chosen]


def _asked(e: Encoded) -> Encoded:
    """The row's prompt."""
    n = e.response_mask.index(True)
    return Encoded(e.id, e.task_index, e.ids[:n], e.response_mask[:n])


def measure(shape: str, name: str, prompts: Sequence[Encoded], seconds: float) -> list[Row]:
    """Each arm's row, once they have answered alike."""
    size, device = works.SHAPES[shape], ASKED.device.type
    dtype = torch.bfloat16 if ASKED.gpu else torch.float32
    made = model(size, device, torch.float32)
    steps = {arm: make(made, prompts) for arm, make in ARMS.items()}
    compare({arm: step() for arm, step in steps.items()})
    made.net.to(dtype)
    took = medians(interleaved(steps, seconds=seconds))
    memory = peaks({arm: (arm, prompts, size, device, dtype) for arm in ARMS}, build)
    work = f"{shape}{' bf16' if ASKED.gpu else ''}, {name}{works.source()}"
    return [
        row(
            "answer",
            work,
            arm,
            took[arm],
            len(prompts),
            memory[arm],
            ratios(arm, ["generate"], took, memory),
        )
        for arm in ARMS
    ]


def compare(said: Mapping[str, Sequence[str]]) -> None:
    """Raise RuntimeError unless both arms gave the same answers."""
    ours, theirs = said["continual"], said["generate"]
    if apart := sum(a != b for a, b in zip(ours, theirs, strict=True)):
        raise RuntimeError(f"{apart} of {len(ours)} answers differ from those of generate")
