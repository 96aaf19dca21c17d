"""Whether a line of a log says what a line of its kind must: for readers of logs that anything may have written to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from noetherflow.monitor.books import FIELDS

NEEDED = [f for f in FIELDS if f != "outside"]
"""Fields that every log has; earlier versions did not write `outside`."""
NUMBERS = (int, float, type(None))


def wrong_form(row: dict[str, Any], header: Mapping[str, Any]) -> str:
    """Why a line cannot be taken as what it says it is, given the header before it; "" if it can."""
    kind = row.get("kind")
    if row.get("step", 0) < 0:
        return "a step below 0"
    if kind == "run":
        return "" if _is_header(row) else "a header without its names"
    if kind == "event":
        if row.get("event") == "stride" and not (type(row.get("every")) is int and row["every"] > 0):
            return "a stride that is no number"
        return "" if isinstance(row.get("event"), str) else "an event without a name"
    if kind in ("step", "estimates") and not header:
        return f"a {kind} row before any header"
    if kind == "step":
        family = row.get("family")
        whole = isinstance(family, dict) and all(_is_row(family.get(f), len(header["families"])) for f in NEEDED)
        beside = row.get("preconditioned_family", {})
        whole = whole and isinstance(beside, dict)
        whole = whole and all(_is_row(v, len(header["families"])) for v in beside.values())
        whole = whole and isinstance(row.get("lr"), NUMBERS) and isinstance(row.get("loss"), NUMBERS)
        for noted in (row.get("losses", {}), row.get("rates", {})):
            whole = whole and isinstance(noted, dict) and all(isinstance(v, NUMBERS) for v in noted.values())
        return "" if whole else "a step without the numbers of its families"
    if kind == "estimates":
        columns = row.get("symmetry")
        whole = isinstance(columns, dict) and all(_is_row(v, len(header["symmetries"])) for v in columns.values())
        layer = row.get("layer", {})
        whole = whole and isinstance(layer, dict) and isinstance(row.get("mean_share"), NUMBERS)
        whole = whole and all(_is_row(v, len(header.get("layers", ()))) for v in layer.values())
        head = row.get("head", {})
        whole = whole and isinstance(head, dict)
        whole = whole and all(_is_row(v, len(header.get("heads", ()))) for v in head.values())
        return "" if whole else "estimates without the numbers of their symmetries"
    return ""


def _is_header(row: dict[str, Any]) -> bool:
    """Whether a header names what it must, in words, and has a stride that is a number."""
    symmetries, families = row.get("symmetries"), row.get("families")
    heads = row.get("heads", [])
    named = (
        isinstance(heads, list)
        and isinstance(symmetries, list)
        and all(
            isinstance(s, dict) and isinstance(s.get("name"), str) and isinstance(s.get("one_sided"), bool)
            for s in symmetries
        )
    )
    words = isinstance(families, list) and all(isinstance(f, str) for f in families)
    stride = row.get("every", 1)
    said = isinstance(row.get("time"), str) and isinstance(row.get("optimizer"), str)
    return named and words and said and type(stride) is int and stride > 0


def _is_row(values: Any, length: int) -> bool:
    """A list (or tuple) of so many numbers, None for unknown ones."""
    if not isinstance(values, (list, tuple)) or len(values) != length:
        return False
    return all(isinstance(v, NUMBERS) for v in values)
