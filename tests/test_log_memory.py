"""Logs of long runs are read and reported in bounded memory, measured in a process of its own."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from noetherflow.monitor.books import FIELDS
from noetherflow.monitor.log import FORMAT, LOG_NAME, parse_line

MIB = 2**20
BYTES_PER_ROW = 240
"""Of memory beside what the modules take: 14 numbers of 8 bytes a row, estimates, and what is drawn from them."""
ESTIMATED = ("charge", "charge_sum", "norm", "drive", "check", "growth", "distance", "distance_max", "steps",
             "at_infinity", "mean_share", "angular", "angular_predicted", "effective_lr")  # fmt: skip
READERS = {
    "load": "from noetherflow.monitor.rundata import RunData as reader; use = reader.load",
    "report": "from noetherflow.report import write_run_report as use",
    "diagnose": "from noetherflow.diagnosis.of_run import diagnose_run as use",
    "watch": """
        import io
        from rich.console import Console
        from noetherflow.report import watch
        use = lambda folder: watch(folder, refresh=0, until=lambda: True, console=Console(file=io.StringIO()))
    """,
}
MEASURED = """
import resource, sys
{reader}
try:
    import jinja2, plotly.graph_objects
except ImportError:
    pass
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
use(sys.argv[1])
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def generated(folder: Path, rows: int) -> Path:
    """A log of so many steps of one family and a twentieth of estimates, about 375 bytes a line."""
    rng = random.Random(0)

    def number() -> float:
        return float(f"{rng.gauss(0, 1):.9g}")

    symmetries = [{"name": f"w{k}", "family": "rescaling", "kind": "diagonal", "shape": [8], "one_sided": False,
                   "parameters": []} for k in range(3)]  # fmt: skip
    header: dict[str, Any] = {
        "kind": "run", "format": FORMAT, "step": 0, "time": "2026-01-01T00:00:00", "optimizer": "SGD",
        "rule": "SGDRule", "equilibrium": True, "every": 1, "families": ["rescaling"], "symmetries": symmetries,
        "momentum": 0.0,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    with open(folder / LOG_NAME, "w") as file:
        file.write(json.dumps(header) + "\n")
        for k in range(rows):
            books = {f: [0.0 if f in ("preconditioner", "other") else number()] for f in FIELDS}
            row = {"kind": "step", "step": k, "lr": 0.05, "loss": abs(number()), "family": books}
            file.write(json.dumps(row) + "\n")
            if k % 20 == 0:
                columns = {name: [abs(number()) for _ in symmetries] for name in ESTIMATED}
                file.write(json.dumps({"kind": "estimates", "step": k, "symmetry": columns}) + "\n")
    return folder


def peaks(reader: str, folder: Path) -> tuple[float, float]:
    """Largest resident memory in MiB of a process before and after it has used a log."""
    script = MEASURED.format(reader=textwrap.dedent(READERS[reader]))
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True)
    before, after = (float(word) * 1024 / MIB for word in done.stdout.split()[-2:])
    return before, after


@pytest.mark.parametrize("reader", ["load", "watch"])
def test_memory_grows_by_the_numbers_of_a_row_and_no_more(reader: str, tmp_path: Path) -> None:
    pytest.importorskip("resource")
    rows = 50_000
    before, after = peaks(reader, generated(tmp_path / "run", rows))
    assert after - before < rows * BYTES_PER_ROW / MIB


@pytest.mark.slow
def test_a_million_rows_within_500_mib(tmp_path: Path) -> None:
    pytest.importorskip("resource")
    pytest.importorskip("plotly")
    folder = generated(tmp_path / "run", 1_000_000)
    assert (folder / LOG_NAME).stat().st_size > 370 * MIB
    found = {reader: peaks(reader, folder)[1] for reader in READERS}
    assert max(found.values()) < 500, found
    assert (folder / "report.html").stat().st_size < 10 * MIB


@pytest.mark.parametrize("digits", ["9" * 30, "9" * 400, "9" * 5000])
def test_integers_beyond_floats_are_read_as_floats(digits: str) -> None:
    row = parse_line(b'{"kind": "step", "step": 1, "loss": %b}' % digits.encode(), Path("log"), 1)
    assert isinstance(row["loss"], float)
    assert parse_line(b'{"kind": "step", "step": %b}' % digits.encode(), Path("log"), 1)["event"] == "unreadable"
