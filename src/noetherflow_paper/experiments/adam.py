"""Beyond the paper: SGD and Adam settle at different points of the same orbit, both predicted."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import noetherflow as nf
from noetherflow.core.optimizers import Settings
from noetherflow.report import style
from noetherflow_paper.experiment import Experiment, Results, Setting, generator, plain
from noetherflow_paper.records import Config, ExperimentPoint
from noetherflow_paper.simulate import OnStep, Params, checkpoints, normal, simulate
from noetherflow_paper.verdict import Verdict, from_seeds


@dataclass(frozen=True, kw_only=True)
class OptimizerRun:
    """One optimiser and for how long it runs; `betas` make it Adam, `decay` (decoupled) AdamW, `lion` Lion."""

    lr: float
    steps: int
    betas: tuple[float, float] | None = None
    decay: float = 0.0
    lion: bool = False

    def settings(self, batch: int) -> Settings:
        """The same for `nf.noise_equilibrium`."""
        if self.betas is None:
            return nf.SGDConfig(self.lr, batch)
        if self.lion:
            return nf.LionConfig(self.lr, batch, self.betas, weight_decay=self.decay)
        return nf.AdamConfig(self.lr, batch, self.betas, weight_decay=self.decay)


QUICK = {
    "SGD": OptimizerRun(lr=0.02, steps=50_000),
    "Adam": OptimizerRun(lr=0.01, steps=20_000, betas=(0.9, 0.999)),
    "Adam, half the rate": OptimizerRun(lr=0.005, steps=80_000, betas=(0.9, 0.9995)),
    "Adam, quarter of the rate": OptimizerRun(lr=0.0025, steps=400_000, betas=(0.9, 0.99975)),
    "Adam without memory": OptimizerRun(lr=0.01, steps=20_000, betas=(0.0, 0.999)),
    "AdamW": OptimizerRun(lr=0.01, steps=20_000, betas=(0.9, 0.999), decay=0.05),
}


@dataclass(frozen=True, kw_only=True)
class AdamConfigs(Config):
    """A leaky ReLU net at its teacher, its data, and the optimisers by name."""

    inputs: int = 6
    hidden: int = 4
    outputs: int = 3
    slope: float = 0.3
    batch: int = 8
    spread: float = 2.25
    teacher: int = 4
    measured: int = 400_000
    feedback: int = 10_000
    runs: dict[str, OptimizerRun] = field(default_factory=lambda: dict(QUICK))
    starts: int


SCALES = {
    "quick": AdamConfigs(starts=16),
    "paper": AdamConfigs(
        starts=48,
        measured=1_600_000,
        runs={
            **{name: replace(r, steps=2 * r.steps) for name, r in QUICK.items()},
            "Adam, eighth of the rate": OptimizerRun(lr=0.00125, steps=3_200_000, betas=(0.9, 0.999875)),
            "AdamW, twice the decay": OptimizerRun(lr=0.01, steps=40_000, betas=(0.9, 0.999), decay=0.1),
            "AdamW, half of both": OptimizerRun(lr=0.005, steps=100_000, betas=(0.9, 0.9995), decay=0.05),
            "Lion": OptimizerRun(lr=0.001, steps=160_000, betas=(0.9, 0.99), lion=True),
        },
    ),
}


def points(config: AdamConfigs) -> list[ExperimentPoint]:
    """One point per optimiser."""
    return [ExperimentPoint(name=name) for name in config.runs]


@dataclass(frozen=True, eq=False)
class LeakyStudent:
    """`||U leaky(W x) - U* leaky(W* x) - eps||^2` with anisotropic inputs and label noise; fresh data each step.

    `params` is `[W, U]`, `[R, hidden, inputs]` and `[R, outputs, hidden]`.
    """

    teacher: tuple[Tensor, Tensor]
    root_x: Tensor
    root_eps: Tensor
    slope: float
    batch: int

    @classmethod
    def of(cls, config: AdamConfigs) -> LeakyStudent:
        """The teacher of a configuration."""
        rng = generator(config.teacher)
        w = normal((config.hidden, config.inputs), rng) / math.sqrt(config.inputs)
        u = normal((config.outputs, config.hidden), rng) / math.sqrt(config.hidden)
        root_x = torch.linspace(0.3, 2.0, config.inputs, dtype=torch.float64)
        root_eps = torch.logspace(math.log10(0.2), 0.0, config.outputs, dtype=torch.float64)
        return cls((w, u), root_x, root_eps, config.slope, config.batch)

    def draw(self, replicas: int, samples: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs and noisy labels, `[R, samples, ...]`."""
        w, u = self.teacher
        x = normal((replicas, samples, len(self.root_x)), rng) * self.root_x
        eps = normal((replicas, samples, len(self.root_eps)), rng) * self.root_eps
        return x, nn.functional.leaky_relu(x @ w.mT, self.slope) @ u.mT + eps

    def minibatch_gradient(self, params: Params, rng: torch.Generator) -> Params:
        w, u = params
        x, y = self.draw(len(w), self.batch, rng)
        before = x @ w.mT
        after = nn.functional.leaky_relu(before, self.slope)
        error = (after @ u.mT - y) * (2 / self.batch)
        back = (error @ u) * torch.where(before > 0, 1.0, self.slope)
        return [back.mT @ x, error.mT @ after]

    def model(self) -> nn.Module:
        """The teacher as a torch module."""
        w, u = self.teacher
        first, second = nn.Linear(w.shape[1], w.shape[0], bias=False), nn.Linear(u.shape[1], u.shape[0], bias=False)
        net = nn.Sequential(first, nn.LeakyReLU(self.slope), second).double()
        with torch.no_grad():
            first.weight.copy_(w)
            second.weight.copy_(u)
        return net

    def position(self, params: Params) -> dict[str, Tensor]:
        """Where each hidden unit is on its orbit: log of the factor of its input weights from the teacher's."""
        w, u = params
        own = w.square().sum(-1).log() - u.square().sum(-2).log()
        there = self.teacher[0].square().sum(-1).log() - self.teacher[1].square().sum(-2).log()
        return {"position": (own - there) / 4}


