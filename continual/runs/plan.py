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
from continual.evaluation.scoring import EvalSet
from continual.models.model import Model
from continual.runs import build, validate
from continual.runs.rehearse import CostCounterMode, StageCost, count_scoring_flops, rehearse

MINIMUMS = {
    "tasks": 1,
    "examples": 1,
    "tests": 1,
    "tokens": 2,
    "response": 1,
    "stages": 1,
    "steps": 2,
    "gpus": 1,
}
GROWTH_TASKS = (2, 4)  # the numbers of tasks between which growth is measured
GROWTH_TOLERANCE = 1e-3  # a smaller part of the whole is none
GROWTH_QUANTITIES = {  # what may grow, and its unit
    "strategy memory on the device": (lambda s: s.strategy, "bytes"),
    "buffer in the host's memory": (lambda s: s.buffer, "bytes"),
    "a stage's checkpoint": (lambda s: s.weights_disk + s.memory_disk, "bytes"),
    "FLOPs of a step": (lambda s: s.step_flops, "FLOPs"),
    "FLOPs of a stage's end": (lambda s: s.end_flops, "FLOPs"),
    "most memory at once": (lambda s: max(s.peak, s.end_peak), "bytes"),
}


@dataclass(frozen=True)
class Workload:
    """What is to be learned and scored: the stages and tests that are rehearsed, and how many there
    are of each.
    """

    stages: Sequence[Task[Encoded]]
    test_sets: Sequence[EvalSet]
    stage_tokens: Sequence[int]  # of every stage's training rows
    num_test_sets: int  # tests

    @property
    def num_stages(self) -> int:
        """The number of stages."""
        return len(self.stage_tokens)


@dataclass(frozen=True)
class CostEstimate:
    """What was measured, and what follows for all stages. FLOPs are a stage's, `scoring` those of
    one matrix row.
    """

    model_type: str
    num_parameters: int
    num_trained: int
    stage_costs: Sequence[StageCost]  # rehearsed
    growth_costs: Sequence[StageCost]  # of equal tasks
    stage_names: Sequence[str]
    training_flops: Sequence[float]
    scoring_flops: float
    checkpoint_bytes: float
    prediction_bytes: float
    num_steps: int
    flops_per_second: float  # FLOP/s of all devices, as assumed

    def growth_per_task(self, quantity: Callable[[StageCost], float]) -> float:
        """What each further task adds to a quantity; 0 where it is the same after 2 and 4 tasks."""
        few, more = (quantity(self.growth_costs[n - 1]) for n in GROWTH_TASKS)
        return (
            (more - few) / (GROWTH_TASKS[1] - GROWTH_TASKS[0])
            if abs(more - few) > GROWTH_TOLERANCE * more
            else 0.0
        )

    def in_last_stage(self, quantity: Callable[[StageCost], float]) -> float:
        """A quantity in the last stage."""
        return quantity(self.stage_costs[-1]) + self.growth_per_task(quantity) * (
            len(self.training_flops) - len(self.stage_costs)
        )

    @property
    def total_flops(self) -> float:
        """Of the whole run: every stage, and a row of scores before the first and after each."""
        return sum(self.training_flops) + self.scoring_flops * (len(self.training_flops) + 1)

    def hours(self, flops: float) -> float:
        """How long so many FLOPs take at the assumed speed."""
        return flops / self.flops_per_second / 3600


