"""Many training runs at once: every tensor has a leading replica axis R (seeds x sweep points).

A *problem* hands out gradients, an *optimiser rule* turns them into steps; nothing loops over replicas in Python.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from noetherflow.errors import DataError
from noetherflow_paper.closed_form import prefix_products
from noetherflow_paper.records import ExperimentPoint

Params = list[Tensor]
Record = Callable[[Params], dict[str, Tensor]]
OnStep = Callable[[int, Params, Params], Any]
Method = Literal["sgd", "gd", "sde"]
METHODS: tuple[Method, ...] = ("sgd", "gd")
"""The two that most experiments compare."""


class SampledProblem(Protocol):
    """What SGD needs to know of a loss. All gradients have the shapes of `params`, `[R, ...]`."""

    def minibatch_gradient(self, params: Params, rng: torch.Generator) -> Params:
        """`g_B` of a fresh minibatch per replica."""


@runtime_checkable
class Problem(SampledProblem, Protocol):
    """What gradient descent and the SDE need to know beside that."""

    def mean_gradient(self, params: Params) -> Params:
        """`gbar`: the population's or the whole data set's gradient."""

    def gaussian_noise(self, params: Params, rng: torch.Generator) -> Params:
        """A centred draw with the covariance of `g_B`."""


def normal(shape: Sequence[int], rng: torch.Generator, like: Tensor | None = None) -> Tensor:
    """Standard normal numbers in `like`'s dtype (float64 by default), on the generator's device.

    Drawn in single precision: on a CPU that takes a quarter of the time, and the noise is known to 2^-24.
    """
    dtype = torch.float64 if like is None else like.dtype
    return torch.randn(tuple(shape), dtype=torch.float32, device=rng.device, generator=rng).to(dtype)


def wishart_factor(replicas: int, dim: int, samples: int, rng: torch.Generator) -> Tensor:
    """Bartlett's lower triangular T with `T T^T` distributed as `sum_i z_i z_i^T` over `samples` normal z, `[R, d, d]`.

    Needs `samples >= dim`; costs nothing per sample.
    """
    lower = normal((replicas, dim, dim), rng).tril_(-1)
    half_degrees = torch.arange(samples, samples - dim, -1, dtype=torch.float64, device=rng.device) / 2
    chi = (2 * torch._standard_gamma(half_degrees.expand(replicas, -1), generator=rng)).sqrt()
    return lower + torch.diag_embed(chi)


@dataclass(frozen=True, eq=False)
class LinearNet:
    """`l = c ||W_D ... W_1 x - y||^2`, `x ~ N(0, Sig_x)`, `y = V x + eps`, `eps ~ N(0, Sig_eps)`; fresh data each step.

    `params` is `[W_1, ..., W_D]`, `W_i` `[R, d_i, d_{i-1}]`. `product`, `root_x`, `root_eps` (roots with
    `root root^T = Sig`) are `[R or 1, ...]`. With S >= d_x a minibatch is drawn through its exact sufficient statistics
    (a Wishart matrix), so that its cost does not depend on S.
    """

    product: Tensor
    root_x: Tensor
    root_eps: Tensor
    batch_size: int
    loss_scale: float = 1.0

    @classmethod
    def of(
        cls, product: Tensor, sigma_x: Tensor, sigma_eps: Tensor, batch_size: int, loss_scale: float = 1.0
    ) -> LinearNet:
        """From covariances; matrices without a replica axis are shared by all replicas."""
        wide = [m if m.ndim == 3 else m[None] for m in (product, sigma_x, sigma_eps)]
        return cls(wide[0], torch.linalg.cholesky(wide[1]), torch.linalg.cholesky(wide[2]), batch_size, loss_scale)

    def _through(self, params: Params, outer: Callable[[Tensor], Tensor]) -> Params:
        """`dW_i = A_i^T G B_i^T` with `G = outer(error)`."""
        before, after = prefix_products(params)
        g = outer(params[-1] @ before[-1] - self.product)
        last = len(params) - 1
        grads = []
        for i, (b, a) in enumerate(zip(before, after, strict=True)):
            left = g if i == last else a.mT @ g
            grads.append(left if i == 0 else left @ b.mT)
        return grads

    def minibatch_gradient(self, params: Params, rng: torch.Generator) -> Params:
        replicas = params[0].shape[0]
        dx, dy, s = self.root_x.shape[-1], self.root_eps.shape[-1], self.batch_size
        if s >= dx:
            factor = self.root_x @ wishart_factor(replicas, dx, s, rng)
            cross = self.root_eps @ normal((replicas, dy, dx), rng)
            return self._through(params, lambda e: (2 * self.loss_scale / s) * ((e @ factor - cross) @ factor.mT))
        x = self.root_x @ normal((replicas, dx, s), rng)
        eps = self.root_eps @ normal((replicas, dy, s), rng)
        return self._through(params, lambda e: (2 * self.loss_scale / s) * ((e @ x - eps) @ x.mT))

    def mean_gradient(self, params: Params) -> Params:
        sigma = self.root_x @ self.root_x.mT
        return self._through(params, lambda e: 2 * self.loss_scale * (e @ sigma))

    def gaussian_noise(self, params: Params, rng: torch.Generator, samples: int = 48) -> Params:
        replicas = params[0].shape[0]
        dx, dy = self.root_x.shape[-1], self.root_eps.shape[-1]
        x = self.root_x @ normal((replicas, dx, samples), rng)
        eps = self.root_eps @ normal((replicas, dy, samples), rng)
        xi = normal((replicas, 1, samples), rng)
        xi = (xi - xi.mean(-1, keepdim=True)) * (2 * self.loss_scale / math.sqrt((samples - 1) * self.batch_size))
        return self._through(params, lambda e: ((e @ x - eps) * xi) @ x.mT)


@dataclass(frozen=True, eq=False)
class Network:
    """Any differentiable model: `forward(params, x) -> prediction`, `loss(prediction, y) -> [R, S]` per sample.

    `draw(replicas, samples, rng)` gives a fresh minibatch `(x [R, S, ...], y)`; `population` is the data (leading axis
    R or 1) that stands for the mean gradient.
    """

    forward: Callable[[Params, Tensor], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    draw: Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]
    population: tuple[Tensor, Tensor]
    batch_size: int

    def _gradient(self, params: Params, x: Tensor, y: Tensor, weights: Tensor | None = None) -> Params:
        leaves = [p.detach().requires_grad_() for p in params]
        losses = self.loss(self.forward(leaves, x), y)
        total = losses.mean(-1).sum() if weights is None else (weights * losses).sum()
        return list(torch.autograd.grad(total, leaves))

    def minibatch_gradient(self, params: Params, rng: torch.Generator) -> Params:
        return self._gradient(params, *self.draw(params[0].shape[0], self.batch_size, rng))

    def mean_gradient(self, params: Params) -> Params:
        return self._gradient(params, *self.population)

    def gaussian_noise(self, params: Params, rng: torch.Generator, samples: int = 48) -> Params:
        replicas = params[0].shape[0]
        xi = normal((replicas, samples), rng)
        xi = (xi - xi.mean(-1, keepdim=True)) / math.sqrt((samples - 1) * self.batch_size)
        return self._gradient(params, *self.draw(replicas, samples, rng), weights=xi)


def squared_distance(prediction: Tensor, y: Tensor) -> Tensor:
    """`||prediction - y||^2` per sample."""
    return (prediction - y).square().sum(-1)


def from_data(x: Tensor, y: Tensor) -> Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]:
    """A `draw` that samples minibatches with replacement from a finite data set (leading axis: samples)."""

    def draw(replicas: int, samples: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        index = torch.randint(len(x), (replicas, samples), generator=rng, device=rng.device)
        return x[index], y[index]

    return draw


@dataclass(frozen=True, kw_only=True)
class MethodPoint(ExperimentPoint):
    """A point that trains by one method and needs to know nothing else."""

    method: Method


@dataclass(frozen=True, eq=False)
class Trajectory:
    """`records[name]` `[T, R, ...]` at `steps` `[T]`; the last parameters; which replicas left the finite numbers."""

    steps: list[int]
    records: dict[str, Tensor]
    params: Params
    diverged: Tensor


@dataclass
class _Optimiser:
    """torch's update rules on lists of tensors: SGD with heavy-ball momentum, or Adam."""

    weight_decay: float | Tensor
    momentum: float
    adam: tuple[float, float] | None
    state: dict[str, Params] = field(default_factory=dict)
    count: int = 0

    def direction(self, params: Params, grads: Params) -> Params:
        """What a step subtracts, over the learning rate; keeps the momentum or Adam's moments."""
        decay = self.weight_decay
        if isinstance(decay, Tensor) or decay:
            grads = [g + _per_replica(decay, p) * p for g, p in zip(grads, params, strict=True)]
        self.count += 1
        if self.adam is not None:
            b1, b2 = self.adam
            m = self.state.setdefault("m", [torch.zeros_like(g) for g in grads])
            v = self.state.setdefault("v", [torch.zeros_like(g) for g in grads])
            for mi, vi, g in zip(m, v, grads, strict=True):
                mi.mul_(b1).add_(g, alpha=1 - b1)
                vi.mul_(b2).addcmul_(g, g, value=1 - b2)
            c1, c2 = 1 - b1**self.count, 1 - b2**self.count
            return [(mi / c1) / ((vi / c2).sqrt() + 1e-8) for mi, vi in zip(m, v, strict=True)]
        if self.momentum:
            buffers = self.state.setdefault("buffer", [torch.zeros_like(g) for g in grads])
            for buffer, g in zip(buffers, grads, strict=True):
                buffer.mul_(self.momentum).add_(g)
            return buffers
        return grads


