"""What a command writes to standard output: kept apart from what the user's code prints, and fit for any terminal."""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

from noetherflow.core.files import check_writable
from noetherflow.errors import DataError

PLAIN = str.maketrans({"–": "-", "—": "-", "±": "+-", "→": "->", "…": "...", "×": "x", "’": "'", "²": "^2"})
"""Characters that some terminals cannot show, in plain letters."""
PLAINLY = "noetherflow.plain"


class Diverted:
    """A text stream that writes to standard error and remembers standard output."""

    def __init__(self, kept: TextIO) -> None:
        self.kept = kept

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()

    def isatty(self) -> bool:
        return False


@contextmanager
def kept_for_json(machine: bool) -> Iterator[None]:
    """With `machine`, whatever is printed in the block goes to standard error; only `emit` reaches standard output.

    A model, a loss or a factory that prints would otherwise make the JSON of `--json` invalid.
    """
    if not machine:
        yield
        return
    with redirect_stdout(Diverted(sys.stdout)):
        yield


def emit(payload: Mapping[str, Any] | list[Any]) -> None:
    """Print the result of a command as JSON on standard output."""
    target = sys.stdout.kept if isinstance(sys.stdout, Diverted) else sys.stdout
    print(json.dumps(payload), file=target)


def check_output(path: Path) -> None:
    """Make sure, before long work starts, that `path` can be written.

    Raises:
        DataError: it cannot; says why.
    """
    if path.is_dir():
        raise DataError(f"cannot write {path}: it is a folder; name a file in it")
    try:
        check_writable(path)
    except OSError as cause:
        raise DataError(f"cannot write {path}: {cause.strerror}; choose another place") from cause


def fit_for_any_terminal(*streams: TextIO) -> None:
    """Let the streams write what their encoding has no letters for in plain ones, instead of failing."""
    codecs.register_error(PLAINLY, _plainly)
    for stream in streams:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=PLAINLY)


def _plainly(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(PLAIN)
    return "".join(letter if letter.isascii() else "?" for letter in text), error.end
