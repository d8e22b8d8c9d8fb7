"""Remove the directions that a method protects."""

from __future__ import annotations

from torch import Tensor


def project_out(rows: Tensor, basis: Tensor) -> Tensor:
    """Return the part of each row (..., n) orthogonal to the orthonormal columns of `basis` (n, k)."""
    return rows - rows @ basis @ basis.T
