"""The gallery `index.html` and the report `docs/reproduction.md`: two templates over the same finished runs."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from noetherflow.core.files import replacing, write_text
from noetherflow.errors import DataError, require
from noetherflow.report.page import stylesheet
from noetherflow_paper.differences import DIFFERENCES
from noetherflow_paper.experiment import SERIES, experiment_ids
from noetherflow_paper.outcome import Finished, Score, Summary, finished_in
from noetherflow_paper.printed import PRINTED, SOURCE
from noetherflow_paper.provenance import merged
from noetherflow_paper.records import as_json
from noetherflow_paper.statements import BEYOND, STATEMENTS, Statement
from noetherflow_paper.verdict import Verdict


def write_gallery(summary: Summary) -> Path:
    """One self-contained page in `summary.out`: figures embedded, no script, nothing fetched."""
    markup: Any = require("markupsafe", "report")
    images = {f.experiment.id: _embedded(summary.out / f"{f.experiment.id}.png") for f in summary.finished}
    return _render(
        "gallery.html.j2", summary.out / "index.html", summary, images=images, css=markup.Markup(stylesheet())
    )


def write_markdown(summary: Summary, path: Path, paper: Path | None = None) -> Path:
    """The report: an index at `path`, and beside it a folder of its name with a page and a figure per experiment.

    The index has the score, the statements of the paper with the claims that test them, the claims that fail, and the
    differences from the print; `choices.md` in the folder what was settled after exploratory runs, and the variations;
    `print.md` the text of the paper beside what holds.

    Args:
        summary: the finished experiments.
        path: the index, an `.md` file in an existing folder.
        paper: the folder of a run at paper scale, shown beside; of experiments that did not finish there an estimate
            of the processor time from `summary`, for those that declare their `work`.

    Returns:
        `path`.

    Raises:
        DataError: as `check_report`.
    """
    check_report(path, paper)
    folder = path.with_suffix("")
    folder.mkdir(exist_ok=True)
    earlier = {f.experiment.id: f for f in (finished_in(paper) if paper is not None else ())}
    for f in summary.finished:
        with replacing(folder / f"{f.experiment.id}.png") as scratch:
            scratch.write_bytes((summary.out / f"{f.experiment.id}.png").read_bytes())
        large = {v.claim: v for v in earlier[f.experiment.id].verdicts} if f.experiment.id in earlier else {}
        _render("experiment.md.j2", folder / f"{f.experiment.id}.md", summary, f=f, large=large, index=path.name)
    _render("choices.md.j2", folder / "choices.md", summary, index=path.name)
    tested = {t.statement.id: t.experiments for t in _tested(summary)}
    _render("print.md.j2", folder / "print.md", summary, index=path.name, source=SOURCE, printed=PRINTED, tested=tested)
    told = {f.experiment.id: _beside(f, earlier.get(f.experiment.id)) for f in summary.finished}
    return _render(
        "report.md.j2",
        path,
        summary,
        folder=folder.name,
        statements=_tested(summary),
        series=SERIES,
        command=_command(summary, paper is not None),
        complete=_complete(summary),
        paper=told if paper is not None else {},
        paper_versions=merged(f.versions for f in earlier.values()),
        larger={(name, v.claim): v for name, f in earlier.items() for v in f.verdicts},
        paper_failing=_explained((name, v) for name, f in earlier.items() for v in f.failing),
    )


@dataclass(frozen=True)
class TestedStatement:
    """A statement of the paper, the experiments that test it, and the score of their claims about it."""

    statement: Statement
    experiments: tuple[str, ...]
    score: Score


def _tested(summary: Summary) -> list[TestedStatement]:
    """Every statement, those that no claim tests with an empty score."""
    claims: dict[str, list[tuple[str, Verdict]]] = {s.id: [] for s in (*STATEMENTS, BEYOND)}
    for f in summary.finished:
        for v in f.verdicts:
            claims[v.statement or f.experiment.statement].append((f.experiment.id, v))
    return [
        TestedStatement(s, tuple(dict.fromkeys(name for name, _ in found)), Score.of(v for _, v in found))
        for s in (*STATEMENTS, BEYOND)
        for found in [claims[s.id]]
    ]


def check_report(path: Path, paper: Path | None) -> None:
    """Raises DataError when `path` lies in no folder, or `paper` holds no results or those of another scale."""
    if not path.parent.is_dir():
        raise DataError(f"the report cannot be written to {path}: there is no folder {path.parent}; make it first")
    if paper is None:
        return
    scales = {f.scale for f in finished_in(paper)}
    if scales != {"paper"}:
        found = f"results at {'/'.join(sorted(scales))} scale" if scales else "no results"
        raise DataError(f"{paper} holds {found}; write some with: noetherflow reproduce ID --scale paper --out {paper}")


def _render(template: str, path: Path, summary: Summary, **more: Any) -> Path:
    jinja2: Any = require("jinja2", "report")
    source = files("noetherflow_paper").joinpath(template).read_text(encoding="utf-8")
    html = template.startswith("gallery")
    environment = jinja2.Environment(autoescape=html, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["cell"] = lambda text: text.replace("|", "\\|")
    shown = {
        d.number: [(f.experiment.id, v) for f in summary.finished for v in f.verdicts if v.difference == d.number]
        for d in DIFFERENCES
    }
    made_with = merged(f.versions for f in summary.finished)
    failing = _explained(summary.failing)
    page = environment.from_string(source).render(
        summary=summary, failing=failing, versions=made_with, differences=DIFFERENCES, shown=shown, **more
    )
    write_text(path, page)
    return path


def _embedded(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _command(summary: Summary, paper: bool) -> str:
    """The command that writes this page again."""
    ids = [f.experiment.id for f in summary.finished]
    words = ["noetherflow reproduce", *(["all"] if ids == list(experiment_ids()) else ids)]
    words += ["--scale", "/".join(sorted({f.scale for f in summary.finished})), "--out reproduction"]
    words += dict.fromkeys(word for f in summary.finished for word in _replaced(f))
    words += ["--vary"] if any(f.varied for f in summary.finished) else []
    return " ".join([*words, "--markdown FILE", *(["--paper paper"] if paper else [])])


def _complete(summary: Summary) -> bool:
    """Whether all experiments are there with the settings of their scale."""
    return [f.experiment.id for f in summary.finished] == list(experiment_ids()) and not any(
        _changed(f) for f in summary.finished
    )


def _changed(f: Finished) -> bool:
    """Whether the settings are other than those of the scale as it is declared now."""
    return bool(as_json(f.experiment.config(f.scale)) != as_json(f.results.config))


def _replaced(f: Finished) -> list[str]:
    """The options that make the settings of `f` out of those of its scale."""
    declared, used = as_json(f.experiment.config(f.scale)), as_json(f.results.config)
    other = {key: value for key, value in used.items() if declared.get(key) != value}
    seeds = [f"--seeds {other.pop('seeds')}"] if "seeds" in other else []
    return seeds + [f"--set {shlex.quote(f'{key}={json.dumps(value)}')}" for key, value in other.items()]


def _explained(failing: Iterable[tuple[str, Verdict]]) -> list[tuple[str, str, list[Verdict]]]:
    """`(experiment id, analysis, claims)`: failing claims of one experiment with the same analysis together."""
    groups: dict[tuple[str, str], list[Verdict]] = {}
    for name, v in failing:
        groups.setdefault((name, v.analysis), []).append(v)
    return [(name, analysis, found) for (name, analysis), found in groups.items()]


def _beside(f: Finished, paper: Finished | None) -> str:
    """What the run at paper scale gave and took, or how long it would take: `seconds * work(paper) / work(here)`."""
    if paper is not None:
        held = f"{len(paper.verdicts) - len(paper.failing)} of {len(paper.verdicts)} hold, {_duration(paper.seconds)}"
        return f"{held} (other settings)" if _changed(paper) else held
    work = f.experiment.work
    if work is None:
        return "not run"
    seconds = f.seconds * work(f.experiment.config("paper")) / work(f.results.config)
    return f"not run; about {_duration(seconds)} (estimate)"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.0f} h"
