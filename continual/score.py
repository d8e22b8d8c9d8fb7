"""Answer the test prompts, deterministically, and mark the answers."""

from __future__ import annotations

import string
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from continual.answer import answer, follow, read
from continual.data import Encoded, Example, Task
from continual.dealing import deal
from continual.demands import level
from continual.errors import ConfigError, ContinualError, DataError, unknown
from continual.loss import token_nll
from continual.measures import MEASURES, refuse, unread
from continual.model import Model
from continual.packing import Batch
from continual.parallel import apart, gather, leads
from continual.rows import turn
from continual.sharding import in_step
from continual.template import Encoder
from continual.wording import normalise, terms


def exact_match(answer: str, reference: str) -> float:
    """1 where the normalised texts are the same, else 0; an empty answer is wrong."""
    return float(normalise(answer) == normalise(reference) != "")


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over the words, punctuation aside (Rajpurkar et al. 2016, section 6.1).

    There articles are left out too; here they stay, as an answer can be the letter of an option.
    """
    words = [Counter(normalise(t).translate(str.maketrans("", "", string.punctuation)).split())
             for t in (answer, reference)]
    common = (words[0] & words[1]).total()
    return 2 * common / (words[0].total() + words[1].total()) if common else 0.0


def rouge_l(answer: str, reference: str) -> float:
    """The F-measure of the longest common subsequence of stemmed words (Lin 2004).

    Words of [a-z0-9] are those of the reference implementation, which knows no others; others are not stemmed, and in
    scripts without spaces each character is one.
    """
    score: float = _rouge().score(reference, answer)["rougeL"].fmeasure
    return score


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    theirs = DefaultTokenizer(use_stemmer=True).tokenize

    def tokenize(text: str) -> list[str]:
        return [t for word in terms(text) for t in (theirs(word) if word.isascii() else [word])]

    return RougeScorer(["rougeL"], tokenizer=SimpleNamespace(tokenize=tokenize))


METRICS: Mapping[str, Callable[[str, str], float]] = {
    "exact_match": exact_match, "token_f1": token_f1, "rougeL": rouge_l,
}
SPLITS = ("train", "dev", "test")
PERPLEXITY = "perplexity"  # marks the reference, not an answer
JUDGED = "relevance_judged"  # marked by another model
HOW = ("generate", "likelihood")
# Marks answers to examples: each mark a dictionary with a "score" in [0, 1].
Judge = Callable[[Sequence[Example], Sequence[str]], list[dict[str, Any]]]


@dataclass(frozen=True)
class Test:
    """One task ready to be scored: its examples, their prompts as ids, and the most tokens that an answer may take.

    `encoded` holds prompt and reference together where the metric is perplexity. With `labels`, each with its tokens,
    the answer is the likeliest of them.
    """

    task: str
    metric: str
    examples: Sequence[Example]
    encoded: Sequence[Encoded]
    max_new_tokens: int
    labels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    judge: Judge | None = None

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """What is asked, without any answer: the token ids of each prompt."""
        return [e.ids[: turn(e)] if any(e.response) else e.ids for e in self.encoded]

    def of(self, indices: Sequence[int]) -> Test:
        """Some of the examples."""
        return replace(self, examples=[self.examples[i] for i in indices], encoded=[self.encoded[i] for i in indices])


def prepare(task: Task[Example], encoder: Encoder, split: str, index: int, *, metric: str | None = None,
            max_new_tokens: int | None = None, limit: int | None = None, how: str = "generate",
            judge: Judge | None = None) -> Test:
    """Encode a task's prompts once. By default an answer may be as long as the task's longest reference.

    With `how="likelihood"` the answer is the likeliest of the task's labels, whatever `max_new_tokens`. Raises
    ConfigError for an unknown metric or way to answer and for what these need and is not given (labels, a judge, a
    length), DataError for a split that is not there, an example that does not fit, or one that the metric cannot mark.
    """
    metric = metric or task.metric
    if metric not in (known := [*METRICS, *MEASURES, JUDGED, PERPLEXITY]):
        raise ConfigError(f"task {task.name!r}: " + unknown("metric", metric, known) +
                          " Set score.metric to score it by another.")
    if split not in SPLITS:
        raise ConfigError(unknown("score.split", split, SPLITS))
    if how not in HOW:
        raise ConfigError(unknown("score.how", how, HOW))
    rows = list(task.split(split))[:limit]
    if metric == JUDGED and judge is None:
        raise ConfigError(f"task {task.name!r}: found no judge, expected a model that grades for the metric {JUDGED}; "
                          "name one by score.judge.name, or choose relevance_checked")
    if metric in MEASURES:
        refuse(metric, task.name, rows)
    labels = _labels(task, encoder) if how == "likelihood" and metric != PERPLEXITY else {}
    room = max(map(len, labels.values())) if labels else max_new_tokens or _room(task.name, metric, rows, encoder)
    if metric != PERPLEXITY and not encoder.seq2seq and room >= encoder.limit:
        whence = "score.max_new_tokens" if max_new_tokens else f"the longest of its {split} references"
        raise ConfigError(f"task {task.name!r}: an answer may take {room} tokens ({whence}), which leaves none of the "
                          f"{encoder.limit} for its prompt; set score.max_new_tokens lower, or raise data.max_length "
                          "as far as the model's context goes")
    if metric == PERPLEXITY:
        encode: Callable[[Example], Encoded] = lambda e: encoder.train(e, index)  # noqa: E731
    else:
        encode = lambda e: encoder.ask(e, index, room)  # noqa: E731
    encoded = encoder.all(rows, encode)
    if not encoded:
        raise DataError(f"task {task.name!r} has no {split} rows left to score; add rows, or raise data.max_length")
    kept = {e.id for e in encoded}
    return Test(task.name, metric, [e for e in rows if e.id in kept], encoded, room, labels,
                judge if metric == JUDGED else None)


def _room(task: str, metric: str, rows: Sequence[Example], encoder: Encoder) -> int:
    """The tokens of the longest reference, where there are any."""
    if (metric in MEASURES or metric == JUDGED) and not any(o.strip() for e in rows for o in e.outputs):
        raise ConfigError(f"task {task!r}: found no reference that tells how long an answer may be; set "
                          "score.max_new_tokens")
    return max(encoder.room(e) for e in rows)


def _labels(task: Task[Example], encoder: Encoder) -> dict[str, tuple[int, ...]]:
    """Each of the task's labels as tokens; raises ConfigError for a task without any."""
    if not task.labels:
        raise ConfigError(f"task {task.name!r} has no labels, and score.how=likelihood chooses among them; list them "
                          "as its 'labels' in stream.json, or set score.how=generate")
    return spelled(task.labels, encoder)


