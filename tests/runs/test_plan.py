"""What a run would take: the engine's own stages without their numbers, against stages that are
run.
"""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from hydra import compose, initialize_config_module
from rich.console import Console

from benchmarks import common
from continual.evaluation import scoring
from continual.models.loading import add_adapter, load_pretrained
from continual.models.weights import snapshot, weights
from continual.runs.plan import plan, print_plan
from continual.runs.rehearse import CostCounterMode, count_scoring_flops, rehearse
from continual.strategy.interface import Strategy, memory
from continual.training.stage import train_stage
from tests.support import toy
from tests.support.models import make_example, write_model

LORA = {"lora": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}}
GIVEN = (
    "plan.num_tasks=5",
    "plan.train_examples=8",
    "plan.test_examples=2",
    "plan.tokens_per_example=12",
    "plan.response_tokens=2",
    "plan.peak_flops=1e12",
    "plan.rehearse_stages=4",
    "train.batch_size=4",
)
SHORT = replace(toy.RECIPE, steps=2)


def network(adapter="none"):
    made = toy.make_model()
    if adapter != "none":
        made.net = add_adapter(made.net, adapter, LORA, seq2seq=False)
    return made


def rehearsed(strategy, adapter="none", stages=2, recipe=SHORT):
    return toy.rehearse_stages(partial(network, adapter), strategy, recipe, stages)


def executed(strategy, adapter="none", stages=2, recipe=SHORT):
    torch.manual_seed(0)
    model = network(adapter)
    return [
        common.flops(
            lambda i=i: train_stage(
                model, toy.make_task(i), strategy, recipe, seed=i, log_event=lambda event: None
            )
        )
        for i in range(stages)
    ]


def planned(model_folder, *words):
    with initialize_config_module("conf", version_base=None):
        return plan(compose("plan", ["model=hf", f"model.name={model_folder}", *GIVEN, *words]))


# Against stages that are run


@pytest.mark.parametrize(("name", "adapter"), [("naive", "lora"), ("maml", "none")])
def test_a_rehearsal_counts_the_flops_that_a_stage_executes(name, adapter):
    told = [s.total_flops for s in rehearsed(toy.strategy_from_config(name), adapter)]
    assert told == pytest.approx(executed(toy.strategy_from_config(name), adapter), rel=1e-3)


def test_a_few_steps_stand_for_a_stage_s_work():
    """Within 5%, though rows differ in length."""
    told = rehearsed(toy.strategy_from_config("naive"), stages=1, recipe=toy.RECIPE)[0].total_flops
    assert told == pytest.approx(
        executed(toy.strategy_from_config("naive"), stages=1, recipe=toy.RECIPE)[0], rel=0.05
    )


def test_memory_has_its_parts():
    stage = rehearsed(toy.strategy_from_config("naive"), "lora", stages=1)[0]
    model = network("lora")
    trained = sum(w.nbytes for w in weights(model).values())
    assert stage.weight_bytes == sum(
        t.nbytes for t in [*model.net.parameters(), *model.net.buffers()]
    )
    assert stage.gradient_bytes == stage.weight_disk_bytes == trained
    assert 2 * trained <= stage.optimizer_bytes <= 2 * trained + 8 * len(weights(model))
    assert stage.strategy_bytes == 0
    assert stage.activation_bytes > 0


def test_ewc_holds_an_anchor_and_an_importance_from_its_second_stage_on():
    stages = rehearsed(toy.strategy_from_config("ewc"))
    assert [s.strategy_bytes for s in stages] == [0, 2 * stages[0].gradient_bytes]
    assert all(s.end_flops > 0 for s in stages)
    assert [s.total_flops for s in stages] == pytest.approx(
        executed(toy.strategy_from_config("ewc")), rel=1e-3
    )


def test_early_stopping_is_planned_for_as_if_it_never_came():
    ghosts = CostCounterMode()
    with ghosts.meta_device():
        model = network()
    ghosts.convert_to_fake(model.net)
    recipe = replace(toy.RECIPE, patience=1)
    stage = rehearse(ghosts, model, toy.make_task(0), Strategy(), recipe, steps=2, seed=0)
    assert stage.steps == recipe.total_steps(len(toy.make_task(0).train))


def test_scoring_counts_the_flops_of_answers_as_long_as_may_be(model_folder):
    rows = toy.make_examples(0, 6)
    test = scoring.EvalSet("a", "perplexity", [make_example(id=e.id) for e in rows], rows, 4)
    ghosts = CostCounterMode()
    with ghosts.meta_device():
        model = load_pretrained(name=str(model_folder), device="cpu", random_weights=True)
    ghosts.convert_to_fake(model.net)
    real = load_pretrained(name=str(model_folder), device="cpu")
    assert count_scoring_flops(ghosts, model, test, 6) == common.flops(
        lambda: scoring.score_task(real, test, 6)
    )


# What grows


