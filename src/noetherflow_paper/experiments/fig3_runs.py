"""The runs behind figure 3: scales, points, simulations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from noetherflow.core.settings import SGDConfig
from noetherflow_paper import closed_form as cf
from noetherflow_paper.experiment import generator, plain
from noetherflow_paper.generic import closed_form_gaps
from noetherflow_paper.records import Config, ExperimentPoint
from noetherflow_paper.simulate import LinearNet, Method, Params, normal, reduced_width, simulate


class Schedule(NamedTuple):
    """A learning rate, a batch size and a number of steps."""

    lr: float
    batch: int
    steps: int


class Phase(NamedTuple):
    """Steps with learning rate and decay times a factor, before those that are measured."""

    factor: float
    steps: int


@dataclass(frozen=True, kw_only=True)
class GivenRun:
    """The paper's own sizes, at which the un-normalised loss diverges."""

    d: int = 100
    width: int = 2000
    lr: float = 0.1
    batch: int = 100


@dataclass(frozen=True, kw_only=True)
class Fig3Config(Config):
    """The loss, the anisotropies and decays, and the schedules of all runs.

    `before_noise` and `before_strong` are the phases in front of the runs without decay and with the strong one; `gd`
    has batch 1, which GD does not use.
    """

    d: int
    width: int = 2000
    loss_scale: float
    phi: float = 0.2
    phis: tuple[float, ...]
    label_phis: tuple[float, ...] = (0.15, 0.3, 0.5)
    decay: float = 1e-4
    strong_decay: float
    gd_decay: float
    gd: Schedule
    before_noise: tuple[Phase, ...] = ()
    before_strong: tuple[Phase, ...] = ()
    main: Schedule
    lrs: tuple[Schedule, ...]
    given: GivenRun = GivenRun()
    seeds: int


@dataclass(frozen=True, kw_only=True)
class Fig3Point(ExperimentPoint):
    """Runs over `phis` with one schedule and decay; those without `run` (`hessian`, `generic`) train nothing."""

    method: Method = "sgd"
    run: Schedule | None = None
    before: tuple[Phase, ...] = ()
    decay: float = 0.0
    scale: float = 1.0
    phis: tuple[float, ...] = ()
    start: str = ""
    d: int = 0


SCALES = {
    "quick": Fig3Config(
        d=20,
        loss_scale=1.0,
        phis=(0.15, 0.3, 0.5, 0.7, 1.0),
        strong_decay=0.01,
        gd_decay=0.016,
        gd=Schedule(0.03, 1, 8000),
        main=Schedule(0.04, 100, 16_000),
        lrs=(Schedule(0.08, 200, 4500), Schedule(0.04, 100, 9000), Schedule(0.02, 50, 18_000)),
        seeds=5,
    ),
    "paper": Fig3Config(
        d=100,
        loss_scale=0.01,
        phis=(0.15, 0.2, 0.3, 0.5, 0.7, 1.0),
        strong_decay=1e-5,
        gd_decay=1e-4,
        gd=Schedule(1.0, 1, 25_000),
        before_noise=(Phase(16, 24_000), Phase(8, 36_000)),
        before_strong=(Phase(16, 6000), Phase(8, 16_000)),
        main=Schedule(0.1, 100, 24_000),
        lrs=(Schedule(1.6, 200, 30_000), Schedule(0.8, 100, 60_000), Schedule(0.4, 50, 120_000)),
        seeds=5,
    ),
}


def points(config: Fig3Config) -> list[Fig3Point]:
    """Sweeps of the inputs' and the labels' phi, GD with decay, three rates, strong decay, the given rate, Hessians."""
    c = config
    once = Fig3Point(name="", run=c.main, scale=c.loss_scale, phis=(c.phi,), d=c.d)
    sweep, local = replace(once, start="balanced", phis=c.phis), replace(once, start="equilibrium")
    given = Schedule(c.given.lr, c.given.batch, 40)
    return [
        replace(sweep, name="sgd", before=c.before_noise),
        replace(sweep, name="sgd decay", decay=c.decay),
        replace(sweep, name="labels", before=c.before_noise, phis=c.label_phis),
        replace(sweep, name="gd", method="gd", run=c.gd, decay=c.gd_decay, start="kaiming"),
        *(replace(local, name=f"lr{i}", run=schedule) for i, schedule in enumerate(c.lrs)),
        replace(local, name="strong decay", before=c.before_strong, decay=c.strong_decay),
        replace(once, name="given", start="kaiming", scale=1.0, d=c.given.d, run=given),
        Fig3Point(name="hessian"),
        Fig3Point(name="generic"),
    ]


def covariances(point: Fig3Point, d: int) -> tuple[Tensor, Tensor]:
    """`(Sig_x, Sig_eps)`, `[phis, d, d]`: the point's variances (phi, 2 - phi) for the inputs, or for the labels."""
    varied = torch.stack([cf.identity_covariance(phi, d) for phi in point.phis])
    eye = torch.eye(d, dtype=torch.float64).expand_as(varied)
    return (eye, varied) if point.name == "labels" else (varied, eye)


