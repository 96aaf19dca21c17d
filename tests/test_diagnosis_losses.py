"""A loss that left its own minimum is told of; one that scatters, falls or stays is not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import noetherflow as nf
from noetherflow.diagnosis import balance, breaking, decay, norms, sampling, stability
from noetherflow.diagnosis.facts import BatchRegime, LossCourse, LossRise, NormHistory, RunBalance, Turn
from noetherflow.diagnosis.finding import NOTHING
from noetherflow.diagnosis.losses import ToldLosses, rise_of, rise_of_all
from noetherflow.moments.noise_scale import NoiseScale, NoiseScales
from noetherflow.monitor.noted import NotedLosses
from noetherflow.monitor.rundata import RunData, weights_of
from noetherflow.report.run import summary

pytestmark = pytest.mark.usefixtures("every_finding_says_what_to_do")

RISEN = LossCourse(0, (), None, 1000, 2.4, 0.05, 0.006, 2.4, rise=LossRise(0.005, 0.05, 400, 0.37), decay=0.005)
"""A loss that fell from 2.4 to 0.005 and lately stands at 0.05, under a decay with a memory of 200 steps."""


def sparse(steps):
    """The steps that a ledger with a budget records: the first fifty, then every tenth."""
    return np.concatenate([np.arange(50), np.arange(50, steps, 10)])


def course(at, scatter, seed, late=1.0):
    """A loss that falls from 2.4 to 0.0024 in 300 steps, each minibatch scattered, times `late` in the last fifth."""
    fall = 2.4 * np.exp(-np.log(1000) * np.minimum(at / 300, 1))
    risen = np.where(at >= 0.8 * at[-1], late, 1.0)
    return fall * risen * np.exp(scatter * np.random.default_rng(seed).standard_normal(len(at)))


@pytest.mark.parametrize("at", [sparse(1000), np.arange(1000), np.arange(0, 5000, 100)])
class TestRise:
    @pytest.mark.parametrize("scatter", [0.0, 0.2, 0.4])
    def test_planted(self, at, scatter):
        found = rise_of(at, course(at, scatter, 1, late=10.0))
        assert found is not None
        assert found.lowest == pytest.approx(0.0024, rel=0.5)
        assert found.level == pytest.approx(0.024, rel=0.5)
        assert found.step < 0.8 * at[-1]
        assert found.share == pytest.approx(1 / 3, abs=0.1)

    @pytest.mark.parametrize("scatter", [0.0, 0.3, 0.6, 1.0])
    def test_scatter_alone_is_no_rise(self, at, scatter):
        assert [s for s in range(50) if rise_of(at, course(at, scatter, s)) is not None] == []

    def test_one_large_loss_is_no_rise(self, at):
        losses = course(at, 0.3, 0)
        losses[-2] *= 100
        assert rise_of(at, losses) is None

    def test_a_loss_below_zero_rises_as_it_is(self, at):
        noise = 0.1 * np.random.default_rng(0).standard_normal(len(at))
        falling = -3.0 * np.minimum(at / (at[-1] / 2), 1) + noise
        assert rise_of(at, falling) is None
        found = rise_of(at, falling + np.where(at >= 0.8 * at[-1], 2.0, 0.0))
        assert found is not None
        assert found.share == pytest.approx(2 / 3, abs=0.1)

    def test_a_high_loss_that_gives_half_of_its_fall_back(self, at):
        noise = 1 + 0.05 * np.random.default_rng(1).standard_normal(len(at))
        losses = (2.3 - 1.2 * np.minimum(at / (at[-1] / 2), 1)) * noise
        assert rise_of(at, losses) is None
        found = rise_of(at, np.where(at >= 0.8 * at[-1], 1.8, losses))
        assert found is not None
        assert found.share == pytest.approx(0.58, abs=0.1)


class TestRules:
    def test_it_is_told_with_weight_decay_as_a_candidate(self):
        (found,) = stability.loss_course(RISEN)
        assert found.severity == "watch"
        assert found.title.startswith("The loss rises again: lately 0.05, 10 times its lowest level of 0.005")
        assert "a third of the weight decay" in found.advice
        (bites,) = decay.decay_bites([0.005], 1000, course=RISEN)
        assert (bites.severity, bites.rule) == ("watch", "decay-bites")
        assert "a third of the weight decay" in bites.advice

    def test_most_of_the_gain_lost_is_to_act_on(self):
        (found,) = stability.loss_course(replace(RISEN, ended=0.4, rise=LossRise(0.005, 0.4, 400, 0.71)))
        assert found.severity == "act"

    def test_decay_that_hardly_acts_is_no_candidate(self):
        slow = replace(RISEN, decay=5e-4)
        (found,) = stability.loss_course(slow)
        assert found.severity == "watch"
        assert "weight decay" not in found.advice
        (bites,) = decay.decay_bites([0.005], 1000, course=slow)
        assert bites.severity == "good"

    def test_a_healthy_run_of_strong_decay_is_good(self):
        calm = replace(RISEN, rise=None)
        assert stability.loss_course(calm)[0].severity == "good"
        assert decay.decay_bites([0.005], 1000, course=calm)[0].severity == "good"

    def test_a_rise_is_a_symptom_that_turns_advice_on(self):
        assert RISEN.stalled
        assert not RISEN.slowed
        assert replace(RISEN, rise=None).well
        shrunk = NormHistory("conv", 0.1, 10.0, 1000)
        (found,) = norms.norms_so_far([shrunk], RISEN, watched=1)
        assert not found.advice.startswith(NOTHING)
        (calm,) = norms.norms_so_far([shrunk], replace(RISEN, rise=None), watched=1)
        assert calm.advice.startswith(NOTHING)
        (fast,) = stability.turning([Turn("conv", 0.5)], RISEN)
        assert fast.severity == "act"


def rows_of(losses, stride):
    """What a ledger of that stride keeps of the losses: the first alone, then those of each stretch."""
    ends = np.arange(1, len(losses) + 1, stride)
    parts = np.split(losses, ends)[: len(ends)]
    return ends, np.array([list(NotedLosses.of(part.tolist()).line().values()) for part in parts])


@pytest.mark.parametrize("stride", [1, 10, 100])
class TestEveryLoss:
    @pytest.mark.parametrize("seed", range(5))
    def test_planted_and_healthy(self, stride, seed):
        at = np.arange(2001)
        healthy = course(at, 0.8, seed)
        assert rise_of_all(*rows_of(healthy, stride), 2001) is None
        found = rise_of_all(*rows_of(np.where(at > 1800, 10 * healthy, healthy), stride), 2001)
        assert found is not None
        assert found.level / found.lowest == pytest.approx(10, rel=0.35)

    def test_one_large_loss_is_no_rise(self, stride):
        losses = course(np.arange(2001), 0.5, 0)
        losses[-20] = 2.4
        assert rise_of_all(*rows_of(losses, stride), 2001) is None


def run(losses, every, folder=None, close=True):
    """A ledger over a run whose steps have these losses, and its data."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    syms = nf.find_symmetries(model, torch.randn(2, 3))
    ledger = nf.Ledger(model, optimizer, syms, every=every, run_dir=folder).attach()
    for k, loss in enumerate(losses):
        optimizer.zero_grad()
        model(torch.randn(4, 3)).square().mean().backward()
        ledger.note(torch.tensor(loss) if k % 2 else float(loss))
        optimizer.step()
    data = ledger.run_data()
    ledger.close()
    return data


