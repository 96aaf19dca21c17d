"""plotly.js as a page holds it: packed, and no more of it than the page's figures need."""

from __future__ import annotations

import base64
import gzip
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from typing import Any

from noetherflow.errors import require

SMALL = "plotly-cartesian.min.js.gz"
"""plotly.js for flat charts (npm package plotly.js-cartesian-dist-min, MIT license), as gzip packs it."""
FLAT = frozenset(("scatter", "bar", "box", "heatmap", "histogram", "histogram2d", "contour", "image", "pie", "violin"))
"""Kinds of traces that it draws."""
HEADER, TRAILER = 10, 8
"""Bytes around the deflate stream of a gzip file without a name."""


@dataclass(frozen=True)
class PlotLibrary:
    """The library that draws a page's figures.

    Attributes:
        name: with its version.
        size: of its text in bytes.
        packed: its deflate stream in base64; `inflate.js` unpacks it.

    Example:
        >>> len(PlotLibrary.of(["scatter", "heatmap"]).packed) < 700_000
        True
    """

    name: str
    size: int
    packed: str

    @classmethod
    def of(cls, kinds: Iterable[str]) -> PlotLibrary:
        """A seventh of plotly.js where all traces are of flat charts, else all of it.

        Raises:
            MissingExtraError: all of it is needed and plotly is not installed.
        """
        if FLAT.issuperset(kinds):
            packed = resources.files("noetherflow.report").joinpath(SMALL).read_bytes()
            text, stream = gzip.decompress(packed), packed[HEADER:-TRAILER]
        else:
            offline: Any = require("plotly.offline", "report")
            text = offline.get_plotlyjs().encode()
            packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
            stream = packer.compress(text) + packer.flush()
        version = text[:200].rsplit(b" v", 1)[-1].split(None, 1)[0].decode()
        return cls(f"plotly.js v{version}", len(text), base64.b64encode(stream).decode())
