"""Curvature along the orbit: what the Noether flow will do to sharpness and to the stable learning rate (theory.md 6,
10).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from noetherflow.core.inputs import LossFn
from noetherflow.core.settings import SGDConfig
from noetherflow.core.tensors import tensors_of
from noetherflow.equilibrium.flow import Flow
from noetherflow.equilibrium.orbit import orbit_of
from noetherflow.equilibrium.potential import Potential
from noetherflow.equilibrium.result import Equilibrium
from noetherflow.errors import DataError, MomentError
from noetherflow.moments.batch import refuse_renormalising
from noetherflow.moments.result import GradientMoments, merge_moments
from noetherflow.symmetry.symmetry_set import SymmetrySet

EXACT_LIMIT = 20_000


class HessianProduct:
    """`v -> H v` for the mean per-sample loss over fixed batches; `v` and `H v` are dicts by canonical parameter
    name.

    Raises DataError without a batch, and for an embedding with `max_norm`, whose forward changes its weights.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn, batches: Iterable[Any]) -> None:
        self.model, self.loss_fn, self.batches = model, loss_fn, list(batches)
        self.parameters = {
            n: t for n, t in tensors_of(model).items() if isinstance(t, nn.Parameter) and t.requires_grad
        }
        if not self.batches:
            raise DataError("no batches to measure curvature on")
        refuse_renormalising(model.named_modules())

    @property
    def size(self) -> int:
        """Number of trainable entries."""
        return sum(p.numel() for p in self.parameters.values())

    def __call__(self, vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`H v`; buffers stay as they are, also in training mode.

        Raises DataError when the loss is not one number per sample or is not finite.
        """
        with _kept_buffers(self.model):
            return self._product(vector)

    def _product(self, vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
        names, params = list(self.parameters), list(self.parameters.values())
        total = [torch.zeros_like(p, dtype=torch.float64) for p in params]
        samples = 0
        for batch in self.batches:
            with _differentiable_attention():
                losses = self.loss_fn(self.model, batch)
                if losses.ndim != 1:
                    raise DataError(f"loss_fn must return per-sample losses [batch], got shape {tuple(losses.shape)}")
                if not bool(torch.isfinite(losses).all()):
                    raise DataError("the loss is not finite on this batch; look for NaN in the data or the weights")
                gradients = torch.autograd.grad(losses.sum(), params, create_graph=True, materialize_grads=True)
                product = sum(
                    ((g * vector[n].to(g)).sum() for n, g in zip(names, gradients, strict=True)), losses.new_zeros(())
                )
                parts = torch.autograd.grad(product, params, materialize_grads=True)
            total = [t + p.double() for t, p in zip(total, parts, strict=True)]
            samples += len(losses)
        return {n: t / samples for n, t in zip(names, total, strict=True)}

    def flat(self, vector: np.ndarray) -> np.ndarray:
        """The same on flat float64 vectors, parameters in order."""
        sizes = [p.numel() for p in self.parameters.values()]
        parts = torch.split(torch.as_tensor(vector.reshape(-1)), sizes)
        shaped = {n: v.reshape(p.shape) for (n, p), v in zip(self.parameters.items(), parts, strict=True)}
        out = self({n: v.to(self.parameters[n].device) for n, v in shaped.items()})
        return torch.cat([v.reshape(-1).cpu() for v in out.values()]).numpy()


@contextmanager
def _kept_buffers(model: nn.Module) -> Iterator[None]:
    """Running statistics change in training mode, and a measurement must not show."""
    before = [(b, b.clone()) for b in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)


def _differentiable_attention() -> AbstractContextManager[None]:
    """Fused attention kernels have no second derivative; the plain one has."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH)


def curvature_moments(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    syms: SymmetrySet,
    *,
    probes: int | None = None,
    seed: int = 0,
) -> GradientMoments:
    """Leg Grams and diagonal of the Hessian, in the form of moments: `second` holds `sum_m H[(i,m),(j,m)]`, `mean` is
    0.

    With `probes=None` exact, one Hessian product per entry; otherwise Hutchinson's `E[(H v) v^T]` over that many
    random sign vectors, kept as groups so that standard errors follow by jackknife. Under the group, `H` transforms
    as `E[g g^T]` does, so the result can be given to `noise_equilibrium(..., objective="hessian")` for the flattest
    point of the orbit.

    Raises DataError for an unusable loss, or exact mode beyond 20,000 entries. Source: theory.md section 6.
    """
    product = HessianProduct(model, loss_fn, batches)
    if probes is None and product.size > EXACT_LIMIT:
        raise DataError(f"{product.size:,} entries are too many for the exact Hessian trace; pass probes=64 or so")
    zero = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in product.parameters.items()}
    if probes is None:
        return _total(_contract(product(v), v, syms, zero) for v in _units(zero))
    rng = torch.Generator("cpu").manual_seed(seed)
    parts = []
    for _ in range(probes):
        v = {
            n: (torch.randint(0, 2, p.shape, generator=rng, device="cpu").double() * 2 - 1).to(p.device)
            for n, p in product.parameters.items()
        }
        parts.append(_contract(product(v), v, syms, zero))
    merged = merge_moments(parts)
    return replace(merged, groups=tuple(parts))


