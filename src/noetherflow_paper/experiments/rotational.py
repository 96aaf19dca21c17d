"""Beyond the paper: the norm at which AdamW holds a layer in front of a normalisation, for noise of any shape."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import noetherflow as nf
from noetherflow.report import style
from noetherflow_paper.experiment import Experiment, Results, Setting, generator, plain
from noetherflow_paper.records import Config, ExperimentPoint
from noetherflow_paper.simulate import OnStep, Params, checkpoints, normal, simulate
from noetherflow_paper.verdict import Verdict, from_seeds


@dataclass(frozen=True, kw_only=True)
class RotationalConfig(Config):
    """A layer whose scale does not matter, its data, and AdamW's settings."""

    inputs: int = 8
    outputs: int = 6
    batch: int = 8
    lr: float = 2e-3
    decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.9995
    teacher: int = 1
    measured: int = 40_000
    steps: int
    starts: int


SCALES = {
    "quick": RotationalConfig(steps=30_000, starts=16),
    "paper": RotationalConfig(lr=1e-3, b2=0.99975, steps=120_000, starts=48),
}


@dataclass(frozen=True, kw_only=True)
class RotationalPoint(ExperimentPoint):
    """How unequal the gradient noise of the entries is: input and label scales between `1 / spread` and `spread`."""

    spread: float


def points(config: RotationalConfig) -> list[RotationalPoint]:
    """Noise of one size, and noise in inputs and outputs that goes along with the weights."""
    return [RotationalPoint(name="uniform", spread=1.0), RotationalPoint(name="non-uniform", spread=3.0)]


class UnitScale(nn.Module):
    """`x -> (W / |W|) x`: the scale of `W` does not matter."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight / self.weight.norm()).mT


@dataclass(frozen=True, eq=False)
class ScaleFreeLayer:
    """`|| (W / |W|) x - W* x - eps ||^2`, `|W*| = 1`; fresh data each step. `params` is `[W]`, `[R, outputs, inputs]`.

    The entries of `W*` are large where inputs are large, so that noise and weights are correlated.
    """

    teacher: Tensor
    scale_x: Tensor
    scale_eps: Tensor
    batch: int

    @classmethod
    def of(cls, config: RotationalConfig, spread: float) -> ScaleFreeLayer:
        """The teacher of a configuration."""
        span = math.log10(spread)
        scale_x = torch.logspace(-span, span, config.inputs, dtype=torch.float64)
        scale_eps = torch.logspace(-span / 2, span / 2, config.outputs, dtype=torch.float64)
        w = normal((config.outputs, config.inputs), generator(config.teacher)) * scale_x * scale_eps[:, None]
        return cls(w / w.norm(), scale_x, scale_eps, config.batch)

    def draw(self, replicas: int, samples: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs and noisy labels, `[R, samples, ...]`."""
        x = normal((replicas, samples, len(self.scale_x)), rng) * self.scale_x
        eps = normal((replicas, samples, len(self.scale_eps)), rng) * self.scale_eps
        return x, x @ self.teacher.mT + eps

    def minibatch_gradient(self, params: Params, rng: torch.Generator) -> Params:
        (w,) = params
        x, y = self.draw(len(w), self.batch, rng)
        norm = w.flatten(1).norm(dim=1)[:, None, None]
        unit = w / norm
        error = (x @ unit.mT - y) * (2 / self.batch)
        gradient = error.mT @ x
        radial = (gradient * unit).sum((1, 2), keepdim=True)
        return [(gradient - radial * unit) / norm]


def predicted(layer: ScaleFreeLayer, config: RotationalConfig) -> float:
    """`|W|` at the equilibrium, from one measurement at the teacher with `|W| = 1`."""
    net = UnitScale(layer.teacher)
    syms = nf.declare(net, "scalar", [("weight", 0)], [])
    x, y = (t[0] for t in layer.draw(1, config.measured, generator(100)))
    batches = list(zip(x.split(4000), y.split(4000), strict=True))
    moments = nf.gradient_moments(net, lambda m, b: (m(b[0]) - b[1]).square().sum(1), batches, syms, entries=True)
    adamw = nf.AdamConfig(config.lr, config.batch, (config.b1, config.b2), weight_decay=config.decay)
    (settled,) = nf.noise_equilibrium(net, syms, moments, adamw)
    return float(settled.element)


def uniform_norm(config: RotationalConfig) -> float:
    """The formula for noise of one size: `sqrt(n lr / (2 w))`."""
    return math.sqrt(config.inputs * config.outputs * config.lr / (2 * config.decay))


def angle(config: RotationalConfig, norm: float) -> float:
    """Root mean square angle of one step: `lr sqrt(n (1 - b1) / (1 + b1)) / |W|`."""
    n = config.inputs * config.outputs
    return config.lr * math.sqrt(n * (1 - config.b1) / (1 + config.b1)) / norm


