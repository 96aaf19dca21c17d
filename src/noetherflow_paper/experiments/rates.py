"""Scalar two-layer net: the imbalance decays at a rate given by the noise of the product's gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.integrate import quad, solve_ivp

from noetherflow.core.settings import SGDConfig
from noetherflow.report import style
from noetherflow_paper import closed_form as cf
from noetherflow_paper.experiment import Experiment, Results, Setting, generator, plain
from noetherflow_paper.generic import agreement, generic_charges, largest_gap, product_design
from noetherflow_paper.records import Config, ExperimentPoint
from noetherflow_paper.simulate import LinearNet, Method, Params, checkpoints, simulate
from noetherflow_paper.verdict import Verdict, from_ratio, from_seeds


@dataclass(frozen=True, kw_only=True)
class RatesSetting:
    """A learning rate, a batch size and the standard deviation of the label noise."""

    lr: float
    batch: int
    noise: float


SETTINGS = (
    RatesSetting(lr=0.02, batch=8, noise=1.0),
    RatesSetting(lr=0.02, batch=8, noise=0.5),
    RatesSetting(lr=0.02, batch=32, noise=1.0),
    RatesSetting(lr=0.01, batch=8, noise=1.0),
    RatesSetting(lr=0.01, batch=2, noise=2.0),
    RatesSetting(lr=0.005, batch=2, noise=1.0),
)


@dataclass(frozen=True, kw_only=True)
class RatesConfig(Config):
    """The settings compared, the start (`u = start`), the SDE's substeps, GD's first `u w`, and the length of runs."""

    settings: tuple[RatesSetting, ...] = SETTINGS
    start: float = 1.5
    substeps: int = 4
    gd_product: float = 0.5
    seeds: int
    folds: float


@dataclass(frozen=True, kw_only=True)
class RatesPoint(ExperimentPoint):
    """One method at one of the settings (its position); `generic` trains nothing."""

    method: Method | None = None
    setting: int = 0


SCALES = {"quick": RatesConfig(seeds=48, folds=0.8), "paper": RatesConfig(seeds=512, folds=3.0)}


def points(config: RatesConfig) -> list[RatesPoint]:
    """One point per setting; GD and the SDE for the first; the generic machinery for all."""
    runs = [RatesPoint(name=f"sgd{i}", method="sgd", setting=i) for i in range(len(config.settings))]
    others = [RatesPoint(name="gd", method="gd"), RatesPoint(name="sde", method="sde")]
    return [*runs, *others, RatesPoint(name="generic")]


def leading(setting: RatesSetting) -> float:
    """`eta^2 Var[dl/d(uw)] / S` per step."""
    return cf.scalar_decay_rate(setting.lr, setting.batch, 1.0, setting.noise**2)


def rate(setting: RatesSetting, imbalance: float, step: float) -> float:
    """`4 eta^2 (noise^2 / S + v (step + 2 / S))` per step at `u w = 1`, at first order in eta: R_B of `dl/d(uw)`.

    `v = k noise^2 / S / (2 - k (step + 2 / S))`, `k = 2 eta (u^2 + w^2)`, is the stationary variance of `u w - 1`.
    `step` is the length of a step in units of eta: 1 for SGD, 1 / substeps for the SDE, whose exact solution (0) does
    not feel the square of the mean gradient.
    """
    lr, batch, noise2 = setting.lr, setting.batch, setting.noise**2
    feels = step + 2 / batch
    k = 2 * lr * float(np.hypot(2, imbalance))
    variance = k * noise2 / batch / (2 - k * feels)
    return 4 * lr**2 * (noise2 / batch + variance * feels)


def predicted_curve(config: RatesConfig, setting: RatesSetting, steps: np.ndarray, step: float = 1.0) -> np.ndarray:
    """`|u^2 - w^2|` at the steps: `dC/dk = -rate(C) C` from the start."""
    first = [imbalance(config)]
    run = solve_ivp(lambda _, c: -rate(setting, c[0], step) * c, (0, steps[-1]), first, t_eval=steps, rtol=1e-8)
    return np.asarray(run.y[0])


def mean_rate(curve: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """`-log(C_k / C_0) / k` over the whole run."""
    return np.asarray(np.log(curve[0] / curve[-1]) / steps[-1])


def gd_loss(config: RatesConfig) -> float:
    """What GD loses of `|u^2 - w^2|` before it stops, relative to it and divided by eta, as eta -> 0.

    A step loses `eta^2 g^2`, `g = 2 e` with `e = u w - 1`; along the gradient flow `de/dt = -2 e (u^2 + w^2)`, so that
    the sum is `eta int_0^|e_0| 2 e / (u^2 + w^2) de`, `u^2 + w^2 = sqrt(C^2 + 4 (u w)^2)`.
    """
    first, e0 = imbalance(config, config.gd_product), config.gd_product - 1
    along = lambda e: 2 * e / float(np.hypot(first, 2 * (1 + np.sign(e0) * e)))
    return float(quad(along, 0, abs(e0))[0])


def imbalance(config: RatesConfig, product: float = 1.0) -> float:
    """`u^2 - w^2` at `u = start`, `w = product / start`."""
    return float(config.start**2 - (product / config.start) ** 2)


def length(config: RatesConfig, index: int) -> int:
    """Steps in which the imbalance falls by `exp(-folds)`, at leading order."""
    return int(config.folds / leading(config.settings[index]))


def compute(config: RatesConfig, point: RatesPoint) -> dict[str, Any]:
    """`|u^2 - w^2|` at checkpoints, `[T, seeds]`, from `u = 1.5`, `w = 2/3` at the minimum `u w = 1`.

    GD starts at `u w = gd_product` instead, with the full and half the learning rate, `[T, 2]`.
    """
    if point.method is None:
        return plain({"gaps": [generic_gap(config, i) for i in range(len(config.settings))]})
    s, gd = config.settings[point.setting], point.method == "gd"
    one = torch.ones(2 if gd else config.seeds, 1, 1, dtype=torch.float64)
    product = config.gd_product if gd else 1.0
    net = LinearNet.of(one[:1], one[:1], s.noise**2 * one[:1], s.batch)
    steps = length(config, point.setting)

    def record(params: Params) -> dict[str, torch.Tensor]:
        w, u = params
        return {"imbalance": (u.square() - w.square()).abs().flatten()}

    run = simulate(
        net,
        [product / config.start * one, config.start * one],
        steps,
        torch.tensor([1, 0.5], dtype=torch.float64) * s.lr if gd else s.lr,
        generator(10 + point.setting),
        record,
        at=checkpoints(steps, 50),
        method=point.method,
        substeps=config.substeps,
    )
    return plain({"steps": run.steps, **run.records})


def generic_gap(config: RatesConfig, index: int) -> float:
    """How far the generic machinery's `w^2 - u^2` is from `C_0 exp(-leading k)` along the run, relative to `C_0`."""
    s, one = config.settings[index], torch.ones(1, 1, dtype=torch.float64)
    marks = checkpoints(length(config, index), 10)
    weights = [one / config.start, config.start * one]
    data = product_design(one, one, s.noise**2 * one)
    found = generic_charges(weights, *data, SGDConfig(s.lr, s.batch), marks).flatten()
    closed = -imbalance(config) * torch.exp(-leading(s) * torch.tensor(marks, dtype=torch.float64))
    return largest_gap(found, closed)


