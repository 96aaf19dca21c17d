"""Many initialisations, one fixed point: SGD against GD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from noetherflow.core.settings import SGDConfig
from noetherflow.errors import require
from noetherflow.report import style
from noetherflow_paper import closed_form as cf
from noetherflow_paper import generic
from noetherflow_paper.experiment import Coarser, Experiment, Results, Setting, generator, plain
from noetherflow_paper.records import Config, changed
from noetherflow_paper.simulate import METHODS, LinearNet, MethodPoint, Params, normal, simulate
from noetherflow_paper.theory import first_order_equilibrium
from noetherflow_paper.verdict import Verdict, from_resampling, from_seeds


@dataclass(frozen=True, kw_only=True)
class HeroConfig(Config):
    """Sizes, anisotropies, and how many starts and copies of each are trained for how long."""

    d: int = 8
    width: int = 12
    phi_x: float = 0.4
    phi_eps: float = 0.15
    lr: float = 0.04
    batch: int = 60
    starts: int
    steps: int
    copies: int


SCALES = {
    "quick": HeroConfig(starts=48, steps=25_000, copies=2),
    "paper": HeroConfig(lr=0.01, starts=200, steps=500_000, copies=4),
}

HeroResults = Results[HeroConfig, MethodPoint]


def points(config: HeroConfig) -> list[MethodPoint]:
    """The same starts under SGD and GD."""
    return [MethodPoint(name=m, method=m) for m in METHODS]


def covariances(config: HeroConfig) -> tuple[Tensor, Tensor]:
    """Input and label-noise covariances, both anisotropic."""
    return cf.identity_covariance(config.phi_x, config.d), cf.identity_covariance(config.phi_eps, config.d)


def starts(config: HeroConfig) -> Params:
    """Gaussian factors whose sizes run around an ellipse in the plane of log norms."""
    count, d, width, rng = config.starts, config.d, config.width, generator(21)
    angle = torch.linspace(0, 2 * torch.pi, count + 1, dtype=torch.float64)[:-1]
    # In the plane (log |W|, log |U|): long axis along the orbit direction (1, -1), short axis along (1, 1).
    along, across = 1.15 * angle.cos(), -0.35 + 0.75 * angle.sin()
    w, u = normal((count, width, d), rng), normal((count, d, width), rng)
    size = d**0.5
    w = w / w.norm(dim=(1, 2), keepdim=True) * (size * (across - along).exp())[:, None, None]
    return [w, u / u.norm(dim=(1, 2), keepdim=True) * (size * (across + along).exp())[:, None, None]]


def equilibrium(config: HeroConfig) -> tuple[Tensor, Tensor]:
    """`(U, W)` of theory.md section 8, as eta -> 0."""
    sx, se = covariances(config)
    return cf.two_layer(torch.eye(config.d, dtype=torch.float64), *cf.noise_matrices(sx, se))


def first_order(config: HeroConfig) -> tuple[Tensor, Tensor]:
    """`(U, W)` where the Noether flow with R_B at first order in eta ends."""
    sx, se = covariances(config)
    sgd = SGDConfig(config.lr, config.batch)
    eye = torch.eye(config.d, dtype=torch.float64)
    return first_order_equilibrium(eye, sx, se, sgd, int(100 / sgd.lr**2))


def generic_agreement(config: HeroConfig) -> Verdict:
    """The generic machinery on data with these moments finds the equilibrium and its `Tr H` of theory.md section 8."""
    sgd = SGDConfig(config.lr, config.batch)
    gaps = generic.closed_form_gaps(torch.eye(config.d, dtype=torch.float64), *covariances(config), sgd)
    return generic.agreement("||U||^2/||W||^2 and Tr H at the equilibrium", np.abs(gaps), 1e-6)


def log_ratio(u: Tensor, w: Tensor) -> float:
    """`log(|U|/|W|)`."""
    return float((u.norm() / w.norm()).log())


def compute(config: HeroConfig, point: MethodPoint) -> dict[str, Any]:
    """`log ||W||`, `log ||U||` along the way, `[T, starts]`, and whole-matrix distances to the equilibrium."""
    sx, se = covariances(config)
    eye = torch.eye(config.d, dtype=torch.float64)
    copies = config.copies if point.name == "sgd" else 1
    start = [p.repeat(copies, 1, 1) for p in starts(config)]
    net = LinearNet.of(eye, sx, se, config.batch)
    best = equilibrium(config)[1]
    gram = best.mT @ best

    def record(params: Params) -> dict[str, Tensor]:
        w, u = params
        mean = (w.mT @ w).reshape(copies, -1, *gram.shape).mean(0)
        distance = (mean - gram).norm(dim=(1, 2)) / gram.norm()
        first = config.starts
        return {"w": w.norm(dim=(1, 2)).log()[:first], "u": u.norm(dim=(1, 2)).log()[:first], "distance": distance}

    steps = config.steps if point.name == "sgd" else 4000
    marks = sorted(
        {
            0,
            *np.unique(np.geomspace(1, steps, 140).astype(int)).tolist(),
            *range(9 * steps // 10, steps, max(1, steps // 200)),
        }
    )
    # Large starts need a small rate until the loss has fallen; every run gets the same short ramp.
    ramp = 400
    rate = lambda step: config.lr * min(1.0, 0.02 + step / ramp)
    run = simulate(net, start, steps, rate, generator(22), record, at=marks, method=point.method)
    return plain({"steps": run.steps, **run.records, "diverged": int(run.diverged.sum())})


def plot(results: HeroResults) -> Any:
    """The plane of log norms under GD and SGD, and the distance to the fixed point."""
    mpl: Any = require("matplotlib", "report")
    fig, (gd, sgd, distance) = style.figure(3, width=4.5, height=4.2)
    colors = mpl.colormaps["turbo"](np.linspace(0.03, 0.97, results.config.starts))
    for ax, name, title in ((gd, "gd", "gradient descent: memory"), (sgd, "sgd", "SGD: one fixed point")):
        _plot_plane(ax, results, name, colors)
        ax.set(title=title)
    gd.legend(loc="upper right", fontsize=8)
    _plot_distance(distance, results, colors)
    return fig


def _plot_plane(ax: Any, results: HeroResults, name: str, colors: Any) -> None:
    """Paths of all starts in the plane of log norms under one method, and the predicted equilibrium."""
    u, w = equilibrium(results.config)
    x, y = results.array(name, "w") / np.log(10), results.array(name, "u") / np.log(10)
    for i, color in enumerate(colors):
        ax.plot(x[:, i], y[:, i], color=color, lw=1.1, alpha=0.9)
    dots = {"marker": "o", "edgecolors": "white", "linewidths": 0.5, "zorder": 3, "label": "initialisations"}
    ax.scatter(x[0], y[0], c=colors, s=16, **dots)
    above = {"zorder": 4 if name == "sgd" else 2, "label": "predicted equilibrium"}
    star = float(w.norm().log10()), float(u.norm().log10())
    ax.plot(*star, "*", ms=24, mfc="#ffd23f", mec=style.THEORY, **above)
    ax.scatter(x[-1], y[-1], c=style.THEORY, s=9, marker="o", zorder=6, label="end of training")
    labels = {"xlabel": r"$\log_{10}\|W\|$", "ylabel": r"$\log_{10}\|U\|$"}
    ax.set(**labels, xlim=(-0.4, 1.1), ylim=(-0.4, 1.1), aspect="equal")


def _plot_distance(ax: Any, results: HeroResults, colors: Any) -> None:
    """Distances of `W^T W` to its prediction against steps, and the shift of order eta that theory predicts."""
    w, nearby = equilibrium(results.config)[1], first_order(results.config)[1]
    moved = w.mT @ w
    floor = float((nearby.mT @ nearby - moved).norm() / moved.norm())
    for name, width in (("gd", 0.6), ("sgd", 1)):
        steps, values = results.array(name, "steps"), results.array(name, "distance")
        for i, color in enumerate(colors):
            shown = color if name == "sgd" else style.MUTED
            ax.plot(np.maximum(steps, 1), values[:, i], color=shown, lw=width, alpha=0.8)
    ax.plot([], [], color=colors[len(colors) // 3], label="SGD")
    ax.plot([], [], color=style.MUTED, label="GD")
    ax.axhline(floor, color=style.THEORY, ls="--", lw=1)
    ax.text(1, 1.12 * floor, r"theory: shift of the mean, of order $\eta$", fontsize=8)
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="step",
        ylabel=r"$\|W^TW - W_*^TW_*\| / \|W_*^TW_*\|$",
        title="distance to the predicted point",
        ylim=(0.3 * floor, None),
    )
    ax.legend(loc="lower left", ncols=2)


def _late(results: HeroResults, name: str) -> tuple[np.ndarray, np.ndarray]:
    """`log(|U|/|W|)` and the distance, averaged over the last twenty records, per start."""
    ratio = results.array(name, "u") - results.array(name, "w")
    return ratio[-20:].mean(0), results.array(name, "distance")[-20:].mean(0)


def verdicts(results: HeroResults) -> list[Verdict]:
    """Spread of the end points over the starts, place of the common end point."""
    (sgd, near), (gd, far) = _late(results, "sgd"), _late(results, "gd")
    begin = (results.array("sgd", "u") - results.array("sgd", "w"))[0]
    spread = lambda pair: float(np.divide(*pair.std(0)))
    narrow = f"spread (standard deviation) of log(|U|/|W|) over {len(sgd)} starts: SGD's end / the start"
    place = "SGD: mean of log(|U|/|W|) over starts at the end, theory at first order in eta"
    largest = "SGD: largest distance |W'W - W*'W*| / |W*'W*| over starts (W'W: mean over the copies of a start)"
    return [
        from_resampling(narrow, 0.03, np.stack([sgd, begin], 1), spread, relation="below"),
        from_resampling("the same for GD", 0.5, np.stack([gd, begin], 1), spread, relation="above"),
        from_seeds(place, log_ratio(*first_order(results.config)), sgd, order=1),
        from_resampling(largest, 0.15, near, np.max, relation="below"),
        Verdict("GD: median of the same distance", 0.5, float(np.median(far)), relation="above"),
        generic_agreement(results.config),
    ]


EXPERIMENT = Experiment(
    id="hero",
    title="Many initialisations, one fixed point",
    statement="independence",
    coarser=Coarser(1.5, lambda c: changed(c, {"lr": 1.5 * c.lr, "steps": round(c.steps / 2.25)})),
    setup=(
        "Two-layer linear net, d = 8, hidden width 12, V = I, anisotropic inputs and label noise; 48 Gaussian "
        "initialisations whose layer norms differ by up to a factor of 20; learning rate 0.04 (after a ramp of 400 "
        "steps), batch 60. The distance at SGD's end is that of the mean W'W of the copies of a start (two in quick); "
        "its floor is the equilibrium's shift of order eta (dashed) and the noise of the weights. The equilibrium "
        "for eta -> 0 is found twice: by the closed form, and by find_symmetries, gradient_moments and "
        "noise_equilibrium from the norm-balanced solution."
    ),
    scales=SCALES,
    work=lambda c: c.starts * c.copies * c.steps,
    points=points,
    compute=compute,
    plot=plot,
    verdicts=verdicts,
    settings=(
        Setting(
            "sizes and covariances",
            "d = 8, variances (0.4, 1.6) of the inputs, (0.15, 1.85) of the labels",
            "chosen so that the fixed point is visibly off the diagonal |U| = |W|; which point it is does not matter",
        ),
        Setting(
            "learning rate and batch",
            "0.04 and 60",
            "terms of order eta move log(|U|/|W|) by 0.026 here: predicted, and part of the target",
        ),
        Setting("ramp", "400 steps from 0.0008", "needed by the largest starts only; every run gets it"),
    ),
    exploratory=(
        "The thresholds 0.03 (spread), 0.15 and 0.5 (distances) were set after a first run. The mean log(|U|/|W|) was "
        "first compared with the limit eta -> 0 (0.209), within 0.04, then with the theory of first order, "
        "within 0.01; "
        "what is left of it falls with the rate and is extrapolated since."
    ),
    variations={
        "learning rate 0.06, half the steps": {"lr": 0.06, "steps": 12_500},
        "hidden width 8": {"width": 8},
        "weaker anisotropy (0.7 and 0.5)": {"phi_x": 0.7, "phi_eps": 0.5},
    },
)
