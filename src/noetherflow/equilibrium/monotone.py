"""The zero of a function that falls along an orbit, for all coordinates at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def zero_of_log_ratio(
    ratio: Callable[[Tensor], Tensor], flattest: float, steepest: float, tolerance: float = 1e-10, most: int = 60
) -> Tensor:
    """Where `ratio(x) = log(up / down)` crosses 0, coordinate by coordinate.

    Args:
        ratio: maps `[n]` to `[n]`; falls along each coordinate with a slope between `-steepest` and `-flattest`.
        flattest: the least steepness, positive.
        steepest: the largest one.
        tolerance: how small the log ratio must be.
        most: evaluations at most.

    Returns:
        The zeros `[n]`: the first value alone gives an interval that holds each, secants then close in.

    Raises:
        ArithmeticError: not found within `most` evaluations, so that the bounds on the slope do not hold.

    Example:
        >>> zero_of_log_ratio(lambda x: 1 - 2 * x, flattest=2, steepest=4)
        tensor([0.5000], dtype=torch.float64)
    """
    here = torch.zeros(1, dtype=torch.float64)
    value = ratio(here)
    here = here.expand_as(value).clone()
    low, high = here + value / steepest, here + value / flattest
    low, high = torch.minimum(low, high), torch.maximum(low, high)
    ahead = here + value / flattest
    for _ in range(most):
        if float(value.abs().max()) <= tolerance:
            return here
        last, before, here = here, value, ahead
        value = ratio(here)
        ends = torch.stack([here + value / steepest, here + value / flattest])
        low, high = torch.maximum(low, ends.amin(0)), torch.minimum(high, ends.amax(0))
        slope = (value - before) / torch.where(here == last, torch.ones_like(here), here - last)
        secant = here - value / torch.where(slope < 0, slope, torch.full_like(slope, -flattest))
        ahead = torch.where((secant >= low) & (secant <= high), secant, (low + high) / 2)
        ahead = torch.where(value == 0, here, ahead)
    raise ArithmeticError(f"no zero within {most} evaluations: log ratio still {float(value.abs().max()):.2g}")
