"""Figure 1: a scale-invariant loss in two dimensions. GD leaves its circle by O(eta) and stops, SGD never stops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from noetherflow.report import style
from noetherflow_paper.experiment import Experiment, Results, Setting, generator, plain
from noetherflow_paper.records import Config, ExperimentPoint
from noetherflow_paper.simulate import (
    METHODS,
    Method,
    Network,
    Params,
    checkpoints,
    normal,
    simulate,
    squared_distance,
)
from noetherflow_paper.verdict import Verdict, from_ratio, from_seeds


@dataclass(frozen=True, kw_only=True)
class Fig1Config(Config):
    """One learning rate for SGD against GD, and several (`lrs`) for the orders of GD's growth."""

    lr: float = 0.05
    batch: int = 2
    noise: float = 1.0
    steps: int
    seeds: int
    lrs: tuple[float, ...] = (0.2, 0.1, 0.05, 0.025)


@dataclass(frozen=True, kw_only=True)
class Fig1Point(ExperimentPoint):
    """Training by one method; `orders` train by none."""

    method: Method | None = None


SCALES = {"quick": Fig1Config(steps=3000, seeds=64), "paper": Fig1Config(steps=30_000, seeds=512)}


TARGET = (1.0, 0.0)
TIME = 10.0


def points(config: Fig1Config) -> list[Fig1Point]:
    """SGD, GD, and GD at several learning rates: its first step, and `eta k = 10`."""
    return [*(Fig1Point(name=m, method=m) for m in METHODS), Fig1Point(name="orders")]


def direction(params: Params, x: Tensor) -> Tensor:
    """`theta / |theta|` as the prediction for every sample."""
    theta = params[0]
    return (theta / theta.norm(dim=-1, keepdim=True)).unsqueeze(1).expand(-1, x.shape[1], -1)