def _per_replica(value: float | Tensor, like: Tensor) -> float | Tensor:
    return value.reshape(-1, *[1] * (like.ndim - 1)) if isinstance(value, Tensor) and value.ndim else value


def checkpoints(steps: int, count: int) -> list[int]:
    """0, ..., `steps` in about `count` equal strides."""
    stride = max(1, steps // count)
    return sorted({*range(0, steps + 1, stride), steps})


@dataclass(frozen=True, eq=False)
class _Stepper:
    """One training step of all replicas, applied in place: of SGD; with a `population` of gradient descent, or of
    the SDE in so many `substeps`.
    """

    problem: SampledProblem
    population: Problem | None
    optimiser: _Optimiser
    substeps: int
    on_step: OnStep | None

    def step(self, step: int, params: Params, rate: float | Tensor, rng: torch.Generator) -> None:
        """Move `params` by one step, the substeps of Euler-Maruyama together."""
        if self.population is None:
            grads = self.problem.minibatch_gradient(params, rng)
            self._apply(step, params, self.optimiser.direction(params, grads), rate)
            return
        if not self.substeps:
            grads = self.population.mean_gradient(params)
            self._apply(step, params, self.optimiser.direction(params, grads), rate)
            return
        for _ in range(self.substeps):
            drift = self.optimiser.direction(params, self.population.mean_gradient(params))
            noise = self.population.gaussian_noise(params, rng)
            mixed = [d + math.sqrt(self.substeps) * n for d, n in zip(drift, noise, strict=True)]
            self._apply(step, params, mixed, rate / self.substeps)

    def _apply(self, step: int, params: Params, direction: Params, rate: float | Tensor) -> None:
        updates = [_per_replica(rate, p) * d for p, d in zip(params, direction, strict=True)]
        if self.on_step is not None:
            self.on_step(step, params, updates)
        for p, u in zip(params, updates, strict=True):
            p.sub_(u)


def _check(method: str, momentum: float, adam: tuple[float, float] | None) -> None:
    if method not in ("sgd", "gd", "sde"):
        raise DataError(f"method must be 'sgd', 'gd' or 'sde', got {method!r}")
    if method == "sde" and (momentum or adam):
        raise DataError("the SDE comparison is for plain SGD; leave momentum and adam out")


def _population(problem: SampledProblem, method: Method) -> Problem | None:
    """The problem as gradient descent and the SDE need it, None for SGD. Raises DataError where it cannot give that."""
    if method == "sgd":
        return None
    if not isinstance(problem, Problem):
        raise DataError(f"{type(problem).__name__} draws minibatches only: run it with method='sgd', not {method!r}")
    return problem


def simulate(
    problem: SampledProblem,
    start: Sequence[Tensor],
    steps: int,
    lr: float | Tensor | Callable[[int], float | Tensor],
    rng: torch.Generator,
    record: Record = lambda params: {},
    *,
    at: Iterable[int] | int = 100,
    method: Method = "sgd",
    weight_decay: float | Tensor = 0.0,
    momentum: float = 0.0,
    adam: tuple[float, float] | None = None,
    substeps: int = 4,
    on_step: OnStep | None = None,
) -> Trajectory:
    """Train all replicas for `steps` steps, `theta <- theta - lr (g + weight_decay theta)`.

    It has many parameters because it stands for a whole training script; those after `record` have defaults.

    Args:
        problem: hands out gradients.
        start: parameters `[R, ...]`, not modified.
        steps: how many.
        lr: a number, one per replica `[R]`, or a function of the step.
        rng: draws the minibatches and the noise.
        record: what to keep of the parameters, by name.
        at: steps at which `record` is called, or how many.
        method: `sgd` (fresh minibatches), `gd` (mean gradient), `sde` (Euler-Maruyama of
            `d theta = -gbar dt + sqrt(lr) Cov[g_B]^1/2 dB`).
        weight_decay: a number, or one per replica `[R]`.
        momentum: heavy ball's.
        adam: the betas of Adam in place of SGD.
        substeps: of the SDE in one step.
        on_step: sees `(step, params, update)` of every update before it is applied.

    Returns:
        What was recorded, `[T, R, ...]` by name, and the last parameters.

    Raises:
        DataError: for an unknown method, or for momentum or Adam with `sde`.

    Source: theory.md section 1.
    """
    _check(method, momentum, adam)
    population = _population(problem, method)
    params = [p.detach().clone() for p in start]
    marks = set(checkpoints(steps, at) if at else []) if isinstance(at, int) else {t for t in at if 0 <= t <= steps}
    stepper = _Stepper(
        problem, population, _Optimiser(weight_decay, momentum, adam), substeps if method == "sde" else 0, on_step
    )
    seen: list[int] = []
    rows: list[dict[str, Tensor]] = []
    for step in range(steps + 1):
        if step in marks:
            seen.append(step)
            rows.append({name: value.detach().clone() for name, value in record(params).items()})
        if step < steps:
            stepper.step(step, params, lr(step) if callable(lr) else lr, rng)
    finite = torch.stack([p.isfinite().flatten(1).all(1) for p in params]).all(0)
    records = {name: torch.stack([row[name] for row in rows]) for name in rows[0]} if rows else {}
    return Trajectory(seen, records, params, ~finite)


def reduced_width(u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """`(U, W)` of a linear net of any width as one of width `d_x + d_y` with the same dynamics.

    `U F`, `F^T W` with F an orthonormal basis of the row spaces: (decayed) gradient steps never leave it, and norms,
    product and spectra are the same. Wide networks are simulated exactly at the cost of narrow ones.
    """
    if u.shape[-1] <= u.shape[-2] + w.shape[-1]:
        return u, w
    basis = torch.linalg.qr(torch.cat([u.mT, w], dim=-1)).Q
    return u @ basis, basis.mT @ w
