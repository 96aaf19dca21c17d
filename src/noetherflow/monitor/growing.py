"""Rows of numbers in arrays that grow as a log is read, for logs of a million rows."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections import deque
from itertools import repeat
from typing import Any

import numpy as np

PACK = 2048
"""Rows that wait as dictionaries before they are put into the arrays."""


class GrowingTable:
    """Rows of numbers by name, in arrays that grow as rows come: a million rows need a tenth of the memory of lists.

    At most `keep` rows are kept, None for all. The arrays of a log that is read to its end are handed out without a
    copy.
    """

    def __init__(self, keep: int | None) -> None:
        self._keep = keep
        self._loose: deque[dict[str, Any]] = deque(maxlen=keep)
        self._packed = 0
        self._values: dict[str, array[float]] = {}
        self._widths: dict[str, tuple[int, ...]] = {}
        self._rising = True

    def __len__(self) -> int:
        return self._packed + len(self._loose)

    def add(self, row: dict[str, Any]) -> None:
        if self._loose:
            last = self._loose[-1]
            self._rising = self._rising and row["step"] > last["step"]
            if last.keys() != row.keys():
                self._pack()
        elif self._packed:
            self._rising = self._rising and row["step"] > self._values["step"][-1]
        self._loose.append(row)
        if self._keep is None and len(self._loose) == PACK:
            self._pack()

    def _pack(self) -> None:
        rows = list(self._loose)
        self._loose.clear()
        for name in rows[0] if rows else ():
            numbers = _numbers([r[name] for r in rows])
            if name not in self._values:
                self._values[name], self._widths[name] = array("d"), numbers.shape[1:]
            self._fill(name)
            self._values[name].frombytes(numbers.tobytes())
        self._packed += len(rows)
        surplus = 0 if self._keep is None else max(self._packed - self._keep, 0)
        for name in self._values if surplus else ():
            self._fill(name)
            del self._values[name][: surplus * math.prod(self._widths[name])]
        self._packed -= surplus

    def _fill(self, name: str) -> None:
        """NaN in the packed rows that do not have this name."""
        missing = self._packed * math.prod(self._widths[name]) - len(self._values[name])
        if missing > 0:
            self._values[name].extend(repeat(math.nan, missing))

    def has(self, step: int) -> bool:
        """Whether there is a row of this step."""
        loose = self._loose
        if loose and (loose[-1]["step"] == step or any(r["step"] == step for r in loose)):
            return True
        known = self._values.get("step", array("d"))
        if not self._rising:
            return step in known
        place = bisect_left(known, step)
        return place < len(known) and known[place] == step

    def clear(self) -> None:
        self._loose.clear()
        self._values.clear()
        self._packed, self._rising = 0, True

    def arrays(self, last: bool) -> dict[str, np.ndarray]:
        """One array per name over all rows, NaN in rows that do not have it. `last`: no row is added afterwards."""
        self._pack()
        out = {}
        for name, values in self._values.items():
            self._fill(name)
            numbers = np.frombuffer(values) if values else np.zeros(0)
            shaped = numbers.reshape(self._packed, *self._widths[name])
            out[name] = shaped if last else shaped.copy()
        return out


def _numbers(values: list[Any]) -> np.ndarray:
    return np.array(values, dtype=np.float64)
