"""A short part of `make interrupts`: Ctrl-C and SIGKILL at random instants in training and in balancing a file."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import interrupts

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
"""Python itself swallows a Ctrl-C that comes while it closes a generator."""


@pytest.fixture(autouse=True)
def answered() -> Iterator[None]:
    """Ctrl-C as Python answers it, also where a shell starts the tests with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("seed", range(4))
def test_balancing_a_file_is_interrupted(seed: int) -> None:
    found = interrupts.ctrl_c_file(seed)
    assert found == interrupts.Outcome("", 1)


def test_a_training_is_interrupted_again_and_again() -> None:
    found = interrupts.ctrl_c(0)
    assert found.fault == ""
    assert found.times > 5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("seed", range(4))
def test_balancing_a_file_is_killed(seed: int) -> None:
    assert interrupts.kill_file(seed).fault == ""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_training_is_killed_and_resumes() -> None:
    assert interrupts.kill(0).fault == ""


@pytest.mark.slow
def test_five_hundred_interruptions() -> None:
    found = [interrupts.ctrl_c(seed) for seed in range(20)] + [interrupts.ctrl_c_file(seed) for seed in range(250)]
    assert [f.fault for f in found if f.fault] == []
    assert sum(f.times for f in found) >= 500


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_two_hundred_kills() -> None:
    found = [interrupts.kill(seed) for seed in range(75)] + [interrupts.kill_file(seed) for seed in range(130)]
    assert [f.fault for f in found if f.fault] == []
    assert sum(f.times for f in found) >= 200


def test_the_program_sees_what_is_wrong(tmp_path: Path) -> None:
    """Negative control: a lost row, a doubled one, other numbers, a changed source, half a target, litter."""
    run = interrupts.Run(tmp_path)
    run.to_the_end()
    assert interrupts.difference(tmp_path) == ""
    log = tmp_path / "ledger.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    step = next(k for k, line in enumerate(lines) if '"step": 7,' in line and '"kind": "step"' in line)
    log.write_text("".join(lines[:step] + lines[step + 1 :]))
    assert interrupts.difference(tmp_path).startswith("lost [7]")
    log.write_text("".join([*lines[:step], lines[step], *lines[step:]]))
    assert "twice [7]" in interrupts.difference(tmp_path)
    log.write_text("".join(lines).replace('"change": [', '"change": [1', 1))
    assert "numbers differ" in interrupts.difference(tmp_path)
    folder = tmp_path / "files"
    folder.mkdir()
    files = interrupts.Files(str(folder), 0)
    files.work()
    whole = files.target.read_bytes()
    assert files.fault(whole, litter=False) == ""
    (folder / ".out.safetensors.partial-x").mkdir()
    assert files.fault(whole, litter=True) == ""
    assert files.fault(whole, litter=False).startswith("left behind")
    files.target.write_bytes(whole[:-1])
    assert "neither" in files.fault(whole, litter=True)
    files.target.unlink()
    files.source.write_bytes(b"")
    assert files.fault(whole, litter=True) == "the source has changed"
