"""`noetherflow reproduce`: the paper's experiments with a verdict for every claim."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from noetherflow.cli import tables
from noetherflow.cli.options import Debug, Json, console
from noetherflow.cli.output import emit
from noetherflow.errors import DataError

if TYPE_CHECKING:
    from noetherflow.report.page import Notice, Section


def reproduce(
    ids: Annotated[list[str] | None, typer.Argument(help="Experiment ids, or all (default).")] = None,
    scale: Annotated[str, typer.Option(help="quick (minutes on two cores) or paper (the paper's sizes).")] = "quick",
    out: Annotated[Path, typer.Option(help="Folder for figures, results and the gallery.")] = Path("reproduction"),
    seeds: Annotated[int | None, typer.Option(help="Number of seeds, in place of each experiment's own.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE in place of a setting, as data=mnist.npz; repeatable.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Processes on this machine; -1: one per processor.")] = 1,
    dask: Annotated[str | None, typer.Option(help="Address of a dask scheduler to run on.")] = None,
    device: Annotated[str, typer.Option(help="Where tensors live: cpu or cuda.")] = "cpu",
    vary: Annotated[bool, typer.Option(help="Judge all claims again with one setting changed at a time.")] = False,
    markdown: Annotated[
        Path | None, typer.Option(help="Write the report to this .md file, and a page per experiment beside it.")
    ] = None,
    paper: Annotated[Path | None, typer.Option(help="Folder of a paper-scale run to show in that report.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="Name the experiments and their settings, and stop.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run experiments of the paper; finished points are kept, so a killed run continues. Exit 3 if a claim fails.

    \f
    Its parameters are many because each is an option of the command line.
    """
    from noetherflow_paper import check_report, run, write_markdown

    if listed:
        tables.of_rows(tables.out(), list(_experiments(scale)), f"experiments at {scale} scale; run some by name")
        return
    if markdown is not None:
        check_report(markdown, paper)
    elif paper is not None:
        raise DataError(f"--paper {paper} is shown in the report only; add --markdown FILE")
    summary = run(
        ids or "all",
        scale=scale,
        out=out,
        seeds=seeds,
        jobs=jobs,
        dask=dask,
        vary=vary,
        device=device,
        settings=dict(_parsed(text) for text in setting or ()),
        progress=lambda text: console.print(text, markup=False),
    )
    if markdown is not None:
        write_markdown(summary, markdown, paper)
    if as_json:
        emit([finished.to_dict() for finished in summary.finished])
    else:
        tables.out().print(str(summary), markup=False, soft_wrap=True)
    if summary.failing:
        raise typer.Exit(3)


def _experiments(scale: str) -> Iterator[dict[str, str]]:
    """One row per experiment: its id, what it shows, and the settings that --set may change, with their values."""
    from noetherflow_paper.experiment import experiment_ids, find_experiment
    from noetherflow_paper.records import as_json

    for name in experiment_ids():
        experiment = find_experiment(name)
        chosen = as_json(experiment.config(scale))
        settings = ", ".join(f"{k}={json.dumps(v)}" for k, v in chosen.items() if k != "seeds")
        yield {"id": name, "shows": experiment.title, "settings (--set)": settings}


def _parsed(text: str) -> tuple[str, Any]:
    """`key=value`; the value as JSON where it is JSON, else as text."""
    key, found, value = text.partition("=")
    if not found or not key:
        raise DataError(f"--set takes KEY=VALUE, got {text!r}")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def figure_two(out: Path, printed: Any) -> tuple[Section, Notice]:
    """Figure 2 of the paper for `noetherflow demo`: a section of its page, and a verdict for its summary."""
    from noetherflow.report.page import Figure, Notice, Section
    from noetherflow_paper.runner import run

    (finished,) = run(["fig2"], scale="quick", out=out / "experiments", progress=None).finished
    printed.print(f"\n{finished}", markup=False)
    rows = [
        {"claim": v.claim, "predicted": v.criterion, "measured": v.measured, "s.e.": v.error, "holds": v.holds}
        for v in finished.verdicts
    ]
    images = [
        Figure(out / "experiments" / f, finished.experiment.title, f"figure-two-{i}")
        for i, f in enumerate(f for f in finished.files if f.endswith(".png"))
    ]
    held = len(rows) - len(finished.failing)
    sentence = f"Reproduced: figure 2 of the paper, {held} of {len(rows)} claims hold."
    notice = Notice("watch" if finished.failing else "good", sentence, figure="figure-two-0")
    return Section(f"Figure 2 of the paper: {finished.experiment.title}", table=rows, figures=images), notice
