"""The ledger keeps to its share of the training's time, and its readers know how often it recorded."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import noetherflow as nf
from noetherflow.errors import DataError
from noetherflow.monitor import pace, recorder
from noetherflow.monitor.charge_map import ChargeMap
from noetherflow.monitor.ledger import Ledger
from noetherflow.monitor.log import read_log
from noetherflow.monitor.measure import Rows
from noetherflow.monitor.pace import AGAIN, FIRST, Cost, Pace, stride
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
        now = stride(Cost(0.0005 * (1 + 0.04 * math.sin(k))), 0.005, 0.02, now)
        seen.append(now)
    assert set(seen[2:]) == {10}
    assert stride(Cost(1.0), 0.0, 0.02, 1) == pace.STRIDES[-1]


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


def slow_estimates(ledger: Ledger, clock: Clock, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every estimate take so long."""
    gradients = ledger._recorder.meter.gradients

    def timed(layout: ChargeMap) -> Rows:
        clock.now += seconds
        return gradients(layout)

    monkeypatch.setattr(ledger._recorder.meter, "gradients", timed)


def estimated(ledger: Ledger) -> list[int]:
    """The steps that have estimates."""
    return sorted({row["step"] for row in ledger.estimates()})


@pytest.mark.parametrize(
    ("every", "expected"), [(1, [0, 50, 100, 120]), (20, [0, 60, 100, 120]), (70, [0, 70, 120]), (500, [0, 120])]
)
def test_estimates_are_counted_in_steps_whatever_the_stride(every: int, expected: list[int]) -> None:
    """At the first recorded step at or after 0, 50, 100, and at the end: with 20 that is 0, 60, 100, and 120."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    with Ledger(model, optimizer, mlp_symmetries(model), every=every) as ledger:
        for batch in batches(120):
            backward(model, batch)
            optimizer.step()
    assert estimated(ledger) == expected
    assert sorted({row["step"] for row in ledger.layers()}) == expected


@pytest.mark.parametrize(
    ("seconds", "every", "first"),
    [(0.0, 10, [0, 50, 100]), (0.0005, 10, [0, 50, 100]), (0.002, 20, [0, 60, 100]), (0.02, 200, [0, 200, 400])],
)
def test_estimates_keep_to_the_budget_too(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, seconds: float, every: int, first: list[int]
) -> None:
    """The ledger takes 2 % of the time where estimates cost nothing, a fifth of a step, or two steps."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    steps, step, record = 3000, 0.01, 0.0012
    with Ledger(model, optimizer, mlp_symmetries(model), overhead=0.02) as ledger:
        slow(ledger, clock, record, monkeypatch)
        slow_estimates(ledger, clock, seconds, monkeypatch)
        train(model, optimizer, clock, FIRST, step)
        began = clock.now
        train(model, optimizer, clock, steps, step)
        own = clock.now - began - steps * step
    assert own <= 0.02 * steps * step
    assert own >= 0.3 * 0.02 * steps * step, "the budget is used"
    assert (ledger.every, estimated(ledger)[:3]) == (every, first)


def slow_books(ledger: Ledger, clock: Clock, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the books take so long for every recorded step."""
    enter = ledger._recorder.books.enter

    def timed(pending: list[Any], values: Any, journal: Any) -> None:
        clock.now += seconds * len(pending)
        enter(pending, values, journal)

    monkeypatch.setattr(ledger._recorder.books, "enter", timed)


def test_the_books_keep_to_the_budget_too(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are closed before the stride is chosen, between two steps, and are no part of the next step."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    steps, step, record, books = 1000, 0.01, 0.00025, 0.0003
    with Ledger(model, optimizer, mlp_symmetries(model), overhead=0.02) as ledger:
        slow(ledger, clock, record, monkeypatch)
        slow_books(ledger, clock, books, monkeypatch)
        train(model, optimizer, clock, FIRST, step)
        began = clock.now
        train(model, optimizer, clock, steps, step)
        own = clock.now - began - steps * step
    assert 0.3 * 0.02 * steps * step <= own <= 0.02 * steps * step


@pytest.mark.parametrize("record", [3e-4, 5e-3])
@pytest.mark.parametrize("estimate", [0.0, 1e-3, 4e-3, 0.1])
def test_strides_with_dear_estimates_equal_a_search_over_all_strides(record: float, estimate: float) -> None:
    """The smallest stride whose recordings and estimates, counted one by one over many steps, fit into the budget."""
    steps, step, overhead = 100_000, 0.005, 0.02

    def own(every: int) -> float:
        made = Pace(every, overhead, estimate_every=50)
        return sum(record + estimate * made.estimates(k) for k in range(0, steps, every))

    fitting = [s for s in pace.STRIDES if own(s) <= overhead * step * steps * (1 + 1e-9)]
    assert fitting[0] > 2
    assert stride(Cost(record, estimate, 50), step, overhead, now=2) == fitting[0]


@pytest.mark.parametrize("record", [0.0012, 0.05])
def test_a_run_of_1000_steps_by_default_says_which_norms_grow(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, record: float
) -> None:
    """However seldom the budget has it record: the growth told is that of the weights over the whole run."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3, bias=False), nn.BatchNorm1d(3)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    x, y = torch.randn(64, 5), torch.randint(3, (64,))
    with Ledger(model, optimizer, nf.find_symmetries(model, x)) as ledger:
        slow(ledger, clock, record, monkeypatch)
        before = model[0].weight.detach().square().sum()
        for _ in range(1000):
            optimizer.zero_grad()
            at = torch.randint(64, (8,))
            nn.functional.cross_entropy(model(x[at]), y[at]).backward()
            clock.now += 0.01
            optimizer.step()
    assert ledger.every == {0.0012: 10, 0.05: 500}[record]
    found = ledger.diagnose()["norm-growth"]
    assert found.severity != "open"
    grown = float(model[0].weight.detach().square().sum() / before)
    rows = [r for r in ledger.estimates() if r["symmetry"] == "0 [scale]"]
    assert (rows[0]["step"], rows[-1]["step"]) == (0, 1000)
    assert rows[-1]["norm"] / rows[0]["norm"] == pytest.approx(grown, rel=1e-5)
    assert rows[-1]["effective_lr"] / rows[0]["effective_lr"] == pytest.approx(1 / grown, rel=1e-5)
