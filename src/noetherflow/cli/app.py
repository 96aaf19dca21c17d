"""The commands in one table."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Annotated

import typer

from noetherflow import __version__
from noetherflow.cli.align import align
from noetherflow.cli.analyze import analyze
from noetherflow.cli.balance import balance
from noetherflow.cli.demo import demo
from noetherflow.cli.diagnose import diagnose
from noetherflow.cli.find import find
from noetherflow.cli.flow import flow
from noetherflow.cli.runs import report, watch

app = typer.Typer(
    help="Parameter symmetries, Noether flow and noise equilibrium of neural networks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (find, analyze, diagnose, flow, balance, align, report, watch, demo):
    app.command()(command)
for entry in entry_points(group="noetherflow.commands"):
    app.command(entry.name)(entry.load())


def _version(asked: bool) -> None:
    if asked:
        print(f"noetherflow {__version__}")
        raise typer.Exit


@app.callback()
def _commands(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Parameter symmetries, Noether flow and noise equilibrium of neural networks."""
