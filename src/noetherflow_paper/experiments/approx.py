"""Section 5.4: a loss with a symmetry-breaking term of strength zeta."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

from noetherflow.report import style
from noetherflow_paper.experiment import Coarser, Experiment, Results, Setting, generator, plain
from noetherflow_paper.records import Config
from noetherflow_paper.simulate import METHODS, LinearNet, Method, MethodPoint, Params, checkpoints, simulate
from noetherflow_paper.verdict import Verdict, from_difference, from_seeds


@dataclass(frozen=True, kw_only=True)
class ApproxConfig(Config):
    """The net, the `preferred` size of U, the sizes it starts from, and the strengths of the asymmetric term."""

    d: int = 8
    lr: float = 0.02
    batch: int = 16
    preferred: float = 2.5
    starts: tuple[float, ...] = (0.6, 4.0)
    log10_zetas: tuple[float, ...] = (-6, -5, -4, -3.5, -3, -2.5, -2, -1)
    depth: int = 3
    kappas: tuple[float, ...] = (0.01, 0.3, 1.0, 3.0, 10.0)
    steps: int
    seeds: int


SCALES = {
    "quick": ApproxConfig(lr=0.01, steps=40_000, seeds=6),
    "paper": ApproxConfig(lr=0.005, steps=200_000, seeds=16),
}


@dataclass(frozen=True, eq=False)
class Broken:
    """`net`'s loss plus an asymmetric term, given by its gradient."""

    net: LinearNet
    asymmetric: Callable[[Params], Params]

    def minibatch_gradient(self, params: Params, rng: torch.Generator) -> Params:
        return [a + b for a, b in zip(self.net.minibatch_gradient(params, rng), self.asymmetric(params), strict=True)]

    def mean_gradient(self, params: Params) -> Params:
        return [a + b for a, b in zip(self.net.mean_gradient(params), self.asymmetric(params), strict=True)]

    def gaussian_noise(self, params: Params, rng: torch.Generator) -> Params:
        return self.net.gaussian_noise(params, rng)


def preference(zeta: Tensor, preferred: float) -> Callable[[Params], Params]:
    """The gradient of `zeta / (2 d) (||U||_F^2 - d preferred)^2` by `[W, U]`; `zeta` is `[R]`."""

    def gradient(params: Params) -> Params:
        w, u = params
        d = u.shape[-2]
        pull = 2 * zeta * (u.square().sum((1, 2)) / d - preferred)
        return [torch.zeros_like(w), pull[:, None, None] * u]

    return gradient


def shrinking_last(zeta: Tensor) -> Callable[[Params], Params]:
    """The gradient of `zeta / 2 ||W_D||_F^2`: decay of the last layer only; `zeta` is `[R]`."""

    def gradient(params: Params) -> Params:
        return [*(torch.zeros_like(w) for w in params[:-1]), zeta[:, None, None] * params[-1]]

    return gradient


def predicted(zeta: float, config: ApproxConfig) -> float:
    """`p = ||U||^2 / d` where the Noether flow and the preference balance.

    `zeta (p - preferred) p = (eta / S) d (1/p - p)` for unit covariances and `U U^T = p I`, `W W^T = I / p`.
    """
    strength = config.lr * config.d / config.batch
    balance = lambda p: strength * (1 / p - p) - zeta * (p - config.preferred) * p
    return float(brentq(balance, 0.01, 100))


def predicted_deep(kappa: float, depth: int) -> float:
    """`q = ||W_D||^2 / d` where the Noether flow and the decay of the last layer balance.

    For unit covariances and layers that are `q_i^1/2` times rotations, `q_1 ... q_D = 1`, noise moves `q_i` by
    `(4 eta^2 d / S) / q_i` a step and the decay `q_D` by `-2 eta zeta q_D`. With `kappa = zeta S / (2 eta d)` the other
    layers' common `q_1 = q^(-1 / (D - 1))` fulfils `1 / q_1 = 1 / q - kappa q`.
    """
    others = lambda q: q ** (-1 / (depth - 1))
    return float(brentq(lambda q: 1 / others(q) - 1 / q + kappa * q, 1e-3, 1))


def points(config: ApproxConfig) -> list[MethodPoint]:
    """SGD and GD on the two-layer net, SGD on the deep one; all zetas and starts are replicas of one run."""
    return [*(MethodPoint(name=m, method=m) for m in METHODS), MethodPoint(name="deep", method="sgd")]


