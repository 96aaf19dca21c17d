"""Theorem 5.4: the noise equilibrium of deep linear nets, as corrected and as printed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from noetherflow.core import spd
from noetherflow.report import style
from noetherflow_paper import closed_form as cf
from noetherflow_paper.experiment import Coarser, Experiment, Results, Setting, generator, plain
from noetherflow_paper.records import Config, ExperimentPoint, changed
from noetherflow_paper.simulate import LinearNet, normal, simulate
from noetherflow_paper.verdict import Verdict, from_seeds


@dataclass(frozen=True, kw_only=True)
class Thm54Config(Config):
    """Depths, random tasks, and the training that measures drifts (`copies` replicas a seed)."""

    d: int = 4
    depths: tuple[int, ...] = (2, 3, 4, 5)
    trials: int
    lr: float
    batch: int = 4
    steps: int
    seeds: int
    copies: int


@dataclass(frozen=True, kw_only=True)
class Thm54Point(ExperimentPoint):
    """Training from the solution of a `formula`, at the rate divided by `slower`; `residuals` trains nothing."""

    formula: str = ""
    depth: int = 0
    slower: int = 1


SCALES = {
    "quick": Thm54Config(trials=24, lr=0.002, steps=150, seeds=8, copies=160),
    "paper": Thm54Config(trials=200, lr=0.001, steps=400, seeds=16, copies=1000),
}


def printed(product: Tensor, sigma_x: Tensor, sigma_eps: Tensor, depth: int) -> list[Tensor]:
    """The theorem as equation (17) prints it: `S_1 = S_D = (d / Tr S')^((D-2)/(2D)) S'^1/2`,
    middle layers `(Tr S'/d)^(1/D) U_i U_{i-1}^T`.

    Its product is `product`, but the traces of the covariances are missing: right only for `Tr Sig_x = Tr Sig_eps = d`.
    """
    left, s, right = torch.linalg.svd(spd.sqrtm(sigma_eps) @ product @ spd.sqrtm(sigma_x))
    d = s.shape[-1]
    outer = ((d / s.sum()) ** ((depth - 2) / (2 * depth)) * s.sqrt()).diag()
    middle = (s.sum() / d) ** (1 / depth) * torch.eye(d, dtype=s.dtype)
    return [outer @ right @ spd.inv_sqrtm(sigma_x), *[middle] * (depth - 2), spd.inv_sqrtm(sigma_eps) @ left @ outer]


def task(d: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A random target and random anisotropic covariances of unequal traces."""

    def covariance(scale: float) -> Tensor:
        q = torch.linalg.qr(normal((d, d), rng)).Q
        return scale * q @ (0.8 * normal((d,), rng)).exp().diag() @ q.mT

    return normal((d, d), rng) / math.sqrt(d), covariance(1.0), covariance(0.3)


def points(config: Thm54Config) -> list[Thm54Point]:
    """Residuals of the formulas, then simulations from each one's solution, the corrected one's at two rates."""
    kinds = [("corrected", "corrected", 1), ("half", "corrected", 2), ("printed", "printed", 1)]
    runs = [
        Thm54Point(name=f"{name}{d}", formula=formula, depth=d, slower=slower)
        for d in config.depths
        for name, formula, slower in kinds
    ]
    return [Thm54Point(name="residuals"), *runs]


def violation(layers: list[Tensor], sigma_x: Tensor, sigma_eps: Tensor) -> float:
    """Largest `|E dW_i dW_i^T - E dW_{i+1}^T dW_{i+1}|` relative to the mean of the two terms' norms."""
    grams = cf.gradient_grams(layers, sigma_x, sigma_eps)
    residuals = cf.deep_linear_residuals(layers, sigma_x, sigma_eps)
    scales = [(a[0].norm() + b[1].norm()) / 8 for a, b in pairwise(grams)]
    return max(float(r.norm() / s) for r, s in zip(residuals, scales, strict=True))


def charges(layers: list[Tensor]) -> Tensor:
    """All `W_i W_i^T - W_{i+1}^T W_{i+1}`, flattened, `[R, n]`."""
    pairs = pairwise(layers)
    return torch.cat([(a @ a.mT - b.mT @ b).flatten(-2) for a, b in pairs], dim=-1)


