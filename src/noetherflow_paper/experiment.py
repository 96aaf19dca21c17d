"""What an experiment is: settings, points to compute, a figure, and claims judged from the data."""

from __future__ import annotations

import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from noetherflow.errors import DataError
from noetherflow.report import style
from noetherflow_paper import provenance
from noetherflow_paper.records import Config, ExperimentPoint, as_json, changed, setting_names
from noetherflow_paper.verdict import Verdict

C = TypeVar("C", bound=Config)
P = TypeVar("P", bound=ExperimentPoint)

REGISTRY: tuple[str, ...] = (
    "hero",
    "fig1",
    "fig2",
    "fig3",
    "fig4",
    "fig5",
    "fig6",
    "fig7",
    "fig8",
    "fig9",
    "thm43",
    "thm54",
    "turning",
    "repnorm",
    "approx",
    "rates",
    "momentum",
    "adam",
    "adam_cnn",
    "basis",
    "transformer",
    "rotational",
    "sharpness",
    "neurons",
    "warmup",
)
"""Ids of the paper's experiments, in the order of the gallery; each is a module of `noetherflow_paper.experiments`."""

SERIES = 2
"""Which seeds are used. A new series begins once tolerances are registered that were settled on an older one."""

GROUP = "noetherflow.experiments"
"""The entry point group by which an installed package adds experiments."""


@dataclass(frozen=True)
class Results(Generic[C, P]):
    """An experiment's configuration and, per point, what `compute` returned (plain JSON data)."""

    config: C
    points: tuple[tuple[P, Mapping[str, Any]], ...]

    def __getitem__(self, name: str) -> Mapping[str, Any]:
        """The data of the point called `name`."""
        for point, data in self.points:
            if point.name == name:
                return data
        raise KeyError(f"no point {name!r}; points: {[p.name for p, _ in self.points]}")

    def array(self, name: str, key: str) -> np.ndarray:
        """One recorded quantity of one point as a float array (null becomes nan)."""
        return np.asarray(self[name][key], dtype=float)


@dataclass(frozen=True)
class Setting:
    """Something the paper leaves unsaid: what it is, the choice made here, and what is known of its effect."""

    what: str
    chosen: str
    effect: str


@dataclass(frozen=True)
class Coarser(Generic[C]):
    """How a configuration becomes one with a larger learning rate, for claims about the limit eta -> 0.

    Attributes:
        factor: the larger rate over the rate.
        change: the configuration at the larger rate, as long in relaxation times (steps over `factor` squared).
    """

    factor: float
    change: Callable[[C], C]