def predicted(student: LeakyStudent, config: AdamConfigs, settings: Settings) -> Tensor:
    """The equilibrium from one measurement at the teacher, under Adam with the feedback of its average of squares:
    log factors of the hidden units.
    """
    net = student.model()
    syms = nf.declare(net, "diagonal", [("0.weight", 0)], [("2.weight", 1)])
    x, y = (t[0] for t in student.draw(1, config.measured, generator(100)))
    squared = lambda m, b: (m(b[0]) - b[1]).square().sum(1)
    moments = nf.gradient_moments(
        net, squared, list(zip(x.split(4000), y.split(4000), strict=True)), syms, entries=True
    )
    feedback = None
    if isinstance(settings, nf.AdamConfig):
        few = list(zip(*(t[: config.feedback].split(500) for t in (x, y)), strict=True))
        feedback = nf.square_feedback(net, squared, few, syms, settings)
    (settled,) = nf.noise_equilibrium(net, syms, moments, settings, feedback=feedback)
    return settled.element.log()


@dataclass
class LionSteps:
    """Turns SGD's updates `lr g` into Lion's, with its average of gradients `m`."""

    run: OptimizerRun
    means: list[Tensor] = field(default_factory=list)

    def __call__(self, step: int, params: Params, updates: Params) -> None:
        """`lr sign(b1 m + (1 - b1) g)` in place of each update, then `m <- b2 m + (1 - b2) g`."""
        assert self.run.betas is not None
        b1, b2 = self.run.betas
        if not self.means:
            self.means = [torch.zeros_like(u) for u in updates]
        for mean, p, update in zip(self.means, params, updates, strict=True):
            gradient = update / self.run.lr
            update.copy_((mean * b1 + gradient * (1 - b1)).sign() + self.run.decay * p).mul_(self.run.lr)
            mean.mul_(b2).add_(gradient, alpha=1 - b2)


