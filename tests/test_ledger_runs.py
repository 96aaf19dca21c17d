"""The ledger in real training loops: parameter groups, skipped steps, edits, crashes and resumption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import noetherflow as nf
from noetherflow.errors import DataError, DeclarationError
from noetherflow.monitor.ledger import Ledger
from noetherflow.monitor.log import FORMAT, LOG_NAME, RunLog, plain, read_log
from noetherflow.monitor.rundata import RunData
from test_ledger import assert_closed, backward, batches, mlp, mlp_symmetries, tensors


def train(model: nn.Module, optimizer: Any, steps: int, seed: int = 1) -> None:
    for batch in batches(steps, seed=seed):
        optimizer.zero_grad()
        backward(model, batch)
        optimizer.step()


def test_groups_with_own_settings_and_a_group_added_later() -> None:
    model = mlp()
    early = [p for n, p in model.named_parameters() if not n.startswith("5")]
    groups = [{"params": early[:2], "lr": 0.1, "weight_decay": 0.1}, {"params": early[2:], "lr": 0.01, "momentum": 0.9}]
    optimizer = torch.optim.SGD(groups, lr=0.5)
    ledger = Ledger(model, optimizer, mlp_symmetries(model), detail="symmetry", every=1).attach()
    train(model, optimizer, 10)
    optimizer.add_param_group({"params": list(model[5].parameters()), "lr": 0.02, "nesterov": True, "momentum": 0.5})
    train(model, optimizer, 10, seed=2)
    rows = ledger.records("symmetry")
    assert_closed(rows, 20)
    first = {r["step"]: r for r in rows if r["symmetry"].startswith("0.weight")}
    assert first[3]["gradient"] != pytest.approx(0, abs=1e-6), "different learning rates on the two legs show up"


def test_frozen_parameters_do_not_move() -> None:
    model = mlp()
    for p in model[2].parameters():
        p.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ledger = Ledger(model, optimizer, mlp_symmetries(model), detail="symmetry", every=1).attach()
    train(model, optimizer, 10)
    assert_closed(ledger.records("symmetry"), 10)


def test_accumulated_and_clipped_gradients() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ledger = Ledger(model, optimizer, mlp_symmetries(model), every=1).attach()
    for k, batch in enumerate(batches(12)):
        backward(model, batch)
        if k % 3 == 2:
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
            optimizer.zero_grad()
    rows = ledger.records()
    assert_closed(rows, 4)
    assert all(abs(r["gradient"]) < 1e-12 * r["norm"] for r in rows)


def test_clipping_by_value_shows_in_the_gradient_entry() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ledger = Ledger(model, optimizer, mlp_symmetries(model), every=1).attach()
    backward(model, batches(1)[0])
    nn.utils.clip_grad_value_(model.parameters(), 1e-3)
    optimizer.step()
    assert max(abs(r["gradient"]) / r["norm"] for r in ledger.records()) > 1e-9


def test_explicit_calls_equal_hooks_and_unrecorded_steps_are_counted() -> None:
    rows = []
    for explicit in (True, False):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        ledger = Ledger(model, optimizer, mlp_symmetries(model), every=5)
        if not explicit:
            ledger.attach()
        for batch in batches(13):
            optimizer.zero_grad()
            loss = backward(model, batch)
            if explicit:
                ledger.before_step()
            optimizer.step()
            if explicit:
                ledger.after_step(loss=loss)
        assert ledger.step == 13
        rows.append(ledger.records())
        assert {r["step"] for r in rows[-1]} == {0, 5, 10}
    assert json.dumps(rows[0]) == json.dumps(rows[1]), "not a number is equal to itself here"
    assert ledger.events == []


def test_step_with_a_closure() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    ledger = Ledger(model, optimizer, mlp_symmetries(model), every=1).attach()
    for batch in batches(3):

        def closure(batch: Any = batch) -> torch.Tensor:
            optimizer.zero_grad()
            return backward(model, batch)

        loss = optimizer.step(closure)
        assert loss > 0
    rows = ledger.records()
    assert_closed(rows, 3)
    assert all(abs(r["gradient"]) < 1e-12 * r["norm"] for r in rows)
    assert all(r["decay"] != 0 for r in rows)


def test_lbfgs_closes_by_its_realised_update() -> None:
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    ledger = Ledger(model, optimizer, mlp_symmetries(model), every=1).attach()
    for batch in batches(3):

        def closure(batch: Any = batch) -> torch.Tensor:
            optimizer.zero_grad()
            return backward(model, batch)

        optimizer.step(closure)
    assert_closed(ledger.records(), 3)


def test_gradient_scaler_skips_are_events_not_rows() -> None:
    model = mlp().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    ledger = Ledger(model, optimizer, mlp_symmetries(model), every=1)
    for k, (x, y) in enumerate(batches(6)):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x.float()), y) * (float("inf") if k in (2, 3) else 1.0)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        ledger.before_step()
        scaler.step(optimizer)
        ledger.after_step()
        scaler.update()
    assert [e["event"] for e in ledger.events] == ["skipped", "skipped"]
    rows = ledger.records()
    assert {r["step"] for r in rows} == {0, 1, 2, 3}
    assert all(abs(r["residual"]) < 1e-5 * r["norm"] for r in rows)


def test_fused_optimizer_skips_inside_its_step() -> None:
    model = mlp().float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    ledger = Ledger(model, optimizer, mlp_symmetries(model), every=1).attach()
    for k, (x, y) in enumerate(batches(5)):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x.float()), y) * (float("inf") if k == 2 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert [e["event"] for e in ledger.events] == ["skipped"]
    rows = ledger.records()
    assert {r["step"] for r in rows} == {0, 1, 2, 3}
    assert all(abs(r["gradient"]) < 1e-6 * r["norm"] for r in rows), "the gradient is unscaled"
    assert all(abs(r["residual"]) < 1e-5 * r["norm"] for r in rows)


def test_edits_between_steps_are_told_from_the_step() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ledger = Ledger(model, optimizer, mlp_symmetries(model), every=1).attach()
    train(model, optimizer, 2)
    with torch.no_grad():
        model[0].weight.mul_(1.1)
    train(model, optimizer, 2, seed=3)
    assert_closed(ledger.records(), 4)
    assert [(e["event"], e["step"]) for e in ledger.events] == [("edited", 2)]


def test_capacity_replacement_of_symmetries_and_refusals() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    syms = mlp_symmetries(model)
    ledger = Ledger(model, optimizer, syms, capacity=3, every=1)
    with pytest.raises(DataError, match="before_step"):
        ledger.after_step()
    with pytest.raises(DataError, match="detail='coordinate'"):
        ledger.records("coordinate")
    ledger.attach()
    train(model, optimizer, 7)
    assert {r["step"] for r in ledger.records()} == {4, 5, 6}
    ledger.replace_symmetries(syms.filter(family="linear"))
    train(model, optimizer, 2)
    assert [r["family"] for r in ledger.records()] == ["linear", "linear"]
    ledger.close()
    train(model, optimizer, 1)
    assert ledger.step == 9
    other = nn.Linear(2, 2)
    with pytest.raises(DeclarationError, match=r"belong to another model \(0.weight: missing"):
        Ledger(other, torch.optim.SGD(other.parameters(), lr=0.1), syms, every=1)
    for bad in ({"every": 0}, {"detail": "fine"}, {"flush_every": 0}):
        with pytest.raises(DataError):
            Ledger(model, optimizer, syms, **bad)  # type: ignore[arg-type]


def test_nothing_to_watch_is_not_an_error(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ledger = Ledger(model, optimizer, nf.SymmetrySet(()), run_dir=tmp_path, estimate_every=1, every=1).attach()
    train(model, optimizer, 3)
    ledger.close()
    assert ledger.step == 3
    assert ledger.records() == []
    assert [r["step"] for r in read_log(tmp_path) if r["kind"] == "step"] == [0, 1, 2]


def test_compiled_and_wrapped_names() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ledger = Ledger(torch.compile(model, backend="eager"), optimizer, mlp_symmetries(model), every=1).attach()
    train(model, optimizer, 1)
    assert_closed(ledger.records(), 1)


def test_log_rows_equal_records_and_state_resumes(tmp_path: Path) -> None:
    def start(seed: int = 0) -> tuple[nn.Module, Any, Ledger]:
        model = mlp(seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        syms = mlp_symmetries(model)
        ledger = Ledger(
            model, optimizer, syms, detail="symmetry", run_dir=tmp_path, flush_every=4, estimate_every=2, every=1
        )
        return model, optimizer, ledger

    model, optimizer, ledger = start()
    data = batches(20)

    def run(ledger: Ledger, model: nn.Module, optimizer: Any, span: range) -> None:
        ledger.attach()
        for k in span:
            optimizer.zero_grad()
            ledger.note(backward(model, data[k]))
            optimizer.step()

    run(ledger, model, optimizer, range(10))
    saved = {"ledger": ledger.state_dict(), "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(saved, tmp_path / "checkpoint.pt")
    run(ledger, model, optimizer, range(10, 17))
    ledger.close()
    whole = [r for r in read_log(tmp_path) if r["kind"] == "step"]
    with open(tmp_path / LOG_NAME, "ab") as file:
        file.write(b'{"kind": "step", "step": 17, "fam')

    model, optimizer, ledger = start(seed=5)
    assert ledger.step == 17, "without a checkpoint the numbering goes on after the last whole line"
    saved = torch.load(tmp_path / "checkpoint.pt")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    ledger.load_state_dict(saved["ledger"])
    run(ledger, model, optimizer, range(10, 20))
    records = ledger.records()
    ledger.close()
    lines = list(read_log(tmp_path))
    steps = [r for r in lines if r["kind"] == "step"]
    assert [r["step"] for r in steps] == list(range(20))
    for old, new in zip(whole, steps, strict=False):
        assert new["family"]["change"] == pytest.approx(old["family"]["change"], rel=1e-6)
        assert new["loss"] == pytest.approx(old["loss"], rel=1e-6)
    assert [r["event"] for r in lines if r["kind"] == "event"] == ["resumed"]
    assert {r["step"] for r in lines if r["kind"] == "estimates"} == set(range(0, 21, 2)), "20 at the end"
    row = next(r for r in records if r["step"] == 19)
    assert steps[19]["family"]["charge"][0] == pytest.approx(row["charge"], rel=1e-8)


def test_a_log_that_misses_steps_is_refused(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ledger = Ledger(model, optimizer, mlp_symmetries(model), run_dir=tmp_path / "a", every=1).attach()
    train(model, optimizer, 3)
    state = ledger.state_dict()
    ledger.close()
    fresh = Ledger(model, optimizer, mlp_symmetries(model), run_dir=tmp_path / "b", every=1)
    with pytest.raises(DataError, match="steps are missing"):
        fresh.load_state_dict(state)
    with pytest.raises(DataError, match="format 7"):
        fresh.load_state_dict({"format": 7})
    with pytest.raises(DataError, match="does not exist"):
        list(read_log(tmp_path / "c"))


KILLED = """
    import sys, os, time, torch
    sys.path.insert(0, {tests!r})
    import test_ledger as t
    from pathlib import Path
    from noetherflow.monitor.ledger import Ledger
    run = Path(sys.argv[1])
    model = t.mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    ledger = Ledger(model, optimizer, t.mlp_symmetries(model), run_dir=run, flush_every=7, estimate_every=5, every=1)
    checkpoint = run / "checkpoint.pt"
    start = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"]); optimizer.load_state_dict(saved["optimizer"])
        ledger.load_state_dict(saved["ledger"])
        start = ledger.step
    ledger.attach()
    data = t.batches(240)
    for k in range(start, 240):
        optimizer.zero_grad()
        t.backward(model, data[k])
        optimizer.step()
        if k % 25 == 24:
            parts = dict(model=model, optimizer=optimizer, ledger=ledger)
            torch.save({{name: part.state_dict() for name, part in parts.items()}}, run / "new.pt")
            os.replace(run / "new.pt", checkpoint)
    ledger.close()