@pytest.mark.parametrize("logged", [False, True])
def test_the_losses_of_steps_in_between_reach_the_diagnosis(logged, tmp_path):
    """Every 7th of 200 steps is recorded, and no recorded step sees the rise; the rows and the end hold all losses."""
    losses = 2.0 * np.exp(-np.minimum(np.arange(200) / 20, 4)) * (1 + 0.1 * (np.arange(200) % 3))
    recorded = np.arange(200) % 7 == 0
    losses[(np.arange(200) >= 180) & ~recorded] *= 8
    torch.manual_seed(0)
    data = run(losses, 7, tmp_path if logged else None)
    number, mean, highest = data.noted[:, 0], data.noted[:, 1], data.noted[:, 4]
    assert number.sum() + data.since.steps == 200
    assert np.sum(number * mean) + data.since.steps * data.since.mean == pytest.approx(losses.sum(), rel=1e-6)
    assert highest[-1] == pytest.approx(losses[190:197].max())
    assert data.loss[1:].min() == pytest.approx(losses[recorded].min())
    found = nf.diagnose_run(data)["loss-course"]
    assert found.title.startswith("The loss rises again")
    if logged:
        again = RunData.load(tmp_path)
        assert again.since.mean == pytest.approx(data.since.mean)
        np.testing.assert_allclose(again.noted, data.noted)
        assert nf.diagnose_run(tmp_path)["loss-course"].severity == found.severity


