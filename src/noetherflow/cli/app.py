"""The commands in one table."""

from __future__ import annotations

import typer

from noetherflow.cli.analyze import analyze
from noetherflow.cli.balance import balance
from noetherflow.cli.demo import demo
from noetherflow.cli.find import find
from noetherflow.cli.reproduce import reproduce
from noetherflow.cli.runs import report, watch

app = typer.Typer(
    help="Parameter symmetries, Noether flow and noise equilibrium of neural networks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (find, analyze, balance, reproduce, report, watch, demo):
    app.command()(command)


@app.callback()
def _commands() -> None:
    """Parameter symmetries, Noether flow and noise equilibrium of neural networks."""
