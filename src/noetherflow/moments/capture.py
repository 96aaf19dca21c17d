"""Measuring passes captured once and replayed: operators of a forward, its backward and its contractions as a graph.

A pass whose shapes came before is traced by `torch.fx` down to single operators, with the model's tensors and the
batch's as inputs. On its next batch, and on the first with other weights, the graph must give what the pass itself
gives, with the same random numbers; else it is run in its place, without autograd, taps or rules. What a graph cannot
hold is measured as before, and the reason is kept.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from noetherflow.core.torch_internals import data_dependent, ready, traced
from noetherflow.moments.batch import Share, buffers_kept
from noetherflow.moments.groups import GroupSums, Opened, edges
from noetherflow.moments.measuring import KnownWay, Way
from noetherflow.moments.products import Factors
from noetherflow.moments.scene import PLAIN, Scene
from noetherflow.moments.sizes import size_of
from noetherflow.moments.sums import Sums
from noetherflow.moments.taps import CallId
from noetherflow.moments.traced import Capturing, Found, TracedWay, UnknownWayError, refilled, tensors_within
from noetherflow.moments.verify import same_random_numbers, tolerance

CHANGES, UNUSED = 4, 16
"""Changes of the model, and captures, in a row without a replay, after which nothing more is captured."""
HELD = 32
"""Captured passes of one meter; beyond, the oldest is dropped."""


class CaptureRefusedError(Exception):
    """Why a pass cannot be captured; caught in this module, which then measures without."""


@dataclass(frozen=True)
class Captured:
    """What a meter has captured.

    Attributes:
        traces: How often a pass was captured.
        replays: How many batches were measured by a replay.
        refused: Why passes were not captured, each reason once.
    """

    traces: int = 0
    replays: int = 0
    refused: tuple[str, ...] = ()

    def __str__(self) -> str:
        reasons = f"; not captured: {'; '.join(self.refused)}" if self.refused else ""
        return f"{self.traces} captured, {self.replays} batches replayed{reasons}"


@dataclass(frozen=True)
class Pattern:
    """What must be the same for a captured pass to fit a batch, besides the model.

    Attributes:
        structure: How tuples, lists and dictionaries make up the batch.
        leaves: Shape, strides, type and device of its tensors; its other values.
        parts: Among how many groups it is divided.
        packed: Whether it makes up these groups by itself, so that their sums are packed in the pass.
        measured: The parameters measured by rules.
        shared: The calls that all samples share.
        factors: The parameters whose factors are kept.
    """

    structure: Any
    leaves: tuple[Any, ...]
    parts: int
    packed: bool
    measured: frozenset[str]
    shared: frozenset[CallId]
    factors: frozenset[str]


@dataclass(eq=False)
class CapturedPass:
    """A graph of one pass, and how its outputs are arranged.

    `way`: the way through the model, of which `known` uses had a known layout. `versions`, `untried`: how often weights
    had been changed when the pass was traced, and the tensors of that batch by position, as long as no replay was
    compared with the pass itself where they were others. `compared`: whether any replay was.
    """

    graph: Any
    arranged: Found
    way: Way
    known: int
    versions: int | None
    untried: dict[int, Tensor]
    compared: bool = False

    @property
    def current(self) -> bool:
        """Whether no further use was placed since."""
        return len(self.way.layouts) == self.known

    def to_compare(self, fixed: Sequence[Tensor], given: Sequence[Tensor]) -> bool:
        """Whether a replay may show what none before has shown; it will have been compared after that."""
        weights = self.versions is not None and self.versions != versions_of(fixed)
        others = [k for k, t in self.untried.items() if not torch.equal(t, given[k])]
        due = weights or bool(others) or not self.compared
        self.compared, self.versions = True, None if weights else self.versions
        self.untried = {k: t for k, t in self.untried.items() if k not in others}
        return due

    def replay(self, fixed: Sequence[Tensor], given: Sequence[Tensor]) -> Found:
        """What the pass finds with these tensors of the model and of the batch."""
        try:
            with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                outputs = self.graph(*fixed, *given)
        except RuntimeError as why:
            raise CaptureRefusedError(f"a replay ends with {type(why).__name__}: {why}") from why
        found: Found = refilled(self.arranged, iter(outputs))
        return found

    def refuse_other(self, mine: Found, theirs: Found) -> None:
        """Raises CaptureRefusedError unless a replay found what the pass found."""
        pairs = [(a.double(), b.double()) for a, b in zip(tensors_within(mine), tensors_within(theirs), strict=True)]
        dtypes = [t.dtype for t in tensors_within(theirs)]
        rounding = torch.finfo(torch.float64 if torch.float32 not in dtypes else torch.float32).eps
        floor = rounding * max(float(size_of(b)) for _, b in pairs)  # sums that cancel hold nothing but roundings
        for (a, b), dtype in zip(pairs, dtypes, strict=True):
            if not size_of(a - b) <= tolerance(dtype) * size_of(b) + floor:
                raise CaptureRefusedError(
                    "a replay found something else than the pass itself: the forward reads numbers past torch (kernels "
                    "of its own), counts its calls, or recomputes with restored random numbers"
                )


def versions_of(tensors: Sequence[Tensor]) -> int:
    """How often weights were changed in place, all together."""
    return sum(t._version for t in tensors if t.requires_grad)


@dataclass(eq=False)
class Captures:
    """The passes of one meter captured so far, for its model as it is.

    They are dropped when anything in the model but the values of its tensors is another (`scene`).
    """

    scene: Scene | None = None
    held: dict[Pattern, CapturedPass] = field(default_factory=dict)
    seen: set[Pattern] = field(default_factory=set)
    refused: dict[Pattern | None, str] = field(default_factory=dict)
    changed: str = ""
    traces: int = 0
    replays: int = 0
    changes: int = 0
    unused: int = 0

    @property
    def captured(self) -> Captured:
        return Captured(self.traces, self.replays, tuple(dict.fromkeys(self.refused.values())))

    def enter(self, modules: Sequence[tuple[str, nn.Module]], loss_fn: Any) -> Scene:
        """The scene now; where it is another than before, everything captured is dropped."""
        now = Scene.of(modules, loss_fn)
        different = None if self.scene is None else self.scene.difference(now)
        if different is not None:
            self.held, self.changed = {}, different
            self.changes += 1
            self.seen.clear()
            self.refused = {k: why for k, why in self.refused.items() if k is None}
        self.scene = now
        return now

    def worth(self, pattern: Pattern) -> bool:
        """Whether a pass is to be captured: it came before, and captures have been replayed."""
        if self.changes >= CHANGES:
            self.refused[None] = f"{self.changed} is another before anything captured could be replayed"
        if self.unused >= UNUSED:
            self.refused[None] = f"{self.unused} passes were captured, and no batch of their shapes came again"
        fits = pattern in self.seen and pattern not in self.refused and None not in self.refused
        self.seen.add(pattern)
        return fits

    def keep(self, pattern: Pattern, captured: CapturedPass) -> None:
        """Keep a pass for batches to come."""
        self.held = dict([*self.held.items(), (pattern, captured)][-HELD:])
        self.traces += 1
        self.unused += 1

    def note_replay(self) -> None:
        """Count a batch measured by a replay."""
        self.replays += 1
        self.changes = self.unused = 0


@dataclass(eq=False)
class CapturedWay(KnownWay):
    """Measures a batch by a captured pass where there is one that fits, else as `KnownWay` does."""

    captures: Captures
    modules: Sequence[tuple[str, nn.Module]]
    replayed: Found | None = field(default=None, init=False)

    def run(self) -> bool:
        scene = self.captures.enter(self.modules, self.subject.loss_fn)
        leaves, structure = pytree.tree_flatten(self.batch)
        given = [t for t in leaves if isinstance(t, Tensor)]
        pattern = self._pattern(structure, leaves)
        captured = self.captures.held.get(pattern)
        try:
            if captured is not None and captured.current:
                return self._replay(captured, scene, given)
            if self.captures.worth(pattern):
                self._refuse_unfit(scene, leaves)
                return self._take(self._capture(pattern, scene, given))
        except CaptureRefusedError as why:
            self.captures.held.pop(pattern, None)
            self.captures.refused[pattern] = str(why)
        return super().run()

    @property
    def packed(self) -> bool:
        """Whether the batch makes up its groups by itself, so that their sums are packed as they arise."""
        return self.placed.complete and self.sums.by_group.keys().isdisjoint(self.placed.groups)

    def factors(self) -> dict[str, Factors]:
        return super().factors() if self.replayed is None else self.replayed.factors

    def _pattern(self, structure: Any, leaves: Sequence[Any]) -> Pattern:
        told = tuple(
            (t.shape, t.stride(), t.dtype, t.device, t.requires_grad) if isinstance(t, Tensor) else t
            for t in leaves
            if isinstance(t, Tensor) or type(t) in PLAIN
        )
        parts, measured = len(self.placed.groups), self.subject.measured
        return Pattern(structure, told, parts, self.packed, measured, self.shared, self.kept.wanted)

    def _refuse_unfit(self, scene: Scene, leaves: Sequence[Any]) -> None:
        """Raises CaptureRefusedError where no capture is to be tried."""
        if self.subject.together is not None:
            raise CaptureRefusedError("the model is sharded over ranks")
        odd = [type(v).__name__ for v in leaves if not isinstance(v, Tensor) and type(v) not in PLAIN]
        if odd:
            raise CaptureRefusedError(
                f"the batch holds a {odd[0]}: give tuples, lists or plain dictionaries of tensors"
            )
        tensors = [*scene.tensors, *(v for v in leaves if isinstance(v, Tensor))]
        other = [type(t).__name__ for t in tensors if type(t) not in (Tensor, nn.Parameter)]
        if other:
            raise CaptureRefusedError(f"a tensor of the model or the batch is a {other[0]}")

    def _measuring(self) -> TracedWay:
        """The pass that is captured."""
        own = GroupSums(self.sums.syms, self.sums.needs, level=self.placed.level)
        placed = replace(self.placed, complete=self.packed)
        return TracedWay(self.subject, self.batch, self.ways, own, placed, replace(self.kept))

    def _capture(self, pattern: Pattern, scene: Scene, given: Sequence[Tensor]) -> Found | None:
        """Measure the batch and keep the graph of it; None if it goes a way not verified yet."""
        tracing = Capturing(self._measuring())
        before = _states_outside_torch()
        try:
            graph = traced(tracing.outputs, [*scene.tensors, *given])
            operator = data_dependent(graph)
            run = ready(graph, scene.tensors, given) if operator is None else graph
        except UnknownWayError:
            return None
        except Exception as why:
            raise CaptureRefusedError(f"tracing ends with {type(why).__name__}: {why}") from why
        if operator is not None:
            raise CaptureRefusedError(
                f"the forward or the loss reads a number of a tensor (an if, float(), item()) or makes a shape of its "
                f"values ({operator}), so that its way depends on the data"
            )
        if before != _states_outside_torch():
            raise CaptureRefusedError("the forward draws random numbers of Python or NumPy, which no graph holds")
        empty = (torch.empty_like(t, device="meta") for t in tensors_within(tracing.found))
        way = tracing.way.way
        versions, untried = versions_of(scene.tensors), {k: t.detach().clone() for k, t in enumerate(given)}
        arranged = refilled(tracing.found, empty)
        captured = CapturedPass(run, arranged, way, len(way.layouts), versions, untried)
        self.captures.keep(pattern, captured)
        return tracing.found

    def _replay(self, captured: CapturedPass, scene: Scene, given: Sequence[Tensor]) -> bool:
        """Measure the batch by a replay; beside the pass itself where that may show what none before has shown."""
        modules = self.subject.modules
        if not captured.to_compare(scene.tensors, given):
            with buffers_kept(modules):
                found = captured.replay(scene.tensors, given)
            self.captures.note_replay()
            return self._take(found)
        with same_random_numbers(), buffers_kept(modules):
            again = captured.replay(scene.tensors, given)
        itself = self._measuring().found()
        if itself is None:
            raise CaptureRefusedError("the forward takes another way on another batch of the same shapes")
        captured.refuse_other(again, itself)
        return self._take(itself)

    def _take(self, found: Found | None) -> bool:
        """Let this batch's sums be those found; False if it goes a way not verified yet."""
        if found is None:
            return False
        parts = edges(found.losses.numel(), len(self.placed.groups))
        self.losses = self.read(found.losses, parts)
        if any(map(bool, found.reached)):
            return False
        self.replayed, totals = found, found.totals if self.packed else None
        self.sums.open(self.placed, in_place=False)
        summed = [Sums(self.sums.needs, **kinds) for kinds in found.sums]
        self.opened = Opened(dict(zip(self.placed.groups, summed, strict=True)), found.totals)
        self.shares = [Share(lo, hi, s, totals) for (lo, hi), s in zip(parts, summed, strict=True) if hi > lo]
        return True


def _states_outside_torch() -> tuple[Any, ...]:
    """The states of Python's and NumPy's global random generators."""
    _, numbers, *rest = np.random.get_state()  # noqa: NPY002
    return random.getstate(), np.asarray(numbers).tobytes(), tuple(rest)
