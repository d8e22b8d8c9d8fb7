"""What every strategy must keep to, over the table of all configurations and some of their
variants.
"""

from dataclasses import replace
from functools import cache, partial

import pytest
import torch

from continual.errors import ConfigError
from continual.models.weights import gradient
from continual.strategy.interface import Strategy
from continual.testing import rules
from continual.training.early_stopping import EarlyStopping
from continual.training.stage import train_stage
from tests.support import toy
from tests.support.strategy_table import CONFIGS, TABLE, kind_of, make, network, of_kind, sized

UNPLANNED = {
    "avalanche": "its plugins use NumPy",
    "gain_lora": "where a branch begins is read off its weights",
}
MOMENTS = (
    "begin",
    "end",
    "route",
)  # at which to give the model other weights is what some are for:
SETTERS = {
    "per_task",
    "router",
    "slao",
    "progressive_prompts",
    "average",
    "fisher_merge",
    "ema",
    "task_arithmetic",
    "ties",
}

# What makes a strategy naive. A new configuration must say it here.
OFF = {
    "naive": (),
    "replay": ("replay.capacity=0",),
    "multitask": ("multitask.capacity=0",),
    "l2": ("l2.strength=0",),
    "ewc": ("ewc.strength=0",),
    "online_ewc": ("online_ewc.strength=0",),
    "maml": ("maml.capacity=0", "maml.inner_steps=0"),
    "reptile": ("reptile.capacity=0", "reptile.inner_steps=0"),
    "anil": ("anil.capacity=0", "anil.inner_steps=0"),
    "meta_sgd": ("meta_sgd.capacity=0", "meta_sgd.inner_steps=0"),
    "la_maml": ("la_maml.capacity=0", "la_maml.inner_steps=0"),
    "der": ("der.capacity=0",),
    "lwf": ("lwf.strength=0",),
    "hard_replay": ("hard_replay.capacity=0",),
    "inscl": ("inscl.capacity=0",),
    "lamol": ("lamol.share=0", "lamol.lm_weight=0"),
    "replay,ewc": ("replay.capacity=0", "ewc.strength=0"),
    "gem": ("gem.capacity=0",),
    "agem": ("agem.capacity=0",),
    "ogd": ("ogd.num_examples=0",),
    "per_task": ("per_task.adapter_init=last",),
    "router": ("router.adapter_init=last",),
    "incremental_lora": ("incremental_lora.rank=0",),
    "olora": ("olora.rank=0",),
    "gain_lora": ("gain_lora.rank=0",),
    "slao": ("slao.power=0", "slao.orthogonal_init=false"),
    "asft": ("asft.strength=0", "asft.weight_by_probability=false"),
    "sdft": ("sdft.strength=0",),
    "avalanche": ("avalanche.plugin=SynapticIntelligencePlugin", "+avalanche.args.si_lambda=0"),
    "mas": ("mas.strength=0",),
    "si": ("si.strength=0",),
    "rwalk": ("rwalk.strength=0",),
    "average": ("average.interpolation=0",),
    "fisher_merge": ("fisher_merge.interpolation=0",),
    "ema": ("ema.interpolation=0",),
    "task_arithmetic": ("task_arithmetic.interpolation=0",),
    "ties": ("ties.interpolation=0",),
    "sparse": ("sparse.fraction=1",),
    "migu": ("migu.neuron_share=1",),
    "progressive_prompts": ("progressive_prompts.max_prompts=1",),
    "osf": ("osf.rank_share=0",),
}


every = pytest.mark.parametrize("entry", TABLE, ids=" ".join)


@cache
def subject(entry) -> rules.StrategyUnderTest:
    """What its first stage leaves is learned once for all rules."""
    made = rules.StrategyUnderTest(
        lambda: make(*entry),
        MOMENTS if SETTERS & {*entry[0].split(",")} else (),
        partial(network, entry[0]),
    )
    if "progressive_prompts" in entry[0]:  # a prompt steers little of a network of random weights
        made.recipe, made.min_loss_drop = replace(toy.RECIPE, lr=0.3, epochs=6), 1e-3
    if "la_maml" in entry[0]:
        made.recipe = replace(toy.RECIPE, optimizer="sgd", lr=3)
    return made


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
@every
def test_every_strategy_keeps_every_rule(entry, rule):
    rule(subject(entry))


