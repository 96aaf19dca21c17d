"""Norms of tensors whose squares may leave the range of their type."""

from __future__ import annotations

import torch
from torch import Tensor


def size_of(tensor: Tensor) -> Tensor:
    """The Frobenius norm, float64; in double precision where squares may leave the range of the tensor's own type.

    Example:
        >>> round(float(size_of(torch.full((4,), 1e-30))) * 1e30, 4)
        2.0
    """
    size: Tensor = torch.linalg.vector_norm(tensor)
    return size.double() if _within_range(size) else torch.linalg.vector_norm(tensor.double())


def largest_row(rows: Tensor) -> Tensor:
    """The largest norm of a row, as `size_of` gives it.

    Example:
        >>> largest_row(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor(5., dtype=torch.float64)
    """
    size: Tensor = torch.linalg.vector_norm(rows, dim=1).max()
    return size.double() if _within_range(size) else torch.linalg.vector_norm(rows.double(), dim=1).max()


def _within_range(size: Tensor) -> bool:
    """Whether the squares behind a norm stay in the range of its type, with room to spare."""
    safe = torch.finfo(torch.float32)
    return size.dtype in (torch.float32, torch.float64) and safe.tiny**0.25 < float(size) < safe.max**0.25