def changed_updates(run: OptimizerRun) -> OnStep | None:
    """What makes a step of Lion out of one of SGD, or adds weight decay to Adam's as AdamW does."""
    if run.lion:
        return LionSteps(run)
    if not run.decay:
        return None

    def add(_: int, params: Params, updates: Params) -> None:
        for p, update in zip(params, updates, strict=True):
            update.add_(p, alpha=run.lr * run.decay)

    return add


def compute(config: AdamConfigs, point: ExperimentPoint) -> dict[str, Any]:
    """Positions on the orbit `[T, starts, hidden]`, where they began `[starts, hidden]`, and the prediction."""
    run, student = config.runs[point.name], LeakyStudent.of(config)
    rng = generator(7)
    away = (torch.rand(config.starts, config.hidden, generator=rng, dtype=torch.float64) * 2 - 1) * math.log(
        config.spread
    )
    w, u = student.teacher
    start = [w * away.exp()[:, :, None], u / away.exp()[:, None, :]]
    marks = checkpoints(run.steps, 120)
    found = simulate(
        student,
        start,
        run.steps,
        run.lr,
        rng,
        student.position,
        at=marks,
        adam=None if run.lion else run.betas,
        on_step=changed_updates(run),
    )
    end = predicted(student, config, run.settings(config.batch))
    return plain({"steps": marks, "start": away, "predicted": end, **found.records})


