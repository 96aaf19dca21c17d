"""Run experiments: points in parallel, finished ones skipped, figures, JSON and a gallery written atomically."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from noetherflow.errors import DataError, require
from noetherflow.reproduce import style
from noetherflow.reproduce.experiment import REGISTRY, Experiment, Point, Results, Verdict, find_experiment

Progress = Callable[[str], None]


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
    """One experiment's outcome: results, verdicts, processor seconds (all points, one thread each), files."""

    experiment: Experiment
    scale: str
    results: Results
    verdicts: tuple[Verdict, ...]
    seconds: float
    files: tuple[str, ...]
    varied: tuple[Varied, ...] = ()

    @property
    def holds(self) -> bool:
        return not self.failing

    @property
    def failing(self) -> list[Verdict]:
        return [v for v in self.verdicts if not v.holds]

    def to_dict(self) -> dict[str, Any]:
        return {
            "id": self.experiment.id,
            "title": self.experiment.title,
            "scale": self.scale,
            "config": dict(self.results.config),
            "versions": versions(),
            "seconds": round(self.seconds, 2),
            "verdicts": [v.to_dict() for v in self.verdicts],
            "varied": {v.label: [w.to_dict() for w in v.verdicts] for v in self.varied},
            "points": [{"point": dict(p), "data": d} for p, d in self.results.points],
        }

    def headline(self) -> str:
        """How many claims hold, and those that fail."""
        held = len(self.verdicts) - len(self.failing)
        lines = [f"{self.experiment.id}: {held} of {len(self.verdicts)} claims hold"]
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
    seconds: float
    computed: int
    skipped: int

    @property
    def verdicts(self) -> list[tuple[str, Verdict]]:
        """`(experiment id, verdict)` of every claim."""
        return [(f.experiment.id, v) for f in self.finished for v in f.verdicts]

    @property
    def failing(self) -> list[tuple[str, Verdict]]:
        return [(name, v) for name, v in self.verdicts if not v.holds]

    def __str__(self) -> str:
        held = len(self.verdicts) - len(self.failing)
        tail = (
            f"{held} of {len(self.verdicts)} claims hold; {self.seconds:.0f} s "
            f"({self.computed} points computed, {self.skipped} found in {self.out}); gallery: {self.out / 'index.html'}"
        )
        return "\n\n".join([*(str(f) for f in self.finished), tail])


@dataclass
class _Job:
    point: Point
    path: Path
    data: dict[str, Any] | None = None
    seconds: float = 0.0


@dataclass
class _Batch:
    """All points of one experiment at one configuration; `label` names the variation, empty for none."""

    experiment: Experiment
    label: str
    config: dict[str, Any]
    jobs: list[_Job]

    @property
    def done(self) -> bool:
        return all(job.data is not None for job in self.jobs)

    def results(self) -> Results:
        return Results(self.config, tuple((job.point, job.data or {}) for job in self.jobs))


def run(
    ids: Sequence[str] | str = "all",
    scale: str = "quick",
    out: Path | str = "reproduction",
    seeds: int | None = None,
    jobs: int = 1,
    dask: str | None = None,
    vary: bool = False,
    progress: Progress | None = print,
) -> Summary:
    """Compute, judge and draw experiments; write `<id>.png`, `.svg`, `.json`, `points/` and `index.html` to `out`.

    `ids`: experiment ids or `all`. `scale`: `quick` or `paper`. `seeds` replaces the number of seeds. `jobs` processes
    on this machine (joblib), or a dask cluster at address `dask`. `vary`: judge every claim again under each of the
    experiment's variations. Points whose fingerprint (configuration, point, code) is already in `out` are not computed
    again, so a killed run continues. Files are replaced atomically.

    Raises DataError for an unknown id or scale, MissingExtraError without joblib, matplotlib or jinja2.
    """
    from noetherflow.reproduce.gallery import write_gallery

    began = time.perf_counter()
    names = list(REGISTRY) if ids == "all" or "all" in ids else [ids] if isinstance(ids, str) else list(ids)
    chosen = [find_experiment(n) for n in dict.fromkeys(names)]
    require("matplotlib", "report")
    folder = Path(out)
    (folder / "points").mkdir(parents=True, exist_ok=True)
    say = progress or (lambda text: None)
    batches = {e.id: _batches_of(e, e.config(scale, seeds), vary, folder) for e in chosen}
    todo = [(b, job) for group in batches.values() for b in group for job in b.jobs if job.data is None]
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
    for number, ((batch, job), (data, seconds)) in enumerate(_computed(todo, jobs, dask), start=1):
        job.data, job.seconds = data, seconds
        write_atomically(job.path, json.dumps({"point": dict(job.point), "seconds": seconds, "data": data}))
        label = f" ({batch.label})" if batch.label else ""
        say(f"[{number}/{len(todo)}] {batch.experiment.id} {job.point['name']}{label}: {seconds:.1f} s")
        close(batch.experiment.id)
    summary = Summary(tuple(finished[e.id] for e in chosen), folder, time.perf_counter() - began, len(todo), skipped)
    write_gallery(summary)
    return summary


