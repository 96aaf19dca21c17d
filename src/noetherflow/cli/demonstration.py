"""What `noetherflow demo` does: train two classifiers on real digits, forecast, balance, and write one page."""

from __future__ import annotations

import copy
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn

from noetherflow.analysis import Analysis, analyze
from noetherflow.balance.model import BalanceReport, balance_
from noetherflow.cli import tables
from noetherflow.cli.options import announce, console
from noetherflow.cli.output import check_output
from noetherflow.core.inputs import LossFn
from noetherflow.core.printing import brief, transposed
from noetherflow.core.settings import SGDConfig
from noetherflow.core.tensors import tensors_of
from noetherflow.equilibrium import Equilibrium, noise_equilibrium
from noetherflow.equilibrium.charge_flow import signed_sum
from noetherflow.equilibrium.curvature import curvature_moments, trace_at
from noetherflow.equilibrium.forecast import Forecast
from noetherflow.moments import gradient_moments
from noetherflow.report import curves
from noetherflow.report.analysis import analysis_sections
from noetherflow.report.figures import balance_figure, orbit_figure, panel
from noetherflow.report.page import Figure, Notice, Section, write_page
from noetherflow.symmetry.symmetry_set import SymmetrySet
from noetherflow.workloads import Workload, digits, digits_cnn, digits_mlp, minibatches, split

FLIPPED = 0.1
"""Fraction of labels redrawn at random in every batch: gradient noise does not die out, as the theory assumes."""


SEED = 1
"""Of the probes of the Hessian: the same at every place, so that differences between places are not those of probes."""


@dataclass(frozen=True)
class Run:
    """One classifier of the demo: how long it trains before and after the measurement, and whether the trace of the
    Hessian falls by enough on the way to its equilibrium for two dozen probes to show.
    """

    workload: Workload
    images: bool
    sgd: SGDConfig
    warm: int
    follow: int
    sharpness: bool


@dataclass(frozen=True)
class Told:
    """The numbers of one classifier in the summary. With the forecast charges `F`, the trained ones `C` after `steps`
    and `C_0` at the measurement: `change = |C - C_0| / |C_0|`, `error = |F - C| / |C|`.
    """

    name: str
    charges: int
    verdicts: tuple[str, ...]
    steps: int
    change: float
    error: float
    outputs: float
    before: float
    after: float