def _units(zero: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Every unit vector of the parameters in turn."""
    for name, z in zero.items():
        for i in range(z.numel()):
            unit = z.clone()
            unit.view(-1)[i] = 1.0
            yield {**zero, name: unit}


def _contract(
    hv: Mapping[str, Tensor], v: Mapping[str, Tensor], syms: SymmetrySet, zero: Mapping[str, Tensor]
) -> GradientMoments:
    """`(H v) v^T` contracted on every leg (symmetrised) and entry by entry, as moments of one sample of mean `zero`."""
    trainable = [s for s in syms if all(n in v for n in s.parameters)]
    second = {}
    for s in trainable:
        plus = s.grams({n: hv[n] + v[n] for n in s.parameters})
        minus = s.grams({n: hv[n] - v[n] for n in s.parameters})
        second[s.name] = tuple(((a - b) / 4).cpu() for a, b in zip(plus, minus, strict=True))
    names = {s.name: tuple(leg.label for leg in s.weight_legs) for s in trainable}
    return GradientMoments(1, 0.0, second, zero, {n: hv[n] * v[n] for n in v}, legs=names, kind="hessian")


def _total(parts: Iterator[GradientMoments]) -> GradientMoments:
    """The sum of the parts, held once."""
    total = next(parts)
    samples = 1
    for part in parts:
        samples += 1
        for name, legs in part.second.items():
            for kept, leg in zip(total.second[name], legs, strict=True):
                kept.add_(leg)
        for name, square in part.squares.items():
            total.squares[name].add_(square)
    return replace(total, samples=samples)


def trace_at(
    model: nn.Module, syms: SymmetrySet, curvature: GradientMoments, elements: Mapping[str, Tensor]
) -> tuple[float, float]:
    """`Tr H` today and at the group elements, from today's leg Grams and diagonal alone (theory.md section 6).

    Works for any second moment that transforms as the gradient does: `curvature_moments` or `gradient_moments`, whose
    trace is that of the empirical Fisher matrix. Symmetries without an element stay.

    Raises MomentError for moments without entries, and where a general_linear symmetry shares entries with another
    moved one: move a copy and measure there.
    """
    movers = [s for s in syms if s.name in elements]
    orbit = orbit_of(model, movers, curvature, Potential(0.0, 1.0, 0.0))
    now = orbit.at([s.identity() for s in movers]).trace
    then = orbit.at([elements[s.name] for s in movers]).trace
    assert now is not None
    assert then is not None
    total = _trace(curvature)
    return total, total - now + then


def _trace(curvature: GradientMoments) -> float:
    lacking = [n for n in curvature.mean if n not in curvature.squares]
    if lacking:
        raise MomentError(
            f"the trace needs the entries of {lacking[:4]}{' ...' if len(lacking) > 4 else ''}; measure with "
            "curvature_moments(...), or gradient_moments(..., entries=True)"
        )
    return float(sum(t.sum() for t in curvature.squares.values()))


def top_eigenvalue(
    model: nn.Module, loss_fn: LossFn, batches: Iterable[Any], *, tolerance: float = 1e-4, seed: int = 0
) -> float:
    """The algebraically largest Hessian eigenvalue, by Lanczos on Hessian products.

    Raises DataError for an unusable loss.
    """
    from scipy.sparse.linalg import LinearOperator, eigsh

    product = HessianProduct(model, loss_fn, batches)
    n = product.size
    if n == 1:
        return float(product.flat(np.ones(1))[0])
    start = np.random.default_rng(seed).standard_normal(n)
    operator = LinearOperator((n, n), matvec=product.flat, dtype=np.float64)
    return float(eigsh(operator, k=1, which="LA", tol=tolerance, v0=start, return_eigenvectors=False)[0])


@dataclass(frozen=True)
class Sharpness:
    """Sharpness today and at the noise equilibrium of the same function, and what it means for the learning rate.

    `trace_*`: `Tr H`; `top_*`: largest Hessian eigenvalue, at the equilibrium measured on a moved copy. `ratio` is
    `trace_equilibrium / trace_now`: above 1 sharpening, below 1 flattening is still to come. `stable_lr_*` is `limit /
    top`, where full-batch steps on a quadratic stop being stable: `limit` is 2 without momentum
    (`SGDConfig.stability_limit`). `warmup_steps`: length of a linear warmup to `lr` that keeps `lr(k)` below `limit /
    top(k)`; 0 if none is needed, None if `lr` is unstable even at the equilibrium or without time scale.
    """

    trace_now: float
    trace_equilibrium: float
    top_now: float
    top_equilibrium: float
    lr: float
    limit: float
    warmup_steps: int | None

    @property
    def ratio(self) -> float:
        return self.trace_equilibrium / self.trace_now

    @property
    def stable_lr_now(self) -> float:
        return self.limit / self.top_now

    @property
    def stable_lr_equilibrium(self) -> float:
        return self.limit / self.top_equilibrium

    def __str__(self) -> str:
        change = "sharpening" if self.ratio > 1 else "flattening"
        warmup = {0: "no warmup needed", None: "no warmup length makes it stable along this orbit"}.get(
            self.warmup_steps, f"linear warmup over about {self.warmup_steps} steps"
        )
        return "\n".join(
            [
                f"Tr H {self.trace_now:.4g} -> {self.trace_equilibrium:.4g} at the noise equilibrium: {change} by "
                f"{max(self.ratio, 1 / self.ratio):.3g}",
                f"largest eigenvalue {self.top_now:.4g} -> {self.top_equilibrium:.4g}; stable lr below "
                f"{self.stable_lr_now:.3g} -> {self.stable_lr_equilibrium:.3g}",
                f"lr {self.lr:g}: {warmup}",
                "assumes: loss and function stay as they are meanwhile; the top eigenvalue follows the distance of the "
                "charges to equilibrium; noise drift scales with lr^2 during warmup",
            ]
        )

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "ratio": self.ratio,
            "stable_lr_now": self.stable_lr_now,
            "stable_lr_equilibrium": self.stable_lr_equilibrium,
        }


def sharpness_forecast(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    eq: Equilibrium,
    flow: Flow,
    *,
    curvature: GradientMoments | None = None,
    probes: int = 32,
) -> Sharpness:
    """Sharpness now and at `eq`, stable learning rates, and a warmup length for `flow.sgd.lr` (theory.md 6, 7, 10).

    `Tr H` at the equilibrium comes from today's curvature (`curvature_moments` with `probes` unless given) where leg
    Grams determine it, else from a moved copy; the largest eigenvalues by Lanczos on the model and on a moved copy.

    Raises DataError for an unusable loss, MomentError for `curvature` without entries.
    """
    sgd = _plain_sgd(flow)
    data = list(batches)
    syms: SymmetrySet = eq.symmetries
    moved = copy.deepcopy(model)
    for s in syms:
        s.act_(tensors_of(moved), eq[s.name].element)
    if curvature is None:
        curvature = curvature_moments(model, loss_fn, data, syms, probes=probes)
    try:
        now, then = trace_at(model, syms, curvature, eq.elements)
    except MomentError:
        there = curvature_moments(moved, loss_fn, data, syms, probes=probes)
        now, then = _trace(curvature), _trace(there)
    top_now, top_then = top_eigenvalue(model, loss_fn, data), top_eigenvalue(moved, loss_fn, data)
    lr, limit = sgd.lr, sgd.stability_limit
    return Sharpness(now, then, top_now, top_then, lr, limit, _warmup(flow, eq, top_now, top_then))


def _plain_sgd(flow: Flow) -> SGDConfig:
    """SGD's settings.

    Raises:
        DataError: the flow is that of Adam or Lion, whose stability depends on the preconditioned Hessian.
    """
    if isinstance(flow.sgd, SGDConfig):
        return flow.sgd
    raise DataError(
        "sharpness_forecast compares lr with the Hessian itself; Adam's and Lion's stability depends on the "
        "preconditioned one, which is not forecast: pass a flow of nf.SGDConfig(...)"
    )


def _warmup(flow: Flow, eq: Equilibrium, top_now: float, top_then: float) -> int | None:
    """Steps `K` of a linear ramp with `lr(k) top(k) < limit` throughout.

    At `k = s K` the ramp has moved the charges as `tau = int (lr(k) / lr)^2 dk = K s^3 / 3` steps at `lr` would, so
    `K > 3 tau (lr top(tau) / limit)^3` wherever `lr top(tau) >= limit`; from one time of the grid to the next with the
    later `tau` and the earlier `top`.
    """
    sgd = _plain_sgd(flow)
    excess = sgd.lr / sgd.stability_limit
    if excess * top_now < 1:
        return 0
    slowest = max((float(r.relaxation_steps.max()) for r in flow.details), default=0.0)
    if excess * top_then >= 1 or slowest <= 0:
        return None
    steps = sorted({max(1, round(slowest * x)) for x in np.geomspace(1e-4, 20, 120)})
    charges = flow.forecast([0, *steps], errors=False).charges
    away = torch.stack([_distance(charges[n], eq[n].charge) for n in eq.elements]).square().sum(0).sqrt()
    over = excess * (top_then + (top_now - top_then) * (away / away[0]).clamp_max(1.0))
    if not over[-1] < 1:
        return None
    return math.ceil(max(3 * tau * o**3 for o, tau in zip(over[:-1].tolist(), steps, strict=True) if o >= 1))


def _distance(charges: Tensor, end: Tensor) -> Tensor:
    """Norm of `charges[k] - end`, up to rotations for general_linear: the equilibrium leaves them open."""
    if end.ndim == 3:
        charges, end = torch.linalg.eigvalsh(charges), torch.linalg.eigvalsh(end)
    return (charges - end).flatten(1).norm(dim=1)
