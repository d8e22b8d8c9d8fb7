"""The strategy interface: plain sequential fine-tuning, and the moments at which a method may depart from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from inspect import isfunction, unwrap
from itertools import combinations
from typing import Any, ClassVar, TypeVar

from torch import Tensor
from torch.nn import Parameter

from continual.data import Encoded, Task
from continual.errors import ConfigError
from continual.loss import accumulate, nll
from continual.model import Model
from continual.packing import Batch
from continual.weights import weights

Method = TypeVar("Method", bound=Callable[..., Any])


def memory(factory: Callable[[], Any]) -> Any:
    """A field that is no hyper-parameter: carried from task to task and saved in every checkpoint."""
    return field(init=False, repr=False, default_factory=factory, metadata={"memory": True})


@dataclass(kw_only=True)
class Strategy:
    """Naive sequential fine-tuning.

    A method overrides one or two moments, adds its term to `super()`'s and calls `super()` once; then methods compose
    by inheriting from several. Memory holds values: never live tensors, never positions in a data set.
    """

    # What its memory keeps between stages, and what a step takes beside naive's on as many new examples, for people:
    # P trainable weights, E remembered examples, S response tokens of one, T tasks, V vocabulary; numbers are bytes.
    stores: ClassVar[str] = "nothing"
    costs: ClassVar[str] = "1"
    notes: dict[str, float] = field(init=False, repr=False, default_factory=dict)  # shown beside the step's loss

    whole = True  # a checkpoint's weights are, without the strategy's memory, a model that answered in the run
    shardable = True  # it asks a model for losses, answers and gradients' sums only, whose weights may be in shards
    sgd_only = False  # what it leaves in `.grad` is a step of plain SGD, and under another optimizer another method

    def __init_subclass__(cls, **more: Any) -> None:
        """A method whose class does not say itself that it is shardable is taken not to be."""
        super().__init_subclass__(**more)
        cls.shardable = vars(cls).get("shardable", False) and all(getattr(b, "shardable", True) for b in cls.__bases__)

    def __post_init__(self) -> None:
        """Where those of composed strategies end: each calls `super()`'s."""

    def begin(self, model: Model, task: Task[Encoded]) -> list[Any]:
        """A task arrives: ready the model; return what the optimizer may change (parameters or parameter groups)."""
        return list(weights(model).values())

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """The scalar that a step minimises, of one micro-batch."""
        return nll(model, batch)

    def backward(self, model: Model, batch: Batch) -> Tensor:
        """Leave this step's direction in every `.grad`; return the loss, for the log."""
        return accumulate(self.loss, model, batch.micro_batches())

    def end(self, model: Model, task: Task[Encoded]) -> None:
        """The task is over: keep what later stages need."""

    def route(self, model: Model, task: str) -> None:
        """`task` is about to be tested. To override this is to use the task's identity at test time."""

    def dispatch(self, model: Model, prompts: Sequence[Sequence[int]]) -> Iterator[Sequence[int]]:
        """A task's prompts, token ids each, are about to be answered: ready the model for some and yield their indices.

        Those are answered before the next ones are asked for. What is here to decide by is each prompt alone.
        """
        yield range(len(prompts))

    def rule(self) -> Strategy:
        """What learns a new task in the steps that this one has prepared the weights for, under plain SGD at lr 1.

        Raises ConfigError where they were prepared for none.
        """
        raise ConfigError(f"{type(self).__name__} has no inner loop, and adapt.rule=inner takes its steps; start from "
                          "a run of maml or its kin, or set adapt.rule=train")

    def state_dict(self) -> dict[str, Any]:
        """The memory fields, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.metadata.get("memory")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave; raises KeyError if a field is missing.

        What the optimizer has been given keeps its identity, and takes on the values.
        """
        for name, now in self.state_dict().items():
            if isinstance(now, Parameter):
                now.data.copy_(state[name])
            else:
                setattr(self, name, state[name])


def groups(trained: Sequence[Any]) -> list[dict[str, Any]]:
    """What `begin` returned, as optimizer parameter groups alone: one for all parameters that were in none."""
    given = [g for g in trained if isinstance(g, dict)]
    return [*given, {"params": [p for p in trained if not isinstance(p, dict)]}]


