"""One stage of training: the step, the schedules, when it ends, and that the same seed gives the
same weights.
"""

import math
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

from continual.data.types import Task
from continual.errors import ConfigError, TrainingError
from continual.models.loss import capture_logits, forward, nll, token_nll
from continual.models.model import pick_device
from continual.models.weights import snapshot, weights
from continual.strategy.interface import Strategy
from continual.training.recipe import Recipe
from continual.training.stage import train_stage
from tests.support import toy
from tests.support.models import make_encoded, make_text_model, some

ROWS = some(12, seed=5)
TASK = Task("colours", ROWS, dev=some(4, seed=6))


def train(net=None, task=TASK, strategy=None, seed=0, after=None, **recipe):
    """The trained model and the events of its stage."""
    net, events = net or make_text_model(), []
    train_stage(
        net,
        task,
        strategy or Strategy(),
        Recipe(**{"lr": 0.01, "batch_size": 4, "log_every_steps": 1, **recipe}),
        seed=seed,
        log_event=events.append,
        on_step=after,
    )
    return net, events


def steps(events):
    return [e for e in events if e["event"] == "step"]


def same(a, b):
    return all(torch.equal(w, weights(b)[n]) for n, w in weights(a).items())


# The step


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_gradient_accumulation_does_not_change_the_trained_weights(kind):
    nets = [make_text_model(kind, dtype=torch.float64) for _ in range(2)]
    nets[1].layout = replace(nets[1].layout, tokens_per_microbatch=1)
    for net in nets:
        train(net, batch_size=6, epochs=2)
    for name, w in weights(nets[0]).items():
        torch.testing.assert_close(w, weights(nets[1])[name])


def test_sgd_moves_each_weight_by_the_rate_times_its_gradient_and_its_decay():
    net = make_text_model(dtype=torch.float64)
    before, batch = snapshot(net), net.batch(ROWS)
    nll(net, batch).backward()
    expected = {n: w.detach() - 0.1 * (w.grad + 0.01 * w.detach()) for n, w in weights(net).items()}
    net.net.zero_grad()
    train(
        net,
        optimizer="sgd",
        lr=0.1,
        weight_decay=0.01,
        batch_size=len(ROWS),
        steps=1,
        schedule="constant",
        max_grad_norm=None,
    )
    for n, w in weights(net).items():
        torch.testing.assert_close(w.detach(), expected[n])
        assert not torch.equal(w, before[n])


@dataclass(kw_only=True)
class Starved(Strategy):
    """Memory for so many examples in a forward pass."""

    room: int

    def loss(self, model, batch):
        if len(batch.examples) > self.room:
            raise torch.OutOfMemoryError
        return super().loss(model, batch)


def test_out_of_memory_halves_the_tokens_of_a_forward_pass_once_and_goes_on_to_the_same_weights():
    nets = [make_text_model(dtype=torch.float64) for _ in range(2)]
    for net in nets:
        net.layout = replace(net.layout, tokens_per_microbatch=60)
    _, events = train(nets[0], strategy=Starved(room=3), batch_size=4, epochs=2)
    train(nets[1], batch_size=4, epochs=2)
    assert [e["text"] for e in events if e["event"] == "warning"] == [
        "out of memory: from now on train.tokens_per_microbatch=30"
    ]
    for name, w in weights(nets[0]).items():
        torch.testing.assert_close(w, weights(nets[1])[name])


def test_out_of_memory_for_good_is_one_clear_error():
    with pytest.raises(
        TrainingError,
        match=r"out of memory again with train.tokens_per_microbatch=2048; set it lower",
    ):
        train(strategy=Starved(room=0))


def test_a_stage_lowers_the_loss():
    net, events = train(epochs=10)
    losses = [e["loss"] for e in steps(events)]
    assert losses[-1] < losses[0] - 1
    assert not net.net.training


def test_every_example_is_seen_once_an_epoch_in_a_new_order():
    class Watch(Strategy):
        def backward(self, model, batch):
            seen.extend(e.id for e in batch.examples)
            return super().backward(model, batch)

    seen: list[str] = []
    train(strategy=Watch(), epochs=3, batch_size=5)
    epochs = [seen[i : i + 12] for i in range(0, 36, 12)]
    assert Counter(seen) == {e.id: 3 for e in ROWS}
    assert all(set(epoch) == {e.id for e in ROWS} for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("clip", [0.01, None])
def test_the_gradient_is_clipped_to_the_asked_norm(clip):
    norms = []

    def watch(optimizer, *_):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.stack([g.norm() for g in grads]).norm().item())

    hook = register_optimizer_step_pre_hook(watch)
    train(max_grad_norm=clip, epochs=1)
    hook.remove()
    assert all(n == pytest.approx(0.01, rel=1e-3) for n in norms) if clip else min(norms) > 0.1


