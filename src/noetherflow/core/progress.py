"""A line on the terminal that says how far a long computation is."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.file_proxy import FileProxy

T = TypeVar("T")
PATIENCE = 2.0
"""Seconds before anything is shown."""


def watched(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """The items; on a terminal a bar on standard error once they have taken 2 s, gone again at the end.

    Nothing is shown where standard error is no terminal (a log file, a test) or a live display is on already.

    Args:
        items: What is worked through.
        what: The words before the bar, such as `errors of the forecast`.
        total: How many items there are, at most.

    Example:
        >>> [x * x for x in watched([1, 2, 3], "squares", 3)]
        [1, 4, 9]
    """
    start, shown = time.monotonic(), False
    try:
        for done, item in enumerate(items):
            if time.monotonic() - start > PATIENCE and _on_terminal():
                shown = True
                sys.stderr.write(f"\r\x1b[K{what} {bar(done, total)}")
                sys.stderr.flush()
            yield item
    finally:
        if shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


@contextmanager
def telling(what: str) -> Iterator[None]:
    """On a terminal, a line on standard error that says what is worked on, where it takes more than 2 s.

    Example:
        >>> with telling("forecasting 512 coordinates"):
        ...     pass
    """
    timer = threading.Timer(PATIENCE, lambda: _on_terminal() and print(f"{what} ...", file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def bar(done: int, total: int, width: int = 24) -> str:
    """A bar of text.

    Example:
        >>> bar(4, 16, width=8)
        '[##......] 4/16'
    """
    full = width * min(done, total) // max(total, 1)
    return f"[{'#' * full}{'.' * (width - full)}] {done}/{total}"


def _on_terminal() -> bool:
    return sys.stderr.isatty() and not isinstance(sys.stderr, FileProxy)
