"""Where on the orbit of matrices Adam settles: a local minimum of its sum of root mean squares, with rotations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from noetherflow.core.adaptive import AdamConfig
from noetherflow.core.arguments import A_MODEL, expect
from noetherflow.core.host import on_host
from noetherflow.core.inputs import LossFn
from noetherflow.core.printing import show
from noetherflow.core.tensors import tensors_of
from noetherflow.equilibrium.curvature import HessianProduct
from noetherflow.equilibrium.orbit import Samples
from noetherflow.errors import DataError
from noetherflow.moments.products import Factors
from noetherflow.moments.single import single_gradients
from noetherflow.symmetry.symmetry import Symmetry

TOLERANCE = 1e-6
"""Part of Psi by which it may still change per unit of a generator at a minimum."""
LARGEST = 2**28
"""Numbers that the second moments of columns may take."""
PAIRED = 128
"""Samples that are compared with each other and with the Hessian."""


@dataclass(frozen=True, eq=False)
class AdaptiveBasis:
    """A local minimum of Adam's potential over the orbit of one general_linear symmetry.

    Attributes:
        element: moves the weights there, `[blocks, n, n]`; the least of the minima found.
        potential_now: `Psi = sum_i (lr s_i + 2 w s_i theta_i^2)` at the present weights.
        potential: the same at the minimum.
        minima: Psi at the minimum that each start led to; different ones are different local minima.
        slope: by which part of Psi it still changes per unit of a generator there.
        proportionality: cosine between the covariance of the gradient noise and the Hessian of the weights moved: 1
            where the theory's assumption holds.
    """

    element: Tensor
    potential_now: float
    potential: float
    minima: tuple[float, ...]
    slope: float
    proportionality: float

    def __str__(self) -> str:
        cosine = show(self.proportionality)
        fall = 1 - self.potential / self.potential_now
        return (
            f"Psi {show(self.potential_now)} -> {show(self.potential)} ({100 * fall:.2g} % lower), a local minimum "
            f"over the orbit with its rotations; {len(self.minima)} starts ended at {show(min(self.minima))} to "
            f"{show(max(self.minima))}\nassumes R proportional to H (their cosine: {cosine}), v slow, eps small, and "
            "the function as it is"
        )

    __repr__ = __str__


@dataclass(frozen=True, eq=False)
class _LegColumns:
    """One leg: weights `[blocks, n, m]`, second moments of each column of the gradient `[blocks, m, n, n]`."""

    sign: int
    lr: float
    decay: float
    theta: Tensor
    second: Tensor

    def potential(self, element: Tensor, dual: Tensor) -> Tensor:
        """This leg's part of Psi where the weights are moved by `element` and gradients by `dual`."""
        moved = dual.unsqueeze(1) @ self.second @ dual.mT.unsqueeze(1)
        roots = moved.diagonal(dim1=-2, dim2=-1).clamp_min(1e-300).sqrt().mT
        total: Tensor = (roots * (self.lr + 2 * self.decay * (element @ self.theta).square())).sum()
        return total


