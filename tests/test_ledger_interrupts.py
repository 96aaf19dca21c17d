"""Interruptions and damaged logs: no row is lost, none is counted twice, and readers say what is wrong."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from noetherflow.core.interrupts import uninterrupted
from noetherflow.errors import DataError
from noetherflow.monitor.ledger import Ledger
from noetherflow.monitor.log import LOG_NAME, RunLog, read_log
from noetherflow.monitor.rundata import RunData, RunReader
from test_ledger import backward, batches, mlp, mlp_symmetries

STEPS = 60


def steps_of(folder: Path) -> list[int]:
    return [r["step"] for r in read_log(folder) if r["kind"] == "step"]


def watched(folder: Path, **options: Any) -> tuple[Any, torch.optim.Optimizer, Ledger]:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return model, optimizer, Ledger(model, optimizer, mlp_symmetries(model), run_dir=folder, **{"every": 1, **options})


def train(model: Any, optimizer: torch.optim.Optimizer, ledger: Ledger, steps: int) -> None:
    for batch in batches(steps):
        optimizer.zero_grad()
        backward(model, batch)
        optimizer.step()


@pytest.fixture(autouse=True)
def ctrl_c_is_answered() -> Iterator[None]:
    """A shell starts background jobs with Ctrl-C ignored, and a suite run that way would test nothing here."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


