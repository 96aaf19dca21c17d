"""Beyond the paper: the length of a warmup predicted from one measurement."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from noetherflow.core.settings import SGDConfig
from noetherflow.report import style
from noetherflow_paper.experiment import (
    Experiment,
    Results,
    Setting,
    Verdict,
    from_seeds,
    generator,
    plain,
)
from noetherflow_paper.rank_one import RankOneNet
from noetherflow_paper.records import Config, ExperimentPoint
from noetherflow_paper.simulate import Params, normal, simulate
from noetherflow_paper.theory import finite_step_gammas, orbit_flow


@dataclass(frozen=True, kw_only=True)
class WarmupCase:
    """A label noise and the high learning rate after the warmup."""

    noise: float
    high: float


@dataclass(frozen=True, kw_only=True)
class WarmupConfig(Config):
    """The factorisation, the `lengths` of warmup at the `low` rate, and what counts as divergence (`spike`)."""

    d: int = 40
    batch: int = 40
    size: float = 12.0
    low: float = 0.002
    lengths: tuple[int, ...] = tuple(range(0, 4501, 125))
    test_steps: int = 400
    spike: float = 10.0
    cases: tuple[WarmupCase, ...] = (
        WarmupCase(noise=5.0, high=0.02),
        WarmupCase(noise=7.0, high=0.02),
        WarmupCase(noise=5.0, high=0.03),
    )
    seeds: int


@dataclass(frozen=True, kw_only=True)
class WarmupPoint(ExperimentPoint):
    """One of the cases."""

    noise: float
    high: float


SCALES = {"quick": WarmupConfig(seeds=64), "paper": WarmupConfig(seeds=512)}


def points(config: WarmupConfig) -> list[WarmupPoint]:
    """One point per label noise and high learning rate."""
    return [WarmupPoint(name=f"noise {c.noise:g}, rate {c.high:g}", noise=c.noise, high=c.high) for c in config.cases]


def stable_norm(high: float) -> float:
    """`||U||^2` at which the largest curvature `2 ||U||^2` meets the stability limit `2 / eta`."""
    return 1 / high


def compute(config: WarmupConfig, point: WarmupPoint) -> dict[str, Any]:
    """Per warmup length and seed whether the high rate then diverges; forecast of `||U||^2` from step 0's solution."""
    d, seeds, batch = config.d, config.seeds, config.batch
    rng = generator(41)
    a, b = (v / v.norm() for v in normal((2, d), rng))
    eye = torch.eye(d, dtype=torch.float64)
    problem = RankOneNet(a, b, config.size, point.noise, batch)
    u0, w0 = math.sqrt(2) * normal((1, d, 1), rng), math.sqrt(2 / d) * normal((1, 1, d), rng)
    settled = simulate(problem, [w0, u0], 2000, config.low, rng, method="gd").params
    snapshots: list[Params] = []

    def keep(params: Params) -> dict[str, Tensor]:
        snapshots.append([p.clone() for p in params])
        return {"u2": params[1].square().sum((1, 2))}

    start = [p.expand(seeds, -1, -1) for p in settled]
    slow = simulate(problem, start, config.lengths[-1], config.low, generator(42), keep, at=config.lengths)
    all_starts = [torch.cat([s[i] for s in snapshots]) for i in range(2)]

    error = lambda params: {"error": problem.error(params) / config.size**2}
    fast = simulate(problem, all_starts, config.test_steps, point.high, generator(43), error, at=config.test_steps)
    peak = fast.records["error"].nan_to_num(nan=torch.inf).amax(0)
    failed = ~(peak < config.spike)
    fine = list(range(0, config.lengths[-1] + 1, 50))
    sgd = SGDConfig(config.low, batch)
    gammas = finite_step_gammas(eye, point.noise**2 * eye, sgd)
    us, _ = orbit_flow(settled[1], settled[0], gammas, sgd, fine)
    return plain(
        {
            "failed": failed.double().reshape(-1, seeds),
            "u2": slow.records["u2"],
            "fine": fine,
            "forecast": [float(u.square().sum()) for u in us],
        }
    )


