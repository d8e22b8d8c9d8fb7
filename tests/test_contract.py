"""What every strategy must keep to, over the table of all configurations and some of their variants."""

from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import torch
import toy

from continual import checkpoint
from continual.model import adapt_with
from continual.strategy import Strategy
from continual.weights import gradient, restore, weights

ARRANGEMENTS = {"joint", "cumulative"}  # of the stream, under naive: test_configs holds them to that
CONFIGS = sorted({p.stem for p in (Path(__file__).parents[1] / "conf" / "strategy").glob("*.yaml")} - ARRANGEMENTS)
SHORT = 6  # examples of a stage that need not learn anything well
BUFFERED = {"replay", "multitask", "maml", "reptile", "hard_replay", "inscl", "gem", "agem",
            "anil", "meta_sgd"}
MOST = "capacity=0.5"  # the embedded default's fraction would leave one example of these small tasks

# What makes a strategy naive. A new configuration must say it here.
OFF = {
    "naive": (),
    "replay": ("replay.capacity=0",),
    "multitask": ("multitask.capacity=0",),
    "l2": ("l2.strength=0",), "ewc": ("ewc.strength=0",), "online_ewc": ("online_ewc.strength=0",),
    "maml": ("maml.capacity=0", "maml.inner_steps=0"), "reptile": ("reptile.capacity=0", "reptile.inner_steps=0"),
    "anil": ("anil.capacity=0", "anil.inner_steps=0"), "meta_sgd": ("meta_sgd.capacity=0", "meta_sgd.inner_steps=0"),
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
    ("reptile", "reptile.inner_steps=1"), ("gem,maml", "gem.share=0.25", "gem.capacity=0.2", "gem.sample=2"),
    ("anil", "anil.second_order=true", "anil.inner=meta_sgd", "anil.inner_steps=2"),
    ("meta_sgd", "meta_sgd.second_order=true"),
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


def after_one_stage(entry, dtype=torch.float32):
    """A model and a strategy that remembers a task, for each caller its own copy."""
    return deepcopy(one_stage(entry, dtype))


@cache
def one_stage(entry, dtype):
    kind = "gpt2" if dtype == torch.float64 else "llama"  # which norms in float32 whatever its dtype
    made, strategy = toy.model(dtype, kind=kind), make(*entry)
    toy.train(made, strategy, 0, n=SHORT)
    return made, strategy


@every
def test_one_stage_lowers_the_loss(entry):
    made, strategy = toy.model(), make(*entry)
    before = toy.mean_loss(made.net, toy.examples(0)).item()
    toy.train(made, strategy, 0)
    assert toy.mean_loss(made.net, toy.examples(0)).item() < before - 0.1


@pytest.mark.parametrize("names", [*CONFIGS, "replay,ewc"])
def test_switched_off_it_is_naive_bit_for_bit(names):
    off, naive = toy.model(), toy.model()
    toy.train(off, make(names, *OFF[names]), 0, 1)
    toy.train(naive, Strategy(), 0, 1)
    assert toy.same(toy.everything(off), toy.everything(naive))


@pytest.mark.parametrize("entry", [e for e in TABLE if e[0] != "naive"], ids=" ".join)
def test_switched_on_it_is_not_naive(entry):
    on, naive, strategy, plain = toy.model(), toy.model(), make(*entry), Strategy()
    for t in (0, 1, 2):  # a projection waits for tasks that oppose each other
        toy.train(on, strategy, t)
        toy.train(naive, plain, t)
        if t and not toy.same(toy.everything(on), toy.everything(naive)):
            return
    pytest.fail("it never departs from naive")


@every
def test_a_checkpoint_continues_bit_for_bit(entry, tmp_path):
    made, strategy = after_one_stage(entry)
    toy.train(made, strategy, 1, n=SHORT)
    checkpoint.save(tmp_path / "two", made, strategy, toy.matrix())
    other, again = toy.model(seed=1), make(*entry)
    checkpoint.load(tmp_path / "two", other, again)
    for net, continued in ((made, strategy), (other, again)):
        toy.train(net, continued, 2, n=SHORT)
    assert toy.same(toy.everything(other), toy.everything(made))
    checkpoint.save(tmp_path / "live", made, strategy, toy.matrix())
    checkpoint.save(tmp_path / "resumed", other, again, toy.matrix())
    assert toy.saved(tmp_path / "live") == toy.saved(tmp_path / "resumed")


@every
def test_micro_batches_do_not_change_the_step(entry):
    made, strategy = after_one_stage(entry, torch.float64)
    found, learned = [], []
    for n in (1000, 2, 5):
        own = deepcopy(strategy)
        own.begin(made, toy.task(1))
        made.net.zero_grad()
        small = toy.in_micro_batches(made, n)
        own.backward(small, small.batch(toy.examples(1)[:7]))
        found.append(gradient(made))
        if getattr(own, "weighting", "") == "uncertainty":  # its own parameters are float32
            learned.append({"log_variance": own.log_variance.grad})
    assert all(toy.close(g, found[0]) for g in found[1:])
    assert all(toy.close(g, learned[0], rtol=1e-5, atol=1e-7) for g in learned)


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


@every
def test_no_moment_moves_the_weights(entry):
    made, strategy = after_one_stage(entry)
    task = toy.task(1, SHORT)
    before, batch = toy.everything(made), made.batch(toy.examples(1, SHORT)[:5])
    strategy.begin(made, task)
    assert toy.same(toy.everything(made), before)
    strategy.backward(made, batch)
    assert toy.same(toy.everything(made), before)
    strategy.loss(made, batch)
    strategy.route(made, "a")
    strategy.end(made, task)
    assert toy.same(toy.everything(made), before)


@every
def test_only_backward_leaves_gradients(entry):
    made, strategy = after_one_stage(entry)
    task = toy.task(1, SHORT)
    made.net.zero_grad()
    strategy.begin(made, task)
    strategy.loss(made, made.batch(toy.examples(1, SHORT)[:5]))
    strategy.end(made, task)
    assert all(g is None for g in toy.gradients(made).values())
    strategy.backward(made, made.batch(toy.examples(1, SHORT)[:5]))
    assert all(g is not None and g.isfinite().all() for g in toy.gradients(made).values())


@every
def test_the_optimizer_may_change_trainable_parameters_only(entry):
    made, strategy = toy.model(), make(*entry)
    made.net.get_input_embeddings().weight.requires_grad_(False)
    made.net.model.layers[0].requires_grad_(False)
    frozen = {n: p.clone() for n, p in made.net.named_parameters() if not p.requires_grad}
    returned = strategy.begin(made, toy.task(0))
    parts = [p for part in returned for p in (part["params"] if isinstance(part, dict) else [part])]
    assert {id(p) for p in parts} >= {id(p) for p in weights(made).values()}
    assert all(p.requires_grad for p in parts)
    toy.train(made, strategy, 0, 1, n=SHORT)
    now = dict(made.net.named_parameters())
    assert toy.same({n: now[n] for n in frozen}, frozen)
    assert all(now[n].grad is None for n in frozen)
    assert all("layers.0" not in path and "embed" not in path for path in toy.memory_tensors(strategy))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
@every
def test_an_adapter_trains_and_its_base_does_not(entry):
    made = toy.model()
    made.net = adapt_with(made.net, "lora", {"lora": {"r": 2, "target_modules": "all-linear"}}, seq2seq=False)
    before, live = toy.everything(made), set(weights(made))
    toy.train(made, make(*entry), 0, 1, n=SHORT)
    after = toy.everything(made)
    moved = {n for n in after if not torch.equal(after[n], before[n])}
    assert moved
    assert moved <= live
    assert all("lora" in n for n in moved)


@every
def test_memory_holds_no_live_tensors(entry):
    made, strategy = after_one_stage(entry)
    live = {p.untyped_storage().data_ptr() for p in made.net.parameters()}
    held = toy.memory_tensors(strategy)
    assert all(t.grad_fn is None for t in held.values())
    assert not live & {t.untyped_storage().data_ptr() for t in held.values() if t.numel()}
    before = deepcopy(held)
    restore(made, {n: w + 1 for n, w in weights(made).items()})
    assert toy.same(toy.memory_tensors(strategy), before)
