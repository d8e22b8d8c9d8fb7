"""Estimate a run's memory, FLOPs, hours and disk space, and how they grow with the tasks.

No estimate is a formula of the model or the strategy: a few steps and the end of the engine's own
stages are rehearsed (`continual.runs.rehearse`) and measured.
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
from continual.errors import ConfigError, Problems, mistyped
from continual.evaluation.scoring import EvalSet
from continual.models.model import Model
from continual.runs import build, validate
from continual.runs.rehearse import CostCounterMode, StageCost, count_scoring_flops, rehearse

MINIMUMS = {
    "num_tasks": 1,
    "train_examples": 1,
    "test_examples": 1,
    "tokens_per_example": 2,
    "response_tokens": 1,
    "rehearse_stages": 1,
    "rehearse_steps": 2,
    "gpus": 1,
}
GROWTH_TASKS = (2, 4)  # growth is measured between these numbers of tasks
GROWTH_TOLERANCE = 1e-3  # a smaller relative change counts as constant


def _checkpoint_bytes(cost: StageCost) -> float:
    return cost.weight_disk_bytes + cost.memory_disk_bytes


def _peak_bytes(cost: StageCost) -> float:
    return max(cost.peak_bytes, cost.end_peak_bytes)


# Quantities that may grow with the number of tasks, each with its unit.
GROWTH_QUANTITIES: dict[str, tuple[Callable[[StageCost], float], str]] = {
    "strategy memory on the device": (lambda cost: cost.strategy_bytes, "bytes"),
    "buffer in the host's memory": (lambda cost: cost.buffer_bytes, "bytes"),
    "a stage's checkpoint": (_checkpoint_bytes, "bytes"),
    "FLOPs of a step": (lambda cost: cost.step_flops, "FLOPs"),
    "FLOPs of a stage's end": (lambda cost: cost.end_flops, "FLOPs"),
    "most memory at once": (_peak_bytes, "bytes"),
}


@dataclass(frozen=True)
class Workload:
    """The stages and test sets to rehearse, and the size of the whole run."""

    stages: Sequence[Task[Encoded]]  # rehearsed
    test_sets: Sequence[EvalSet]  # rehearsed
    stage_tokens: Sequence[int]  # tokens of the training rows of every stage
    num_test_sets: int

    @property
    def num_stages(self) -> int:
        """Number of stages of the whole run."""
        return len(self.stage_tokens)


@dataclass(frozen=True)
class CostEstimate:
    """Measured costs of the rehearsed stages, and the estimate for the whole run."""

    model_type: str
    num_parameters: int
    num_trained: int
    stage_costs: Sequence[StageCost]  # of the rehearsed stages
    growth_costs: Sequence[StageCost]  # of equal tasks, one after another
    stage_names: Sequence[str]  # of the rehearsed stages
    training_flops: Sequence[float]  # of each stage
    scoring_flops: float  # of one row of the matrix
    checkpoint_bytes: float
    prediction_bytes: float
    num_steps: int
    flops_per_second: float  # assumed for all devices together

    def growth_per_task(self, quantity: Callable[[StageCost], float]) -> float:
        """Return what each further task adds to a quantity.

        It is 0 if the quantity is the same after both of GROWTH_TASKS.
        """
        few_tasks, more_tasks = GROWTH_TASKS
        before = quantity(self.growth_costs[few_tasks - 1])
        after = quantity(self.growth_costs[more_tasks - 1])
        if abs(after - before) <= GROWTH_TOLERANCE * after:
            return 0.0
        return (after - before) / (more_tasks - few_tasks)

    def in_last_stage(self, quantity: Callable[[StageCost], float]) -> float:
        """Return a quantity in the run's last stage."""
        later_stages = len(self.training_flops) - len(self.stage_costs)
        return quantity(self.stage_costs[-1]) + self.growth_per_task(quantity) * later_stages

    @property
    def total_flops(self) -> float:
        """FLOPs of the run: all stages, and a row of scores before the first and after each."""
        return sum(self.training_flops) + self.scoring_flops * (len(self.training_flops) + 1)

    def hours(self, flops: float) -> float:
        """Return the hours that these FLOPs take at the assumed speed."""
        return flops / self.flops_per_second / 3600