@on_host
def adaptive_basis(
    model: nn.Module,
    symmetry: Symmetry,
    loss_fn: LossFn,
    batches: Iterable[Any],
    config: AdamConfig,
    *,
    samples: Samples | None = None,
    starts: int = 4,
    seed: int = 0,
) -> AdaptiveBasis:
    """The point of a general_linear orbit that Adam drifts to, with the rotation that SGD leaves open.

    SGD's noise does not tell rotations of hidden units apart, Adam's preconditioner does: where the noise covariance is
    proportional to the Hessian every generator's flow descends the sum of root mean squares of the gradient's entries.
    Its minimum is found by descent from the present weights and from random rotations; it may be local.

    Args:
        model: at the weights asked about; only read.
        symmetry: a general_linear one.
        loss_fn: `loss_fn(model, batch)` gives one loss per sample, `[batch]`.
        batches: the data: its gradient noise, and its Hessian to say how far the two are from proportional.
        config: Adam's settings; its `eps` is taken as small.
        samples: per-sample gradients `[N, *shape]` or `gradient_factors(...)` of the same data; by default measured
            here, one sample after the other.
        starts: how many starts, the first at the present weights.
        seed: of the others.

    Returns:
        The least minimum found.

    Raises:
        DataError: another kind of symmetry, coupled weight decay, or no minimum: Psi falls for ever where some
            direction of a layer has no gradient noise.

    Example:
        >>> import noetherflow as nf
        >>> net = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False)).double()
        >>> (s,) = nf.declare(net, "general_linear", [("0.weight", 0)], [("1.weight", 1)])
        >>> x, y = torch.randn(50, 4).double(), torch.randn(50, 3).double()
        >>> squared = lambda model, batch: (model(batch[0]) - batch[1]).square().sum(1)
        >>> found = adaptive_basis(net, s, squared, [(x, y)], nf.AdamConfig(1e-3, 8))
        >>> found.potential < found.potential_now
        True

    Source: theory.md section 13, "GL and rotations".
    """
    call = "adaptive_basis(model, symmetry, loss_fn, batches, config)"
    expect(call, "model", model, nn.Module, A_MODEL)
    expect(call, "symmetry", symmetry, Symmetry, "one of the symmetries, syms[0]")
    _check(symmetry, config)
    data = list(batches)
    samples = single_gradients(model, symmetry.parameters, loss_fn, data) if samples is None else samples
    legs = _columns(model, symmetry, samples, config)
    rng = torch.Generator("cpu").manual_seed(seed)
    begin = [symmetry.identity(), *(_rotation(symmetry, rng) for _ in range(starts - 1))]
    ends = [_descend(legs, start) for start in begin]
    values = [float(_psi(legs, e)) for e in ends]
    best = min(range(len(ends)), key=values.__getitem__)
    slope = _slope(legs, ends[best])
    if not slope < TOLERANCE:
        raise DataError(
            f"{symmetry.name!r}: Psi has no minimum on the orbit that descent finds (it still changes by {slope:.2g} "
            "of itself per unit of a generator): some direction of a layer has no gradient noise, or too few samples "
            "were given; measure more, or look at scalar and diagonal symmetries alone"
        )
    cosine = proportionality(model, symmetry, samples, loss_fn, data)
    now = float(_psi(legs, symmetry.identity()))
    return AdaptiveBasis(ends[best], now, values[best], tuple(values), slope, cosine)


def _check(symmetry: Symmetry, config: AdamConfig) -> None:
    if symmetry.is_torus:
        raise DataError(f"{symmetry.name!r} is {symmetry.kind}: noise_equilibrium(...) solves it; no rotation is open")
    if not config.decoupled and any(config.rates(n).weight_decay for n in symmetry.parameters):
        raise DataError("weight decay coupled to the gradients turns with them: only decoupled decay is solved here")


def _columns(model: nn.Module, symmetry: Symmetry, samples: Samples, config: AdamConfig) -> list[_LegColumns]:
    """Every leg with the second moments of its columns."""
    tensors, out = tensors_of(model), []
    for leg in symmetry.weight_legs:
        rates, theta = config.rates(leg.parameter), leg.unfold(tensors[leg.parameter].detach().double().cpu())
        if theta.numel() * theta.shape[1] > LARGEST:
            raise DataError(f"{leg.label}: {theta.numel():,} entries times {theta.shape[1]} rows are too many to solve")
        given = samples[leg.parameter]
        single = (given.dense() if isinstance(given, Factors) else given).double().cpu()
        columns = torch.stack([leg.unfold(g) for g in single])
        mean = columns.mean(0)
        centred = columns - mean
        noise = torch.einsum("zbim,zbjm->bmij", centred, centred) / (len(single) - 1)
        steady = torch.einsum("bim,bjm->bmij", mean, mean)
        second = config.covariance_factor * noise + steady
        out.append(_LegColumns(leg.sign, rates.lr, rates.weight_decay, theta, second))
    return out


