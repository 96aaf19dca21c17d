"""A forecast of charges beside the training that followed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from noetherflow.core.printing import count, show, table
from noetherflow.core.shown import Shown
from noetherflow.errors import DataError


class Recorded(Protocol):
    """What a forecast is compared with: `nf.Ledger`."""

    @property
    def detail(self) -> Any:
        """`family`, or `symmetry` or finer where rows by symmetry can be had."""

    def records(self, by: Any, since: int | None = None) -> list[dict[str, Any]]:
        """One row per step recorded from `since` on and family or symmetry: `step`, its name and the `charge` before
        the step. Raises DataError where rows asked for are no longer kept.
        """


@runtime_checkable
class KeepsPreconditioned(Protocol):
    """What a forecast of preconditioned charges is compared with: `nf.Ledger`."""

    def preconditioned(self, by: Any, since: int | None = None) -> list[dict[str, Any]]:
        """As `Recorded.records`, of the preconditioned charge; no rows where the optimiser has none."""


@dataclass(frozen=True)
class SignedSum:
    """One forecast number: the signed sum of the charges of a symmetry or family after `step` steps, with the standard
    error of the measurement (NaN where it is not known).
    """

    name: str
    step: int
    value: float
    error: float


@dataclass(frozen=True)
class ComparedCharge:
    """One charge at one step: forecast with its standard error, and measured in training."""

    name: str
    step: int
    forecast: float
    error: float
    measured: float


@dataclass(frozen=True, repr=False)
class Comparison(Shown):
    """Forecast and measured charges, each the signed sum over the coordinates of a symmetry or family.

    Attributes:
        by: `symmetry` or `family`.
        charges: by name, then step.
        left_out: steps of the forecast that are not compared, because the ledger did not record them.
        not_valid: compared steps for which the forecast itself was marked as not valid.
        why: the reasons for that, a sentence each.
    """

    by: str
    charges: tuple[ComparedCharge, ...]
    left_out: tuple[int, ...] = ()
    not_valid: tuple[int, ...] = ()
    why: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The symmetries or families, each once."""
        return tuple(dict.fromkeys(c.name for c in self.charges))

    def of(self, name: str) -> tuple[ComparedCharge, ...]:
        """The charges of one symmetry or family, in order of steps."""
        return tuple(c for c in self.charges if c.name == name)

    def table_rows(self) -> list[dict[str, Any]]:
        """One row per symmetry (or family) and step."""
        return [
            {self.by: c.name, "step": c.step, "forecast": c.forecast, "error": c.error, "measured": c.measured}
            for c in self.charges
        ]

    def _sentence(self) -> str:
        """How much of the change in training was missed, over all charges: `|F - C| / |C - C_0|`."""
        last = [self.of(name)[-1] for name in self.names]
        first = [self.of(name)[0] for name in self.names]
        missed = math.dist([c.forecast for c in last], [c.measured for c in last])
        moved = math.dist([c.measured for c in last], [c.measured for c in first])
        what = count(len(last), *{"symmetry": ("symmetry", "symmetries"), "family": ("family", "families")}[self.by])
        told = "" if moved == 0 else f"; the forecast missed {missed / moved:.0%} of the change in training"
        begin, end = first[0].step, last[0].step
        span = f"over {end:,} steps" if begin == 0 else f"from step {begin:,} to step {end:,}"
        return f"forecast against training of {what} {span}{told}"

    def describe(self, *, verbose: bool = False, legend: bool = True) -> str:
        """How much of the change was foretold, and first and last charges; see `Shown.describe`."""
        ends = [(self.of(name)[0], self.of(name)[-1]) for name in self.names]
        rows = [
            {
                self.by: first.name,
                "at the start" if first.step == 0 else f"measured at step {show(first.step)}": first.measured,
                f"forecast of step {show(last.step)}": last.forecast,
                "measured": last.measured,
                "s.e. of the forecast": last.error,
            }
            for first, last in ends
        ]
        what = f"signed sums of the charge over the coordinates of each {self.by} (a forecast alone prints norms)"
        shown = table(self.table_rows() if verbose else rows)
        return "\n".join([self._sentence(), *self.validity(), what, shown, *self._missing()])

    def validity(self) -> list[str]:
        """Of which steps the forecast was marked as not valid, and why; empty where it was valid."""
        if not self.not_valid:
            return []
        valid = [c.step for c in self.charges if 0 < c.step < self.not_valid[0]]
        steps = f"from step {self.not_valid[0]:,} on" if valid else "for all steps"
        return [f"the forecast was marked NOT VALID {steps}: {text}" for text in self.why]

    def _missing(self) -> list[str]:
        """Which steps of the forecast the ledger did not record."""
        if not self.left_out:
            return []
        some = ", ".join(f"{k:,}" for k in self.left_out[:5]) + (", ..." if len(self.left_out) > 5 else "")
        return [
            f"not compared, as the ledger did not record them: {count(len(self.left_out), 'step', 'steps')} ({some})"
        ]


def added(parts: Sequence[SignedSum]) -> list[SignedSum]:
    """One sum per step over symmetries of one name; errors of different symmetries count as independent."""
    out: dict[int, SignedSum] = {}
    for part in parts:
        was = out.get(part.step, SignedSum(part.name, part.step, 0.0, 0.0))
        out[part.step] = SignedSum(part.name, part.step, was.value + part.value, math.hypot(was.error, part.error))
    return list(out.values())


def recorded_rows(ledger: Recorded, by: str, since: int, preconditioned: bool) -> list[dict[str, Any]]:
    """The ledger's rows of the charge that is forecast.

    Raises:
        DataError: the forecast is of preconditioned charges, and this ledger has none.
    """
    if not preconditioned:
        return ledger.records(by, since=since) or ledger.records(by)
    rows = ledger.preconditioned(by, since=since) if isinstance(ledger, KeepsPreconditioned) else []
    if not rows:
        raise DataError(
            "the forecast is of preconditioned charges, and this ledger has no rows of them: its optimiser must be one "
            "of Adam, AdamW, RMSprop or NAdam"
        )
    return rows


def compared(by: str, sums: Sequence[SignedSum], rows: Sequence[dict[str, Any]], start: int | None) -> Comparison:
    """Forecast sums beside the ledger's rows of the same name and step.

    A row tells the charge before its step; where it tells the change in it, that of the step after is known too.

    Raises:
        DataError: no step is in both.
    """
    first = min((row["step"] for row in rows), default=0) if start is None else start
    changing = (row for row in rows if "change" in row)
    measured = {(row[by], row["step"] + 1 - first): row["charge"] + row["change"] for row in changing}
    measured |= {(row[by], row["step"] - first): row["charge"] for row in rows}
    found = tuple(
        ComparedCharge(s.name, s.step, s.value, s.error, measured[s.name, s.step])
        for s in sums
        if (s.name, s.step) in measured
    )
    if not found:
        steps = sorted({row["step"] for row in rows})
        held = f"steps {steps[0]} to {steps[-1]}" if steps else "no step"
        raise DataError(
            f"nothing to compare: the ledger holds {held}, the forecast begins at step {first} of it and has steps "
            f"{sorted({s.step for s in sums})[:6]}"
        )
    return Comparison(by, found, tuple(sorted({s.step for s in sums} - {c.step for c in found})))
