"""Memory of a solve from files does not grow with the number of layers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FEW, MANY = 2, 8


def solved(folder: Path, layers: int, *options: str) -> dict[str, Any]:
    """What the program prints. glibc is told to give freed pieces back, and not to keep them for later."""
    words = [str(folder / str(layers)), str(layers), "768", "2048", "2000", *options]
    script = Path(__file__).with_name("checkpoint_memory.py")
    done = subprocess.run(
        [sys.executable, script, *words],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    for path in (folder / f"{layers}-out").iterdir():
        path.unlink()
    (folder / f"{layers}-out").rmdir()
    took: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return took


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("options", [("--range",), ()], ids=["range", "norm"])
def test_memory_of_a_solve_does_not_grow_with_depth(tmp_path: Path, options: tuple[str, ...]) -> None:
    """Six more layers of a Llama add less than their group elements alone, 0.8 MB a layer; elements and charges before
    and after, three times that, are what keeping them would add.
    """
    pytest.importorskip("transformers")
    few, many = (solved(tmp_path, layers, *options) for layers in (FEW, MANY))
    added = many["elements_MB"] - few["elements_MB"]
    assert added > 4
    assert many["solve_MB"] - few["solve_MB"] < added, (few, many)
    if options:
        few, many = (solved(tmp_path, layers, *options, "--kept") for layers in (FEW, MANY))
        assert many["solve_MB"] - few["solve_MB"] > 2 * added, "or the measurement sees nothing"