def spelled(labels: Sequence[str], encoder: Encoder) -> dict[str, tuple[int, ...]]:
    """Each of these answers as the template writes it, to the end of sequence."""
    found = {}
    for label in labels:
        whole = encoder.train(Example(label, "", "-", outputs=(label,), where=f"label {label!r}"), 0)
        found[label] = whole.ids[whole.response.index(True) :]
    return found


def likeliest(model: Model, prompts: Sequence[Encoded], labels: Mapping[str, tuple[int, ...]], batch_size: int
              ) -> list[str]:
    """The label of each prompt whose tokens have the highest log-likelihood in sum; of equals the first."""
    names, told = list(labels), likelihoods(model, prompts, list(labels.values()), batch_size)
    return [names[j] for j in told.argmax(1).tolist()]


@torch.no_grad()
def likelihoods(model: Model, prompts: Sequence[Encoded], labels: Sequence[tuple[int, ...]], batch_size: int
                ) -> Tensor:
    """(prompts, labels) the log-likelihood of each label's tokens after each prompt, in nats, float64.

    A model that reads flat rows reads each prompt once, and behind it once what labels begin with alike: at most
    `batch_size` prompts together, and of those as many as leave a pass no more tokens than `layout.tokens`.
    """
    if not model.layout.flat:
        return _by_pairs(model, prompts, labels)
    model.fit(max((len(p.ids) for p in prompts), default=0) + max(map(len, labels)) - 1)
    tree: dict[tuple[int, ...], int] = {}  # each beginning of a label that another token follows, parents first
    paths = [(j, tree.setdefault(ids[:t], len(tree)), ids[t]) for j, ids in enumerate(labels) for t in range(len(ids))]
    owner, at, token = torch.tensor(paths, device=model.layout.device).T
    parents = [tree[start[:-1]] if start else -1 for start in tree]
    together = max(1, min(batch_size, model.layout.tokens // len(tree)))
    order = sorted(range(len(prompts)), key=lambda i: prompts[i].ids)  # what begins alike is read together
    told = torch.zeros(len(prompts), len(labels), dtype=torch.float64)
    for begin in range(0, len(order), together):
        part = order[begin : begin + together]
        cache = read(model, [prompts[i] for i in part], parents)
        part = [part[i] for i in cache.order]
        tokens = [[start[-1] if start else prompts[i].ids[-1] for start in tree] for i in part]
        logits = follow(model, cache, torch.tensor(tokens, device=model.layout.device))
        each = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))[:, at, token].double()
        told[part] = each.new_zeros(len(part), len(labels)).index_add(1, owner, each).cpu()
    return told


