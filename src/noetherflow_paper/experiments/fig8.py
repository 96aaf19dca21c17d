"""Figure 8: distance to the equilibrium against steps, and the predicted relaxation time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from noetherflow.core.settings import SGDConfig
from noetherflow.report import style
from noetherflow_paper import closed_form as cf
from noetherflow_paper.experiment import Coarser, Experiment, Results, Setting, generator, plain
from noetherflow_paper.fluctuations import AlignedNet, fluctuating_flow
from noetherflow_paper.generic import agreement, chain_charges, generic_charges, largest_gap, product_design
from noetherflow_paper.records import Config, ExperimentPoint
from noetherflow_paper.simulate import LinearNet, checkpoints, simulate
from noetherflow_paper.theory import balance, fall_time, orbit_flow, stretched
from noetherflow_paper.verdict import Verdict, from_seeds


@dataclass(frozen=True, kw_only=True)
class Fig8Base:
    """A learning rate, a dimension and a batch size."""

    lr: float = 0.03
    d: int = 20
    batch: int = 100


@dataclass(frozen=True, kw_only=True)
class Fig8Sweeps:
    """The values that replace those of the base, one setting at a time."""

    lr: tuple[float, ...] = (0.02, 0.03, 0.045)
    d: tuple[int, ...] = (10, 20, 40)
    batch: tuple[int, ...] = (50, 100, 200)


@dataclass(frozen=True, kw_only=True)
class Fig8Config(Config):
    """The base and the sweeps around it, the anisotropy, the stretch of the start, and the length of runs."""

    base: Fig8Base = Fig8Base()
    sweeps: Fig8Sweeps = Fig8Sweeps()
    phi: float = 0.4
    imbalance: float = 1.6
    seeds: int = 8
    folds: float = 1.6


@dataclass(frozen=True, kw_only=True)
class Fig8Point(ExperimentPoint):
    """One learning rate, dimension and batch size."""

    lr: float
    d: int
    batch: int


SCALES = {
    "quick": Fig8Config(),
    "paper": Fig8Config(
        base=Fig8Base(lr=0.008, d=100),
        sweeps=Fig8Sweeps(lr=(0.004, 0.008, 0.012), d=(50, 100, 200), batch=(100, 200, 400)),
        folds=4.0,
    ),
}
KEYS = ("lr", "d", "batch")


def points(config: Fig8Config) -> list[Fig8Point]:
    """Each parameter swept around the base setting."""
    found = (point for key in KEYS for point in swept(config, key))
    return list({point.name: point for point in found}.values())


def swept(config: Fig8Config, key: str) -> list[Fig8Point]:
    """The points of one sweep: those of the base with each value of the setting `key`."""
    bases = [replace(config.base, **{key: value}) for value in getattr(config.sweeps, key)]
    return [Fig8Point(name=f"lr {b.lr} d {b.d} S {b.batch}", lr=b.lr, d=b.d, batch=b.batch) for b in bases]


def scale_time(point: Fig8Point) -> float:
    """`S / (4 eta^2 d)`: the relaxation time of isotropic data in steps."""
    return float(point.batch / (4 * point.lr**2 * point.d))


def _covariances(phi: float, d: int) -> tuple[Tensor, Tensor]:
    return cf.identity_covariance(phi, d), torch.eye(d, dtype=torch.float64)


def compute(config: Fig8Config, point: Fig8Point) -> dict[str, Any]:
    """`log(||U||^2/||W||^2)` in training and by theory; the charge's trace by leading order.

    `theory`: the integrated Noether flow, with the fluctuation around the orbit, to first order in eta.

    `charge` `[T, seeds]` in training, `leading` `[T]` by the generic machinery from the starting point, `gap` its
    distance from the closed form.
    """
    d, lr, batch = point.d, point.lr, point.batch
    sigma_x, eye = _covariances(config.phi, d)
    u, w = stretched(eye, config.imbalance)
    marks = checkpoints(int(config.folds * scale_time(point)), 60)
    seeds = config.seeds
    start = [w.expand(seeds, -1, -1), u.expand(seeds, -1, -1)]
    net = LinearNet.of(eye, sigma_x, eye, batch)
    run = simulate(net, start, marks[-1], lr, generator(8), balance, at=marks)
    sgd = SGDConfig(lr, batch)
    one = eye.diagonal()
    aligned = AlignedNet(one, sigma_x.diagonal(), one, sgd)
    theory = [np.log(a / b) for a, b in fluctuating_flow(aligned, u.diagonal(), w.diagonal(), marks)]
    closed = chain_charges(*orbit_flow(u, w, cf.noise_matrices(sigma_x, eye), sgd, marks))
    generic = generic_charges([w, u], *product_design(eye, sigma_x, eye), sgd, marks)
    leading = {"leading": cf.trace(generic), "gap": largest_gap(generic, closed)}
    return plain({"steps": marks, **run.records, "theory": theory, **leading})


def distance(results: Results[Fig8Config, Fig8Point], name: str, key: str) -> np.ndarray:
    """`log ratio - log ratio*`, `[T, ...]`."""
    return results.array(name, key) - np.log(cf.identity_norm_ratio(results.config.phi))


def leading_over_measured(results: Results[Fig8Config, Fig8Point]) -> np.ndarray:
    """Relaxation time of `||W||^2 - ||U||^2` by the generic machinery over SGD's, `[lr, seeds]`."""
    rows = []
    for point in swept(results.config, "lr"):
        name, d = point.name, point.d
        u, w = cf.two_layer(torch.eye(d, dtype=torch.float64), *cf.noise_matrices(*_covariances(results.config.phi, d)))
        steps, end = results.array(name, "steps"), float(w.square().sum() - u.square().sum())
        measured = [relaxation(steps, c - end) for c in results.array(name, "charge").T]
        rows.append(relaxation(steps, results.array(name, "leading") - end) / np.asarray(measured))
    return np.stack(rows)


