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
from continual.testing.rules import (
    RULES,
    ContractError,
    StrategyUnderTest,
    disabled_equals_naive,
    violation_text,
)

__all__ = ["ContractError", "check_strategy"]


def check_strategy(
    strategy: Strategy,
    *,
    disabled: Strategy | None = None,
    weight_setters: Collection[str] = (),
    make_model: Callable[[torch.dtype], Model] = toy.make_model,
) -> None:
    """Hold a strategy, and copies of it, to every rule; raises ContractError for the first one that
    is broken.

    `off` is the same strategy with the hyper-parameters that should make it naive. `moves` names
    the moments of begin, end and route that mean to set the weights, as the end of a merge does.
    `model` gives what it is tried on in a precision, such as `lambda dtype: toy.model(dtype,
    lora=12)` for a method of LoRA's factors.
    """
    subject = StrategyUnderTest(lambda: deepcopy(strategy), weight_setters, make_model)
    for rule in RULES:
        _check_rule(rule, subject, strategy)
    if disabled is not None:
        _check_rule(
            disabled_equals_naive,
            StrategyUnderTest(lambda: deepcopy(disabled), weight_setters, make_model),
            strategy,
        )


def _check_rule(
    rule: Callable[[StrategyUnderTest], None], subject: StrategyUnderTest, strategy: Strategy
) -> None:
    try:
        rule(subject)
    except ContractError as broken:
        raise ContractError(f"{type(strategy).__name__}: {broken}") from None
    except Exception as error:
        raise ContractError(
            f"{type(strategy).__name__}: {violation_text(rule)}: {type(error).__name__} was raised, where "
            f"nothing should be: {error}; fix what the traceback above shows"
        ) from error