def measured(results: Results[RatesConfig, RatesPoint], name: str) -> np.ndarray:
    """The mean rate over the run per seed."""
    return mean_rate(results.array(name, "imbalance"), results.array(name, "steps"))


def predicted(results: Results[RatesConfig, RatesPoint], index: int, name: str, step: float = 1.0) -> float:
    """The mean rate over the same steps at first order in eta."""
    c, steps = results.config, results.array(name, "steps")
    return float(mean_rate(predicted_curve(c, c.settings[index], steps, step), steps))


def plot(results: Results[RatesConfig, RatesPoint]) -> Any:
    """Decay curves, measured over predicted rates by setting, and SGD against the SDE."""
    fig, (curves, rates) = style.figure(2, width=5.4)
    colors = (style.SGD, "#74b3e0", style.ACCENT, style.OTHER, "#5b8c5a", "#a05a2c")
    settings = results.config.settings
    names = [rf"$\eta$={s.lr}, S={s.batch}, $\sigma_\epsilon$={s.noise}" for s in settings]
    for i, s in enumerate(settings):
        steps = results.array(f"sgd{i}", "steps")
        time = leading(s)
        style.band(curves, time * steps, results.array(f"sgd{i}", "imbalance"), colors[i], names[i])
        curves.plot(time * steps, predicted_curve(results.config, s, steps), "--", color=style.THEORY, lw=0.8)
    gd_label = f"GD from u w = {results.config.gd_product}"
    gd_time = leading(settings[0]) * results.array("gd", "steps")
    curves.plot(gd_time, results.array("gd", "imbalance")[:, 0], color=style.GD, label=gd_label)
    curves.plot([], [], "--", color=style.THEORY, lw=0.8, label="theory, first order")
    curves.set(
        xlabel=r"$k\,\eta^2\,$Var$[\partial\ell/\partial(uw)]/S$ (steps in units of the leading-order time)",
        ylabel=r"$|u^2 - w^2|$",
        yscale="log",
        title="the imbalance decays: one curve",
    )
    curves.legend(fontsize=7.5)
    rows = [*((f"sgd{i}", i, 1.0, names[i], colors[i]) for i in range(len(settings)))]
    rows.append(("sde", 0, 1 / results.config.substeps, "SDE, first setting", style.SDE))
    for place, (name, i, step, _, color) in enumerate(rows):
        base = leading(settings[i])
        rates.plot(predicted(results, i, name, step) / base, place, "|", color=style.THEORY, ms=16, mew=2)
        values = measured(results, name) / base
        error = 2 * values.std(ddof=1) / len(values) ** 0.5
        rates.errorbar(values.mean(), place, xerr=error, fmt="o", color=color, ms=5, capsize=2)
    rates.plot([], [], "|", color=style.THEORY, ms=12, mew=2, ls="none", label="theory, first order")
    rates.axvline(1, color=style.MUTED, ls=":", label="leading order")
    rates.set_yticks(range(len(rows)), [label for _, _, _, label, _ in rows], fontsize=8)
    rates.set(xlabel="rate / leading-order rate", title="measured and predicted rates", ylim=(len(rows) - 0.5, -0.5))
    rates.legend(fontsize=8)
    return fig


