"""The tables of docs/benchmarks.md from the records of runs, one record per machine, ratios only.

A table stands between `<!-- moments: begin -->` and `<!-- moments: end -->`; what stands around it is left alone.
"""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

METHODS = ("leg sums", "entries", "vmap(grad)", "Opacus", "BackPACK")
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"


def provenance(device: str) -> dict[str, str]:
    """Machine, versions and date of a run."""
    return {
        "machine": device if device != "cpu" else f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "versions": f"torch {torch.__version__}, Python {platform.python_version()}",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }


def moments_table(records: list[dict[str, Any]]) -> str:
    """One row per model and machine: the time of each method over that of a plain step, and leg sums' peak memory.

    Example:
        >>> row = {"model": "MLP", "method": "leg sums", "ratio": 1.34, "spread": 0.02, "memory": 1.5}
        >>> record = {"machine": "2 cores", "versions": "torch 2.13", "date": "2026-11-27", "threads": 2, "rows": [row]}
        >>> print(moments_table([record]))
        | model | machine | leg sums | entries | vmap(grad) | Opacus | BackPACK | memory, leg sums |
        |---|---|---|---|---|---|---|---|
        | MLP | A | 1.34 ± 0.02 | – | – | – | – | 1.50 |
        <BLANKLINE>
        A: 2 cores, 2 threads, torch 2.13, 2026-11-27
    """
    lines = [
        f"| model | machine | {' | '.join(METHODS)} | memory, leg sums |",
        "|---|---|" + "---|" * (len(METHODS) + 1),
    ]
    models = dict.fromkeys(row["model"] for record in records for row in record["rows"])
    names = [chr(ord("A") + i) for i in range(len(records))]
    for model in models:
        for name, record in zip(names, records, strict=True):
            rows = {row["method"]: row for row in record["rows"] if row["model"] == model}
            if rows:
                memory = rows.get("leg sums", {}).get("memory")
                cells = [_cell(rows.get(m)) for m in METHODS] + ["–" if memory is None else f"{memory:.2f}"]
                lines.append(f"| {model} | {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *map(_machine, names, records)])


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    return "refuses" if "refused" in row else f"{row['ratio']:.3g} ± {row['spread']:.2g}"


def _machine(name: str, record: dict[str, Any]) -> str:
    unknown = "not recorded"
    about = [record.get(k, unknown) for k in ("versions", "date")]
    return f"{name}: {record.get('machine', record.get('device', unknown))}, {record['threads']} threads, " + ", ".join(
        about
    )


def between(page: str, name: str, text: str) -> str:
    """The page with `text` between the marks of `name`. Raises ValueError where they are missing."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    head, found, rest = page.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the page has no marks {begin} and {end}")
    return f"{head}{begin}\n{text}\n{end}{tail}"


def write_moments(folder: Path, page: Path = PAGE) -> None:
    """Write the table of gradient moments from every record `moments*.json` in the folder, CPUs first."""
    paths = sorted(folder.glob("moments*.json"), key=lambda p: (len(p.stem), p.stem))
    table = moments_table([json.loads(p.read_text()) for p in paths])
    page.write_text(between(page.read_text(), "moments", table))


def gpt2_table(records: list[dict[str, Any]]) -> str:
    """One row per stage, a column per record: seconds (of the processor), memory above the stage's start.

    Example:
        >>> row = {"stage": "flow", "seconds": 9.0, "cpu": 12.5, "mib": 300.0, "load": 1.2}
        >>> run = {"parameters": 124e6, "layers": 12, "tokens": 128, "threads": 2, "machine": "2 cores", "rows": [row]}
        >>> print(gpt2_table([{**run, "versions": "torch 2.13", "date": "2026-11-27"}]))
        | stage | 124M, layers: 12, tokens: 128 |
        |---|---|
        | flow | 9.0 s (12.5 s), 300 MiB |
        <BLANKLINE>
        124M: 2 cores, 2 threads, load 1.2, torch 2.13, 2026-11-27
    """
    sizes = [f"{r['parameters'] / 1e6:.0f}M" for r in records]
    heads = [f"{n}, layers: {r['layers']}, tokens: {r['tokens']}" for n, r in zip(sizes, records, strict=True)]
    lines = [f"| stage | {' | '.join(heads)} |", "|---|" + "---|" * len(records)]
    for stage in dict.fromkeys(row["stage"] for r in records for row in r["rows"]):
        found = [next((row for row in r["rows"] if row["stage"] == stage), None) for r in records]
        lines.append(f"| {stage} | {' | '.join(map(_stage, found))} |")
    return "\n".join([*lines, "", *map(_circumstances, sizes, records)])


def _stage(row: dict[str, Any] | None) -> str:
    return "–" if row is None else f"{row['seconds']:.1f} s ({row['cpu']:.1f} s), {row['mib']:.0f} MiB"


def _circumstances(name: str, record: dict[str, Any]) -> str:
    loads = sorted({row["load"] for row in record["rows"]})
    load = f"{loads[0]:.1f}" if len(loads) == 1 else f"{loads[0]:.1f} to {loads[-1]:.1f}"
    return (
        f"{name}: {record['machine']}, {record['threads']} threads, load {load}, {record['versions']}, {record['date']}"
    )


def write_gpt2(folder: Path, page: Path = PAGE) -> None:
    """Write the table of GPT-2 from every record `gpt2-*.json` in the folder, smallest first."""
    records = sorted((json.loads(p.read_text()) for p in folder.glob("gpt2-*.json")), key=lambda r: r["parameters"])
    page.write_text(between(page.read_text(), "gpt2", gpt2_table(records)))


def ledger_table(records: list[dict[str, Any]]) -> str:
    """One row per model and machine: the ledger's time over that of the steps it watches, by optimiser and stride.

    Example:
        >>> row = {"model": "mlp", "optimizer": "adamw", "every": "10", "inside": 0.043, "inside_spread": 0.002}
        >>> record = {"machine": "2 cores", "threads": 2, "load": 0.5, "versions": "torch 2.13", "date": "2026-11-27"}
        >>> print(ledger_table([{**record, "rows": [row]}]))
        | model | machine | adamw, every 10 |
        |---|---|---|
        | mlp | A | 4.3 ± 0.2 % |
        <BLANKLINE>
        A: 2 cores, 2 threads, load 0.5, torch 2.13, 2026-11-27
    """
    rows = [(chr(ord("A") + i), row) for i, record in enumerate(records) for row in record["rows"]]
    kinds = list(dict.fromkeys((row["optimizer"], row["every"]) for _, row in rows))
    heads = [f"{kind}, by default" if every == "default" else f"{kind}, every {every}" for kind, every in kinds]
    lines = [f"| model | machine | {' | '.join(heads)} |", "|---|---|" + "---|" * len(kinds)]
    for model, machine in dict.fromkeys((row["model"], machine) for machine, row in rows):
        own = {(r["optimizer"], r["every"]): r for m, r in rows if (r["model"], m) == (model, machine)}
        lines.append(f"| {model} | {machine} | {' | '.join(_share(own.get(kind)) for kind in kinds)} |")
    return "\n".join([*lines, "", *(_loaded(chr(ord("A") + i), record) for i, record in enumerate(records))])


def _loaded(name: str, record: dict[str, Any]) -> str:
    about = f"{record['machine']}, {record['threads']} threads, load {record['load']:.1f}"
    return f"{name}: {about}, {record['versions']}, {record['date']}"


def _share(row: dict[str, Any] | None) -> str:
    return "–" if row is None else f"{100 * row['inside']:.1f} ± {100 * row['inside_spread']:.1f} %"


def write_ledger(folder: Path, page: Path = PAGE) -> None:
    """Write the table of the ledger's cost from every record `ledger*.json` in the folder."""
    paths = sorted(folder.glob("ledger*.json"), key=lambda p: (len(p.stem), p.stem))
    table = ledger_table([json.loads(p.read_text()) for p in paths])
    page.write_text(between(page.read_text(), "ledger", table))


def one_call_table(records: list[dict[str, Any]]) -> str:
    """One row per model and machine: the time of each call over that of as many plain steps as it has batches.

    Example:
        >>> row = {"model": "MLP", "call": "16 batches", "ratio": 1.38, "spread": 0.02, "load": 1.5}
        >>> record = {"machine": "2 cores", "threads": 1, "versions": "torch 2.13", "date": "2026-11-27", "rows": [row]}
        >>> print(one_call_table([record]))
        | model | machine | 16 batches |
        |---|---|---|
        | MLP | A | 1.38 ± 0.02 |
        <BLANKLINE>
        A: 2 cores, 1 threads, load 1.5, torch 2.13, 2026-11-27
    """
    letters = [chr(ord("A") + i) for i in range(len(records))]
    found = [(letter, row) for letter, record in zip(letters, records, strict=True) for row in record["rows"]]
    heads = list(dict.fromkeys(row["call"] for _, row in found))
    lines = [f"| model | machine | {' | '.join(heads)} |", "|---|---|" + "---|" * len(heads)]
    for model, letter in sorted(dict.fromkeys((row["model"], letter) for letter, row in found)):
        own = {row["call"]: row for at, row in found if (row["model"], at) == (model, letter)}
        lines.append(f"| {model} | {letter} | {' | '.join(_ratio(own.get(head)) for head in heads)} |")
    return "\n".join([*lines, "", *map(_circumstances, letters, records)])


def _ratio(row: dict[str, Any] | None) -> str:
    return "–" if row is None else f"{row['ratio']:.2f} ± {row['spread']:.2f}"


def write_one_call(folder: Path, page: Path = PAGE) -> None:
    """Write the table of single calls from every record `one_call*.json` in the folder."""
    paths = sorted(folder.glob("one_call*.json"), key=lambda p: (len(p.stem), p.stem))
    table = one_call_table([json.loads(p.read_text()) for p in paths])
    page.write_text(between(page.read_text(), "one call", table))
