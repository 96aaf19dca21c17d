"""The tables of docs/benchmarks.md: written between marks, machines side by side, and those of the records kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks import tables


def test_the_page_shows_the_records_kept(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text(tables.PAGE.read_text())
    tables.write_moments(tables.PAGE.parent / "figures", page)
    tables.write_gpt2(tables.PAGE.parent / "figures", page)
    tables.write_ledger(tables.PAGE.parent / "figures", page)
    tables.write_one_call(tables.PAGE.parent / "figures", page)
    assert page.read_text() == tables.PAGE.read_text()
    assert page.read_text().count("| measure for the equilibrium |") == 1
    assert page.read_text().count("| MLP 784-512-512-10, batch 256 | A | ") == 2  # moments, one call


def test_machines_stand_side_by_side_and_the_rest_is_left(tmp_path: Path) -> None:
    rows = [{"model": "MLP", "method": "leg sums", "ratio": 1.3, "spread": 0.1, "memory": 1.5}]
    refused = {"model": "MLP", "method": "Opacus", "refused": "NotImplementedError"}
    for name, more in (("moments", []), ("moments-laptop", [refused])):
        record = {"machine": name, "versions": "torch", "date": "2026-01-01", "threads": 1, "rows": rows + more}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- moments: begin -->\nold\n<!-- moments: end -->\nafter\n")
    tables.write_moments(tmp_path, page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| MLP | A | 1.3 ± 0.1 | – | – | – | – | 1.50 |" in text
    assert "| MLP | B | 1.3 ± 0.1 | – | – | refuses | – | 1.50 |" in text
    assert "B: moments-laptop, 1 threads, torch, 2026-01-01" in text


def test_the_ledger_is_shown_by_model_and_stride(tmp_path: Path) -> None:
    rows = [
        {"model": model, "optimizer": kind, "every": every, "inside": share, "inside_spread": 0.002}
        for model, kind, every, share in [("mlp", "adamw", "1", 0.2), ("mlp", "adamw", "default", 0.031)]
    ]
    for name, own in (("ledger", rows), ("ledger-laptop", rows[1:])):
        about = {"machine": name, "versions": "torch", "date": "2026-01-01", "threads": 1, "load": 0.25}
        (tmp_path / f"{name}.json").write_text(json.dumps({**about, "rows": own}))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- ledger: begin -->\nold\n<!-- ledger: end -->\nafter\n")
    tables.write_ledger(tmp_path, page)
    text = page.read_text()
    assert "| model | machine | adamw, every 1 | adamw, by default |" in text
    assert "| mlp | A | 20.0 ± 0.2 % | 3.1 ± 0.2 % |" in text
    assert "| mlp | B | – | 3.1 ± 0.2 % |" in text
    assert "B: ledger-laptop, 1 threads, load 0.2, torch, 2026-01-01" in text


def test_calls_are_shown_by_model_and_machine(tmp_path: Path) -> None:
    row = {"model": "MLP", "call": "16 batches", "ratio": 1.384, "spread": 0.02, "load": 1.5}
    for name, rows in (("one_call", [row]), ("one_call-laptop", [{**row, "call": "1 batch", "ratio": 3.5}])):
        about = {"machine": name, "versions": "torch", "date": "2026-01-01", "threads": 1}
        (tmp_path / f"{name}.json").write_text(json.dumps({**about, "rows": rows}))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- one call: begin -->\n<!-- one call: end -->\nafter\n")
    tables.write_one_call(tmp_path, page)
    text = page.read_text()
    assert "| model | machine | 16 batches | 1 batch |" in text
    assert "| MLP | A | 1.38 ± 0.02 | – |" in text
    assert "| MLP | B | – | 3.50 ± 0.02 |" in text
    assert "A: one_call, 1 threads, load 1.5, torch, 2026-01-01" in text


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="no marks"):
        tables.between("text", "moments", "table")