def test_ctrl_c_waits_for_the_end_of_the_block() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("rest")
        done.append("after")
    assert done == ["rest"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_blocks_in_other_threads_run_as_they_are() -> None:
    done: list[str] = []

    def work() -> None:
        with uninterrupted():
            done.append("done")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == ["done"]


class Bomb:
    """Raises KeyboardInterrupt at the n-th line that the ledger's modules execute, as a Ctrl-C there would."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, frame: Any, event: str, argument: Any) -> Any:
        if f"{os.sep}monitor{os.sep}" not in frame.f_code.co_filename:
            return None
        return self.line

    def line(self, frame: Any, event: str, argument: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            sys.settrace(None)
            signal.raise_signal(signal.SIGINT)
        return self.line


@pytest.mark.parametrize("seed", range(12))
def test_no_row_is_lost_or_doubled_by_a_ctrl_c_anywhere_in_the_ledger(seed: int, tmp_path: Path) -> None:
    """The training goes on after each interruption; every step that the optimiser made has its row."""
    model, optimizer, ledger = watched(tmp_path, flush_every=4, estimate_every=3)
    ledger.attach()
    generator, made, interrupted = random.Random(seed), 0, 0
    weight = model[0].weight
    for batch in batches(STEPS):
        optimizer.zero_grad()
        backward(model, batch)
        before = weight.detach().clone()
        sys.settrace(Bomb(generator.randrange(1, 4000)))
        try:
            optimizer.step()
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.settrace(None)
        made += not torch.equal(weight, before)
    ledger.close()
    assert interrupted > 5
    assert steps_of(tmp_path) == list(range(made))
    assert [r["step"] for r in ledger.records() if r["family"] == "linear"] == list(range(made))
    size = max(r["norm"] for r in ledger.records())
    assert max(abs(r["residual"]) for r in ledger.records()) < 1e-12 * size


def test_rows_of_an_interrupted_write_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, ledger = watched(tmp_path, flush_every=100)
    ledger.attach()
    train(model, optimizer, ledger, 5)
    write = os.write

    def interrupt(file: int, data: bytes) -> int:
        write(file, data[:1500])
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ledger.flush()
    monkeypatch.undo()
    train(model, optimizer, ledger, 2)
    ledger.close()
    assert steps_of(tmp_path) == list(range(7))


@pytest.mark.parametrize("loss", [torch.ones(3), "high", torch.ones(1, dtype=torch.complex64)])
def test_a_loss_that_is_no_number_is_refused_and_costs_no_row(loss: Any, tmp_path: Path) -> None:
    model, optimizer, ledger = watched(tmp_path)
    ledger.attach()
    train(model, optimizer, ledger, 2)
    with pytest.raises(DataError, match="one real number"):
        ledger.note(loss)
    train(model, optimizer, ledger, 1)
    ledger.close()
    assert steps_of(tmp_path) == [0, 1, 2]


# --- the log ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deleted", "replaced", "folder deleted"])
def test_a_log_deleted_or_replaced_while_open_is_written_again(how: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    model, optimizer, ledger = watched(folder, flush_every=2)
    ledger.attach()
    train(model, optimizer, ledger, 4)
    (folder / LOG_NAME).unlink()
    if how == "replaced":
        (folder / LOG_NAME).write_text("something else\n")
    elif how == "folder deleted":
        folder.rmdir()
    with pytest.warns(RuntimeWarning, match=how.split()[-1]):
        train(model, optimizer, ledger, 2)
    ledger.close()
    kept = folder / ("ledger-1.jsonl" if how == "replaced" else LOG_NAME)
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [r["step"] for r in rows if r["kind"] == "step"] == list(range(6))
    if how == "replaced":
        assert (folder / LOG_NAME).read_text() == "something else\n"


def lines_of_a_run(folder: Path, steps: int = 6) -> list[str]:
    model, optimizer, ledger = watched(folder, estimate_every=2)
    with ledger:
        train(model, optimizer, ledger, steps)
    return (folder / LOG_NAME).read_text().splitlines()


def events_of(data: RunData) -> list[str]:
    return [e["event"] for e in data.events]


@pytest.mark.parametrize(
    "line",
    ["[1, 2]", "{}", '{"kind": "step"}', '{"kind": "step", "step": 3}', '{"kind": "other", "step": 3}', "3", "null",
     '{"kind": "step", "step": true}', '{"kind": "estimates", "step": 3, "symmetry": {"norm": [1]}}',
     '{"kind": "run", "step": 3}', '{"kind": "event", "step": 3}', "[" * 20000 + "]" * 20000],
)  # fmt: skip
def test_lines_of_the_wrong_form_are_named_and_the_rest_is_read(line: str, tmp_path: Path) -> None:
    lines = lines_of_a_run(tmp_path)
    (tmp_path / LOG_NAME).write_text("\n".join([*lines[:3], line, *lines[3:], ""]))
    for data in (RunData.load(tmp_path), RunReader(tmp_path).poll()):
        assert data is not None
        assert data.steps.tolist() == list(range(6))
        (event,) = [e for e in data.events if e["event"] == "unreadable"]
        assert event["line"] == 4
        assert "line 4" in event["note"]
    model, optimizer, ledger = watched(tmp_path, resume=True)
    with ledger:
        train(model, optimizer, ledger, 1)
    assert RunData.load(tmp_path).steps.tolist() == list(range(7))


def test_a_log_without_a_header_holds_nothing_that_can_be_read(tmp_path: Path) -> None:
    lines = lines_of_a_run(tmp_path)
    (tmp_path / LOG_NAME).write_text("\n".join([*lines[1:], ""]))
    with pytest.raises(DataError, match="no recorded step"):
        RunData.load(tmp_path)


def test_gaps_doubled_and_swapped_steps_are_said_and_never_summed_twice(tmp_path: Path) -> None:
    lines = lines_of_a_run(tmp_path, 8)
    whole = RunData.load(tmp_path)
    assert events_of(whole) == []
    rows = [k for k, line in enumerate(lines) if json.loads(line)["kind"] == "step"]
    a, b = rows[3], rows[4]
    swapped = lines.copy()
    swapped[a], swapped[b] = lines[b], lines[a]
    damaged = {
        "doubled": [*lines[: a + 1], lines[a], *lines[a + 1 :]],
        "out of order": swapped,
        "gap": [line for k, line in enumerate(lines) if k != a],
    }
    for what, kept in damaged.items():
        (tmp_path / LOG_NAME).write_text("\n".join([*kept, ""]))
        data = RunData.load(tmp_path)
        assert what in events_of(data)
        assert data.steps.tolist() == [k for k in range(8) if what != "gap" or k != 3]
        if what != "gap":
            np.testing.assert_array_equal(data.family["change"], whole.family["change"])
            assert data.causes(0) == whole.causes(0)
    assert [e["note"] for e in data.events if e["event"] == "gap"] == [
        "steps from 3 to before 4 are missing from the log"
    ]


def test_steps_that_are_not_recorded_are_no_gap(tmp_path: Path) -> None:
    model, optimizer, ledger = watched(tmp_path, every=3)
    with ledger:
        train(model, optimizer, ledger, 8)
    for every in (1, 4):
        model, optimizer, ledger = watched(tmp_path, every=every, resume=True)
        with ledger:
            train(model, optimizer, ledger, 9)
    assert events_of(RunData.load(tmp_path)) == []


HOLDER = """
    import os, sys, time
    from noetherflow.monitor.log import RunLog
    log = RunLog(sys.argv[1])
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_worker_does_not_keep_the_lock_of_a_killed_run(tmp_path: Path) -> None:
    script = tmp_path / "holder.py"
    script.write_text("\n".join(line[4:] for line in HOLDER.splitlines()))
    holder = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        with pytest.raises(DataError, match="another ledger"):
            RunLog(tmp_path)
        holder.kill()
        holder.wait()
        time.sleep(0.05)
        RunLog(tmp_path).close()
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        assert holder.stdout is not None
        holder.stdout.close()


def test_events_beyond_ten_thousand_of_a_kind_are_counted_and_not_kept(tmp_path: Path) -> None:
    """10,050 lines that no reader understands, between the rows of a run."""
    lines = lines_of_a_run(tmp_path)
    (tmp_path / LOG_NAME).write_text("\n".join([*lines[:3], *["{}"] * 10_050, *lines[3:], ""]))
    data = RunData.load(tmp_path)
    assert data.steps.tolist() == list(range(6))
    told = [e for e in data.events if e["event"] == "unreadable"]
    assert len(told) == 10_001
    assert told[-1]["note"] == "50 more of these are not listed"
