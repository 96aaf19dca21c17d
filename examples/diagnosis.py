"""Three diagnoses told in docs/diagnosis.md: norm growth, Adam against rescaling symmetry, and why warmup works.

Writes docs/figures/diagnosis_*.png and prints every number that the page quotes: python examples/diagnosis.py [OUT]
"""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import noetherflow as nf
from noetherflow.equilibrium.curvature import top_eigenvalue
from noetherflow.monitor.rules import ENTRIES
from noetherflow.report import style

OUT = Path(__file__).parent.parent / "docs" / "figures"
NAMES = {
    "second_order": "step size and noise",
    "decay": "weight decay",
    "momentum": "momentum memory",
    "preconditioner": "preconditioner",
    "gradient": "gradient",
}
WINDOW = 100
COLOURS = dict(zip(NAMES, [style.SDE, style.GD, style.SGD, style.OTHER, style.MUTED], strict=True))


def digits() -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16.0).view(-1, 1, 8, 8), torch.tensor(y)


def train(model: nn.Module, optimizer: Any, syms: nf.SymmetrySet, steps: int) -> nf.Ledger:
    """Cross entropy on bundled digits in batches of 32, with a ledger attached."""
    x, y = digits()
    rng = torch.Generator().manual_seed(1)
    ledger = nf.Ledger(model, optimizer, syms, detail="symmetry", estimate_every=10, capacity=steps).attach()
    for _ in range(steps):
        pick = torch.randint(len(x), (32,), generator=rng)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[pick]), y[pick]).backward()
        optimizer.step()
    return ledger


def norm_growth(out: Path) -> None:
    """(a) The same convolutional network with BatchNorm, without and with weight decay."""
    fig, axes = style.figure(3, 1, width=3.9)
    for w, colour in ((0.0, style.GD), (5e-3, style.SGD)):
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU()]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10)).double()
        syms = nf.find_symmetries(model, digits()[0][:2]).filter(family="one-sided")
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2, weight_decay=w)
        ledger = train(model, optimizer, syms, 3000)
        rows = [r for r in ledger.records("symmetry") if r["symmetry"] == syms[1].name]
        live = [r for r in ledger.estimates() if r["symmetry"] == syms[1].name]
        steps = [r["step"] for r in rows]
        entries = {f: np.array([r[f] for r in rows]) for f in ("norm", "second_order", "gradient", "decay", "change")}
        norm = entries["norm"]
        pushed = norm[0] + np.cumsum(entries["second_order"])
        turned = entries["second_order"] / norm
        axes[0].plot(steps, norm, color=colour, label=f"w = {w:g}")
        if not w:
            axes[0].plot(steps, pushed, color=style.THEORY, ls=":", label=r"start + $\sum u^T u$")
        axes[1].plot(steps, 0.2 / norm, color=colour)
        axes[2].plot(steps[WINDOW - 1 :], np.sqrt(_smooth(turned)), color=colour)
        if w:
            axes[2].axhline(live[-1]["angular_predicted"], color=style.THEORY, ls="--", lw=1, label=r"$\sqrt{2\eta w}$")
        late = {f: float((v / norm)[-1000:].mean()) for f, v in entries.items() if f != "norm"}
        print(f"(a) w={w:g}: |W|^2 {norm[0]:.3f} -> {norm[-1]:.3f}, sum of u'u {pushed[-1] - norm[0]:.3f};", end=" ")
        print(f"effective lr {0.2 / norm[0]:.4f} -> {0.2 / norm[-1]:.4f};", end=" ")
        print(f"angle per step, rms of the last 1000 steps {math.sqrt(late['second_order']):.5f},", end=" ")
        print(f"predicted {live[-1]['angular_predicted']:.5f}; largest violation {max(r['check'] for r in live):.1e}")
        print(f"    mean per step over |W|^2, last 1000 steps: {', '.join(f'{f} {v:.2e}' for f, v in late.items())}")
    titles = ("squared norm of conv 2", "effective learning rate", "angle per step (radians)")
    for ax, title in zip(axes, titles, strict=True):
        ax.set(title=title, xlabel="step")
    axes[2].set_yscale("log")
    axes[0].legend()
    axes[2].legend()
    style.save(fig, out / "diagnosis_norm.png")


