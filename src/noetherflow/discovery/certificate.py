"""What a certificate says: one row per symmetry, with a verdict and the numbers behind it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from noetherflow.core.printing import table

Verdict = Literal["exact", "approximate", "broken"]


@dataclass(frozen=True)
class CertificateRow:
    """What was measured for one symmetry.

    `outputs` is `|f(G theta) - f(theta)| / |f(theta)|` and `gradients` the relative difference between the per-sample
    gradients at `G theta` and the ones the group predicts, both in float64 and the worst over trials. `eps_sizes` lists
    `(eps, outputs)` for normalisations whose eps was varied, `dtypes` the output violation in narrower types.
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


@dataclass(frozen=True)
class Certificate:
    """One row per symmetry and translation; `casts` are the places where the model lowers its own precision."""

    rows: tuple[CertificateRow, ...]
    tolerance: float
    casts: tuple[str, ...] = ()

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

    def __str__(self) -> str:
        noted = any(r.note for r in self.rows)
        rows = [
            {
                "symmetry": r.name,
                "family": r.family,
                "verdict": r.verdict,
                "outputs changed by": r.outputs,
                "gradients off by": r.gradients,
                **{f"in {dtype}": value for dtype, value in r.dtypes},
                **({"note": r.note} if noted else {}),
            }
            for r in self.rows
        ]
        lines = [table(rows, "outputs changed by", "gradients off by")] if rows else ["(nothing to certify)"]
        if self.casts:
            lines.append(
                f"the model itself casts to a lower precision in {len(self.casts)} places, so exact means below "
                f"{self.tolerance:.0e}: {'; '.join(self.casts[:3])}{' ...' if len(self.casts) > 3 else ''}"
            )
        return "\n".join(lines)

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        return {"rows": [asdict(r) for r in self.rows], "tolerance": self.tolerance, "casts": list(self.casts)}