def plan(config: DictConfig) -> CostEstimate:
    """Measure what the configured run would take. Raises ContinualError for what the run itself
    would refuse.
    """
    validate.check(config)
    _check_plan_keys(config)
    config = _with_random_weights(config)
    recipe, settings, ghosts = build.recipe(config), config.plan, CostCounterMode()
    stream = Stream("planned", "given", (), ()) if settings.tasks else build.stream(config)
    strategy = build.strategy(config)
    validate.refuse_optimizer(config, strategy)
    with ghosts.meta_device():
        model = build.model(config, stream)
    ghosts.convert_to_fake(model.net)
    work = (
        _synthetic_workload(config, model)
        if settings.tasks
        else _stream_workload(config, model, stream)
    )
    go: dict[str, Any] = {"recipe": recipe, "seed": config.seed}
    stages = [
        rehearse(ghosts, model, task, strategy, steps=settings.steps, **go) for task in work.stages
    ]
    grown = _rehearse_equal_tasks(ghosts, model, config, work, stages, go)
    per_test = [
        count_scoring_flops(ghosts, model, test, config.score.batch_size) for test in work.test_sets
    ]
    parameters = list(model.net.parameters())
    made = CostEstimate(
        model.net.config.model_type,
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in parameters if p.requires_grad),
        stages,
        grown,
        [t.name for t in work.stages],
        (),
        sum(per_test) / len(per_test) * work.num_test_sets,
        0.0,
        0.0,
        0,
        settings.gpus * (settings.flops or measure_flops_per_second()) * settings.share,
    )
    return _sum_stages(made, work, config)


def _sum_stages(made: CostEstimate, work: Workload, config: DictConfig) -> CostEstimate:
    """The sums over all stages, the later ones by their tokens and by how the strategy's work
    grows.
    """
    known = made.stage_costs
    a_token = sum(s.total_flops for s in known[-2:]) / sum(s.train_tokens for s in known[-2:])
    grows = made.growth_per_task(lambda s: s.total_flops / s.train_tokens)
    later = [
        tokens * (a_token + grows * (i + 1))
        for i, tokens in enumerate(work.stage_tokens[len(known) :])
    ]
    training = [*(s.total_flops for s in known), *later]
    made = replace(made, training_flops=training)
    keep = min(config.checkpoint.keep or work.num_stages, work.num_stages)
    each = [
        made.in_last_stage(lambda s: s.weight_disk_bytes + s.memory_disk_bytes)
        - i * made.growth_per_task(lambda s: s.weight_disk_bytes + s.memory_disk_bytes)
        for i in range(keep)
    ]
    within = 2 * known[-1].progress_disk_bytes + 2 * max(each)  # of the stage under way
    rows = (
        sum(_prediction_bytes(test) for test in work.test_sets)
        / len(work.test_sets)
        * work.num_test_sets
    )
    steps = sum(s.steps for s in known) + known[-1].steps * len(later)
    return replace(
        made,
        checkpoint_bytes=sum(each) + within,
        prediction_bytes=rows * (work.num_stages + 1),
        num_steps=steps,
    )


def _prediction_bytes(test: EvalSet) -> int:
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


