"""Figure 7: nets whose scale is free. The norm grows under SGD by eta^2 |g_B|^2 per step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from noetherflow.report import style
from noetherflow_paper.experiment import Experiment, Results, Setting, generator, plain
from noetherflow_paper.records import Config, ExperimentPoint
from noetherflow_paper.simulate import METHODS, Method, Network, Params, checkpoints, normal, simulate, squared_distance
from noetherflow_paper.verdict import Verdict, from_ratio, from_seeds


@dataclass(frozen=True, kw_only=True)
class Fig7Config(Config):
    """Sizes, noise and training; GD's mean gradient is over `population` inputs."""

    d: int = 10
    width: int = 16
    noise: float = 1.0
    lr: float = 0.01
    batch: int = 4
    population: int = 600
    steps: int
    gd_steps: int
    seeds: int


@dataclass(frozen=True, kw_only=True)
class Fig7Point(ExperimentPoint):
    """One net under one method."""

    method: Method
    net: str


SCALES = {
    "quick": Fig7Config(steps=6000, gd_steps=6000, seeds=8),
    "paper": Fig7Config(steps=100_000, gd_steps=100_000, seeds=64),
}


NETS = ("A", "B")


def points(config: Fig7Config) -> list[Fig7Point]:
    """Both nets under SGD and GD."""
    return [Fig7Point(name=f"{m} {n}", method=m, net=n) for n in NETS for m in METHODS]


