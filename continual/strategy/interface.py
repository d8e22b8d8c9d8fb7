"""The strategy interface: plain sequential fine-tuning, and the moments a method may override."""

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
    """Declare a field of state: carried from task to task and saved in every checkpoint."""
    return field(init=False, repr=False, default_factory=factory, metadata={"memory": True})


@dataclass(kw_only=True)
class Strategy:
    """Naive sequential fine-tuning.

    A method overrides one or two moments, adds its term to `super()`'s and calls `super()` once;
    then methods compose by inheriting from several. Memory holds values: never live tensors, never
    positions in a data set.
    """

    # For people: what the memory keeps between stages, in bytes, and what a step costs relative to
    # naive's on as many new examples. P trainable weights, E remembered examples, S response
    # tokens of an example, T tasks, V vocabulary.
    stores: ClassVar[str] = "nothing"
    costs: ClassVar[str] = "1"

    # Numbers that are logged with the step's loss.
    notes: dict[str, float] = field(init=False, repr=False, default_factory=dict)

    # The weights of a checkpoint, without the strategy's memory, are a model that answered in the
    # run.
    weights_are_complete = True

    # The strategy asks a model for losses, answers and sums of gradients only, so that its weights
    # may be sharded. A subclass does not inherit this: each class declares it for its own code.
    shardable = True

    # What the strategy leaves in `.grad` is a step of plain SGD; under another optimizer it would
    # be another method.
    requires_sgd = False

    @classmethod
    def declares_shardable(cls) -> bool:
        """Return True if this class and all strategies that it inherits from declare `shardable`.

        A class that declares nothing counts as not shardable, which is the safe answer.
        """
        kinds = [kind for kind in cls.__mro__ if hasattr(kind, "declares_shardable")]
        return all(vars(kind).get("shardable", False) for kind in kinds)

    def is_shardable(self) -> bool:
        """Return True if the strategy, as it is configured, works on sharded weights."""
        return self.declares_shardable()

    def __post_init__(self) -> None:
        """End the chain of composed strategies, each of which calls `super()`'s."""

    def begin(self, model: Model, task: Task[Encoded]) -> list[Any]:
        """Prepare the model for a new task; return what the optimizer may change.

        Parameters, or parameter groups of an optimizer.
        """
        return list(weights(model).values())

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """Compute the scalar that a step minimises, of one micro-batch."""
        return nll(model, batch)

    def backward(self, model: Model, batch: Batch) -> Tensor:
        """Leave this step's direction in every `.grad`; return the loss, for the log."""
        return accumulate(self.loss, model, batch.micro_batches())

    def end(self, model: Model, task: Task[Encoded]) -> None:
        """Keep what later stages need of the finished task."""

    def route(self, model: Model, task: str) -> None:
        """Prepare the model for the test of `task`, known by its name.

        A strategy that overrides this uses the task's identity at test time.
        """

    def dispatch(self, model: Model, prompts: Sequence[Sequence[int]]) -> Iterator[Sequence[int]]:
        """Prepare the model for some of a task's prompts, then yield their indices.

        `prompts` holds the token ids of each. The yielded prompts are answered before the next
        ones are asked for. A strategy may decide by each prompt only, not by the task.
        """
        yield range(len(prompts))

    def inner_loop(self) -> Strategy:
        """Return the strategy that adapts to a new task by the inner steps of this one.

        It runs under plain SGD at lr 1. Raises ConfigError for a strategy without an inner loop.
        """
        raise ConfigError(
            f"{type(self).__name__} has no inner loop, and adapt.rule=inner takes its steps; "
            "start from a run of maml or another meta-learning strategy, or set adapt.rule=train"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the memory fields, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.metadata.get("memory")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; raises KeyError if a field is missing.

        A Parameter, which the optimizer may hold, stays the same object and takes the values.
        """
        for name, current in self.state_dict().items():
            if isinstance(current, Parameter):
                current.data.copy_(state[name])
            else:
                setattr(self, name, state[name])


def to_param_groups(parameters: Sequence[Any]) -> list[dict[str, Any]]:
    """Return what `begin` returned as optimizer parameter groups only.

    The parameters that were in no group form the last one.
    """
    groups = [p for p in parameters if isinstance(p, dict)]
    ungrouped = [p for p in parameters if not isinstance(p, dict)]
    return [*groups, {"params": ungrouped}]


def replaces_super(method: Method) -> Method:
    """Mark a method that does its whole moment itself, so that no other may stand behind it.

    For one that calls `super()`'s only where it is switched off. A method that never calls it needs
    no mark.
    """
    method.__dict__["replaces_super"] = True
    return method
