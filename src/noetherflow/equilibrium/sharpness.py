"""What the Noether flow will do to sharpness, to the stable learning rate, and how long a warmup must be (theory.md
6, 10).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from noetherflow.core.adaptive import AdamConfig
from noetherflow.core.arguments import EQUILIBRIUM, FLOW, expect, expect_measurement
from noetherflow.core.inputs import LossFn
from noetherflow.core.settings import SGDConfig
from noetherflow.core.tensors import tensors_of
from noetherflow.equilibrium.adaptive_sharpness import AdaptiveSharpness, adaptive_sharpness
from noetherflow.equilibrium.curvature import (
    HessianProduct,
    curvature_moments,
    curvature_trace,
    noise_curvature,
    top_pair,
    trace_at,
)
from noetherflow.equilibrium.flow import Flow
from noetherflow.equilibrium.result import Equilibrium
from noetherflow.errors import DataError, MomentError
from noetherflow.moments.result import GradientMoments

SAFE = 1 / 2
"""The load that a warmup for minibatches allows. Towards 1 fluctuations grow as `1 / (1 - load)`, and leave the region
where the loss is quadratic: of 200 runs of a linear autoencoder 1 % diverged at load 0.6, 28 % at 0.66 and all at 0.9.
"""


@dataclass(frozen=True)
class Curvature:
    """The curvature that a learning rate meets at one point: `top`, the largest Hessian eigenvalue, and `noise`,
    what single samples add to it (`noise_curvature`).
    """

    top: float
    noise: float

    def load(self, sgd: SGDConfig) -> float:
        """`lr` over the learning rate at which SGD with these minibatches stops being stable in mean square; below 1
        it is.

        On a quadratic loss the second moment of the error stays bounded where `lr top (1 - f) / limit + lr f noise /
        (2 (1 - m)) < 1`: `f` is the covariance factor of a minibatch (`1 / S` of fresh data, 0 for the full batch),
        `limit` the full-batch limit `2 (1 + m)` of `lr top`. Without momentum that is `lr E[H_B^2] < 2 H` along the
        direction where the two are largest; with momentum the noise adds up over `1 / (1 - m)` steps.

        Source: theory.md section 10.
        """
        f = sgd.covariance_factor
        return sgd.lr * (self.top * (1 - f) / sgd.stability_limit + f * self.noise / (2 * (1 - sgd.momentum)))

    def full_batch_load(self, sgd: SGDConfig) -> float:
        """The same without minibatch noise: `lr top / limit`."""
        return sgd.lr * self.top / sgd.stability_limit


@dataclass(frozen=True)
class Sharpness:
    """Sharpness today and at the noise equilibrium of the same function, and what it means for the learning rate.

    Attributes:
        trace_now, trace_equilibrium: `Tr H`.
        top_now, top_equilibrium: Largest Hessian eigenvalue, at the equilibrium measured on a moved copy.
        noise_now, noise_equilibrium: Curvature by which minibatch noise counts (`noise_curvature`).
        lr: The learning rate asked for.
        batch_size: Of the minibatches.
        limit: `lr * top` at which full-batch steps on a quadratic stop being stable; 2 without momentum.
        load_now, load_equilibrium: `lr` over the learning rate that is stable with these minibatches
        (`Curvature.load`).
        warmup_steps: Length of a linear warmup to `lr` that keeps the load with these minibatches below 1/2
            throughout; 0 if none is needed, None if it is higher even at the equilibrium, or without time scale.
        full_batch_warmup_steps: The same without minibatch noise: shorter, and with minibatches not safe.
    """

    trace_now: float
    trace_equilibrium: float
    top_now: float
    top_equilibrium: float
    noise_now: float
    noise_equilibrium: float
    lr: float
    batch_size: int
    limit: float
    load_now: float
    load_equilibrium: float
    warmup_steps: int | None
    full_batch_warmup_steps: int | None

    @property
    def ratio(self) -> float:
        """`trace_equilibrium / trace_now`: above 1 sharpening, below 1 flattening is still to come."""
        return self.trace_equilibrium / self.trace_now

    @property
    def stable_lr_now(self) -> float:
        """Learning rates below are stable with full batches today."""
        return self.limit / self.top_now

    @property
    def stable_lr_equilibrium(self) -> float:
        """The same at the equilibrium."""
        return self.limit / self.top_equilibrium

    def __str__(self) -> str:
        change = f"{'sharpening' if self.ratio > 1 else 'flattening'} by {max(self.ratio, 1 / self.ratio):.3g}"
        if not min(self.trace_now, self.trace_equilibrium) > 0:
            change = "not positive, as away from a minimum, so neither sharpening nor flattening can be told"
        small = self.lr / self.load_now, self.lr / self.load_equilibrium
        return "\n".join(
            [
                f"Tr H {self.trace_now:.4g} -> {self.trace_equilibrium:.4g} at the noise equilibrium: {change}",
                f"largest eigenvalue {self.top_now:.4g} -> {self.top_equilibrium:.4g}; stable lr below "
                f"{self.stable_lr_now:.3g} -> {self.stable_lr_equilibrium:.3g} with full batches, "
                f"{small[0]:.3g} -> {small[1]:.3g} with batches of {self.batch_size}",
                f"lr {self.lr:g}, batches of {self.batch_size}: {_words(self.warmup_steps)}",
                f"lr {self.lr:g}, full batches: {_words(self.full_batch_warmup_steps)}",
                "assumes: loss and function stay as they are meanwhile; curvature follows the distance of the "
                "charges to "
                "equilibrium; noise drift scales with lr^2 during warmup",
            ]
        )

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        """All numbers, ready for JSON."""
        return {
            **asdict(self),
            "ratio": self.ratio,
            "stable_lr_now": self.stable_lr_now,
            "stable_lr_equilibrium": self.stable_lr_equilibrium,
        }


def _words(warmup: int | None) -> str:
    if warmup is None:
        return "no warmup length makes it stable along this orbit"
    return f"linear warmup over about {warmup} steps" if warmup else "no warmup needed"


def sharpness_forecast(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    eq: Equilibrium,
    flow: Flow,
    *,
    curvature: GradientMoments | None = None,
    probes: int = 32,
) -> Sharpness | AdaptiveSharpness:
    """Sharpness now and at `eq`, stable learning rates, and a warmup length for `flow.sgd`.

    For a flow of Adam the largest stable learning rates alone, from the preconditioned Hessian (`AdaptiveSharpness`).

    `Tr H` at the equilibrium comes from today's curvature where leg Grams determine it, else from a moved copy; the
    largest eigenvalues and the spread of single samples' Hessians are measured on the model and on a moved copy.

    Args:
        model: Left as it is.
        loss_fn: `loss_fn(model, batch)` gives one loss per sample, `[batch]`.
        batches: The data.
        eq: Where the flow ends.
        flow: Of the SGD whose learning rate and batch size are asked about.
        curvature: From `curvature_moments`; measured with `probes` unless given.
        probes: Hessian products for that.

    Returns:
        A Sharpness. Its `warmup_steps` keep SGD with minibatches stable in mean square, on the quadratic approximation.

    Raises:
        DataError: An unusable loss; a flow of Lion.
        MomentError: `curvature` without entries.

    Source: theory.md sections 6, 7 and 10.
    """
    call = "sharpness_forecast(model, loss_fn, batches, eq, flow)"
    expect_measurement(call, model, loss_fn, batches)
    expect(call, "eq", eq, Equilibrium, EQUILIBRIUM)
    expect(call, "flow", flow, Flow, FLOW)
    if isinstance(flow.sgd, AdamConfig):
        return adaptive_sharpness(model, loss_fn, batches, eq, flow.moments, flow.sgd)
    sgd, data, syms = _plain_sgd(flow), list(batches), eq.symmetries
    moved = copy.deepcopy(model)
    for s in syms:
        s.act_(tensors_of(moved), eq[s.name].element)
    if curvature is None:
        curvature = curvature_moments(model, loss_fn, data, syms, probes=probes)
    try:
        trace_now, trace_then = trace_at(model, syms, curvature, eq.elements)
    except MomentError:
        there = curvature_moments(moved, loss_fn, data, syms, probes=probes)
        trace_now, trace_then = curvature_trace(curvature), curvature_trace(there)
    now, then = (_curvature(m, loss_fn, data) for m in (model, moved))
    loads = (now.load(sgd) / SAFE, then.load(sgd) / SAFE), (now.full_batch_load(sgd), then.full_batch_load(sgd))
    way = _Way.of(flow, eq) if any(today >= 1 > later for today, later in loads) else _Way([], [])
    return Sharpness(
        trace_now=trace_now,
        trace_equilibrium=trace_then,
        top_now=now.top,
        top_equilibrium=then.top,
        noise_now=now.noise,
        noise_equilibrium=then.noise,
        lr=sgd.lr,
        batch_size=sgd.batch_size,
        limit=sgd.stability_limit,
        load_now=now.load(sgd),
        load_equilibrium=then.load(sgd),
        warmup_steps=warmup(*loads[0], way),
        full_batch_warmup_steps=warmup(*loads[1], way),
    )


def _curvature(model: nn.Module, loss_fn: LossFn, data: Sequence[Any]) -> Curvature:
    product = HessianProduct(model, loss_fn, data)
    top, direction = top_pair(product)
    return Curvature(top, noise_curvature(product, direction))


def _plain_sgd(flow: Flow) -> SGDConfig:
    """SGD's settings.

    Raises:
        DataError: the flow is that of Lion, whose steps do not shrink with the gradient.
    """
    if isinstance(flow.sgd, SGDConfig):
        return flow.sgd
    raise DataError(
        "sharpness_forecast compares lr with curvature; Lion's steps have one size at any gradient, so that no rate is "
        "stable in that sense: pass a flow of nf.SGDConfig(...) or nf.AdamConfig(...)"
    )


@dataclass(frozen=True, eq=False)
class _Way:
    """How far the charges are from the equilibrium after numbers of steps at full learning rate: `left[k]` of the
    distance after `steps[k]`, from 1 at step 0. Both are empty where the flow has no time scale.
    """

    steps: list[int]
    left: list[float]

    @classmethod
    def of(cls, flow: Flow, eq: Equilibrium) -> _Way:
        slowest = max((float(r.relaxation_steps.max()) for r in flow.details), default=0.0)
        if slowest <= 0:
            return cls([], [])
        steps = [0, *sorted({max(1, round(slowest * x)) for x in np.geomspace(1e-4, 20, 120)})]
        forecast = flow.forecast(steps, errors=False)
        steps, charges = list(forecast.steps), forecast.charges
        away = torch.stack([_distance(charges[n], eq[n].charge) for n in eq.elements]).square().sum(0).sqrt()
        return cls(steps, (away / away[0]).clamp_max(1.0).tolist())


def warmup(load_now: float, load_then: float, way: _Way) -> int | None:
    """Steps `K` of a linear ramp of the learning rate that keeps the load below 1 throughout.

    The load is the learning rate over the stable one: `load_now` at the start and `load_then` at the equilibrium for
    the full learning rate, in between as far as the charges have come. At `k = s K` the ramp has moved them as
    `tau = K s^3 / 3` steps at the full rate would (drift counts as `lr^2`), so `K > 3 tau load(tau)^3` wherever the
    load is 1 or more; from one time of the grid to the next with the later `tau` and the earlier load.

    Returns:
        0 where no warmup is needed, None where none is long enough.
    """
    if load_now < 1:
        return 0
    if load_then >= 1 or not way.steps:
        return None
    loads = [load_then + (load_now - load_then) * left for left in way.left]
    if not loads[-1] < 1:
        return None
    over = zip(loads[:-1], way.steps[1:], strict=True)
    return math.ceil(max(3 * tau * load**3 for load, tau in over if load >= 1))


def _distance(charges: Tensor, end: Tensor) -> Tensor:
    """Norm of `charges[k] - end`, up to rotations for general_linear: the equilibrium leaves them open."""
    if end.ndim == 3:
        charges, end = torch.linalg.eigvalsh(charges), torch.linalg.eigvalsh(end)
    away: Tensor = (charges - end).flatten(1).norm(dim=1)
    return away