def _batches_of(e: Experiment, config: dict[str, Any], vary: bool, folder: Path) -> list[_Batch]:
    changes = {"": {}, **(e.variations if vary else {})}
    configs = {label: _plain({**config, **change}) for label, change in changes.items()}
    return [_Batch(e, label, c, list(_jobs_of(e, c, folder))) for label, c in configs.items()]


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _jobs_of(e: Experiment, config: dict[str, Any], folder: Path) -> Iterator[_Job]:
    for point in _plain(e.points(config)):
        job = _Job(point, folder / "points" / f"{e.id}-{e.fingerprint(config, point)}.json")
        stored = _read(job.path)
        if stored is not None:
            job.data, job.seconds = stored["data"], float(stored["seconds"])
        yield job


def _read(path: Path) -> dict[str, Any] | None:
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return stored if isinstance(stored, dict) and {"data", "seconds"} <= stored.keys() else None


def compute_point(name: str, config: dict[str, Any], point: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """One point on one thread: `(data, processor seconds)`; what a worker process runs."""
    began = time.process_time()
    with _one_thread():
        data = find_experiment(name).compute(config, point)
    return _plain(data), time.process_time() - began


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Points are parallel to each other; with a fixed thread count sums are rounded the same way everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _indexed(index: int, name: str, config: dict[str, Any], point: dict[str, Any]) -> tuple[int, dict[str, Any], float]:
    return (index, *compute_point(name, config, point))


def _computed(
    todo: list[tuple[_Batch, _Job]], jobs: int, dask: str | None
) -> Iterable[tuple[tuple[_Batch, _Job], tuple[dict[str, Any], float]]]:
    arguments = [(i, batch.experiment.id, batch.config, dict(job.point)) for i, (batch, job) in enumerate(todo)]
    if dask is None and (jobs == 1 or len(todo) < 2):
        for a in arguments:
            index, data, seconds = _indexed(*a)
            yield todo[index], (data, seconds)
        return
    joblib: Any = require("joblib", "sweep")
    with contextlib.ExitStack() as stack:
        if dask is not None:
            client = stack.enter_context(require("distributed", "sweep").Client(dask))  # type: ignore[attr-defined]
            if not client.scheduler_info()["workers"]:
                raise DataError(f"the dask cluster at {dask} has no workers; start some with: dask worker {dask}")
            stack.enter_context(joblib.parallel_config(backend="dask", n_jobs=-1))
            parallel = joblib.Parallel(return_as="generator_unordered", batch_size=1)
        else:
            parallel = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered", batch_size=1)
        for index, data, seconds in parallel(joblib.delayed(_indexed)(*a) for a in arguments):
            yield todo[index], (data, seconds)


def _conclude(batches: list[_Batch], scale: str, folder: Path) -> Finished:
    own, *others = batches
    e, results = own.experiment, own.results()
    verdicts = tuple(e.verdicts(results))
    varied = tuple(Varied(b.label, tuple(e.verdicts(b.results())), verdicts) for b in others)
    figure = e.figure(results)
    files = []
    for suffix in ("png", "svg"):
        path = folder / f"{e.id}.{suffix}"
        scratch = path.with_name(f".{path.stem}.tmp.{suffix}")
        style.save(figure, scratch, metadata={"Date": None} if suffix == "svg" else {"Software": None})
        os.replace(scratch, path)
        files.append(path.name)
    seconds = sum(job.seconds for job in own.jobs)
    done = Finished(e, scale, results, verdicts, seconds, (*files, f"{e.id}.json"), varied)
    write_atomically(folder / f"{e.id}.json", json.dumps(done.to_dict()))
    return done


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` in one step, so that a killed run leaves either the old file or the new one."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    import noetherflow

    return {"noetherflow": noetherflow.__version__, "torch": torch.__version__, "python": platform.python_version()}
