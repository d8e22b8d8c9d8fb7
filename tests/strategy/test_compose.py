"""Strategies that are listed together have the moments of all."""

from dataclasses import dataclass, field

import pytest

from continual.errors import ConfigError
from continual.models.loss import gradient_of, nll
from continual.models.weights import flatten_weights, gradient
from continual.strategy.compose import compose
from continual.strategy.interface import Strategy, memory, replaces_super
from strategies.der import DER
from strategies.ewc import EWC, L2, MAS, OnlineEWC
from strategies.gem import GEM
from strategies.hard_replay import HardReplay
from strategies.inscl import InsCL
from strategies.lamol import LAMOL
from strategies.lwf import LwF
from strategies.maml import MAML, Reptile
from strategies.multitask import MultiTask
from strategies.replay import Replay
from strategies.router import Router
from strategies.si import SI
from tests.support import toy


@dataclass(kw_only=True)
class ReplayEWC(Replay, EWC):
    """Composed by hand."""


@dataclass(kw_only=True)
class Says(Strategy):
    """What its subclasses share."""

    said: list[str] = field(init=False, default_factory=list)


@dataclass(kw_only=True)
class First(Says):
    """Says when its moments come."""

    alpha: float = 0.0

    def end(self, model, task):
        self.said.append("first")
        super().end(model, task)


@dataclass(kw_only=True)
class Second(Says):
    """Says when its moments come."""

    beta: float = 0.0

    def end(self, model, task):
        self.said.append("second")
        super().end(model, task)


def weights_after(strategy: Strategy):
    made = toy.make_model()
    toy.train_stages(made, strategy, 0, 1, 2)
    return toy.copy_parameters(made)


REPLAY, PULL = (
    {"capacity": 6, "share": 0.4, "seed": 3},
    {"strength": 500.0, "num_examples": 5, "seed": 3},
)


def test_replay_and_ewc_compose_to_the_class_that_inherits_from_both():
    composed = compose(Replay(**REPLAY), EWC(**PULL))
    by_hand = ReplayEWC(**{**REPLAY, **PULL})
    assert type(composed).__mro__[1:] == ReplayEWC.__mro__[1:]
    assert toy.bitwise_equal(weights_after(composed), weights_after(by_hand))


def test_it_has_the_memory_and_the_terms_of_both():
    strategy = compose(Replay(**REPLAY), EWC(**PULL))
    weights_after(strategy)
    assert len(strategy.buffer) == 6
    assert strategy.anchor
    assert strategy.stages == 3
    assert set(strategy.state_dict()) == {*Replay().state_dict(), *EWC().state_dict()}


def test_one_part_switched_off_leaves_the_other():
    assert toy.bitwise_equal(
        weights_after(compose(Replay(**REPLAY), EWC(strength=0, seed=3))),
        weights_after(Replay(**REPLAY)),
    )
    assert toy.bitwise_equal(
        weights_after(compose(Replay(capacity=0, seed=3), EWC(**PULL))), weights_after(EWC(**PULL))
    )


def test_the_moments_come_in_the_order_of_the_list():
    for parts, order in (
        ((First(), Second()), ["first", "second"]),
        ((Second(), First()), ["second", "first"]),
    ):
        strategy = compose(*parts)
        strategy.end(toy.make_model(), toy.make_task(0))
        assert strategy.said == order


@pytest.mark.parametrize(
    "parts",
    [
        (Replay(capacity=8), MultiTask(capacity=8)),
        (MultiTask(capacity=8), Replay(capacity=8)),
        (Strategy(), MultiTask(capacity=8)),
        (MultiTask(capacity=8),),
    ],
    ids=["base first", "base last", "naive", "alone"],
)
def test_a_base_beside_its_own_subclass_is_that_subclass(parts):
    composed = compose(*parts)
    assert type(composed) is MultiTask
    assert composed.capacity == 8
    assert toy.bitwise_equal(weights_after(composed), weights_after(MultiTask(capacity=8)))


def test_one_strategy_composed_with_nothing_keeps_its_settings():
    made = compose(OnlineEWC(strength=7.0, decay=0.3, labels="sampled"))
    assert type(made) is OnlineEWC
    assert (made.strength, made.decay, made.labels) == (7.0, 0.3, "sampled")


def test_settings_that_are_shared_must_agree():
    with pytest.raises(ConfigError, match=r"Replay\.seed=1 and EWC\.seed=2 are one setting"):
        compose(Replay(seed=1), EWC(seed=2))
    with pytest.raises(
        ConfigError, match=r"Replay\.capacity=5 and MAML\.capacity=0\.1 are one setting"
    ):
        compose(Replay(capacity=5), MAML())


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        (
            "replay,der",
            "strategy.replay.capacity=0.2 and strategy.der.capacity=500 are one setting",
        ),
        ("lwf,ewc", "strategy.lwf.strength=1.0 and strategy.ewc.strength=1000.0 are one setting"),
    ],
)
def test_settings_that_do_not_agree_are_told_by_their_keys(listed, message, cli_error, run_keys):
    assert message in cli_error("run", *run_keys, f"strategy=[{listed}]", "out=it")


