"""Avalanche's plugins inside our stage: beside our own strategies, beside Avalanche's own loop, and
what is refused.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from continual.data.types import Task
from continual.errors import ConfigError
from continual.interop.avalanche import AvalancheModel, Criterion, make_benchmark_from_examples
from continual.models.importance import fisher, sensitivity
from continual.models.loading import add_adapter
from continual.models.loss import gradient_of, nll
from continual.models.weights import flatten_weights, gradient, restore, snapshot, weights
from continual.strategy.interface import Strategy
from continual.training.recipe import Recipe
from continual.training.stage import train_stage
from strategies.avalanche import SUPPORTED_PLUGINS, UNSUPPORTED_PLUGINS, Avalanche
from strategies.ewc import EWC
from strategies.si import SI
from tests.support import toy
from tests.support.models import make_encoded

plugins = pytest.importorskip("avalanche.training.plugins", reason="the extra avalanche-lib")
core = pytest.importorskip("avalanche.core")
TOKENS = 2  # of each response, where a mean over tokens and a sum differ by that factor alone


def even(index: int, n: int = 6) -> Task:
    """Examples whose responses are of one length."""
    rows = [
        make_encoded([*e.ids[:2]], [*e.ids[-1:], 3 + i], e.id, index)
        for i, e in enumerate(toy.make_examples(index, n))
    ]
    return Task(toy.TASK_NAMES[index], tuple(rows), task_names=toy.TASK_NAMES)


def ended(strategy, task, dtype=torch.float64):
    """A model at the end of a stage of no steps, and moved away from there afterwards."""
    made = toy.make_model(dtype)
    strategy.begin(made, task)
    strategy.end(made, task)
    found = snapshot(made)
    draw = torch.Generator().manual_seed(0)
    restore(
        made,
        {
            n: w + 0.1 * torch.randn(w.shape, generator=draw, dtype=w.dtype)
            for n, w in found.items()
        },
    )
    return made


def step(made, strategy, examples):
    """The gradient of a step of a new stage."""
    strategy.begin(made, even(1))
    made.net.zero_grad()
    strategy.backward(made, made.batch(examples))
    return gradient(made)


def data_of(params) -> dict[str, torch.Tensor]:
    return {n: p.data for n, p in params.items()}


# Beside our own


def test_a_hosted_si_walks_the_path_that_ours_walks():
    """Its importance is cut above 0.001 and may be negative; between the bounds they are one."""
    ours, theirs = toy.make_model(), toy.make_model()
    si, hosted = (
        SI(damping=1e-3),
        Avalanche(plugin="SynapticIntelligencePlugin", args={"si_lambda": 1.0, "eps": 1e-3}),
    )
    toy.train_stages(ours, si, 0)
    toy.train_stages(theirs, hosted, 0)
    assert toy.bitwise_equal(toy.copy_parameters(ours), toy.copy_parameters(theirs)), (
        "the first stage has no pull"
    )
    anchor, importance = (
        {n: p.data.view_as(si.anchor[n]) for n, p in d.items()}
        for d in hosted.plugin_instance.ewc_data
    )
    assert toy.all_close(anchor, si.anchor, 0, 0)
    assert toy.all_close(
        {n: i.clamp(min=0) for n, i in importance.items()},
        {n: i.clamp(max=0.001) for n, i in si.importance.items()},
        rtol=1e-4,
        atol=1e-9,
    )
    assert any((i > 0).any() and (i < 0.001).any() for i in importance.values())


def test_the_pull_of_a_hosted_si_is_that_of_ours_at_the_same_importance():
    hosted, si = (
        Avalanche(plugin="SynapticIntelligencePlugin", args={"si_lambda": 3.0}),
        SI(strength=3.0),
    )
    made = ended(hosted, even(0))
    for p in hosted.plugin_instance.ewc_data[1].values():
        p.data = torch.rand_like(p.data)
    si.importance = {
        n: p.data.view_as(weights(made)[n]) for n, p in hosted.plugin_instance.ewc_data[1].items()
    }
    hosted.begin(made, even(1))
    anchor = snapshot(made)
    restore(made, {n: w + 0.1 for n, w in anchor.items()})
    si.anchor = anchor
    found = []
    for strategy in (hosted, si):
        made.net.zero_grad()
        loss = strategy.backward(made, made.batch(toy.make_examples(1)))
        found.append((loss.item(), gradient(made)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-9)
    assert toy.all_close(found[0][1], found[1][1], rtol=1e-7, atol=1e-9)


def test_a_hosted_ewc_has_our_fisher_and_our_pull():
    """Its F is of the mean loss of one example at mb_size 1, ours of the sum; its lambda has no
    1/2.
    """
    hosted, ewc = (
        Avalanche(plugin="EWCPlugin", args={"ewc_lambda": 5.0}),
        EWC(strength=2 * 5.0 / TOKENS**2),
    )
    made, same = ended(hosted, even(0)), ended(ewc, even(0))
    before = toy.make_model(torch.float64)
    assert toy.all_close(
        data_of(hosted.plugin_instance.importances[0]),
        {n: f / TOKENS**2 for n, f in fisher(before, even(0).train).items()},
        rtol=1e-7,
        atol=1e-12,
    )
    rows = toy.make_examples(1)
    assert toy.all_close(step(made, hosted, rows), step(same, ewc, rows), rtol=1e-6, atol=1e-8)


def test_a_hosted_mas_has_our_importance():
    hosted = Avalanche(plugin="MASPlugin")
    ended(hosted, even(0))
    expected = sensitivity(toy.make_model(torch.float64), even(0).train)
    assert toy.all_close(
        data_of(hosted.plugin_instance.importance),
        {n: s / TOKENS for n, s in expected.items()},
        1e-7,
        1e-10,
    )


def test_a_hosted_rwalk_squares_the_gradient_of_each_step():
    hosted = Avalanche(plugin="RWalkPlugin")
    made, rows = toy.make_model(torch.float64), toy.make_examples(0, 5)
    hosted.begin(made, even(0))
    hosted.backward(made, made.batch(rows))
    assert toy.all_close(
        data_of(hosted.plugin_instance.iter_importance),
        {n: g**2 for n, g in gradient(made).items()},
        1e-7,
        1e-12,
    )


def test_a_hosted_gem_bounds_steps_by_the_gradients_that_bound_ours():
    hosted = Avalanche(
        plugin="GEMPlugin", args={"patterns_per_experience": 6, "memory_strength": 0.0}, mb_size=4
    )
    made = toy.make_model(torch.float64)
    train_stage(
        made,
        even(0),
        hosted,
        Recipe(lr=5e-3, epochs=30, batch_size=6),
        seed=0,
        log_event=lambda event: None,
    )
    rows = [
        replace(e, ids=(*e.ids[:-2], 60, 61)) for e in even(0).train
    ]  # other answers than it has learned
    found = flatten_weights(step(made, hosted, rows))
    other = flatten_weights(gradient_of(nll, made, made.batch(even(0).train)))
    assert torch.allclose(hosted.plugin_instance.G, other[None], rtol=1e-6, atol=1e-9)
    own = flatten_weights(step(made, Strategy(), rows))
    assert own @ other < 0, "nothing is bounded here"
    assert abs(found @ other) < 0.02 * abs(
        own @ other
    )  # its solver's problem has 0.001 on the diagonal


# Beside Avalanche's own loop

EVENTS = [
    e
    for e in dir(core.SupervisedPlugin)
    if e.startswith(("before_", "after_")) and "eval" not in e and "adaptation" not in e
]


class Recorder(core.SupervisedPlugin):
    """Says when its callbacks come, and what it saw."""

    def __init__(self):
        super().__init__()
        self.said = []


def _says(event):
    def say(self, strategy, *args, **kwargs):
        clock = strategy.clock
        seen = [clock.train_exp_counter, clock.train_iterations]
        if event != "before_training":
            seen.append(strategy.experience.current_experience)
        if "iteration" in event or "update" in event:
            seen += [tuple(strategy.mb_x.shape[:2]), strategy.mb_task_id.tolist()]
        self.said.append([event, *seen, next(strategy.model.parameters()).requires_grad])

    return say


for _event in EVENTS:
    setattr(Recorder, _event, _says(_event))


@pytest.mark.filterwarnings("ignore:No loggers specified")
def test_the_callbacks_come_in_the_order_in_which_avalanche_s_own_loop_has_them():
    from avalanche.training.supervised import Naive

    made, hosted, recorder = (
        toy.make_model(),
        Avalanche(plugin="tests.strategies.test_avalanche.Recorder"),
        Recorder(),
    )
    net = AvalancheModel(made)
    loop = Naive(
        model=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.0),
        criterion=Criterion(),
        train_mb_size=3,
        plugins=[recorder],
        evaluator=None,
    )
    for i, experience in enumerate(
        make_benchmark_from_examples(
            True, train=[toy.make_examples(i, 6) for i in (0, 1)]
        ).train_stream
    ):
        loop.train(experience, shuffle=False)
        hosted.begin(made, toy.make_task(i, 6))
        for start in (0, 3):
            hosted.backward(made, made.batch(toy.make_examples(i, 6)[start : start + 3]))
        hosted.end(made, toy.make_task(i, 6))
    assert hosted.plugin_instance.said == recorder.said
    assert len(recorder.said) == 2 * (6 + 2 * 8)


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:No loggers specified")
def test_on_a_cpu_avalanche_s_own_si_never_leaves_its_start_and_a_hosted_one_does():
    """Its old weights are the live ones there, so no step has a length; hosted, they are copies."""
    from avalanche.training.supervised import Naive

    plugin = plugins.SynapticIntelligencePlugin(1.0)
    net = AvalancheModel(toy.make_model())
    loop = Naive(
        model=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        criterion=Criterion(),
        train_mb_size=3,
        plugins=[plugin],
        evaluator=None,
    )
    loop.train(make_benchmark_from_examples(True, train=[toy.make_examples(0, 6)]).train_stream[0])
    assert not any(p.data.any() for p in plugin.syn_data["trajectory"].values())
    hosted = Avalanche(plugin="SynapticIntelligencePlugin", args={"si_lambda": 1.0})
    toy.train_stages(toy.make_model(), hosted, 0, size=6)
    assert all(p.data.any() for p in hosted.plugin_instance.syn_data["trajectory"].values())


# What a plugin may do


class Halving(core.SupervisedPlugin):
    """The loss and its gradient count half, and twice the squared weights are added."""

    def before_backward(self, strategy, **kwargs):
        pull = sum(p.square().sum() for p in strategy.model.parameters())
        strategy.loss = 0.5 * strategy.loss + 2 * pull


def test_what_a_plugin_makes_of_the_loss_is_what_is_differentiated():
    made, rows = toy.make_model(torch.float64), toy.make_examples(0, 5)
    plain, halved = (
        step(made, s, rows)
        for s in (Strategy(), Avalanche(plugin="tests.strategies.test_avalanche.Halving"))
    )
    expected = {n: 0.5 * g + 4 * weights(made)[n].detach() for n, g in plain.items()}
    assert toy.all_close(halved, expected, rtol=1e-9)


@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # peft asks for it
def test_with_an_adapter_a_plugin_sees_its_parameters_alone_by_the_names_that_checkpoints_have():
    made = toy.make_model()
    made.net = add_adapter(
        made.net, "lora", {"lora": {"r": 2, "target_modules": ["q_proj"]}}, seq2seq=False
    )
    hosted = Avalanche(plugin="EWCPlugin", args={"ewc_lambda": 1.0})
    toy.train_stages(made, hosted, 0, size=4)
    assert hosted.plugin_instance.importances[0].keys() == weights(made).keys()
    assert all("lora_" in n for n in weights(made))


class Curious(core.SupervisedPlugin):
    """Asks for an attribute."""

    def __init__(self, does):
        super().__init__()
        self.does = does

    def before_training_exp(self, strategy, **kwargs):
        if self.does == "reads":
            assert not hasattr(strategy.experience, "classes_in_this_experience")
            strategy.experience.classes_in_this_experience  # noqa: B018
        elif self.does == "sets":
            strategy.dataloader = []
        elif self.does == "steps":
            strategy.optimizer.step()
        else:
            self.kept = {"model": strategy.model}


@pytest.mark.parametrize(
    ("does", "told"),
    [
        (
            "reads",
            r"reads strategy.experience.classes_in_this_experience, which our stage does not have for it \(",
        ),
        (
            "sets",
            r"sets strategy.dataloader, which our stage does not have for it \(there is model, optimizer,",
        ),
        ("steps", "reads strategy.optimizer.step"),
    ],
)
def test_what_our_stage_does_not_have_is_refused_by_name(does, told):
    with pytest.raises(ConfigError, match=f"tests.strategies.test_avalanche.Curious {told}"):
        Avalanche(plugin="tests.strategies.test_avalanche.Curious", args={"does": does}).begin(
            toy.make_model(), even(0)
        )


def test_what_no_checkpoint_can_hold_is_refused_by_name():
    hosted = Avalanche(plugin="tests.strategies.test_avalanche.Curious", args={"does": "keeps"})
    hosted.begin(toy.make_model(), even(0))
    with pytest.raises(
        ConfigError,
        match=r"tests.strategies.test_avalanche.Curious.kept.model is a AvalancheModel, which no checkpoint",
    ):
        hosted.state_dict()
    with pytest.raises(
        ConfigError, match=r"Curious.does is a Module, which no checkpoint can hold"
    ):
        Avalanche(
            plugin="tests.strategies.test_avalanche.Curious", args={"does": torch.nn.Module()}
        )


class Watcher(core.SupervisedPlugin):
    """Waits for an evaluation."""

    def after_eval_exp(self, strategy, **kwargs):
        """Never called."""


# What is refused


def test_each_of_avalanche_s_plugins_is_hosted_or_refused_with_its_reason():
    there = {
        n
        for n, k in vars(plugins).items()
        if isinstance(k, type) and issubclass(k, core.SupervisedPlugin)
    }
    assert there - {"SupervisedPlugin"} == SUPPORTED_PLUGINS.keys() | UNSUPPORTED_PLUGINS.keys()
    told = (Path(__file__).parents[2] / "docs" / "avalanche.md").read_text("utf-8")
    assert all(f"`{name}`" in told for name in there - {"SupervisedPlugin"})


@pytest.mark.parametrize("name", UNSUPPORTED_PLUGINS)
def test_one_that_needs_what_we_have_not_is_refused_before_it_is_made(name):
    with pytest.raises(
        ConfigError, match=f"plugin={name} cannot be hosted: .*{UNSUPPORTED_PLUGINS[name][:20]}"
    ):
        Avalanche(plugin=name)
    with pytest.raises(ConfigError, match="cannot be hosted"):
        Avalanche(plugin=f"avalanche.training.plugins.{name}")


@pytest.mark.parametrize(
    ("name", "args", "told"),
    [
        ("SIPlugin", {}, "unknown plugin 'SIPlugin'; did you mean 'MIRPlugin'|Known: AGEMPlugin"),
        ("nowhere.Plugin", {}, "plugin=nowhere.Plugin is not there"),
        ("torch.nn.Linear", {}, "is no SupervisedPlugin"),
        ("avalanche.training.plugins.FromScratchTrainingPlugin", {}, "is no SupervisedPlugin"),
        (
            "tests.strategies.test_avalanche.Watcher",
            {},
            "our stage never comes to its after_eval_exp",
        ),
        (
            "SynapticIntelligencePlugin",
            {},
            r"args=\{\}: .*missing 1 required positional argument: 'si_lambda'",
        ),
        ("EWCPlugin", {"ewc_lambda": 1, "mode": "sideways"}, "Mode must be separate or online"),
    ],
)
def test_one_that_cannot_be_made_is_refused(name, args, told):
    with pytest.raises(ConfigError, match=told):
        Avalanche(plugin=name, args=args)
