"""The pass that measures: output gradients of single samples are contracted into sums as they arrive."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from noetherflow.errors import MomentError
from noetherflow.moments.batch import (
    Backward,
    BatchPass,
    Forward,
    Share,
    Subject,
    buffers_kept,
    check_finite,
    forward,
    used_once,
)
from noetherflow.moments.contraction import Contraction
from noetherflow.moments.distributed import all_ranks, over_ranks
from noetherflow.moments.factors import FactorKeeper
from noetherflow.moments.groups import GroupSums, Opened, edges, sums_over
from noetherflow.moments.layout import SampleLayout
from noetherflow.moments.placement import Placement
from noetherflow.moments.products import Factors
from noetherflow.moments.scene import numbers_held
from noetherflow.moments.taps import CallId, Recorder, Trace, Use
from noetherflow.moments.verify import Locator, RandomState, WeightedPass, same_random_numbers, signature


@dataclass(eq=False)
class Way:
    """One way through a model, `done` once verified: where samples lie in every use that a gradient reached.

    `once`: the parameters that a single use consumes.
    """

    once: frozenset[str]
    layouts: dict[CallId, SampleLayout] = field(default_factory=dict)
    done: bool = False


@dataclass(eq=False)
class Ways:
    """The ways through a model met so far.

    Two batches go the same way if they make the same calls, and if the same axes of each call's output may hold the
    samples. `shared`: calls with one output for all samples, as the way verified last had them.
    """

    known: dict[Any, Way] = field(default_factory=dict)
    shared: frozenset[CallId] = frozenset()

    def of(self, shared: frozenset[CallId], trace: Trace, samples: int, span: int) -> Way:
        """The way that this forward went."""
        key = shared, samples == 1, signature(trace, samples, span)
        way = self.known.get(key)
        if way is None:
            way = self.known[key] = Way(used_once(trace))
        return way


@dataclass(eq=False)
class MeasuringPass(BatchPass):
    """A measuring pass over one batch, whose samples are divided among the groups they are `placed` in."""

    subject: Subject
    batch: Any
    ways: Ways
    sums: GroupSums
    placed: Placement
    kept: FactorKeeper
    roots: dict[str, Tensor] = field(init=False)
    trace: Trace = field(init=False)
    way: Way = field(init=False)
    contraction: Contraction = field(init=False)
    opened: Opened = field(init=False)
    shares: list[Share] = field(init=False)
    losses: list[float] = field(init=False)

    @property
    @abstractmethod
    def shared(self) -> frozenset[CallId]:
        """The calls taken to have one output for all samples."""

    @abstractmethod
    def admits(self, trace: Trace) -> bool:
        """Whether to go backward at all; `way` is known by then."""

    @abstractmethod
    def certain(self, trace: Trace) -> bool:
        """Whether nothing can show in the backward that this measurement must be thrown away."""

    @abstractmethod
    def place(self, use: Use, delta: Tensor) -> SampleLayout | None:
        """Where the samples lie in a use's output; None if that is not known."""

    @abstractmethod
    def settled(self) -> bool:
        """After the backward: whether every use that a gradient reached was placed."""

    def begin(self, losses: Tensor, recorder: Recorder) -> Tensor | None:
        trace, samples = recorder.trace, losses.numel()
        self.roots, self.trace = recorder.roots, trace
        self.way = self.ways.of(self.shared, trace, samples, self.subject.sample_axes)
        if not self.admits(trace):
            return None
        parts = edges(samples, len(self.placed.groups))
        self.losses = self.read(losses, parts)
        self.opened = self.sums.open(self.placed, in_place=self.certain(trace))
        totals = self.opened.totals if self.placed.complete else None
        opened = zip(parts, self.opened.sums.values(), strict=True)
        self.shares = [Share(lo, hi, s, totals) for (lo, hi), s in opened if hi > lo]
        self.contraction = Contraction(recorder.roots, self.subject.measured, self.way.once, self.shares)
        return torch.ones_like(losses)

    def read(self, losses: Tensor, parts: Sequence[tuple[int, int]]) -> list[float]:
        """The summed losses of each part of the batch. Raises DataError for one that is not finite."""
        found = sums_over(losses.detach().flatten(), parts)
        if not all(map(isfinite, found)):
            check_finite(losses, self.batch, self.subject.model)
        return found

    def receive(self, use: Use, delta: Tensor, saved: tuple[Tensor, ...]) -> None:
        layout = self.place(use, delta)
        if layout is not None:
            if self.kept.wanted:
                self.kept.receive(use, layout, self.shares[-1].hi, delta, saved, self.roots)
            self.contraction.receive(use, layout, delta, saved)

    def run(self) -> bool:
        """Forward, backward and what is left to contract; False if the batch must be verified (again) first.

        Raises:
            MomentError: a gradient went past the taps, or ranks of a sharded model hold unequal numbers of samples.
        """
        with buffers_kept(self.subject.modules):
            with forward(self.subject, self.batch, self.shared, leaf=False) as made:
                done = made.backward(self, sorted(self.subject.measured))
            return self.complete(done)

    def complete(self, done: Backward | None) -> bool:
        """After the backward: `run`'s answer and errors, and what is left to contract."""
        if done is None or not self.settled():
            return False
        _refuse_missed([n for n, g in done.missed.items() if g is not None], done.trace)
        if self.subject.together is not None:
            self._refuse_uneven()
        self.contraction.finish()
        return True

    def count(self) -> None:
        """Count the batch in the sums."""
        parts = edges(self.shares[-1].hi, len(self.placed.groups))
        for (lo, hi), sums, loss in zip(parts, self.opened.sums.values(), self.losses, strict=True):
            sums.samples += hi - lo
            sums.loss += loss
        self.sums.close(self.opened)

    def factors(self) -> dict[str, Factors]:
        """The factors wanted of the batch, once it is measured."""
        return self.kept.factors()

    def _refuse_uneven(self) -> None:
        """Raises MomentError where ranks of a sharded model would go backward unequally often, sample by sample."""
        names, samples = self.contraction.pulled_back, self.shares[-1].hi
        counts = over_ranks([samples], self.subject.together) if names else [samples]
        if len(set(counts)) > 1:
            raise MomentError(
                f"ranks have {counts} samples in one batch, and {sorted(names)}, whose use all samples share, need "
                "equal numbers under fully_shard: leave out a shorter last batch (drop_last=True)"
            )


