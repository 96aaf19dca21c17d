"""What a run of experiments ends with: verdicts per experiment, and the files that keep them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from noetherflow.errors import DataError
from noetherflow_paper.experiment import AnyExperiment, Results, experiment_ids, find_experiment
from noetherflow_paper.records import as_json, from_json
from noetherflow_paper.verdict import Verdict


@dataclass(frozen=True)
class Score:
    """How claims were judged: identities apart, one-sided ones, and two-sided ones by what decided.

    Attributes:
        identities: claims that hold by construction, not counted below.
        one_sided: thresholds, and how many of them hold.
        by_errors: values judged by standard errors, and how many lie within three.
        by_tolerance: values judged by a registered tolerance, and how many lie within.
    """

    identities: tuple[int, int]
    one_sided: tuple[int, int]
    by_errors: tuple[int, int]
    by_tolerance: tuple[int, int]

    @classmethod
    def of(cls, verdicts: Iterable[Verdict]) -> Score:
        """`(held, all)` for each kind."""
        every = list(verdicts)

        def count(chosen: list[Verdict]) -> tuple[int, int]:
            return sum(v.holds for v in chosen), len(chosen)

        two_sided = [v for v in every if v.kind == "two-sided"]
        return cls(
            identities=count([v for v in every if v.kind == "identity"]),
            one_sided=count([v for v in every if v.kind == "one-sided"]),
            by_errors=count([v for v in two_sided if not v.tolerance]),
            by_tolerance=count([v for v in two_sided if v.tolerance]),
        )

    @property
    def counted(self) -> tuple[int, int]:
        """`(held, all)` without the identities."""
        parts = (self.one_sided, self.by_errors, self.by_tolerance)
        return sum(held for held, _ in parts), sum(total for _, total in parts)

    def __str__(self) -> str:
        held, total = self.counted
        shares = (
            f"{self.by_errors[0]} of {self.by_errors[1]} values within 3 standard errors",
            f"{self.by_tolerance[0]} of {self.by_tolerance[1]} values within a registered tolerance",
            f"{self.one_sided[0]} of {self.one_sided[1]} thresholds",
            f"identities, not counted: {self.identities[0]} of {self.identities[1]}",
        )
        return f"{held} of {total} claims hold ({'; '.join(shares)})"


@dataclass(frozen=True)
class Varied:
    """The verdicts of one variation of an experiment's quick configuration, beside those of the unchanged one."""

    label: str
    verdicts: tuple[Verdict, ...]
    unchanged: tuple[Verdict, ...]

    @property
    def held(self) -> int:
        return sum(v.holds for v in self.verdicts)

    @property
    def turned(self) -> list[Verdict]:
        """The verdicts that differ from the same claim's unchanged; a claim without a namesake there, when it fails."""
        before = {v.claim: v.holds for v in self.unchanged}
        return [v for v in self.verdicts if v.holds != before.get(v.claim, True)]


@dataclass(frozen=True)
class Finished:
    """One experiment's outcome: results, verdicts, processor seconds (all points, one thread each), versions."""

    experiment: AnyExperiment
    scale: str
    results: Results[Any, Any]
    verdicts: tuple[Verdict, ...]
    seconds: float
    varied: tuple[Varied, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(f"{self.experiment.id}.{suffix}" for suffix in ("png", "svg", "json"))

    @property
    def holds(self) -> bool:
        return not self.failing

    @property
    def failing(self) -> list[Verdict]:
        return [v for v in self.verdicts if not v.holds]

    @property
    def score(self) -> Score:
        return Score.of(self.verdicts)

    def to_dict(self) -> dict[str, Any]:
        return {
            "id": self.experiment.id,
            "title": self.experiment.title,
            "scale": self.scale,
            "config": as_json(self.results.config),
            "versions": dict(self.versions),
            "seconds": round(self.seconds, 2),
            "verdicts": [v.to_dict() for v in self.verdicts],
            "varied": {v.label: [w.to_dict() for w in v.verdicts] for v in self.varied},
            "points": [{"point": as_json(p), "data": d} for p, d in self.results.points],
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Finished:
        """The inverse of `to_dict`, with the experiment's words and drawing as they are now."""
        e = find_experiment(stored["id"])
        config = from_json(type(e.config(stored["scale"])), stored["config"])
        data = {p["point"]["name"]: p["data"] for p in stored["points"]}
        verdicts = tuple(Verdict.from_dict(v) for v in stored["verdicts"])
        varied = {label: tuple(Verdict.from_dict(v) for v in found) for label, found in stored["varied"].items()}
        return cls(
            experiment=e,
            scale=stored["scale"],
            results=Results(config, tuple((p, data[p.name]) for p in e.points(config))),
            verdicts=verdicts,
            seconds=stored["seconds"],
            varied=tuple(Varied(label, found, verdicts) for label, found in varied.items()),
            versions=stored["versions"],
        )

    def headline(self) -> str:
        """How many claims hold, and those that fail."""
        held, total = self.score.counted
        lines = [f"{self.experiment.id}: {held} of {total} claims hold"]
        return "\n".join([*lines, *(f"  {v} {v.analysis}" for v in self.failing)])

    def __str__(self) -> str:
        lines = [f"{self.experiment.id}: {self.experiment.title} ({self.scale}, {self.seconds:.1f} s)"]
        for v in self.verdicts:
            lines.append(f"  {v}")
            if not v.holds and v.analysis:
                lines.append(f"        why: {v.analysis}")
        for varied in self.varied:
            turned = "; ".join(str(v) for v in varied.turned) or "no verdict changes"
            lines.append(f"  with {varied.label}: {turned}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Summary:
    """All experiments of one call, the folder they were written to, and the wall-clock seconds."""

    finished: tuple[Finished, ...]
    out: Path
    seconds: float = 0.0
    computed: int = 0
    skipped: int = 0

    @property
    def verdicts(self) -> list[tuple[str, Verdict]]:
        """`(experiment id, verdict)` of every claim."""
        return [(f.experiment.id, v) for f in self.finished for v in f.verdicts]

    @property
    def failing(self) -> list[tuple[str, Verdict]]:
        return [(name, v) for name, v in self.verdicts if not v.holds]

    @property
    def score(self) -> Score:
        return Score.of(v for _, v in self.verdicts)

    def __str__(self) -> str:
        tail = (
            f"{self.score}; {self.seconds:.0f} s "
            f"({self.computed} points computed, {self.skipped} found in {self.out}); gallery: {self.out / 'index.html'}"
        )
        return "\n\n".join([*(str(f) for f in self.finished), tail])


def finished_in(folder: Path) -> tuple[Finished, ...]:
    """The experiments that finished in `folder`, in the order of the registry.

    Raises DataError for a file of another version of noetherflow.
    """
    paths = [folder / f"{name}.json" for name in experiment_ids()]
    return tuple(_stored(path) for path in paths if path.exists())


def _stored(path: Path) -> Finished:
    try:
        return Finished.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, DataError) as cause:
        raise DataError(
            f"{path} cannot be read as a result of this version ({cause!r}); delete it, then run {path.stem} again"
        ) from cause