def compute(config: Thm54Config, point: Thm54Point) -> dict[str, Any]:
    """Relative violations over random tasks; or the mean drift of the charges from one solution per seed, `[seeds, n]`.

    In units of the norm of the drift predicted at the printed solution, `projected` on that drift. A run that is
    `slower` takes as many more steps: `eta k` is the same.
    """
    if point.name == "residuals":
        rng = generator(3)
        tasks = [task(config.d, rng) for _ in range(config.trials)]
        formulas = {"corrected": cf.deep_linear, "printed": printed}
        return plain(
            {
                f: [[violation(make(*t, depth), *t[1:]) for t in tasks] for depth in config.depths]
                for f, make in formulas.items()
            }
        )
    depth, s = point.depth, config.batch
    lr, steps = config.lr / point.slower, config.steps * point.slower
    v, sx, se = task(config.d, generator(100 + depth))
    wrong = printed(v, sx, se, depth)
    residuals = cf.deep_linear_residuals(wrong, sx, se)
    drift = torch.cat([(4 * lr**2 / s * steps * r).flatten() for r in residuals])
    layers = wrong if point.formula == "printed" else cf.deep_linear(v, sx, se, depth)
    count = config.seeds * config.copies
    start = [w.expand(count, -1, -1) for w in layers]
    run = simulate(LinearNet.of(v, sx, se, s), start, steps, lr, generator(200 + depth + 100 * (point.slower - 1)))
    change = (charges(run.params) - charges([w[None] for w in layers])) / drift.norm()
    means = change.reshape(config.seeds, config.copies, -1).mean(1)
    projected = means @ (drift / drift.norm())
    return plain({"drift": means, "projected": projected, "diverged": int(run.diverged.sum())})


def squared_norm(drifts: np.ndarray) -> float:
    """`|m|^2` of the mean m of `drifts` `[seeds, n]` without the noise's part: mean of `m_s . m_t` over `s != t`."""
    n = len(drifts)
    return float((np.square(drifts.sum(0)).sum() - np.square(drifts).sum()) / (n * (n - 1)))


def norm(drifts: np.ndarray) -> tuple[float, float]:
    """`|m|`, the noise's part taken off, and how far one (jackknife) standard error of `|m|^2` reaches above it."""
    square, n = max(squared_norm(drifts), 0), len(drifts)
    without = np.array([squared_norm(np.delete(drifts, s, 0)) for s in range(n)])
    return math.sqrt(square), math.sqrt(square + math.sqrt((n - 1) * without.var())) - math.sqrt(square)


def limit(results: Results[Thm54Config, Thm54Point], depth: int) -> np.ndarray:
    """The corrected solution's drifts extrapolated to eta -> 0, `2 m(eta / 2) - m(eta)` per seed, `[seeds, n]`."""
    return 2 * results.array(f"half{depth}", "drift") - results.array(f"corrected{depth}", "drift")


def plot(results: Results[Thm54Config, Thm54Point]) -> Any:
    """Violations by depth; measured drifts by depth."""
    fig, (residuals, drifts) = style.figure(2)
    depths = np.asarray(results.config.depths)
    for formula, color, marker in (("corrected", style.SGD, "o"), ("printed", style.GD, "s")):
        values = np.maximum(results.array("residuals", formula), 1e-17)
        for shift, column in zip(np.linspace(-0.15, 0.15, values.shape[1]), values.T, strict=True):
            residuals.plot(depths + shift, column, marker, color=color, ms=3, alpha=0.5)
        residuals.plot([], [], marker, color=color, label=formula)
    residuals.set(
        yscale="log",
        xlabel="depth D",
        ylabel="relative violation of stationarity",
        xticks=depths,
        title="layer conditions, random tasks",
    )
    residuals.legend()
    along = np.stack([results.array(f"printed{d}", "projected") for d in depths])
    style.dots(drifts, depths, along, style.GD, "from the printed one, along the prediction", "s")
    for name, rate, shift, face in (("corrected", r"$\eta$", -0.06, style.SGD), ("half", r"$\eta/2$", 0.06, "none")):
        values, errors = np.array([norm(results.array(f"{name}{d}", "drift")) for d in depths]).T
        label = f"from the corrected one, norm, {rate}"
        drifts.errorbar(depths + shift, values, 2 * errors, fmt="o", color=style.SGD, mfc=face, ms=5, label=label)
    drifts.axhline(0, color=style.THEORY, ls="--", lw=1, label="predicted: 0 and 1")
    drifts.axhline(1, color=style.THEORY, ls="--", lw=1)
    drifts.set(
        xlabel="depth D",
        ylabel="mean drift of the charges / drift\npredicted for the printed solution",
        xticks=depths,
        ylim=(-0.5, 1.6),
        title="SGD started at either solution",
    )
    drifts.legend(fontsize=8, loc="center right")
    return fig


