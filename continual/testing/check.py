"""The rules that every strategy keeps to, to be called on one's own:
`check_strategy(MyStrategy())`.

Each rule tries the strategy on a network of a few thousand weights and tasks of random tokens
(`continual.testing.toy`), in a second or two altogether, and needs nothing installed but this
package.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from copy import deepcopy

import torch

from continual.models.model import Model
from continual.strategy.interface import Strategy
from continual.testing import toy
from continual.testing.rules import RULES, ContractError, Subject, switched_off_it_is_naive, title

__all__ = ["ContractError", "check_strategy"]


def check_strategy(
    strategy: Strategy,
    *,
    off: Strategy | None = None,
    moves: Collection[str] = (),
    model: Callable[[torch.dtype], Model] = toy.model,
) -> None:
    """Hold a strategy, and copies of it, to every rule; raises ContractError for the first one that
    is broken.

    `off` is the same strategy with the hyper-parameters that should make it naive. `moves` names
    the moments of begin, end and route that mean to set the weights, as the end of a merge does.
    `model` gives what it is tried on in a precision, such as `lambda dtype: toy.model(dtype,
    lora=12)` for a method of LoRA's factors.
    """
    subject = Subject(lambda: deepcopy(strategy), moves, model)
    for rule in RULES:
        _held(rule, subject, strategy)
    if off is not None:
        _held(switched_off_it_is_naive, Subject(lambda: deepcopy(off), moves, model), strategy)


def _held(rule: Callable[[Subject], None], subject: Subject, strategy: Strategy) -> None:
    try:
        rule(subject)
    except ContractError as broken:
        raise ContractError(f"{type(strategy).__name__}: {broken}") from None
    except Exception as error:
        raise ContractError(
            f"{type(strategy).__name__}: {title(rule)}: {type(error).__name__} was raised, where "
            f"nothing should be: {error}; mend what the traceback above shows"
        ) from error
