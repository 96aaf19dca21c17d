"""SGD against the forecast of its charges: a digits MLP and a low-rank adapter, many seeds, ten checkpoints.

Writes docs/figures/forecast_training.png and prints the numbers of docs/equilibrium.md:
python examples/noise_equilibrium_training.py [OUT]
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

import noetherflow as nf
from noetherflow.equilibrium.flow import Flow
from noetherflow.moments.minibatch import MinibatchMeter
from noetherflow.workloads import cross_entropy, digits, squared_error

OUT = Path(__file__).parent.parent / "docs" / "figures"
CHECKPOINTS = 10
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Task:
    """A trained model moved off its equilibrium, its noise, and how SGD goes on from there.

    `draw(shape, rng)` gives fresh samples with leading axes `shape`; `loss(model, batch)` per-sample losses.
    """

    name: str
    model: nn.Module
    draw: Callable[[tuple[int, ...], torch.Generator], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    sgd: nf.SGDConfig
    steps: int

    @property
    def syms(self) -> nf.SymmetrySet:
        return nf.find_symmetries(self.model, self.draw((4,), torch.Generator().manual_seed(0))[0])

    def marks(self) -> list[int]:
        """The start and the checkpoints."""
        return [self.steps * k // CHECKPOINTS for k in range(CHECKPOINTS + 1)]


class _Called(nn.Module):
    """Parameters as a callable, so that one loss function serves modules and stacked parameters."""

    def __init__(self, model: nn.Module, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        object.__setattr__(self, "run", lambda x: functional_call(model, parameters, (x,)))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


def train(
    task: Task,
    seeds: int,
    steps: int,
    on_step: Callable[[int, dict[str, Tensor], dict[str, Tensor], Tensor], Any] = lambda *_: None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Parameters `[seeds, ...]` after `steps` of plain SGD; `on_step(k, parameters, gradients, losses)` before each."""
    params = {
        n: p.detach().expand(seeds, *p.shape).clone() for n, p in task.model.named_parameters() if p.requires_grad
    }

    def mean_loss(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return task.loss(_Called(task.model, p), (x, y)).mean()

    gradient = vmap(grad_and_value(mean_loss))
    rng = torch.Generator().manual_seed(seed)
    for k in range(steps + 1):
        gradients, losses = gradient(params, *task.draw((seeds, task.sgd.batch_size), rng))
        on_step(k, params, gradients, losses)
        if k < steps:
            for n, p in params.items():
                p.sub_(gradients[n] + task.sgd.weight_decay * p, alpha=task.sgd.lr)
    return params


def settled(task: Task, lr: float, steps: int) -> Task:
    """The task with its model trained for `steps` at another learning rate."""
    params = train(replace(task, sgd=replace(task.sgd, lr=lr)), 1, steps, seed=99)
    model = copy.deepcopy(task.model)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n in params:
                p.copy_(params[n][0])
    return replace(task, model=model)


def unbalanced(task: Task, scale: float) -> Task:
    """The same function with every symmetry moved by `scale`."""
    model = copy.deepcopy(task.model)
    for s in task.syms:
        s.act_(nf.tensors_of(model), scale * s.identity())
    return replace(task, model=model)


@dataclass(frozen=True, eq=False)
class Comparison:
    """Charges `[T, n]` of all symmetries side by side, those that noise moves: measured, and predictions, each with
    its standard error.
    """

    steps: list[int]
    measured: Tensor
    error: Tensor
    predictions: dict[str, tuple[Tensor, Tensor]]

    def deviations(self, name: str) -> Tensor:
        """In standard errors of measurement and prediction together, checkpoints after the start: `[T - 1, n]`."""
        values, error = self.predictions[name]
        return ((self.measured - values) / (self.error.square() + error.square()).sqrt())[1:]

    def relative(self, name: str) -> float:
        """Size of the last deviation over the size of the change so far."""
        values, _ = self.predictions[name]
        return float((self.measured - values)[-1].norm() / (self.measured[-1] - self.measured[0]).norm())


def compare(task: Task, seeds: int, window: int, every: int = 4) -> Comparison:
    """Train `seeds` runs and predict their charges three ways:

    `model at step 0`: the orbit forecast from its gradient moments; `first steps`: the same from the minibatches of the
    first `window` steps of all runs; `drift along the way`: `E[C' - C]` measured so at each checkpoint, integrated.
    """
    syms, marks = task.syms, task.marks()
    meters = [MinibatchMeter(task.model, syms, task.sgd.batch_size, entries=True, groups=8) for _ in marks]
    charges: list[Tensor] = []

    def on_step(k: int, params: dict[str, Tensor], gradients: dict[str, Tensor], losses: Tensor) -> None:
        if k in marks:
            charges.append(_side_by_side(syms, {s.name: vmap(s.charge)(_of(s, params)) for s in syms}))
        last = max(m for m in marks if m <= k)
        if k - last < window and (k - last) % every == 0:
            meter = meters[marks.index(last)]
            for r in range(seeds):
                meter.observe(float(losses[r]), [gradients[n][r] for n in meter.params])

    train(task, seeds, task.steps + window, on_step)
    values = torch.stack(charges[: len(marks)])
    rng = torch.Generator().manual_seed(7)
    data = [task.draw((500,), rng) for _ in range(32)]
    there = nf.gradient_moments(task.model, task.loss, data, syms, entries=True)
    flows = [nf.noether_flow(task.model, syms, m, task.sgd) for m in (there, *(m.result() for m in meters))]
    predictions = {
        "model at step 0": _forecast(flows[0], syms, marks),
        "first steps": _forecast(flows[1], syms, marks),
        "drift along the way": _integrated(flows[1:], syms, marks, values.mean(1)),
    }
    error = values.std(1) / seeds**0.5
    alive = error[-1] > 1e-12  # a neuron that never fires keeps its charge
    kept = {n: (v[:, alive], e[:, alive]) for n, (v, e) in predictions.items()}
    return Comparison(marks, values.mean(1)[:, alive], error[:, alive], kept)


def _of(symmetry: nf.Symmetry, params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: params[n] for n in symmetry.parameters}


def _side_by_side(syms: nf.SymmetrySet, values: dict[str, Tensor]) -> Tensor:
    """`[T, n]` from the values of every symmetry, `[T, *symmetry.shape]`; of symmetric matrices the upper half."""
    return torch.cat([_entries(s, values[s.name]) for s in syms], dim=-1)


def _entries(symmetry: nf.Symmetry, values: Tensor) -> Tensor:
    if symmetry.is_torus:
        return values
    i, j = torch.triu_indices(symmetry.dim, symmetry.dim)
    return values[..., i, j].flatten(-2)


def _forecast(flow: Flow, syms: nf.SymmetrySet, steps: list[int]) -> tuple[Tensor, Tensor]:
    """Charges and their standard errors."""
    forecast = flow.forecast(steps)
    return _side_by_side(syms, forecast.charges), _side_by_side(syms, forecast.errors)


def _integrated(
    flows: Sequence[Flow], syms: nf.SymmetrySet, steps: list[int], charges: Tensor
) -> tuple[Tensor, Tensor]:
    """Trapezoidal sums of the measured drifts, from the charges at step 0."""
    drift = _side_by_side(syms, {s.name: torch.stack([f[s.name].drift for f in flows]) for s in syms})
    errors = _side_by_side(syms, {s.name: torch.stack([f[s.name].error for f in flows]) for s in syms})
    weights = torch.zeros(len(steps), len(steps), dtype=torch.float64)
    for k in range(1, len(steps)):
        weights[k] = weights[k - 1]
        weights[k, k - 1 : k + 1] += (steps[k] - steps[k - 1]) / 2
    return charges[0] + weights @ drift, (weights.square() @ errors.square()).sqrt()


def digits_mlp() -> Task:
    """64-32-32-10 ReLU network; three labels of ten are replaced at random, afresh each time they are drawn."""
    x, y = digits()

    def draw(shape: tuple[int, ...], rng: torch.Generator) -> Batch:
        pick = torch.randint(len(x), shape, generator=rng)
        noise = torch.randint(10, shape, generator=rng)
        return x[pick], torch.where(torch.rand(shape, generator=rng) < 0.3, noise, y[pick])

    torch.manual_seed(0)
    layers = [nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)]
    model = nn.Sequential(*layers).double()
    start = Task("digits MLP", model, draw, cross_entropy, nf.SGDConfig(0.1, 8), 10_000)
    return unbalanced(settled(settled(start, 0.3, 10_000), 0.1, 4000), 1.4)