def instead(method: Method) -> Method:
    """Mark a method that does all of its moment itself, and calls `super()`'s where it is switched off at most.

    A method that never calls it needs no mark.
    """
    method.__dict__["instead"] = True
    return method


def compose(*parts: Strategy, names: Sequence[str] = ()) -> Strategy:
    """One strategy that has the moments of all `parts`, in that order, and their hyper-parameters.

    A part whose class another part inherits from is that part's own base, and is not listed twice. Raises ConfigError
    where a part would lose one of its methods to another, where two have a field of one name that is not the same
    field, and where they share a setting and ask for different values. There the parts are called by their `names`, by
    default their classes'.
    """
    kinds = list(dict.fromkeys(type(p) for p in parts))
    bases = tuple(k for k in kinds if not any(o is not k and issubclass(o, k) for o in kinds))
    name, says = "".join(b.__name__ for b in bases), {"shardable": True}  # if all of them are
    kind = bases[0] if len(bases) == 1 else dataclass(kw_only=True)(type(name, bases, says))
    for reason in (*_lost(kind, kinds), *_mixed(kinds)):
        raise ConfigError(reason)
    settings: dict[str, tuple[Any, str]] = {}
    for part, called in zip(parts, names or [type(p).__name__ for p in parts], strict=True):
        for f in (f for f in fields(part) if f.init):
            value = getattr(part, f.name)
            other, owner = settings.setdefault(f.name, (value, called))
            if other != value:
                raise ConfigError(f"{owner}.{f.name}={other} and {called}.{f.name}={value} are one setting of what is "
                                  "composed of both; give both the same value, or choose one of them")
    composed: Strategy = kind(**{name: value for name, (value, _) in settings.items()})
    return composed


def _mixed(listed: Sequence[type[Strategy]]) -> Iterator[str]:
    """The names of fields that two listed classes have, each its own; a setting may be both's, if its values agree."""
    for a, b in combinations(listed, 2):
        settings = {f.name for f in fields(a) if f.init} & {f.name for f in fields(b) if f.init}
        for name in dict.fromkeys(f.name for kind in (a, b) for f in fields(kind) if f.name not in settings):
            first, second = _origin(a, name), _origin(b, name)
            if first and second and first is not second:
                yield (f"{a.__name__} and {b.__name__} cannot be composed: each has a {name!r} of its own, and what is "
                       "composed of both has one; choose one of them")


def _origin(kind: type[Strategy], name: str) -> type | None:
    """The class, of all that `kind` inherits from, that had the field or method first."""
    had = (k for k in reversed(kind.__mro__) if name in {**vars(k), **getattr(k, "__dataclass_fields__", {})})
    return next(had, None)


def _lost(kind: type[Strategy], listed: Sequence[type[Strategy]]) -> Iterator[str]:
    """What a listed class has and nothing in the composed `kind` would ever call, one sentence each.

    What a class has from its own bases it may replace, but not what such a base is listed for.
    """
    names = dict.fromkeys(n for k in kind.__mro__ for n, f in vars(k).items() if isfunction(f))
    for name in (n for n in names if n == "__post_init__" or not n.startswith("__")):
        owners = [k for k in kind.__mro__ if isfunction(vars(k).get(name))]
        first = next((i for i, k in enumerate(owners) if _alone(vars(k)[name])), len(owners))
        for owner in owners[first + 1 :]:
            if owner is not Strategy and (owner in listed or not issubclass(owners[first], owner)):
                by, lost = (next(k for k in listed if issubclass(k, o)).__name__ for o in (owners[first], owner))
                mend = "choose one of them" if _alone(vars(owner)[name]) else f"list {lost} first"
                yield f"{by} and {lost} cannot be composed so: {by}'s {name!r} takes the place of {lost}'s; {mend}"


def _alone(method: Any) -> bool:
    """Whether a method leaves nothing to its bases': it is marked so, or there is no `super()` in it."""
    return "instead" in vars(method) or "__class__" not in unwrap(method).__code__.co_freevars
