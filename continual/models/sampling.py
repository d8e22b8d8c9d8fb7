"""Draw from discrete distributions by given random numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_cdf(probabilities: Tensor, draws: Tensor) -> Tensor:
    """Draw indices (N, 1) from distributions (N, K) by numbers (N, 1) in [0, 1)."""
    cumulative = probabilities.cumsum(-1)
    level = draws.to(cumulative) * cumulative[:, -1:]  # rounding may leave a total below 1
    index = torch.searchsorted(cumulative, level, right=True)
    return index.clamp(max=cumulative.shape[1] - 1)