def plan(config: DictConfig) -> CostEstimate:
    """Estimate the costs of the configured run.

    Raises ContinualError for a configuration that the run itself would refuse.
    """
    validate.check(config)
    _check_plan_keys(config)
    config = _with_random_weights(config)
    recipe = build.recipe(config)
    settings = config.plan
    counter = CostCounterMode()
    is_synthetic = bool(settings.num_tasks)
    stream = Stream("planned", "given", (), ()) if is_synthetic else build.stream(config)
    strategy = build.strategy(config)
    validate.refuse_optimizer(config, strategy)
    with counter.meta_device():
        model = build.model(config, stream)
    counter.convert_to_fake(model.net)

    if is_synthetic:
        work = _synthetic_workload(config, model)
    else:
        work = _stream_workload(config, model, stream)
    options: dict[str, Any] = {"recipe": recipe, "seed": config.seed}
    stage_costs = [
        rehearse(counter, model, task, strategy, steps=settings.rehearse_steps, **options)
        for task in work.stages
    ]
    growth_costs = _rehearse_equal_tasks(counter, model, config, work, stage_costs, options)
    flops_per_test_set = [
        count_scoring_flops(counter, model, test, config.score.batch_size)
        for test in work.test_sets
    ]

    parameters = list(model.net.parameters())
    peak_flops = settings.peak_flops or measure_flops_per_second()
    estimate = CostEstimate(
        model_type=model.net.config.model_type,
        num_parameters=sum(p.numel() for p in parameters),
        num_trained=sum(p.numel() for p in parameters if p.requires_grad),
        stage_costs=stage_costs,
        growth_costs=growth_costs,
        stage_names=[task.name for task in work.stages],
        training_flops=(),
        scoring_flops=_mean(flops_per_test_set) * work.num_test_sets,
        checkpoint_bytes=0.0,
        prediction_bytes=0.0,
        num_steps=0,
        flops_per_second=settings.gpus * peak_flops * settings.flops_utilization,
    )
    return _sum_stages(estimate, work, config)


def _mean(values: Sequence[float]) -> float:
    """Return the mean of at least one value."""
    return sum(values) / len(values)


def _sum_stages(estimate: CostEstimate, work: Workload, config: DictConfig) -> CostEstimate:
    """Add the sums over all stages.

    Stages that were not rehearsed follow from their tokens and from the growth of FLOPs per token.
    """
    known = estimate.stage_costs
    flops = sum(cost.total_flops for cost in known[-2:])
    flops_per_token = flops / sum(cost.train_tokens for cost in known[-2:])
    growth = estimate.growth_per_task(lambda cost: cost.total_flops / cost.train_tokens)
    later = [
        tokens * (flops_per_token + growth * (i + 1))
        for i, tokens in enumerate(work.stage_tokens[len(known) :])
    ]
    estimate = replace(estimate, training_flops=[*(cost.total_flops for cost in known), *later])

    num_kept = min(config.checkpoint.keep or work.num_stages, work.num_stages)
    last = estimate.in_last_stage(_checkpoint_bytes)
    growth = estimate.growth_per_task(_checkpoint_bytes)
    kept = [last - i * growth for i in range(num_kept)]
    # The two checkpoints within the stage in progress.
    step_checkpoints = 2 * known[-1].progress_disk_bytes + 2 * max(kept)

    row_bytes = _mean([_prediction_bytes(test) for test in work.test_sets]) * work.num_test_sets
    return replace(
        estimate,
        checkpoint_bytes=sum(kept) + step_checkpoints,
        prediction_bytes=row_bytes * (work.num_stages + 1),
        num_steps=sum(cost.steps for cost in known) + known[-1].steps * len(later),
    )


def _prediction_bytes(test: EvalSet) -> int:
    """Return the bytes of a task's predictions if every answer is the first reference."""
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
    counter: CostCounterMode,
    model: Model,
    config: DictConfig,
    work: Workload,
    stage_costs: Sequence[StageCost],
    options: dict[str, Any],
) -> list[StageCost]:
    """Rehearse equal tasks one after another: the strategy alone makes them differ in cost.

    Each is of the size of the first stage, with rows of its median length.
    """
    num_tasks = GROWTH_TASKS[1]
    if config.plan.num_tasks and len(stage_costs) >= num_tasks:
        return list(stage_costs)  # synthetic tasks are equal already
    strategy = build.strategy(config)
    rows = work.stages[0].train
    middle = len(rows) // 2
    tokens = sorted(len(e.ids) for e in rows)[middle]
    response_tokens = sorted(sum(e.response_mask) for e in rows)[middle]
    tasks = [
        _make_random_task(i, len(rows), tokens, response_tokens, num_tasks, _vocab_size(model))
        for i in range(num_tasks)
    ]
    return [
        rehearse(counter, model, task, strategy, steps=config.plan.rehearse_steps, **options)
        for task in tasks
    ]


