"""What a run's log tells of every step, however few are recorded: its warmup, its rates, its spikes and lapses."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import noetherflow as nf
from noetherflow.diagnosis.of_run import _left
from noetherflow.diagnosis.rates import RunRates, named_schedule, run_rates, warmup_in
from noetherflow.monitor.noted import NotedLosses, NotedRates
from noetherflow.monitor.rundata import RunData
from noetherflow.monitor.spikes import SPIKE, loss_ratios
from noetherflow.report.run import _facts

TOTAL = 1000


def cosine(step, warm=50):
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / (TOTAL - warm)))


WARMUPS = {
    "first step counts": lambda o: lr_scheduler.LambdaLR(o, lambda k: min(1.0, (k + 1) / 50)),
    "first step at 0": lambda o: lr_scheduler.LambdaLR(o, lambda k: min(1.0, k / 50)),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=50),
    "LinearLR, a third": lambda o: lr_scheduler.LinearLR(o, total_iters=50),
    "then cosine": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.01, total_iters=50), lr_scheduler.CosineAnnealingLR(o, TOTAL - 50)],
        [50],
    ),
    "times a cosine": lambda o: lr_scheduler.LambdaLR(
        o, lambda k: min(1.0, (k + 1) / 50) * 0.5 * (1 + math.cos(math.pi * k / 400))
    ),
    "1/50 and a rise to 1": lambda o: lr_scheduler.LinearLR(o, 0.02, total_iters=50),
    "cosine at once": lambda o: lr_scheduler.LambdaLR(o, cosine),
}


def ledger_of(scheduler, steps, every, folder=None, losses=None, notes=None, decay=5e-4):
    """A ledger over so many steps of SGD without momentum, its learning rates and its scheduler."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=decay)
    schedule = scheduler(optimizer) if scheduler else None
    syms, x, rates = nf.find_symmetries(net, torch.randn(2, 4)), torch.randn(steps, 8, 4), []
    ledger = nf.Ledger(net, optimizer, syms, every=every, run_dir=folder, notes=notes).attach()
    for k in range(steps):
        optimizer.zero_grad()
        net(x[k]).square().mean().backward()
        if losses is not None:
            ledger.note(float(losses[k]))
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return ledger, np.array(rates), schedule


@pytest.mark.parametrize("every", [1, 7, 50, None])
@pytest.mark.parametrize("name", WARMUPS)
def test_a_warmup_of_fifty_steps_is_told_as_fifty(name, every, tmp_path):
    ledger, rates, _ = ledger_of(WARMUPS[name], 160, every, tmp_path)
    live, found = warmup_in(ledger.run_data()), run_rates(ledger.run_data(), 160)
    ledger.close()
    assert live == warmup_in(RunData.load(tmp_path)) == found.warmup == 50
    assert found.mean == pytest.approx(rates.mean(), rel=1e-6)
    assert run_rates(RunData.load(tmp_path), 160).mean == pytest.approx(rates.mean(), rel=1e-6)


@pytest.mark.parametrize("every", [1, 7, 20])
def test_a_log_without_the_rates_between_takes_warmups_to_be_linear(every):
    for name in ("first step counts", "first step at 0", "LinearLR"):
        ledger, _, _ = ledger_of(WARMUPS[name], 160, every)
        assert warmup_in(replace(ledger.run_data(), rates=np.zeros((0, 5)), rates_since=None)) == 50, name


def test_without_a_warmup_there_is_none():
    for scheduler in (None, lambda o: lr_scheduler.CosineAnnealingLR(o, 160), lambda o: lr_scheduler.StepLR(o, 30)):
        ledger, _, _ = ledger_of(scheduler, 160, 7)
        assert warmup_in(ledger.run_data()) == 0


def test_noted_rates_are_those_of_a_loop():
    rates = [0.1, 0.3, 0.2, 0.3]
    assert NotedRates.of(rates, 12) == NotedRates(4, pytest.approx(0.225), 0.3, 10, 0.1)


