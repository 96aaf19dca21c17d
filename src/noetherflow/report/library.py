"""plotly.js as a page holds it: no more of it than the page's figures need."""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from importlib import resources
from typing import Any

from noetherflow.errors import require

SMALL = "plotly-cartesian.min.js.gz"
"""plotly.js for flat charts (npm package plotly.js-cartesian-dist-min, MIT license), as gzip packs it."""
FLAT = frozenset(("scatter", "bar", "box", "heatmap", "histogram", "histogram2d", "contour", "image", "pie", "violin"))
"""Kinds of traces that it draws."""


def plotly_for(kinds: Iterable[str]) -> str:
    """The text of plotly.js, a third of it where all traces are of flat charts.

    Args:
        kinds: of the traces of a page, such as `scatter`.

    Raises:
        MissingExtraError: all of it is needed and plotly is not installed.

    Example:
        >>> "plotly.js (cartesian - minified) v" in plotly_for(["scatter", "heatmap"])[:200]
        True
    """
    if FLAT.issuperset(kinds):
        return gzip.decompress(resources.files("noetherflow.report").joinpath(SMALL).read_bytes()).decode()
    offline: Any = require("plotly.offline", "report")
    text: str = offline.get_plotlyjs()
    return text
