"""Section 5.4: a loss with a symmetry-breaking term of strength zeta."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

from noetherflow.report import style
from noetherflow_paper.experiment import (
    Coarser,
    Experiment,
    Results,
    Setting,
    Verdict,
    from_difference,
    from_seeds,
    generator,
    plain,
)
from noetherflow_paper.records import Config
from noetherflow_paper.simulate import METHODS, LinearNet, MethodPoint, Params, checkpoints, simulate


@dataclass(frozen=True, kw_only=True)
class ApproxConfig(Config):
    """The net, the `preferred` size of U, the sizes it starts from, and the strengths of the asymmetric term."""

    d: int = 8
    lr: float = 0.02
    batch: int = 16
    preferred: float = 2.5
    starts: tuple[float, ...] = (0.6, 4.0)
    log10_zetas: tuple[float, ...] = (-6, -5, -4, -3.5, -3, -2.5, -2, -1)
    steps: int
    seeds: int


SCALES = {
    "quick": ApproxConfig(lr=0.01, steps=40_000, seeds=6),
    "paper": ApproxConfig(lr=0.005, steps=200_000, seeds=16),
}


@dataclass(frozen=True, eq=False)
class Broken:
    """`net`'s loss plus `zeta / (2 d) (||U||_F^2 - d preferred)^2`; `zeta` is `[R]`."""

    net: LinearNet
    zeta: Tensor
    preferred: float

    def _extra(self, params: Params) -> Params:
        w, u = params
        d = u.shape[-2]
        pull = 2 * self.zeta * (u.square().sum((1, 2)) / d - self.preferred)
        return [torch.zeros_like(w), pull[:, None, None] * u]

    def minibatch_gradient(self, params: Params, rng: torch.Generator) -> Params:
        return [a + b for a, b in zip(self.net.minibatch_gradient(params, rng), self._extra(params), strict=True)]

    def mean_gradient(self, params: Params) -> Params:
        return [a + b for a, b in zip(self.net.mean_gradient(params), self._extra(params), strict=True)]

    def gaussian_noise(self, params: Params, rng: torch.Generator) -> Params:
        return self.net.gaussian_noise(params, rng)


def predicted(zeta: float, config: ApproxConfig) -> float:
    """`p = ||U||^2 / d` where the Noether flow and the preference balance.

    `zeta (p - preferred) p = (eta / S) d (1/p - p)` for unit covariances and `U U^T = p I`, `W W^T = I / p`.
    """
    strength = config.lr * config.d / config.batch
    balance = lambda p: strength * (1 / p - p) - zeta * (p - config.preferred) * p
    return float(brentq(balance, 0.01, 100))


def points(config: ApproxConfig) -> list[MethodPoint]:
    """SGD and GD; all zetas and starts are replicas of one run."""
    return [MethodPoint(name=m, method=m) for m in METHODS]


def compute(config: ApproxConfig, point: MethodPoint) -> dict[str, Any]:
    """`||U||^2 / d` averaged over the last third, `[zeta, start, seeds]`."""
    zetas, starts, d = 10.0 ** np.asarray(config.log10_zetas, dtype=float), config.starts, config.d
    seeds = config.seeds if point.name == "sgd" else 1
    eye = torch.eye(d, dtype=torch.float64)
    zeta = torch.as_tensor(zetas).repeat_interleave(len(starts) * seeds)
    p = torch.tensor(starts, dtype=torch.float64).repeat_interleave(seeds).repeat(len(zetas))[:, None, None]
    problem = Broken(LinearNet.of(eye, eye, eye, config.batch), zeta, config.preferred)
    record = lambda params: {"p": params[1].square().sum((1, 2)) / d}
    run = simulate(
        problem,
        [eye / p.sqrt(), p.sqrt() * eye],
        config.steps,
        config.lr,
        generator(8),
        record,
        at=checkpoints(config.steps, 90),
        method=point.method,
    )
    values = run.records["p"]
    return plain({"p": values[-30:].mean(0).reshape(len(zetas), len(starts), seeds)})


def plot(results: Results[ApproxConfig, MethodPoint]) -> Any:
    """End point against zeta."""
    fig, (ax,) = style.figure(1, width=8.0, height=3.8)
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
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return fig


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
        "||U||^2 = 2.5 d; two starts on the orbit, learning rate 0.01, batch 16."
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
