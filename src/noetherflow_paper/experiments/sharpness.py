"""Beyond the paper: the change of sharpness forecast from one measurement (theory.md section 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from noetherflow.core.settings import SGDConfig
from noetherflow.report import style
from noetherflow_paper import closed_form as cf
from noetherflow_paper.experiment import Coarser, Experiment, Results, Setting, generator, plain
from noetherflow_paper.generic import measured
from noetherflow_paper.records import Config, ExperimentPoint
from noetherflow_paper.simulate import Network, Params, checkpoints, normal, simulate, squared_distance
from noetherflow_paper.verdict import Verdict, from_seeds


@dataclass(frozen=True, kw_only=True)
class SharpnessCase:
    """A learning rate, and whether the net has ReLUs."""

    lr: float = 0.02
    activation: bool


CASES = {"linear": SharpnessCase(activation=False), "relu": SharpnessCase(activation=True)}


@dataclass(frozen=True, kw_only=True)
class SharpnessConfig(Config):
    """The nets, the covariances, how far U and W are stretched apart at the start, and the training."""

    d: int = 8
    width: int = 8
    phi_x: float = 0.5
    phi_eps: float = 0.3
    imbalances: tuple[float, ...] = (0.5, 1.0, 2.0)
    batch: int = 40
    data: int = 2000
    cases: dict[str, SharpnessCase] = field(default_factory=lambda: dict(CASES))
    steps: int
    fit: int
    seeds: int


@dataclass(frozen=True, kw_only=True)
class SharpnessPoint(ExperimentPoint):
    """One of the cases."""

    lr: float
    activation: bool


SCALES = {
    "quick": SharpnessConfig(steps=30_000, fit=3000, seeds=5),
    "paper": SharpnessConfig(steps=100_000, fit=20_000, seeds=16),
}


def points(config: SharpnessConfig) -> list[SharpnessPoint]:
    """A linear and a ReLU net."""
    return [SharpnessPoint(name=name, lr=c.lr, activation=c.activation) for name, c in config.cases.items()]


def curvature(activation: bool, params: Params, x: Tensor) -> Tensor:
    """Trace of the Gauss-Newton matrix, `2 E[d_y |h|^2 + |x|^2 sum_j active_j |u_j|^2]`, per replica."""
    w, u = params
    before = x @ w.mT
    active = (before > 0).to(x) if activation else torch.ones_like(before)
    hidden = (before * active).square().sum(-1).mean(-1)
    back = ((active @ u.square().sum(-2).unsqueeze(-1)).squeeze(-1) * x.square().sum(-1)).mean(-1)
    return 2 * (u.shape[-2] * hidden + back)


def forecast(params: Params, activation: bool, x: Tensor, y: Tensor, sgd: SGDConfig) -> tuple[float, float]:
    """`Tr H` now and at the noise equilibrium, by the generic machinery from one measurement at `params`."""
    found = measured(params, x, y, relu=activation, population=False)
    return found.traces(found.equilibrium(sgd), x, y)


def compute(config: SharpnessConfig, point: SharpnessPoint) -> dict[str, Any]:
    """`Tr H` in training from several imbalances, `[T, imbalance, seeds]`, and its forecasts `[imbalance, 2]`."""
    d, width, seeds, count = config.d, config.width, config.seeds, len(config.imbalances)
    sx, se = (cf.identity_covariance(phi, d) for phi in (config.phi_x, config.phi_eps))
    act = torch.relu if point.activation else (lambda h: h)
    forward = lambda p, x: act(x @ p[0].mT) @ p[1].mT
    rng = generator(51)

    def draw(replicas: int, samples: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        x = normal((replicas, samples, d), rng) @ sx.sqrt()
        return x, x + normal((replicas, samples, d), rng) @ se.sqrt()

    x, y = (t[0] for t in draw(1, config.data, rng))
    problem = Network(forward, squared_distance, draw, (x[None], x[None]), config.batch)
    start = [normal((1, width, d), rng) / d**0.5, normal((1, d, width), rng) / width**0.5]
    fitted = simulate(problem, start, config.fit, 2 * point.lr, rng, method="gd").params
    factors = torch.tensor(config.imbalances, dtype=torch.float64)[:, None, None]
    moved = [fitted[0] / factors, fitted[1] * factors]
    sgd = SGDConfig(point.lr, config.batch)
    forecasts = [forecast([moved[0][i], moved[1][i]], point.activation, x, y, sgd) for i in range(count)]
    record = lambda params: {"trace": curvature(point.activation, params, x)}
    many = [p.repeat_interleave(seeds, 0) for p in moved]
    marks = checkpoints(config.steps, 40)
    run = simulate(problem, many, config.steps, point.lr, generator(52), record, at=marks)
    return plain(
        {"steps": marks, "trace": run.records["trace"].reshape(len(marks), count, seeds), "forecasts": forecasts}
    )


def plot(results: Results[SharpnessConfig, SharpnessPoint]) -> Any:
    """`Tr H` against steps with the forecasts made at step 0."""
    fig, axes = style.figure(2, width=5.2)
    colors = (style.SGD, style.SDE, style.ACCENT)
    for ax, (point, _) in zip(axes, results.points, strict=True):
        steps, trace = results.array(point.name, "steps"), results.array(point.name, "trace")
        forecasts = results.array(point.name, "forecasts")
        for i, (factor, color) in enumerate(zip(results.config.imbalances, colors, strict=True)):
            style.band(ax, steps, trace[:, i], color, rf"start: U $\times$ {factor:g}, W $/$ {factor:g}")
            ax.plot([1.03 * steps[-1]], [forecasts[i, 1]], "<", color=color, ms=8, mec=style.THEORY)
            ax.plot([0], [forecasts[i, 0]], "o", color=color, ms=6, mec=style.THEORY)
        ax.plot([], [], "<", color=style.MUTED, mec=style.THEORY, ls="none", label="forecast made at step 0")
        ax.plot([], [], "o", color=style.MUTED, mec=style.THEORY, ls="none", label="measured at step 0")
        ax.set(
            xlabel="SGD step",
            ylabel="sharpness Tr $H$",
            yscale="log",
            title=f"{point.name} net, from one minimum of the loss",
        )
        ax.legend(fontsize=8)
    return fig


ACROSS = (
    "the forecast moves along the orbit of today's function; the ReLU net also moves across orbits (its "
    "function and its "
    "set of active units change under noise), which no single measurement can know"
)


def _scored(point: SharpnessPoint) -> dict[str, Any]:
    """How a forecast is judged: in the limit eta -> 0 for the linear net, within 12 % for the ReLU net."""
    return {"tolerance": 0.12, "reason": ACROSS, "analysis": ACROSS} if point.activation else {"order": 1}


def larger_rate(config: SharpnessConfig) -> SharpnessConfig:
    """1.5 times all rates, as many relaxation times."""
    cases = {name: replace(case, lr=1.5 * case.lr) for name, case in config.cases.items()}
    return replace(config, cases=cases, steps=round(config.steps / 2.25))


def verdicts(results: Results[SharpnessConfig, SharpnessPoint]) -> list[Verdict]:
    """Final sharpness against the forecast, for every start."""
    out = []
    for point, _ in results.points:
        trace, forecasts = results.array(point.name, "trace"), results.array(point.name, "forecasts")
        for i, factor in enumerate(results.config.imbalances):
            label = f"{point.name}, U times {factor:g}: Tr H at the end / at the start"
            ratio = trace[-6:, i].mean(0) / trace[0, i]
            out.append(from_seeds(label, forecasts[i, 1] / forecasts[i, 0], ratio, **_scored(point)))
        spread = trace[-6:].mean(0)
        claim = f"{point.name}: largest / smallest final Tr H over the starts"
        analysis = _arrival(results.config.imbalances, trace.mean(-1), forecasts[:, 1])
        out.append(
            from_seeds(
                claim,
                1,
                spread.max(0) / spread.min(0),
                0.1,
                analysis=analysis,
                reason="a maximum over starts",
            )
        )
    return out


def _arrival(factors: Sequence[float], trace: np.ndarray, forecast: np.ndarray) -> str:
    """How far the start farthest from its forecast is, `trace` `[checkpoints, starts]`, and how it still moves."""
    late, before = trace[-6:].mean(0), trace[-12:-6].mean(0)
    i = int(np.abs(np.log(late / forecast)).argmax())
    return (
        f"Not all starts have arrived: from U times {factors[i]:g}, Tr H is {late[i] / forecast[i] - 1:+.1%} off its "
        f"forecast, and changes by {late[i] / before[i] - 1:+.1%} from the last but one to the last 15 % of the steps."
    )


EXPERIMENT = Experiment(
    id="sharpness",
    title="Beyond the paper: sharpening and flattening forecast from one measurement",
    statement="sharpness",
    coarser=Coarser(1.5, larger_rate),
    setup=(
        "Two-layer linear and ReLU nets fitted by GD to y = x (d = 8, anisotropic inputs and label noise), then "
        "rescaled along the orbit by 0.5, 1 and 2. The forecast uses gradient and curvature moments at step 0 only; "
        "then SGD trains on."
    ),
    scales=SCALES,
    points=points,
    compute=compute,
    plot=plot,
    verdicts=verdicts,
    settings=(
        Setting(
            "hidden width",
            "8, equal to d",
            "hidden directions that a wider linear net does not use have no finite equilibrium and would be left out",
        ),
        Setting("the curve", "Gauss-Newton trace on 2,000 inputs", "equal to Tr H up to the residuals' mean"),
        Setting("learning rate and batch", "0.02 and 40", "enter through terms of order eta"),
    ),
    exploratory=(
        "The run length was raised from 8,000 to 18,000 steps after a run in which four of the eight claims failed "
        "because the larger starts had not arrived (linear, U times 2: 0.608 against 0.536 predicted), and to "
        "30,000 for the "
        "same reason later. The 12 % of the ReLU net was settled on the first series of seeds."
    ),
    variations={
        "learning rate 0.028, half the steps": {
            "cases": {k: replace(case, lr=0.028) for k, case in CASES.items()},
            "steps": 9000,
        },
        "weaker anisotropy (0.8 and 0.7)": {"phi_x": 0.8, "phi_eps": 0.7},
    },
    beyond=True,
)