def watched(config: RotationalConfig, sums: Tensor, first: int) -> OnStep:
    """Adds weight decay to every update as AdamW does, and from step `first` on the squared angle of it to `sums`."""

    def add(step: int, params: Params, updates: Params) -> None:
        (w,), (update,) = params, updates
        if step >= first:
            size = w.flatten(1).norm(dim=1)[:, None, None]
            along = (update * w).sum((1, 2), keepdim=True) * w / size**2
            sums.add_(((update - along) / size).square().sum((1, 2)))
        update.add_(w, alpha=config.lr * config.decay)

    return add


def compute(config: RotationalConfig, point: RotationalPoint) -> dict[str, Any]:
    """Norms `[T, starts]`, rms angles of the second half's steps `[starts]`, and what was predicted."""
    layer, rng = ScaleFreeLayer.of(config, point.spread), generator(3)
    norm = predicted(layer, config)
    away = 4 ** (torch.rand(config.starts, generator=rng, dtype=torch.float64) * 2 - 1)
    start = [layer.teacher * (norm * away)[:, None, None]]
    marks, squares = checkpoints(config.steps, 120), torch.zeros(config.starts, dtype=torch.float64)
    record: Callable[[Params], dict[str, Tensor]] = lambda params: {"norm": params[0].flatten(1).norm(dim=1)}
    half = config.steps // 2
    found = simulate(
        layer,
        start,
        config.steps,
        config.lr,
        rng,
        record,
        at=marks,
        adam=(config.b1, config.b2),
        on_step=watched(config, squares, half),
    )
    angles = (squares / (config.steps - half)).sqrt()
    return dict(plain({"steps": marks, "predicted": norm, "angles": angles, **found.records}))


def ends(results: Results[RotationalConfig, RotationalPoint], name: str) -> np.ndarray:
    """Root mean square norm over the last half of each run."""
    norms = results.array(name, "norm")
    return np.asarray(np.sqrt((norms[len(norms) // 2 :] ** 2).mean(0)))


def plot(results: Results[RotationalConfig, RotationalPoint]) -> Any:
    """Norms of every start with both formulas, for both kinds of noise."""
    fig, axes = style.figure(2, width=4.6, height=3.5)
    for ax, (point, data) in zip(axes, results.points, strict=True):
        steps, norms = results.array(point.name, "steps"), results.array(point.name, "norm")
        ax.plot(steps, norms, color=style.ACCENT, lw=0.6, alpha=0.6)
        ax.axhline(data["predicted"], color=style.THEORY, ls="--", label="predicted from the noise of every entry")
        ax.axhline(uniform_norm(results.config), color=style.SGD, ls=":", label="sqrt(n lr / 2w)")
        ax.set(yscale="log", xlabel="step", ylabel="norm of the layer", title=f"{point.name} noise")
        ax.legend()
    return fig


FINITE = "theory is of first order in rate times decay; asked for before the first run"


def verdicts(results: Results[RotationalConfig, RotationalPoint]) -> list[Verdict]:
    """Norm and angular rate against theory, and how far the formula for uniform noise is off."""
    out = []
    for point, data in results.points:
        norms = ends(results, point.name)
        out.append(from_seeds(f"{point.name} noise: norm at the end", data["predicted"], norms, 0.02, reason=FINITE))
        expected = angle(results.config, data["predicted"])
        angles = results.array(point.name, "angles")
        out.append(from_seeds(f"{point.name} noise: angle of a step", expected, angles, 0.03, reason=FINITE))
    away = np.abs(ends(results, "non-uniform") / uniform_norm(results.config) - 1)
    out.append(from_seeds("non-uniform noise: how far sqrt(n lr / 2w) is off", 0.1, away, relation="above"))
    return out


EXPERIMENT = Experiment(
    id="rotational",
    title="Beyond the paper: the norm at which AdamW holds a normalised layer",
    setup=(
        "A layer of 8 x 6 weights whose scale does not matter, at its teacher, under AdamW with fresh minibatches of "
        "8, from norms within a factor 4. Entries have gradient noise of one size, or of sizes that go along with the "
        "weights. Weight decay and noise balance where sum s theta^2 / sum s = lr / (2 w) (s: root mean square "
        "gradient of an entry); for noise of one size that is the known |W|^2 = n lr / (2 w)."
    ),
    scales=SCALES,
    points=points,
    compute=compute,
    plot=plot,
    verdicts=verdicts,
    settings=(Setting("b2", "0.9995 at lr 2e-3", "(1 - b2) / lr fixed"),),
    exploratory="",
    variations={"batch 32": {"batch": 32}, "another teacher": {"teacher": 2}},
    beyond=True,
)