def start(kind: str, sigma_x: Tensor, width: int, rng: torch.Generator) -> Params:
    """Norm- or noise-balanced factors of the identity, or Kaiming rotated into width `2 d`; `[R, ...]`."""
    count, d = sigma_x.shape[:2]
    eye = torch.eye(d, dtype=torch.float64).expand(count, -1, -1)
    if kind == "kaiming":
        w, u = (2 / d) ** 0.5 * normal((count, width, d), rng), (2 / width) ** 0.5 * normal((count, d, width), rng)
        u, w = reduced_width(u, w)
        return [w, u]
    u, w = cf.norm_balanced(eye) if kind == "balanced" else cf.two_layer(eye, *cf.noise_matrices(sigma_x, eye))
    return [w, u]


def compute(config: Fig3Config, point: Fig3Point) -> dict[str, Any]:
    """Norm ratio and Hessian trace (halved loss), averaged over the last quarter, `[phis, seeds]`.

    The phases of `before`, `[factor, steps]`, go first: learning rate and decay times a factor, which makes the flow
    `factor^2` times faster and leaves its end (for eta -> 0) where it is.
    """
    if point.name == "hessian":
        return plain(hessian_traces())
    if point.run is None:
        return plain(generic_gaps(config))
    d, (lr, batch, steps), decay = point.d, point.run, point.decay
    seeds = config.seeds if point.method == "sgd" else 2
    sigma_x, sigma_eps = covariances(point, d)
    eye = torch.eye(d, dtype=torch.float64)
    sigma_x, sigma_eps = (m.repeat_interleave(seeds, 0) for m in (sigma_x, sigma_eps))
    net = LinearNet.of(eye, sigma_x, sigma_eps, batch, point.scale)

    def record(params: Params) -> dict[str, Tensor]:
        w, u = params
        ratio = u.square().sum((1, 2)) / w.square().sum((1, 2))
        return {"ratio": ratio, "trace": cf.two_layer_hessian_trace(u, w, sigma_x, 0.5)}

    marks = range(3 * steps // 4, steps + 1, max(1, steps // 80))
    width = config.width if point.name == "given" else 2 * d
    now, rng = start(point.start, sigma_x, width, generator(11)), generator(12)
    for factor, count in point.before:
        now = simulate(net, now, count, factor * lr, rng, at=0, weight_decay=factor * decay).params
    run = simulate(net, now, steps, lr, rng, record, at=marks, method=point.method, weight_decay=decay)
    shaped: dict[str, Any] = {k: v.mean(0).reshape(len(point.phis), seeds) for k, v in run.records.items()}
    return plain(shaped | {"diverged": run.diverged.double().reshape(-1, seeds)})


def generic_gaps(config: Fig3Config) -> dict[str, Any]:
    """How far the generic machinery's norm ratios and Hessian traces are from the closed forms, relative.

    With d at most 20: every second phi of the inputs, the first of the labels, and inputs with the strong decay.
    """
    d, scale, (lr, batch, _) = min(config.d, 20), config.loss_scale, config.main
    of, eye = (lambda phi: cf.identity_covariance(phi, d)), torch.eye(d, dtype=torch.float64)
    cases = [*((of(phi), eye, 0.0) for phi in config.phis[::2]), (eye, of(config.label_phis[0]), 0.0)]
    cases.append((of(config.phi), eye, config.strong_decay))
    gaps = [closed_form_gaps(eye, sx, se, SGDConfig(lr, batch, decay), scale) for sx, se, decay in cases]
    return dict(zip(("ratio", "trace"), zip(*gaps, strict=True), strict=True))


def hessian_traces() -> dict[str, float]:
    """Tr H of the population loss by autograd at a random point, un-halved and halved, over the printed formula."""
    rng = generator(9)
    u, w, v = normal((3, 4), rng), normal((4, 5), rng), normal((3, 5), rng)
    root = normal((5, 5), rng)
    sigma_x = root @ root.mT

    def loss(flat: Tensor) -> Tensor:
        error = flat[:12].reshape(3, 4) @ flat[12:].reshape(4, 5) - v
        return (error @ sigma_x * error).sum()

    hessian: Any = torch.func.hessian(loss)(torch.cat([u.flatten(), w.flatten()]))
    printed = 3 * (w @ sigma_x @ w.mT).trace() + u.square().sum() * sigma_x.trace()
    return {"whole": float(hessian.trace() / printed), "halved": float(hessian.trace() / 2 / printed)}


def replica_steps(point: Fig3Point) -> int:
    """Steps of all runs of a point together, without seeds."""
    if point.run is None:
        return 0
    return len(point.phis) * (point.run.steps + sum(phase.steps for phase in point.before))