class Adapted(nn.Module):
    """`(W0 + B A) x` with W0 frozen."""

    def __init__(self, outputs: int, inputs: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs, bias=False).requires_grad_(False)
        self.a, self.b = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


def low_rank() -> Task:
    """A frozen 6 x 8 matrix with an adapter of rank 3 that has found its teacher; unequal label noise."""
    torch.manual_seed(0)
    model = Adapted(6, 8, 3).double()
    with torch.no_grad():
        model.a.weight.normal_(std=0.5)
        model.b.weight.normal_(std=0.5)
    teacher = (model.base.weight + model.b.weight @ model.a.weight).detach().clone()
    inputs = torch.linspace(0.4, 1.6, 8, dtype=torch.float64)
    noise = torch.linspace(0.2, 1.0, 6, dtype=torch.float64)

    def draw(shape: tuple[int, ...], rng: torch.Generator) -> Batch:
        x = inputs * torch.randn(*shape, 8, generator=rng, dtype=torch.float64)
        return x, x @ teacher.mT + noise * torch.randn(*shape, 6, generator=rng, dtype=torch.float64)

    return unbalanced(Task("low-rank adapter", model, draw, squared_error, nf.SGDConfig(0.02, 32), 20_000), 1.4)


def summary(task: Task, seeds: int, c: Comparison) -> None:
    print(f"{task.name}: lr {task.sgd.lr:g}, batch {task.sgd.batch_size}, {seeds} seeds, {task.steps} steps,", end=" ")
    print(f"{c.measured.shape[1]} charges; standard error of a mean charge at the end", end=" ")
    print(f"{float(c.error[-1].norm() / (c.measured[-1] - c.measured[0]).norm()):.1%} of its change")
    for name in c.predictions:
        z = c.deviations(name)
        rms = " ".join(f"{v:.2f}" for v in z.square().mean(1).sqrt().tolist())
        print(
            f"  {name}: off by {c.relative(name):.1%} of the change at the end, rms in standard errors {rms};", end=" "
        )
        print(f"{float((z.abs() < 3).double().mean()):.1%} within 3, largest {float(z.abs().max()):.1f}")