def relaxation(steps: np.ndarray, curve: np.ndarray) -> float:
    """Steps until the distance has fallen to 1/e of its first value."""
    return fall_time(steps, curve, float(np.exp(-1)))


def times(results: Results[Fig8Config, Fig8Point], name: str) -> tuple[np.ndarray, float]:
    """Measured relaxation steps per seed, and predicted."""
    steps = results.array(name, "steps")
    measured = np.array([relaxation(steps, c) for c in distance(results, name, "ratio").T])
    return measured, relaxation(steps, distance(results, name, "theory"))


def plot(results: Results[Fig8Config, Fig8Point]) -> Any:
    """Distances for each sweep, and predicted against measured times."""
    fig, axes = style.figure(2, 2, width=5.4, height=3.6)
    colors, labels = (style.SGD, style.ACCENT, style.SDE), {"lr": r"$\eta$", "d": "$d$", "batch": "$S$"}
    for ax, key in zip(axes, KEYS, strict=False):
        for point, color in zip(swept(results.config, key), colors, strict=True):
            name, value = point.name, getattr(point, key)
            steps = results.array(name, "steps")
            style.band(ax, steps, distance(results, name, "ratio"), color, f"{labels[key]} = {value}")
            ax.plot(steps, distance(results, name, "theory"), "--", color=style.THEORY, lw=1)
        ax.plot([], [], "--", color=style.THEORY, lw=1, label="theory")
        ax.set(
            yscale="log",
            xlabel="step",
            ylabel=r"$\log\frac{\|U\|^2}{\|W\|^2}-\log\frac{\|U_*\|^2}{\|W_*\|^2}$",
            title=f"sweep of {labels[key]}",
        )
        ax.legend()
    line = []
    for point, _ in results.points:
        measured, predicted = times(results, point.name)
        style.dots(axes[3], [predicted], measured[None], style.SGD)
        line.append(predicted)
    axes[3].loglog(sorted(line), sorted(line), "--", color=style.THEORY, label="measured = predicted (first order)")
    axes[3].set(
        xlabel="predicted relaxation time (steps)",
        ylabel="measured (steps)",
        title="relaxation times (first order in $\\eta$)",
    )
    axes[3].legend()
    return fig