FLUCTUATIONS = "of first order in eta: the weights fluctuate about the solution, where section 9 takes its moments"


def verdicts(results: Results[Thm54Config, Thm54Point]) -> list[Verdict]:
    """Stationarity of the formulas, and what SGD does from each."""
    worst = results.array("residuals", "corrected").max()
    typical = np.median(results.array("residuals", "printed"), axis=1)
    out = [
        Verdict("corrected: largest relative violation, all depths and tasks", 1e-10, float(worst), relation="below"),
        Verdict(
            "printed: smallest over depths of the median relative violation",
            0.1,
            float(typical.min()),
            relation="above",
            difference=3,
        ),
    ]
    for d in results.config.depths:
        name = f"D = {d}: norm of the mean drift from the corrected solution / the printed one's"
        out += [
            _below(name, 0.15, results.array(f"corrected{d}", "drift"), FLUCTUATIONS),
            _below(f"{name}, eta -> 0", 0.05, limit(results, d), "of second order in eta"),
            from_seeds(
                f"D = {d}: drift from the printed solution / prediction",
                1,
                results.array(f"printed{d}", "projected"),
                order=1,
                difference=3,
            ),
        ]
    return out


def _below(claim: str, threshold: float, drifts: np.ndarray, remainder: str) -> Verdict:
    noise = math.sqrt(max(np.square(drifts.mean(0)).sum() - squared_norm(drifts), 0))
    analysis = f"The noise of the mean drift, {noise:.3f} in these units, is taken off; what remains is {remainder}."
    return Verdict(claim, threshold, *norm(drifts), relation="below", analysis=analysis)


EXPERIMENT = Experiment(
    id="thm54",
    title="Deep linear nets: the corrected equilibrium is stationary, the printed one is not",
    statement="deep",
    coarser=Coarser(2, lambda c: changed(c, {"lr": 2 * c.lr, "steps": c.steps // 2})),
    setup=(
        "d_x = d_y = width = 4, depth 2 to 5, random targets and random anisotropic covariances with Tr Sig_x != "
        "Tr Sig_eps. Left: violation of the stationarity conditions by the formulas. Right: SGD started at each "
        "formula's solution, the corrected one's at two rates; of the mean drift of all charges the norm is taken, the "
        "noise's part off, in units of the norm predicted for the printed solution, equation (17). Its proof goes "
        "wrong from (122) to (127) and (128), where the denominators of the outermost pairs of layers, Tr Sig_x and "
        "Tr Sig_eps, have become d."
    ),
    scales=SCALES,
    points=points,
    compute=compute,
    plot=plot,
    verdicts=verdicts,
    settings=(
        Setting(
            "dimensions, covariances, learning rate",
            "d = 4, random, 0.002",
            "the corrected solution drifts in proportion to eta, for D = 4 by 0.07 of the printed one at 0.002, 0.14 "
            "at 0.004 (where its errors reach beyond the thresholds); variations above",
        ),
    ),
    exploratory=(
        "The threshold 0.1 for the printed form's violation was set after a first run (medians are about 1). At first "
        "only the corrected solution's drift along the printed one's was judged, within 0.15; a look at its whole norm "
        "(7 % for D = 4, five times its noise) led to the half rate and the limit eta -> 0, 2 m(eta / 2) - m(eta) of "
        "the mean drifts m. Its threshold 0.05 was set before the half rate was run. The ratio of the two rates' "
        "drifts over all depths, 0.5 within 0.1, was judged too and dropped: quick runs gave 0.51 and 0.39 with errors "
        "of 0.05 and 0.06, too large to say more than the limit does."
    ),
    variations={
        "d = 3": {"d": 3},
        "learning rate 0.004, half the steps": {"lr": 0.004, "steps": 75},
    },
)
