"""The ledger keeps to its share of the training's time, and its readers know how often it recorded."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from noetherflow.errors import DataError
from noetherflow.monitor import pace, recorder
from noetherflow.monitor.ledger import Ledger
from noetherflow.monitor.log import read_log
from noetherflow.monitor.pace import AGAIN, FIRST, Pace, stride
from noetherflow.monitor.rule import ENTRIES
from noetherflow.monitor.rundata import RunData, RunReader
from test_ledger import backward, batches, mlp, mlp_symmetries


class Clock:
    """A clock that only goes where it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(pace, "perf_counter", made)
    monkeypatch.setattr(recorder, "perf_counter", made)
    return made


def run(chosen: Pace, clock: Clock, steps: int, step: float, record: float) -> float:
    """The share of the time that recording took, over so many steps of constant cost."""
    own = 0.0
    for k in range(steps):
        clock.now += step
        recorded = k % chosen.every == 0
        if recorded:
            start = clock.now
            clock.now += record
            own += record
            chosen.worked(start)
        chosen.stepped(recorded)
        if chosen.due:
            chosen.every = chosen.choose()
    return own / (steps * step)


@pytest.mark.parametrize("record", [1e-5, 3e-4, 1.1e-3, 0.021])
@pytest.mark.parametrize("budget", [0.02, 0.1])
def test_the_share_of_the_time_is_kept(clock: Clock, record: float, budget: float) -> None:
    chosen = Pace(None, budget)
    run(chosen, clock, FIRST, 0.005, record)
    share = run(chosen, clock, 5_000, 0.005, record)
    assert share <= budget
    smaller = max((s for s in pace.STRIDES if s < chosen.every), default=None)
    assert smaller is None or pace.NOTHING_KNOWN * record / (0.005 * smaller) > budget


def test_steps_that_become_shorter_or_longer_are_noticed(clock: Clock) -> None:
    chosen = Pace(None, 0.02)
    run(chosen, clock, 200, 0.01, 1e-3)
    assert chosen.every == 10
    run(chosen, clock, 2000, 0.001, 1e-3)
    assert chosen.every == 50
    run(chosen, clock, 5000, 0.1, 1e-3)
    assert chosen.every == 1


def test_pauses_are_no_part_of_a_step(clock: Clock) -> None:
    chosen = Pace(None, 0.02)
    for k in range(FIRST):
        clock.now += 100.0 if k % 10 == 9 else 0.01
        start = clock.now
        clock.now += 1e-3
        chosen.worked(start)
        chosen.stepped(True)
    assert chosen.due
    assert chosen.choose() == 10


def test_work_on_a_device_counts_where_it_is_longer(clock: Clock) -> None:
    chosen = Pace(None, 0.02)
    for _ in range(FIRST):
        clock.now += 0.01
        chosen.stepped(True)
        chosen.worked_on_device(0.002)
    assert chosen.choose() == 20


def test_the_stride_does_not_change_to_and_fro() -> None:
    now, seen = 1, []
    for k in range(40):
        now = stride(0.0005 * (1 + 0.04 * math.sin(k)), 0.005, 0.02, now)
        seen.append(now)
    assert set(seen[2:]) == {10}
    assert stride(1.0, 0.0, 0.02, 1) == pace.STRIDES[-1]


def test_bad_budgets_are_refused() -> None:
    with pytest.raises(DataError, match="every=0 must be >= 1"):
        Pace(0, 0.02)
    with pytest.raises(DataError, match="overhead=0 must be positive"):
        Pace(None, 0)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, clock: Clock, steps: int, step: float = 0.01) -> None:
    for batch in batches(steps):
        optimizer.zero_grad()
        backward(model, batch)
        clock.now += step
        optimizer.step()


def slow(ledger: Ledger, clock: Clock, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every measurement take so long."""
    after = ledger._recorder.meter.after

    def timed(now: object) -> None:
        clock.now += seconds
        after(now)  # type: ignore[arg-type]

    monkeypatch.setattr(ledger._recorder.meter, "after", timed)


def test_a_run_is_recorded_as_the_budget_allows(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with Ledger(model, optimizer, mlp_symmetries(model), run_dir=tmp_path) as ledger:
        slow(ledger, clock, 0.0012, monkeypatch)
        train(model, optimizer, clock, FIRST + 10 * AGAIN + 1)
    expected = [*range(FIRST), *range(FIRST, FIRST + 10 * AGAIN + 1, 10)]
    assert [r["step"] for r in read_log(tmp_path) if r["kind"] == "step"] == expected
    assert ledger.every == 10
    strides = [(e["step"], e["every"]) for e in ledger.events if e["event"] == "stride"]
    assert strides == [(FIRST, 10)]
    for row in ledger.records():
        size = sum(abs(row[k]) for k in ENTRIES)
        assert abs(row["residual"]) <= max(1e-10 * size, 1e-14 * row["norm"])
    headers = [r for r in read_log(tmp_path) if r["kind"] == "run"]
    assert (headers[0]["every"], headers[0]["overhead"]) == (1, 0.02)
    reader = RunReader(tmp_path)
    for data in (RunData.load(tmp_path), reader.poll()):
        assert data is not None
        assert data.steps.tolist() == expected
        assert data.header["every"] == 10
        assert [e["event"] for e in data.events] == ["stride"]


def test_a_missing_row_is_noticed_after_the_stride_has_changed(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with Ledger(model, optimizer, mlp_symmetries(model), run_dir=tmp_path) as ledger:
        slow(ledger, clock, 0.0012, monkeypatch)
        train(model, optimizer, clock, FIRST + 51)
    path = tmp_path / "ledger.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"kind": "step", "step": 70,' not in line))
    gaps = [e for e in RunData.load(tmp_path).events if e["event"] == "gap"]
    assert [e["note"] for e in gaps] == ["steps from 70 to before 80 are missing from the log"]


def test_a_resumed_ledger_goes_on_at_its_stride(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with Ledger(model, optimizer, mlp_symmetries(model), run_dir=tmp_path) as ledger:
        slow(ledger, clock, 0.0012, monkeypatch)
        train(model, optimizer, clock, FIRST + 11)
        state = ledger.state_dict()
    with Ledger(model, optimizer, mlp_symmetries(model), run_dir=tmp_path) as again:
        again.load_state_dict(state)
        train(model, optimizer, clock, 25)
        assert again.every == 10
    data = RunData.load(tmp_path)
    assert data.steps.tolist() == [*range(FIRST), 50, 60, 70, 80]
    assert "gap" not in [e["event"] for e in data.events]


def test_a_fixed_stride_stays_fixed(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with Ledger(model, optimizer, mlp_symmetries(model), every=3) as ledger:
        slow(ledger, clock, 1.0, monkeypatch)
        train(model, optimizer, clock, 120)
    steps = [k for k, _ in itertools.groupby(ledger.records(), lambda r: r["step"])]
    assert steps == list(range(0, 120, 3))
    assert ledger.events == []
