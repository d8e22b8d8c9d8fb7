"""Answer the test prompts, deterministically, and mark the answers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from continual.data.template import Encoder, Encoding, usable_examples
from continual.data.types import Encoded, Example, Task
from continual.distributed.processes import all_gather, is_main_process, single_process
from continual.distributed.work import assign_work
from continual.errors import ConfigError, ContinualError, DataError, unknown
from continual.evaluation.instruction_parser import composition_level
from continual.evaluation.likelihood import encode_labels, most_likely_labels
from continual.evaluation.metrics import REFERENCE_METRICS
from continual.evaluation.row_metrics import ROW_METRICS, check_metric_rows, judge_warnings
from continual.models.generation import generate_answers
from continual.models.loss import token_nll
from continual.models.model import Model
from continual.models.sharding import synced_passes
from continual.packing.batch import Batch
from continual.packing.layout import response_start
from continual.results.prediction import Prediction

SPLITS = ("train", "dev", "test")
PERPLEXITY = "perplexity"  # marks the reference, not an answer
JUDGE_METRIC = "relevance_judged"  # marked by another model
ANSWER_MODES = ("generate", "likelihood")
# Marks answers to examples: each mark a dictionary with a "score" in [0, 1].
JudgeFunction = Callable[[Sequence[Example], Sequence[str]], list[dict[str, Any]]]


@dataclass(frozen=True)
class EvalSet:
    """One task ready to be scored: its examples, their prompts as ids, and the most tokens that an
    answer may take.

    `encoded` holds prompt and reference together where the metric is perplexity. With `labels`,
    each with its tokens, the answer is the likeliest of them.
    """

    task: str
    metric: str
    examples: Sequence[Example]
    encoded: Sequence[Encoded]
    max_new_tokens: int
    label_token_ids: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    judge: JudgeFunction | None = None
    encodings: Sequence[Encoding] = ()  # of all rows, also of those that were skipped

    @property
    def prompt_ids(self) -> list[tuple[int, ...]]:
        """What is asked, without any answer: the token ids of each prompt."""
        return [e.ids[: response_start(e)] if any(e.response_mask) else e.ids for e in self.encoded]

    def select(self, indices: Sequence[int]) -> EvalSet:
        """Some of the examples."""
        return replace(
            self,
            examples=[self.examples[i] for i in indices],
            encoded=[self.encoded[i] for i in indices],
        )


def prepare_eval_set(
    task: Task[Example],
    encoder: Encoder,
    split: str,
    task_index: int,
    *,
    metric: str | None = None,
    max_new_tokens: int | None = None,
    max_examples: int | None = None,
    answer_mode: str = "generate",
    judge: JudgeFunction | None = None,
) -> EvalSet:
    """Encode a task's prompts once. By default an answer may be as long as the task's longest
    reference.

    With `how="likelihood"` the answer is the likeliest of the task's labels, whatever
    `max_new_tokens`. Raises ConfigError for an unknown metric or way to answer and for what these
    need and is not given (labels, a judge, a length), DataError for a split that is not there, an
    example that does not fit, or one that the metric cannot mark.
    """
    metric = metric or task.metric
    if metric not in (known := [*REFERENCE_METRICS, *ROW_METRICS, JUDGE_METRIC, PERPLEXITY]):
        raise ConfigError(
            f"task {task.name!r}: "
            + unknown("metric", metric, known)
            + " Set score.metric to score it by another."
        )
    if split not in SPLITS:
        raise ConfigError(unknown("score.split", split, SPLITS))
    if answer_mode not in ANSWER_MODES:
        raise ConfigError(unknown("score.answer_mode", answer_mode, ANSWER_MODES))
    rows = list(task.get_split(split))[:max_examples]
    if metric == JUDGE_METRIC and judge is None:
        raise ConfigError(
            f"task {task.name!r}: found no judge, expected a model that grades for the metric "
            f"{JUDGE_METRIC}; name one by score.judge.name, or choose relevance_checked"
        )
    if metric in ROW_METRICS:
        check_metric_rows(metric, task.name, rows)
    labels = (
        _encode_task_labels(task, encoder)
        if answer_mode == "likelihood" and metric != PERPLEXITY
        else {}
    )
    room = (
        max(map(len, labels.values()))
        if labels
        else max_new_tokens or _longest_reference(task.name, metric, rows, encoder)
    )
    if metric != PERPLEXITY and not encoder.seq2seq and room >= encoder.max_tokens:
        whence = (
            "score.max_new_tokens" if max_new_tokens else f"the longest of its {split} references"
        )
        raise ConfigError(
            f"task {task.name!r}: an answer may take {room} tokens ({whence}), which leaves none "
            f"of the {encoder.max_tokens} for its prompt; set score.max_new_tokens lower, or raise "
            "data.max_length as far as the model's context goes"
        )
    if metric == PERPLEXITY:
        encodings = [encoder.encode_example(e, task_index) for e in rows]
    else:
        encodings = [encoder.encode_prompt(e, task_index, room) for e in rows]
    encoder.check_usable(encodings)
    encoded = usable_examples(encodings)
    if not encoded:
        raise DataError(
            f"task {task.name!r} has no {split} rows left to score; add rows, or raise "
            "data.max_length"
        )
    return EvalSet(
        task.name,
        metric,
        [e for e, x in zip(rows, encodings, strict=True) if x.encoded],
        encoded,
        room,
        labels,
        judge if metric == JUDGE_METRIC else None,
        encodings,
    )


def _longest_reference(task: str, metric: str, rows: Sequence[Example], encoder: Encoder) -> int:
    """The tokens of the longest reference, where there are any."""
    if (metric in ROW_METRICS or metric == JUDGE_METRIC) and not any(
        o.strip() for e in rows for o in e.outputs
    ):
        raise ConfigError(
            f"task {task!r}: found no reference that tells how long an answer may be; set "
            "score.max_new_tokens"
        )
    return max(encoder.count_answer_tokens(e) for e in rows)


def _encode_task_labels(task: Task[Example], encoder: Encoder) -> dict[str, tuple[int, ...]]:
    """Each of the task's labels as tokens; raises ConfigError for a task without any."""
    if not task.labels:
        raise ConfigError(
            f"task {task.name!r} has no labels, and score.answer_mode=likelihood chooses among them; "
            "list them as its 'labels' in stream.json, or set score.answer_mode=generate"
        )
    return encode_labels(task.labels, encoder)


