"""Shared by figures 6 and 9: alignment of `W Sig_x W^T` and `U^T Sig_eps U` in two-layer nets with an activation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from noetherflow.report import style
from noetherflow_paper.experiment import (
    Results,
    Setting,
    Verdict,
    from_difference,
    from_seeds,
    generator,
    plain,
)
from noetherflow_paper.records import Config, ExperimentPoint
from noetherflow_paper.simulate import METHODS, Method, Network, Params, checkpoints, normal, simulate, squared_distance

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "leaky_relu": torch.nn.functional.leaky_relu,
    "swish": torch.nn.functional.silu,
}


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig(Config):
    """The net and its activations, the variance of the first output's noise, GD's `population`, and the training."""

    d: int = 40
    width: int = 80
    first_variance: float = 5.0
    population: int = 2000
    activations: tuple[str, ...]
    lr: float
    batch: int
    steps: int
    seeds: int


@dataclass(frozen=True, kw_only=True)
class AlignmentPoint(ExperimentPoint):
    """One activation under one method."""

    method: Method
    activation: str


AlignmentResults = Results[AlignmentConfig, AlignmentPoint]


def points(config: AlignmentConfig) -> list[AlignmentPoint]:
    """SGD and GD for every activation."""
    acts = config.activations
    return [AlignmentPoint(name=f"{m} {a}", method=m, activation=a) for a in acts for m in METHODS]


def matrices(params: Params, variances: Tensor) -> tuple[Tensor, Tensor]:
    """`W Sig_x W^T` and `U^T Sig_eps U`, each divided by its trace, for isotropic inputs."""
    w, u = params
    pair = (w @ w.mT, u.mT @ (variances[:, None] * u))
    first, second = (m / m.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None] for m in pair)
    return first, second


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """`<a, b> / (|a| |b|)` over the last two axes."""
    return (a * b).sum((-2, -1)) / (a.norm(dim=(-2, -1)) * b.norm(dim=(-2, -1)))


def noisy_share(params: Params, a: Tensor, b: Tensor) -> Tensor:
    """`<v, a v> / <v, b v>`, v the noisy output's row of U: its share of `W Sig_x W^T` over that of `U^T Sig_eps U`."""
    v = params[1][:, 0, :]
    share = lambda m: torch.einsum("ri,rij,rj->r", v, m, v)
    return share(a) / share(b)


def at_norm_balance(d: int, variance: float) -> tuple[float, float]:
    """Correlation and noisy share where `W W^T = U^T U` has rank d and equal eigenvalues: no effect of the noise.

    `(d - 1 + variance) / sqrt(d (d - 1 + variance^2))` and `(1 / d) (d - 1 + variance) / variance`.
    """
    total = d - 1 + variance
    return total / math.sqrt(d * (d - 1 + variance**2)), total / (d * variance)