def test_the_end_is_that_of_the_steps_however_they_are_recorded():
    losses = 2.3 * np.exp(-np.arange(400) / 40)
    for every in (1, 50, 200):
        torch.manual_seed(0)
        found = nf.diagnose_run(run(losses, every))["loss-course"]
        ended = {e.what: e.value for e in found.evidence}["loss of the last tenth of the steps"]
        assert ended < 2 * losses[200:].mean()
        assert found.severity == "good"


@pytest.mark.parametrize("every", [1, 4])
def test_averages_are_those_of_the_losses_of_all_steps(every):
    """By a loop over the steps of each stretch; within a row of the log all are equal here."""
    rows = np.repeat(np.random.default_rng(0).uniform(1, 2, 100), every)
    losses = np.concatenate([rows[:1], rows])[: 60 * every + 1]
    torch.manual_seed(0)
    at, means = ToldLosses.by(run(losses, every)).averages(7)
    begins = [0.0]
    for middle in at:
        begins.append(2 * middle - begins[-1])
    for a, b, mean in zip(begins, begins[1:], means, strict=False):
        assert mean == pytest.approx(losses[int(a) : int(b)].mean(), rel=1e-5)
    assert begins[-1] == len(losses)


class TestALossThatWentUp:
    FALL = 5.5 * np.exp(-np.arange(300) / 60)

    def told(self, losses, every=1):
        torch.manual_seed(0)
        return nf.diagnose_run(run(losses, every))["loss-course"]

    @pytest.mark.parametrize("every", [1, 7])
    def test_in_its_first_steps_it_asks_for_a_warmup(self, every):
        losses = self.FALL * (1 + 0.02 * (np.arange(300) % 3))
        losses[3:6] = 7.5
        found = self.told(losses, every)
        assert found.severity == "watch"
        assert "The loss stood at 7.5 by step" in found.title
        assert "warmup" in found.advice

    def test_later_it_asks_for_a_look_at_the_data(self):
        """Between two recorded steps, where only the rows' largest losses tell."""
        losses = self.FALL.copy()
        losses[155:160] = 8.0
        found = self.told(losses, every=7)
        assert found.severity == "watch"
        assert "data of the" in found.advice

    @pytest.mark.parametrize("seed", range(5))
    def test_losses_that_scatter_as_much_are_no_rise(self, seed):
        noise = np.exp(0.3 * np.random.default_rng(seed).standard_normal(300))
        assert self.told(self.FALL * noise).severity == "good"


class TestNumbersThatBreak:
    def told(self, losses, every=1, noted=1):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        ledger = nf.Ledger(model, optimizer, nf.find_symmetries(model, torch.randn(2, 3)), every=every).attach()
        for k, loss in enumerate(losses):
            optimizer.zero_grad()
            (model(torch.randn(4, 3)).square().mean() * (1.0 if np.isfinite(loss) else np.nan)).backward()
            if k % noted == 0:
                ledger.note(float(loss))
            optimizer.step()
        found = nf.diagnose_run(ledger.run_data())["loss-course"]
        ledger.close()
        return found

    def test_one_batch_is_named_where_the_loss_was_calm(self):
        losses = np.concatenate([2.3 * np.exp(-np.arange(60) / 10), np.full(30, np.nan)])
        found = self.told(losses)
        assert found.severity == "act"
        assert "from step 60 on; the loss was" in found.title
        assert "at step 59 and had not risen" in found.title
        assert found.means.startswith("One batch did it")
        assert "learning rate" not in found.advice

    def test_steps_in_between_that_nobody_saw_leave_both_open(self):
        losses = np.concatenate([2.3 * np.exp(-np.arange(60) / 10), np.full(30, np.nan)])
        found = self.told(losses, every=25, noted=25)
        assert "either one batch did it" in found.means
        assert "every=1" in found.advice

    def test_losses_between_recorded_steps_tell_the_step(self):
        losses = np.concatenate([2.3 * np.exp(-np.arange(60) / 10), np.full(30, np.nan)])
        found = self.told(losses, every=25)
        assert "from step 60 on; the loss was" in found.title
        assert "at step 59 and had not risen" in found.title
        assert found.means.startswith("One batch did it")

    def test_a_loss_that_climbed_first_is_a_matter_of_steps(self):
        losses = np.concatenate([2.3 * np.exp(-np.arange(60) / 10), 0.01 * 1.3 ** np.arange(40), np.full(9, np.nan)])
        found = self.told(losses)
        assert "diverged" in found.title
        assert "learning rate" in found.advice


