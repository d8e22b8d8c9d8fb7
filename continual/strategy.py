"""The strategy interface: plain sequential fine-tuning, and the five moments at which a method may depart from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import Parameter

from continual.data import Encoded, Task
from continual.errors import ConfigError
from continual.loss import accumulate, nll
from continual.model import Model
from continual.packing import Batch
from continual.weights import weights


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


def compose(*parts: Strategy) -> Strategy:
    """One strategy that has the moments of all `parts`, in that order, and their hyper-parameters.

    A part whose class another part inherits from is that part's own base, and is not listed twice.
    """
    kinds = list(dict.fromkeys(type(p) for p in parts))
    bases = tuple(k for k in kinds if not any(o is not k and issubclass(o, k) for o in kinds))
    kind = bases[0] if len(bases) == 1 else dataclass(kw_only=True)(type("".join(b.__name__ for b in bases), bases, {}))
    settings: dict[str, Any] = {}
    for part in parts:
        for f in (f for f in fields(part) if f.init):
            value = getattr(part, f.name)
            if settings.setdefault(f.name, value) != value:
                raise ConfigError(f"the composed strategies share {f.name!r} and ask for {settings[f.name]!r} and "
                                  f"{value!r}; give both the same value, or choose one of them")
    composed: Strategy = kind(**settings)
    return composed