def compute(config: AlignmentConfig, point: AlignmentPoint) -> dict[str, Any]:
    """Matrix correlations (whole, off the diagonal) and noisy shares `[T, seeds]`; the first seed's last matrices."""
    d, width, act = config.d, config.width, ACTIVATIONS[point.activation]
    variances = torch.ones(d, dtype=torch.float64)
    variances[0] = config.first_variance
    rng = generator(6)
    gd = point.method == "gd"
    seeds = min(2, config.seeds) if gd else config.seeds

    def draw(replicas: int, samples: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        x = normal((replicas, samples, d), rng)
        return x, torch.addcmul(x, variances.sqrt(), normal((replicas, samples, d), rng))

    # Label noise has mean zero, so the population gradient is that of y = x.
    inputs = normal((1, config.population, d), rng)
    network = Network(lambda p, x: act(x @ p[0].mT) @ p[1].mT, squared_distance, draw, (inputs, inputs), config.batch)
    start = [normal((seeds, width, d), rng) / d**0.5, normal((seeds, d, width), rng) / width**0.5]
    off = 1 - torch.eye(width, dtype=torch.float64)

    def record(params: Params) -> dict[str, Tensor]:
        a, b = matrices(params, variances)
        return {"whole": correlation(a, b), "off": correlation(a * off, b * off), "share": noisy_share(params, a, b)}

    steps = config.steps
    run = simulate(network, start, steps, config.lr, rng, record, at=checkpoints(steps, 50), method=point.method)
    a, b = matrices(run.params, variances)
    corner = 24
    return plain({"steps": run.steps, **run.records, "a": a[0, :corner, :corner], "b": b[0, :corner, :corner]})


def plot(results: AlignmentResults) -> Any:
    """Correlation against steps, and the two matrices after SGD and GD for the first activation."""
    acts = results.config.activations
    fig, axes = style.figure(3, width=4.6)
    colors, widths = (style.SGD, style.ACCENT, style.SDE, style.OTHER), (3.2, 1.3, 1.3, 1.3)
    for act, color, width in zip(acts, colors, widths, strict=False):
        for method, line in (("sgd", "-"), ("gd", ":")):
            name = f"{method} {act}"
            values, steps = results.array(name, "whole"), results.array(name, "steps")
            style.band(axes[0], steps, values, color, f"{method.upper()}, {act}", ls=line, lw=width)
    balanced = at_norm_balance(results.config.d, results.config.first_variance)[0]
    axes[0].axhline(balanced, color=style.THEORY, lw=0.8, ls="--", label="norm-balanced, no noise")
    axes[0].set(
        xlabel="step",
        ylabel="matrix correlation",
        ylim=(0, 1.02),
        title=r"$W\Sigma_xW^T$ against $U^T\Sigma_\epsilon U$",
    )
    axes[0].legend(fontsize=7.5, ncols=2)
    for ax, method, color in ((axes[1], "sgd", style.SGD), (axes[2], "gd", style.GD)):
        name = f"{method} {acts[0]}"
        a, b = results.array(name, "a"), results.array(name, "b")
        diagonal = np.eye(len(a), dtype=bool)
        ax.plot(a[~diagonal], b[~diagonal], ".", color=color, ms=3, alpha=0.6, label="off the diagonal")
        ax.plot(a[diagonal], b[diagonal], "x", color=style.ACCENT, ms=5, label="diagonal")
        ends = np.array([min(a.min(), b.min()), max(a.max(), b.max())])
        ax.plot(ends, ends, "--", color=style.THEORY, lw=1, label="equal")
        ax.set(
            xlabel=r"entries of $W\Sigma_xW^T$ / trace",
            ylabel=r"entries of $U^T\Sigma_\epsilon U$ / trace",
            title=f"{method.upper()}, {acts[0]}",
        )
        ax.ticklabel_format(style="sci", scilimits=(-2, 2))
        ax.legend(fontsize=7.5)
    return fig


def settled(results: AlignmentResults, name: str, key: str) -> np.ndarray:
    """A recorded quantity averaged over the last fifth of the run, per seed."""
    values = results.array(name, key)
    return values[-(len(values) // 5) :].mean(0)


def verdicts(results: AlignmentResults) -> list[Verdict]:
    """Correlations and the noisy output's share at the end, for every activation."""
    out = []
    threshold = math.sqrt(at_norm_balance(results.config.d, results.config.first_variance)[1])
    share = "share of the noisy output's direction, W's matrix / U's (1 aligned)"
    for act in results.config.activations:
        sgd, gd = ({k: settled(results, f"{m} {act}", k) for k in ("whole", "off", "share")} for m in ("sgd", "gd"))
        why = analysis(results, sgd, gd)
        out += [
            from_seeds(f"{act}, SGD: correlation of the two matrices", 0.9, sgd["whole"], relation="above"),
            from_seeds(f"{act}, SGD: correlation off the diagonal", 0.85, sgd["off"], relation="above"),
            from_seeds(
                f"{act}, GD: correlation of the two matrices", 0.75, gd["whole"], relation="below", analysis=why
            ),
            from_difference(
                f"{act}, off the diagonal: SGD minus GD", 0.25, sgd["off"], gd["off"], relation="above", analysis=why
            ),
            from_seeds(f"{act}, SGD: {share}", threshold, sgd["share"], relation="above"),
            from_seeds(f"{act}, GD: {share}", threshold, gd["share"], relation="below"),
        ]
    return out


def analysis(results: AlignmentResults, sgd: dict[str, np.ndarray], gd: dict[str, np.ndarray]) -> str:
    """Why the correlation under GD is high: what it is at norm balance, and where the two methods do differ."""
    d, variance = results.config.d, results.config.first_variance
    correlation_there, share_there = at_norm_balance(d, variance)
    return (
        f"The correlation hardly tells the two apart: the noise differs in one direction of {d} only, and a "
        "norm-balanced solution, W W^T = U^T U, which knows nothing of the noise, has a correlation of "
        f"{correlation_there:.2f} (GD here {gd['whole'].mean():.2f}, SGD {sgd['whole'].mean():.2f}). In that direction "
        f"they do differ: W's share over U's, 1 where aligned and {share_there:.2f} at norm balance, is "
        f"{sgd['share'].mean():.2f} under SGD and {gd['share'].mean():.2f} under GD."
    )


SETTINGS = (
    Setting(
        "hidden width",
        "80",
        "needed: at 40 (a variation above) SGD's matrices correlate with 0.36 (tanh), 0.26 (ReLU), 0.27 (leaky ReLU) "
        "and 0.10 (swish) off the diagonal, and fig9 keeps 4 of 18 claims. With no more units than inputs the nets do "
        "not come near a rotation symmetry (a ReLU net needs two units for a direction); not examined further",
    ),
    Setting(
        "learning rate, batch",
        "0.08 and 200 for 1,000 (tanh) or 1,750 steps (quick), 0.02 and 50 for the given 10,000 steps (paper)",
        "eta/S, which sets how far the noise keeps the matrices from alignment, is the same; quick has 40 or 70 % of "
        "paper's relaxation times (eta^2 k / S); both methods run for the same steps",
    ),
    Setting(
        "GD's loss",
        "2,000 inputs, noiseless labels",
        "label noise has mean zero: same gradient; with 400 inputs GD fits those inputs (a variation above)",
    ),
)
EXPLORATORY = (
    "These nets have no exact rotation symmetry, so alignment is approximate and the claim is a correlation, not an "
    "equality. The thresholds 0.9 (SGD), 0.75 (GD) and 0.25 (off the diagonal) were set after a first run, in which GD "
    "descended on 300 or 400 samples and for a seventh of SGD's steps; with 2,000 samples and equal steps the last two "
    "fail, and stand as failing. The claims on the noisy output's share were added then, to find out why; their "
    "threshold is the geometric mean of the values at alignment and at norm balance, written down before they were "
    "measured. That off the diagonal SGD exceeds 0.85 was added after a run (0.9). Learning rate and batch of the "
    "quick scale were both raised by four, for GD's sake (fewer steps), after a look at how SGD's correlation settles. "
    "Two settings tried for fig9 were dropped: 1,000 steps (swish had not settled: 0.875 +- 0.014, failing against "
    "0.9), and batch 100 (with twice the eta/S ReLU's correlation off the diagonal is 0.828 +- 0.004, failing against "
    "0.85); 1,750 steps at batch 200 are the relaxation times of the earlier 7,000 at 0.02 and 50."
)
VARIATIONS: Mapping[str, Mapping[str, Any]] = {
    "hidden width 40": {"width": 40},
    "learning rate 0.056, batch 100": {"lr": 0.056, "batch": 100},
    "GD on 400 inputs": {"population": 400},
}