def runs(quick: bool) -> tuple[Run, ...]:
    """The two classifiers; `quick` shortens everything for the tests."""
    part = 100 if quick else 1
    return (
        Run(digits_mlp(), False, SGDConfig(0.05, 4), 20_000 // part, 20_000 // part, False),
        Run(digits_cnn(), True, SGDConfig(0.05, 8), 6_000 // part, 6_000 // part, True),
    )


def demonstrate(out: Path, quick: bool) -> None:
    """Train, forecast, balance and check every classifier, ask the guests for their sections, and write one page."""
    start = time.perf_counter()
    check_output(out / "index.html")
    printed, chosen = tables.out(), runs(quick)
    length = "1 to 2 minutes" if quick else "2 to 15 minutes"
    guests = entry_points(group="noetherflow.demo")
    parts = ["two classifiers on scikit-learn's digits trained, forecast and balanced", *guests.names]
    say = announce(
        f"{', and '.join(parts)}: {length}", 4 * len(chosen) + sum(run.sharpness for run in chosen) + len(guests)
    )
    analysed = [_analyse(run, printed, say) for run in chosen]
    added = []
    for guest in guests:
        say(guest.name)
        added.append(guest.load()(out, printed))
    page = write_page(
        out / "index.html",
        "noetherflow demo",
        [
            summary([told for told, _ in analysed], [notice for _, notice in added]),
            *(s for _, own in analysed for s in own),
            *(section for section, _ in added),
            _on_your_model(),
        ],
        subtitle=f"{', and '.join(parts).capitalize()}.",
    )
    printed.print(f"\nopen {page.resolve()} ({time.perf_counter() - start:.0f} s)", markup=False, soft_wrap=True)


def summary(told: Sequence[Told], added: Sequence[Notice]) -> Section:
    """The page's first card: what was found, forecast and moved, a verdict each with this run's numbers."""
    notices = [_certified(told), *(_foretold(t) for t in told), *(_balanced(t) for t in told), *added]
    return Section(
        "Summary",
        "How to read it: a charge is the squared norm of the weights on one side of a symmetry minus that on the "
        "other, for a ReLU unit of what comes in minus what goes out. Gradient flow conserves it; minibatch noise "
        "moves it, step by step, to the noise equilibrium. The sections below show this classifier by classifier.",
        notices=notices,
    )


def _certified(told: Sequence[Told]) -> Notice:
    verdicts = Counter(v for t in told for v in t.verdicts)
    checked = " and ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
    found = " and ".join(f"{len(t.verdicts)} in `{t.name}` ({t.charges} charges)" for t in told)
    level = "act" if verdicts["broken"] else "good"
    text = f"Found: {verdicts.total()} continuous symmetries, {found}; checked with random group elements, {checked}."
    return Notice(level, text)


def _foretold(t: Told) -> Notice:
    return Notice(
        "good" if t.error < t.change else "watch",
        f"Forecast: one measurement foretold the charges of `{t.name}` over {t.steps:,} further steps to "
        f"{100 * t.error:.2g} % of their norm, while training changed them by {100 * t.change:.2g} %.",
        figure=f"{t.name}-against",
    )


def _balanced(t: Told) -> Notice:
    return Notice(
        "good" if t.after < t.before else "watch",
        f"Balanced: moving `{t.name}` along its symmetries to where the noise pulls equally on both sides took its "
        f"imbalance, measured again, from {t.before:.2g} to {brief(t.after)}; its outputs changed by "
        f"{brief(t.outputs)}.",
    )


YOURS = """import noetherflow as nf

analysis = nf.analyze(model, loss_fn, loader, optimizer)   # loss_fn(model, batch): one loss per sample
print(analysis.diagnosis)                                  # what to act on, in plain words
analysis.plot()
nf.balance_(model, analysis.equilibrium, optimizer)        # move there; the function stays

with nf.Ledger(model, optimizer, analysis.symmetries, run_dir="run"):
    train()                                                # then: noetherflow report run"""


def _on_your_model() -> Section:
    return Section("Now on your model", "The same in a few lines, for any PyTorch model:", code=YOURS)


@dataclass(frozen=True, eq=False)
class Followed:
    """What one measurement foretold, and what training on did: charges by symmetry `[len(steps), *shape]`."""

    steps: list[int]
    forecast: Forecast
    measured: dict[str, Tensor]
    detail: str = "symmetry"

    def records(self, by: str, since: int | None = None) -> list[dict[str, Any]]:
        """The signed sums of the measured charges from step `since` on, as rows of a ledger: what a forecast is
        compared with.
        """
        return [
            {by: name, "step": k, "charge": signed_sum(charge)}
            for name, charges in self.measured.items()
            for k, charge in zip(self.steps, charges, strict=True)
            if k >= (since or 0)
        ]

    def change_and_error(self) -> tuple[float, float]:
        """`|C - C_0| / |C_0|` and `|F - C| / |C|` at the last step, over all charges."""
        start, end = (torch.cat([c[k].flatten() for c in self.measured.values()]) for k in (0, -1))
        foretold = torch.cat([self.forecast.charges[n][-1].flatten() for n in self.measured])
        return float((end - start).norm() / start.norm()), float((foretold - end).norm() / end.norm())


@dataclass(frozen=True, eq=False)
class Moved:
    """The move to the noise equilibrium, and the equilibrium measured again from there."""

    report: BalanceReport
    again: Equilibrium


def _analyse(run: Run, printed: Any, say: Callable[[str], None]) -> tuple[Told, list[Section]]:
    """Train, measure once, follow the forecast on a twin, balance, measure again; the page's sections."""
    name, model, sgd = run.workload.name, run.workload.model, run.sgd
    stream = noisy_minibatches(run, seed=1)
    say(f"{name}: training for {run.warm:,} SGD steps")
    loss = train(model, run.workload.loss_fn, stream, sgd, run.warm, f"{name}: training")
    printed.print(f"\n{name}: {run.warm:,} SGD steps, loss {loss:.3f}", markup=False)
    batches = noisy_population(run, seed=2)
    say(f"{name}: symmetries, gradient noise and equilibrium")
    analysis = analyze(model, run.workload.loss_fn, batches, sgd, run.workload.example_inputs, curvature=False)
    title = f"{name}: Noether flow at lr {sgd.lr:g}, batch size {sgd.batch_size}"
    tables.of_rows(printed, transposed(analysis.rows()), title)
    printed.print(str(analysis.equilibrium), markup=False)

    say(f"{name}: a twin trains on for {run.follow:,} steps")
    steps = [int(k) for k in np.linspace(0, run.follow, 11)]
    measured = follow(copy.deepcopy(model), run, analysis.symmetries, stream, steps)
    followed = Followed(steps, analysis.flow.forecast(steps), measured)
    sharpness = []
    if run.sharpness:
        say(f"{name}: sharpness along the orbit")
        sharpness = [Figure(_orbit(model, run, analysis), "Trace of the Hessian along the orbit.")]
    say(f"{name}: moving to the noise equilibrium and measuring again")
    moved = _move(run, analysis, batches)
    printed.print(f"balanced: {moved.report}", markup=False)
    printed.print(f"imbalance measured again after the move: {moved.again.imbalance_now:.1e}", markup=False)
    shown = analysis_sections(analysis, prefix=f"{name}-")
    found = [replace(s, heading=f"{name}: {s.heading}") for s in shown]
    sections = [*found, _forecast_section(run, followed), _balance_section(run, analysis, moved, sharpness)]
    return _told(run, analysis, followed, moved), sections


def _move(run: Run, analysis: Analysis, batches: Sequence[Any]) -> Moved:
    """Move the model to the joint equilibrium in place, and measure the noise there."""
    model, syms, inputs = run.workload.model, analysis.symmetries, run.workload.example_inputs
    report = balance_(model, analysis.equilibrium, example_inputs=inputs, certificate=analysis.certificate)
    moments = gradient_moments(model, run.workload.loss_fn, batches, syms, entries=True)
    return Moved(report, noise_equilibrium(model, syms, moments, run.sgd))


def _told(run: Run, analysis: Analysis, followed: Followed, moved: Moved) -> Told:
    """The numbers of this classifier for the page's summary."""
    change, error = followed.change_and_error()
    return Told(
        run.workload.name,
        charges=analysis.symmetries.n_charges(),
        verdicts=tuple(row.verdict for row in analysis.certificate.rows),
        steps=run.follow,
        change=change,
        error=error,
        outputs=float(moved.report.output_change or 0),
        before=analysis.equilibrium.imbalance_now,
        after=moved.again.imbalance_now,
    )


def _forecast_section(run: Run, followed: Followed) -> Section:
    """Forecast charges as lines, those of the trained twin as dots."""
    name, forecast = run.workload.name, followed.forecast
    against = panel(10, curves.comparison, forecast.compare(followed), 8)
    changes = panel(10, curves.changes, forecast, followed.measured)
    return Section(
        f"{name}: forecast against training",
        f"After {run.warm:,} SGD steps the gradient noise was measured once. Lines: the charges this one measurement "
        f"forecasts. Dots: a twin that trained on for {run.follow:,} steps. The band is the statistical error of the "
        "measurement; what lies beyond it is the drift of the loss itself in training, which one measurement cannot "
        f"know. {FLIPPED:.0%} of the labels are redrawn in every batch, so that gradient noise does not die out.",
        figures=[
            Figure(against, "Forecast and training, by symmetry.", f"{name}-against"),
            Figure(changes, "The same, coordinate by coordinate.", f"{name}-changes"),
        ],
        table=forecast.compare(followed).table_rows(),
        folded="forecast and training as a table",
    )


def _balance_section(run: Run, analysis: Analysis, moved: Moved, sharpness: list[Figure]) -> Section:
    """The imbalance before and as measured again, and the sharpness along the orbit."""
    return Section(
        f"{run.workload.name}: moved to the noise equilibrium",
        "The model was moved along its symmetries to the joint equilibrium and the noise measured again.",
        facts=[
            ("imbalance before", analysis.equilibrium.imbalance_now),
            ("after, measured again", moved.again.imbalance_now),
            ("relative change of outputs", moved.report.output_change),
        ],
        figures=[
            Figure(balance_figure(analysis.equilibrium, moved.again), "Noise balance before and after."),
            *sharpness,
        ],
    )


def _orbit(model: nn.Module, run: Run, analysis: Analysis, probes: int = 24) -> bytes:
    """Tr H along `G^s`: predicted from the Hessian probed at s = 0, and probed again on models moved there."""
    syms, elements = analysis.symmetries, analysis.equilibrium.elements
    data = split(*digits(run.images), 2048)
    here = curvature_moments(model, run.workload.loss_fn, data, syms, probes=probes, seed=SEED)

    def at(s: float) -> dict[str, Tensor]:
        return {name: element**s for name, element in elements.items()}

    line = np.linspace(-0.2, 1.2, 29)
    predicted = np.array([trace_at(model, syms, here, at(s))[1] for s in line])
    dots, measured = np.linspace(0, 1, 5), []
    for s in dots:
        moved = copy.deepcopy(model)
        for symmetry in syms:
            symmetry.act_(tensors_of(moved), at(s)[symmetry.name])
        there = curvature_moments(moved, run.workload.loss_fn, data, syms, probes=probes, seed=SEED)
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