def _smooth(values: np.ndarray) -> np.ndarray:
    return np.convolve(values, np.full(WINDOW, 1 / WINDOW), mode="valid")


def adam_against_sgd(out: Path) -> None:
    """(b) One ReLU network from one start: what moves the rescaling charge under SGD and under Adam."""
    fig, axes = style.figure(3, 1, width=3.9)
    kinds = {
        "SGD, lr 0.2": (torch.optim.SGD, {"lr": 0.2}, style.SGD),
        "Adam, lr 0.001": (torch.optim.Adam, {"lr": 1e-3}, style.OTHER),
    }
    for k, (name, (kind, options, colour)) in enumerate(kinds.items()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).double()
        syms = nf.find_symmetries(model, digits()[0][:2]).filter(family="rescaling")
        rows = train(model, kind(model.parameters(), **options), syms, 1500).records()
        charge = np.array([r["charge"] + r["change"] for r in rows])
        axes[0].plot(charge - rows[0]["charge"], color=colour, label=name)
        for entry in ("gradient", "second_order", "momentum", "preconditioner"):
            total = np.cumsum([r[entry] for r in rows])
            if np.abs(total).max() > 0:
                axes[k + 1].plot(total, color=COLOURS[entry], label=NAMES[entry])
        sums = {e: sum(r[e] for r in rows) for e in ENTRIES if any(r[e] for r in rows)}
        x, y = digits()
        loss = nn.functional.cross_entropy(model(x), y).item()
        print(f"(b) {name}: loss {loss:.4f}, C {rows[0]['charge']:.3f} -> {charge[-1]:.3f};", end=" ")
        print("; ".join(f"{e} {v:.3e}" for e, v in sums.items()), end="; ")
        print(f"largest |gradient entry| / norm {max(abs(r['gradient']) / r['norm'] for r in rows):.1e}")
        axes[k + 1].set(title=f"added by, {name}", xlabel="step")
        axes[k + 1].legend()
    axes[0].set(title="change of the rescaling charge", xlabel="step")
    axes[0].legend()
    style.save(fig, out / "diagnosis_adam.png")


INPUTS, WIDTH, OUTPUTS, BATCH, SMALL, LARGE = 16, 32, 4, 8, 0.02, 0.2


