"""Answer test prompts deterministically, and score the answers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from continual.data.template import Encoder, Encoding, usable_examples
from continual.data.types import Encoded, Example, Task
from continual.distributed.processes import is_main_process, single_process
from continual.distributed.work import assign_work, gather_by_index
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
PERPLEXITY = "perplexity"  # scores the reference, not an answer
JUDGE_METRIC = "relevance_judged"  # scored by another model
ANSWER_MODES = ("generate", "likelihood")
# Scores answers to examples; each result is a dictionary with a "score" in [0, 1].
JudgeFunction = Callable[[Sequence[Example], Sequence[str]], list[dict[str, Any]]]


@dataclass(frozen=True)
class EvalSet:
    """One task's encoded test prompts, ready to be scored.

    `encoded` holds the prompts, or prompts with references if the metric is perplexity. Answers
    have at most `max_new_tokens` tokens. With `label_token_ids` the answer is the most likely of
    these labels.
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
        """Return the token ids of each prompt, without any answer."""
        return [e.ids[: response_start(e)] if any(e.response_mask) else e.ids for e in self.encoded]

    def select(self, indices: Sequence[int]) -> EvalSet:
        """Return the set of the examples at these indices."""
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
    """Encode a task's prompts.

    By default an answer may be as long as the task's longest reference. With
    `answer_mode="likelihood"` the answer is the most likely of the task's labels, and
    `max_new_tokens` is ignored. Raises ConfigError for an unknown metric or answer mode, and for
    missing labels, judge or length; DataError for a missing split, an example that does not fit, or
    one that the metric cannot score.
    """
    metric = metric or task.metric
    known = [*REFERENCE_METRICS, *ROW_METRICS, JUDGE_METRIC, PERPLEXITY]
    if metric not in known:
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

    chooses_label = answer_mode == "likelihood" and metric != PERPLEXITY
    labels = _encode_task_labels(task, encoder) if chooses_label else {}
    if labels:
        answer_tokens = max(map(len, labels.values()))
    else:
        answer_tokens = max_new_tokens or _longest_reference(task.name, metric, rows, encoder)
    if metric != PERPLEXITY and not encoder.seq2seq and answer_tokens >= encoder.max_tokens:
        origin = (
            "score.max_new_tokens" if max_new_tokens else f"the longest of its {split} references"
        )
        raise ConfigError(
            f"task {task.name!r}: an answer may take {answer_tokens} tokens ({origin}), which "
            f"leaves none of the {encoder.max_tokens} for its prompt; set score.max_new_tokens lower, or "
            "raise data.max_length as far as the model's context goes"
        )

    if metric == PERPLEXITY:
        encodings = [encoder.encode_example(e, task_index) for e in rows]
    else:
        encodings = [encoder.encode_prompt(e, task_index, answer_tokens) for e in rows]
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
        [e for e, encoding in zip(rows, encodings, strict=True) if encoding.encoded],
        encoded,
        answer_tokens,
        labels,
        judge if metric == JUDGE_METRIC else None,
        encodings,
    )


def _longest_reference(task: str, metric: str, rows: Sequence[Example], encoder: Encoder) -> int:
    """Return the tokens of the longest reference; raise ConfigError if there are none."""
    needs_no_reference = metric in ROW_METRICS or metric == JUDGE_METRIC
    if needs_no_reference and not any(o.strip() for e in rows for o in e.outputs):
        raise ConfigError(
            f"task {task!r}: found no reference, expected one as the limit on the length of "
            "answers; set score.max_new_tokens"
        )
    return max(encoder.count_answer_tokens(e) for e in rows)


def _encode_task_labels(task: Task[Example], encoder: Encoder) -> dict[str, tuple[int, ...]]:
    """Encode the task's labels; raise ConfigError if it has none."""
    if not task.labels:
        raise ConfigError(
            f"task {task.name!r} has no labels, and score.answer_mode=likelihood chooses among "
            "them; list them as its 'labels' in stream.json, or set score.answer_mode=generate"
        )
    return encode_labels(task.labels, encoder)