def verdicts(results: Results[RatesConfig, RatesPoint]) -> list[Verdict]:
    """One rate per setting, the SDE's, what little GD loses, and theory twice."""
    out = []
    c = results.config
    for i, s in enumerate(c.settings):
        label = f"decay rate per step at lr {s.lr}, S {s.batch}, noise {s.noise}"
        rates = predicted(results, i, f"sgd{i}"), measured(results, f"sgd{i}")
        out.append(from_seeds(label, *rates, difference=1 if i == 0 else 0))
    sde, sgd = predicted(results, 0, "sde", 1 / c.substeps), predicted(results, 0, "sgd0")
    label = f"SDE by Euler-Maruyama ({c.substeps} substeps), first setting: decay rate per step"
    out.append(from_seeds(label, sde, measured(results, "sde"), statement="discrete"))
    label = "the SDE's rate / SGD's: the SDE hardly feels the squared mean gradient"
    out.append(from_ratio(label, sde / sgd, measured(results, "sde"), measured(results, "sgd0"), statement="discrete"))
    gd = results.array("gd", "imbalance")
    full, half = 1 - gd[-1] / gd[0]
    start = f"GD from u w = {c.gd_product}"
    out += [
        Verdict(
            f"{start}: relative loss of |u^2 - w^2| over eta (eta g^2 per step), eta -> 0 from two rates",
            gd_loss(c),
            float(4 * half - full) / c.settings[0].lr,
            tolerance=0.05,
            reason="no noise; terms of the next order in eta",
        ),
        Verdict(
            f"{start}: the loss at half the rate / at the full rate",
            0.5,
            float(half / full),
            tolerance=0.05,
            reason="no noise; terms of the next order in eta",
        ),
        from_ratio(
            f"{start}: its rate of loss over the run / SGD's, first setting",
            0.02,
            float(mean_rate(gd[:, 0], results.array("gd", "steps"))),
            measured(results, "sgd0"),
            relation="below",
        ),
        agreement("u^2 - w^2 along the run, all settings, leading order", results.array("generic", "gaps"), 1e-3),
    ]
    return out


EXPERIMENT = Experiment(
    id="rates",
    title="The imbalance of a scalar two-layer net decays at the predicted rate",
    statement="rate",
    setup=(
        "l = (u w x - y)^2, x ~ N(0, 1), y = x + eps, started at the minimum with u = 1.5, w = 2/3; six settings. "
        "Theory at first order in eta: the second moment R_B of the minibatch gradient, with the stationary "
        "fluctuation of u w. The SDE d theta = -gbar dt + sqrt(eta Cov[g_B]) dB is integrated by Euler-Maruyama, four "
        "substeps per step. GD starts off the minimum, at u w = 0.5, and loses eta^2 g^2 of u^2 - w^2 per step until "
        "it gets there. The leading order is found twice: by the closed form, and by find_symmetries, "
        "gradient_moments and noether_flow on a data set with these moments."
    ),
    scales=SCALES,
    points=points,
    compute=compute,
    plot=plot,
    verdicts=verdicts,
    settings=(
        Setting(
            "the six settings",
            "eta 0.005 to 0.02, S 2 to 32, noise 0.5 to 2",
            "rates differ by a factor of 16 (a different S, eta or noise each), four of the six share the lowest",
        ),
        Setting("start", "u = 1.5, w = 2/3", "the rate does not depend on it at leading order"),
        Setting("substeps of the SDE", "4", "they leave a quarter of the mean gradient's part, which is predicted"),
    ),
    exploratory=(
        "The leading order was tried first, with a tolerance of 8 % to leave room for the corrections of order eta "
        "seen in a first run (2 to 6 %); the first order, with 3 %, replaced it after that. The SDE's tolerances were "
        "set before its first run. GD was first started at the minimum, where nothing moves. Of its "
        "claims from u w = 0.5 the loss at the full rate was first to be the first order's within 5 %; it was 5.6 % "
        "more, at half the rate 2.8 %, and the limit eta -> 0 took its place."
    ),
)