@pytest.mark.parametrize("names", [*CONFIGS, "replay,ewc"])
def test_switched_off_it_is_naive_bit_for_bit(names):
    rules.disabled_equals_naive(
        rules.StrategyUnderTest(
            lambda: make(names, *OFF[names]), make_model=partial(network, names)
        )
    )


@pytest.mark.parametrize("entry", [sized(name) for name in CONFIGS], ids=" ".join)
def test_a_stage_that_is_stopped_early_ends_as_if_it_had_ended_with_its_best_epoch(
    entry, monkeypatch
):
    """Its weights, and what the strategy remembers of them and of the way to them, bit for bit."""
    monkeypatch.setattr(
        EarlyStopping, "_dev_loss", lambda self: float(self.epochs)
    )  # the first is the best
    task = replace(toy.make_task(1, toy.SHORT_TASK_SIZE), dev=toy.make_task(1).train)
    found = []
    for recipe in ({"epochs": 1}, {"epochs": 3, "patience": 1}):
        (made, strategy), told = subject(entry).after_one_stage(), []
        recipe = replace(subject(entry).recipe, schedule="constant", **recipe)
        train_stage(made, task, strategy, recipe, seed=1, log_event=told.append)
        found.append((told[-1]["steps"], rules.serialize_state(made, strategy)))
    assert found[0][0] < found[1][0]
    assert found[0][1] == found[1][1]


def planned(entry):
    """Two stages of a step each, without numbers."""
    return toy.rehearse_stages(
        partial(network, entry[0]), make(*entry), replace(subject(entry).recipe, steps=1)
    )


@pytest.mark.parametrize(
    "entry", [sized(name) for name in CONFIGS if name not in UNPLANNED], ids=" ".join
)
def test_a_plan_can_go_through_its_stages(entry):
    first, second = planned(entry)
    assert second.peak_bytes > second.weight_bytes > first.strategy_bytes == 0


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.parametrize("entry", [sized(name) for name in UNPLANNED], ids=" ".join)
def test_a_strategy_that_cannot_be_planned_says_what_to_do(entry):
    with pytest.raises(ConfigError, match="stores as much"):
        planned(entry)


@cache
def naive(kind, *sizes):
    """The parameters after a stage of each size under plain fine-tuning."""
    made = of_kind(kind)
    for t, n in enumerate(sizes):
        toy.train_stages(made, Strategy(), t, size=n)
    return toy.copy_parameters(made)


@pytest.mark.parametrize("entry", [e for e in TABLE if e[0] != "naive"], ids=" ".join)
def test_switched_on_it_is_not_naive(entry):
    on, strategy = subject(entry).after_one_stage()
    for t in (1, 2, 3):  # a projection waits for tasks that oppose each other
        toy.train_stages(on, strategy, t)
        if not toy.bitwise_equal(
            toy.copy_parameters(on), naive(kind_of(entry[0]), toy.SHORT_TASK_SIZE, *[12] * t)
        ):
            return
    pytest.fail("it never departs from naive")


def test_micro_batches_also_have_the_same_step_where_tasks_in_one_step_differ_in_weight():
    """A micro-batch of tasks that weigh nothing has no mean loss of its own."""
    strategy = make(
        "multitask", "+multitask.weights={a:0,b:1}", "multitask.capacity=12", "multitask.share=0.6"
    )
    made = toy.make_model(torch.float64)
    strategy.begin(made, toy.make_task(0))
    strategy.end(made, toy.make_task(0))
    strategy.begin(made, toy.make_task(1))
    small = toy.limit_micro_batch(made, 1)
    strategy.backward(small, small.batch(toy.make_examples(1)[:3]))
    got = gradient(made)
    made.net.zero_grad()
    Strategy().backward(made, made.batch(toy.make_examples(1)[:3]))
    assert toy.all_close(got, gradient(made), rtol=1e-6, atol=1e-7)  # scales are float32