def score_task(
    model: Model,
    eval_set: EvalSet,
    batch_size: int,
    index_groups: Iterable[Sequence[int]] | None = None,
) -> tuple[float, list[Prediction]]:
    """Return the task's mean score in [0, 1], and a prediction for each example in order.

    The examples are answered in `index_groups`, by default all in one group; the iterable may
    change the model between groups. Each process answers a part of the prompts, and all get all
    predictions. Raises ContinualError unless each example is in one group.
    """
    all_indices = range(len(eval_set.examples))
    scored: list[tuple[int, Prediction]] = []
    for group in index_groups or [all_indices]:
        predictions = _score_examples(model, eval_set.select(group), batch_size)
        scored += zip(group, predictions, strict=True)
    if sorted(i for i, _ in scored) != list(all_indices):
        raise ContinualError(
            f"task {eval_set.task!r}: found {len(scored)} dispatched prompts of "
            f"{len(all_indices)}, expected each once; the strategy's dispatch is wrong"
        )

    predictions = [prediction for _, prediction in sorted(scored, key=lambda pair: pair[0])]
    warnings = judge_warnings([prediction.result for prediction in predictions])
    if warnings and is_main_process():
        print(f"{eval_set.task}: {warnings}", file=sys.stderr)
    mean_score = sum(prediction.score for prediction in predictions) / len(predictions)
    return mean_score, predictions


def _score_examples(model: Model, eval_set: EvalSet, batch_size: int) -> list[Prediction]:
    """Score the examples; each process does a part, and all return all predictions."""
    own_indices = assign_work([len(e.ids) for e in eval_set.encoded])
    part = eval_set.select(own_indices)
    own_predictions: list[Prediction] = []
    with synced_passes(model), single_process():
        if own_indices and eval_set.metric == PERPLEXITY:
            own_predictions = _score_perplexity(model, part)
        elif own_indices:
            own_predictions = _score_answers(model, part, batch_size)

    # Processes exchange JSON.
    rows = gather_by_index(own_indices, [p.to_dict() for p in own_predictions])
    return [Prediction.from_dict(row) for row in rows]


def _score_answers(model: Model, eval_set: EvalSet, batch_size: int) -> list[Prediction]:
    """Answer the prompts, and score the answers by the set's metric."""
    examples = eval_set.examples
    prompts = eval_set.encoded
    if eval_set.label_token_ids:
        answers = most_likely_labels(model, prompts, eval_set.label_token_ids, batch_size)
    else:
        answers = generate_answers(model, prompts, eval_set.max_new_tokens, batch_size)

    if eval_set.judge:
        results = eval_set.judge(examples, answers)
    else:
        results = [
            score_answer(eval_set.metric, answer, e)
            for e, answer in zip(examples, answers, strict=True)
        ]
    return [
        Prediction(e.id, result, prompt.text, answer, tuple(e.outputs), example_level(e))
        for e, prompt, answer, result in zip(examples, prompts, answers, results, strict=True)
    ]


def score_answer(metric: str, answer: str, example: Example) -> dict[str, Any]:
    """Return the "score" in [0, 1] of an answer, and its details.

    `metric` is one of REFERENCE_METRICS or ROW_METRICS.
    """
    if metric in ROW_METRICS:
        return ROW_METRICS[metric].score_answer(answer, example)
    return {"score": max(REFERENCE_METRICS[metric](answer, o) for o in example.outputs)}


def example_level(example: Example) -> str:
    """Return the row's own level, or else its instruction's `composition_level`."""
    return example.level or composition_level(example.user_request)


@torch.no_grad()
def _score_perplexity(model: Model, eval_set: EvalSet) -> list[Prediction]:
    """Score the references by 1 / perplexity.

    This is the geometric mean of the reference tokens' probabilities, in [0, 1].
    """
    mean_nll: dict[str, float] = {}
    response_only = replace(model.layout, instruction_weight=0.0)
    for micro in Batch(tuple(eval_set.encoded), response_only).micro_batches():
        nll = token_nll(model, micro)
        for i, e in enumerate(micro.examples):
            mean_nll[e.id] = float(nll[micro.example_index == i].mean())
    return [
        Prediction(
            id=e.id,
            result={"perplexity": _exp(mean_nll[e.id]), "score": _exp(-mean_nll[e.id])},
            prompt=prompt.text,
            references=tuple(e.outputs),
            level=example_level(e),
        )
        for e, prompt in zip(eval_set.examples, eval_set.encoded, strict=True)
    ]


def _exp(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float64).exp())