@dataclass(eq=False)
class KnownWay(MeasuringPass):
    """Measures a batch that goes a way verified before, and stops where it does not."""

    reached: list[Tensor] = field(default_factory=list, init=False)
    """For each use without a known layout, whether a gradient reached it."""

    @property
    def shared(self) -> frozenset[CallId]:
        return self.ways.shared

    def admits(self, trace: Trace) -> bool:
        known = self.way.done and self.subject.measured.isdisjoint(trace.uncovered)
        return all_ranks(known, self.subject.together)

    def certain(self, trace: Trace) -> bool:
        return len(self.way.layouts) >= len(trace.uses)

    def place(self, use: Use, delta: Tensor) -> SampleLayout | None:
        layout = self.way.layouts.get(use.id)
        if layout is None:
            self.reached.append(delta.any())
        return layout

    def settled(self) -> bool:
        return all_ranks(not any(map(bool, self.reached)), self.subject.together)


@dataclass(eq=False)
class NewWay(MeasuringPass):
    """Measures a batch after its weighted pass, and finds on the way where the samples lie."""

    weighted: WeightedPass
    locator: Locator = field(init=False)

    def __post_init__(self) -> None:
        self.locator = Locator(self.weighted)

    @property
    def shared(self) -> frozenset[CallId]:
        return self.weighted.shared

    def admits(self, trace: Trace) -> bool:
        return True

    def certain(self, trace: Trace) -> bool:
        return False

    def place(self, use: Use, delta: Tensor) -> SampleLayout | None:
        return self.locator.locate(use, delta)

    def settled(self) -> bool:
        return self.locator.settled()

    @property
    def reached(self) -> set[str]:
        """The parameters that the loss uses."""
        return self.trace.names

    def remember(self) -> None:
        """Let later batches go this way without a weighted pass."""
        self.way.layouts.update(self.locator.kept)
        self.way.done = True
        self.ways.shared = self.shared


@dataclass(frozen=True, eq=False)
class Attempt:
    """What became of a batch that goes a new way: the pass that measured it, and whether it may be counted.

    `new`: None where the weighted pass found calls that all samples share, or parameters without a rule.
    """

    new: NewWay | None = None
    measured: bool = False


def verify_and_measure(weighted: WeightedPass, measuring: Callable[[WeightedPass], NewWay]) -> Attempt:
    """Run a weighted pass and then the measuring one, both from one forward where its graph can be used twice.

    Where the forward changes a Python number in a module, a counter of its calls say, there are two, whose paths must
    be the same.

    Args:
        weighted: the weighted pass, not run yet.
        measuring: makes the measuring pass once the weighted one is complete.

    Raises:
        MomentError: as `weigh` and `MeasuringPass.run`.
    """
    modules = weighted.subject.modules
    before = numbers_held(modules)
    with same_random_numbers(), buffers_kept(modules):
        with forward(weighted.subject, weighted.batch, weighted.shared, leaf=True) as made:
            twice = made.repeatable and numbers_held(modules) == before
            new = _weighed(weighted, made, measuring, keep=twice)
            done = made.backward(new, sorted(new.subject.measured)) if twice and new is not None else None
        if new is None:
            return Attempt()
        measured, drawn = twice and new.complete(done), RandomState.now()
    if not twice:
        return Attempt(new, new.run())
    drawn.restore()
    return Attempt(new, measured)


def _weighed(
    weighted: WeightedPass, made: Forward, measuring: Callable[[WeightedPass], NewWay], keep: bool
) -> NewWay | None:
    """Run the weighted pass from a forward; the measuring pass to come, None where it cannot."""
    done = made.backward(weighted, sorted(weighted.subject.measured), keep)
    if done is not None:
        weighted.settle(done)
    return measuring(weighted) if weighted.complete else None


def _refuse_missed(names: list[str], trace: Trace) -> None:
    """Raises MomentError naming parameters that a gradient reached beside the taps."""
    if names:
        seen = [str(u) for u in trace.uses if any(s.names & set(names) for s in u.sources)]
        raise MomentError(f"a use of {names} was seen by no rule; uses seen: {seen}")
