"""The command line: `noetherflow find | analyze | flow | balance | align | reproduce | report | watch | demo`."""

from __future__ import annotations

import sys
import sysconfig
import traceback
from pathlib import Path
from types import TracebackType


def main(arguments: list[str] | None = None) -> None:
    """Run the command line.

    Exit 0: success; 1: an error, of noetherflow or of the user's own code; 2: wrong usage; 3: a reproduced claim fails;
    130: interrupted.
    """
    given = sys.argv[1:] if arguments is None else arguments
    try:
        _run(given)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _run(given: list[str]) -> None:
    """Load the commands, run the one that is given, and tell errors in words."""
    from rich.console import Console

    from noetherflow.cli.app import app
    from noetherflow.cli.output import fit_for_any_terminal, kept_for_json
    from noetherflow.errors import NoetherflowError

    fit_for_any_terminal(sys.stdout, sys.stderr)
    errors = Console(stderr=True, highlight=False, emoji=False)
    try:
        with kept_for_json("--json" in given):
            app(given, prog_name="noetherflow")
    except NoetherflowError as error:
        if "--debug" in given:
            raise
        errors.print(f"[bold red]{type(error).__name__}[/]: ", end="")
        errors.print(str(error), markup=False, soft_wrap=True)
        sys.exit(1)
    except Exception as error:
        if "--debug" in given:
            raise
        text = f"{type(error).__name__} in {_place(error.__traceback__)}: {error}"
        errors.print(f"{text}\n--debug shows the whole traceback", markup=False, soft_wrap=True)
        sys.exit(1)


def _place(trace: TracebackType | None) -> str:
    """`file:line (function)` of the last frame outside noetherflow and installed packages; without one, of the last."""
    libraries = [Path(__file__).parents[1], *(Path(sysconfig.get_path(k)) for k in ("stdlib", "purelib", "platlib"))]
    frames = traceback.extract_tb(trace)
    own = [f for f in frames if Path(f.filename).is_file() and not any(map(Path(f.filename).is_relative_to, libraries))]
    last = (own or frames)[-1]
    path = Path(last.filename)
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return f"{shown}:{last.lineno} ({last.name})"