@dataclass(frozen=True)
class Experiment(Generic[C, P]):
    """One experiment: what it computes, the figure, the claims judged, and the words about them.

    Attributes:
        id: the name on the command line and of all files.
        title: one line for the gallery.
        setup: what is trained and measured, in sentences.
        scales: `quick` and `paper`, each a record of settings (a subclass of `Config`).
        points: the independent pieces of work of a configuration, each a record with a unique `name`.
        compute: the data of one point, as JSON takes it (`plain` makes tensors ready).
        plot: a matplotlib Figure of all data.
        verdicts: every claim, judged from the data.
        settings: what the paper leaves unsaid, and the choice made here.
        exploratory: what was settled only after looking at runs, so that those claims are no blind predictions.
        variations: by label, other values of some settings of the quick scale, under which all claims are judged again.
        beyond: whether it goes beyond the paper.
        statement: id of the statement of the paper (`statements.py`) that its claims test, unless they say otherwise.
        coarser: how to run at a larger rate, where claims are about the limit eta -> 0 (`Verdict.order`); several, with
            different factors, where the second order of the rate counts: each takes out one more power of it.
        work: a number in proportion to the processor time (replicas times steps, say), from which the time at another
            scale is estimated.
    """

    id: str
    title: str
    setup: str
    scales: Mapping[str, C]
    points: Callable[[C], Sequence[P]]
    compute: Callable[[C, P], dict[str, Any]]
    plot: Callable[[Results[C, P]], Any]
    verdicts: Callable[[Results[C, P]], list[Verdict]]
    settings: tuple[Setting, ...] = ()
    exploratory: str = ""
    variations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    beyond: bool = False
    statement: str = "beyond"
    coarser: Coarser[C] | tuple[Coarser[C], ...] | None = None
    work: Callable[[C], float] | None = None

    def config(self, scale: str, seeds: int | None = None) -> C:
        """The configuration of a scale, with the number of seeds replaced when given.

        Raises:
            DataError: for an unknown scale or fewer than two seeds (no error bar).
        """
        if scale not in self.scales:
            raise DataError(f"unknown scale {scale!r}; {self.id} has {sorted(self.scales)}")
        if seeds is not None and seeds < 2:
            raise DataError(f"an error bar needs at least 2 seeds, got {seeds}")
        chosen = self.scales[scale]
        return changed(chosen, {"seeds": seeds}) if seeds is not None and "seeds" in setting_names(chosen) else chosen

    @property
    def larger_rates(self) -> tuple[Coarser[C], ...]:
        """`coarser` as a tuple, empty for none."""
        return self.coarser if isinstance(self.coarser, tuple) else () if self.coarser is None else (self.coarser,)

    def judged(self, results: Results[C, P], coarser: Sequence[Results[C, P]] = ()) -> tuple[Verdict, ...]:
        """Every claim, those about the limit eta -> 0 extrapolated with the results at every one of `larger_rates`."""
        fine = self.verdicts(results)
        if not coarser:
            return tuple(fine)
        factors = [c.factor for c in self.larger_rates]
        rough = zip(*(self.verdicts(r) for r in coarser), strict=True)
        return tuple(
            v.extrapolated(dict(zip(factors, at, strict=True))) if v.order else v
            for v, at in zip(fine, rough, strict=True)
        )

    def figure(self, results: Results[C, P]) -> Any:
        """`plot(results)` in the common style: a matplotlib Figure."""
        with style.context():
            fig = self.plot(results)
            style.tidy(fig)
            return fig

    def fingerprint(self, config: C, point: P, device: str = "cpu") -> str:
        """Changes whenever a recomputation could give another answer (`provenance.fingerprint`)."""
        return provenance.fingerprint(self.compute, self.id, as_json(config), as_json(point), device)


AnyExperiment = Experiment[Any, Any]

_REGISTERED: dict[str, AnyExperiment] = {}


def register(experiment: AnyExperiment) -> AnyExperiment:
    """Make an experiment known to `run` and `noetherflow reproduce` in this process.

    An installed package does the same for every process with an entry point of the group `noetherflow.experiments`,
    `id = "package.module:EXPERIMENT"`.

    Args:
        experiment: its `id` must be new; registering the same experiment again changes nothing.

    Returns:
        The experiment, so that a module can write `EXPERIMENT = register(Experiment(...))`.

    Raises:
        DataError: for the id of another experiment.
    """
    known = find_experiment(experiment.id) if experiment.id in experiment_ids() else experiment
    if known != experiment:
        raise DataError(f"there is an experiment {experiment.id!r} already ({known.title}); choose another id")
    _REGISTERED[experiment.id] = experiment
    return experiment


def experiment_ids() -> tuple[str, ...]:
    """All ids in the order of the gallery: the paper's, those of installed packages, those registered here."""
    return tuple(dict.fromkeys([*REGISTRY, *entry_points(group=GROUP).names, *_REGISTERED]))


def find_experiment(name: str) -> AnyExperiment:
    """The experiment called `name`.

    Raises:
        DataError: for an unknown id, listing the known ones; for an entry point that leads to something else.
    """
    if name not in experiment_ids():
        raise DataError(f"unknown experiment {name!r}; known: {', '.join(experiment_ids())}, or 'all'")
    if name in _REGISTERED:
        return _REGISTERED[name]
    if name in REGISTRY:
        found = pkgutil.resolve_name(f"noetherflow_paper.experiments.{name}:EXPERIMENT")
    else:
        found = entry_points(group=GROUP)[name].load()
    if not isinstance(found, Experiment) or found.id != name:
        raise DataError(f"the entry point {name!r} of {GROUP} is {found!r}; it must be an Experiment with that id")
    return found


def plain(value: Any) -> Any:
    """Tensors and arrays as nested lists with 7 significant digits, not-a-number as None: ready for JSON."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value


def generator(seed: int) -> torch.Generator:
    """A generator for one point, on the device of the run."""
    return torch.Generator(device=torch.get_default_device()).manual_seed(1000 * SERIES + seed)
