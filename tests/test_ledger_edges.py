"""What training does to a ledger: edits, odd optimisers, full disks, failing sinks, other runs in the same place."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import noetherflow as nf
from noetherflow.errors import DataError, DeclarationError
from noetherflow.monitor import sums
from noetherflow.monitor.books import FIELDS
from noetherflow.monitor.ledger import Ledger
from noetherflow.monitor.log import LOG_NAME, read_log
from noetherflow.monitor.rules import SGDRule
from noetherflow.monitor.rundata import RunData
from noetherflow.report.run import summary
from noetherflow.symmetry.leg import Leg
from test_ledger import OPTIMIZERS, assert_closed, backward, batches, mlp, mlp_symmetries


def train(model: nn.Module, optimizer: Any, steps: int, seed: int = 1) -> None:
    for batch in batches(steps, seed=seed):
        optimizer.zero_grad()
        backward(model, batch)
        optimizer.step()


def events(ledger: Ledger) -> list[str]:
    ledger.flush()
    return [e["event"] for e in ledger.events]


def watched(optimizer: str = "momentum", **options: Any) -> tuple[nn.Module, torch.optim.Optimizer, Ledger]:
    model = mlp()
    kind, settings = OPTIMIZERS[optimizer]
    made = kind(model.parameters(), **settings)
    return model, made, Ledger(model, made, mlp_symmetries(model), **{"every": 1, **options}).attach()


class HiddenWrites(torch.optim.Optimizer):
    """Plain SGD that writes through `.data`, which no version counter sees, and moves parameters without gradients."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            p.data.sub_(1e-3 * p.data if p.grad is None else 0.1 * p.grad)


class Ascent(HiddenWrites):
    """As SAM: weights move up before the closure's gradient is taken, and back before the step."""

    def step(self, closure: Any = None) -> None:
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.add_(0.05)
        with torch.enable_grad():
            closure()
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.sub_(0.05 + 0.1 * p.grad)


@pytest.mark.parametrize("every", [1, 3])
def test_an_optimizer_that_writes_unseen_closes_where_it_can(every: int) -> None:
    model = mlp()
    model[4].requires_grad_(False)
    optimizer = HiddenWrites(model.parameters())
    ledger = Ledger(model, optimizer, mlp_symmetries(model), every=every).attach()
    train(model, optimizer, 7)
    rows = ledger.records()
    assert all(abs(r["residual"]) < 1e-14 * r["norm"] for r in rows if r["step"] == 0 or every > 1)
    assert all(r["other"] != 0 for r in rows)


def test_steps_that_move_before_their_closure_are_charged_from_where_they_started() -> None:
    model = mlp()
    optimizer = Ascent(model.parameters())
    syms = mlp_symmetries(model)
    ledger = Ledger(model, optimizer, syms, detail="symmetry", estimate_every=1, every=1).attach()
    trace = lambda s, c: float(c.sum() if s.is_torus else c.diagonal(dim1=-2, dim2=-1).sum())
    charges = []
    for batch in batches(4):
        charges.append([trace(s, s.charge({n: p.detach() for n, p in model.named_parameters()})) for s in syms])

        def closure(batch: Any = batch) -> torch.Tensor:
            optimizer.zero_grad()
            return backward(model, batch)

        optimizer.step(closure)
    assert_closed(ledger.records("symmetry"), 4)
    found = [[r["charge"] for r in ledger.records("symmetry") if r["step"] == k] for k in range(4)]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(charges), rtol=1e-12, atol=0)
    assert len(ledger.estimates()) == 4 * len(syms)
    assert ledger.events == []


def test_hidden_edits_become_an_event() -> None:
    model, optimizer, ledger = watched()
    train(model, optimizer, 3)
    model[0].weight.data.mul_(1.1)
    train(model, optimizer, 3)
    assert events(ledger) == ["unexplained"]
    assert ledger.events[0]["step"] == 3


