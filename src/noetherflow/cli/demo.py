"""`noetherflow demo`: train two classifiers on real digits, forecast, balance, and write one page."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import typer
from rich.progress import track
from torch import Tensor, nn

from noetherflow.cli import tables
from noetherflow.cli.options import Debug, console
from noetherflow.sgd import SGDConfig
from noetherflow.symmetry_set import SymmetrySet, tensors_of
from noetherflow.workloads import LossFn, Workload, digits, digits_cnn, digits_mlp, minibatches, split

if TYPE_CHECKING:
    from noetherflow.analysis import Analysis

FLIPPED = 0.1
"""Fraction of labels redrawn at random in every batch: gradient noise does not die out, as the theory assumes."""


@dataclass(frozen=True)
class Run:
    """One classifier of the demo: how long it trains before and after the measurement."""

    workload: Workload
    images: bool
    sgd: SGDConfig
    warm: int
    follow: int


def runs(quick: bool) -> tuple[Run, ...]:
    """The two classifiers; `quick` shortens everything for the tests."""
    part = 100 if quick else 1
    return (
        Run(digits_mlp(), False, SGDConfig(0.05, 4), 20_000 // part, 20_000 // part),
        Run(digits_cnn(), True, SGDConfig(0.05, 8), 6_000 // part, 6_000 // part),
    )


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the page and the experiment's files.")] = Path("demo"),
    quick: Annotated[bool, typer.Option(help="A few seconds of everything, to see that it works.")] = False,
    debug: Debug = False,
) -> None:
    """Train on scikit-learn's digits, forecast the charges, balance, reproduce figure 2; write OUT/index.html."""
    from noetherflow.report.page import write_page

    start = time.perf_counter()
    printed = tables.out()
    sections: list[Any] = []
    for run in runs(quick):
        sections += _analyse(run, printed)
    sections += _figure_two(out, printed)
    page = write_page(
        out / "index.html",
        "noetherflow demo",
        sections,
        subtitle="Two classifiers on scikit-learn's digits, and figure 2 of the paper.",
    )
    printed.print(f"\nreport: {page} ({time.perf_counter() - start:.0f} s)", markup=False)


def _analyse(run: Run, printed: Any) -> list[Any]:
    """Train, measure once, follow the forecast on a twin, balance, measure again; the page's sections."""
    from noetherflow.analysis import analyze
    from noetherflow.balance import balance_
    from noetherflow.equilibrium import noise_equilibrium
    from noetherflow.moments import gradient_moments
    from noetherflow.report.analysis import analysis_sections, transposed
    from noetherflow.report.figures import balance_figure, forecast_figure
    from noetherflow.report.page import Figure, Section

    name, model, sgd = run.workload.name, run.workload.model, run.sgd
    stream = noisy_minibatches(run, seed=1)
    loss = train(model, run.workload.loss_fn, stream, sgd, run.warm, f"{name}: training")
    printed.print(f"\n{name}: {run.warm:,} SGD steps, loss {loss:.3f}", markup=False)
    batches = noisy_population(run, seed=2)
    workload = replace(run.workload, batches=batches)
    inputs = workload.example_inputs
    with console.status("analysing") as status:
        analysis = analyze(model, workload.loss_fn, batches, sgd, inputs, progress=status.update)
    tables.of_rows(
        printed, transposed(analysis.rows()), f"{name}: Noether flow at lr {sgd.lr:g}, batch size {sgd.batch_size}"
    )
    printed.print(str(analysis.equilibrium), markup=False)

    steps = [int(k) for k in np.linspace(0, run.follow, 11)]
    forecast = analysis.flow.forecast(steps)
    measured = follow(copy.deepcopy(model), run, analysis.symmetries, stream, steps)
    with console.status("sharpness along the orbit"):
        sharpness = _orbit(model, run, analysis)
    moved = balance_(model, analysis.equilibrium, example_inputs=inputs, certificate=analysis.certificate)
    printed.print(f"balanced: {moved}", markup=False)
    again = gradient_moments(model, workload.loss_fn, batches, analysis.symmetries, entries=True)
    check = noise_equilibrium(model, analysis.symmetries, again, sgd)
    printed.print(f"relative Noether flow measured again after the move: {check.imbalance_now:.1e}", markup=False)
    histograms = {
        "before": np.concatenate([s.imbalance_now.numpy() for s in analysis.equilibrium]),
        "after, predicted": np.concatenate([s.imbalance.numpy() for s in analysis.equilibrium]),
        "after, measured again": np.concatenate([s.imbalance_now.numpy() for s in check]),
    }
    trained = Section(
        f"{name}: forecast against training",
        f"After {run.warm:,} SGD steps the gradient noise was measured once. Lines: the charges this one measurement "
        f"forecasts. Dots: a twin that trained on for {run.follow:,} steps. The band is the statistical error of the "
        "measurement; what lies beyond it is the drift of the loss itself in training, which one measurement cannot "
        f"know. {FLIPPED:.0%} of the labels are redrawn in every batch, so that gradient noise does not die out.",
        figures=[Figure(forecast_figure(steps, forecast.charges, forecast.errors, measured), "Forecast and training.")],
    )
    balanced = Section(
        f"{name}: moved to the noise equilibrium",
        "The model was moved along its symmetries to the joint equilibrium and the noise measured again.",
        facts=[
            ("largest relative flow before", analysis.equilibrium.imbalance_now),
            ("after, measured again", check.imbalance_now),
            ("relative change of outputs", moved.output_change),
        ],
        figures=[
            Figure(balance_figure(histograms), "Noise balance before and after."),
            Figure(sharpness, "Trace of the Hessian along the orbit."),
        ],
    )
    found = [replace(s, heading=f"{name}: {s.heading.lower()}", figures=()) for s in analysis_sections(analysis)]
    return [*found, trained, balanced]