class TestAheadOfTheLog:
    """A log of the first 50 steps of a cosine of 1,000, which a straight line through them misses by far."""

    def taken(self, found):
        return int(re.search(r"takes (\d+)%", found["decay-bites"].title)[1])

    def expected(self, decay=5e-3):
        return round(100 * (1 - math.exp(-2 * decay * 0.1 * sum(cosine(k) for k in range(TOTAL)))))

    @pytest.mark.parametrize("every", [1, 7])
    def test_it_says_that_the_rates_to_come_are_not_known(self, every):
        ledger, _, _ = ledger_of(lambda o: lr_scheduler.LambdaLR(o, cosine), 50, every, decay=5e-3)
        found = ledger.diagnose(TOTAL)
        assert found["decay-bites"].severity == "open"
        assert "the learning rates of 950 steps of 1,000 are not in the log" in found["decay-bites"].title
        assert "schedule=" in found["decay-bites"].advice
        assert any("950 steps to come are not known" in c for c in found.cautions)
        assert "schedule" not in " ".join(ledger.diagnose().cautions)
        assert "not in the log" not in ledger.diagnose()["decay-bites"].title

    def test_a_schedule_that_is_given_is_followed(self):
        ledger, _, scheduler = ledger_of(lambda o: lr_scheduler.LambdaLR(o, cosine), 50, 7, decay=5e-3)
        before = repr(scheduler.state_dict()), scheduler.optimizer.param_groups[0]["lr"]
        for schedule in (scheduler, lambda k: 0.1 * cosine(k), [0.1 * cosine(k) for k in range(TOTAL)]):
            found = ledger.diagnose(TOTAL, schedule)
            assert self.taken(found) == self.expected()
            assert found.cautions == ()
        assert (repr(scheduler.state_dict()), scheduler.optimizer.param_groups[0]["lr"]) == before
        assert self.taken(nf.diagnose_run(ledger.run_data(), TOTAL, schedule=schedule)) == self.expected()

    def test_the_schedule_that_the_header_names_is_followed_if_the_log_agrees(self):
        def linear(k):
            return min(k / 50, (TOTAL - k) / (TOTAL - 50))

        notes = {"schedule": "linear", "warmup_steps": 50, "total_steps": TOTAL}
        ledger, _, _ = ledger_of(lambda o: lr_scheduler.LambdaLR(o, linear), 60, 7, notes=notes, decay=5e-3)
        share = 2 * 5e-3 * 0.1 * sum(linear(k) for k in range(TOTAL))
        assert self.taken(ledger.diagnose(TOTAL)) == round(100 * (1 - math.exp(-share)))
        other, _, _ = ledger_of(lambda o: lr_scheduler.StepLR(o, 20), 60, 7, notes=notes, decay=5e-3)
        assert other.diagnose(TOTAL)["decay-bites"].severity == "open"

    def test_a_rate_that_nobody_schedules_goes_on(self):
        ledger, _, _ = ledger_of(None, 50, 7, decay=5e-3)
        found = ledger.diagnose(TOTAL)
        assert self.taken(found) == round(100 * (1 - math.exp(-1)))
        assert found.cautions == ()

    def test_an_old_log_of_the_first_rows_alone_is_not_drawn_out(self):
        ledger, _, _ = ledger_of(lambda o: lr_scheduler.LambdaLR(o, cosine), 50, 1, decay=5e-3)
        data = replace(ledger.run_data(), steps_made=TOTAL)
        assert nf.diagnose_run(data)["decay-bites"].severity == "open"
        assert "950 steps of 1,000" in nf.diagnose_run(data)["decay-bites"].title


def test_steps_to_come_count_by_their_noise():
    """A hundred steps at half the rate let noise do what 25 at the present one do; 60 of the run had the whole rate."""
    rates = RunRates(0.1, 0, np.full(100, 0.05), 0, 0.1, 0.1)
    assert rates.acting(0.1) == pytest.approx(25)
    assert rates.over_all(60) == pytest.approx((60 * 0.1 + 100 * 0.05) / 160)
    ledger, _, _ = ledger_of(None, 60, 7)
    data = ledger.run_data()
    assert _left(data, run_rates(data, 160, lambda k: 0.05), 160) == pytest.approx(25)
    assert _left(data, run_rates(data, 160), 160) == pytest.approx(100)
    assert _left(data, run_rates(data, 60), 60) == 0
    assert ledger.diagnose()["decay-bites"].sure == "by the learning rates of the run"


@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup"])
def test_named_schedules_are_those_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = transformers.get_scheduler(name, optimizer, num_warmup_steps=20, num_training_steps=200)
    rates = []
    for _ in range(200):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    found = named_schedule({"schedule": name, "warmup_steps": 20, "total_steps": 200}, 200)
    np.testing.assert_allclose(found, rates, atol=1e-12)
    assert named_schedule({"schedule": "polynomial", "total_steps": 200}, 200) is None
    assert named_schedule({"schedule": "cosine"}, 200) is None


def falling(steps, seed=0):
    return 2.3 * np.exp(-np.arange(steps) / 300) * np.exp(0.05 * np.random.default_rng(seed).standard_normal(steps))