@pytest.mark.parametrize("factor", [1.0, 1 + 1e-6])
def test_hidden_edits_count_against_what_the_step_did(factor: float) -> None:
    """A millionth of the weights is far above all entries of a run whose steps are that small."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-7)
    with Ledger(model, optimizer, mlp_symmetries(model), every=1) as ledger:
        train(model, optimizer, 3)
        model[0].weight.data.mul_(factor)
        train(model, optimizer, 3)
    assert events(ledger) == ([] if factor == 1 else ["unexplained"])


def test_float32_rounding_is_no_unexplained_change() -> None:
    model = mlp().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    with Ledger(model, optimizer, mlp_symmetries(model), every=1) as ledger:
        for x, y in batches(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x.float()), y).backward()
            optimizer.step()
    assert any(abs(r["residual"]) > 1e-3 * abs(r["second_order"]) for r in ledger.records())
    assert ledger.events == []


def test_the_header_tells_the_settings_of_every_group(tmp_path: Path) -> None:
    model = mlp()
    parameters = list(model.parameters())
    groups = [{"params": parameters[:2], "weight_decay": 0.1}, {"params": parameters[2:]}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.0)
    torch.optim.lr_scheduler.LinearLR(optimizer)
    notes = {"schedule": "linear", "clipping": 1.0}
    Ledger(model, optimizer, mlp_symmetries(model), run_dir=tmp_path, notes=notes, every=1).close()
    header = next(iter(read_log(tmp_path)))
    assert [(g["parameters"], g["weight_decay"]) for g in header["groups"]] == [(2, 0.1), (6, 0.0)]
    assert header["groups"][0]["betas"] == [0.9, 0.999]
    assert (header["scheduled"], header["schedule"], header["clipping"]) == (True, "linear", 1.0)


@pytest.mark.parametrize("what", ["weights", "state", "reload"])
def test_what_was_carried_over_is_measured_again_after_an_edit(what: str) -> None:
    """The momentum entry stays `-2 lr mu <theta, A b>` of the buffer that the step really used."""
    model, optimizer, ledger = watched(detail="symmetry")
    train(model, optimizer, 3)
    with torch.no_grad():
        if what == "weights":
            model[2].weight.mul_(1.5)
        elif what == "state":
            optimizer.state[model[2].weight]["momentum_buffer"].mul_(2.0)
        else:
            state = optimizer.state_dict()
            for values in state["state"].values():
                values["momentum_buffer"] = 3.0 * values["momentum_buffer"]
            optimizer.load_state_dict(state)
    group = optimizer.param_groups[0]
    expected = []
    for s in mlp_symmetries(model):
        theta = {n: p.detach().clone() for n, p in model.named_parameters()}
        memory = {n: optimizer.state[p]["momentum_buffer"].clone() for n, p in model.named_parameters()}
        mixed = s.charge({n: theta[n] + memory[n] for n in theta}) - s.charge(theta) - s.charge(memory)
        total = mixed.sum() if s.is_torus else mixed.diagonal(dim1=-2, dim2=-1).sum()
        expected.append(float(-group["lr"] * group["momentum"] * total))
    train(model, optimizer, 1, seed=4)
    rows = ledger.records("symmetry")[-len(expected) :]
    assert [r["momentum"] for r in rows] == pytest.approx(expected, rel=1e-9)
    assert_closed(ledger.records("symmetry"), 4)


def test_scaled_gradients_of_a_fused_step_count_unscaled() -> None:
    rows = []
    for scale in (1.0, 1024.0):
        model = mlp().float()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        ledger = Ledger(model, optimizer, mlp_symmetries(model), estimate_every=1, every=1).attach()
        for x, y in batches(3):
            optimizer.zero_grad()
            scaler.scale(nn.functional.cross_entropy(model(x.float()), y)).backward()
            scaler.step(optimizer)
            scaler.update()
        rows.append(ledger.estimates())
    for a, b in zip(*rows, strict=True):
        assert b["drive"] == pytest.approx(a["drive"], rel=1e-4)
        assert b["steps"] == pytest.approx(a["steps"], rel=1e-4)


def test_amsgrad_switched_off_in_the_middle() -> None:
    model, optimizer, ledger = watched("amsgrad")
    train(model, optimizer, 5)
    optimizer.param_groups[0]["amsgrad"] = False
    train(model, optimizer, 5)
    assert_closed(ledger.records(), 10)


def test_entries_do_not_depend_on_the_order_of_the_symmetries() -> None:
    """One packed matrix, of which one symmetry holds a few rows and another the rest."""
    rows = []
    for reverse in (False, True):
        torch.manual_seed(0)
        model = nn.ParameterDict({"packed": torch.randn(6, 4), "out": torch.randn(5, 6)}).double()
        found = []
        for rows_of in (range(2), range(2, 6)):
            index = np.array(rows_of).reshape(-1, 1, 1)
            legs = (Leg("packed", index), Leg("out", index, -1, axes=(1,)))
            found.append(nf.Symmetry(f"rows {rows_of}", f"{len(rows_of)} rows", "diagonal", legs))
        syms = nf.SymmetrySet(tuple(reversed(found) if reverse else found))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        ledger = Ledger(model, optimizer, syms, every=1).attach()
        for _ in range(3):
            optimizer.zero_grad()
            (model["out"] @ model["packed"]).square().sum().backward()
            optimizer.step()
        rows.append(sorted(ledger.records(), key=lambda r: (r["step"], r["family"])))
    for a, b in zip(*rows, strict=True):
        assert b["momentum"] == pytest.approx(a["momentum"], rel=1e-12, abs=1e-14)
        assert b["preconditioner"] == pytest.approx(a["preconditioner"], rel=1e-12)


def test_two_optimizers_share_the_legs_of_a_symmetry() -> None:
    model = mlp()
    first = torch.optim.SGD(model[:2].parameters(), lr=0.1)
    second = torch.optim.SGD(model[2:].parameters(), lr=0.1)
    ledger = Ledger(model, first, mlp_symmetries(model), every=1).attach()
    for batch in batches(6):
        model.zero_grad()
        backward(model, batch)
        first.step()
        second.step()
    assert all(abs(r["residual"]) < 1e-14 * r["norm"] for r in ledger.records())
    assert events(ledger) == ["edited"], "said once, not at every step"


def test_a_full_disk_delays_rows_and_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, ledger = watched(run_dir=tmp_path, flush_every=2)
    train(model, optimizer, 2)
    write = os.write

    def full(file: int, data: bytes) -> int:
        if len(data) < 200:
            raise OSError(28, "No space left on device")
        return write(file, data[:100])

    monkeypatch.setattr(os, "write", full)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        train(model, optimizer, 4)
    with pytest.raises(OSError, match="No space left"):
        ledger.state_dict()
    assert [r["step"] for r in read_log(tmp_path) if r["kind"] == "step"] == [0, 1]
    monkeypatch.undo()
    train(model, optimizer, 2)
    ledger.close()
    assert [r["step"] for r in read_log(tmp_path) if r["kind"] == "step"] == list(range(8))


def test_a_failing_sink_is_dropped_and_training_goes_on(tmp_path: Path) -> None:
    def broken(row: Any) -> None:
        if row["step"] == 2:
            raise ConnectionError("server gone")

    seen: list[int] = []
    sinks = [broken, lambda row: seen.append(row["step"])]
    model, optimizer, ledger = watched(run_dir=tmp_path, flush_every=4, estimate_every=0, sinks=sinks)
    with pytest.warns(RuntimeWarning, match="ConnectionError: server gone"):
        train(model, optimizer, 8)
    ledger.close()
    assert [r["step"] for r in read_log(tmp_path) if r["kind"] == "step"] == list(range(8))
    assert [e["event"] for e in ledger.events] == ["sink failed"]
    assert sorted(set(seen)) == list(range(8))


def test_what_moved_weights_between_steps_is_an_entry_of_its_own(tmp_path: Path) -> None:
    """Another optimiser steps the weights: rows add up to the course of the charge, and nothing is called conserved."""

    class Idle(torch.optim.Optimizer):
        def step(self, closure: Any = None) -> None:
            return None

    model = mlp()
    other = torch.optim.SGD(model.parameters(), lr=0.05)
    idle, syms = Idle(model.parameters(), {}), mlp_symmetries(model)
    charges = lambda: {s.name: float(_total(s, {n: p.detach() for n, p in model.named_parameters()})) for s in syms}
    start = charges()
    with Ledger(model, idle, syms, detail="symmetry", run_dir=tmp_path, every=1) as ledger:
        for batch in batches(6):
            model.zero_grad()
            backward(model, batch)
            idle.step()
            last = charges()
            other.step()
    rows = ledger.records("symmetry")
    assert all(r["change"] == 0 for r in rows)
    for name in start:
        own = [r for r in rows if r["symmetry"] == name]
        assert own[0]["outside"] == 0
        assert sum(r["outside"] for r in own) == pytest.approx(
            last[name] - start[name], rel=1e-9, abs=1e-13 * own[0]["norm"]
        )
        assert abs(sum(r["outside"] for r in own)) > 0
    words = " ".join(summary(RunData.load(tmp_path), []))
    assert "conserved" not in words
    assert "moved by other hands" in words


def _total(s: Any, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    charge = s.charge(tensors)
    return charge.sum() if s.is_torus else charge.diagonal(dim1=-2, dim2=-1).sum()


def test_outside_is_zero_alone_and_unknown_between_recorded_steps() -> None:
    for every, first in ((1, 0.0), (3, None)):
        model, optimizer, ledger = watched(every=every)
        train(model, optimizer, 7)
        outside = [r["outside"] for r in ledger.records()][len(ledger.records()) // 3 :]
        assert all(math.isnan(v) if first is None else v == 0 for v in outside)


@pytest.mark.parametrize(
    ("kind", "known"),
    [
        (torch.optim.RAdam, True),
        (torch.optim.Adafactor, True),
        (torch.optim.Adadelta, False),
        (torch.optim.Adagrad, False),
    ],
)
def test_decay_that_cannot_be_told_apart_is_unknown_and_not_zero(kind: Any, known: bool) -> None:
    """Decoupled decay takes `2 lr w C` in first order; coupled decay is lost in the update of other optimisers."""
    lr, w = 1e-3, 0.5
    flag = {"decoupled_weight_decay": True} if kind is torch.optim.RAdam else {}
    for decay in (0.0, w):
        model = mlp()
        optimizer = kind(model.parameters(), lr=lr, weight_decay=decay, **flag)
        with Ledger(model, optimizer, mlp_symmetries(model), every=1) as ledger:
            train(model, optimizer, 3)
        for row in ledger.records():
            if decay and not known:
                assert math.isnan(row["decay"])
            else:
                assert row["decay"] == pytest.approx(-2 * lr * decay * row["charge"], rel=1e-9, abs=1e-15)
            parts = [row[k] for k in ("decay", "other", "second_order") if not math.isnan(row[k])]
            assert row["change"] == pytest.approx(sum(parts), abs=1e-13 * row["norm"])
    assert events(ledger) == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_compiled_step_is_watched_like_any_other(kind: Any) -> None:
    rows = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = mlp()
        optimizer = kind(model.parameters(), lr=1e-2)
        ledger = Ledger(model, optimizer, mlp_symmetries(model), every=1).attach()
        step = torch.compile(lambda o=optimizer: o.step(), backend="eager") if compiled else optimizer.step
        for batch in batches(3):
            optimizer.zero_grad()
            backward(model, batch)
            step()
        assert ledger.step == 3
        rows.append(ledger.records())
    for a, b in zip(*rows, strict=True):
        slack = 1e-4 * abs(a["change"]) if kind is torch.optim.AdamW else 0.0  # compiled bias corrections are float32
        assert b["change"] == pytest.approx(a["change"], abs=slack + 1e-13 * a["norm"])
        assert abs(b["residual"]) <= slack + 1e-13 * b["norm"]


def test_one_ledger_per_run_directory(tmp_path: Path) -> None:
    model, optimizer, ledger = watched(run_dir=tmp_path)
    with pytest.raises(DataError, match="another ledger is writing"):
        Ledger(model, optimizer, mlp_symmetries(model), run_dir=tmp_path, every=1)
    ledger.close()
    with pytest.raises(DataError, match="closed"):
        ledger.attach()
    Ledger(model, optimizer, mlp_symmetries(model), run_dir=tmp_path, every=1).close()


def test_a_second_run_in_a_run_dir_is_asked_about(tmp_path: Path) -> None:
    """None refuses before anything moves and leaves the log alone; True goes on, False keeps the old log beside."""
    model, optimizer, ledger = watched(run_dir=tmp_path)
    train(model, optimizer, 3)
    ledger.close()
    old = (tmp_path / LOG_NAME).read_bytes()
    before = model[0].weight.detach().clone()
    model.zero_grad()
    ledger = Ledger(model, optimizer, mlp_symmetries(model), run_dir=tmp_path, every=1).attach()
    backward(model, batches(1)[0])
    with pytest.raises(DataError, match=r"up to step 2.*resume=True.*resume=False"):
        optimizer.step()
    ledger.close()
    assert torch.equal(model[0].weight, before)
    assert (tmp_path / LOG_NAME).read_bytes() == old
    for resume, steps in ((True, [0, 1, 2, 3, 4]), (False, [0, 1])):
        with Ledger(model, optimizer, mlp_symmetries(model), run_dir=tmp_path, resume=resume, every=1):
            train(model, optimizer, 2)
        assert [r["step"] for r in read_log(tmp_path) if r["kind"] == "step"] == steps
    assert (tmp_path / "ledger-1.jsonl").read_bytes().startswith(old)


def test_resuming_with_other_settings(tmp_path: Path) -> None:
    model, optimizer, ledger = watched(run_dir=tmp_path, every=10, estimate_every=1)
    train(model, optimizer, 15)
    ledger.before_step()
    ledger.before_step()
    state = ledger.state_dict()
    train(model, optimizer, 15)
    ledger.close()
    again = Ledger(model, optimizer, mlp_symmetries(model), run_dir=tmp_path, every=1).attach()
    again.load_state_dict(state)
    train(model, optimizer, 2)
    again.close()
    rows = list(read_log(tmp_path))
    assert [r["step"] for r in rows if r["kind"] == "step"] == [0, 10, 15, 16]
    assert [r["event"] for r in rows if r["kind"] == "event"] == ["skipped", "resumed"], "skipped before the checkpoint"
    assert (tmp_path / LOG_NAME).read_bytes().endswith(b"\n")
    other = Ledger(model, optimizer, mlp_symmetries(model).filter(family="linear"), every=1)
    with pytest.raises(DataError, match=r"of 3 symmetries .* watches 1"):
        other.load_state_dict(state)


def test_refusals_name_what_is_wrong() -> None:
    model, _, ledger = watched()
    backward(model, batches(1)[0])
    ledger.before_step()
    with pytest.raises(DataError, match="in the middle of a step"):
        ledger.replace_symmetries(mlp_symmetries(model))
    assert str(ledger) == "ledger of 0 steps of SGD, 0 rows in memory"
    other = torch.optim.SGD(mlp().parameters(), lr=0.1)
    with pytest.raises(DataError, match=r"holds none of \['0.weight', .* another copy of the model"):
        Ledger(model, other, mlp_symmetries(model), every=1)
    odd = nn.ParameterDict({"a": torch.randn(3, 2, dtype=torch.complex64), "b": torch.randn(2, 3)})
    syms = nf.declare(odd, "diagonal", [("a", 0)], [("b", 1)])
    with pytest.raises(DeclarationError, match=r"complex parameters cannot be watched: \['a'\]"):
        Ledger(odd, torch.optim.SGD(odd.parameters(), lr=0.1), syms, every=1)


def test_a_replaced_parameter_is_told() -> None:
    model, optimizer, ledger = watched(flush_every=2)
    train(model, optimizer, 2)
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())
    train(model, optimizer, 4)
    assert events(ledger) == ["replaced"]
    assert ledger.events[0]["parameters"] == ["2.weight"]


@pytest.mark.parametrize("optimizer", ["momentum", "nesterov", "sgd-decay", "adamw", "rmsprop"])
def test_slices_of_any_size_add_up(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    for size in (1 << 20, 100):
        monkeypatch.setattr(sums, "SLICE", size)
        model, made, ledger = watched(optimizer)
        train(model, made, 3)
        rows.append(ledger.records())
    for a, b in zip(*rows, strict=True):
        assert [b[f] for f in FIELDS] == pytest.approx([a[f] for f in FIELDS], rel=1e-9, abs=1e-13 * a["norm"])


def test_symmetries_of_offset_gains_are_left_out_and_named(tmp_path):
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plain = nf.find_symmetries(model, torch.randn(2, 4))
    offset = nf.declare(
        model, "diagonal", plus=[("0.bias", 0)], minus=[("2.weight", 1)], offsets={"0.bias": 1.0}, name="offset"
    )
    both = dataclasses.replace(plain, symmetries=(*plain, *offset))
    with nf.Ledger(model, optimizer, both, run_dir=tmp_path, detail="symmetry", every=1) as ledger:
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
    header = (tmp_path / LOG_NAME).read_text().splitlines()[0]
    assert [s["name"] for s in json.loads(header)["symmetries"]] == ["0 -> 2"]
    assert ledger.excluded == {"offset": "acts on 0.bias +1: the ledger splits updates along the weight itself"}
    assert json.loads(header)["excluded"] == ledger.excluded


def test_a_rule_that_asks_for_an_unknown_product_is_refused():
    class Misspelt(SGDRule):
        def before(self, c, t):
            return {"weight_grad": (t["weight"], t["weight"])}

    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    syms = nf.find_symmetries(model, torch.randn(2, 4))
    with nf.Ledger(model, optimizer, syms, rule=Misspelt(), every=1):
        model(torch.randn(8, 4)).square().mean().backward()
        with pytest.raises(
            DataError, match=r"Misspelt.before asks for \['weight_grad'\], and SGDProducts has the fields"
        ):
            optimizer.step()


class TwoStepSAM(torch.optim.Optimizer):
    """SAM as it is usually written: two calls of its own, and an inner optimiser that makes the step."""

    def __init__(self, params: Any, base: type[torch.optim.Optimizer], rho: float = 0.05, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p]["old"] = p.data.clone()
            p.add_(p.grad, alpha=0.05 / float(p.grad.norm() + 1e-12))

    @torch.no_grad()
    def second_step(self) -> None:
        for p in (p for group in self.param_groups for p in group["params"]):
            p.data = self.state[p]["old"]
        self.base_optimizer.step()


@pytest.mark.parametrize("inner", [False, True])
def test_sam_in_two_steps_is_noticed_and_its_inner_optimiser_can_be_watched(inner: bool) -> None:
    model = mlp()
    optimizer = TwoStepSAM(model.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9)
    watched_one = optimizer.base_optimizer if inner else optimizer
    with Ledger(model, watched_one, mlp_symmetries(model), detail="symmetry", every=1) as ledger:
        assert ledger.records() == []
        for batch in batches(5):
            optimizer.zero_grad()
            backward(model, batch)
            optimizer.first_step()
            optimizer.zero_grad()
            backward(model, batch)
            optimizer.second_step()
    if inner:
        assert_closed(ledger.records("symmetry"), 5)
        assert "bypassed" not in events(ledger)
    else:
        assert events(ledger) == ["bypassed"]
        assert "base_optimizer" in ledger.events[0]["note"]


def test_loading_weights_after_attaching_is_no_bypass() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with Ledger(model, optimizer, mlp_symmetries(model), every=1) as ledger:
        model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()})
        ledger.records()
        train(model, optimizer, 2)
    assert "bypassed" not in events(ledger)