@pytest.mark.parametrize("others", [(MAML, EWC), (EWC, MAML), (Reptile, EWC), (MultiTask, EWC)])
def test_no_order_of_the_list_loses_the_pull(others):
    def after(strength: float):
        made = [k(strength=strength, num_examples=5) if k is EWC else k() for k in others]
        return weights_after(compose(*made))

    assert not toy.bitwise_equal(after(500.0), after(0.0))


def test_maml_composes_with_weighted_tasks():
    strategy = compose(
        MultiTask(weighting="size", capacity=12, share=0.5), MAML(capacity=12, share=0.5)
    )
    weights_after(strategy)
    assert set(strategy.notes) == {"weight/c", next(n for n in strategy.notes if n != "weight/c")}
    assert sum(strategy.notes.values()) == pytest.approx(1)


# Lists that cannot compose


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            (MAML(share=0), GEM()),
            "MAML and GEM cannot be composed: MAML's 'backward' replaces GEM's; list GEM first",
        ),
        (
            (MAML(), SI()),
            "MAML and SI cannot be composed: MAML's 'backward' replaces SI's; list SI first",
        ),
        (
            (MAML(), Reptile()),
            "MAML and Reptile cannot be composed: MAML's 'backward_episode' replaces "
            "Reptile's; use only one of them",
        ),
        (
            (EWC(), MAS()),
            "EWC and MAS cannot be composed: EWC's 'measure_importance' replaces MAS's; use "
            "only one of them",
        ),
        (
            (L2(), EWC()),
            "EWC and L2 cannot be composed: EWC's 'measure_importance' replaces L2's; use "
            "only one of them",
        ),
        (
            (Replay(), HardReplay()),
            "Replay and HardReplay cannot be composed: Replay's 'update_buffer' replaces "
            "HardReplay's; use only one of them",
        ),
        (
            (HardReplay(), Replay()),
            "HardReplay and Replay cannot be composed: HardReplay's 'update_buffer' replaces",
        ),
        (
            (LAMOL(), Replay()),
            "LAMOL and Replay cannot be composed: LAMOL's 'update_buffer' replaces Replay's",
        ),
        (
            (InsCL(), HardReplay()),
            "InsCL and HardReplay cannot be composed: InsCL's 'draw_replay_examples' replaces",
        ),
        (
            (HardReplay(), InsCL()),
            "HardReplay and InsCL cannot be composed: HardReplay's 'draw_replay_examples' replaces",
        ),
        (
            (EWC(), OnlineEWC()),
            "OnlineEWC and EWC cannot be composed: OnlineEWC's 'consolidate' replaces",
        ),
    ],
    ids=lambda x: None if isinstance(x, str) else ",".join(type(p).__name__ for p in x),
)
def test_a_list_in_which_one_would_lose_a_method_to_another_is_refused(parts, message):
    with pytest.raises(ConfigError, match=message):
        compose(*parts)


def test_the_other_order_composes_where_it_says_so():
    model = toy.make_model()
    strategy = compose(GEM(capacity=8, share=0.5), MAML(capacity=8, share=0.5))
    toy.train_stages(model, strategy, 0, 1, 2)
    model.net.zero_grad()
    strategy.backward(model, model.batch(toy.make_examples(3, 4)))
    own = flatten_weights(gradient(model))
    for pool in strategy.reference_pools():
        assert flatten_weights(gradient_of(nll, model, model.batch(pool))) @ own > -1e-4


@dataclass(kw_only=True)
class Alone(Strategy):
    """Takes a moment over, in a method that calls the others' only when it is switched off."""

    on: bool = True

    @replaces_super
    def end(self, model, task):
        if not self.on:
            super().end(model, task)


def test_a_method_that_is_marked_counts_as_one_that_never_calls_the_others():
    with pytest.raises(
        ConfigError,
        match="Alone and First cannot be composed: Alone's 'end' replaces Fi",
    ):
        compose(Alone(), First())
    strategy = compose(First(), Alone())
    strategy.end(toy.make_model(), toy.make_task(0))
    assert strategy.said == ["first"]


@dataclass(kw_only=True)
class Counts(Strategy):
    """Its memory has the name that EWC's has."""

    stages: int = memory(int)


@dataclass(kw_only=True)
class Anchored(Strategy):
    """Its setting has the name of a memory of EWC's."""

    anchor: float = 0.0


@dataclass(kw_only=True)
class Measured(Strategy):
    """Its memory has the name of a method of EWC's."""

    measure_importance: float = memory(float)


@pytest.mark.parametrize(
    ("other", "name"), [(Counts, "stages"), (Anchored, "anchor"), (Measured, "measure_importance")]
)
def test_one_name_for_two_things_is_refused_in_either_order(other, name):
    for parts in ((EWC(), other()), (other(), EWC())):
        names = " and ".join(type(p).__name__ for p in parts)
        with pytest.raises(ConfigError, match=f"{names} cannot be composed: both define {name!r}"):
            compose(*parts)


def test_strategies_that_remember_instructions_each_in_its_own_way_are_refused():
    with pytest.raises(
        ConfigError,
        match="InsCL and Router cannot be composed: both define 'instructions'",
    ):
        compose(InsCL(), Router())


def test_every_part_of_a_composition_checks_and_seeds_itself():
    for parts in ((LwF(), DER(seed=3)), (DER(seed=3), LwF())):
        assert compose(*parts).rng.getstate() == DER(seed=3).rng.getstate()