def test_a_step_alone_is_logged_as_before(tmp_path):
    torch.manual_seed(0)
    data = run([1.0, 0.9, 0.8], 1, tmp_path)
    assert "losses" not in (tmp_path / "ledger.jsonl").read_text()
    assert data.noted[:, 0].tolist() == [1.0, 1.0, 1.0]
    assert data.since is None


class TestDead:
    DEAD = LossCourse(0, (), None, 1000, 2.37, 2.5, 2.5, 78.0, dead=True)

    def test_a_network_without_gradients_is_to_act_on(self):
        (found,) = stability.loss_course(self.DEAD)
        assert found.severity == "act"
        assert found.title.startswith("The network is dead")
        back = replace(self.DEAD, dead=False, ended=0.1)
        assert stability.loss_course(back)[0].severity == "good"

    @pytest.mark.parametrize("bias", [-100.0, 0.1])
    def test_units_that_are_off_for_every_sample(self, bias):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        torch.nn.init.constant_(model[0].bias, bias)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=1e-3)
        with nf.Ledger(model, optimizer, nf.find_symmetries(model, torch.randn(2, 3)), estimate_every=5) as ledger:
            for _ in range(60):
                optimizer.zero_grad()
                inputs = torch.randn(16, 3)
                loss = (model(inputs)[:, 0] - inputs[:, 0]).square().mean()
                loss.backward()
                ledger.note(2.0 if bias < 0 else loss)
                optimizer.step()
        found = ledger.diagnose()
        if bias < 0:
            assert found["loss-course"].title.startswith("The network is dead")
            others = [f for f in found if f.rule not in ("loss-course", "outside")]
            assert others
            assert all(f.title.startswith("Means little") for f in others)
            assert {f.severity for f in others} == {"open"}
        else:
            assert "dead" not in str(found)


class TestTrends:
    def test_a_norm_that_falls_since_its_peak_says_so(self):
        risen = NormHistory("conv", 4.0, 0.25, 1000, peak=9.0, peak_step=300)
        (found,) = norms.norms_so_far([risen], RISEN, watched=1)
        assert "It was largest at step 300 (3 times), and falls since." in found.title
        (layers,) = norms.grown_layers([risen])
        assert "`conv` 2 times (3 times at step 300, falls since)" in layers.title
        (rising,) = norms.grown_layers([replace(risen, peak=4.0, peak_step=1000)])
        assert "falls" not in rising.title

    def test_a_norm_that_came_back_from_far_above_is_not_told_to_be_still(self):
        (found,) = norms.grown_layers([NormHistory("conv", 0.5, 2.0, 1000, peak=10_000.0, peak_step=30)])
        assert (
            found.title
            == "No layer's norm is larger than 1,000 steps before; but `conv` was 100 times as large at step 30."
        )
        (still,) = norms.grown_layers([NormHistory("conv", 0.5, 2.0, 1000, peak=1.0, peak_step=0)])
        assert still.title == "No layer's norm grew in 1,000 steps."

    def test_words_follow_the_sign(self):
        shrunk = NormHistory("conv", 0.1, 10.0, 1000)
        assert (
            "a smaller one makes every step turn the weight by more" in norms.norms_so_far([shrunk], RISEN, 1)[0].means
        )
        grown = replace(shrunk, norm_factor=10.0, rate_factor=0.1)
        assert "a larger one makes every step turn the weight by less" in norms.norms_so_far([grown], RISEN, 1)[0].means


class TestViolation:
    def test_eps_is_named_before_a_normalisation_and_a_penalty_elsewhere(self):
        checks = [("conv [scale]", 0.02), ("0 -> 2", 1e-7)]
        (eps,) = breaking.violated_in_training(checks, {"conv [scale]"})
        assert "eps" in eps.means
        assert "penalty" not in eps.advice
        assert eps.advice.startswith(NOTHING)
        (penalty,) = breaking.violated_in_training([*checks, ("4 -> 7", 0.02)], {"conv [scale]"})
        assert penalty.where == ("4 -> 7",)
        assert "look for one" in penalty.advice
        (large,) = breaking.violated_in_training([("conv [scale]", 0.3)], {"conv [scale]"})
        assert "look for one" in large.advice
        (small,) = breaking.violated_in_training([("conv [scale]", 0.002)], {"conv [scale]"})
        assert small.severity == "good"