def _orbit(model: nn.Module, run: Run, analysis: Analysis, probes: int = 24) -> bytes:
    """Tr H along `G^s`: predicted from the Hessian probed at s = 0, and probed again on models moved there."""
    from noetherflow.report.figures import orbit_figure
    from noetherflow.sharpness import curvature_moments, trace_at

    syms, elements = analysis.symmetries, analysis.equilibrium.elements
    data = split(*digits(run.images), 2048)
    here = curvature_moments(model, run.workload.loss_fn, data, syms, probes=probes)

    def at(s: float) -> dict[str, Tensor]:
        return {name: element**s for name, element in elements.items()}

    line = np.linspace(-0.2, 1.2, 29)
    predicted = np.array([trace_at(model, syms, here, at(s))[1] for s in line])
    dots, measured = np.linspace(0, 1, 5), []
    for seed, s in enumerate(dots, start=1):
        moved = copy.deepcopy(model)
        for symmetry in syms:
            symmetry.act_(tensors_of(moved), at(s)[symmetry.name])
        there = curvature_moments(moved, run.workload.loss_fn, data, syms, probes=probes, seed=seed)
        measured.append([float(sum(t.sum() for t in g.squares.values())) for g in there.groups])
    return orbit_figure(line, predicted, dots, np.array(measured))


def noisy_minibatches(run: Run, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless minibatches with freshly redrawn labels."""
    rng = torch.Generator().manual_seed(seed)
    for x, y in minibatches(*digits(run.images), run.sgd.batch_size, seed):
        yield x, _redraw(y, rng)


def noisy_population(run: Run, seed: int, passes: int = 4) -> list[tuple[Tensor, Tensor]]:
    """The data several times over, each time with other redrawn labels: what the moments are measured on."""
    rng = torch.Generator().manual_seed(seed)
    x, y = digits(run.images)
    return [pair for _ in range(passes) for pair in split(x, _redraw(y, rng), 256)]


def _redraw(y: Tensor, rng: torch.Generator) -> Tensor:
    chosen = torch.rand(y.shape, generator=rng) < FLIPPED
    return torch.where(chosen, torch.randint(10, y.shape, generator=rng), y)


def train(model: nn.Module, loss_fn: LossFn, stream: Iterator[Any], sgd: SGDConfig, steps: int, title: str) -> float:
    """Plain SGD for `steps` steps with a progress bar; the mean loss of the last tenth."""
    optimizer = torch.optim.SGD(model.parameters(), sgd.lr, sgd.momentum, weight_decay=sgd.weight_decay)
    losses = []
    for batch in track(
        itertools.islice(stream, steps),
        title,
        total=steps,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ):
        optimizer.zero_grad()
        loss = loss_fn(model, batch).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return float(torch.stack(losses[-max(steps // 10, 1) :]).mean())


def follow(
    model: nn.Module, run: Run, syms: SymmetrySet, stream: Iterator[Any], steps: Sequence[int]
) -> dict[str, Tensor]:
    """Charges of a model in training at the given numbers of steps: per symmetry `[len(steps), *shape]`."""
    charges = [_charges(model, syms)]
    for start, end in itertools.pairwise(steps):
        train(model, run.workload.loss_fn, stream, run.sgd, end - start, f"{run.workload.name}: steps up to {end:,}")
        charges.append(_charges(model, syms))
    return {s.name: torch.stack([c[s.name] for c in charges]) for s in syms}


def _charges(model: nn.Module, syms: SymmetrySet) -> dict[str, Tensor]:
    tensors = tensors_of(model)
    return {s.name: s.charge(tensors).detach() for s in syms}


def _figure_two(out: Path, printed: Any) -> list[Any]:
    from noetherflow import reproduce
    from noetherflow.report.page import Figure, Section

    with console.status("experiment fig2"):
        (finished,) = reproduce.run(["fig2"], scale="quick", out=out / "experiments").finished
    printed.print(f"\n{finished}", markup=False)
    rows = [
        {"claim": v.claim, "predicted": v.criterion, "measured": v.measured, "s.e.": v.error, "holds": v.holds}
        for v in finished.verdicts
    ]
    images = [f for f in finished.files if f.endswith(".png")]
    return [Section(finished.experiment.title, table=rows, figures=[Figure(out / "experiments" / f) for f in images])]