def test_the_tokens_of_a_stage_are_its_supervised_ones():
    _, events = train(epochs=2)
    assert events[-1]["event"] == "stage"
    assert events[-1]["tokens"] == 2 * sum(sum(e.response_mask) for e in ROWS)


# Schedules


def rates(**recipe):
    return [e["lr"] for e in steps(train(steps=10, lr=1.0, max_grad_norm=None, **recipe)[1])]


def test_the_logged_rate_is_the_one_of_that_step():
    seen = []
    hook = register_optimizer_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))
    logged = rates(schedule="linear", warmup_ratio=0.2)
    hook.remove()
    assert logged == seen


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0.0, [1.0] * 10),
        ("constant", 0.4, [0, 0.25, 0.5, 0.75] + [1.0] * 6),
        ("linear", 0.0, [1 - i / 10 for i in range(10)]),
        ("linear", 0.2, [0, 0.5] + [1 - i / 8 for i in range(8)]),
        ("cosine", 0.0, [(1 + math.cos(math.pi * i / 10)) / 2 for i in range(10)]),
    ],
)
def test_the_learning_rate_rises_and_falls_as_asked(schedule, warmup, expected):
    assert rates(schedule=schedule, warmup_ratio=warmup) == pytest.approx(expected)


# Its end


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ({"epochs": 3}, 9),
        ({"epochs": 3, "batch_size": 5}, 9),
        ({"epochs": 0.5}, 2),
        ({"epochs": 3, "steps": 7}, 7),
        ({"epochs": 1, "steps": 20}, 20),
    ],
)
def test_a_stage_takes_its_epochs_or_its_steps(recipe, expected):
    _, events = train(**recipe)
    assert [e["step"] for e in steps(events)] == list(range(1, expected + 1))
    assert events[-1]["steps"] == expected


def test_early_stopping_waits_its_patience_and_keeps_the_weights_of_the_best_epoch():
    net, seen = make_text_model(), []

    def dev():
        with torch.no_grad():
            return nll(net, net.batch(TASK.dev)).item()

    _, events = train(
        net,
        epochs=50,
        lr=0.02,
        patience=2,
        schedule="constant",
        after=lambda step, _: seen.append(dev()) if step % 3 == 0 else None,
    )
    best = min(seen)
    assert len(seen) == seen.index(best) + 1 + 2 < 50
    assert dev() == pytest.approx(best, abs=1e-6)
    assert events[-1]["steps"] == 3 * len(seen)


def test_early_stopping_without_dev_rows_is_refused():
    with pytest.raises(ValueError, match="task 'colours' has no dev rows"):
        train(task=replace(TASK, dev=()), patience=1)


def test_a_loss_that_is_not_finite_ends_the_stage_and_names_the_examples():
    net = make_text_model()
    with torch.no_grad():
        net.net.model.norm.weight.fill_(math.nan)
    few = Task("colours", [make_encoded([7], [8], "row-a"), make_encoded([7], [9], "row-b")])
    told = "the loss is nan at step 1 of task 'colours', on the examples row-., row-."
    with pytest.raises(TrainingError, match=told):
        train(net, few)


# The same again


def with_dropout():
    net = make_text_model("gpt2")
    assert any(m.p > 0 for m in net.net.modules() if isinstance(m, torch.nn.Dropout))
    return net


@pytest.mark.parametrize("make", [make_text_model, with_dropout])
def test_the_same_seed_gives_the_same_weights_bit_for_bit_and_another_seed_others(make):
    a, b, c = (train(make(), seed=seed, prompt_mask_prob=0.3)[0] for seed in (1, 1, 2))
    assert same(a, b)
    assert not same(a, c)


def test_training_does_not_depend_on_what_was_random_before():
    a, _ = train(with_dropout())
    torch.rand(7)
    b, _ = train(with_dropout())
    assert same(a, b)


# Precision and device