def _stream_workload(config: DictConfig, model: Model, stream: Stream) -> Workload:
    """Return the workload of the stream's own rows, in its order."""
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
    """Return a workload of equal tasks of random tokens, as plan.num_tasks and others say."""
    p, words = config.plan, _vocab_size(model)
    number = min(p.num_tasks, max(p.rehearse_stages, GROWTH_TASKS[1]))
    stages = [
        _make_random_task(
            i, p.train_examples, p.tokens_per_example, p.response_tokens, p.num_tasks, words
        )
        for i in range(number)
    ]
    rows = _make_random_task(
        0, p.test_examples, p.tokens_per_example, p.response_tokens, p.num_tasks, words
    ).train
    prompts = [
        replace(
            e, ids=e.ids[: -p.response_tokens], response_mask=e.response_mask[: -p.response_tokens]
        )
        for e in rows
    ]
    test = EvalSet(
        "task 0",
        "exact_match",
        [Example(e.id, "task 0", "", outputs=("token" * p.response_tokens,)) for e in rows],
        prompts,
        p.response_tokens,
    )
    return Workload(
        stages, [test], [p.train_examples * p.tokens_per_example] * p.num_tasks, p.num_tasks
    )


def _vocab_size(model: Model) -> int:
    return int(model.net.config.get_text_config().vocab_size)


def _make_random_task(
    index: int, n: int, tokens: int, response: int, tasks: int, vocab_size: int
) -> Task[Encoded]:
    """Make a task of random rows, all of the same length and without a shared prefix."""
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
    """Raise ConfigError for values of plan.* that cannot work."""
    settings = config.plan
    if config.train.shard:
        raise ConfigError(
            "train.shard=true is not planned: continual plan counts devices that "
            "each hold the whole model; plan with train.shard=false, and see "
            "docs/scale.md for what shards divide"
        )
    problems = Problems()
    for key, minimum in MINIMUMS.items():
        value = settings[key]
        if value is None and key == "num_tasks":
            continue
        problems.require(
            not mistyped("int", value) and value >= minimum,
            f"plan.{key}={value}: expected a whole number of at least {minimum}",
        )
    for key in ("memory_gb", "peak_flops", "flops_utilization"):
        value = settings[key]
        if value is None and key != "flops_utilization":
            continue
        problems.require(
            not mistyped("float", value) and value > 0,
            f"plan.{key}={value}: expected a number above 0",
        )
    problems.raise_if_any()
    if settings.response_tokens >= settings.tokens_per_example:
        raise ConfigError(
            f"plan.response_tokens={settings.response_tokens}: expected fewer than "
            f"plan.tokens_per_example={settings.tokens_per_example}"
        )


def _with_random_weights(config: DictConfig) -> DictConfig:
    """Copy the configuration, with a model that needs no weights, on the CPU."""
    copy = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    assert isinstance(copy, DictConfig)
    with open_dict(copy):
        copy.model.random_weights = True
        copy.device = "cpu"
    return copy


def measure_flops_per_second(n: int = 2048, rounds: int = 3) -> float:
    """Return the FLOP/s of a large matrix product on this machine: fp32 on a CPU, bf16 on a GPU.

    The matrix has n rows and columns, four times as many on a GPU; the fastest round counts.
    """
    if torch.cuda.is_available():
        matrix = torch.ones(4 * n, 4 * n, device="cuda", dtype=torch.bfloat16)
    else:
        matrix = torch.ones(n, n)
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return 2 * len(matrix) ** 3 / min(seconds)


