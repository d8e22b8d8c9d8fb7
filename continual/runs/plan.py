"""What a run would take: memory, FLOPs, hours and disk, and what of it grows with the number of
tasks.

Nothing of it is a formula of the model or the strategy: the engine's own stages are rehearsed
(`continual.runs.rehearse`), a few of their steps and their ends, and measured.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console
from rich.table import Table

from continual.data.template import index_tasks
from continual.data.types import Encoded, Example, Stream, Task
from continual.errors import ConfigError, gathered, mistyped
from continual.evaluation.scoring import Test
from continual.models.model import Model
from continual.runs import build, validate
from continual.runs.rehearse import Ghosts, Stage, rehearse, scored

LEAST = {
    "tasks": 1,
    "examples": 1,
    "tests": 1,
    "tokens": 2,
    "response": 1,
    "stages": 1,
    "steps": 2,
    "gpus": 1,
}
GROWN = (2, 4)  # the numbers of tasks between which growth is measured
GROWS = 1e-3  # a smaller part of the whole is none
QUANTITIES = {  # what may grow, and its unit
    "strategy memory on the device": (lambda s: s.strategy, "bytes"),
    "buffer in the host's memory": (lambda s: s.buffer, "bytes"),
    "a stage's checkpoint": (lambda s: s.weights_disk + s.memory_disk, "bytes"),
    "FLOPs of a step": (lambda s: s.step_flops, "FLOPs"),
    "FLOPs of a stage's end": (lambda s: s.end_flops, "FLOPs"),
    "most memory at once": (lambda s: max(s.peak, s.end_peak), "bytes"),
}


@dataclass(frozen=True)
class Work:
    """What is to be learned and scored: the stages and tests that are rehearsed, and how many there
    are of each.
    """

    stages: Sequence[Task[Encoded]]
    tests: Sequence[Test]
    tokens: Sequence[int]  # of every stage's training rows
    asked: int  # tests

    @property
    def count(self) -> int:
        """The number of stages."""
        return len(self.tokens)


@dataclass(frozen=True)
class Plan:
    """What was measured, and what follows for all stages. FLOPs are a stage's, `scoring` those of
    one matrix row.
    """

    model: str
    parameters: int
    trained: int
    stages: Sequence[Stage]  # rehearsed
    grown: Sequence[Stage]  # of equal tasks
    names: Sequence[str]
    training: Sequence[float]
    scoring: float
    checkpoints: float
    predictions: float
    steps: int
    speed: float  # FLOP/s of all devices, as assumed

    def growth(self, of: Callable[[Stage], float]) -> float:
        """What each further task adds to a quantity; 0 where it is the same after 2 and 4 tasks."""
        few, more = (of(self.grown[n - 1]) for n in GROWN)
        return (more - few) / (GROWN[1] - GROWN[0]) if abs(more - few) > GROWS * more else 0.0

    def last(self, of: Callable[[Stage], float]) -> float:
        """A quantity in the last stage."""
        return of(self.stages[-1]) + self.growth(of) * (len(self.training) - len(self.stages))

    @property
    def flops(self) -> float:
        """Of the whole run: every stage, and a row of scores before the first and after each."""
        return sum(self.training) + self.scoring * (len(self.training) + 1)

    def hours(self, flops: float) -> float:
        """How long so many FLOPs take at the assumed speed."""
        return flops / self.speed / 3600


def plan(config: DictConfig) -> Plan:
    """Measure what the configured run would take. Raises ContinualError for what the run itself
    would refuse.
    """
    validate.check(config)
    _check(config)
    config = _drawn(config)
    recipe, settings, ghosts = build.recipe(config), config.plan, Ghosts()
    stream = Stream("planned", "given", (), ()) if settings.tasks else build.stream(config)
    strategy = build.strategy(config)
    validate.refuse_optimizer(config, strategy)
    with ghosts.shapes():
        model = build.model(config, stream)
    ghosts.haunt(model.net)
    work = _given(config, model) if settings.tasks else _streamed(config, model, stream)
    go: dict[str, Any] = {"recipe": recipe, "seed": config.seed}
    stages = [
        rehearse(ghosts, model, task, strategy, steps=settings.steps, **go) for task in work.stages
    ]
    grown = _grown(ghosts, model, config, work, stages, go)
    per_test = [scored(ghosts, model, test, config.score.batch_size) for test in work.tests]
    parameters = list(model.net.parameters())
    made = Plan(
        model.net.config.model_type,
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in parameters if p.requires_grad),
        stages,
        grown,
        [t.name for t in work.stages],
        (),
        sum(per_test) / len(per_test) * work.asked,
        0.0,
        0.0,
        0,
        settings.gpus * (settings.flops or measured()) * settings.share,
    )
    return _summed(made, work, config)


def _summed(made: Plan, work: Work, config: DictConfig) -> Plan:
    """The sums over all stages, the later ones by their tokens and by how the strategy's work
    grows.
    """
    known = made.stages
    a_token = sum(s.flops for s in known[-2:]) / sum(s.tokens for s in known[-2:])
    grows = made.growth(lambda s: s.flops / s.tokens)
    later = [
        tokens * (a_token + grows * (i + 1)) for i, tokens in enumerate(work.tokens[len(known) :])
    ]
    training = [*(s.flops for s in known), *later]
    made = replace(made, training=training)
    keep = min(config.checkpoint.keep or work.count, work.count)
    each = [
        made.last(lambda s: s.weights_disk + s.memory_disk)
        - i * made.growth(lambda s: s.weights_disk + s.memory_disk)
        for i in range(keep)
    ]
    within = 2 * known[-1].progress_disk + 2 * max(each)  # of the stage under way
    rows = sum(_line(test) for test in work.tests) / len(work.tests) * work.asked
    steps = sum(s.steps for s in known) + known[-1].steps * len(later)
    return replace(
        made, checkpoints=sum(each) + within, predictions=rows * (work.count + 1), steps=steps
    )


def _line(test: Test) -> int:
    """The bytes of a task's predictions, were they all the references."""
    return sum(
        len(
            json.dumps(
                {
                    "id": e.id,
                    "prompt": asked.text or "token" * len(asked.ids),
                    "answer": e.outputs[0],
                    "references": list(e.outputs),
                    "score": 1.0,
                },
                ensure_ascii=False,
            ).encode()
        )
        + 1
        for e, asked in zip(test.examples, test.encoded, strict=True)
    )


