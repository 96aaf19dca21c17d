"""Figure 4: warmup. Gradient noise lowers the sharpness at a small rate, then a large rate is stable."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from noetherflow.report import style
from noetherflow_paper import closed_form as cf
from noetherflow_paper.experiment import Experiment, Results, Setting, generator, plain
from noetherflow_paper.rank_one import RankOneNet
from noetherflow_paper.records import Config, ExperimentPoint
from noetherflow_paper.simulate import METHODS, Method, Params, checkpoints, normal, simulate
from noetherflow_paper.verdict import Verdict, from_counts, from_ratio, from_seeds


@dataclass(frozen=True, kw_only=True)
class Fig4Config(Config):
    """The factorisation, initial variances of `gain / fan_in`, the rates before (`low`) and after (`high`) a `warmup`,
    and the steps after it.
    """

    d: int = 128
    batch: int = 128
    noise: float = 8.0
    size: float = 40.0
    gain: float = 2.0
    low: float = 0.001
    high: float = 0.008
    warmup: int = 5000
    after: int
    seeds: int


@dataclass(frozen=True, kw_only=True)
class Fig4Point(ExperimentPoint):
    """One method under one schedule of the learning rate (`direct` or `warmup`)."""

    method: Method
    schedule: str


SCALES = {"quick": Fig4Config(after=2000, seeds=16), "paper": Fig4Config(after=5000, seeds=32)}


INITS = ("kaiming", "xavier")


def points(config: Fig4Config) -> list[Fig4Point]:
    """Direct and warmed-up training by SGD and GD; both initialisations are replicas of one run."""
    return [Fig4Point(name=f"{m} {s}", method=m, schedule=s) for m in METHODS for s in ("direct", "warmup")]


def variances(init: str, config: Fig4Config) -> tuple[float, float]:
    """`(s_W^2, s_U^2)` of U `[d, 1]`, W `[1, d]`."""
    d, gain = config.d, config.gain
    return (gain / d, gain) if init == "kaiming" else (gain / (d + 1), gain / (d + 1))


def problem(config: Fig4Config) -> RankOneNet:
    """`V = size a b^T` with random unit vectors a and b."""
    a, b = (v / v.norm() for v in normal((2, config.d), generator(1)))
    return RankOneNet(a, b, config.size, config.noise, config.batch)


def compute(config: Fig4Config, point: Fig4Point) -> dict[str, Any]:
    """Sharpness Tr H at checkpoints, `[T, init, seeds]`, null once diverged."""
    d, seeds, rng = config.d, config.seeds, generator(2)
    w0 = torch.cat([math.sqrt(variances(i, config)[0]) * normal((seeds, 1, d), rng) for i in INITS])
    u0 = torch.cat([math.sqrt(variances(i, config)[1]) * normal((seeds, d, 1), rng) for i in INITS])
    start = [w0, u0]
    eye = torch.eye(d, dtype=torch.float64)
    warm = point.schedule == "warmup"

    def rate(step: int) -> float:
        return float(config.low if warm and step < config.warmup else config.high)

    def record(params: Params) -> dict[str, Tensor]:
        return {"sharpness": cf.two_layer_hessian_trace(params[1], params[0], eye)}

    steps = config.after + (config.warmup if warm else 0)
    marks = sorted({*range(20), *np.geomspace(20, steps, 60).astype(int).tolist(), *checkpoints(steps, 100)})
    run = simulate(problem(config), start, steps, rate, generator(3), record, at=marks, method=point.method)
    shaped = run.records["sharpness"].reshape(-1, 2, seeds)
    return plain({"steps": run.steps, "sharpness": shaped, "diverged": run.diverged.double().reshape(2, seeds)})


def final_sharpness(config: Fig4Config) -> float:
    """`2 size S_end` of theory.md 10 at hidden width 1: un-halved loss, `||U||^2 = ||W||^2 = size` in place of 1."""
    return float(2 * config.size * cf.equilibrium_sharpness(config.d, 1, config.d))


def initial_sharpness(config: Fig4Config, init: str) -> float:
    """`2 S_init` of theory.md 10: un-halved loss, `Tr Sig_x = d`, hidden width 1."""
    d, (var_w, var_u) = config.d, variances(init, config)
    return 2 * cf.initial_sharpness(d, 1, var_u, var_w, d)


def plot(results: Results[Fig4Config, Fig4Point]) -> Any:
    """Sharpness against steps, up to where the first seed diverges."""
    fig, axes = style.figure(2, width=5.4)
    colors = {"kaiming": style.ACCENT, "xavier": style.SGD}
    for ax, method in zip(axes, ("sgd", "gd"), strict=True):
        for i, init in enumerate(INITS):
            for schedule, line in (("direct", ":"), ("warmup", "-")):
                values = results.array(f"{method} {schedule}", "sharpness")[:, i]
                steps, curve = results.array(f"{method} {schedule}", "steps"), values.mean(-1)
                ok = np.isfinite(curve) & (curve < 1e6)
                style.band(ax, 1 + steps[ok], values[ok], colors[init], f"{init}, {schedule}", ls=line)
                if not ok.all():
                    ax.plot(1 + steps[ok][-1], curve[ok][-1], "x", color=style.GD, ms=9, mew=2.5)
        ax.plot([], [], "x", color=style.GD, ms=9, mew=2.5, ls="none", label="diverges")
        ax.axhline(final_sharpness(results.config), color=style.THEORY, ls="--", lw=1, label="equilibrium (theory)")
        ax.axvline(results.config.warmup, color=style.MUTED, lw=0.8)
        ax.set(
            xscale="log",
            yscale="log",
            ylim=(600, 2e6),
            xlabel="1 + step",
            ylabel="sharpness Tr $H$",
            title=f"{method.upper()}: rate {results.config.low} before, {results.config.high} after the line",
        )
        ax.legend(ncols=2, fontsize=8)
    return fig


def verdicts(results: Results[Fig4Config, Fig4Point]) -> list[Verdict]:
    """Who diverges, and where the sharpness starts and ends."""
    return [*_divergence_verdicts(results), *_sharpness_verdicts(results)]


def _divergence_verdicts(results: Results[Fig4Config, Fig4Point]) -> list[Verdict]:
    """From Kaiming's starts: the warmup keeps SGD from diverging, not GD."""
    direct, warm, gd_direct, gd_warm = (
        results.array(f"{m} {s}", "diverged")[INITS.index("kaiming")] > 0
        for m in ("sgd", "gd")
        for s in ("direct", "warmup")
    )
    count = lambda kept: int(kept.sum())
    saves = "of the Kaiming starts that diverge at 0.008 from the start, the fraction that the warmup saves"
    return [
        from_counts("SGD, Kaiming, 0.008 from the start: fraction that diverges", 0.75, count(direct), len(direct)),
        from_counts("SGD, Kaiming, warmed up: fraction that diverges", 0.25, count(warm), len(warm), "below"),
        from_counts("GD, Kaiming, warmed up: fraction that diverges", 0.25, count(gd_warm), len(gd_warm)),
        from_counts(f"SGD: {saves}", 0.5, count(direct & ~warm), count(direct)),
        from_counts(f"GD: {saves}", 0.5, count(gd_direct & ~gd_warm), count(gd_direct), "below"),
    ]


