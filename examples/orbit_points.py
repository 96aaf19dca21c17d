"""One function, four initialisations on its orbit: they train differently, until each is balanced.

Writes docs/figures/orbit_points.png and prints the numbers of docs/equilibrium.md (35 s on one core):
python examples/orbit_points.py [OUT]
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

import noetherflow as nf
from noetherflow.workloads import cross_entropy, digits

OUT = Path(__file__).parent.parent / "docs" / "figures"
POINTS = ((1.0, 1.0, 1.0), (8.0, 1.0, 1 / 8), (0.05, 4.0, 5.0), (0.05, 20.0, 1.0))
SGD = nf.SGDConfig(lr=0.1, batch_size=32, weight_decay=1e-5)
"""The little decay pins neurons that never fire at the start, which noise alone would leave where they are."""
RATES = tuple(10 ** (k / 4) for k in range(-16, 2))
LEVEL = 1.0
SEEDS, STEPS = 8, 300


def network(widths: Sequence[int] = (64, 32, 32, 10), seed: int = 0) -> nn.Sequential:
    """A ReLU network with PyTorch's default initialisation, float64."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


def at_point(model: nn.Sequential, scales: Sequence[float]) -> nn.Sequential:
    """A copy with layer weights times `scales`, biases times the product so far; the same function if it ends at 1."""
    moved, so_far = copy.deepcopy(model), 1.0
    with torch.no_grad():
        for layer, scale in zip(moved[::2], scales, strict=True):
            so_far *= scale
            layer.weight *= scale
            layer.bias *= so_far
    return moved


def loss_against_rate(
    model: nn.Module, data: tuple[Tensor, Tensor], rates: Sequence[float], seeds: int, steps: int
) -> Tensor:
    """Loss on all data after `steps` SGD steps, `[rates, seeds]`; every run is one slice of a stacked model.

    Batches depend on the seed only. Runs that leave the finite numbers, or end above 10, count as 10.
    """
    x, y = data
    runs = len(rates) * seeds
    params, _ = stack_module_state([model] * runs)
    params = {n: p.detach() for n, p in params.items()}
    lr = torch.tensor(rates, dtype=torch.float64).repeat_interleave(seeds)

    def loss(p: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(model, p, (a,)), b)

    step = vmap(grad(loss))
    rng = torch.Generator().manual_seed(0)
    for _ in range(steps):
        pick = torch.randint(len(x), (seeds, SGD.batch_size), generator=rng).repeat(len(rates), 1)
        gradients = step(params, x[pick], y[pick])
        rates_of = {n: lr.view(-1, *[1] * (p.ndim - 1)) for n, p in params.items()}
        params = {n: p - rates_of[n] * (gradients[n] + SGD.weight_decay * p) for n, p in params.items()}
    final = vmap(loss, in_dims=(0, None, None))(params, x, y)
    return torch.where(final < 10, final, torch.full_like(final, 10.0)).view(len(rates), seeds)


@dataclass(frozen=True, eq=False)
class Point:
    """What one point of the orbit looks like: outputs, largest Hessian eigenvalue, `Tr Sigma`, loss against lr."""

    outputs: Tensor
    parameters: Tensor
    top: float
    noise: float
    losses: Tensor

    def useful_rate(self, rates: Sequence[float]) -> float:
        """The smallest learning rate whose mean loss is `LEVEL`, by interpolation between logarithms (NaN if none)."""
        mean = self.losses.mean(1).log()
        below = (mean < math.log(LEVEL)).nonzero()
        if not len(below) or not below[0]:
            return math.nan
        k = int(below[0])
        part = float((mean[k - 1] - math.log(LEVEL)) / (mean[k - 1] - mean[k]))
        return rates[k - 1] ** (1 - part) * rates[k] ** part


def measure(model: nn.Sequential, data: tuple[Tensor, Tensor], rates: Sequence[float], seeds: int, steps: int) -> Point:
    syms = nf.find_symmetries(model, data[0][:4])
    names = [n for n, _ in model.named_parameters()]
    moments = nf.gradient_moments(model, cross_entropy, [data], syms, entries=True, parameters=names)
    noise = sum(float(moments.squares[n].sum() - moments.mean[n].square().sum()) for n in names)
    top = nf.top_eigenvalue(model, cross_entropy, [data])
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return Point(model(data[0]).detach(), flat, top, noise, loss_against_rate(model, data, rates, seeds, steps))


