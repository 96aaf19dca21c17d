"""Run experiments: points in parallel, finished ones skipped, figures, JSON and a gallery written atomically."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from noetherflow.core.files import replacing, write_text
from noetherflow.errors import DataError, require
from noetherflow.report import style
from noetherflow_paper.experiment import AnyExperiment, Coarser, Results, experiment_ids, find_experiment
from noetherflow_paper.gallery import write_gallery
from noetherflow_paper.outcome import Finished, Summary, Varied, finished_in
from noetherflow_paper.provenance import merged, versions
from noetherflow_paper.records import Config, ExperimentPoint, as_json, changed, setting_names
from noetherflow_paper.verdict import Verdict

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Computed:
    """What one point gave, the processor seconds it took, and the versions and device it was computed with."""

    data: dict[str, Any]
    seconds: float
    versions: dict[str, str]


@dataclass
class _Job:
    """One point to compute, the file that keeps it, and what it gave (None until then)."""

    point: ExperimentPoint
    path: Path
    computed: Computed | None = None


@dataclass
class _Batch:
    """All points of one experiment at one configuration; `label` names the variation, empty for none.

    `coarser`: the same at every larger learning rate, for experiments with claims about the limit eta -> 0.
    """

    experiment: AnyExperiment
    label: str
    config: Config
    jobs: list[_Job]
    coarser: tuple[_Batch, ...] = ()

    @property
    def rates(self) -> list[_Batch]:
        """This batch, and those at larger learning rates."""
        return [self, *self.coarser]

    @property
    def done(self) -> bool:
        return all(job.computed is not None for batch in self.rates for job in batch.jobs)

    def judged(self) -> tuple[Verdict, ...]:
        return self.experiment.judged(self.results(), [batch.results() for batch in self.coarser])

    @property
    def computed(self) -> list[Computed]:
        return [job.computed for job in self.jobs if job.computed is not None]

    def results(self) -> Results[Any, Any]:
        return Results(self.config, tuple((j.point, j.computed.data) for j in self.jobs if j.computed is not None))


def run(
    ids: Sequence[str] | str = "all",
    scale: str = "quick",
    out: Path | str = "reproduction",
    seeds: int | None = None,
    jobs: int = 1,
    dask: str | None = None,
    vary: bool = False,
    progress: Progress | None = print,
    device: str = "cpu",
    settings: Mapping[str, Any] | None = None,
) -> Summary:
    """Compute, judge and draw experiments; write `<id>.png`, `.svg`, `.json`, `points/` and `index.html` to `out`.

    Points whose fingerprint (configuration, point, device, code) is already in `out` are not computed again, so a
    killed run continues. Files are replaced atomically. `index.html` shows all experiments found in `out`. It has ten
    parameters because it is the whole of `noetherflow reproduce` in one call.

    Args:
        ids: experiment ids, or `all`.
        scale: `quick` (minutes) or `paper` (the paper's sizes).
        out: the folder to write to and to continue from.
        seeds: number of seeds in place of each experiment's own.
        jobs: processes on this machine (joblib; -1: one per processor).
        dask: address of a dask cluster to run on instead; its workers must have one thread each.
        vary: judge every claim again under each of the experiment's variations (quick scale).
        progress: hears what is computed and how claims are judged; None for silence.
        device: where the tensors live, `cpu` or `cuda`.
        settings: other values of settings, for the experiments that have them (fig5: `{"data": "mnist.npz"}`).

    Returns:
        The finished experiments with their verdicts.

    Raises:
        DataError: for an unknown id, scale, setting or device, for 0 jobs, for `vary` at another scale than quick, for
            a folder that cannot be written or holds results of another scale, for an unreachable cluster or one whose
            workers have several threads.
        MissingExtraError: without joblib, matplotlib or jinja2.
    """
    began = time.perf_counter()
    names = [ids] if isinstance(ids, str) else list(ids)
    chosen = [find_experiment(n) for n in (experiment_ids() if "all" in names else dict.fromkeys(names))]
    _check(scale, jobs, vary, device if dask is None else "cpu")
    require("matplotlib", "report")
    configs = _configs(chosen, scale, seeds, settings or {})
    folder = _writable(Path(out), scale)
    say = progress or (lambda text: None)
    without = [name for name, config in configs.items() if seeds is not None and "seeds" not in setting_names(config)]
    if without:
        say(f"the number of seeds does not apply to {', '.join(without)}")
    batches = {e.id: _batches_of(e, configs[e.id], vary, folder, device) for e in chosen}
    every = [job for group in batches.values() for b in group for rate in b.rates for job in rate.jobs]
    todo = sum(job.computed is None for job in every)
    if todo < len(every):
        say(f"{len(every) - todo} finished points found in {folder}")
    finished = {f.experiment.id: f for f in _finished(batches, scale, folder, _Machines(jobs, dask, device), say)}
    write_gallery(Summary(finished_in(folder), folder))
    seconds = time.perf_counter() - began
    return Summary(tuple(finished[e.id] for e in chosen), folder, seconds, todo, len(every) - todo)


def _finished(
    batches: Mapping[str, list[_Batch]], scale: str, folder: Path, machines: _Machines, say: Progress
) -> Iterator[Finished]:
    """Every experiment as soon as its last point is there; computes and stores the points that are missing."""
    for group in batches.values():
        yield from _concluded(group, scale, folder, say)
    rates = [rate for group in batches.values() for b in group for rate in b.rates]
    todo = [(rate, job) for rate in rates for job in rate.jobs if job.computed is None]
    for number, ((batch, job), computed) in enumerate(_computed(todo, machines), start=1):
        job.computed = computed
        write_text(job.path, json.dumps({"point": as_json(job.point), **vars(computed)}))
        label = f" ({batch.label})" if batch.label else ""
        say(f"[{number}/{len(todo)}] {batch.experiment.id} {job.point.name}{label}: {computed.seconds:.1f} s")
        yield from _concluded(batches[batch.experiment.id], scale, folder, say)


def _concluded(group: list[_Batch], scale: str, folder: Path, say: Progress) -> Iterator[Finished]:
    """The experiment of these batches, judged, drawn and stored, if all its points are there."""
    if all(batch.done for batch in group):
        finished = _conclude(group, scale, folder)
        say(finished.headline())
        yield finished


def _configs(
    chosen: Sequence[AnyExperiment], scale: str, seeds: int | None, settings: Mapping[str, Any]
) -> dict[str, Config]:
    """Per id the configuration of the scale, with those of `settings` that it has replaced."""
    configs: dict[str, Config] = {e.id: e.config(scale, seeds) for e in chosen}
    if "seeds" in settings:
        raise DataError("the number of seeds has an option of its own, seeds (--seeds); leave it out of the settings")
    known = {name for config in configs.values() for name in setting_names(config)}
    for name in settings:
        if name not in known:
            raise DataError(f"no setting {name!r} in {', '.join(configs)}; settings: {', '.join(sorted(known))}")
    return {
        key: changed(config, {n: v for n, v in settings.items() if n in setting_names(config)})
        for key, config in configs.items()
    }


def _check(scale: str, jobs: int, vary: bool, device: str) -> None:
    if jobs == 0:
        raise DataError("0 jobs compute nothing; give a number of processes, or -1 for one per processor")
    if vary and scale != "quick":
        raise DataError(f"the variations are changes to the quick settings; leave out vary, or scale {scale!r}")
    if device.startswith("cuda") and not torch.backends.cuda.is_built():
        raise DataError(f"device {device!r} cannot be used here: this PyTorch has no CUDA; use --device cpu")
    try:
        torch.Generator(device=device)
    except RuntimeError as cause:
        reason = str(cause).splitlines()[0]
        raise DataError(f"device {device!r} cannot be used here: {reason}; use 'cpu', or 'cuda' with a GPU") from cause


def _writable(folder: Path, scale: str) -> Path:
    """`folder`, made where it is missing, with room for points."""
    try:
        (folder / "points").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder / "points"):
            pass
    except OSError as cause:
        raise DataError(f"results cannot be written to {folder}: {cause}; choose another folder") from cause
    other = {f.scale for f in finished_in(folder)} - {scale}
    if other:
        raise DataError(f"{folder} holds results at {other.pop()} scale; choose another folder for scale {scale}")
    return folder


def _batches_of(e: AnyExperiment, config: Config, vary: bool, folder: Path, device: str) -> list[_Batch]:
    """The unchanged configuration, then the variations where they are asked for."""
    changes = {"": {}, **(e.variations if vary else {})}

    def batch(label: str, config: Config, coarser: tuple[_Batch, ...] = ()) -> _Batch:
        return _Batch(e, label, config, list(_jobs_of(e, config, folder, device)), coarser)

    batches = []
    for label, change in changes.items():
        used = changed(config, change)
        names = [f"{label}{' ' if label else ''}{name}" for name in _names_of(e.larger_rates)]
        larger = [batch(name, rate.change(used)) for name, rate in zip(names, e.larger_rates, strict=True)]
        batches.append(batch(label, used, tuple(larger)))
    return batches


def _names_of(rates: Sequence[Coarser[Any]]) -> list[str]:
    """What each is called in the progress: "larger rate", with its factor where there are several."""
    return ["larger rate"] if len(rates) == 1 else [f"{rate.factor:g} times the rate" for rate in rates]


def _jobs_of(e: AnyExperiment, config: Config, folder: Path, device: str) -> Iterator[_Job]:
    for point in e.points(config):
        path = folder / "points" / f"{e.id}-{e.fingerprint(config, point, device)}.json"
        yield _Job(point, path, _read(path))


def _read(path: Path) -> Computed | None:
    """A stored point; None for one that is missing, torn or not of this form."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        data, seconds, made_with = (stored[key] for key in ("data", "seconds", "versions"))
        return Computed(dict(data), float(seconds), dict(made_with))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def compute_point(
    compute: Callable[[Any, Any], dict[str, Any]], config: Config, point: ExperimentPoint, device: str = "cpu"
) -> Computed:
    """One point on one thread: what a worker process runs. Tensors and generators are made on `device`."""
    began = time.process_time()
    with _one_thread(), contextlib.nullcontext() if device == "cpu" else torch.device(device):
        data = compute(config, point)
    return Computed(json.loads(json.dumps(data)), time.process_time() - began, versions(device))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Points are parallel to each other; with a fixed thread count sums are rounded the same way everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class _Machines:
    """Where points are computed: processes here, or a dask cluster at an address, with tensors on a device."""

    jobs: int
    dask: str | None
    device: str


def _indexed(
    index: int, compute: Callable[[Any, Any], dict[str, Any]], config: Config, point: ExperimentPoint, device: str
) -> tuple[int, Computed]:
    return index, compute_point(compute, config, point, device)


def _computed(todo: list[tuple[_Batch, _Job]], machines: _Machines) -> Iterable[tuple[tuple[_Batch, _Job], Computed]]:
    """What every job gave, in the order in which they end."""
    device = machines.device
    arguments = [(i, b.experiment.compute, b.config, job.point, device) for i, (b, job) in enumerate(todo)]
    if machines.dask is None and (machines.jobs == 1 or len(todo) < 2):
        for a in arguments:
            index, computed = _indexed(*a)
            yield todo[index], computed
        return
    joblib: Any = require("joblib", "sweep")
    with contextlib.ExitStack() as stack:
        if machines.dask is not None:
            stack.enter_context(_cluster(machines.dask))
            stack.enter_context(joblib.parallel_config(backend="dask", n_jobs=-1))
        count = {} if machines.dask is not None else {"n_jobs": machines.jobs}
        parallel = joblib.Parallel(return_as="generator_unordered", batch_size=1, **count)
        for index, computed in parallel(joblib.delayed(_indexed)(*a) for a in arguments):
            yield todo[index], computed


@contextlib.contextmanager
def _cluster(address: str) -> Iterator[None]:
    """A client of the dask cluster at `address`.

    Raises DataError when it cannot be reached, has no workers, or has workers with several threads: torch's tracing and
    its global random numbers belong to a process, so that two points in one process would disturb each other.
    """
    remedy = f"start workers with: dask worker --nthreads 1 {address}"
    try:
        client = require("distributed", "sweep").Client(address)  # type: ignore[attr-defined]
    except (OSError, ValueError) as cause:
        raise DataError(f"the dask cluster at {address} cannot be reached ({cause}); is its scheduler up?") from cause
    with client:
        threads = client.nthreads()
        if not threads:
            raise DataError(f"the dask cluster at {address} has no workers; {remedy}")
        several = [f"{worker} ({n} threads)" for worker, n in threads.items() if n > 1]
        if several:
            raise DataError(f"points need a process each, but workers have several threads: {several}; {remedy}")
        yield


def _conclude(batches: list[_Batch], scale: str, folder: Path) -> Finished:
    """Judge, draw and store an experiment whose points are all there."""
    own, *others = batches
    e, results = own.experiment, own.results()
    verdicts = own.judged()
    varied = tuple(Varied(b.label, b.judged(), verdicts) for b in others)
    figure = e.figure(results)
    for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        with replacing(folder / f"{e.id}.{suffix}") as scratch:
            style.save(figure, scratch, metadata=metadata)
    seconds = sum(c.seconds for rate in own.rates for c in rate.computed)
    made_with = merged(c.versions for b in batches for rate in b.rates for c in rate.computed)
    done = Finished(e, scale, results, verdicts, seconds, varied, made_with)
    write_text(folder / f"{e.id}.json", json.dumps(done.to_dict()))
    return done