def verdicts(results: Results[Fig8Config, Fig8Point]) -> list[Verdict]:
    """Each relaxation time, and the exponents of the sweeps."""
    out = []
    for point, _ in results.points:
        measured, predicted = times(results, point.name)
        out.append(from_seeds(f"relaxation steps at {point.name}", predicted, measured, order=2))
    for key, power in (("lr", -2), ("d", -1), ("batch", 1)):
        logs = [[np.log(t) for t in times(results, p.name)] for p in swept(results.config, key)]
        at = np.log(getattr(results.config.sweeps, key))
        measured, predicted = (np.polyfit(at, np.stack(values), 1)[0] for values in zip(*logs, strict=True))
        label = f"relaxation time ~ {key}^p, p (leading order {power})"
        difference = 4 if key == "batch" else 0
        out.append(from_seeds(label, predicted, measured, order=2, difference=difference))
    out.append(agreement("charges along the flow, leading order", [d["gap"] for _, d in results.points], 1e-3))
    ratio = leading_over_measured(results)
    label = "relaxation time of ||W||^2 - ||U||^2, eta -> 0: generic machinery (leading order) / SGD"
    limit = np.polyfit(results.config.sweeps.lr, ratio, 2)[2]
    out.append(from_seeds(label, 1, limit))
    return out


def larger_rate(config: Fig8Config) -> Fig8Config:
    """1.25 times all learning rates; the length of runs follows."""
    rates = tuple(1.25 * lr for lr in config.sweeps.lr)
    return replace(config, base=replace(config.base, lr=1.25 * config.base.lr), sweeps=replace(config.sweeps, lr=rates))


EXPERIMENT = Experiment(
    id="fig8",
    title="The relaxation time is predicted",
    statement="time",
    coarser=Coarser(1.25, larger_rate),
    setup=(
        "As fig3 with phi = 0.4, started at the minimum with U 1.6 times too large; sweeps of eta, d_x = d_y = d and "
        "S. Theory twice: closed forms (to first order in eta), and noether_flow's forecast from gradients measured at "
        "the start (leading order)."
    ),
    scales=SCALES,
    work=lambda c: c.seeds * c.folds * sum(p.d**2 * scale_time(p) for p in points(c)),
    points=points,
    compute=compute,
    plot=plot,
    verdicts=verdicts,
    settings=(
        Setting(
            "values of the sweeps", "factors of 2 to 4 around eta 0.03, d 20, S 100", "another base in a variation"
        ),
        Setting("start", "the minimum with U 1.6 times too large", "the theory curve starts at the same point"),
        Setting("relaxation time", "distance of log(|U|^2/|W|^2) fallen to 1/e", "a definition"),
    ),
    exploratory=(
        "Theory: the Noether flow integrated along the orbit, with R_B (mean gradient included) at first order in eta, "
        "and the weights' fluctuation around the orbit. Without the latter the first runs at paper scale (seed 5) took "
        "0.1 to 0.9 % longer than predicted, in proportion to eta d/S, up to 51 standard errors; the part was derived "
        "then (theory.md section 8), tested on other nets, and judged by runs with another seed. The leading order "
        "alone, tried first of all, is 3 to 17 % slower, in proportion to eta. The tolerances were then 5 % "
        "on the times, and 0.15 around the exponents -2, -1, 1 of the leading order, from which the measured ones "
        "differ by up to 0.135; the predicted times have that slope too, and 2 % and 0.01 around them replaced those "
        "tolerances after a look at the same runs. The generic machinery's 5 % was set before its first comparison, "
        "for a straight line through three rates at which it is 8 to 21 % slow."
    ),
    variations={
        "U too small instead (1/1.6)": {"imbalance": 0.625},
        "phi 0.8": {"phi": 0.8},
        "base learning rate 0.02": {"base": Fig8Base(lr=0.02), "sweeps": Fig8Sweeps(lr=(0.01, 0.02, 0.03))},
    },
)