def score_task(
    model: Model,
    eval_set: EvalSet,
    batch_size: int,
    index_groups: Iterable[Sequence[int]] | None = None,
) -> tuple[float, list[Prediction]]:
    """The task's score in [0, 1], the mean of its marks, and every prediction with its mark.

    The examples are answered in `turns`, each the indices of some of them, all together by default;
    what gives the turns may change the model between them. Several processes answer a part of the
    prompts each, and all have the whole. Raises ContinualError where the turns are not each example
    once.
    """
    everyone = range(len(eval_set.examples))
    told: list[tuple[int, Prediction]] = []
    for some in index_groups or [everyone]:
        told += zip(some, _score_examples(model, eval_set.select(some), batch_size), strict=True)
    if sorted(i for i, _ in told) != [*everyone]:
        raise ContinualError(
            f"of the {len(everyone)} prompts of task {eval_set.task!r} {len(told)} were dispatched, "
            "and each must be once; the strategy's dispatch is wrong"
        )
    rows = [row for _, row in sorted(told, key=lambda each: each[0])]
    if is_main_process() and (said := judge_warnings([row.result for row in rows])):
        print(f"{eval_set.task}: {said}", file=sys.stderr)
    return sum(row.score for row in rows) / len(rows), rows


def _score_examples(model: Model, test: EvalSet, batch_size: int) -> list[Prediction]:
    """Every prediction with its mark."""
    mine = assign_work([len(e.ids) for e in test.encoded])
    part = test.select(mine)
    found: list[Prediction] = []
    with synced_passes(model), single_process():
        if mine:
            found = (
                _score_perplexity(model, part)
                if test.metric == PERPLEXITY
                else _score_answers(model, part, batch_size)
            )

    # Processes exchange JSON.
    own_rows = [(i, p.to_dict()) for i, p in zip(mine, found, strict=True)]
    rows = {i: row for share in all_gather(own_rows) for i, row in share}
    return [Prediction.from_dict(rows[i]) for i in range(len(rows))]


def _score_answers(model: Model, test: EvalSet, batch_size: int) -> list[Prediction]:
    if test.label_token_ids:
        answers = most_likely_labels(model, test.encoded, test.label_token_ids, batch_size)
    else:
        answers = generate_answers(model, test.encoded, test.max_new_tokens, batch_size)
    marks = (
        test.judge(test.examples, answers)
        if test.judge
        else [score_answer(test.metric, a, e) for e, a in zip(test.examples, answers, strict=True)]
    )
    return [
        Prediction(e.id, told, asked.text, a, tuple(e.outputs), example_level(e))
        for e, asked, a, told in zip(test.examples, test.encoded, answers, marks, strict=True)
    ]


def score_answer(metric: str, answer: str, example: Example) -> dict[str, Any]:
    """The `score` in [0, 1] of an answer to this row, and what it is made of; `metric` is of
    METRICS or MEASURES.
    """
    if metric in ROW_METRICS:
        return ROW_METRICS[metric].score_answer(answer, example)
    return {"score": max(REFERENCE_METRICS[metric](answer, o) for o in example.outputs)}


def example_level(example: Example) -> str:
    """The row's own level, or else how its instruction is composed (`demands.level`)."""
    return example.level or composition_level(example.user_request)


@torch.no_grad()
def _score_perplexity(model: Model, test: EvalSet) -> list[Prediction]:
    """The mark is 1 / perplexity: the geometric mean of the reference tokens' probabilities, in [0,
    1].
    """
    means: dict[str, float] = {}
    responses = replace(model.layout, instruction_weight=0.0)
    for micro in Batch(tuple(test.encoded), responses).micro_batches():
        nll = token_nll(model, micro)
        for i, e in enumerate(micro.examples):
            means[e.id] = float(nll[micro.example_index == i].mean())
    return [
        Prediction(
            id=e.id,
            result={"perplexity": _exp(means[e.id]), "score": _exp(-means[e.id])},
            prompt=asked.text,
            references=tuple(e.outputs),
            level=example_level(e),
        )
        for e, asked in zip(test.examples, test.encoded, strict=True)
    ]


def _exp(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float64).exp())
