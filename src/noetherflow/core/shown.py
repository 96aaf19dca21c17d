"""How results show themselves: in a notebook, as a data frame, as a picture."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any

from noetherflow.core.printing import Table
from noetherflow.errors import require

Draw = Callable[..., tuple[Any, Any]]
"""`draw(result, **options)` gives `(figure, axes)` of matplotlib."""
ROWS = 30
"""Rows of a table that a notebook shows; the data frame has all."""


class Drawer:
    """The one place that knows how to draw. This module lies below `report`, which draws, and must not import it; the
    package `noetherflow`, which stands above both, puts a loader of `report.plots.plot` here when it is imported.
    """

    load: Callable[[], Draw] | None = None

    @classmethod
    def draw(cls, result: Any, **options: Any) -> tuple[Any, Any]:
        """What `nf.plot(result, **options)` returns."""
        assert cls.load is not None, "import noetherflow has not run"
        return cls.load()(result, **options)


class Shown:
    """Base of the library's results. A result gives its sentences and tables in `describe` and its rows in
    `table_rows`; what is here makes them readable in a terminal, a notebook, a data frame and a figure.
    """

    def table_rows(self) -> list[dict[str, Any]]:
        """The result as rows `{column: value}`, one per symmetry, step or family."""
        raise NotImplementedError

    def describe(self, *, verbose: bool = False, legend: bool = True) -> str:
        """The text that `print` shows: a sentence first, then tables.

        Args:
            verbose: list everything that is left out one by one, in place of groups with a few examples.
            legend: explain the columns below each table.
        """
        raise NotImplementedError

    def __str__(self) -> str:
        return self.describe()

    def __repr__(self) -> str:
        return self.describe()

    def __init_subclass__(cls, **options: Any) -> None:
        """Keep the text as the representation too: a dataclass writes one of its own where its class has none."""
        super().__init_subclass__(**options)
        setattr(cls, "__repr__", Shown.__repr__)  # noqa: B010

    def to_frame(self) -> Any:
        """A pandas `DataFrame` with one row per entry of `table_rows()`.

        Raises:
            MissingExtraError: without pandas.
        """
        pandas: Any = require("pandas", "frame")
        return pandas.DataFrame(self.table_rows())

    def plot(self, **options: Any) -> tuple[Any, Any]:
        """Draw the result with matplotlib.

        Args:
            **options: as those of the function in `noetherflow.report.plots` that draws this kind of result.

        Returns:
            The figure and its axes (an array of them where there are several).

        Raises:
            MissingExtraError: without matplotlib.
        """
        return Drawer.draw(self, **options)

    def _repr_html_(self) -> str:
        """What a notebook shows: the first sentence, a table of the rows, and all the text folded away."""
        text, rows = self.describe(), self.table_rows()
        first, _, rest = text.partition("\n")
        more = f"<p>… {len(rows) - ROWS:,} more rows: to_frame() has all.</p>" if len(rows) > ROWS else ""
        folded = f"<details><summary>all of it as text</summary><pre>{escape(rest)}</pre></details>" if rest else ""
        shown = f'<div style="overflow-x:auto">{Table.of(rows[:ROWS]).html()}</div>' if rows else ""
        return f"<div><p><b>{escape(first)}</b></p>{shown}{more}{folded}</div>"