"""


def test_killed_run_resumes_without_lost_or_doubled_steps(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(KILLED.format(tests=str(Path(__file__).parent))))
    reference, run = tmp_path / "reference", tmp_path / "run"
    reference.mkdir()
    run.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(script), str(reference)], check=True, env=environment)
    log = run / LOG_NAME
    for lines in (60, 130):
        process = subprocess.Popen([sys.executable, str(script), str(run)], env=environment)
        deadline = time.monotonic() + 300
        while not (log.exists() and log.read_bytes().count(b"\n") >= lines):
            assert process.poll() is None, "finished before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL
        assert [r["step"] for r in read_log(run) if r["kind"] == "step"], "readable after the kill"
    subprocess.run([sys.executable, str(script), str(run)], check=True, env=environment)
    expected = [r for r in read_log(reference) if r["kind"] in ("step", "estimates")]
    found = [r for r in read_log(run) if r["kind"] in ("step", "estimates")]
    assert [r["step"] for r in found if r["kind"] == "step"] == list(range(240))
    assert [(r["kind"], r["step"]) for r in found] == [(r["kind"], r["step"]) for r in expected]
    for a, b in zip(found, expected, strict=True):
        if a["kind"] == "step":
            assert a["family"]["charge"] == pytest.approx(b["family"]["charge"], rel=1e-7)
        else:
            assert a["symmetry"]["drive"] == pytest.approx(b["symmetry"]["drive"], rel=1e-6, abs=1e-12)


def test_log_is_line_atomic_and_rewinds(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.append([{"kind": "run", "format": FORMAT, "step": 0}])
    log.append([{"kind": "step", "step": k} for k in range(3)])
    mark = log.mark(3)
    log.append([{"kind": "step", "step": k} for k in range(3, 5)])
    log.append([{"kind": "event", "step": 5, "event": "x"}])
    assert log.steps_made() == 5
    with pytest.raises(DataError, match="steps are missing"):
        log.rewind("another")
    assert log.rewind(mark) == 2
    log.append([{"kind": "step", "step": 3}])
    log.close()
    assert [r["step"] for r in read_log(tmp_path) if r["kind"] != "checkpoint"] == [0, 0, 1, 2, 3]
    path = tmp_path / LOG_NAME
    path.write_bytes(path.read_bytes() + b'{"torn": ')
    assert len(list(read_log(tmp_path))) == 6
    RunLog(tmp_path).close()
    assert path.read_bytes().endswith(b"\n")
    path.write_text(json.dumps({"kind": "run", "format": 99, "step": 0}) + "\n")
    with pytest.raises(DataError, match="format 99"):
        list(read_log(tmp_path))
    path.write_text('{"kind": "run"}\n{"kind": step}\n')
    with pytest.raises(DataError, match="line 2 is corrupt"):
        list(read_log(tmp_path))
    value = plain({"a": torch.tensor([1.0, float("nan")]).double().numpy(), "b": float("inf"), "c": [1 / 3]})
    assert value == {"a": [1.0, None], "b": None, "c": [0.333333333]}


def test_a_diverged_run_is_reported_not_hidden(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ledger = Ledger(model, optimizer, mlp_symmetries(model), run_dir=tmp_path, estimate_every=1, every=1).attach()
    train(model, optimizer, 1)
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    train(model, optimizer, 2)
    ledger.close()
    assert "non-finite" in [e["event"] for e in ledger.events]
    last = [r for r in read_log(tmp_path) if r["kind"] == "step"][-1]
    assert last["family"]["charge"][0] is None


def test_model_is_untouched_by_watching() -> None:
    trained = []
    for watch in (False, True):
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if watch:
            Ledger(model, optimizer, mlp_symmetries(model), detail="coordinate", estimate_every=1, every=1).attach()
        train(model, optimizer, 5)
        trained.append(tensors(model))
    for name, value in trained[0].items():
        assert torch.equal(value, trained[1][name])


def test_float16_weights_are_summed_in_float32() -> None:
    model = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10)).to(torch.bfloat16)
    syms = nf.declare(model, "diagonal", [("0.weight", 0), ("0.bias", 0)], [("2.weight", 1)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ledger = Ledger(model, optimizer, syms, every=1).attach()
    x, y = batches(1)[0]
    nn.functional.cross_entropy(model(x.to(torch.bfloat16)).float(), y).backward()
    expected = float(sum(syms[0].charge({n: p.detach().double() for n, p in model.named_parameters()})))
    optimizer.step()
    assert ledger.records()[0]["charge"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("logged", [True, False])
def test_a_run_knows_the_steps_after_the_last_recorded_one(tmp_path: Path, logged: bool) -> None:
    """23 steps of which 0, 10 and 20 are recorded: 23 were made, also for who reads the log or goes on with it."""
    model, options = mlp(), {"every": 10, "run_dir": tmp_path if logged else None}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    ledger = Ledger(model, optimizer, mlp_symmetries(model), **options).attach()
    train(model, optimizer, 22)
    assert ledger.run_data().steps_made == 22, "while it is running"
    train(model, optimizer, 1)
    ledger.close()
    ledger.close()
    assert ledger.run_data().steps_made == 23
    assert ledger.run_data().span == "23 steps, 3 of them recorded"
    if not logged:
        return
    assert RunData.load(tmp_path).steps_made == 23
    assert [row["step"] for row in read_log(tmp_path) if row["kind"] == "end"] == [23], "two closings are one end"
    Ledger(model, optimizer, mlp_symmetries(model), **options).close()
    assert RunData.load(tmp_path).steps_made == 23, "a ledger that nobody told to resume says nothing"
    again = Ledger(model, optimizer, mlp_symmetries(model), **options, resume=True).attach()
    assert again.step == 23
    train(model, optimizer, 18)
    again.close()
    data = RunData.load(tmp_path)
    assert (data.steps_made, data.steps.tolist(), data.events) == (41, [0, 10, 20, 30, 40], ())


def test_a_log_without_an_end_counts_to_its_last_line(tmp_path: Path) -> None:
    """A checkpoint says how many steps were made; a run that was killed is known up to its last recorded step."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    ledger = Ledger(model, optimizer, mlp_symmetries(model), every=10, run_dir=tmp_path).attach()
    train(model, optimizer, 14)
    ledger.flush()
    assert RunData.load(tmp_path).steps_made == 11
    state = ledger.state_dict()
    assert RunData.load(tmp_path).steps_made == 14
    train(model, optimizer, 10)
    ledger.close()
    assert RunData.load(tmp_path).steps_made == 24
    other = Ledger(model, optimizer, mlp_symmetries(model), every=10, run_dir=tmp_path)
    other.load_state_dict(state)
    other.flush()
    assert RunData.load(tmp_path).steps_made == 14, "what came after the checkpoint is taken back, its end as well"
    other.close()
