"""Whether Adam's average of squares is slow enough for its noise equilibrium to hold, and its largest stable rate."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import nn

from noetherflow.core.adaptive import AdamConfig
from noetherflow.core.inputs import LossFn
from noetherflow.core.printing import show
from noetherflow.equilibrium.preconditioned import PreconditionedHessian, roots_of, stable_rate
from noetherflow.errors import DataError
from noetherflow.moments.result import GradientMoments

SLOW, FAST = 0.05, 0.2
"""Mean weights of the fluctuations in `v` below which it counts as slow, and above which it follows them."""


@dataclass(frozen=True)
class SquareMemory:
    """How fast `v` is against the fluctuations of the weights it divides.

    A fluctuation of preconditioned curvature `k` enters `v` with the weight `kap = (1 - b2) / ((1 - b2) + b2 lr k)`:
    near 0 where `v` averages over many of its relaxation times, 1 where `v` follows it. The equilibrium takes it as 0.

    Attributes:
        top: largest eigenvalue of `D^1/2 H D^1/2`, the Hessian as Adam's step sees it.
        mean: mean of its eigenvalues.
        lr: the learning rate.
        square_memory: `b2`.
        memory: `b1`.
        small: the share of the stiffest direction that lies on entries which one step replaces, in layers whose other
            entries are larger: near 1 its curvature says nothing of the steps to come.
    """

    top: float
    mean: float
    lr: float
    square_memory: float
    memory: float
    small: float = 0.0

    def weight(self, curvature: float) -> float:
        """`kap` of fluctuations of that curvature.

        Example:
            >>> round(SquareMemory(top=8.0, mean=1.0, lr=0.01, square_memory=0.999, memory=0.9).weight(8.0), 4)
            0.0124
        """
        slow = 1 - self.square_memory
        return slow / (slow + self.square_memory * self.lr * max(curvature, 0.0)) if slow else 0.0

    @property
    def least(self) -> float:
        """`kap` of the stiffest mode; every other mode has a larger one, up to 1 for flat ones."""
        return self.weight(self.top)

    @property
    def average(self) -> float:
        """A lower bound of the mean of `kap` over all modes: its value at the mean curvature, since it is convex."""
        return self.weight(self.mean)

    @property
    def stable_lr(self) -> float:
        """The largest stable full-batch learning rate at this preconditioner: `2 (1 + b1) / ((1 - b1) top)`."""
        return stable_rate(self.top, self.memory)

    @property
    def verdict(self) -> Literal["valid", "doubtful", "off"]:
        """`valid`: `v` is slow even for the average mode; `off`: it follows the fluctuations; between, `doubtful`."""
        if self.average < SLOW:
            return "valid"
        return "off" if self.average > FAST else "doubtful"

    def __str__(self) -> str:
        means = {
            "valid": "v is slow against the fluctuations, the equilibrium can be trusted",
            "doubtful": "v partly follows the fluctuations, expect a shift of the order of kap",
            "off": "v follows the fluctuations, the equilibrium may be off by factors: raise b2 or lr",
        }[self.verdict]
        return (
            f"kap {show(self.least)} (stiffest mode) to 1 (flat modes), at least {show(self.average)} on average: "
            f"{self.verdict}, {means}; largest stable lr {show(self.stable_lr)}"
        )

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        """The numbers, with the weights, the verdict and the stable rate."""
        derived = {n: getattr(self, n) for n in ("least", "average", "stable_lr", "verdict")}
        return {**asdict(self), **derived}


def square_memory(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    moments: GradientMoments,
    config: AdamConfig,
    *,
    probes: int = 16,
    accuracy: float = 1e-4,
) -> SquareMemory:
    """Measure how fast Adam's `v` is against the fluctuations: one Lanczos run and a stochastic trace.

    Args:
        model: at the weights where the moments were measured; left as it is.
        loss_fn: `loss_fn(model, batch)` gives one loss per sample, `[batch]`.
        batches: the data, whose mean loss is curved.
        moments: with `entries=True`, of all trainable parameters that have a symmetry; others stand still here.
        config: Adam's settings.
        probes: Hessian products for the trace.
        accuracy: of the largest eigenvalue, relative.

    Returns:
        The two curvatures and what follows from them; print it for a sentence.

    Raises:
        DataError: an unusable loss, or the settings of another optimiser.
        MomentError: no entry-wise moments.

    Source: theory.md section 13, "b2".
    """
    if not isinstance(config, AdamConfig):
        raise DataError(f"v is Adam's: config must be nf.AdamConfig(...), got {type(config).__name__}")
    hessian = PreconditionedHessian.of(model, loss_fn, batches, roots_of(moments, config), config)
    top, direction = hessian.top_pair(accuracy)
    return SquareMemory(
        top=top,
        mean=hessian.trace(probes) / hessian.size,
        lr=config.lr,
        square_memory=config.betas[1],
        memory=config.betas[0],
        small=hessian.on_small_entries(direction, config.lr),
    )
