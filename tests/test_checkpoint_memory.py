"""Balancing files takes the memory of some tensors, not of the model: measured in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc"),
]


def measured(folder: Path, layers: int, *flags: str) -> dict[str, Any]:
    """What `checkpoint_memory.py` says of a Llama with six heads of 128."""
    program = Path(__file__).with_name("checkpoint_memory.py")
    words = [sys.executable, str(program), str(folder), str(layers), "768", "2048", "2000", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("flags", [(), ("--range",)])
def test_memory_does_not_grow_with_depth(tmp_path: Path, flags: tuple[str, ...]) -> None:
    """Six more layers have 4.7 MB of group elements; held with their charges and Grams they took 40 MB."""
    shallow, deep = (measured(tmp_path / str(layers), layers, *flags) for layers in (2, 8))
    assert shallow["converged"]
    assert deep["converged"]
    assert deep["elements_MB"] - shallow["elements_MB"] > 4.5
    assert deep["solve_MB"] - shallow["solve_MB"] < 10
    assert deep["move_MB"] - shallow["move_MB"] < 10
    assert deep["solve_MB"] < 150
    assert deep["move_MB"] < 3 * deep["largest_MB"] + deep["elements_MB"] + 64, "with some pieces in float64"
