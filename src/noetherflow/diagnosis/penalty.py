"""Whether a penalty inside the loss or a normalisation's eps moves the norm of scale-invariant weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from noetherflow.monitor.rundata import RunData

STEADY, COARSE = 0.3, 0.3
"""Change of the pull on a norm along a run, over its median, that a penalty may have; and scatter that comes from norms
which are known at the estimates alone.
"""
FEWEST = 12
"""Recorded steps below which scatter tells nothing."""


@dataclass(frozen=True)
class NormPull:
    """The gradient's part along the weights, over their squares: `r = <W, g> / |W|^2` step by step.

    A penalty `c |W|^2` in the loss adds `2 c` to it, at any weights and on any minibatch. What eps adds is in
    proportion to the gradient that the minibatch sends through the normalisation, has either sign, and goes as
    `|W|^-4`, the variance that eps is added to being in proportion to `|W|^2`: it scatters, and changes as the loss
    falls.

    Attributes:
        strength: `c`, half of the median of `r`; under Adam in proportion to it only.
        scatter: half of the range of `r` that holds 80 % of the steps, over the size of the median.
        moved: the change of `r` from the first quarter of the steps to the last, likewise.
        coarse: `|W|^2` is known at the estimates alone, not at every step.
        adaptive: the run is Adam's.
    """

    strength: float
    scatter: float
    moved: float
    coarse: bool = False
    adaptive: bool = False

    @property
    def is_penalty(self) -> bool:
        """It is positive, the same at the end as at the beginning, and no smaller than what scatters."""
        return self.strength > 0 and self.moved <= STEADY and self.scatter <= 1

    @property
    def is_clear(self) -> bool:
        """It is a penalty's, or none's: it has no lasting sign, or a negative one. Between stands a pull that is
        positive and changes, as where some layers of a family have a penalty and others have none.
        """
        return self.is_penalty or self.strength <= 0 or self.scatter > 1

    @property
    def rest(self) -> float:
        """The share of a violation that a penalty leaves to eps."""
        return 0.0 if self.coarse and self.scatter <= COARSE else self.scatter


def pull_of(ratios: np.ndarray, coarse: bool = False, adaptive: bool = False) -> NormPull | None:
    """The pull on a norm from `r` at the steps of a run; None where too few are known.

    Example:
        >>> pull_of(np.full(20, 0.02)).strength, pull_of(np.full(3, 0.02)) is None
        (0.01, True)
        >>> pull_of(np.linspace(-1, 1, 20)).is_penalty
        False
    """
    known = ratios[np.isfinite(ratios)]
    if known.size < FEWEST:
        return None
    middle, quarter = float(np.median(known)), known.size // 4
    if middle == 0:
        return NormPull(0.0, math.inf, math.inf, coarse, adaptive)
    low, high = np.quantile(known, [0.1, 0.9])
    moved = abs(np.median(known[-quarter:]) - np.median(known[:quarter]))
    scatter = float((high - low) / 2 / abs(middle))
    return NormPull(middle / 2, scatter, float(moved / abs(middle)), coarse, adaptive)


def norm_pulls(data: RunData) -> dict[str, NormPull]:
    """By the name of each scale-invariant weight the pull on its norm, where the log tells what kind it is.

    The ledger books `-2 lr <W, g>` of a family as the gradient's part of the change of its charge. Looked at are the
    norm of the whole family, whose pull is steady where all its layers have the same penalty, and that of each layer,
    where one alone has it.
    """
    if "gradient" not in data.family or "norm" not in data.estimates:
        return {}
    found: dict[str, NormPull] = {}
    alone = dict(zip(data.symmetries, data.one_sided.tolist(), strict=True))
    families = {s["name"]: s.get("family") for s in data.header["symmetries"]}
    for f, family in enumerate(data.families):
        names = [name for name, own in families.items() if own == family]
        if names and all(alone[n] for n in names):
            found |= _of_family(data, f, names)
    return found


def _of_family(data: RunData, f: int, names: Sequence[str]) -> dict[str, NormPull]:
    """Of a family, number `f`, of scale-invariant weights; under SGD its norm is `|W|^2` of all at every step."""
    adaptive = data.header.get("rule") != "SGDRule"
    with np.errstate(divide="ignore", invalid="ignore"):
        along = -data.family["gradient"][:, f] / (2 * data.lr)
        squares = _between_estimates(data, names) if adaptive else data.family["norm"][:, f]
        whole = pull_of(along / squares, adaptive, adaptive)
        each = {n: pull_of(along / _between_estimates(data, [n]), True, adaptive) for n in names}
    if whole is None or whole.is_penalty:
        return {} if whole is None else dict.fromkeys(names, whole)
    held = {n: pull for n, pull in each.items() if pull is not None and pull.is_penalty}
    if held:
        steadiest = min(held, key=lambda n: held[n].scatter)
        return {steadiest: held[steadiest]}
    return dict.fromkeys(names, whole) if whole.is_clear else {}


def _between_estimates(data: RunData, names: Sequence[str]) -> np.ndarray:
    """The squared weights of some symmetries at every recorded step, their logarithm a straight line in between."""
    columns = [data.symmetries.index(n) for n in names]
    norms = data.estimates["norm"][:, columns].sum(1)
    known = np.isfinite(norms) & (norms > 0)
    if not known.any():
        return np.full(len(data.steps), np.nan)
    return np.exp(np.interp(data.steps, data.estimate_steps[known], np.log(norms[known])))
