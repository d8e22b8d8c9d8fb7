"""The strategy interface: plain sequential fine-tuning, and the moments at which a method may
depart from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from torch import Tensor
from torch.nn import Parameter

from continual.data.types import Encoded, Task
from continual.errors import ConfigError
from continual.models.loss import accumulate, nll
from continual.models.model import Model
from continual.models.weights import weights
from continual.packing.batch import Batch

Method = TypeVar("Method", bound=Callable[..., Any])


def memory(factory: Callable[[], Any]) -> Any:
    """A field that is no hyper-parameter: carried from task to task and saved in every checkpoint."""
    return field(init=False, repr=False, default_factory=factory, metadata={"memory": True})


@dataclass(kw_only=True)
class Strategy:
    """Naive sequential fine-tuning.

    A method overrides one or two moments, adds its term to `super()`'s and calls `super()` once;
    then methods compose by inheriting from several. Memory holds values: never live tensors, never
    positions in a data set.
    """

    # What its memory keeps between stages, and what a step takes beside naive's on as many new
    # examples, for people: P trainable weights, E remembered examples, S response tokens of one, T
    # tasks, V vocabulary; numbers are bytes.
    stores: ClassVar[str] = "nothing"
    costs: ClassVar[str] = "1"
    notes: dict[str, float] = field(
        init=False, repr=False, default_factory=dict
    )  # shown beside the step's loss

    weights_are_complete = True  # a checkpoint's weights are, without the strategy's memory, a model that answered in the run
    shardable = True  # it asks a model for losses, answers and gradients' sums only, whose weights may be in shards
    requires_sgd = False  # what it leaves in `.grad` is a step of plain SGD, and under another optimizer another method

    def __init_subclass__(cls, **more: Any) -> None:
        """A method whose class does not say itself that it is shardable is taken not to be."""
        super().__init_subclass__(**more)
        cls.shardable = vars(cls).get("shardable", False) and all(
            getattr(b, "shardable", True) for b in cls.__bases__
        )

    def __post_init__(self) -> None:
        """Where those of composed strategies end: each calls `super()`'s."""

    def begin(self, model: Model, task: Task[Encoded]) -> list[Any]:
        """A task arrives: ready the model; return what the optimizer may change (parameters or
        parameter groups).
        """
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
        """`task` is about to be tested. To override this is to use the task's identity at test
        time.
        """

    def dispatch(self, model: Model, prompts: Sequence[Sequence[int]]) -> Iterator[Sequence[int]]:
        """A task's prompts, token ids each, are about to be answered: ready the model for some and
        yield their indices.

        Those are answered before the next ones are asked for. What is here to decide by is each
        prompt alone.
        """
        yield range(len(prompts))

    def inner_loop(self) -> Strategy:
        """What learns a new task in the steps that this one has prepared the weights for, under
        plain SGD at lr 1.

        Raises ConfigError where they were prepared for none.
        """
        raise ConfigError(
            f"{type(self).__name__} has no inner loop, and adapt.update_rule=inner takes its steps; "
            "start from a run of maml or its kin, or set adapt.update_rule=train"
        )

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


def to_param_groups(parameters: Sequence[Any]) -> list[dict[str, Any]]:
    """What `begin` returned, as optimizer parameter groups alone: one for all parameters that were
    in none.
    """
    given = [g for g in parameters if isinstance(g, dict)]
    return [*given, {"params": [p for p in parameters if not isinstance(p, dict)]}]


def replaces_super(method: Method) -> Method:
    """Mark a method that does all of its moment itself, and calls `super()`'s where it is switched
    off at most.

    A method that never calls it needs no mark.
    """
    method.__dict__["instead"] = True
    return method