def ends(results: Results[AdamConfigs, ExperimentPoint], name: str) -> np.ndarray:
    """Mean position over the last third of a run, `[starts, hidden]`."""
    positions = results.array(name, "position")
    return np.asarray(positions[-(len(positions) // 3) :].mean(0))


def plot(results: Results[AdamConfigs, ExperimentPoint]) -> Any:
    """Every start of two hidden units under SGD and Adam, with the two predictions."""
    units = np.argsort(results.array("Adam", "predicted"))[[0, -1]]
    fig, axes = style.figure(2, width=4.6, height=3.6)
    for ax, unit in zip(axes, units, strict=True):
        for name, color in (("SGD", style.SGD), ("Adam", style.ACCENT)):
            steps, position = results.array(name, "steps"), results.array(name, "position")[:, :, unit]
            for column in position.T:
                ax.plot(steps / steps[-1], column, color=color, lw=0.6, alpha=0.5)
            ax.axhline(results.array(name, "predicted")[unit], color=color, ls="--", label=f"{name}, predicted")
        ax.set(
            xlabel="time / length of the run", ylabel="log scale of the input weights", title=f"hidden unit {unit + 1}"
        )
        ax.legend()
    return fig


FALLING_RATES = (
    "Adam, half the rate",
    "Adam, quarter of the rate",
    "Adam, eighth of the rate",
)
"""Each half of the one before; the last two are extrapolated to rate 0."""
FINITE = "at a finite rate; terms of first order in the rate, taken out by the claims with the rate extrapolated to 0"


SECOND_ORDER = (
    "What v does where it follows the fluctuations (kap in theory.md section 13) is in the prediction, and is small "
    "here: 0.004 at most. The deviation falls with the rate; terms of second order in it are not in the theory."
)
LIMIT = (
    "The prediction's own error is 0.0014 from 400,000 samples (over four sets of them) and not in z, and two rates "
    "leave the second order in the rate. From a quarter and an eighth of the rate and four times the samples, at "
    "the paper's scale, all four units agree."
)
SGD_AT_ITS_RATE = (
    "SGD's end is taken at its finite rate, where it is 0.006 below its prediction in the mean over units."
)


def verdicts(results: Results[AdamConfigs, ExperimentPoint]) -> list[Verdict]:
    """End points unit by unit, their distance, and what is left of the start."""
    out = []
    for name in results.config.runs:
        at_end, target = ends(results, name), results.array(name, "predicted")
        for unit, where in enumerate(target):
            claim = f"{name}: log scale of hidden unit {unit + 1}"
            out.append(
                from_seeds(claim, where, at_end[:, unit], 0.08, relative=False, reason=FINITE, analysis=SECOND_ORDER)
            )
        start = results.array(name, "start")
        kept = [float(np.polyfit(start[:, unit], at_end[:, unit], 1)[0]) for unit in range(len(target))]
        out.append(
            from_seeds(
                f"{name}: part of the start that is left",
                0,
                kept,
                0.15,
                relative=False,
                reason="what is left of the starts",
            )
        )
    coarse, fine = [name for name in FALLING_RATES if name in results.config.runs][-2:]
    limit = 2 * ends(results, fine) - ends(results, coarse)
    apart = (limit - ends(results, "SGD")).mean(1)
    expected = float((results.array("Adam", "predicted") - results.array("SGD", "predicted")).mean())
    claim = "Adam, rate extrapolated to 0, minus SGD: mean over hidden units"
    out.append(from_seeds(claim, expected, apart, relative=False, analysis=SGD_AT_ITS_RATE))
    for unit, where in enumerate(results.array("Adam", "predicted")):
        claim = f"Adam, rate extrapolated to 0: log scale of hidden unit {unit + 1}"
        out.append(from_seeds(claim, where, limit[:, unit], relative=False, analysis=LIMIT))
    memory = (ends(results, "Adam without memory") - ends(results, "Adam")).mean(1)
    out.append(from_seeds("Adam without memory minus with, mean over units", 0, memory, relative=False))
    return out


EXPERIMENT = Experiment(
    id="adam",
    title="Beyond the paper: SGD and Adam settle at different points of the same orbit, both predicted",
    setup=(
        "A leaky ReLU net 6-4-3 at its teacher, with anisotropic inputs and label noise, minibatches of 8 fresh "
        "samples, started at random points of its orbit (each hidden unit's input weights up to 2.25 times larger or "
        "smaller, its output weights the inverse: the same function). One measurement at the teacher predicts where "
        "every optimiser ends: SGD at the least sum of squares of the gradient noise, Adam at the least sum of its "
        "root mean squares."
    ),
    scales=SCALES,
    points=points,
    compute=compute,
    plot=plot,
    verdicts=verdicts,
    settings=(
        Setting(
            "optimisers",
            "SGD 0.02; Adam 0.01, 0.005, 0.0025; without memory (RMSprop); AdamW 0.01, decay 0.05",
            "the paper's scale adds Adam 0.00125, decay 0.1, half of both, and Lion",
        ),
        Setting(
            "b2",
            "0.999 at lr 0.01, 0.9995 at 0.005, 0.99975 at 0.0025, 0.999875 at 0.00125",
            "the theory's limit is lr to 0 at fixed (1 - b2) / lr",
        ),
    ),
    exploratory=(
        "The teacher's seed was chosen among twelve so that all units relax within the runs (predicted relaxation "
        "times), before any end point was looked at. A first run half as long had a tenth of the start left under "
        "Adam and missed five of the tolerances; runs were then doubled, the tolerances left as they were. Lion and "
        "the other decays were looked at with 16 starts before they were added: AdamW with decay 0.1 is 0.095 off in "
        "one unit (which fails), 0.032 at half of both; Lion 0.09 off at lr 0.001 and 0.04 at 0.0005. On the second "
        "series of seeds three units of Adam missed their tolerances and the limits from 0.01 and 0.005 missed theirs; "
        "only then the feedback of v and the quarter of the rate were added, and the moments measured on ten times the "
        "samples (the error of the first prediction was 0.01). Unit 3 then missed its limit at both scales (z -5.1 and "
        "-4.5); only then the paper's scale got an eighth of the rate and four times the samples."
    ),
    variations={"batch 4": {"batch": 4}, "another teacher": {"teacher": 3}},
    beyond=True,
)
