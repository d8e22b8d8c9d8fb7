"""What every strategy must keep to, over the table of all configurations and some of their variants."""

from functools import cache
from pathlib import Path

import pytest
import torch
import toy

from continual import testing
from continual.strategy import Strategy
from continual.weights import gradient

ARRANGEMENTS = {"joint", "cumulative"}  # of the stream, under naive: test_configs holds them to that
CONFIGS = sorted({p.stem for p in (Path(__file__).parents[1] / "conf" / "strategy").glob("*.yaml")} - ARRANGEMENTS)
BUFFERED = {"replay", "multitask", "maml", "reptile", "hard_replay", "inscl", "gem", "agem"}
MOST = "capacity=0.5"  # the embedded default's fraction would leave one example of these small tasks

# What makes a strategy naive. A new configuration must say it here.
OFF = {
    "naive": (),
    "replay": ("replay.capacity=0",),
    "multitask": ("multitask.capacity=0",),
    "l2": ("l2.strength=0",), "ewc": ("ewc.strength=0",), "online_ewc": ("online_ewc.strength=0",),
    "maml": ("maml.capacity=0", "maml.inner_steps=0"), "reptile": ("reptile.capacity=0", "reptile.inner_steps=0"),
    "der": ("der.capacity=0",), "lwf": ("lwf.strength=0",), "hard_replay": ("hard_replay.capacity=0",),
    "inscl": ("inscl.capacity=0",), "lamol": ("lamol.share=0", "lamol.lm_weight=0"),
    "replay,ewc": ("replay.capacity=0", "ewc.strength=0"),
    "gem": ("gem.capacity=0",), "agem": ("agem.capacity=0",), "ogd": ("ogd.examples=0",),
    "mas": ("mas.strength=0",), "si": ("si.strength=0",), "rwalk": ("rwalk.strength=0",),
}
VARIANTS = [
    ("replay", "replay.buffer_kind=reservoir", "replay.capacity=7", "replay.share=0.38"),
    ("ewc", "ewc.labels=sampled", "ewc.examples=5"),
    ("online_ewc", "online_ewc.decay=0.5"),
    ("maml", "maml.second_order=true", "maml.inner_steps=2", "maml.capacity=0.5"),
    ("maml", "maml.buffer_kind=reservoir", "maml.capacity=7"),
    ("reptile", "reptile.inner_steps=1"),
    ("multitask", "multitask.weighting=size", "multitask.capacity=0.5"),
    ("multitask", "multitask.weighting=temperature", "multitask.capacity=0.5"),
    ("multitask", "multitask.weighting=uncertainty", "multitask.capacity=0.5"),
    ("multitask", "+multitask.weights={a:2,b:0.5}", "multitask.capacity=0.5"),
    ("der", "der.beta=0", "der.top=5", "der.capacity=9", "der.minibatch=3"), ("der", "der.alpha=0"),
    ("lwf", "lwf.teacher=base", "lwf.top=5", "lwf.temperature=1.0"),
    ("hard_replay", "hard_replay.by=forgetting", "hard_replay.capacity=7"),
    ("inscl", "inscl.capacity=7", "inscl.buffer_kind=reservoir"), ("lamol", "lamol.lm_weight=1.0", "lamol.top_k=5"),
    ("replay,lwf",), ("lwf,der",), ("der,ewc",), ("lamol,l2",),
    ("replay,ewc",), ("ewc,maml",), ("maml,ewc",), ("reptile,l2",),
    ("multitask,online_ewc", "multitask.weighting=uncertainty"),
    ("gem", "gem.capacity=0.5", "gem.sample=null", "gem.share=0.25"), ("gem", "gem.capacity=7", "gem.margin=0"),
    ("agem", "agem.capacity=7", "agem.buffer_kind=reservoir", "agem.sample=3"),
    ("ogd", "ogd.examples=3"), ("ogd,replay", "replay.capacity=0.5"), ("mas", "mas.examples=5"),
    ("rwalk", "rwalk.every=1"), ("replay,si", "replay.capacity=0.5"),
]


def sized(name: str) -> tuple[str, ...]:
    """The strategy's own configuration, with a buffer that is not all but empty."""
    more = ("agem.sample=2",) if name == "agem" else ()  # the mean of more opposes no step here
    return (name, f"{name}.{MOST}", *more) if name in BUFFERED else (name,)


TABLE = [*map(sized, CONFIGS), *VARIANTS]


def make(names: str, *keys: str) -> Strategy:
    return toy.configured(names, *(f"+strategy.{k[1:]}" if k.startswith("+") else f"strategy.{k}" for k in keys))


every = pytest.mark.parametrize("entry", TABLE, ids=" ".join)


@cache
def subject(entry) -> testing.Subject:
    """What its first stage leaves is learned once for all rules."""
    return testing.Subject(lambda: make(*entry))


@pytest.mark.parametrize("rule", testing.RULES, ids=lambda rule: rule.__name__)
@every
def test_every_strategy_keeps_every_rule(entry, rule):
    rule(subject(entry))


@pytest.mark.parametrize("names", [*CONFIGS, "replay,ewc"])
def test_switched_off_it_is_naive_bit_for_bit(names):
    testing.switched_off_it_is_naive(testing.Subject(lambda: make(names, *OFF[names])))


@pytest.mark.parametrize("entry", [e for e in TABLE if e[0] != "naive"], ids=" ".join)
def test_switched_on_it_is_not_naive(entry):
    on, naive, strategy, plain = toy.model(), toy.model(), make(*entry), Strategy()
    for t in (0, 1, 2):  # a projection waits for tasks that oppose each other
        toy.train(on, strategy, t)
        toy.train(naive, plain, t)
        if t and not toy.same(toy.everything(on), toy.everything(naive)):
            return
    pytest.fail("it never departs from naive")


def test_micro_batches_also_have_the_same_step_where_tasks_in_one_step_differ_in_weight():
    """A micro-batch of tasks that weigh nothing has no mean loss of its own."""
    strategy = make("multitask", "+multitask.weights={a:0,b:1}", "multitask.capacity=12", "multitask.share=0.6")
    made = toy.model(torch.float64)
    strategy.begin(made, toy.task(0))
    strategy.end(made, toy.task(0))
    strategy.begin(made, toy.task(1))
    small = toy.in_micro_batches(made, 1)
    strategy.backward(small, small.batch(toy.examples(1)[:3]))
    got = gradient(made)
    made.net.zero_grad()
    Strategy().backward(made, made.batch(toy.examples(1)[:3]))
    assert toy.close(got, gradient(made), rtol=1e-6, atol=1e-7)  # scales are float32