def needed(results: Results[WarmupConfig, WarmupPoint], point: WarmupPoint) -> tuple[np.ndarray, float]:
    """Shortest sufficient warmup per seed (halfway between the last failing and the next length), and predicted.

    Not-a-number for seeds that fail after the longest warmup too.
    """
    lengths = np.asarray(results.config.lengths, dtype=float)
    failed = results.array(point.name, "failed") > 0.5
    stride = lengths[1] - lengths[0]
    measured = np.array([(lengths[column].max() + stride / 2) if column.any() else 0.0 for column in failed.T])
    measured[failed[-1]] = np.nan
    forecast, fine = results.array(point.name, "forecast"), results.array(point.name, "fine")
    limit = stable_norm(point.high)
    return measured, float(np.interp(-limit, -forecast, fine))


def plot(results: Results[WarmupConfig, WarmupPoint]) -> Any:
    """Forecast and measured `||U||^2` with the stability limit, and divergence by length of warmup."""
    fig, (norm, failing) = style.figure(2, width=5.2)
    lengths = np.asarray(results.config.lengths, dtype=float)
    looks = zip((style.SGD, style.ACCENT, style.SDE), (5.0, 1.6, 1.6), (3.5, 1.2, 1.2), strict=True)
    for (point, _), (color, width, thin) in zip(results.points, looks, strict=True):
        name = point.name
        _, predicted = needed(results, point)
        style.band(norm, lengths, results.array(name, "u2"), color, name, lw=width)
        norm.plot(results.array(name, "fine"), results.array(name, "forecast"), "--", color=style.THEORY, lw=1)
        norm.axhline(stable_norm(point.high), color=color, ls=":", lw=thin)
        style.band(failing, lengths, results.array(name, "failed"), color, name, marker="o", ms=4)
        failing.axvline(predicted, color=color, ls="--")
    norm.plot([], [], "--", color=style.THEORY, lw=1, label="forecast from one point")
    norm.plot([], [], ":", color=style.MUTED, label="stable below (by case)")
    norm.set(xlabel="warmup steps", ylabel=r"$\|U\|^2$", title="the flow lowers the sharpness")
    failing.set(
        xlabel="warmup steps",
        ylabel="fraction that diverges at the high rate",
        title="how long is long enough (dashed: predicted)",
    )
    norm.legend(fontsize=8)
    return fig


def verdicts(results: Results[WarmupConfig, WarmupPoint]) -> list[Verdict]:
    """Needed against predicted length of warmup."""
    out = []
    for point, _ in results.points:
        measured, predicted = needed(results, point)
        out.append(
            from_seeds(
                f"shortest sufficient warmup (steps), {point.name}", predicted, measured, 0.25, analysis=ANALYSIS
            )
        )
    return out


ANALYSIS = (
    "the place where the norm crosses 1 / eta is forecast well (left panel) at leading and first order in eta; 2 / eta "
    "against the largest curvature is a rule for full-batch descent, not a theorem for SGD, and lengths are tested "
    "every 125 steps only"
)

EXPERIMENT = Experiment(
    id="warmup",
    title="Beyond the paper: the length of a warmup, predicted",
    setup=(
        "Rank-one factorisation as in fig4 (d = 40, batch 40) from Kaiming's initialisation. The forecast integrates "
        "the Noether flow from the first solution; the high rate counts as stable once the largest curvature 2 "
        "||U||^2 is below 2 / eta."
    ),
    scales=SCALES,
    points=points,
    compute=compute,
    plot=plot,
    verdicts=verdicts,
    settings=(
        Setting("lengths tested", "every 125 steps", "limits the resolution of a length to about 60 steps"),
        Setting(
            "what counts as divergence",
            "|U W - V|^2 above ten times |V|^2 within 400 steps at the high rate",
            "variations above: a threshold of 100, and 1,000 steps",
        ),
        Setting("the stability rule", "2 ||U||^2 < 2 / eta", "full-batch descent's; no theorem for SGD"),
    ),
    exploratory=(
        "Both rules (stability, divergence), the forecast and the tolerance of 25 % were settled after runs. With "
        "lengths every 250 steps and the leading-order flow all three lengths had failed (predicted 1308, 667, 2520; "
        "measured 875, 438, 1938, 4 seeds); the flow with R_B at first order in eta was taken over from fig2 and fig8 "
        "then. With 8 seeds two of the three error bars were too wide; the number of seeds was "
        "then raised to 64 (with minibatches from the cheaper exact method, of the same law); no rule was changed. "
        "Lengths up to 4,500 replaced 3,000 after a second review: 5 of 64 seeds had still failed at the longest."
    ),
    variations={
        "divergence threshold 100": {"spike": 100.0},
        "1,000 steps at the high rate": {"test_steps": 1000},
    },
    beyond=True,
)