def problem(config: Fig1Config) -> Network:
    """`l = |theta/|theta| - z|^2`, `z ~ N((1, 0), noise^2 I)`."""
    target = torch.tensor(TARGET, dtype=torch.float64)

    def draw(replicas: int, samples: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        z = target + config.noise * normal((replicas, samples, 2), rng)
        return z, z

    mean = target.reshape(1, 1, 2)
    return Network(direction, squared_distance, draw, (mean, mean), config.batch)


def expected_growth(theta: Tensor, lr: float, noise_over_batch: float) -> Tensor:
    """`eta^2 Tr R_B = 4 eta^2 ((t . m)^2 + noise^2 / S) / |theta|^2`, t the unit tangent at theta."""
    squared = theta.square().sum(-1)
    tangential = (theta[..., 1] * TARGET[0] - theta[..., 0] * TARGET[1]).square() / squared
    return 4 * lr**2 * (tangential + noise_over_batch) / squared


def compute(config: Fig1Config, point: Fig1Point) -> dict[str, Any]:
    """Squared norms, paths, and per replica the sums of measured and expected growth."""
    net, lr = problem(config), config.lr
    angle = torch.tensor(2.2, dtype=torch.float64)
    begin = torch.stack([angle.cos(), angle.sin()])[None]
    if point.method is None:

        def growth(rate: float, steps: int) -> float:
            moved = simulate(net, [begin], steps, rate, generator(0), method="gd").params[0]
            return float(moved.square().sum() - begin.square().sum())

        rates = config.lrs
        return plain({"step": [growth(r, 1) for r in rates], "fixed_time": [growth(r, round(TIME / r)) for r in rates]})
    sgd = point.method == "sgd"
    noise = config.noise**2 / config.batch if sgd else 0.0
    start = begin.expand(config.seeds if sgd else 1, -1)
    expected, smallest = torch.zeros(len(start), dtype=torch.float64), torch.full((len(start),), torch.inf).double()

    def watch(step: int, params: Params, update: Params) -> None:
        theta = params[0]
        expected.add_(expected_growth(theta, lr, noise))
        grown = (theta - update[0]).square().sum(-1) - theta.square().sum(-1)
        torch.minimum(smallest, grown, out=smallest)

    def record(params: Params) -> dict[str, Tensor]:
        theta = params[0]
        return {"norm2": theta.square().sum(-1), "path": theta[:3], "expected": expected}

    marks = sorted({*checkpoints(config.steps, 60), *range(0, 200, 4)})
    run = simulate(net, [start], config.steps, lr, generator(1), record, at=marks, method=point.method, on_step=watch)
    return plain({"steps": run.steps, **run.records, "smallest": smallest})


def quartic_law(results: Results[Fig1Config, Fig1Point], steps: np.ndarray) -> np.ndarray:
    """`|theta|^2` from `|theta|^4 = 1 + 8 eta^2 noise^2 k / S`, the continuous-time law at a settled direction."""
    c = results.config
    return np.sqrt(1 + 8 * c.lr**2 * c.noise**2 / c.batch * steps)


def plot(results: Results[Fig1Config, Fig1Point]) -> Any:
    """Paths in the plane, norm against steps, growth per step of GD against the learning rate."""
    fig, (plane, norm, orders) = style.figure(3)
    turn = np.linspace(0, 2 * np.pi, 200)
    plane.plot(np.cos(turn), np.sin(turn), color=style.MUTED, lw=0.8, label="orbit of the start under rotation")
    for name, color in (("sgd", style.SGD), ("gd", style.GD)):
        path = results.array(name, "path")
        for i in range(path.shape[1]):
            plane.plot(*path[:, i].T, color=color, lw=1, label=name.upper() if i == 0 else None)
    plane.plot(*results.array("gd", "path")[0, 0], "k*", ms=9, label="start")
    plane.set(aspect="equal", xlabel=r"$\theta_1$", ylabel=r"$\theta_2$", title="paths")
    plane.legend(loc="lower left", fontsize=7.5)
    steps = results.array("sgd", "steps")
    style.band(norm, steps, results.array("sgd", "norm2"), style.SGD, "SGD")
    norm.plot(
        steps, 1 + results.array("sgd", "expected").mean(-1), "--", color=style.THEORY, label=r"$1 + \sum\eta^2$Tr$R_B$"
    )
    norm.plot(steps, quartic_law(results, steps), ":", color=style.ACCENT, label=r"$\sqrt{1 + 8\eta^2\sigma^2k/S}$")
    norm.plot(steps, results.array("gd", "norm2"), color=style.GD, label="GD")
    norm.set(xlabel="step", ylabel=r"$|\theta|^2$", title="the norm grows under SGD")
    norm.legend()
    rates = np.asarray(results.config.lrs)
    for key, power, label, marker in (
        ("step", 2, "in one step", "s"),
        ("fixed_time", 1, rf"at $\eta k={TIME:g}$", "o"),
    ):
        growth = results.array("orders", key)
        line = style.THEORY if power == 2 else style.ACCENT
        orders.loglog(rates, growth, marker, color=style.GD, label=f"GD, {label}")
        orders.loglog(
            rates, growth[-1] * (rates / rates[-1]) ** power, "--", color=line, label=rf"$\propto\eta^{power}$"
        )
    orders.set(
        xlabel=r"learning rate $\eta$",
        ylabel=r"growth of $|\theta|^2$",
        title=r"GD leaves its circle by order $\eta$",
    )
    orders.legend()
    return fig


def verdicts(results: Results[Fig1Config, Fig1Point]) -> list[Verdict]:
    """Orders of growth, monotonicity, and the sum of eta^2 Tr R_B."""
    norm2, expected = results.array("sgd", "norm2"), results.array("sgd", "expected")
    growth, gd = norm2[-1] - norm2[0], results.array("gd", "norm2")[:, 0]
    rates = np.log(results.config.lrs)
    slope = lambda key: float(np.polyfit(rates, np.log(results.array("orders", key)), 1)[0])
    law = quartic_law(results, results.array("sgd", "steps"))[-1] - 1
    return [
        Verdict(
            "exactness check: GD, growth of |theta|^2 in one step ~ eta^p, p",
            2,
            slope("step"),
            tolerance=0.01,
            identity=True,
        ),
        Verdict(
            f"GD: growth of |theta|^2 up to the time eta k = {TIME:g} ~ eta^p, p",
            1,
            slope("fixed_time"),
            tolerance=0.05,
            reason="no noise; the next order in eta bends the line, by 2 % over these rates",
        ),
        from_ratio("growth of |theta|^2 under GD / under SGD", 0.05, gd[-1] - gd[0], growth, relation="below"),
        Verdict(
            "exactness check: SGD, smallest change of |theta|^2 in any step of any seed (zero up to rounding)",
            -1e-12,
            float(results.array("sgd", "smallest").min()),
            relation="above",
            identity=True,
        ),
        from_seeds(
            "SGD: growth of |theta|^2 / sum of eta^2 Tr R_B (0.5 would fit the print)",
            1,
            growth / expected[-1],
            difference=1,
        ),
        from_seeds(
            "SGD: growth of |theta|^2, continuous-time law",
            law,
            growth,
            0.1,
            reason="the law leaves out the time in which the direction is found",
        ),
    ]


EXPERIMENT = Experiment(
    id="fig1",
    title="On a scale-invariant loss GD stops near its circle, SGD leaves it for ever",
    statement="drift",
    setup=(
        "theta in R^2, l = |theta/|theta| - z|^2 with z ~ N((1, 0), I), batch 2, learning rate 0.05, 64 seeds. GD's "
        "growth is eta^2 |gbar|^2 in a step, of order eta once the direction is found: 16 % at this rate."
    ),
    scales=SCALES,
    points=points,
    compute=compute,
    plot=plot,
    verdicts=verdicts,
    settings=(
        Setting(
            "the loss", "squared distance of theta/|theta| to a noisy target", "any function of the direction would do"
        ),
        Setting("learning rate, batch, noise", "0.05, 2, 1", "set the speed of growth only (variations above)"),
    ),
    exploratory=(
        "The continuous-time law leaves out the time to find the direction; its tolerance of 10 % was set knowing "
        "that. That no step shrinks the norm was first asked without allowance for rounding, which fails by 4e-15 "
        "over the 30,000 steps of the paper scale; 1e-12 is allowed now. The claim at a fixed time was "
        "added after a reviewer had measured p = 1.02 there; for one step p = 2 is Pythagoras, an exactness check."
    ),
    variations={
        "learning rate 0.1": {"lr": 0.1},
        "batch 8": {"batch": 8},
        "half the noise": {"noise": 0.5},
    },
)
