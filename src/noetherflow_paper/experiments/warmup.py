"""Beyond the paper: the length of a warmup predicted from one measurement."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from noetherflow.core.settings import SGDConfig
from noetherflow.report import style
from noetherflow_paper.experiment import Coarser, Experiment, Results, Setting, generator, plain
from noetherflow_paper.rank_one import RankOneNet
from noetherflow_paper.records import Config, ExperimentPoint
from noetherflow_paper.simulate import Params, normal, simulate
from noetherflow_paper.theory import finite_step_gammas, orbit_flow
from noetherflow_paper.verdict import Verdict, from_counts, from_seeds


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
    lengths: tuple[int, ...] = tuple(range(0, 6001, 125))
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


SCALES = {"quick": WarmupConfig(seeds=128), "paper": WarmupConfig(seeds=512)}


def points(config: WarmupConfig) -> list[WarmupPoint]:
    """One point per label noise and high learning rate."""
    return [WarmupPoint(name=f"noise {c.noise:g}, rate {c.high:g}", noise=c.noise, high=c.high) for c in config.cases]


def stable_norm(config: WarmupConfig, high: float) -> float:
    """`||U||^2` up to which SGD at the rate `high` is stable in the second moment.

    With x Gaussian, the error along U's direction is multiplied by `1 - eta H_B`, `H_B = 2 ||U||^2 X X^T / S`, and
    `E[(1 - eta H_B)^2] < 1` where `eta 2 ||U||^2 (1 + (d + 1) / S) < 2`. Full-batch descent needs `eta 2 ||U||^2 < 2`.
    """
    return 1 / (high * (1 + (config.d + 1) / config.batch))


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


def advised(results: Results[WarmupConfig, WarmupPoint], point: WarmupPoint) -> float:
    """The length of warmup after which the forecast of `||U||^2` is below `stable_norm`."""
    forecast, fine = results.array(point.name, "forecast"), results.array(point.name, "fine")
    return float(np.interp(-stable_norm(results.config, point.high), -forecast, fine))


def tested(results: Results[WarmupConfig, WarmupPoint], length: float) -> int:
    """The index of the shortest tested warmup that is at least `length`; the last where none is."""
    lengths = np.asarray(results.config.lengths, dtype=float)
    return min(int(np.searchsorted(lengths, length)), len(lengths) - 1)


def crossing(results: Results[WarmupConfig, WarmupPoint], point: WarmupPoint) -> np.ndarray:
    """Steps after which the measured `||U||^2` is below `stable_norm`, per seed."""
    lengths, limit = np.asarray(results.config.lengths, dtype=float), stable_norm(results.config, point.high)
    return np.array([np.interp(-limit, -u2, lengths) for u2 in results.array(point.name, "u2").T])


def plot(results: Results[WarmupConfig, WarmupPoint]) -> Any:
    """Forecast and measured `||U||^2` with the stability limit, and divergence by length of warmup."""
    fig, (norm, failing) = style.figure(2, width=5.2)
    lengths = np.asarray(results.config.lengths, dtype=float)
    looks = zip((style.SGD, style.ACCENT, style.SDE), (5.0, 1.6, 1.6), (3.5, 1.2, 1.2), strict=True)
    for (point, _), (color, width, thin) in zip(results.points, looks, strict=True):
        name = point.name
        predicted = advised(results, point)
        style.band(norm, lengths, results.array(name, "u2"), color, name, lw=width)
        norm.plot(results.array(name, "fine"), results.array(name, "forecast"), "--", color=style.THEORY, lw=1)
        norm.axhline(stable_norm(results.config, point.high), color=color, ls=":", lw=thin)
        style.band(failing, lengths, results.array(name, "failed"), color, name, marker="o", ms=4)
        failing.axvline(predicted, color=color, ls="--")
    norm.plot([], [], "--", color=style.THEORY, lw=1, label="forecast from one point")
    norm.plot([], [], ":", color=style.MUTED, label="stable below (by case)")
    norm.set(xlabel="warmup steps", ylabel=r"$\|U\|^2$", title="the flow lowers the sharpness")
    failing.set(
        xlabel="warmup steps",
        ylabel="fraction that diverges at the high rate",
        title="how long is long enough (dashed: advised)",
    )
    norm.legend(fontsize=8)
    return fig


def verdicts(results: Results[WarmupConfig, WarmupPoint]) -> list[Verdict]:
    """When the norm crosses the limit of stability; who diverges after the advised warmup and after a quarter of it."""
    out = []
    for point, _ in results.points:
        length = advised(results, point)
        failed = results.array(point.name, "failed") > 0.5
        long, short = failed[tested(results, length)], failed[tested(results, length / 4)]
        named = f"{point.name}: fraction that diverges after"
        label = f"{point.name}: steps until ||U||^2 is below the limit of stability"
        out += [
            from_seeds(label, length, crossing(results, point), order=2),
            from_counts(f"{named} the advised warmup", PROMISE, int(long.sum()), len(long), "below"),
            from_counts(f"{named} a quarter of it", PROMISE, int(short.sum()), len(short), "above"),
        ]
    return out


PROMISE = 0.05
"""The fraction of runs that may diverge after a warmup of the advised length."""


def larger_rate(config: WarmupConfig) -> WarmupConfig:
    """1.25 times the low rate; the lengths and their stride fall with the relaxation time."""
    lengths = tuple(round(n / 1.25**2) for n in config.lengths)
    return replace(config, low=1.25 * config.low, lengths=lengths)


EXPERIMENT = Experiment(
    id="warmup",
    title="Beyond the paper: the length of a warmup, predicted",
    statement="warmup",
    coarser=Coarser(1.25, larger_rate),
    setup=(
        "Rank-one factorisation as in fig4 (d = 40, batch 40) from Kaiming's initialisation. The forecast integrates "
        "the Noether flow from the first solution; the advised warmup ends where the forecast ||U||^2 makes the high "
        "rate stable with minibatch noise, in the second moment."
    ),
    scales=SCALES,
    points=points,
    compute=compute,
    plot=plot,
    verdicts=verdicts,
    settings=(
        Setting("lengths tested", "every 125 steps", "the advised length is rounded up to the next tested one"),
        Setting(
            "what counts as divergence",
            "|U W - V|^2 above ten times |V|^2 within 400 steps at the high rate",
            "variations above: a threshold of 100, and 1,000 steps",
        ),
        Setting(
            "the stability rule",
            "2 eta ||U||^2 (1 + (d + 1) / S) < 2",
            "second moments of one direction; the full-batch rule 2 eta ||U||^2 < 2 let up to a third of the runs "
            "diverge at small batches",
        ),
    ),
    exploratory=(
        "The full-batch rule was used first and judged by the shortest sufficient length, within 25 %. The rule with "
        "minibatch noise and its promise of 5 % were written down before their first run."
    ),
    variations={
        "divergence threshold 100": {"spike": 100.0},
        "1,000 steps at the high rate": {"test_steps": 1000},
    },
    beyond=True,
)