def print_plan(estimate: CostEstimate, config: DictConfig, console: Console) -> None:
    """Print the tables of memory, work, disk space and growth."""
    console.print(
        f"{estimate.model_type}: {estimate.num_parameters / 1e6:,.1f}M parameters, "
        f"{estimate.num_trained / 1e6:,.2f}M of them trained; {len(estimate.training_flops)} "
        f"stages, {estimate.num_steps:,} steps",
        highlight=False,
    )
    _print_memory(estimate, config.plan.memory_gb, console)
    _print_work(estimate, console)
    disk = [
        ("checkpoints", _format_bytes(estimate.checkpoint_bytes)),
        ("predictions", _format_bytes(estimate.prediction_bytes)),
    ]
    _print_table(console, "disk", ("", "bytes"), disk)
    _print_growth(estimate, console)
    console.print(
        f"not counted: {', '.join(_list_uncounted(config))}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _print_memory(estimate: CostEstimate, memory_gb: float | None, console: Console) -> None:
    """Print the parts of a device's memory, and compare the peak with `memory_gb` if given."""
    largest = max(estimate.stage_costs, key=_peak_bytes)
    grows = estimate.growth_per_task(_peak_bytes)
    peak = estimate.in_last_stage(_peak_bytes) if grows else _peak_bytes(largest)
    parts = [
        ("weights", largest.weight_bytes),
        ("gradients", largest.gradient_bytes),
        ("optimizer", largest.optimizer_bytes),
        ("strategy", round(estimate.in_last_stage(lambda cost: cost.strategy_bytes))),
        ("activations and what else a step holds", largest.activation_bytes),
        ("the most at once in a step", largest.peak_bytes),
        ("at a stage's end", largest.end_peak_bytes),
        ("most", round(peak)),
    ]
    rows = [(name, _format_bytes(size)) for name, size in parts]
    _print_table(console, "memory of one device", ("", "bytes"), rows)
    if memory_gb:
        fits = "fits in" if peak <= memory_gb * 1e9 else "does not fit in"
        console.print(f"{_format_bytes(peak)} {fits} {memory_gb} GB", highlight=False)


def _print_work(estimate: CostEstimate, console: Console) -> None:
    """Print the FLOPs and hours of the stages and of scoring."""
    flops = estimate.training_flops
    later = flops[len(estimate.stage_names) :]
    spans = list(zip(estimate.stage_names, flops, strict=False))
    if later:
        spans.append(("each later stage, in the mean", _mean(later)))
    spans += [
        ("all stages", sum(flops)),
        ("a row of scores", estimate.scoring_flops),
        ("all scores", estimate.scoring_flops * (len(flops) + 1)),
        ("in all", estimate.total_flops),
    ]
    _print_table(
        console,
        f"work, at {_format_flops(estimate.flops_per_second)}/s",
        ("", "FLOPs", "hours"),
        [(name, _format_flops(f), f"{estimate.hours(f):,.3g}") for name, f in spans],
    )


def _print_growth(estimate: CostEstimate, console: Console) -> None:
    """Print each quantity in the last stage, and how it grows with the number of tasks."""
    rows = []
    for name, (quantity, unit) in GROWTH_QUANTITIES.items():
        growth = estimate.growth_per_task(quantity)
        in_last_stage = _format_amount(estimate.in_last_stage(quantity), unit)
        grows = f"+{_format_amount(growth, unit)} a task" if growth else "constant"
        rows.append((name, in_last_stage, grows))
    row_bytes = estimate.prediction_bytes / (len(estimate.training_flops) + 1)
    linear = "linear; in all quadratic"
    rows.append(("a row of scores", _format_flops(estimate.scoring_flops), linear))
    rows.append(("a stage's predictions", _format_bytes(row_bytes), linear))
    _print_table(console, "with the number of tasks", ("", "in the last stage", "grows"), rows)


def _list_uncounted(config: DictConfig) -> Iterator[str]:
    """Yield the work of the run that the estimate leaves out."""
    yield "marking answers"
    if config.score.judge.name is not None:
        yield f"the judge {config.score.judge.name}"
    if config.score.every_steps is not None:
        yield f"looking at forgetting every {config.score.every_steps} steps (score.every_steps)"
    probes = config.get("probe")
    if probes:
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
    """Format FLOPs with the prefix that leaves at most three digits before the point."""
    power = next((p for p in range(7) if value < 1000 ** (p + 1)), 6)
    return f"{value / 1000**power:,.3g} {' kMGTPE'[power].strip()}FLOP"


def _format_bytes(size: float) -> str:
    """Format bytes in GB, or in MB below 1 GB."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.2f} MB"
