"""What a certificate says: one row per symmetry, with a verdict and the numbers behind it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from noetherflow.core.members import spelled_out
from noetherflow.core.printing import table
from noetherflow.core.shown import Shown

Verdict = Literal["exact", "approximate", "broken", "undetermined"]
"""`exact`: holds to rounding. `approximate`: up to a normalisation's eps. `broken`: does not hold, or the gradients of
training do not obey it. `undetermined`: nothing was proved, since the outputs depend on some of the moved weights
neither on the example nor at random weights and inputs, or are different at each call.
"""
Mode = Literal["any", "training", "evaluation"]
"""In which mode of the model the gradients of training obey a symmetry."""


@dataclass(frozen=True)
class CertificateRow:
    """What was measured for one symmetry. All numbers are relative, in float64, and the worst over trials.

    Attributes:
        name: the symmetry's name.
        family: its family.
        verdict: see `Verdict`.
        outputs: `|f(G theta) - f(theta)| / |f(theta)|` at a random group element G; infinite where it cannot be
            formed, because outputs are all 0 or no finite numbers at `G theta`.
        gradients: the larger of two numbers. First, how far the per-sample gradients at `G theta` are from the ones the
            group predicts. Second, `theta^T A g` over `sum |theta| |g|` at the model's own and at random weights, for
            all generators A: the part of a gradient that would move a conserved charge.
        eps: the eps of the normalisation that makes the symmetry approximate, where there is one.
        eps_sizes: `(eps, outputs)` for normalisations whose eps was varied.
        dtypes: the output violation in narrower types.
        note: the reason for the verdict in words, empty where there is nothing to say.
        mode: in which mode training obeys the symmetry: `training` for scales in front of a batch normalisation, whose
            running statistics move with them but get no gradient.
    """

    name: str
    family: str
    verdict: Verdict
    outputs: float
    gradients: float
    eps: float | None = None
    eps_sizes: tuple[tuple[float, float], ...] = ()
    dtypes: tuple[tuple[str, float], ...] = ()
    note: str = ""
    mode: Mode = "any"


@dataclass(frozen=True, repr=False)
class Certificate(Shown):
    """One row per symmetry and translation.

    Attributes:
        rows: in the order of `syms.all_items`.
        tolerance: the largest output violation of an exact symmetry.
        casts: places where the model lowers its own precision.
        notes: what holds for all rows, in sentences.
        members: by the name of each symmetry, all modules that it acts on; names such as `embed (+4)` stand for some.
    """

    rows: tuple[CertificateRow, ...]
    tolerance: float
    casts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    members: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[CertificateRow]:
        return iter(self.rows)

    def __getitem__(self, name: str) -> CertificateRow:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no certificate for {name!r}; names: {[r.name for r in self.rows][:20]}")

    @property
    def broken(self) -> tuple[str, ...]:
        """Names of the symmetries that do not hold."""
        return tuple(r.name for r in self.rows if r.verdict == "broken")

    @property
    def refused(self) -> dict[str, str]:
        """The symmetries that must not be relied on, by name, with the reason: those broken and those undetermined."""
        return {r.name: f"certificate: {r.verdict}" for r in self.rows if r.verdict in ("broken", "undetermined")}

    def table_rows(self) -> list[dict[str, Any]]:
        """One row per symmetry: the verdict, and the numbers behind it."""
        noted = any(r.note for r in self.rows)
        return [
            {
                "symmetry": r.name,
                "family": r.family,
                "verdict": r.verdict,
                "outputs changed by": _comparable(r.outputs),
                "gradients off by": _comparable(r.gradients),
                **{f"in {dtype}": _comparable(value) for dtype, value in r.dtypes},
                **({"note": r.note} if noted else {}),
            }
            for r in self.rows
        ]

    def _verdicts(self) -> str:
        """The first sentence: how many symmetries hold."""
        if not self.rows:
            return "nothing to certify"
        found = Counter(r.verdict for r in self.rows)
        if len(found) == 1:
            return f"checked in float64: {'the symmetry' if len(self.rows) == 1 else f'all {len(self.rows):,}'} " + (
                f"{'is' if len(self.rows) == 1 else 'are'} {self.rows[0].verdict}"
            )
        return "checked in float64: " + ", ".join(f"{n:,} {verdict}" for verdict, n in found.most_common())

    def describe(self, *, verbose: bool = False, legend: bool = True) -> str:
        """How many symmetries hold, and a row for each; see `Shown.describe`."""
        explained = ("outputs changed by", "gradients off by") if legend else ()
        lines = [self._verdicts(), *([table(self.table_rows(), *explained)] if self.rows else [])]
        spelled = spelled_out(" ".join(r.name for r in self.rows), self.members) if legend or verbose else []
        lines += ["  (+n): n further modules that the symmetry acts on; all of them:", *spelled] if spelled else []
        if self.casts:
            shown = f"{'; '.join(self.casts[:3])}{' ...' if len(self.casts) > 3 else ''}"
            lines.append(f"the model itself casts to a lower precision in {len(self.casts)} places: {shown}")
        return "\n".join([*lines, *self.notes])

    def to_dict(self) -> dict[str, Any]:
        """The certificate as plain data, for JSON."""
        return {
            "rows": [asdict(r) for r in self.rows],
            "tolerance": self.tolerance,
            "casts": list(self.casts),
            "notes": list(self.notes),
        }


def _comparable(violation: float) -> float | str:
    return violation if math.isfinite(violation) else "not comparable"