def _grown(
    ghosts: Ghosts,
    model: Model,
    config: DictConfig,
    work: Work,
    stages: Sequence[Stage],
    go: dict[str, Any],
) -> list[Stage]:
    """Equal tasks one after another: what differs between them is the strategy's doing."""
    if config.plan.tasks and len(stages) >= GROWN[1]:
        return list(stages)  # they are equal
    strategy, first = build.strategy(config), work.stages[0]
    length = sorted(len(e.ids) for e in first.train)[len(first.train) // 2]
    response = sorted(sum(e.response_mask) for e in first.train)[len(first.train) // 2]
    tasks = [
        _task(i, len(first.train), length, response, GROWN[1], _words(model))
        for i in range(GROWN[1])
    ]
    return [
        rehearse(ghosts, model, task, strategy, steps=config.plan.steps, **go) for task in tasks
    ]


def _streamed(config: DictConfig, model: Model, stream: Stream) -> Work:
    """The stream's own rows, in its order."""
    encoder, names = build.encoder(config, model), index_tasks(stream)
    tests = [
        build.test(config, t, encoder, i) for i, t in enumerate(stream.tasks[: config.plan.stages])
    ]
    stages = [encoder.encode_task(t, names, include_dev=False) for t in stream.stages]
    return Work(
        stages[: config.plan.stages],
        tests,
        [sum(len(e.ids) for e in t.train) for t in stages],
        len(stream.tasks),
    )


def _given(config: DictConfig, model: Model) -> Work:
    """Equal tasks of random tokens."""
    p, words = config.plan, _words(model)
    number = min(p.tasks, max(p.stages, GROWN[1]))
    stages = [_task(i, p.examples, p.tokens, p.response, p.tasks, words) for i in range(number)]
    rows = _task(0, p.tests, p.tokens, p.response, p.tasks, words).train
    prompts = [
        replace(e, ids=e.ids[: -p.response], response_mask=e.response_mask[: -p.response])
        for e in rows
    ]
    test = Test(
        "task 0",
        "exact_match",
        [Example(e.id, "task 0", "", outputs=("token" * p.response,)) for e in rows],
        prompts,
        p.response,
    )
    return Work(stages, [test], [p.examples * p.tokens] * p.tasks, p.tasks)


def _words(model: Model) -> int:
    return int(model.net.config.get_text_config().vocab_size)


def _task(index: int, n: int, tokens: int, response: int, tasks: int, words: int) -> Task[Encoded]:
    """Rows of the same length that share no beginning."""
    rng = random.Random(index)
    mask = (False,) * (tokens - response) + (True,) * response
    rows = [
        Encoded(
            f"task {index}/{i}",
            index,
            tuple(rng.choices(range(words), k=tokens)),
            mask,
            "token" * tokens,
        )
        for i in range(n)
    ]
    return Task(f"task {index}", rows, task_names=tuple(f"task {i}" for i in range(tasks)))


def _check(config: DictConfig) -> None:
    p = config.plan
    if config.train.shard:
        raise ConfigError(
            "train.shard=true is not planned: continual plan counts devices that "
            "each hold the whole model; plan with train.shard=false, and see "
            "docs/scale.md for what shards divide"
        )
    wrong = [
        f"plan.{key}={p[key]}: expected a whole number of at least {least}"
        for key, least in LEAST.items()
        if (p[key] is not None or key != "tasks") and (mistyped("int", p[key]) or p[key] < least)
    ]
    wrong += [
        f"plan.{key}={p[key]}: expected a number above 0"
        for key in ("memory", "flops", "share")
        if (p[key] is not None or key == "share") and (mistyped("float", p[key]) or not p[key] > 0)
    ]
    if wrong or p.response >= p.tokens:
        short = f"plan.response={p.response}: expected fewer than plan.tokens={p.tokens}"
        raise ConfigError(gathered(wrong or [short]))


def _drawn(config: DictConfig) -> DictConfig:
    """The configuration with a model that needs no weights, computed as on a CPU."""
    made: DictConfig = OmegaConf.create(OmegaConf.to_container(config, resolve=True))  # type: ignore[assignment]
    with open_dict(made):
        made.model.drawn, made.device = True, "cpu"
    return made


def measured(n: int = 2048, rounds: int = 3) -> float:
    """FLOP/s of a large matrix product on this machine, in fp32 on a CPU or bf16 on a GPU."""
    gpu = torch.cuda.is_available()
    kind: dict[str, Any] = {
        "device": "cuda" if gpu else "cpu",
        "dtype": torch.bfloat16 if gpu else torch.float32,
    }
    a, spent = torch.ones(n * (1 + 3 * gpu), n * (1 + 3 * gpu), **kind), []
    for _ in range(rounds):
        began = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for it
        spent.append(time.perf_counter() - began)
    return 2 * len(a) ** 3 / min(spent)


def show(made: Plan, config: DictConfig, console: Console) -> None:
    """Print the tables."""
    last = max(made.stages, key=lambda s: max(s.peak, s.end_peak))
    grows = made.growth(lambda s: max(s.peak, s.end_peak))
    console.print(
        f"{made.model}: {made.parameters / 1e6:,.1f}M parameters, "
        f"{made.trained / 1e6:,.2f}M of them trained; {len(made.training)} stages, "
        f"{made.steps:,} steps",
        highlight=False,
    )
    most = made.last(lambda s: max(s.peak, s.end_peak)) if grows else max(last.peak, last.end_peak)
    rows = [
        ("weights", last.weights),
        ("gradients", last.gradients),
        ("optimizer", last.optimizer),
        ("strategy", round(made.last(lambda s: s.strategy))),
        ("activations and what else a step holds", last.activations),
        ("the most at once in a step", last.peak),
        ("at a stage's end", last.end_peak),
        ("most", round(most)),
    ]
    _print(
        console,
        "memory of one device",
        ("", "bytes"),
        [(name, _bytes(size)) for name, size in rows],
    )
    if memory := config.plan.memory:
        fits = "fits in" if most <= memory * 1e9 else "does not fit in"
        console.print(f"{_bytes(most)} {fits} {memory} GB", highlight=False)
    spans = [
        *((made.names[i], f) for i, f in enumerate(made.training[: len(made.names)])),
        *(
            [
                (
                    "each later stage, in the mean",
                    sum(made.training[len(made.names) :]) / (len(made.training) - len(made.names)),
                )
            ]
            if len(made.training) > len(made.names)
            else []
        ),
        ("all stages", sum(made.training)),
        ("a row of scores", made.scoring),
        ("all scores", made.scoring * (len(made.training) + 1)),
        ("in all", made.flops),
    ]
    _print(
        console,
        f"work, at {_flops(made.speed)}/s",
        ("", "FLOPs", "hours"),
        [(name, _flops(f), f"{made.hours(f):,.3g}") for name, f in spans],
    )
    _print(
        console,
        "disk",
        ("", "bytes"),
        [("checkpoints", _bytes(made.checkpoints)), ("predictions", _bytes(made.predictions))],
    )
    grown = [
        (
            name,
            _amount(made.last(of), unit),
            f"+{_amount(more, unit)} a task" if (more := made.growth(of)) else "constant",
        )
        for name, (of, unit) in QUANTITIES.items()
    ]
    _print(
        console,
        "with the number of tasks",
        ("", "in the last stage", "grows"),
        [
            *grown,
            ("a row of scores", _amount(made.scoring, "FLOPs"), "linear; in all quadratic"),
            (
                "a stage's predictions",
                _bytes(made.predictions / (len(made.training) + 1)),
                "linear; in all quadratic",
            ),
        ],
    )
    console.print(
        f"not counted: {', '.join(_uncounted(config))}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _uncounted(config: DictConfig) -> Iterator[str]:
    """What the run would do besides."""
    yield "marking answers"
    if config.score.judge.name is not None:
        yield f"the judge {config.score.judge.name}"
    if config.score.during is not None:
        yield f"looking at forgetting every {config.score.during} steps (score.during)"
    if probes := config.get("probe"):
        yield f"what the probes ask after each stage ({', '.join(map(str, probes))})"


def _print(
    console: Console, title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _amount(value: float, unit: str) -> str:
    return _bytes(value) if unit == "bytes" else _flops(value)


def _flops(value: float) -> str:
    """With the prefix that leaves at most three digits before the point."""
    power = next((p for p in range(7) if value < 1000 ** (p + 1)), 6)
    return f"{value / 1000**power:,.3g} {' kMGTPE'[power].strip()}FLOP"


def _bytes(size: float) -> str:
    """In GB, or MB where that says more."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.2f} MB"
