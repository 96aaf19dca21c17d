"""How many steps noise takes to even out an imbalance of one unit, head or layer."""

from __future__ import annotations

import math

ENOUGH_EVEN = math.log(3.0)
"""Log factor below which a part counts as even: the threshold from which it is named."""


def steps_to_even(log_factor: float, relaxation: float) -> float:
    """Steps until a part that is off its noise equilibrium by `exp(|log_factor|)` is off by 3 times only.

    At log factor `u` the charge is in proportion to `sinh(2 u)`, and so is what noise and decay take of it per step
    while the function stays the same: the noise of the small side is `e^(2u)` times, that of the large side `e^(-2u)`
    times the balanced one. So `sinh(2 u)` falls by e in every `relaxation` steps, at any distance, where both sides are
    alike at the equilibrium. Where they are not, this is right within a factor of 2 as long as the larger one shrinks.

    Args:
        log_factor: how far it is off, as a logarithm.
        relaxation: steps in which a small deviation falls by e.

    Returns:
        The steps; 0 where it is off by less than 3 times, NaN where the relaxation is not known.

    Example:
        >>> round(steps_to_even(math.log(30), 100)), steps_to_even(math.log(2), 100)
        (462, 0.0)

    Source: theory.md sections 4 and 7.
    """
    far = max(abs(log_factor), ENOUGH_EVEN)
    if not relaxation > 0:
        return math.nan
    return relaxation * (_log_sinh(2 * far) - _log_sinh(2 * ENOUGH_EVEN))


def _log_sinh(x: float) -> float:
    """`log(sinh(x))` of a positive number, also of one whose sinh is beyond the range of floats."""
    return x - math.log(2) + math.log1p(-math.exp(-2 * x))
