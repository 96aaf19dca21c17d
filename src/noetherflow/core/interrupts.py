"""Pieces of work that Ctrl-C must not cut in two."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

# The functions of `signal` itself turn numbers into enum members at every call, which takes ten times as long.
_install: Any = _signal.signal
_installed: Any = _signal.getsignal
_SIGINT = int(signal.SIGINT)


class uninterrupted:
    """Ctrl-C during the block is answered at its end; a second one at once, in case that the block hangs.

    Python runs signal handlers in the main thread alone; elsewhere, and where Ctrl-C is ignored or not Python's to
    answer, the block runs as it is.

    Example:
        >>> with uninterrupted():
        ...     rows = ["measured"]
        >>> rows
        ['measured']
    """

    __slots__ = ("_before", "_came")

    def __init__(self) -> None:
        self._before: Any = None
        self._came: tuple[int, FrameType | None] | None = None

    def __enter__(self) -> None:
        before = _installed(_SIGINT)
        if callable(before) and threading.current_thread() is threading.main_thread():
            self._before = before
            _install(_SIGINT, self._wait)

    def _wait(self, number: int, frame: FrameType | None) -> None:
        if self._came is None:
            self._came = number, frame
        elif self._before is not None:
            self._before(number, frame)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is None:
            return
        _install(_SIGINT, self._before)
        if self._came is not None:
            self._before(*self._came)