@dataclass(kw_only=True)
class Anchors(Strategy):
    """Keeps the weights of every task: a strategy that the engine has never seen."""

    kept: list = memory(list)

    def end(self, model, task):
        super().end(model, task)
        self.kept = [*self.kept, snapshot(model)]


def test_a_strategy_s_growth_is_measured_not_told():
    stages = rehearsed(Anchors(), stages=3)
    each = stages[0].gradient_bytes
    assert [s.strategy_bytes for s in stages] == [0, each, 2 * each]


def test_each_task_s_prompt_is_kept(model_folder):
    made = planned(model_folder, "model.adapter=prompt_tuning", "strategy=progressive_prompts")
    assert made.growth_per_task(lambda s: s.strategy_bytes) == 5 * 32 * 4
    assert made.num_trained == 5 * 32


def test_only_a_buffer_without_a_bound_is_said_to_grow(model_folder):
    free, bound = (
        planned(model_folder, "strategy=replay", f"strategy.replay.capacity={n}")
        for n in ("0.9", "8")
    )
    for made in (free, bound):
        assert [
            made.growth_per_task(of) for of in (lambda s: s.strategy_bytes, lambda s: s.peak_bytes)
        ] == [
            0,
            0,
        ]
        assert made.checkpoint_bytes > made.stage_costs[-1].weight_disk_bytes * len(
            made.training_flops
        )
    assert free.growth_per_task(lambda s: s.memory_disk_bytes) > 4 * bound.growth_per_task(
        lambda s: s.memory_disk_bytes
    )


def test_later_stages_follow_from_those_that_were_rehearsed(model_folder):
    few, all_of_them = (
        planned(model_folder, "strategy=replay", f"plan.rehearse_stages={n}") for n in (4, 5)
    )
    assert len(few.stage_costs) == 4
    assert sum(few.training_flops) == pytest.approx(sum(all_of_them.training_flops), rel=0.05)


# The command


def test_no_weights_and_no_tokenizer_are_needed_where_the_tasks_are_told(tmp_path):
    folder = write_model(tmp_path / "model")
    for path in folder.iterdir():
        if path.name != "config.json":
            path.unlink()
    made = planned(folder, "strategy=naive", "plan.gpus=2", "plan.rehearse_stages=1")
    assert made.num_parameters == made.num_trained > 0
    assert len(made.training_flops) == 5
    assert made.hours(made.total_flops) == pytest.approx(made.total_flops / (2 * 1e12 * 0.4) / 3600)


def test_the_stream_s_own_rows_are_rehearsed(run_cli, stream_folder, model_folder):
    code, out, err = run_cli(
        "plan",
        "stream=folder",
        f"stream.path={stream_folder}",
        "model=hf",
        f"model.name={model_folder}",
        "model.adapter=lora",
        "plan.peak_flops=1e12",
        "plan.memory_gb=1",
        "train.batch_size=6",
    )
    assert (code, err) == (0, "")
    assert all(
        word in out
        for word in ("first", "last", "loud", "gradients", "hours", "checkpoints", "fits in 1 GB")
    )


def test_a_gpu_that_is_too_small_is_said_to_be(model_folder):
    with initialize_config_module("conf", version_base=None):
        config = compose(
            "plan", ["model=hf", f"model.name={model_folder}", *GIVEN, "plan.memory_gb=1e-6"]
        )
    console = Console(record=True, width=160)
    print_plan(plan(config), config, console)
    assert "does not fit in 1e-06 GB" in console.export_text()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "marking answers"),
        (
            ("probe=[shots,wordings]", "score.judge.name=a/judge", "score.every_steps=9"),
            "marking answers, the judge a/judge, looking at forgetting every 9 steps "
            "(score.every_steps), what the probes ask after each stage (shots, wordings)",
        ),
    ],
)
def test_what_is_not_counted_is_said(run_cli, model_folder, words, told):
    code, out, err = run_cli(
        "plan", "model=hf", f"model.name={model_folder}", *GIVEN, "plan.rehearse_stages=1", *words
    )
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == f"not counted: {told}"


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("plan.gpus=0", "plan.gpus=0: expected a whole number of at least 1"),
        ("plan.rehearse_steps=1", "plan.rehearse_steps=1: expected a whole number of at least 2"),
        ("plan.flops_utilization=0", "plan.flops_utilization=0: expected a number above 0"),
        ("plan.peak_flops=fast", "plan.peak_flops=fast: expected a number above 0"),
        (
            "plan.response_tokens=12",
            "plan.response_tokens=12: expected fewer than plan.tokens_per_example=12",
        ),
    ],
)
def test_numbers_that_cannot_work_are_refused(cli_error, model_folder, word, told):
    assert told in cli_error("plan", "model=hf", f"model.name={model_folder}", *GIVEN, word)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_peak_memory_is_foretold_within_15_percent(adapter):
    from benchmarks.plan import measure

    ratio = measure("3M", adapter, "naive", 1e11)["ratio_to"]
    assert ratio["FLOPs"] == pytest.approx(1, abs=0.05)
    assert ratio["memory"] == pytest.approx(1, abs=0.15)