class Noisy:
    """A linear teacher with strong label noise, and a ReLU student whose layers start unbalanced by a factor of 8."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.teacher = torch.randn(OUTPUTS, INPUTS, dtype=torch.float64) / math.sqrt(INPUTS)
        self.pool = self.batch(2048, torch.Generator().manual_seed(2))
        torch.manual_seed(1)
        self.student = nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.ReLU(), nn.Linear(WIDTH, OUTPUTS)).double()
        with torch.no_grad():
            self.student[0].weight /= 8
            self.student[0].bias /= 8
            self.student[2].weight *= 8

    def batch(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(n, INPUTS, dtype=torch.float64, generator=rng)
        noise = torch.randn(n, OUTPUTS, dtype=torch.float64, generator=rng)
        return x, x @ self.teacher.T + 2 * noise

    def train(self, model: nn.Module, lr: float, steps: int, seed: int, full: bool = False) -> tuple[nn.Module, bool]:
        """A trained copy, and whether its loss stayed finite; `full` takes the whole pool at every step."""
        model = copy.deepcopy(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        rng = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = squared_error(model, self.pool if full else self.batch(BATCH, rng)).mean()
            if not loss < 1e6:
                return model, False
            loss.backward()
            optimizer.step()
        return model, True


def squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return 0.5 * (model(batch[0]) - batch[1]).square().sum(dim=1)


def moved(model: nn.Module, symmetry: nf.Symmetry, charge: Tensor) -> nn.Module:
    """A copy moved along the orbit to the given charge: `a K_+ - K_- / a = C`, `p = sqrt(a)` per neuron."""
    theta = {n: p.detach() for n, p in model.named_parameters()}
    grams = zip(symmetry.weight_legs, symmetry.grams(theta), strict=True)
    sides = {1: torch.zeros_like(charge), -1: torch.zeros_like(charge)}
    for leg, gram in grams:
        sides[leg.sign] += gram
    a = (charge + (charge**2 + 4 * sides[1] * sides[-1]).sqrt()) / (2 * sides[1])
    out = copy.deepcopy(model)
    symmetry.act_(nf.tensors_of(out), a.sqrt())
    return out


def warmup(out: Path) -> None:
    """(c) A learning rate that diverges from the start and trains after a warmup whose length was predicted."""
    task = Noisy()
    syms = nf.find_symmetries(task.student, task.pool[0][:2])
    moments = nf.gradient_moments(task.student, squared_error, [task.pool], syms, entries=True)
    flow = nf.noether_flow(task.student, syms, moments, nf.SGDConfig(SMALL, BATCH))
    grid = list(range(0, 451, 25))
    charges = flow.forecast(grid).charges[syms[0].name]
    sharp = [top_eigenvalue(moved(task.student, syms[0], c), squared_error, [task.pool]) for c in charges]
    predicted = math.ceil(np.interp(2 / LARGE, sharp[::-1], grid[::-1]))
    print(f"(c) predicted: 2/top(0) = {2 / sharp[0]:.3f} < lr {LARGE}; 2/top(k) passes it at k = {predicted}")
    lengths, seeds = [0, predicted // 8, predicted // 2, predicted, 2 * predicted], range(8)
    survived: dict[str, list[int]] = {"SGD": [], "full batch": []}
    tops: dict[str, list[float]] = {"SGD": [], "full batch": []}
    for name, full in (("SGD", False), ("full batch", True)):
        for k in lengths:
            warm = [task.train(task.student, SMALL, k, seed, full)[0] for seed in (seeds if not full else [0])]
            tops[name].append(float(np.mean([top_eigenvalue(m, squared_error, [task.pool]) for m in warm])))
            runs = [task.train(warm[s % len(warm)], LARGE, 1000, 100 + s)[1] for s in seeds]
            survived[name].append(sum(runs))
            print(f"(c) {name}, {k} warmup steps: top eigenvalue {tops[name][-1]:.2f},", end=" ")
            print(f"{sum(runs)} of {len(seeds)} runs train at lr {LARGE}")
    fig, axes = style.figure(2, 1)
    axes[0].plot(grid, sharp, color=style.THEORY, ls="--", label="predicted from the start")
    for (name, values), colour in zip(tops.items(), (style.SGD, style.GD), strict=True):
        axes[0].plot(lengths, values, "o", color=colour, label=f"measured, {name}")
        axes[1].plot(lengths, survived[name], "o-", color=colour, label=f"warmup with {name}")
    axes[0].axhline(2 / LARGE, color=style.MUTED, lw=1, label=f"2 / lr at lr {LARGE}")
    axes[0].set(title="largest Hessian eigenvalue", xlabel=f"steps at lr {SMALL}", ylim=(0, None))
    axes[1].axvline(predicted, color=style.THEORY, ls="--", lw=1, label="predicted length")
    axes[1].set(title=f"runs of 8 that train at lr {LARGE}", xlabel="warmup steps", ylim=(-0.3, 8.3))
    for ax in axes:
        ax.legend()
    style.save(fig, out / "diagnosis_warmup.png")


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else OUT
    target.mkdir(parents=True, exist_ok=True)
    with style.context():
        norm_growth(target)
        adam_against_sgd(target)
        warmup(target)