def _rehearse_equal_tasks(
    ghosts: CostCounterMode,
    model: Model,
    config: DictConfig,
    work: Workload,
    stages: Sequence[StageCost],
    options: dict[str, Any],
) -> list[StageCost]:
    """Equal tasks one after another: what differs between them is the strategy's doing."""
    if config.plan.num_tasks and len(stages) >= GROWTH_TASKS[1]:
        return list(stages)  # they are equal
    strategy, first = build.strategy(config), work.stages[0]
    length = sorted(len(e.ids) for e in first.train)[len(first.train) // 2]
    response = sorted(sum(e.response_mask) for e in first.train)[len(first.train) // 2]
    tasks = [
        _make_random_task(
            i, len(first.train), length, response, GROWTH_TASKS[1], _vocab_size(model)
        )
        for i in range(GROWTH_TASKS[1])
    ]
    return [
        rehearse(ghosts, model, task, strategy, steps=config.plan.rehearse_steps, **options)
        for task in tasks
    ]


def _stream_workload(config: DictConfig, model: Model, stream: Stream) -> Workload:
    """The stream's own rows, in its order."""
    encoder, names = build.encoder(config, model), index_tasks(stream)
    tests = [
        build.test(config, t, encoder, i)
        for i, t in enumerate(stream.tasks[: config.plan.rehearse_stages])
    ]
    stages = [encoder.encode_task(t, names, include_dev=False) for t in stream.stages]
    return Workload(
        stages[: config.plan.rehearse_stages],
        tests,
        [sum(len(e.ids) for e in t.train) for t in stages],
        len(stream.tasks),
    )


def _synthetic_workload(config: DictConfig, model: Model) -> Workload:
    """Equal tasks of random tokens."""
    p, words = config.plan, _vocab_size(model)
    number = min(p.num_tasks, max(p.rehearse_stages, GROWTH_TASKS[1]))
    stages = [
        _make_random_task(i, p.train_examples, p.tokens_per_example, p.response_tokens, p.num_tasks, words)
        for i in range(number)
    ]
    rows = _make_random_task(0, p.test_examples, p.tokens_per_example, p.response_tokens, p.num_tasks, words).train
    prompts = [
        replace(e, ids=e.ids[: -p.response_tokens], response_mask=e.response_mask[: -p.response_tokens])
        for e in rows
    ]
    test = EvalSet(
        "task 0",
        "exact_match",
        [Example(e.id, "task 0", "", outputs=("token" * p.response_tokens,)) for e in rows],
        prompts,
        p.response_tokens,
    )
    return Workload(stages, [test], [p.train_examples * p.tokens_per_example] * p.num_tasks, p.num_tasks)


def _vocab_size(model: Model) -> int:
    return int(model.net.config.get_text_config().vocab_size)


def _make_random_task(
    index: int, n: int, tokens: int, response: int, tasks: int, vocab_size: int
) -> Task[Encoded]:
    """Rows of the same length that share no beginning."""
    rng = random.Random(index)
    mask = (False,) * (tokens - response) + (True,) * response
    rows = [
        Encoded(
            f"task {index}/{i}",
            index,
            tuple(rng.choices(range(vocab_size), k=tokens)),
            mask,
            "token" * tokens,
        )
        for i in range(n)
    ]
    return Task(f"task {index}", rows, task_names=tuple(f"task {i}" for i in range(tasks)))


def _check_plan_keys(config: DictConfig) -> None:
    p = config.plan
    if config.train.shard:
        raise ConfigError(
            "train.shard=true is not planned: continual plan counts devices that "
            "each hold the whole model; plan with train.shard=false, and see "
            "docs/scale.md for what shards divide"
        )
    wrong = [
        f"plan.{key}={p[key]}: expected a whole number of at least {least}"
        for key, least in MINIMUMS.items()
        if (p[key] is not None or key != "tasks") and (mistyped("int", p[key]) or p[key] < least)
    ]
    wrong += [
        f"plan.{key}={p[key]}: expected a number above 0"
        for key in ("memory", "flops", "share")
        if (p[key] is not None or key == "share") and (mistyped("float", p[key]) or not p[key] > 0)
    ]
    if wrong or p.response_tokens >= p.tokens_per_example:
        short = f"plan.response_tokens={p.response_tokens}: expected fewer than plan.tokens_per_example={p.tokens_per_example}"
        raise ConfigError(gathered(wrong or [short]))


def _with_random_weights(config: DictConfig) -> DictConfig:
    """The configuration with a model that needs no weights, computed as on a CPU."""
    made: DictConfig = OmegaConf.create(OmegaConf.to_container(config, resolve=True))  # type: ignore[assignment]
    with open_dict(made):
        made.model.random_weights, made.device = True, "cpu"
    return made


def measure_flops_per_second(n: int = 2048, rounds: int = 3) -> float:
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


def print_plan(estimate: CostEstimate, config: DictConfig, console: Console) -> None:
    """Print the tables."""
    last = max(estimate.stage_costs, key=lambda s: max(s.peak_bytes, s.end_peak_bytes))
    grows = estimate.growth_per_task(lambda s: max(s.peak_bytes, s.end_peak_bytes))
    console.print(
        f"{estimate.model_type}: {estimate.num_parameters / 1e6:,.1f}M parameters, "
        f"{estimate.num_trained / 1e6:,.2f}M of them trained; {len(estimate.training_flops)} stages, "
        f"{estimate.num_steps:,} steps",
        highlight=False,
    )
    most = (
        estimate.in_last_stage(lambda s: max(s.peak_bytes, s.end_peak_bytes))
        if grows
        else max(last.peak_bytes, last.end_peak_bytes)
    )
    rows = [
        ("weights", last.weight_bytes),
        ("gradients", last.gradient_bytes),
        ("optimizer", last.optimizer_bytes),
        ("strategy", round(estimate.in_last_stage(lambda s: s.strategy_bytes))),
        ("activations and what else a step holds", last.activation_bytes),
        ("the most at once in a step", last.peak_bytes),
        ("at a stage's end", last.end_peak_bytes),
        ("most", round(most)),
    ]
    _print_table(
        console,
        "memory of one device",
        ("", "bytes"),
        [(name, _format_bytes(size)) for name, size in rows],
    )
    if memory := config.plan.memory_gb:
        fits = "fits in" if most <= memory * 1e9 else "does not fit in"
        console.print(f"{_format_bytes(most)} {fits} {memory} GB", highlight=False)
    spans = [
        *(
            (estimate.stage_names[i], f)
            for i, f in enumerate(estimate.training_flops[: len(estimate.stage_names)])
        ),
        *(
            [
                (
                    "each later stage, in the mean",
                    sum(estimate.training_flops[len(estimate.stage_names) :])
                    / (len(estimate.training_flops) - len(estimate.stage_names)),
                )
            ]
            if len(estimate.training_flops) > len(estimate.stage_names)
            else []
        ),
        ("all stages", sum(estimate.training_flops)),
        ("a row of scores", estimate.scoring_flops),
        ("all scores", estimate.scoring_flops * (len(estimate.training_flops) + 1)),
        ("in all", estimate.total_flops),
    ]
    _print_table(
        console,
        f"work, at {_format_flops(estimate.flops_per_second)}/s",
        ("", "FLOPs", "hours"),
        [(name, _format_flops(f), f"{estimate.hours(f):,.3g}") for name, f in spans],
    )
    _print_table(
        console,
        "disk",
        ("", "bytes"),
        [
            ("checkpoints", _format_bytes(estimate.checkpoint_bytes)),
            ("predictions", _format_bytes(estimate.prediction_bytes)),
        ],
    )
    grown = [
        (
            name,
            _format_amount(estimate.in_last_stage(of), unit),
            f"+{_format_amount(more, unit)} a task"
            if (more := estimate.growth_per_task(of))
            else "constant",
        )
        for name, (of, unit) in GROWTH_QUANTITIES.items()
    ]
    _print_table(
        console,
        "with the number of tasks",
        ("", "in the last stage", "grows"),
        [
            *grown,
            (
                "a row of scores",
                _format_amount(estimate.scoring_flops, "FLOPs"),
                "linear; in all quadratic",
            ),
            (
                "a stage's predictions",
                _format_bytes(estimate.prediction_bytes / (len(estimate.training_flops) + 1)),
                "linear; in all quadratic",
            ),
        ],
    )
    console.print(
        f"not counted: {', '.join(_list_uncounted(config))}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _list_uncounted(config: DictConfig) -> Iterator[str]:
    """What the run would do besides."""
    yield "marking answers"
    if config.score.judge.name is not None:
        yield f"the judge {config.score.judge.name}"
    if config.score.every_steps is not None:
        yield f"looking at forgetting every {config.score.every_steps} steps (score.every_steps)"
    if probes := config.get("probe"):
        yield f"what the probes ask after each stage ({', '.join(map(str, probes))})"


def _print_table(
    console: Console, title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _format_amount(value: float, unit: str) -> str:
    return _format_bytes(value) if unit == "bytes" else _format_flops(value)


def _format_flops(value: float) -> str:
    """With the prefix that leaves at most three digits before the point."""
    power = next((p for p in range(7) if value < 1000 ** (p + 1)), 6)
    return f"{value / 1000**power:,.3g} {' kMGTPE'[power].strip()}FLOP"


def _format_bytes(size: float) -> str:
    """In GB, or MB where that says more."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.2f} MB"
