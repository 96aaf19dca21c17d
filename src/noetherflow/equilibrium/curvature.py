"""Curvature of the loss: Hessian products, its leg Grams as moments, trace and largest eigenvalue (theory.md 6)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from noetherflow.core.arguments import expect_measurement
from noetherflow.core.inputs import LossFn
from noetherflow.core.tensors import tensors_of
from noetherflow.equilibrium.orbit import orbit_of
from noetherflow.equilibrium.potential import Potential
from noetherflow.errors import DataError, MomentError
from noetherflow.moments.batch import refuse_renormalising
from noetherflow.moments.result import GradientMoments, merge_moments
from noetherflow.symmetry.arguments import expect_model_and_symmetries
from noetherflow.symmetry.symmetry_set import SymmetrySet

EXACT_LIMIT = 20_000


class HessianProduct:
    """`v -> H v` for the mean per-sample loss over fixed batches; `v` and `H v` are dicts by canonical parameter
    name.

    Raises DataError without a batch, and for an embedding with `max_norm`, whose forward changes its weights.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn, batches: Iterable[Any]) -> None:
        expect_measurement("(model, loss_fn, batches)", model, loss_fn, batches)
        self.model, self.loss_fn, self.batches = model, loss_fn, list(batches)
        self.parameters = {
            n: t for n, t in tensors_of(model).items() if isinstance(t, nn.Parameter) and t.requires_grad
        }
        if not self.batches:
            raise DataError("no batches to measure curvature on")
        refuse_renormalising(model.named_modules())
        self._samples = 0

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

    def spread(self, vector: Mapping[str, Tensor], signs: torch.Generator) -> float:
        """An unbiased estimate of the mean over samples of `||H_z v||^2`, from one product with random signs.

        For independent signs `e_z` the mean of `||sum_z e_z H_z v||^2` is `sum_z ||H_z v||^2`.
        """
        with _kept_buffers(self.model):
            product = self._product(vector, signs)
        return sum(float(p.square().sum()) for p in product.values()) * self._samples

    def _product(self, vector: Mapping[str, Tensor], signs: torch.Generator | None = None) -> dict[str, Tensor]:
        """The mean over samples of `H_z v`, each with a random sign where `signs` are given."""
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
                counted = losses if signs is None else losses * _signs(len(losses), signs).to(losses)
                gradients = torch.autograd.grad(counted.sum(), params, create_graph=True, materialize_grads=True)
                product = sum(
                    ((g * vector[n].to(g)).sum() for n, g in zip(names, gradients, strict=True)), losses.new_zeros(())
                )
                parts = torch.autograd.grad(product, params, materialize_grads=True)
            total = [t + p.double() for t, p in zip(total, parts, strict=True)]
            samples += len(losses)
        self._samples = samples
        return {n: t / samples for n, t in zip(names, total, strict=True)}

    def shaped(self, vector: np.ndarray) -> dict[str, Tensor]:
        """A flat float64 vector as tensors by parameter name, on the parameters' devices."""
        sizes = [p.numel() for p in self.parameters.values()]
        parts = torch.split(torch.as_tensor(vector.reshape(-1)), sizes)
        return {n: v.reshape(p.shape).to(p.device) for (n, p), v in zip(self.parameters.items(), parts, strict=True)}

    def flat(self, vector: np.ndarray) -> np.ndarray:
        """`H v` on flat float64 vectors, parameters in order."""
        out = self(self.shaped(vector))
        return torch.cat([v.reshape(-1).cpu() for v in out.values()]).numpy()


def _signs(n: int, rng: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (n,), generator=rng, device="cpu") * 2.0 - 1


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
    expect_model_and_symmetries("curvature_moments(model, loss_fn, batches, syms)", model, syms)
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
    total = curvature_trace(curvature)
    return total, total - now + then


def curvature_trace(curvature: GradientMoments) -> float:
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

    Args:
        model: Left as it is.
        loss_fn: `loss_fn(model, batch)` gives one loss per sample, `[batch]`.
        batches: The data; its mean loss is differentiated.
        tolerance: Relative accuracy.
        seed: Of the start vector.

    Raises:
        DataError: An unusable loss.

    Example:
        ```
        2 / nf.top_eigenvalue(model, loss_fn, batches)  # learning rates above are unstable with full batches
        ```
    """
    return top_pair(HessianProduct(model, loss_fn, batches), tolerance, seed)[0]


def top_pair(product: HessianProduct, tolerance: float = 1e-4, seed: int = 0) -> tuple[float, np.ndarray]:
    """The algebraically largest eigenvalue and its unit eigenvector, flat."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    n = product.size
    if n == 1:
        return float(product.flat(np.ones(1))[0]), np.ones(1)
    start = np.random.default_rng(seed).standard_normal(n)
    operator = LinearOperator((n, n), matvec=product.flat, dtype=np.float64)
    values, vectors = eigsh(operator, k=1, which="LA", tol=tolerance, v0=start)
    return float(values[0]), vectors[:, 0]


def noise_curvature(product: HessianProduct, direction: np.ndarray, draws: int = 8, seed: int = 0) -> float:
    """How much curvature one sample's Hessian shows beyond the mean: `E ||H_z v||^2 / (v^T H v)`, the larger of two
    `v`.

    The first is `direction` (the top eigenvector), the second the average over all, `E Tr H_z^2 / Tr H`. For one
    output and a squared loss `H_z = x x^T`, both are about `E |x|^2 = Tr H`. Estimated from `draws` products each.

    Source: theory.md section 10.
    """
    rng = torch.Generator("cpu").manual_seed(seed)
    top = product.shaped(direction)
    curvature = sum(float((h * top[n].cpu()).sum()) for n, h in product(top).items())
    along = sum(product.spread(top, rng) for _ in range(draws)) / draws / curvature if curvature > 0 else 0.0
    squares = trace = 0.0
    for _ in range(draws):
        v = {n: _signs(p.numel(), rng).reshape(p.shape).to(p.device) for n, p in product.parameters.items()}
        squares += product.spread(v, rng)
        trace += sum(float((h * v[n]).sum()) for n, h in product(v).items())
    return max(along, squares / trace if trace > 0 else 0.0)
