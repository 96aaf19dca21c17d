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
from noetherflow_paper.experiment import REGISTRY, Experiment, Point, Results, find_experiment
from noetherflow_paper.gallery import write_gallery
from noetherflow_paper.outcome import Finished, Summary, Varied, finished_in
from noetherflow_paper.provenance import merged, versions

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Computed:
    """What one point gave, the processor seconds it took, and the versions and device it was computed with."""

    data: dict[str, Any]
    seconds: float
    versions: dict[str, str]


@dataclass
class _Job:
    point: Point
    path: Path
    computed: Computed | None = None


@dataclass
class _Batch:
    """All points of one experiment at one configuration; `label` names the variation, empty for none."""

    experiment: Experiment
    label: str
    config: dict[str, Any]
    jobs: list[_Job]

    @property
    def done(self) -> bool:
        return all(job.computed is not None for job in self.jobs)

    @property
    def computed(self) -> list[Computed]:
        return [job.computed for job in self.jobs if job.computed is not None]

    def results(self) -> Results:
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

    `ids`: experiment ids or `all`. `scale`: `quick` or `paper`. `seeds` replaces the number of seeds, `settings` other
    entries of the configurations that have them (fig5: `{"data": "mnist.npz"}`). `jobs` processes
    on this machine (joblib; -1: one per processor), or a dask cluster at address `dask`, whose workers have one thread
    each. `vary`: judge every claim again under each of the experiment's variations (quick scale). `device`: where the
    tensors live. Points whose fingerprint (configuration, point, device, code) is already in `out` are not computed
    again, so a killed run continues. Files are replaced atomically. `index.html` shows all experiments found in `out`.

    Raises DataError for an unknown id, scale, setting or device, for 0 jobs, for `vary` at another scale than quick,
    for a folder that cannot be written or holds results of another scale, for an unreachable cluster or one whose
    workers have several threads; MissingExtraError without joblib, matplotlib or jinja2.
    """
    began = time.perf_counter()
    names = [ids] if isinstance(ids, str) else list(ids)
    chosen = [find_experiment(n) for n in (REGISTRY if "all" in names else dict.fromkeys(names))]
    _check(scale, jobs, vary, device if dask is None else "cpu")
    require("matplotlib", "report")
    configs = _configs(chosen, scale, seeds, settings or {})
    folder = _writable(Path(out), scale)
    say = progress or (lambda text: None)
    without = [name for name, config in configs.items() if seeds is not None and "seeds" not in config]
    if without:
        say(f"the number of seeds does not apply to {', '.join(without)}")
    batches = {e.id: _batches_of(e, configs[e.id], vary, folder, device) for e in chosen}
    todo = [(b, job) for group in batches.values() for b in group for job in b.jobs if job.computed is None]
    skipped = sum(len(b.jobs) for group in batches.values() for b in group) - len(todo)
    if skipped:
        say(f"{skipped} finished points found in {folder}")
    finished: dict[str, Finished] = {}

    def close(name: str) -> None:
        if all(batch.done for batch in batches[name]):
            finished[name] = _conclude(batches[name], scale, folder)
            say(finished[name].headline())

    for name in batches:
        close(name)
    for number, ((batch, job), computed) in enumerate(_computed(todo, jobs, dask, device), start=1):
        job.computed = computed
        write_text(job.path, json.dumps({"point": dict(job.point), **vars(computed)}))
        label = f" ({batch.label})" if batch.label else ""
        say(f"[{number}/{len(todo)}] {batch.experiment.id} {job.point['name']}{label}: {computed.seconds:.1f} s")
        close(batch.experiment.id)
    write_gallery(Summary(finished_in(folder), folder))
    return Summary(tuple(finished[e.id] for e in chosen), folder, time.perf_counter() - began, len(todo), skipped)


def _configs(
    chosen: Sequence[Experiment], scale: str, seeds: int | None, settings: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Per id the configuration of the scale, with those of `settings` that it has replaced."""
    configs = {e.id: e.config(scale, seeds) for e in chosen}
    if "seeds" in settings:
        raise DataError("the number of seeds has an option of its own, seeds (--seeds); leave it out of the settings")
    for name, value in settings.items():
        having = [config for config in configs.values() if name in config]
        if not having:
            known = sorted({key for config in configs.values() for key in config})
            raise DataError(f"no setting {name!r} in {', '.join(configs)}; settings: {', '.join(known)}")
        for config in having:
            config[name] = value
    return configs


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


def _batches_of(e: Experiment, config: dict[str, Any], vary: bool, folder: Path, device: str) -> list[_Batch]:
    changes = {"": {}, **(e.variations if vary else {})}
    configs = {label: _plain({**config, **change}) for label, change in changes.items()}
    return [_Batch(e, label, c, list(_jobs_of(e, c, folder, device))) for label, c in configs.items()]


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _jobs_of(e: Experiment, config: dict[str, Any], folder: Path, device: str) -> Iterator[_Job]:
    for point in _plain(e.points(config)):
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


def compute_point(name: str, config: dict[str, Any], point: dict[str, Any], device: str = "cpu") -> Computed:
    """One point on one thread: what a worker process runs. Tensors and generators are made on `device`."""
    began = time.process_time()
    with _one_thread(), contextlib.nullcontext() if device == "cpu" else torch.device(device):
        data = find_experiment(name).compute(config, point)
    return Computed(_plain(data), time.process_time() - began, versions(device))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Points are parallel to each other; with a fixed thread count sums are rounded the same way everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _indexed(index: int, name: str, config: dict[str, Any], point: dict[str, Any], device: str) -> tuple[int, Computed]:
    return index, compute_point(name, config, point, device)


def _computed(
    todo: list[tuple[_Batch, _Job]], jobs: int, dask: str | None, device: str
) -> Iterable[tuple[tuple[_Batch, _Job], Computed]]:
    arguments = [(i, b.experiment.id, b.config, dict(job.point), device) for i, (b, job) in enumerate(todo)]
    if dask is None and (jobs == 1 or len(todo) < 2):
        for a in arguments:
            index, computed = _indexed(*a)
            yield todo[index], computed
        return
    joblib: Any = require("joblib", "sweep")
    with contextlib.ExitStack() as stack:
        if dask is not None:
            stack.enter_context(_cluster(dask))
            stack.enter_context(joblib.parallel_config(backend="dask", n_jobs=-1))
            parallel = joblib.Parallel(return_as="generator_unordered", batch_size=1)
        else:
            parallel = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered", batch_size=1)
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
    own, *others = batches
    e, results = own.experiment, own.results()
    verdicts = tuple(e.verdicts(results))
    varied = tuple(Varied(b.label, tuple(e.verdicts(b.results())), verdicts) for b in others)
    figure = e.figure(results)
    for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        with replacing(folder / f"{e.id}.{suffix}") as scratch:
            style.save(figure, scratch, metadata=metadata)
    seconds = sum(c.seconds for c in own.computed)
    made_with = merged(c.versions for b in batches for c in b.computed)
    done = Finished(e, scale, results, verdicts, seconds, varied, made_with)
    write_text(folder / f"{e.id}.json", json.dumps(done.to_dict()))
    return done
