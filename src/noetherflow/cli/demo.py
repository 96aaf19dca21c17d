"""`noetherflow demo`: the whole library on real digits, in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from noetherflow.cli.options import Debug


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the page and the experiment's files.")] = Path("demo"),
    quick: Annotated[bool, typer.Option(help="Short trainings (1 to 2 minutes), to see that it works.")] = False,
    debug: Debug = False,
) -> None:
    """Train on scikit-learn's digits, forecast the charges, balance, reproduce figure 2; write OUT/index.html."""
    from noetherflow.cli.demonstration import demonstrate

    demonstrate(out, quick)