def test_a_noise_scale_beyond_the_training_set_says_so():
    scale = NoiseScale(2609.0, 1.0, 50.0, 0.0005, 16)
    fact = BatchRegime(32, NoiseScales(scale, {}), 0.1, 50.0, dataset_size=1437)
    (found,) = sampling.batch_size(fact)
    assert "more than the 1,437 of the training set, so that any batch is below it" in found.title
    assert "training set" not in sampling.batch_size(replace(fact, dataset_size=10_000))[0].title


def test_the_farthest_part_of_all_is_named_with_the_median_of_its_layer():
    layers = [RunBalance("1 -> 3", 0.6, 0.61, 500.0), RunBalance("4 -> 7", 0.05, 0.7, 500.0)]
    (found,) = balance.far_during_run(layers, 1000)
    assert "one of `4 -> 7`, a factor of 2 away, the median of its layer 1.1" in found.title


class TestCauses:
    @pytest.mark.parametrize("steps", [np.arange(40), np.array([0, 1, 2, 5, 15, 39])])
    def test_weights_are_the_trapezoid_rule(self, steps):
        """Between two recorded steps a straight line is taken: one that is straight is summed exactly."""
        assert np.sum(weights_of(steps) * (3.0 - 0.1 * steps)) == pytest.approx(sum(3.0 - 0.1 * k for k in range(40)))

    @pytest.mark.parametrize("every", [1, 9])
    def test_causes_add_up_to_the_change(self, every):
        torch.manual_seed(0)
        data = run(np.full(100, 0.5), every)
        words = summary(data, [])[0]
        assert ("estimated from 12 of 100 steps; together" in words) == (every == 9)
        assert "over the recorded steps" not in words
        change = float(data.family["charge"][-1, 0] + data.family["change"][-1, 0] - data.family["charge"][0, 0])
        if every == 1:
            left = float(data.family["residual"][:, 0].sum() + np.nansum(data.family["outside"][:, 0]))
            without = sum(v for k, v in data.causes(0).items() if k != "outside")
            assert without + left == pytest.approx(change, rel=1e-6, abs=1e-9)
            assert abs(left) < 1e-5 * float(data.family["norm"][0, 0])

    def test_estimates_that_miss_the_change_say_so(self):
        torch.manual_seed(0)
        data = run(np.full(100, 0.5), 9)
        data.family["second_order"][:] *= 100
        assert "too few steps" in summary(data, [])[0]


def test_a_loss_that_is_written_to_the_same_place_in_every_step_is_kept_as_it_was() -> None:
    """Compiled steps hand out one buffer again and again; the log must hold each step's number."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    optimizer, buffer = torch.optim.SGD(net.parameters(), lr=0.01), torch.zeros(())
    losses = []
    with nf.Ledger(net, optimizer, nf.find_symmetries(net, torch.randn(2, 3)), every=4) as ledger:
        for _ in range(9):
            optimizer.zero_grad()
            loss = net(torch.randn(8, 3)).square().mean()
            loss.backward()
            buffer.copy_(loss.detach())
            ledger.note(buffer)
            losses.append(loss.item())
            optimizer.step()
    noted = ledger.run_data().noted
    total = float((noted[:, 0] * noted[:, 1]).sum())
    assert total == pytest.approx(sum(losses), rel=1e-6)


def test_a_norm_that_changed_more_on_the_way_than_at_the_end_says_so() -> None:
    """Squared norm 1.8 times at the end and 2.6 times at step 100: the ends alone hide that it more than doubled."""
    course = LossCourse(0, (), None, 1000, 2.3, 0.01)
    told = lambda peak: (
        norms.norms_so_far(
            [NormHistory("conv", 1.8, 1 / 1.8, 1000, 0.0, peak, 100.0), NormHistory("still", 1.0, 1.0, 1000)], course, 2
        )[0].title
    )
    assert "from step 0 to 1,000, but at step 100, where its norm was largest, `conv` changed it by 2.6." in told(2.6)
    for peak in (1.8, 1.9, float("nan")):
        assert told(peak).endswith("by a factor of 1.8 from step 0 to 1,000.")
    half = NormHistory("adam", 1.8, 1.8**-0.5, 1000, 0.0, 4.0, 100.0)
    assert "`adam` changed it by 2." in norms.norms_so_far([half], course, 1)[0].title