class TestOneLossBetweenTwoRecordedSteps:
    @pytest.mark.parametrize("logged", [False, True])
    @pytest.mark.parametrize(("every", "at"), [(7, 333), (50, 333), (50, 599), (None, 333)])
    def test_a_spike_is_found_at_its_step(self, every, at, logged, tmp_path):
        losses = falling(600)
        losses[at] = 40.0
        ledger, _, _ = ledger_of(None, 600, every, tmp_path if logged else None, losses)
        found = ledger.diagnose()
        ledger.close()
        data = RunData.load(tmp_path) if logged else ledger.run_data()
        assert [e["step"] for e in data.spikes() if e["where"] == "loss"] == [at]
        for diagnosis in (found, nf.diagnose_run(data)):
            assert f"spiked 1 time at step {at}" in diagnosis["loss-course"].title

    @pytest.mark.parametrize("every", [1, 7, 50])
    def test_ordinary_losses_have_none(self, every):
        for seed in range(3):
            ledger, _, _ = ledger_of(None, 600, every, losses=falling(600, seed))
            assert not [e for e in ledger.run_data().spikes() if e["where"] == "loss"]

    @pytest.mark.parametrize("every", [1, 7, 50])
    def test_one_that_is_not_finite_is_told_with_its_step(self, every, tmp_path):
        losses = falling(600)
        losses[333] = math.nan
        ledger, _, _ = ledger_of(None, 600, every, tmp_path, losses)
        live = ledger.diagnose()
        ledger.close()
        for found in (live, nf.diagnose_run(tmp_path)):
            assert found["loss-lapse"].severity == "watch"
            assert "at step 333," in found["loss-lapse"].title
            assert found["loss-course"].severity == "good"
        healthy, _, _ = ledger_of(None, 600, every, losses=falling(600))
        assert "loss-lapse" not in {f.rule for f in healthy.diagnose()}

    def test_the_largest_loss_has_its_step(self):
        losses = falling(400)
        losses[5:9] = [2.5, 5.0, 4.0, 3.0]
        ledger, _, _ = ledger_of(None, 400, 50, losses=losses)
        assert "by step 6," in ledger.diagnose()["loss-course"].title


@pytest.mark.parametrize("where", [0, 20, 49])
def test_ratios_of_rows_are_those_of_their_losses(where):
    """A row's own scatter without its largest loss, by NumPy on the losses themselves."""
    rng = np.random.default_rng(0)
    rows = [1 + 0.1 * rng.standard_normal(50) for _ in range(4)]
    rows[2][where] = 9.0
    table = np.array([list(NotedLosses.of(r.tolist(), list(range(50))).line().values()) for r in rows])
    rest = np.delete(rows[2], where)
    level = max(rest.mean(), np.delete(rows[1], rows[1].argmax()).mean())
    assert table[2, 5] == where
    assert loss_ratios(table)[2] == pytest.approx((9.0 - level) / (1.645 * rest.std()))
    assert (loss_ratios(table) > SPIKE).tolist() == [False, False, True, False]


@pytest.mark.parametrize(("total", "open_"), [(100, False), (200, True), (None, True)])
def test_a_run_that_made_all_its_steps_is_no_trial(total, open_, tmp_path):
    ledger_of(None, 100, 1, tmp_path, notes={} if total is None else {"total_steps": total})[0].close()
    assert (nf.diagnose_run(tmp_path)["decay-bites"].severity == "open") is open_


@pytest.mark.parametrize(("b2", "severity"), [(0.5, "act"), (0.999, "good")])
def test_a_short_memory_of_squares_is_named_from_a_log(b2, severity, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, betas=(0.9, b2))
    with nf.Ledger(net, optimizer, nf.find_symmetries(net, torch.randn(2, 4)), run_dir=tmp_path):
        for x in torch.randn(60, 8, 4):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    assert nf.diagnose_run(tmp_path)["memory-of-squares"].severity == severity


def test_a_last_level_that_is_the_mean_of_many_steps_is_called_one(tmp_path):
    """Every 150th of 400 steps is recorded: the mean of the losses since the last one is no level of the last tenth."""
    losses = np.linspace(4.0, 0.4, 400)
    ledger_of(None, 400, 150, tmp_path, losses)[0].close()
    data = RunData.load(tmp_path)
    number = data.since.steps
    assert number > 40
    title = nf.diagnose_run(tmp_path)["loss-course"].title
    assert f"(the mean of the last {number:,} losses)" in title
    assert f"loss, mean of the last {number:,} steps" in dict(_facts(data, []))
    often = tmp_path / "often"
    ledger_of(None, 400, 1, often, losses)[0].close()
    assert "mean of the last" not in nf.diagnose_run(often)["loss-course"].title