def compute(config: ApproxConfig, point: MethodPoint) -> dict[str, Any]:
    """`||U||^2 / d` (two layers) or `||W_D||^2 / d` (deep) over the last third, `[zeta, start, seeds]`."""
    return deep(config) if point.name == "deep" else two_layer(config, point)


def two_layer(config: ApproxConfig, point: MethodPoint) -> dict[str, Any]:
    """`||U||^2 / d`, with a preferred value."""
    zetas, starts, d = 10.0 ** np.asarray(config.log10_zetas, dtype=float), config.starts, config.d
    seeds = config.seeds if point.name == "sgd" else 1
    zeta = torch.as_tensor(zetas).repeat_interleave(len(starts) * seeds)
    p = torch.tensor(starts, dtype=torch.float64).repeat_interleave(seeds).repeat(len(zetas))[:, None, None]
    eye = torch.eye(d, dtype=torch.float64)
    start = [eye / p.sqrt(), p.sqrt() * eye]
    found = ends(config, preference(zeta, config.preferred), start, generator(8), point.method)
    return plain({"p": found.reshape(len(zetas), len(starts), seeds)})


def deep(config: ApproxConfig) -> dict[str, Any]:
    """`||W_D||^2 / d`, with decay of the last layer; starts with `q_D` of `config.starts`, the others equal."""
    starts, seeds, depth = config.starts, config.seeds, config.depth
    kappas = torch.tensor(config.kappas, dtype=torch.float64).repeat_interleave(len(starts) * seeds)
    zeta = kappas * 2 * config.lr * config.d / config.batch
    q = torch.tensor(starts, dtype=torch.float64).repeat_interleave(seeds).repeat(len(config.kappas))[:, None, None]
    eye = torch.eye(config.d, dtype=torch.float64)
    start = [q ** (-0.5 / (depth - 1)) * eye] * (depth - 1) + [q.sqrt() * eye]
    found = ends(config, shrinking_last(zeta), start, generator(9), "sgd")
    return plain({"p": found.reshape(len(config.kappas), len(starts), seeds)})


def ends(
    config: ApproxConfig,
    asymmetric: Callable[[Params], Params],
    start: Params,
    rng: torch.Generator,
    method: Method,
) -> Tensor:
    """`||W_D||^2 / d` averaged over the last third of a training, `[R]`."""
    d = config.d
    eye = torch.eye(d, dtype=torch.float64)
    problem = Broken(LinearNet.of(eye, eye, eye, config.batch), asymmetric)
    record = lambda params: {"p": params[-1].square().sum((1, 2)) / d}
    marks = checkpoints(config.steps, 90)
    run = simulate(problem, start, config.steps, config.lr, rng, record, at=marks, method=method)
    return run.records["p"][-30:].mean(0)


def plot(results: Results[ApproxConfig, MethodPoint]) -> Any:
    """End point against zeta."""
    fig, (ax, deeper) = style.figure(2, width=5.6, height=3.8)
    c = results.config
    zetas = 10.0 ** np.asarray(c.log10_zetas, dtype=float)
    fine = np.logspace(np.log10(zetas[0]), np.log10(zetas[-1]), 200)
    ax.plot(fine, [predicted(z, c) for z in fine], color=style.THEORY, ls="--", label="theory: flow against preference")
    ax.axhline(1, color=style.MUTED, ls=":", label="noise equilibrium")
    ax.axhline(c.preferred, color=style.ACCENT, ls=":", label="minimum of the asymmetric term")
    for i, (start, marker) in enumerate(zip(c.starts, "o^", strict=True)):
        style.dots(ax, zetas, results.array("sgd", "p")[:, i], style.SGD, f"SGD from {start}", marker)
        style.dots(ax, zetas, results.array("gd", "p")[:, i], style.GD, f"GD from {start}", marker, mfc="none")
    ax.axvline(c.lr * c.d / c.batch, color=style.MUTED, lw=0.8)
    ax.text(c.lr * c.d / c.batch * 1.15, 3.6, r"$\zeta=\eta d/S$", color=style.MUTED, fontsize=8)
    ax.set(
        xscale="log",
        xlabel=r"strength of the asymmetric term $\zeta$",
        ylabel=r"$\|U\|^2/d$ at the end",
        title="small and large breaking of the symmetry",
    )
    ax.set_ylim(0, 1.6 * max(c.starts))
    ax.legend(fontsize=7.5, ncols=2, loc="upper left")
    _plot_deep(deeper, results)
    return fig