def figure(comparisons: dict[str, Comparison], path: Path) -> None:
    from noetherflow.report import style

    colours = [style.SGD, style.GD, style.SDE, style.OTHER]
    lines = {"model at step 0": ":", "first steps": "--", "drift along the way": "-"}
    with style.context():
        fig, axes = style.figure(2, len(comparisons), width=5.2, height=3.6)
        for row, (title, c) in zip(axes.reshape(-1, 2), comparisons.items(), strict=True):
            most = (c.measured[-1] - c.measured[0]).abs().argsort(descending=True)[:4]
            for j, colour in zip(most.tolist(), colours, strict=True):
                change = c.measured[:, j] - c.measured[0, j]
                row[0].errorbar(c.steps, change, 2 * c.error[:, j], fmt="o", ms=4, capsize=2, color=colour)
                for name, dash in lines.items():
                    row[0].plot(c.steps, c.predictions[name][0][:, j] - c.measured[0, j], dash, color=colour, lw=1.2)
            for name, dash in lines.items():
                row[0].plot([], [], dash, color=style.THEORY, lw=1.2, label=name)
                rms = c.deviations(name).square().mean(1).sqrt()
                row[1].plot(c.steps[1:], rms, dash, marker="o", ms=3, color=style.THEORY)
            row[0].errorbar([], [], [], fmt="o", ms=4, capsize=2, color=style.THEORY, label="SGD, mean and 2 s.e.")
            row[0].set(
                title=f"{title}: the 4 charges that move most", xlabel="step", ylabel="change of charge (weight$^2$)"
            )
            row[1].axhline(1, color=style.MUTED, lw=1)
            row[1].axhline(3, color=style.GD, lw=1, ls="--")
            row[1].set(title="all charges: rms deviation", xlabel="step", ylabel="standard errors", yscale="log")
            row[1].set_xlim(row[0].get_xlim())
        axes[2].legend(loc="lower left")
        style.tidy(fig)
        style.save(fig, path)


def main(out: Path) -> None:
    found = {}
    for task, seeds in ((low_rank(), 32), (digits_mlp(), 16)):
        found[task.name] = compare(task, seeds, window=200)
        summary(task, seeds, found[task.name])
    figure(found, out / "forecast_training.png")


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else OUT
    target.mkdir(parents=True, exist_ok=True)
    main(target)