AT_THE_GIVEN_RATE = (
    "theory is that of eta -> 0; at the given rate 0.008 the product of rate and sharpness is not small, and "
    "no smaller "
    "rate shows the warmup that the figure is about"
)


def _sharpness_verdicts(results: Results[Fig4Config, Fig4Point]) -> list[Verdict]:
    """At the start, after the warmup and at the end."""
    c = results.config

    def between(name: str, first: float, last: float) -> np.ndarray:
        steps = results.array(name, "steps")
        return results.array(name, "sharpness")[(steps >= first) & (steps <= last)]

    whole = c.warmup + c.after
    sgd = between("sgd warmup", whole - c.after / 2, whole).mean(0)
    gd, early = between("gd warmup", 0, c.warmup)[-1], between("gd warmup", c.warmup / 5, whole)[0]
    start = results.array("sgd direct", "sharpness")[0]
    return [
        *(
            from_seeds(f"sharpness at the {init.capitalize()} start", initial_sharpness(c, init), at)
            for init, at in zip(INITS, start, strict=True)
        ),
        from_ratio("SGD: final sharpness from Kaiming / from Xavier", 1, sgd[0], sgd[1]),
        from_seeds("SGD: final sharpness, Kaiming start", final_sharpness(c), sgd[0], 0.1, reason=AT_THE_GIVEN_RATE),
        from_seeds("SGD: final sharpness, Xavier start", final_sharpness(c), sgd[1], 0.1, reason=AT_THE_GIVEN_RATE),
        from_ratio(
            "GD at the small rate: sharpness from Kaiming / from Xavier after 5000 steps",
            1.5,
            gd[0],
            gd[1],
            relation="above",
        ),
        from_seeds(
            "GD at the small rate: sharpness at step 5000 / at step 1000, Kaiming",
            1,
            gd[0] / early[0],
            0.02,
            reason="gradient descent moves along the orbit at second order in eta",
        ),
    ]


