"""How often a ledger records, so that it takes no more than its share of the training's time."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch

from noetherflow.errors import DataError

FIRST = 50
"""Steps that are all recorded before the first choice; short runs are recorded whole."""
AGAIN = 20
"""Recorded steps between later choices."""
LAST = 1000
"""So many steps tell what a step takes."""
NOTHING_KNOWN = 1.5
"""What recording costs with a stride above 1, where nothing is known of the step before, over that at every step."""
STRIDES = tuple(digit * 10**power for power in range(5) for digit in (1, 2, 5))


class Pace:
    """Every how manieth step is recorded: a fixed number, or one chosen by the clock.

    The first `FIRST` steps are all recorded. Then, and again after each `AGAIN` recorded steps, what recording one step
    took is compared with what a step of the training takes, of which pauses (a validation, a checkpoint) are no part.

    Args:
        every: the fixed number; None to choose.
        overhead: the share of the training's time that recording may take, live estimates included.
        estimate_every: steps from one live estimate to the next, 0 for none. They are timed apart, since a larger
            stride makes them no rarer until it is longer than that.

    Raises:
        DataError: `every` is below 1 or `overhead` is not positive.

    Example:
        >>> pace = Pace(every=20, overhead=0.02, estimate_every=50)
        >>> [step for step in range(0, 300, pace.every) if pace.estimates(step)]
        [0, 60, 100, 160, 200, 260]
    """

    def __init__(self, every: int | None, overhead: float, estimate_every: int = 0) -> None:
        if every is not None and every < 1:
            raise DataError(f"every={every} must be >= 1, or None to choose it by overhead={overhead}")
        if not overhead > 0:
            raise DataError(f"overhead={overhead} must be positive; every=1 records all steps")
        self.fixed, self.overhead, self.estimate_every = every is not None, overhead, estimate_every
        self.every = 1 if every is None else every
        self._left = FIRST
        self._end = math.nan
        self._own = 0.0
        self._estimate = 0.0
        self._begin()

    def _begin(self) -> None:
        """Begin to time afresh."""
        self._recorded, self._host, self._device = 0, 0.0, 0.0
        self._estimates, self._estimates_host, self._estimates_device = 0, 0.0, 0.0
        self._steps: deque[float] = deque(maxlen=LAST)

    def worked(self, since: float) -> None:
        """Count the time since then, by `perf_counter`, as the ledger's own."""
        self._own += perf_counter() - since

    def worked_on_device(self, seconds: float, estimates: float = 0.0) -> None:
        """Count the time that recorded steps and estimates took of another device, for which the host does not wait."""
        self._device += seconds
        self._estimates_device += estimates

    def estimates(self, step: int) -> bool:
        """Whether an estimate is due at this recorded step: the first at or after each multiple of `estimate_every`."""
        return self.estimate_every > 0 and step % self.estimate_every < self.every

    def estimated(self, since: float) -> None:
        """Count the time since then as the ledger's own, taken by one estimate."""
        spent = perf_counter() - since
        self._own += spent
        self._estimates += 1
        self._estimates_host += spent

    def stepped(self, recorded: bool) -> None:
        """A step of the training is over, and this is whether the ledger recorded it."""
        now, own = perf_counter(), self._own
        self._own = 0.0
        if self.fixed:
            return
        if not math.isnan(self._end):
            self._steps.append(max(now - self._end - own, 0.0))
        self._end = now
        self._host += own
        self._recorded += recorded

    def booked(self, since: float) -> None:
        """Count the time since then, between two steps, as the ledger's own and as no part of the next step."""
        spent = perf_counter() - since
        self._host += spent
        self._end += spent

    @property
    def due(self) -> bool:
        """Whether it is time to choose; in all processes of a run after the same step."""
        return not self.fixed and self._recorded >= self._left

    def choose(self) -> int:
        """The stride that seems right by what was timed since the last choice."""
        record = max(self._host - self._estimates_host, self._device) / self._recorded
        if self._estimates:
            self._estimate = max(self._estimates_host, self._estimates_device) / self._estimates
        chosen = self.every
        if self._steps:
            cost = Cost(record, self._estimate, self.estimate_every)
            chosen = stride(cost, statistics.median(self._steps), self.overhead, self.every)
        self._left = AGAIN
        self._begin()
        return chosen

    def pause(self) -> None:
        """The time until the next step is over belongs to none."""
        self._end, self._own = math.nan, 0.0


class DeviceClock:
    """Times pieces of work on a CUDA device by events, without waiting for it; on other devices it counts nothing.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._on = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []

    def start(self) -> None:
        """Work begins."""
        if self._on:
            self._spans.append((_mark(), None))

    def stop(self) -> None:
        """The work begun last ends."""
        if self._on and self._spans:
            self._spans[-1] = (self._spans[-1][0], _mark())

    def seconds(self) -> float:
        """What all pieces since the last call took; waits for the last of them."""
        spans, self._spans = [(a, b) for a, b in self._spans if b is not None], []
        if spans:
            spans[-1][1].synchronize()
        return sum(a.elapsed_time(b) for a, b in spans) / 1000


def _mark() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@dataclass(frozen=True)
class Cost:
    """What a ledger takes of a training.

    Attributes:
        record: seconds to record one step.
        estimate: seconds of one estimate beside.
        estimate_every: steps from one estimate to the next, as far as steps between are recorded; 0 for none.
    """

    record: float
    estimate: float = 0.0
    estimate_every: int = 0

    def per_step(self, every: int) -> float:
        """Seconds per step of the training with this stride.

        Example:
            >>> Cost(record=0.25, estimate=1.0, estimate_every=4).per_step(2)
            0.375
        """
        estimates = self.estimate / max(self.estimate_every, every) if self.estimate_every else 0.0
        return self.record / every + estimates


def stride(cost: Cost, step: float, overhead: float, now: int) -> int:
    """The smallest of 1, 2, 5, 10, ... at which the ledger takes no more than its share.

    From every step to fewer, recording a step becomes dearer by `NOTHING_KNOWN`.
    It becomes smaller only where that leaves a third of the share unused, so that it does not change to and fro.

    Args:
        cost: what recording and estimates take.
        step: seconds of one step of the training.
        overhead: the share allowed.
        now: the present stride.

    Example:
        >>> stride(Cost(0.001), 0.005, 0.02, now=1)
        20
        >>> stride(Cost(0.00049), 0.005, 0.02, now=10), stride(Cost(0.0003), 0.005, 0.02, now=10)
        (10, 5)
        >>> stride(Cost(0.001, estimate=0.002, estimate_every=50), 0.005, 0.02, now=1)
        50
    """
    allowed = overhead * step
    within = cost.per_step(now) <= allowed
    if now == 1 and not within:
        cost = replace(cost, record=cost.record * NOTHING_KNOWN)
    smallest = next((s for s in STRIDES if cost.per_step(s) <= allowed), STRIDES[-1])
    if not within or (smallest < now and 1.5 * cost.per_step(smallest) <= allowed):
        return smallest
    return now