def _plot_deep(ax: Any, results: Results[ApproxConfig, MethodPoint]) -> None:
    """The last layer's size at the end of the deep net's training against the strength of its decay."""
    c = results.config
    fine = np.geomspace(c.kappas[0], c.kappas[-1], 100)
    ax.plot(fine, [predicted_deep(k, c.depth) for k in fine], "--", color=style.THEORY, label="theory")
    for i, (start, marker) in enumerate(zip(c.starts, "o^", strict=True)):
        style.dots(ax, c.kappas, results.array("deep", "p")[:, i], style.SGD, f"SGD from {start}", marker)
    ax.axhline(1, color=style.MUTED, ls=":", label="noise equilibrium")
    ax.set(
        xscale="log",
        xlabel=r"strength of the decay $\kappa=\zeta S/(2\eta d)$",
        ylabel=rf"$\|W_{c.depth}\|^2/d$ at the end",
        title=f"depth {c.depth}, decay of the last layer only",
    )
    ax.legend(fontsize=8)


def verdicts(results: Results[ApproxConfig, MethodPoint]) -> list[Verdict]:
    """The two limits, the crossover, and GD."""
    c, sgd, gd = results.config, results.array("sgd", "p"), results.array("gd", "p")
    zetas = 10.0 ** np.asarray(c.log10_zetas, dtype=float)

    means = sgd.mean(1)
    out = [
        from_seeds(f"zeta = {z:.1e}: balance of flow and preference (mean of both starts)", predicted(z, c), p, order=1)
        for z, p in zip(zetas, means, strict=True)
    ]
    for p, target, claim in (
        (means[0], 1.0, "the smallest zeta: relative distance from the noise equilibrium"),
        (means[-1], c.preferred, "the largest zeta: relative distance from the minimum of the asymmetric term"),
    ):
        out.append(from_seeds(claim, 0.03, np.abs(p / target - 1), relation="below"))
    out += [
        from_seeds(
            f"depth {c.depth}, decay of the last layer only, kappa = {kappa:g}: ||W_{c.depth}||^2 / d (mean of "
            f"both starts)",
            predicted_deep(kappa, c.depth),
            q.mean(0),
            order=1,
        )
        for kappa, q in zip(c.kappas, results.array("deep", "p"), strict=True)
    ]
    logs = np.log(sgd)
    worst = logs[np.abs(np.diff(logs.mean(-1))).argmax()]
    out.append(
        from_difference(
            "SGD, largest log ratio between the two starts, all zeta",
            0,
            worst[1],
            worst[0],
            0.05,
            relative=False,
            reason="what is left of the start",
        )
    )
    out.append(
        Verdict(
            f"GD at zeta = {zetas[0]:.0e}: end from the larger start / from the smaller",
            3,
            float(gd[0, 1, 0] / gd[0, 0, 0]),
            relation="above",
        )
    )
    return out


def larger_rate(config: ApproxConfig) -> ApproxConfig:
    """Twice the rate and twice every zeta, so that noise and preference keep their proportion."""
    zetas = tuple(z + math.log10(2) for z in config.log10_zetas)
    return replace(config, lr=2 * config.lr, steps=config.steps // 4, log10_zetas=zetas)


EXPERIMENT = Experiment(
    id="approx",
    title="An approximate symmetry: noise wins below zeta = eta d / S, the loss above",
    statement="approximate",
    coarser=Coarser(2, larger_rate),
    setup=(
        "Two-layer linear net, d = 8, unit covariances, plus zeta/(2d) (||U||^2 - 2.5 d)^2, which prefers "
        "||U||^2 = 2.5 d; two starts on the orbit, learning rate 0.01, batch 16. Right: depth 3, zeta / 2 "
        "||W_3||^2, decay "
        "of one layer, which has no minimum on the orbit."
    ),
    scales=SCALES,
    points=points,
    compute=compute,
    plot=plot,
    verdicts=verdicts,
    settings=(
        Setting(
            "the asymmetric term",
            "zeta/(2d) (||U||^2 - 2.5 d)^2, with its minimum on the orbit",
            "the two limits do not depend on its form, the crossover does (predicted for this form)",
        ),
        Setting("size, learning rate, batch", "d = 8, 0.01, 16", "enter through eta d / S (variations above)"),
    ),
    exploratory=(
        "The values of zeta were placed after a first run so as to cover the crossover, the smallest so small and the "
        "largest so large that the limits are reached. The mean of the two starts was judged first, then each."
    ),
    variations={
        "preferred point below (0.4)": {"preferred": 0.4},
        "batch 32, twice the steps": {"batch": 32, "steps": 80_000},
    },
)