def balanced(model: nn.Sequential, data: tuple[Tensor, Tensor]) -> nn.Sequential:
    """A copy at the noise equilibrium of its orbit."""
    other = copy.deepcopy(model)
    syms = nf.find_symmetries(other, data[0][:4])
    moments = nf.gradient_moments(other, cross_entropy, [data], syms, entries=True)
    eq = nf.noise_equilibrium(other, syms, moments, SGD)
    report = nf.balance_(other, eq, example_inputs=data[0])
    print(
        f"  balanced: relative Noether flow {eq.imbalance_now:.2e} -> {eq.imbalance:.1e} in {eq.iterations} sweeps,",
        end=" ",
    )
    print(f"outputs changed by {report.output_change:.1e}")
    return other


def study(
    model: nn.Sequential,
    data: tuple[Tensor, Tensor],
    points: Sequence[Sequence[float]],
    rates: Sequence[float] = RATES,
    seeds: int = SEEDS,
    steps: int = STEPS,
) -> tuple[list[Point], list[Point]]:
    """Every point of the orbit, before and after balance."""
    before, after = [], []
    for scales in points:
        print(f"layers times {label(scales)}:")
        start = at_point(model, scales)
        before.append(measure(start, data, rates, seeds, steps))
        after.append(measure(balanced(start, data), data, rates, seeds, steps))
        for when, p in (("before", before[-1]), ("after", after[-1])):
            print(f"  {when}: top eigenvalue {p.top:.6g}, Tr Sigma {p.noise:.6g},", end=" ")
            print(f"loss {LEVEL:g} at lr {p.useful_rate(rates):.3g}, least loss {float(p.losses.mean(1).min()):.4f}")
    return before, after


def spread(values: Sequence[float]) -> float:
    """Largest over smallest."""
    return max(values) / min(values)


def apart(points: Sequence[Point]) -> tuple[float, float]:
    """Largest ratio of two points' mean losses at one rate, and the same up to the first point's best rate only."""
    means = torch.stack([p.losses.mean(1) for p in points])
    ratio = means.amax(0) / means.amin(0)
    return float(ratio.max()), float(ratio[: int(means[0].argmin()) + 1].max())


def label(scales: Sequence[float]) -> str:
    return "(" + ", ".join("1/8" if s == 1 / 8 else f"{s:g}" for s in scales) + ")"


def figure(before: Sequence[Point], after: Sequence[Point], path: Path) -> None:
    from noetherflow.report import style

    colours = [style.MUTED, style.SGD, style.GD, style.SDE]
    with style.context():
        fig, axes = style.figure(4, 1, width=3.6, height=3.5)
        places = torch.arange(len(before), dtype=torch.float64)
        for ax, what, title in (
            (axes[0], "top", "largest Hessian eigenvalue (nats)"),
            (axes[1], "noise", r"gradient noise $\mathrm{Tr}\,\Sigma$ (nats$^2$)"),
        ):
            for shift, points, fill in ((-0.18, before, True), (0.18, after, False)):
                values = [getattr(p, what) for p in points]
                ax.bar(places + shift, values, 0.34, color=colours if fill else "white", edgecolor=colours)
            ax.set(title=title, yscale="log", xlabel="layers scaled by (open: balanced)")
            ax.set_xticks(places, [label(s) for s in POINTS], rotation=18, ha="right", fontsize=8)
        for ax, points, title in (
            (axes[2], before, "before: loss after 300 steps"),
            (axes[3], after, "balanced: the same"),
        ):
            for k, (p, scales) in enumerate(zip(points, POINTS, strict=True)):
                line: dict[str, Any] = {"lw": 6 - 1.5 * k} if ax is axes[3] else {}
                style.band(ax, RATES, p.losses, colours[k], label(scales), **line)
            ax.axhline(math.log(10), color=style.THEORY, ls=":", lw=1)
            ax.set(title=title, xscale="log", yscale="log", xlabel="learning rate", ylabel="cross entropy (nats)")
            ax.set_ylim(0.05, 4)
            ax.legend(loc="lower left")
        style.save(fig, path)


def main(out: Path) -> None:
    before, after = study(network(), digits(), POINTS)
    outputs = max(float((p.outputs - before[0].outputs).abs().max()) for p in (*before, *after))
    print(f"outputs of all {2 * len(POINTS)} networks agree to {outputs / float(before[0].outputs.abs().max()):.1e}")
    for when, points in (("before", before), ("after", after)):
        far, stable = apart(points)
        ratios = {
            "top eigenvalue": spread([p.top for p in points]),
            "Tr Sigma": spread([p.noise for p in points]),
            f"lr for loss {LEVEL:g}": spread([p.useful_rate(RATES) for p in points]),
            "loss at one lr": far,
            "loss at one lr up to the best": stable,
        }
        print(f"{when}, largest over smallest:", end=" ")
        print(", ".join(f"{n} " + (f"{r:.3g}" if r > 1.01 else f"1 + {r - 1:.0e}") for n, r in ratios.items()))
    figure(before, after, out / "orbit_points.png")


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else OUT
    target.mkdir(parents=True, exist_ok=True)
    main(target)
