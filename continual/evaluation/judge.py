"""Instruction relevance by a judge: a language model grades an answer on each requirement."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from continual.data.template import CHAT, TEMPLATES, Encoder
from continual.data.types import Encoded, Example
from continual.errors import ConfigError, DataError, unknown
from continual.evaluation.likelihood import encode_labels, label_log_likelihoods
from continual.evaluation.text_normalization import split_sentences
from continual.models.generation import generate_answers
from continual.models.loading import DTYPES, load_pretrained
from continual.models.model import Model

RUBRIC = """Grade how an answer meets one requirement of its instruction.
5: fully. 4: but for a trifle. 3: in part. 2: hardly. 1: not at all.

Instruction: {instruction}

Answer: {answer}

Requirement: {requirement}

The grade, one digit from 1 to 5:"""
GRADES = ("1", "2", "3", "4", "5")
MAX_GRADE_TOKENS = 8  # tokens of a generated grade; more than any needs
TRUNCATION_MARK = " ..."  # after a truncated answer
GRADE_MODES = ("likelihood", "generate")


@dataclass
class Judge:
    """A causal or encoder-decoder model that grades by RUBRIC; it is loaded at its first use.

    An answer's score is the mean of (grade - 1) / 4 over the requirements: the ratio of
    requirements followed of InFoBench (DRFR, Qin et al. 2024) with a grade in place of yes or no.
    With grade_mode="generate" the judge answers greedily with a digit from 1 to 5; any other answer
    gives the grade None, which counts as 0. With grade_mode="likelihood" the grade is its
    expectation under the judge's likelihoods of the five digits (Liu et al. 2023, equation 1). A
    blank answer scores 0 without the judge. If a prompt is longer than `max_length` or the judge's
    context, the end of the answer is truncated.
    """

    name: str
    template: str = "plain"
    grade_mode: str = "likelihood"
    dtype: str = "fp32"
    max_length: int = 2048
    batch_size: int = 16
    device: str = "auto"

    def __post_init__(self) -> None:
        """Validate the fields before anything is loaded."""
        if self.grade_mode not in GRADE_MODES:
            raise ConfigError(unknown("score.judge.grade_mode", self.grade_mode, GRADE_MODES))
        if self.template not in (*TEMPLATES, CHAT):
            raise ConfigError(unknown("score.judge.template", self.template, [*TEMPLATES, CHAT]))
        if self.dtype not in DTYPES:
            raise ConfigError(unknown("score.judge.dtype", self.dtype, DTYPES))
        for key, value in (("max_length", self.max_length), ("batch_size", self.batch_size)):
            if not isinstance(value, int):
                raise ConfigError(
                    f"score.judge.{key}={value}: expected a whole number of at least 1"
                )

    @cached_property
    def model(self) -> Model:
        """Load the judge in evaluation mode, without a change of the run's random state."""
        devices = range(torch.cuda.device_count())
        with torch.random.fork_rng(list(devices)):
            judge = load_pretrained(name=self.name, device=self.device, dtype=self.dtype)
        judge.net.eval().requires_grad_(False)
        return judge

    @cached_property
    def encoder(self) -> Encoder:
        """Return an encoder with the judge's tokenizer and context length."""
        limit = min(self.max_length, self.model.context_length or self.max_length)
        return Encoder(self.model.tokenizer, self.template, limit, self.model.layout.seq2seq)

    @cached_property
    def unlimited_encoder(self) -> Encoder:
        """Return the encoder without a limit on tokens."""
        return replace(self.encoder, max_tokens=sys.maxsize)

    def __call__(self, examples: Sequence[Example], answers: Sequence[str]) -> list[dict[str, Any]]:
        """Return each answer's "score" in [0, 1], its "grades", and "cut" (True if truncated)."""
        requirements = [
            (i, r)
            for i, (e, a) in enumerate(zip(examples, answers, strict=True))
            if a.strip()
            for r in get_requirements(e)
        ]
        prompts = [self.encode_grading_prompt(examples[i], answers[i], r) for i, r in requirements]
        grades = self.grade_prompts([p for p, _ in prompts])
        results: list[dict[str, Any]] = [{"grades": [], "cut": False} for _ in examples]
        for (i, _), (_, cut), grade in zip(requirements, prompts, grades, strict=True):
            results[i]["grades"].append(grade)
            results[i]["cut"] |= cut
        for result in results:
            scores = [0.0 if g is None else (g - 1) / 4 for g in result["grades"]]
            result["score"] = sum(scores) / len(scores) if scores else 0.0
        return results

    def encode_grading_prompt(
        self, example: Example, answer: str, requirement: str
    ) -> tuple[Encoded, bool]:
        """Encode the judge's prompt; return it, and True if the answer was truncated.

        Raises DataError if the prompt is too long even without the answer.
        """
        room, ids, cut = MAX_GRADE_TOKENS, self.encoder.tokenize(answer), False
        instruction = example.user_request_with_input
        while True:
            text = RUBRIC.format(instruction=instruction, answer=answer, requirement=requirement)
            asked = Example(
                example.id, example.task, text, outputs=("5",), location=example.location
            )
            whole = self.unlimited_encoder.encode_prompt(asked, 0, room).require()
            over = len(whole.ids) + room - self.encoder.max_tokens
            if over <= 0:
                return whole, cut
            if not ids:
                raise DataError(
                    f"{example.location}: the judge's prompt takes {len(whole.ids)} tokens without "
                    f"the answer, and the limit is {self.encoder.max_tokens} less {room}; raise "
                    "score.judge.max_length as far as its context goes, or choose another judge"
                )
            ids, cut = (
                ids[: max(0, len(ids) - over - len(self.encoder.tokenize(TRUNCATION_MARK)))],
                True,
            )
            answer = self.encoder.tokenizer.decode(ids, skip_special_tokens=True) + TRUNCATION_MARK

    def grade_prompts(self, prompts: Sequence[Encoded]) -> list[float | None]:
        """Return the grade of each prompt, from 1 to 5; None for one that cannot be read."""
        if not prompts:
            return []
        if self.grade_mode == "generate":
            return [
                parse_grade(text)
                for text in generate_answers(self.model, prompts, MAX_GRADE_TOKENS, self.batch_size)
            ]
        labels = list(encode_labels(GRADES, self.encoder).values())
        shares = label_log_likelihoods(self.model, prompts, labels, self.batch_size).softmax(-1)
        return [round(float(g), 6) for g in shares @ torch.arange(1.0, 6.0, dtype=shares.dtype)]


def get_requirements(example: Example) -> list[str]:
    """Return the row's own requirements, or else the sentences of its instruction."""
    return (
        list(example.requirements)
        or split_sentences(example.user_request)
        or [example.user_request]
    )


def parse_grade(text: str) -> float | None:
    """Read a generated grade: a digit from 1 to 5, optionally with a full stop; None otherwise."""
    match = re.fullmatch(r"([1-5])\.?", text.strip())
    return float(match[1]) if match else None
