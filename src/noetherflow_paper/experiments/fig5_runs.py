"""The runs behind figure 5: settings, points, simulations on image data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from noetherflow.core.settings import SGDConfig
from noetherflow.errors import DataError
from noetherflow.workloads import digits
from noetherflow_paper import closed_form as cf
from noetherflow_paper.experiment import generator, plain
from noetherflow_paper.generic import generic_equilibrium, product_design
from noetherflow_paper.records import Config, ExperimentPoint
from noetherflow_paper.simulate import (
    LinearNet,
    Method,
    Network,
    Params,
    checkpoints,
    from_data,
    normal,
    simulate,
    squared_distance,
)
from noetherflow_paper.turning import independent_noise, residual_noise, turning_flow


@dataclass(frozen=True, kw_only=True)
class Fig5Config(Config):
    """The images (`data`: a file in place of scikit-learn's digits), the net, the start's norms and the training.

    `rank`: hidden units of every layer, and directions in which the targets depend on the inputs.
    """

    components: int = 3
    rank: int = 3
    depth: int = 4
    target_scale: float = 2.0
    data: str | None = None
    scales: tuple[float, ...] = (2.0, 0.6, 1.2, 0.8)
    lr: float
    batch: int = 16
    steps: int
    seeds: int


@dataclass(frozen=True, kw_only=True)
class Fig5Point(ExperimentPoint):
    """One training: on images or Gaussian data, from random layers or from the orbit of section 9's solution.

    `theory` trains nothing.
    """

    method: Method = "sgd"
    gaussian: bool = False
    orbit: bool = False


SCALES = {
    "quick": Fig5Config(lr=0.015, steps=28_400, seeds=4),
    "paper": Fig5Config(components=10, rank=5, lr=0.0075, steps=107_000, seeds=8),
}


NEAR = ", from the orbit"
REST = 2.0
"""Far more than the slowest relaxation time of the flow, in `S / eta^2` steps."""


def points(config: Fig5Config) -> list[Fig5Point]:
    """Predictions; SGD on the images and on Gaussian data of the same covariances, and GD.

    From random layers, and from section 9's solution moved by a random element of the orbit, where every direction is
    learned.
    """
    return [
        Fig5Point(name="theory"),
        Fig5Point(name="sgd"),
        Fig5Point(name="gaussian", gaussian=True),
        Fig5Point(name="gd", method="gd", gaussian=True),
        Fig5Point(name=f"sgd{NEAR}", orbit=True),
        Fig5Point(name=f"gaussian{NEAR}", gaussian=True, orbit=True),
    ]


def images(config: Fig5Config) -> Tensor:
    """Flattened images `[N, pixels]`: scikit-learn's digits, or an `.npz`/`.npy` array of MNIST named by `data`."""
    if config.data is None:
        return digits()[0]
    path = Path(config.data)
    if not path.exists():
        raise DataError(f"no image data at {path}; set data to an .npy or .npz file of images, or leave it out")
    loaded = np.load(path)
    array = loaded[loaded.files[0]] if hasattr(loaded, "files") else loaded
    return torch.as_tensor(array.reshape(len(array), -1) / array.max(), dtype=torch.float64)


def halves(config: Fig5Config) -> tuple[Tensor, Tensor]:
    """Principal components of the upper half (inputs) and of the lower half (targets), `[N, components]` each.

    Of the linear dependence of the targets on the inputs all but the `rank` strongest directions is taken away: those
    that training cannot tell from its noise decide nothing.
    """
    flat = images(config)
    half = flat.shape[1] // 2
    out = []
    for part, scale in ((flat[:, :half], 1.0), (flat[:, half:], config.target_scale)):
        centred = part - part.mean(0)
        axes = torch.linalg.eigh(centred.mT @ centred).eigenvectors[:, -config.components :].flip(-1)
        z = centred @ axes
        out.append(scale * z / z.square().mean().sqrt())
    x, y = out
    left, s, right = torch.linalg.svd(statistics(x, y)[0])
    weak = left[:, config.rank :] * s[config.rank :] @ right[config.rank :]
    return x, y - x @ weak.mT


def statistics(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Least-squares map V, `Sig_x`, and the covariance of its residuals."""
    sigma_x = x.mT @ x / len(x)
    v = torch.linalg.solve(sigma_x, x.mT @ y / len(x)).mT
    r = y - x @ v.mT
    return v, sigma_x, r.mT @ r / len(x)


def forward(params: Params, x: Tensor) -> Tensor:
    """`W_D ... W_1 x`."""
    for w in params:
        x = x @ w.mT
    return x


def compute(config: Fig5Config, point: Fig5Point) -> dict[str, Any]:
    """Layer norms `[T, 2 seeds, D]` (random start: first half equal norms, second half unequal) and singular values of
    the product `[T, 2 seeds, k]`; or the predictions."""
    x, y = halves(config)
    v, sigma_x, sigma_eps = statistics(x, y)
    closed = solution(config, v, sigma_x, sigma_eps)
    if point.name == "theory":
        return predictions(config, closed, x, y)
    start = moved(closed, config, generator(6)) if point.orbit else starts(config, generator(4))
    network = Network(forward, squared_distance, from_data(x, y), (x[None], y[None]), config.batch)
    surrogate = LinearNet.of(v, sigma_x, sigma_eps, config.batch)

    def record(params: Params) -> dict[str, Tensor]:
        product = forward(params, torch.eye(config.components, dtype=torch.float64))
        diverged = ~product.isfinite().all(-1).all(-1)[:, None]
        singular = torch.linalg.svdvals(product.masked_fill(diverged[..., None], 0))[:, : config.rank]
        return {
            "norms": torch.stack([w.norm(dim=(1, 2)) for w in params], -1),
            "singular": singular.masked_fill(diverged, math.nan),
        }

    marks = checkpoints(config.steps, 80)
    run = simulate(
        surrogate if point.gaussian else network,
        start,
        config.steps,
        config.lr,
        generator(5),
        record,
        at=marks,
        method=point.method,
    )
    return plain({"steps": marks, **run.records})


def solution(config: Fig5Config, v: Tensor, sigma_x: Tensor, sigma_eps: Tensor) -> Params:
    """Section 9's layers for V of the given rank, without the hidden units that are zero."""
    first, *middle, last = cf.deep_linear(v, sigma_x, sigma_eps, config.depth)
    r = config.rank
    return [first[:r], *(w[:r, :r] for w in middle), last[:, :r]]


def starts(config: Fig5Config, rng: torch.Generator) -> Params:
    """Gaussian layers, `[2 seeds, ...]`: of equal norms, then with norms in the ratio `scales`."""
    depth, seeds = config.depth, config.seeds
    sizes = torch.stack([torch.ones(depth), torch.tensor(config.scales)]).double().repeat_interleave(seeds, 0)
    widths = [config.components, *[config.rank] * (depth - 1), config.components]
    layers = [normal((2 * seeds, after, before), rng) for before, after in pairwise(widths)]
    return [1.7 * sizes[:, i, None, None] * w / w.norm(dim=(1, 2), keepdim=True) for i, w in enumerate(layers)]


def moved(solution: Params, config: Fig5Config, rng: torch.Generator) -> Params:
    """Copies of a solution, each with its own random `G_i` between neighbouring layers, `[2 seeds, ...]`.

    `W_i -> G_i W_i`, `W_{i+1} -> W_{i+1} G_i^-1` with `G_i = Q exp(s)`, Q orthogonal and s diagonal of deviation 0.3.
    """
    count, r = 2 * config.seeds, config.rank
    layers = [w.expand(count, -1, -1) for w in solution]
    for i in range(len(layers) - 1):
        q = torch.linalg.qr(normal((count, r, r), rng)).Q
        scale = (0.3 * normal((count, r), rng)).exp()
        layers[i] = scale.unsqueeze(-1) * (q @ layers[i])
        layers[i + 1] = layers[i + 1] @ q.mT / scale.unsqueeze(-2)
    return layers


def predictions(config: Fig5Config, closed: Params, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Norms by section 9, by the generic machinery on the images and on data with independent residuals, and where SGD
    comes to rest on either; V's singular values.
    """
    v, sigma_x, sigma_eps = statistics(x, y)
    sgd, eye = SGDConfig(config.lr, config.batch), torch.eye(len(v), dtype=torch.float64)
    isotropic = solution(config, v, eye, eye)
    design = product_design(v, sigma_x, sigma_eps)
    found = {
        "closed": closed,
        "generic": generic_equilibrium(closed, x, y, sgd),
        "generic_independent": generic_equilibrium(isotropic, *design, sgd),
    }
    for name, noise in (("rest", residual_noise(x, y)), ("rest_independent", independent_noise(sigma_x, sigma_eps))):
        found[name] = turning_flow(closed, sigma_x, noise, [0, REST])[-1]
    norms = {name: [float(w.norm()) for w in layers] for name, layers in found.items()}
    return plain({**norms, "singular": torch.linalg.svdvals(v)[: config.rank]})
