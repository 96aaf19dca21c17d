"""The command line: `noetherflow find | analyze | balance | reproduce | report | watch | demo`."""

from __future__ import annotations

import sys
import traceback


def main(arguments: list[str] | None = None) -> None:
    """Run the command line.

    Exit 0: success; 1: an error, of noetherflow or of the user's own code; 2: wrong usage; 3: a reproduced claim fails;
    130: interrupted.
    """
    from rich.console import Console

    from noetherflow.cli.app import app
    from noetherflow.errors import NoetherflowError

    given = sys.argv[1:] if arguments is None else arguments
    errors = Console(stderr=True, highlight=False)
    try:
        app(given, prog_name="noetherflow")
    except KeyboardInterrupt:
        errors.print("interrupted")
        sys.exit(130)
    except NoetherflowError as error:
        if "--debug" in given:
            raise
        errors.print(f"[bold red]{type(error).__name__}[/]: ", end="")
        errors.print(str(error), markup=False, soft_wrap=True)
        sys.exit(1)
    except Exception as error:
        if "--debug" in given:
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__} in {last.filename}:{last.lineno} ({last.name}): {error}"
        errors.print(f"{text}\n--debug shows the whole traceback", markup=False, soft_wrap=True)
        sys.exit(1)