def test_bf16_computes_in_bfloat16_and_keeps_the_weights_in_fp32():
    net, kinds = make_text_model(), set()
    net.bf16 = True
    hook = net.net.get_output_embeddings().register_forward_hook(
        lambda m, args, out: kinds.add(out.dtype)
    )
    _, events = train(net, epochs=4)
    hook.remove()
    assert kinds == {torch.bfloat16}
    assert {w.dtype for w in snapshot(net).values()} == {torch.float32}
    assert steps(events)[-1]["loss"] < steps(events)[0]["loss"]


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_in_bf16_the_loss_is_that_of_the_logits_in_fp32(how):
    made = toy.make_model(torch.bfloat16 if how == "weights" else torch.float32)
    made.bf16 = how == "autocast"
    batch = made.batch(toy.make_examples(0))
    with capture_logits(made, batch) as logits:
        found = token_nll(made, batch)
        heard = logits()
    for z in (heard, forward(made, batch)):
        assert z.dtype == torch.float32
        assert torch.equal(z, z.bfloat16()), "computed in bfloat16"
        assert torch.allclose(
            found.double(), F.cross_entropy(z.double(), batch.targets, reduction="none"), atol=1e-5
        )


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [
        (True, True, "cuda"),
        (False, True, "mps"),
        (False, False, "cpu"),
    ],
)
def test_auto_picks_the_best_device_there_is(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert pick_device().type == expected


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "cuda:1", "gpu"):
        with pytest.raises(ConfigError, match=rf"unknown device '{name}'.* Known: auto, cpu"):
            pick_device(name)


# What cannot be


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            {"max_grad_norm": -1.0},
            r"train.max_grad_norm=-1.0: expected more than 0, or null for no clipping",
        ),
        ({"weight_decay": -0.1}, r"train.weight_decay=-0.1: expected at least 0"),
        ({"optimizer": "adam"}, r"unknown train.optimizer 'adam'; did you mean 'adamw'"),
        ({"schedule": "cosin"}, r"unknown train.schedule 'cosin'; did you mean 'cosine'"),
        ({"lr": -1}, "train.lr=-1: expected at least 0"),
        ({"lr": math.nan}, "train.lr=nan: expected at least 0"),
        ({"lr": "fast"}, "train.lr=fast: expected a number"),
        ({"batch_size": 0}, "train.batch_size=0: expected at least 1"),
        ({"batch_size": 2.5}, "train.batch_size=2.5: expected a whole number"),
        ({"epochs": 0}, "train.epochs=0: expected more than 0"),
        ({"steps": 0}, "train.steps=0: expected at least 1"),
        (
            {"warmup_ratio": 10},
            r"train.warmup_ratio=10: expected a share or probability in \[0, 1\]",
        ),
        ({"max_grad_norm": "no"}, "train.max_grad_norm=no: expected a number"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused(recipe, message):
    with pytest.raises(ConfigError, match=message):
        Recipe(**{"lr": 0.1, **recipe})


def test_all_that_is_wrong_with_a_recipe_is_told_at_once():
    with pytest.raises(ConfigError) as caught:
        Recipe(lr=-1, batch_size=0, warmup_ratio=2)
    assert len(str(caught.value).split("\n")) == 3


# Steps that are not finite


@dataclass(kw_only=True)
class Overflowing(Strategy):
    """Its gradient, not its loss, is infinite at some steps."""

    at: tuple[int, ...] = ()
    step: int = 0

    def backward(self, model, batch):
        self.step += 1
        loss = super().backward(model, batch)
        if self.step in self.at:
            next(iter(weights(model).values())).grad.fill_(math.inf)
        return loss


def test_a_gradient_that_is_not_finite_stops_the_stage_and_names_the_examples():
    net = make_text_model()
    before = snapshot(net)
    with pytest.raises(
        TrainingError,
        match=r"the gradient's norm is \w+ at step 1 of task 'colours', on the examples "
        r"e\d+, e\d+, e\d+, e\d+; the last checkpoint is kept",
    ):
        train(net, strategy=Overflowing(at=(1,)), batch_size=4)
    assert all(torch.equal(w, before[n]) for n, w in weights(net).items())


def test_skipped_steps_leave_the_weights_and_are_counted_and_shown():
    net, events = train(
        strategy=Overflowing(at=(2, 3)), batch_size=4, epochs=4, on_nonfinite="skip"
    )
    assert [e["skipped_steps"] for e in events if e["event"] == "stage"] == [2]
    told = [e["text"] for e in events if e["event"] == "warning"]
    assert len(told) == 2
    assert told[0].startswith("skipped: the gradient's norm is ")
    assert all(torch.isfinite(w).all() for w in weights(net).values())


def test_a_stage_of_skipped_steps_alone_is_an_error():
    with pytest.raises(
        TrainingError,
        match="every step of task 'colours' had a loss or gradient that is not finite",
    ):
        train(strategy=Overflowing(at=tuple(range(99))), steps=3, on_nonfinite="skip")
