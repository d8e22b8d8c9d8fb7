"""`check_strategy` passes what keeps to the rules, and says which rule a broken strategy breaks."""

import random
from dataclasses import dataclass, field

import pytest
import torch

from continual.models.loss import accumulate, nll, token_nll
from continual.models.weights import weights
from continual.strategy.interface import Strategy, memory
from continual.testing import toy
from continual.testing.check import check_strategy
from continual.testing.rules import RULES, ContractError
from strategies.ewc import L2
from strategies.replay import Replay


@dataclass(kw_only=True)
class Live(Strategy):
    start: dict = memory(dict)

    def begin(self, model, task):
        self.start = weights(model)
        return super().begin(model, task)


@dataclass(kw_only=True)
class Graph(Strategy):
    kept: list = memory(list)

    def loss(self, model, batch):
        loss = super().loss(model, batch)
        self.kept = [loss]
        return loss


@dataclass(kw_only=True)
class Unseeded(Strategy):
    def loss(self, model, batch):
        return super().loss(model, batch) * (1 + random.random())


@dataclass(kw_only=True)
class UnseededBegin(Strategy):
    factor: float = field(init=False, default=1.0)

    def begin(self, model, task):
        self.factor = 1 + random.random()
        return super().begin(model, task)

    def loss(self, model, batch):
        return self.factor * super().loss(model, batch)


@dataclass(kw_only=True)
class Forgetful(Strategy):
    """What it counts within a stage is no memory."""

    steps: int = field(init=False, default=0)

    def begin(self, model, task):
        self.steps = 0
        return super().begin(model, task)

    def backward(self, model, batch):
        self.steps += 1
        return super().backward(model, batch)

    def loss(self, model, batch):
        return super().loss(model, batch) / self.steps


@dataclass(kw_only=True)
class ForgetfulBetween(Strategy):
    stages: int = field(init=False, default=0)

    def end(self, model, task):
        super().end(model, task)
        self.stages += 1

    def loss(self, model, batch):
        return super().loss(model, batch) * (1 + self.stages)


@dataclass(kw_only=True)
class Alone(Replay):
    """A moment that does not call `super()`'s."""

    def end(self, model, task):
        self.buffer.add(task.name, task.train)


@dataclass(kw_only=True)
class AloneAtTheStart(Replay):
    def begin(self, model, task):
        return list(weights(model).values())


@dataclass(kw_only=True)
class AloneInLoss(Strategy):
    def loss(self, model, batch):
        return nll(model, batch)


@dataclass(kw_only=True)
class AloneInBackward(Strategy):
    def backward(self, model, batch):
        return accumulate(nll, model, batch.micro_batches())


@dataclass(kw_only=True)
class AloneWhenMade(Strategy):
    def __post_init__(self):
        pass


@dataclass(kw_only=True)
class Summed(Strategy):
    """The loss of a part depends on how large the part is."""

    def loss(self, model, batch):
        super().loss(model, batch)
        return token_nll(model, batch).sum()


@dataclass(kw_only=True)
class Mover(Strategy):
    def backward(self, model, batch):
        with torch.no_grad():
            next(iter(weights(model).values())).mul_(0.99)
        return super().backward(model, batch)


@dataclass(kw_only=True)
class MovesAtItsEnd(Strategy):
    def end(self, model, task):
        super().end(model, task)
        with torch.no_grad():
            next(iter(weights(model).values())).mul_(0.99)


@dataclass(kw_only=True)
class LeavesGradients(Strategy):
    def end(self, model, task):
        super().end(model, task)
        nll(model, model.batch(task.train)).backward()


@dataclass(kw_only=True)
class LeavesOut(Strategy):
    def begin(self, model, task):
        return super().begin(model, task)[1:]


@dataclass(kw_only=True)
class TrainsAll(Strategy):
    def begin(self, model, task):
        super().begin(model, task)
        return list(model.net.parameters())


@dataclass(kw_only=True)
class LearnsNothing(Strategy):
    def loss(self, model, batch):
        return -super().loss(model, batch)


class Bare(Strategy):
    strength: float = 1.0


@dataclass(kw_only=True)
class Raises(Strategy):
    def end(self, model, task):
        super().end(model, task)
        raise ZeroDivisionError("of mine")


@dataclass(kw_only=True)
class Unkept(Strategy):
    kept: set = memory(set)


BROKEN = {
    Live: "memory holds values' is broken: .*is the network's own.*keep copies",
    Graph: "memory holds values' is broken: /kept/0 in memory has a graph",
    Unseeded: "a stage resumes bit exactly' is broken: two stages from the same state ended "
    "differently; draw from",
    UnseededBegin: "two stages from the same state ended differently",
    Forgetful: "from a checkpoint within it a stage ended differently; keep in memory",
    ForgetfulBetween: "from the checkpoint before it a stage ended differently",
    Alone: "every moment calls super' is broken: .*Alone's 'end' replaces .*; call "
    "super\\(\\)'s in each",
    AloneAtTheStart: "AloneAtTheStart's 'begin' replaces",
    AloneInLoss: "AloneInLoss's 'loss' replaces",
    AloneInBackward: "the loss of a strategy composed with it was never asked for",
    AloneWhenMade: "AloneWhenMade's '__post_init__' replaces",
    Summed: "micro batches do not change the step' is broken",
    Mover: "only the optimizer moves the weights' is broken: backward changed parameters",
    MovesAtItsEnd: "end changed parameters",
    LeavesGradients: "only backward leaves gradients' is broken: begin, loss or end left a "
    "gradient in",
    LeavesOut: "begin left out trainable parameters",
    TrainsAll: "begin returned a frozen parameter",
    LearnsNothing: "a stage lowers the loss' is broken: the loss went from",
    Bare: "Bare: the rule 'strategy is a dataclass' is broken: Bare has fields.*put @dataclass",
    Raises: "ZeroDivisionError was raised, where nothing should be: of mine",
    Unkept: "strategy memory memory/kept is a set, which no checkpoint can hold",
}


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_a_broken_strategy_is_refused_by_the_rule_that_it_breaks(kind):
    with pytest.raises(ContractError, match=BROKEN[kind]):
        check_strategy(kind())


def test_what_keeps_to_the_rules_passes():
    check_strategy(L2(strength=0.5), disabled=L2(strength=0))


def test_a_strategy_that_is_not_off_where_it_should_be_is_refused():
    with pytest.raises(ContractError, match="L2: the rule 'disabled equals naive' is broken"):
        check_strategy(L2(strength=0.5), disabled=L2(strength=0.5))


def test_moments_that_mean_to_may_move_the_weights():
    check_strategy(MovesAtItsEnd(), weight_setters=["end"])


def test_the_strategy_itself_is_left_as_it_was():
    strategy = Replay(capacity=6)
    check_strategy(strategy)
    assert len(strategy.buffer) == 0


def test_no_rule_needs_pytest():
    assert all(rule.__module__ == "continual.testing.rules" for rule in RULES)
    assert "pytest" not in vars(toy)
