"""Treated inputs of `repnorm`: their minibatches, the noise equilibrium of linear nets that see them, and training.

`x = Sig^1/2 z`, `y = z + eps`, z and eps standard normal; nets see a treatment `x~` of x. The gradient of
`||P x~ - y||^2` with respect to the product `P = U W` is `G = (2/S) (P x~ - z - eps) x~^T`, samples as columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from noetherflow.core import spd
from noetherflow.core.settings import SGDConfig
from noetherflow_paper import closed_form as cf
from noetherflow_paper.experiment import generator, plain
from noetherflow_paper.generic import closed_form_gaps
from noetherflow_paper.records import Config, ExperimentPoint
from noetherflow_paper.simulate import (
    Network,
    Params,
    checkpoints,
    normal,
    simulate,
    squared_distance,
    wishart_factor,
)
from noetherflow_paper.theory import stretched

SERIES = 400
"""Seeds of the runs on treated inputs and of their predictions' samples count from here (earlier: 0 and 300)."""

POPULATION = ("raw", "standardised", "whitened")
TREATMENTS = (*POPULATION, "batch", "layer")


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Inputs whose covariance has eigenvalues of mean `scale`, the largest `spread` times the smallest."""

    scale: float
    spread: float


@dataclass(frozen=True, kw_only=True)
class HiddenTraining:
    """Training of the nets with a normalised hidden layer.

    The gradients in the `window`, given in parts of the run, predict the final norm.
    """

    lr: float = 0.02
    batch: int = 16
    decay: float = 0.02
    window: tuple[float, float] = (0.5, 0.75)


DATASETS = (
    Dataset(scale=0.5, spread=6.0),
    Dataset(scale=1.0, spread=1.0),
    Dataset(scale=1.0, spread=6.0),
    Dataset(scale=2.0, spread=6.0),
)
WIDTHS = {"batch": 16, "layer": 16, "standardised": 16, "whitened": 8}


@dataclass(frozen=True, kw_only=True)
class RepnormConfig(Config):
    """Data sets, trainings of the three kinds of nets, and the widths of normalised hidden layers by kind."""

    d: int = 12
    stretch: float = 1.6
    datasets: tuple[Dataset, ...] = DATASETS
    batch: int = 30
    hidden: HiddenTraining = HiddenTraining()
    widths: dict[str, int] = field(default_factory=lambda: dict(WIDTHS))
    lr: float
    steps: int
    relu_steps: int
    hidden_steps: int
    seeds: int


@dataclass(frozen=True, kw_only=True)
class RepnormPoint(ExperimentPoint):
    """A kind of net (`linear`, `ReLU`, `hidden`) and a treatment of its inputs or hidden layer."""

    net: str
    treatment: str


def covariance(spec: Dataset, d: int) -> Tensor:
    """Rotated, with eigenvalues spread geometrically by `spread` and mean `scale`."""
    q = torch.linalg.qr(normal((d, d), generator(11))).Q
    eigenvalues = torch.logspace(0, float(np.log10(spec.spread)), d, dtype=torch.float64)
    return q @ (spec.scale * eigenvalues / eigenvalues.mean()).diag() @ q.mT


def sum_free_basis(d: int) -> Tensor:
    """`[d - 1, d]`: orthonormal rows spanning the vectors whose coordinates sum to 0."""
    ones, rest = torch.ones(d, 1, dtype=torch.float64), torch.eye(d, d - 1, dtype=torch.float64)
    return torch.linalg.qr(torch.cat([ones, rest], 1)).Q[:, 1:].mT


@dataclass(frozen=True, eq=False)
class Inputs:
    """One treatment of inputs of covariance `sigma` `[..., d, d]`, in minibatches of S = `batch_size`.

    `raw`; `standardised` per coordinate or `whitened` by `sigma`; normalised over the `batch` or, per sample, over its
    coordinates (`layer`): centred, over the standard deviation, no gain. Layer-normalised vectors sum to 0 and are
    written in `sum_free_basis`, `[..., d - 1, n]`: W's component along the ones is never seen and never moves.
    """

    treatment: str
    sigma: Tensor
    batch_size: int

    @cached_property
    def map(self) -> Tensor:
        """`T Sig^1/2`, T the linear part of the treatment: none but a population's for `batch` and `layer`."""
        root = spd.sqrtm(self.sigma)
        if self.treatment == "standardised":
            return self.sigma.diagonal(dim1=-2, dim2=-1).rsqrt().unsqueeze(-1) * root
        if self.treatment == "whitened":
            return torch.eye(root.shape[-1]).to(root).expand_as(root)
        return sum_free_basis(root.shape[-1]).to(root) @ root if self.treatment == "layer" else root

    def samples(self, replicas: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """`z` `[replicas, d, S]` and `x~` of the samples of a minibatch."""
        d = self.sigma.shape[-1]
        z = normal((replicas, d, self.batch_size), rng)
        return z, self._treated(z - z.mean(-1, keepdim=True) if self.treatment == "batch" else z)

    def columns(self, replicas: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Fewer columns whose `z x~^T` and `x~ x~^T` have the law of the samples' (Wishart, but for `layer`)."""
        if self.treatment == "layer":
            return self.samples(replicas, rng)
        free = self.batch_size - (self.treatment == "batch")
        z = wishart_factor(replicas, self.sigma.shape[-1], free, rng)
        return z, self._treated(z)

    def _treated(self, z: Tensor) -> Tensor:
        x = self.map @ z
        if self.treatment == "batch":
            return x / (x.square().sum(-1, keepdim=True) / self.batch_size).sqrt()
        if self.treatment == "layer":
            return x / (x.square().sum(-2, keepdim=True) / z.shape[-2]).sqrt()
        return x


@dataclass(frozen=True, eq=False)
class TreatedLinearNet:
    """`l = ||U W x~ - y||^2` on fresh data at every step; `params` is `[W, U]`."""

    inputs: Inputs

    def minibatch_gradient(self, params: Params, rng: torch.Generator) -> Params:
        w, u = params
        z, seen = self.inputs.columns(len(w), rng)
        residual = u @ (w @ seen) - z - normal(z.shape, rng)
        g = residual @ ((2 / self.inputs.batch_size) * seen.mT)
        return [u.mT @ g, g @ w.mT]


def relu_net(inputs: Inputs) -> Network:
    """`l = ||U relu(W x~) - y||^2`, `params` `[W, U]`."""

    def draw(replicas: int, samples: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        z, seen = inputs.samples(replicas, rng)
        return seen.mT, (z + normal(z.shape, rng)).mT

    forward = lambda p, x: torch.relu(x @ p[0].mT) @ p[1].mT
    size = inputs.batch_size
    return Network(forward, squared_distance, draw, draw(len(inputs.sigma), size, generator(SERIES + 12)), size)


class BestProduct(NamedTuple):
    """The best product V, `E[x~ x~^T]`, and `Gam_U = S E[G G^T] / 4`, `Gam_W = S E[G^T G] / 4` there."""

    product: Tensor
    sigma: Tensor
    gam_u: Tensor
    gam_w: Tensor


def minimum(inputs: Inputs, minibatches: int = 20_000) -> BestProduct:
    """Where SGD on `inputs` (`sigma` `[d, d]`) fluctuates, and its noise.

    `M = (V x~ - z) x~^T / S`, what the treatment takes from y, adds `S E[M M^T]` and `S E[M^T M]` to the noise matrices
    of theory.md section 8: measured on `minibatches`; 0 for the treatments by the population.
    """
    s = inputs.batch_size
    eye = torch.eye(inputs.sigma.shape[-1]).to(inputs.sigma)
    if inputs.treatment in POPULATION:
        sigma = spd.symmetric(inputs.map @ inputs.map.mT)
        return BestProduct(torch.linalg.inv(inputs.map), sigma, *cf.noise_matrices(sigma, eye))
    z, seen = inputs.columns(minibatches, generator(SERIES + 18))
    sigma = spd.symmetric((seen @ seen.mT).mean(0) / s)
    product = torch.linalg.solve(sigma, (z @ seen.mT).mean(0) / s, left=False)
    m = (product @ seen - z) @ seen.mT / s
    gam_u, gam_w = cf.noise_matrices(sigma, eye)
    return BestProduct(product, sigma, gam_u + s * (m @ m.mT).mean(0), gam_w + s * (m.mT @ m).mean(0))


def covariances(config: RepnormConfig) -> Tensor:
    """Of the raw inputs of every data set, `[sets, d, d]`."""
    return torch.stack([covariance(spec, config.d) for spec in config.datasets])


def minima(config: RepnormConfig, treatment: str) -> BestProduct:
    """`minimum` of every data set, stacked `[sets, ...]`."""
    found = [minimum(Inputs(treatment, sigma, config.batch)) for sigma in covariances(config)]
    return BestProduct(*(torch.stack(m) for m in zip(*found, strict=True)))


def _stream(treatment: str) -> torch.Generator:
    return generator(SERIES + 20 + TREATMENTS.index(treatment))


def _inputs(config: RepnormConfig, treatment: str, copies: int) -> Inputs:
    """The data sets, each for `copies` replicas in a row."""
    return Inputs(treatment, covariances(config).repeat_interleave(copies, 0), config.batch)


def _norm_ratio(u: Tensor, w: Tensor) -> Tensor:
    return u.square().sum((-2, -1)) / w.square().sum((-2, -1))


def linear_nets(config: RepnormConfig, treatment: str) -> dict[str, Any]:
    """Norm ratio and `Tr H` over the last quarter: `[sets, 2 starts, seeds]`, and predicted `[sets]`."""
    at, seeds = minima(config, treatment), config.seeds
    predicted = cf.two_layer(at.product, at.gam_u, at.gam_w)
    starts = stretched(at.product, config.stretch), stretched(at.product, 1 / config.stretch)
    u, w = (torch.stack(m, 1).repeat_interleave(seeds, 1).flatten(0, 1) for m in zip(*starts, strict=True))
    inputs = _inputs(config, treatment, 2 * seeds)
    sigma = at.sigma.repeat_interleave(2 * seeds, 0)

    def record(params: Params) -> dict[str, Tensor]:
        w, u = params
        return {"ratio": _norm_ratio(u, w), "trace": cf.two_layer_hessian_trace(u, w, sigma)}

    rates, steps = learning_rates(config, treatment).repeat_interleave(2 * seeds), config.steps
    problem: Any = TreatedLinearNet(inputs)
    run = simulate(problem, [w, u], steps, rates, _stream(treatment), record, at=checkpoints(steps, 80))
    independent = cf.two_layer(at.product, *cf.noise_matrices(at.sigma, torch.eye(config.d).to(sigma)))
    return plain(
        {
            **{k: r[-20:].mean(0).reshape(-1, 2, seeds) for k, r in run.records.items()},
            "predicted_ratio": _norm_ratio(*predicted),
            "predicted_trace": cf.two_layer_hessian_trace(*predicted, at.sigma),
            "independent_ratio": _norm_ratio(*independent),
            "gaps": generic_gaps(at, config) if treatment == "raw" else [],
        }
    )


def learning_rates(config: RepnormConfig, treatment: str) -> Tensor:
    """The rate for every set; raw inputs of scale s get `lr s^(-1/4)`, which relax as fast as those of scale 1."""
    scales = [spec.scale if treatment == "raw" else 1.0 for spec in config.datasets]
    return config.lr * torch.tensor(scales, dtype=torch.float64) ** -0.25


def generic_gaps(at: BestProduct, config: RepnormConfig) -> list[list[float]]:
    """`||U||^2/||W||^2` and `Tr H` by the generic machinery over the closed form's, less 1, for every set."""
    eye, sgd = torch.eye(config.d, dtype=torch.float64), SGDConfig(config.lr, config.batch)
    return [list(closed_form_gaps(v, sigma, eye, sgd)) for v, sigma in zip(at.product, at.sigma, strict=True)]


def common_noise(u: Tensor, w: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """What z's batch mean adds to `Tr U^T Gam_U U`, `Tr W Gam_W W^T` in a ReLU net with batch-normalised inputs.

    `sum_j |u_j|^2 |Sig w_j|^2 / (pi w_j^T Sig w_j)` and `d_y Tr(W Sig W^T) / pi`, for Gaussian inputs of covariance
    `sigma`. The normalised inputs do not know that mean. It is common to the minibatch, of square `d_y / S`, and meets
    hidden units of mean `(w_j^T Sig w_j / 2 pi)^1/2`; in a linear net that mean is 0.
    """
    seen = w @ sigma
    power = (seen * w).sum(-1)
    extra_w = (u.square().sum(-2) * seen.square().sum(-1) / power).sum(-1) / torch.pi
    return extra_w, u.shape[-2] * power.sum(-1) / torch.pi


def relu_nets(config: RepnormConfig, treatment: str) -> dict[str, Any]:
    """Norm ratio and `Tr U^T Gam_U U / Tr W Gam_W W^T` over the last quarter, `[sets, seeds]`.

    For `batch` also that with the two terms of `common_noise`, and these, relative: `balance_common`, `extra_u`,
    `extra_w`. `moved` is how far the balance still moved from the third quarter to the last. For `batch` and `layer`,
    whose matrices leave something out: `formula_gap` of `formula_gaps`.
    """
    at, seeds, d = minima(config, treatment), config.seeds, config.d
    inputs = _inputs(config, treatment, seeds)
    sigma, gam_u, gam_w = (m.repeat_interleave(seeds, 0) for m in (at.sigma, at.gam_u, at.gam_w))
    rng, steps = generator(SERIES + 13), config.relu_steps
    start = [0.4 * normal((len(gam_w), 3 * d, gam_w.shape[-1]), rng), 0.4 * normal((len(gam_u), d, 3 * d), rng)]

    def record(params: Params) -> dict[str, Tensor]:
        w, u = params
        noise_w, noise_u = cf.trace(u.mT @ gam_u @ u), cf.trace(w @ gam_w @ w.mT)
        found = {"ratio": _norm_ratio(u, w), "balance": noise_w / noise_u}
        if treatment != "batch":
            return found
        extra_w, extra_u = common_noise(u, w, sigma)
        common = {"balance_common": (noise_w + extra_w) / (noise_u + extra_u)}
        return {**found, **common, "extra_w": extra_w / noise_w, "extra_u": extra_u / noise_u}

    rates = learning_rates(config, treatment).repeat_interleave(seeds)
    net, rng = relu_net(inputs), _stream(treatment)
    run = simulate(net, start, steps, rates, rng, record, at=checkpoints(steps, 80))
    found = {k: r[-20:].mean(0).reshape(-1, seeds) for k, r in run.records.items()}
    key = "balance_common" if treatment == "batch" else "balance"
    balance = run.records[key]
    found["moved"] = (balance[-20:].mean(0) - balance[-40:-20].mean(0)).reshape(-1, seeds)
    if treatment not in POPULATION:
        found["formula_gap"] = formula_gaps(net, run.params, rates, lambda p: record(p)[key], rng).reshape(-1, seeds)
    return plain(found)


def formula_gaps(
    net: Network, params: Params, rates: Tensor, formula: Callable[[Params], Tensor], rng: torch.Generator
) -> Tensor:
    """A formula's noise balance over that of drawn minibatches, less 1, per replica; 0 where the formula is right.

    At the weights after 1,000 more steps at a tenth of the rates, since the formula is that of weights that do not
    fluctuate. The noise is the covariance of the gradients of 1,500 minibatches.
    """
    params = simulate(net, params, 1000, rates / 10, rng, at=0).params
    draws = 1500
    mean, square = [torch.zeros_like(p) for p in params], [torch.zeros(len(p)).to(p) for p in params]
    for _ in range(draws):
        gradients = net.minibatch_gradient(params, rng)
        mean = [m + g / draws for m, g in zip(mean, gradients, strict=True)]
        square = [s + g.square().sum((1, 2)) / draws for s, g in zip(square, gradients, strict=True)]
    noise_w, noise_u = (s - m.square().sum((1, 2)) for s, m in zip(square, mean, strict=True))
    return formula(params) / (noise_w / noise_u) - 1