def _by_pairs(model: Model, prompts: Sequence[Encoded], labels: Sequence[tuple[int, ...]]) -> Tensor:
    """The same from a row each of every prompt and label."""
    pairs = [replace(p, id=str(i * len(labels) + j), ids=p.ids + ids,
                     response=(False,) * len(p.ids) + (True,) * len(ids))
             for i, p in enumerate(prompts) for j, ids in enumerate(labels)]
    told = torch.zeros(len(pairs), dtype=torch.float64)
    for micro in Batch(tuple(pairs), replace(model.layout, instruction_weight=0.0)).micro_batches():
        rows = torch.tensor([int(e.id) for e in micro.examples])
        told.index_add_(0, rows[micro.example.cpu()], -token_nll(model, micro).double().cpu())
    return told.view(len(prompts), -1)


def score(model: Model, test: Test, batch_size: int, turns: Iterable[Sequence[int]] | None = None
          ) -> tuple[float, list[dict[str, Any]]]:
    """The task's score in [0, 1], the mean of its marks, and every prediction with its mark.

    The examples are answered in `turns`, each the indices of some of them, all together by default; what gives the
    turns may change the model between them. Several processes answer a part of the prompts each, and all have the
    whole. Raises ContinualError where the turns are not each example once.
    """
    everyone = range(len(test.examples))
    told: list[tuple[int, dict[str, Any]]] = []
    for some in turns or [everyone]:
        told += zip(some, _scored(model, test.of(some), batch_size), strict=True)
    if sorted(i for i, _ in told) != [*everyone]:
        raise ContinualError(f"of the {len(everyone)} prompts of task {test.task!r} {len(told)} were dispatched, and "
                             "each must be once; the strategy's dispatch is wrong")
    rows = [row for _, row in sorted(told, key=lambda each: each[0])]
    if leads() and (said := unread(rows)):
        print(f"{test.task}: {said}", file=sys.stderr)
    return sum(r["score"] for r in rows) / len(rows), rows


def _scored(model: Model, test: Test, batch_size: int) -> list[dict[str, Any]]:
    """Every prediction with its mark."""
    mine = deal([len(e.ids) for e in test.encoded])
    part = test.of(mine)
    found: list[dict[str, Any]] = []
    with in_step(model), apart():
        if mine:
            found = _perplexity(model, part) if test.metric == PERPLEXITY else _answers(model, part, batch_size)
    told = {i: row for share in gather([*zip(mine, found, strict=True)]) for i, row in share}
    return [told[i] for i in range(len(told))]


def _answers(model: Model, test: Test, batch_size: int) -> list[dict[str, Any]]:
    if test.labels:
        answers = likeliest(model, test.encoded, test.labels, batch_size)
    else:
        answers = answer(model, test.encoded, test.max_new_tokens, batch_size)
    marks = test.judge(test.examples, answers) if test.judge else [
        mark(test.metric, a, e) for e, a in zip(test.examples, answers, strict=True)]
    return [{"id": e.id, "prompt": asked.text, "answer": a, "references": list(e.outputs), "level": composed(e), **told}
            for e, asked, a, told in zip(test.examples, test.encoded, answers, marks, strict=True)]


def mark(metric: str, answer: str, example: Example) -> dict[str, Any]:
    """The `score` in [0, 1] of an answer to this row, and what it is made of; `metric` is of METRICS or MEASURES."""
    if metric in MEASURES:
        return MEASURES[metric].mark(answer, example)
    return {"score": max(METRICS[metric](answer, o) for o in example.outputs)}


def composed(example: Example) -> str:
    """The row's own level, or else how its instruction is composed (`demands.level`)."""
    return example.level or level(example.asked)


@torch.no_grad()
def _perplexity(model: Model, test: Test) -> list[dict[str, Any]]:
    """The mark is 1 / perplexity: the geometric mean of the reference tokens' probabilities, in [0, 1]."""
    means: dict[str, float] = {}
    responses = replace(model.layout, instruction_weight=0.0)
    for micro in Batch(tuple(test.encoded), responses).micro_batches():
        nll = token_nll(model, micro)
        for i, e in enumerate(micro.examples):
            means[e.id] = float(nll[micro.example == i].mean())
    return [{"id": e.id, "prompt": asked.text, "references": list(e.outputs), "level": composed(e),
             "perplexity": _exp(means[e.id]), "score": _exp(-means[e.id])}
            for e, asked in zip(test.examples, test.encoded, strict=True)]


def _exp(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float64).exp())