def _psi(legs: Sequence[_LegColumns], element: Tensor) -> Tensor:
    dual = torch.linalg.inv(element).mT
    parts = [leg.potential(*((element, dual) if leg.sign > 0 else (dual, element))) for leg in legs]
    return torch.stack(parts).sum()


def _rotation(symmetry: Symmetry, rng: torch.Generator) -> Tensor:
    """A random rotation of every block."""
    drawn = torch.randn(symmetry.shape, generator=rng, dtype=torch.float64)
    turned: Tensor = torch.linalg.qr(drawn).Q
    return turned


def _descend(legs: Sequence[_LegColumns], start: Tensor) -> Tensor:
    """The minimum that quasi-Newton descent reaches; restarted at each point, so that steps are group elements."""
    element = start.clone()
    with torch.enable_grad():
        for _ in range(6):
            step = torch.zeros_like(element, requires_grad=True)
            descent = torch.optim.LBFGS(
                [step], max_iter=200, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe"
            )
            scale = 1 / float(_psi(legs, element).detach())

            def closure(step: Tensor = step, at: Tensor = element, scale: float = scale) -> Tensor:
                value = _psi(legs, torch.linalg.matrix_exp(step) @ at) * scale
                (gradient,) = torch.autograd.grad(value, step)
                step.grad = gradient.contiguous()
                return value

            descent.step(closure)  # type: ignore[no-untyped-call]
            element = torch.linalg.matrix_exp(step.detach()) @ element
            if _slope(legs, element) < TOLERANCE / 10:
                break
    return element


def _slope(legs: Sequence[_LegColumns], element: Tensor) -> float:
    """The norm of the derivative of log Psi in all generators."""
    with torch.enable_grad():
        step = torch.zeros_like(element, requires_grad=True)
        value = _psi(legs, torch.linalg.matrix_exp(step) @ element)
        (gradient,) = torch.autograd.grad(value, step)
    return float(gradient.norm() / value.detach())


def proportionality(
    model: nn.Module, symmetry: Symmetry, samples: Samples, loss_fn: LossFn, batches: Iterable[Any], probes: int = 16
) -> float:
    """Cosine between the noise covariance `R` and the Hessian `H` of a symmetry's weights: 1 where `R = c H`.

    `<R, H>` is the mean of `g^T H g`, `|R|^2` that of `(g . g')^2` over pairs, both of centred gradients; `|H|^2` that
    of `|H v|^2` over random signs.

    Args:
        model: where the samples were measured.
        symmetry: whose parameters are looked at.
        samples: per-sample gradients.
        loss_fn: one loss per sample.
        batches: the data.
        probes: random vectors.
    """
    product, names = HessianProduct(model, loss_fn, batches), symmetry.parameters
    dense = {n: (g.dense() if isinstance(g, Factors) else g).double() for n, g in samples.items() if n in names}
    centred = {n: (g - g.mean(0))[:PAIRED] for n, g in dense.items()}
    flat = torch.cat([centred[n].flatten(1) for n in names], 1)
    pairs = (flat @ flat.mT).square()
    count = len(flat)
    noise = (pairs.sum() - pairs.diagonal().sum()) / (count * (count - 1))

    def apply(part: dict[str, Tensor]) -> Tensor:
        whole = {n: part[n] if n in part else torch.zeros_like(p) for n, p in product.parameters.items()}
        found = product(whole)
        return torch.cat([found[n].flatten().cpu() for n in names])

    along = [flat[z] @ apply({n: centred[n][z] for n in names}) for z in range(count)]
    rng = torch.Generator("cpu").manual_seed(0)
    signs = [{n: _sign(centred[n][0], rng) for n in names} for _ in range(probes)]
    curved = torch.stack([apply(v).square().sum() for v in signs]).mean()
    return float(torch.stack(along).mean() / (noise.clamp_min(1e-300) * curved).sqrt())


def _sign(like: Tensor, rng: torch.Generator) -> Tensor:
    return torch.randint(0, 2, like.shape, generator=rng).double() * 2 - 1