def network(config: Fig7Config, net: str, rng: torch.Generator) -> Network:
    """A: `sum_j u_j/|w| tanh(w_j . x/|u|)`; B: `sum_j u_j/|u| tanh(w_j . x/|w|)`; data `y = v . x + eps`."""
    d = config.d
    v = normal((d,), rng) / d**0.5

    def forward(params: Params, x: Tensor) -> Tensor:
        w, u = params
        wn, un = w.norm(dim=(1, 2), keepdim=True), u.norm(dim=1)[:, None, None]
        outer, inner = (wn, un) if net == "A" else (un, wn)
        hidden = torch.tanh(x @ w.mT / inner)
        return hidden @ u.unsqueeze(-1) / outer

    def draw(replicas: int, samples: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        x = normal((replicas, samples, d), rng)
        return x, (x @ v)[..., None] + config.noise * normal((replicas, samples, 1), rng)

    inputs = normal((1, config.population, d), rng)
    return Network(forward, squared_distance, draw, (inputs, (inputs @ v)[..., None]), config.batch)


def compute(config: Fig7Config, point: Fig7Point) -> dict[str, Any]:
    """Squared norms of both layers `[T, seeds]`, and the ledger's running sum of `eta^2 |g_B|^2`."""
    rng = generator(7)
    problem = network(config, point.net, rng)
    gd = point.method == "gd"
    seeds = 2 if gd else config.seeds
    start = [
        normal((seeds, config.width, config.d), rng) / config.d**0.5,
        normal((seeds, config.width), rng),
    ]
    ledger = torch.zeros(seeds, dtype=torch.float64)

    def add(step: int, params: Params, updates: Params) -> None:
        ledger.add_(sum((u.square().flatten(1).sum(1) for u in updates), torch.zeros(seeds, dtype=torch.float64)))

    def record(params: Params) -> dict[str, Tensor]:
        w, u = params
        return {"w2": w.square().sum((1, 2)), "u2": u.square().sum(1), "ledger": ledger}

    steps = config.gd_steps if gd else config.steps
    run = simulate(
        problem, start, steps, config.lr, rng, record, at=checkpoints(steps, 60), method=point.method, on_step=add
    )
    total = run.records["w2"] + run.records["u2"]
    unclosed = (total[-1] - total[0] - ledger) / total[0]
    return plain({"steps": run.steps, **run.records, "unclosed": unclosed})


def growth(results: Results[Fig7Config, Fig7Point], name: str, key: str = "total") -> np.ndarray:
    """Change of a squared norm over the run, per seed."""
    values = _total(results, name) if key == "total" else results.array(name, key)
    return values[-1] - values[0]


def _total(results: Results[Fig7Config, Fig7Point], name: str) -> np.ndarray:
    return results.array(name, "w2") + results.array(name, "u2")


def plot(results: Results[Fig7Config, Fig7Point]) -> Any:
    """Total norms above, norms of the layers below, for both nets."""
    fig, axes = style.figure(2, 2, width=5.2, height=3.2)
    for net, total_ax, layers in zip(NETS, axes[:2], axes[2:], strict=True):
        for method, color in (("sgd", style.SGD), ("gd", style.GD)):
            name = f"{method} {net}"
            total = _total(results, name)
            style.band(total_ax, results.array(name, "steps"), total - total[0], color, method.upper())
        name = f"sgd {net}"
        steps, ledger = results.array(name, "steps"), results.array(name, "ledger").mean(-1)
        total_ax.plot(steps, ledger, "--", color=style.THEORY, label=r"ledger: $\sum\eta^2|g_B|^2$")
        for key, color, label in (("w2", style.SDE, r"$|w|^2$"), ("u2", style.ACCENT, r"$|u|^2$")):
            values = results.array(name, key)
            style.band(layers, steps, values - values[0], color, f"SGD: {label}")
        total_ax.set(ylabel=r"growth of $|w|^2 + |u|^2$", title=f"Net-{net}: total")
        layers.set(xlabel="step", ylabel="growth of the squared norm", title=f"Net-{net}: layers")
        for ax in (total_ax, layers):
            ax.legend()
    return fig


def verdicts(results: Results[Fig7Config, Fig7Point]) -> list[Verdict]:
    """Growth, the ledger, GD, and the layers."""
    out = []
    for net in NETS:
        sgd, gd = growth(results, f"sgd {net}"), growth(results, f"gd {net}")
        out += [
            from_seeds(
                f"exactness check: Net-{net}, SGD, growth of the squared norm", 0, sgd, relation="above", identity=True
            ),
            from_seeds(
                f"exactness check: Net-{net}, SGD, (growth - sum of eta^2 |g_B|^2) / squared norm",
                0,
                results.array(f"sgd {net}", "unclosed"),
                1e-12,
                relative=False,
                identity=True,
            ),
            from_ratio(f"Net-{net}: growth under GD / under SGD", 0.05, gd, sgd, relation="below"),
        ]
    for key, label in (("w2", "|w|^2"), ("u2", "|u|^2")):
        grown = growth(results, "sgd B", key)
        out.append(
            from_seeds(f"exactness check: Net-B, SGD, growth of {label}", 0, grown, relation="above", identity=True)
        )
    smallest = min((growth(results, "sgd A", k) for k in ("w2", "u2")), key=lambda g: float(g.mean()))
    out.append(
        from_seeds("Net-A, SGD: growth of the layer that grows least (it shrinks)", 0, smallest, relation="below")
    )
    return out


EXPERIMENT = Experiment(
    id="fig7",
    title="The norm of scale-invariant nets grows under SGD, hardly under GD",
    statement="scale",
    setup=(
        "Net-A: sum_j u_j/|w| tanh(w_j.x/|u|), Net-B: sum_j u_j/|u| tanh(w_j.x/|w|) (given); x in R^10, y = v.x + eps, "
        "width 16, learning rate 0.01, batch 4."
    ),
    scales=SCALES,
    points=points,
    compute=compute,
    plot=plot,
    verdicts=verdicts,
    settings=(
        Setting(
            "|u|, |w|",
            "norms of the whole layer",
            "Net-A is then invariant only under a common scaling, Net-B under one for each layer, as the claims need",
        ),
        Setting(
            "sizes, learning rate, batch", "d = 10, width 16, 0.01, 4", "set the speed of growth (variations above)"
        ),
    ),
    exploratory=(
        "The threshold 0.05 for GD's growth: GD grows at second order in the learning rate while it learns, so the "
        "ratio falls with the length of the run and rises with the learning rate. That Net-A's layers need not grow "
        "was judged by one layer's share of the total being below a half, which cannot fail; now one layer has to "
        "shrink. The exactness checks hold by Pythagoras: each step is orthogonal to what is scale-invariant."
    ),
    variations={"learning rate 0.02": {"lr": 0.02}, "batch 16": {"batch": 16}, "width 48": {"width": 48}},
)
