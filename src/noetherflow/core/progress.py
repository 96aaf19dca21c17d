"""Lines on standard error that say how far a long computation is: a bar on a terminal, plain lines elsewhere."""

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
EVERY, AGAIN, TICK = 4.0, 30.0, 0.1
"""Seconds between two lines, between two lines of the same stage, and between two looks at what stage is on."""


def watched(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """The items; once they have taken 2 s it is said on standard error how many are done.

    On a terminal by a bar that is gone again at the end; elsewhere (a notebook, a log file) by a plain line, at most
    one in `EVERY` seconds. Nothing is shown where a live display is on already.

    Args:
        items: What is worked through.
        what: The words before the bar, such as `errors of the forecast`.
        total: How many items there are, at most.

    Example:
        >>> [x * x for x in watched([1, 2, 3], "squares", 3)]
        [1, 4, 9]
    """
    start, shown, said = time.monotonic(), False, -EVERY
    try:
        for done, item in enumerate(items):
            passed = time.monotonic() - start
            if passed > PATIENCE and _on_terminal():
                shown = True
                sys.stderr.write(f"\r\x1b[K{what} {bar(done, total)}")
                sys.stderr.flush()
            elif passed > PATIENCE and passed - said >= EVERY and not _live():
                said = passed
                print(f"{what} {done}/{total}, {passed:.0f} s", file=sys.stderr, flush=True)
            yield item
    finally:
        if shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


class Stages:
    """Says on standard error which stage of a long computation is on, and for how long all has taken.

    Nothing is said in the first two seconds; then a line per stage, at most one in `EVERY` seconds, and the same again
    after `AGAIN`. Call it with the name of each stage, inside a `with` block.

    Example:
        >>> with Stages("analyze") as say:
        ...     say("measuring")
    """

    def __init__(self, what: str) -> None:
        self._what, self._stage, self._told = what, "", ""
        self._start, self._last = time.monotonic(), -EVERY
        self._over, self._lock = threading.Event(), threading.Lock()
        self._stream = sys.stderr
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Stages:
        self._ticker.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._ticker.join()
        if self._told and exception[0] is None:
            self._print("done")

    def __call__(self, stage: str) -> None:
        """A stage begins."""
        self._stage = stage

    def _tick(self) -> None:
        """Look again and again whether there is something to say, until all is over."""
        while not self._over.wait(min(PATIENCE, TICK)):
            passed = time.monotonic() - self._start
            wait = EVERY if self._stage != self._told else AGAIN
            if passed >= PATIENCE and self._stage and passed - self._last >= wait:
                self._last, self._told = passed, self._stage
                self._print(self._stage)

    def _print(self, stage: str) -> None:
        with self._lock:
            passed = time.monotonic() - self._start
            print(f"{self._what}: {stage} ({passed:.0f} s)", file=self._stream, flush=True)


@contextmanager
def telling(what: str) -> Iterator[None]:
    """A line on standard error that says what is worked on, where it takes more than 2 s.

    Example:
        >>> with telling("forecasting 512 coordinates"):
        ...     pass
    """
    timer = threading.Timer(PATIENCE, lambda: _live() or print(f"{what} ...", file=sys.stderr, flush=True))
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
    return sys.stderr.isatty() and not _live()


def _live() -> bool:
    """Whether a live display writes to standard error."""
    return isinstance(sys.stderr, FileProxy)
