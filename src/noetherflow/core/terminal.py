"""Tables in the terminal."""

from __future__ import annotations

from rich.table import Table as RichTable
from rich.text import Text

from noetherflow.core.printing import Table


def rich_table(table: Table, caption: str | None = None) -> RichTable:
    """The table as rich draws it: bold headings, long cells folded, numbers to the right."""
    drawn = RichTable(header_style="bold", caption=caption)
    for name, number in zip(table.names, table.numeric, strict=True):
        drawn.add_column(name.replace("_", " "), justify="right" if number else "left", overflow="fold")
    for row in table.rows:
        drawn.add_row(*map(Text, row))
    return drawn