EXPERIMENT = Experiment(
    id="fig4",
    title="Warmup works because the noise flattens the landscape first",
    statement="warmup",
    setup=(
        "Rank-one factorisation, U in R^(128 x 1), W in R^(1 x 128), y = V x + eps with V of norm 40, label noise of "
        "standard deviation 8, batch 128; learning rate 0.008 from the start, or 0.001 for 5000 steps and then 0.008 "
        "(given)."
    ),
    scales=SCALES,
    points=points,
    compute=compute,
    plot=plot,
    verdicts=verdicts,
    settings=(
        Setting(
            "dimension, target, noise, batch",
            "d = 128, |V| = 40, noise 8, batch 128",
            "chosen so that one relaxation time at the small rate (about 3,900 steps) fits in the given warmup; with "
            "less noise the warmup would have to be longer in proportion to 1/noise^2",
        ),
        Setting(
            "minibatches", "drawn through exact sufficient statistics", "none: same law, tested against drawn samples"
        ),
        Setting(
            "Xavier and Kaiming",
            "variances 2/(fan_in + fan_out) and 2/fan_in, twice those of the paper's text",
            "with the text's, Kaiming's curvature 2 ||U||^2 is as far above 2 / 0.008 at d = 256: a variation",
        ),
    ),
    exploratory=(
        "Target size and noise were settled after trying several. The first dimension, 80, was found too small when "
        "the seeds were raised from 4 to 16: only 69 +- 12 % of the direct Kaiming runs diverged there (some are "
        "caught as U shrinks). d = 128 follows from a rule fixed then: Kaiming's curvature 2 ||U||^2 = 4 d at least "
        "twice the limit 2 / 0.008. The claims on GD's divergence and on the starts were added after a review, with "
        "these runs known (GD from Kaiming, quick: 7 of 16 diverge directly, 10 of 16 warmed up); so were the "
        "thresholds for fractions, which replace an exact 1 and 0."
    ),
    variations={
        "noise 7 (slower flow)": {"noise": 7.0},
        "noise 11 (faster flow)": {"noise": 11.0},
        "d = 80, batch 80 (the first choice)": {"d": 80, "batch": 80},
        "the text's variances 1/(fan_in + fan_out) and 1/fan_in, d = 256, batch 256": {
            "gain": 1.0,
            "d": 256,
            "batch": 256,
        },
    },
)
