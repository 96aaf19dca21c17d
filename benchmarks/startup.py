"""Seconds that `import noetherflow` adds to `import torch`, median of fresh interpreters."""

from __future__ import annotations

import statistics
import subprocess
import sys

CODE = "import time, torch; t = time.perf_counter(); import noetherflow; print(time.perf_counter() - t)"


def run(repeats: int = 7) -> list[dict[str, float]]:
    """One row: median and largest seconds over fresh interpreters."""
    times = [
        float(subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout)
        for _ in range(repeats)
    ]
    return [{"import_s_median": statistics.median(times), "import_s_max": max(times)}]
