"""Every rule of the diagnosis on a planted record and on a healthy one."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import noetherflow as nf
from noetherflow.diagnosis import (
    balance,
    breaking,
    dead,
    decay,
    heads,
    logits,
    long_steps,
    norms,
    sampling,
    squares,
    stability,
)
from noetherflow.diagnosis.evening import steps_to_even
from noetherflow.diagnosis.facts import (
    BatchRegime,
    LayerBalance,
    LossCourse,
    NormHistory,
    NormTrend,
    PartActivity,
    RunBalance,
    ScaleInvariantNorm,
    StepStability,
    Turn,
)
from noetherflow.diagnosis.finding import (
    QUESTIONS,
    Diagnosis,
    Evidence,
    Finding,
    calm,
    doubted,
    in_steps,
    not_judged,
    of_little_meaning,
    plain,
)
from noetherflow.diagnosis.histories import norm_history, span_of
from noetherflow.diagnosis.logits import LogitGrowth, LogitSpread
from noetherflow.diagnosis.of_run import batch_ratio
from noetherflow.diagnosis.step import Step
from noetherflow.equilibrium.regime import Regime, few_samples
from noetherflow.equilibrium.sharpness import Sharpness
from noetherflow.errors import DataError
from noetherflow.moments.noise_scale import NoiseScale, NoiseScales

pytestmark = pytest.mark.usefixtures("every_finding_says_what_to_do")

NAN = math.nan
GROWING = ScaleInvariantNorm("conv", 4.0, 0.04, 0.001, 0.0, 2)
STALLED = LossCourse(0, (), None, 1000, 2.3, 1.5, 1.5)
"""A loss that fell from 2.3 to 1.5 and stays there."""
STABLE = StepStability(0.1, 0.2, 0.3, 0.1, 0.5, 0.0, 0.0, None, False)
RUNNING = replace(STABLE, started=True)


def layer(factors, errors=None, part="unit", name="0 -> 2", steps=500.0):
    values = np.array(factors, dtype=float)
    return LayerBalance(name, "rescaling", part, values, np.array(errors or [0.01] * len(values)), steps)


def activity(weight, gradient, part="unit"):
    return PartActivity("0 -> 2", part, np.array(weight, dtype=float), np.array(gradient, dtype=float))


def scale(noise=100.0, signal=1.0, error=0.0005):
    one = NoiseScale(noise, signal, error * noise, error, 16)
    return NoiseScales(one, {"a": one, "b": replace(one, noise=2 * noise)})


def one(found, rule=None):
    chosen = [f for f in found if rule is None or f.rule == rule]
    assert len(chosen) == 1
    return chosen[0]


class TestNorms:
    @pytest.mark.parametrize(("power", "decay"), [(2, 0.0), (2, 0.003), (1, 0.0), (1, 0.003)])
    def test_the_closed_form_is_the_recursion(self, power, decay):
        """Step by step: growth `g n_0 / n` (SGD) or `g` (Adam), less `decay n`."""
        n = start = 4.0
        for _ in range(2000):
            n += (0.001 * (start / n if power == 2 else 1.0)) - decay * n
        fact = ScaleInvariantNorm("w", start, 0.001, None, decay, power)
        assert fact.norm_factor(2000) == pytest.approx(n / start, rel=2e-3)
        effective = (1 / n if power == 2 else n**-0.5) / (1 / start if power == 2 else start**-0.5)
        assert fact.learning_rate_factor(2000) == pytest.approx(effective, rel=2e-3)

    def test_growth(self):
        found = one(norms.norm_growth([GROWING, replace(GROWING, name="calm", growth=1e-6)], 1000))
        assert found.severity == "watch"
        assert found.where == ("conv",)
        assert "`conv`" in found.title
        assert found.advice.startswith("nothing to do while the loss falls")
        assert Diagnosis.of("x", [found]).changes == ()
        assert one(norms.norm_growth([GROWING], 100_000)).severity == "watch"

    @pytest.mark.parametrize(("power", "horizon"), [(2, 30.0), (1, 30.0), (2, 700.0)])
    def test_growth_with_a_mean_gradient_that_ends_is_the_recursion(self, power, horizon):
        """Fast growth until the horizon, then noise alone; decay takes the norm down again."""
        fact = ScaleInvariantNorm("w", 4.0, 0.02, None, 0.003, power, horizon, later=0.0005)
        n, path = 4.0, []
        for k in range(2000):
            growth = 0.02 if k < horizon else 0.0005
            n += growth * (4.0 / n if power == 2 else 1.0) - 0.003 * n
            path.append(abs(math.log(n / 4.0)))
        assert fact.norm_factor(2000) == pytest.approx(n / 4.0, rel=5e-3)
        assert abs(math.log(fact.norm_factor(fact.farthest(2000)))) == pytest.approx(max(path), rel=0.02)

    def test_a_longer_run_never_finds_less(self):
        """A mean gradient that lasts 50 steps, then decay: at the end of a long run the norm has come back."""
        fact = replace(GROWING, growth=0.4, decay=1e-3, horizon=50.0, later=0.002)
        sizes = [norms._size(fact, steps) for steps in (10, 50, 100, 1000, 2000, 20_000)]
        assert sizes == sorted(sizes)
        assert sizes[1] == pytest.approx(1 / fact.learning_rate_factor(50))
        short = one(norms.norm_growth([replace(fact, growth=0.02)], 2000))
        assert short.severity == "good"
        assert "at most" not in short.title
        assert "(1." in short.title

    def test_one_is_singular(self):
        found = one(norms.norm_growth([GROWING], 100_000))
        assert "1 of 1 scale-invariant weight grows" in found.title
        both = one(norms.norm_growth([GROWING, replace(GROWING, name="b")], 100_000))
        assert "2 of 2 scale-invariant weights grow:" in both.title

    def test_shrinking_is_told_from_growing(self):
        found = one(norms.norm_growth([replace(GROWING, growth=1e-6, decay=0.01)], 1000))
        assert found.severity in ("act", "watch")
        assert "try a third of the weight decay" in found.advice

    def test_healthy(self):
        assert one(norms.norm_growth([replace(GROWING, growth=1e-4)], 1000)).severity == "good"
        balanced = replace(GROWING, decay=0.01)  # growth 0.01 of the norm, decay 0.01 of it
        assert one(norms.norm_growth([balanced], 100_000)).severity == "good"
        assert one(norms.norm_growth([], 1000)).severity == "good"

    def test_history(self):
        found = one(norms.norms_so_far([NormHistory("conv", 9.0, 0.2, 350.0)], STALLED, watched=1))
        assert found.severity == "watch"
        assert "3 times what it was 350 steps before" in found.title
        assert found.advice.startswith("try from a checkpoint")
        slow = one(norms.norms_so_far([NormHistory("conv", 20.0, 0.05, 100.0)], STALLED, watched=1))
        assert slow.severity == "act"
        thrown = replace(STALLED, ended=2.4)
        never = one(norms.norms_so_far([NormHistory("conv", 20.0, 0.05, 100.0)], thrown, watched=1))
        assert never.advice.startswith("nothing to do")
        assert one(norms.norms_so_far([NormHistory("conv", 1.2, 0.9, 100.0)], STALLED, 1)).severity == "good"
        assert one(norms.norms_so_far([NormHistory("conv", NAN, NAN, NAN)], STALLED, 1)).severity == "open"

    @pytest.mark.parametrize("losses", [(2.3, 0.01, NAN), (5.5, 1.4, 1.6), (NAN, NAN, NAN)])
    @pytest.mark.parametrize("rate", [0.05, 20.0])
    def test_a_norm_that_changes_while_the_loss_falls_asks_for_nothing(self, losses, rate):
        """Also where no loss was noted: without a symptom there is no advice."""
        course = LossCourse(0, (), None, 1000, *losses)
        found = one(norms.norms_so_far([NormHistory("conv", 1 / rate, rate, 100.0)], course, watched=1))
        assert found.severity == "watch"
        assert found.advice.startswith("nothing to do while the loss falls")
        assert Diagnosis.of("x", [found]).changes == ()

    def test_one_estimate_is_no_history_and_no_weight_is_another_matter(self):
        found = one(norms.norms_so_far([], STALLED, watched=1))
        assert found.severity == "open"
        assert "1 scale-invariant weight is watched" in found.title
        assert "estimate_every" in found.advice
        without = one(norms.norms_so_far([], STALLED, watched=0))
        assert without.severity == "good"
        assert "No scale-invariant weight is watched" in without.title

    def test_the_steps_of_a_history_are_named(self):
        past = NormHistory("conv", 1.5, 0.8, 500.0, start=500.0)
        assert "from step 500 to 1,000" in one(norms.norms_so_far([past], STALLED, 1)).title
        assert "from step 500 to 1,000" in one(norms.norms_so_far([replace(past, rate_factor=0.1)], STALLED, 1)).title

    def test_trends_name_the_fastest(self):
        found = one(norms.next_step([NormTrend("slow", 1.0, 0.001), NormTrend("fast", 1.0, 0.1)]))
        assert "very next step only" in found.title
        assert (
            "2 of 2 weights grow (norm per step): growing by 2.5 % in the median, fastest `fast` 4.9 %." in found.title
        )
        assert "no weight" in one(norms.next_step([NormTrend("slow", 1.0, -0.1)])).title
        assert found.severity == "good"
        assert one(norms.next_step([NormTrend("wild", 1.0, 20.0)])).severity == "watch"

    def test_the_next_step_is_no_answer_where_the_flow_says_otherwise(self):
        facts = [NormTrend("2.weight", 1.0, 0.0156, settles=1.8), NormTrend("0.weight", 1.0, 4.6e-4, settles=0.6)]
        (to_come,), (step,) = norms.norms_to_come(facts), norms.next_step(facts)
        assert to_come.title.endswith("take norms up: `2.weight` to 1.8 times; down: `0.weight` to 0.6 times.")
        assert "In the very next step only, 2 of 2 weights grow" in step.title
        assert step.title.endswith("Noise then shrinks `0.weight`.")
        agree = one(norms.next_step([replace(facts[0], name="a"), replace(facts[1], settles=1.0)]))
        assert "shrinks" not in agree.title
        assert one(norms.norms_to_come(facts, moving=True)).severity == "open"
        moving = one(norms.next_step(facts, moving=True))
        assert moving.severity == "good"
        assert "shrinks" not in moving.title
        still = one(norms.norms_to_come([replace(f, settles=1.0) for f in facts]))
        assert "leave all norms as they are" in still.title

    def test_growth_is_counted_with_its_median_and_the_fastest(self):
        layers = [NormTrend(f"layers.{i}.q.weight", 1.0, 0.01) for i in range(12)]
        found = one(norms.next_step([*layers, NormTrend("head.weight", 1.0, 0.02), NormTrend("rest", 1.0, -1.0)]))
        assert "13 of 14 weights grow and 1 shrinks (norm per step)" in found.title
        assert found.title.endswith("growing by 0.5 % in the median, fastest `head.weight` 1 %; `rest` 100 %.")
        assert len(found.where) == 13

    @pytest.mark.parametrize("number", [2, 7, 40])
    def test_no_finding_on_norms_lists_more_than_three_names(self, number):
        """Each tells how many norms grow and shrink, by how much in the median, and which one most."""
        rng = np.random.default_rng(0)
        names = [f"part{chr(97 + i % 26)}{i}.weight" for i in range(number)]
        changes, ends = rng.normal(size=number), np.exp(rng.normal(size=number))
        trends = [NormTrend(n, 1.0, c, settles=e) for n, c, e in zip(names, changes, ends, strict=True)]
        past = [NormHistory(n, e**2, 1 / e, 300.0, 100.0) for n, e in zip(names, ends, strict=True)]
        found = [norms.next_step(trends, True), norms.norms_to_come(trends)]
        for finding in (*found, norms.grown_layers(past)):
            assert 1 <= one(finding).title.count("`") / 2 <= 3
        up, down = ends[ends > 1], ends[ends < 1]
        title = one(norms.grown_layers(past)).title
        assert f"{len(up)} of {number} layers grew in 300 steps (from step 100 to 400)" in title
        assert f"`{names[int(np.argmax(ends))]}` {plain(ends.max(), 3)} times" in title
        assert f"; {len(down)} shrank: " in title or not len(down)
        if len(up) > 1:
            assert f"{plain(np.median(up), 3)} times in the median" in title
        if len(down) > 1:
            assert f"to {plain(np.median(down), 3)} times in the median, most `{names[int(np.argmin(ends))]}`" in title

    def test_norms_that_go_the_other_way_are_counted_apart(self):
        facts = [
            NormHistory("a", 9.0, 1 / 9, 500.0),
            NormHistory("b", 4.0, 1 / 4, 500.0),
            NormHistory("c", 0.2, 5.0, 500.0),
        ]
        title = one(norms.norms_so_far(facts, STALLED, 3)).title
        assert title.startswith("2 of 3 scale-invariant weights grew")
        assert title.endswith(
            "In the median their norms are 2.5 times what they were. 1 shrank enough to change theirs twofold."
        )

    def test_numbers_are_written_out(self):
        found = one(norms.next_step([NormTrend("wild", 1.0, 9.86)]))
        assert "`wild` 230 %" in found.title
        assert "of `wild`" in found.advice

    def test_short_runs_leave_decay_open(self):
        assert "too small" in one(decay.decay_bites([2e-4], 100)).title
        found = one(decay.decay_bites([2e-4], 100, asked=False))
        assert found.severity == "open"
        assert "raise" not in found.advice
        assert "steps=" in found.advice
        assert one(decay.decay_bites([2e-2], 100)).severity == "good"
        assert "the default" in one(decay.decay_bites([2e-6], 1000, asked=False)).advice
        assert "the default" not in one(decay.decay_bites([2e-6], 1000)).advice

    def test_decay(self):
        found = one(decay.decay_bites([0.0, 2e-6], 1000))
        assert found.severity == "watch"
        assert "too small to matter in this run" in found.title
        assert found.advice.startswith("nothing to do")
        for share in (0.0, 2e-4, 2e-2):
            assert one(decay.decay_bites([share], 1000)).severity == "good"

    def test_decay_has_settled_norms_after_three_memories_alone(self):
        """One memory takes 63 %, half of that under a cosine, whose mean learning rate is half of its peak."""
        titles = [one(decay.decay_bites([share], 1000)).title for share in (1e-3, 2.9e-3, 3.1e-3)]
        assert [t.split(":")[0] for t in titles] == ["Partly", "Partly", "Yes"]
        rates = [0.5 * (1 + math.cos(math.pi * k / 1000)) for k in range(1000)]
        cosine = 1 - math.prod(1 - 1e-3 * rate for rate in rates)
        assert (
            f"takes 63% of the squares that decayed weights began with at a constant learning rate ({cosine:.0%} "
            in (titles[0])
        )
        assert "cosine" not in one(decay.decay_bites([1e-3], 1000, course=STALLED)).title, "a log has the schedule"

    def test_decay_that_goes_into_gradients_is_not_called_none(self):
        found = one(decay.decay_bites([math.nan], 1000))
        assert found.severity == "open"
        assert "not known" in found.title
        assert "no weight decay" in one(decay.decay_bites([0.0], 1000)).title
        assert one(decay.decay_bites([math.nan, 2e-3], 1000)).severity == "good"

    def test_logits(self):
        assert logits.logit_growth([]) == []
        grown = LogitGrowth("q -> k", 3, 5.0, 4.0, 1000, measured=True)
        found = one(logits.logit_growth([grown, replace(grown, head=1, spread=2.0)]))
        assert found.severity == "watch"
        assert "head 3" in found.title
        assert one(logits.logit_growth([replace(grown, spread=30.0)])).severity == "watch"
        assert one(logits.logit_growth([replace(grown, spread=30.0)], stalled=True)).severity == "act"
        assert one(logits.logit_growth([grown], stalled=True)).severity == "watch"
        for small in (
            replace(grown, factor=2.9),
            replace(grown, measured=False),
            replace(grown, factor=1.0, spread=40),
        ):
            assert logits.logit_growth([small]) == [], "no growth to speak of"
        begun = one(logits.logit_growth([replace(grown, spread=0.5)]))
        assert begun.severity == "good", "how attention begins to work, and norms do not say how far logits spread"
        assert begun.advice.endswith(
            "nf.diagnose(model, loss_fn, loader, optimizer) at the last weights measures the logits"
        )
        still = one(logits.still_norms([replace(grown, factor=1.5, measured=False)]))
        assert still.severity == "good"
        assert "by a factor of 1.5 at most" in still.title
        assert logits.still_norms([]) == []
        assert one(logits.logit_growth([replace(grown, factor=30.0, spread=30.0, measured=False)])).severity == "watch"

    def test_logits_that_were_seen(self):
        assert logits.logit_spread([]) == []
        calm_one = LogitSpread("attn", 0, 0.5, 1.2, 1000.0)
        found = one(logits.logit_spread([calm_one, replace(calm_one, head=3, seen=1.5)]))
        assert found.severity == "good"
        assert found.title.endswith(
            "spread by 1.5 over the keys of a query in head 3 of `attn`, the most of 2 heads in 1 layer (root mean "
            "square over queries)."
        )
        hard = one(logits.logit_spread([calm_one, replace(calm_one, module="late", head=1, seen=14.0)]))
        assert (
            "head 1 of `late`, the most of 2 heads in 2 layers (root mean square over queries): attention" in hard.title
        )
        assert hard.as_asked.is_note
        pushed = one(logits.logit_spread([calm_one, replace(calm_one, head=2, factor=12.0)]))
        assert "up 12 times in 1,000 steps at most, which would make that 6." in pushed.title
        assert pushed.as_asked.is_note
        for less in (replace(calm_one, factor=9.0), replace(calm_one, seen=0.1, factor=12.0)):
            assert not one(logits.logit_spread([less])).as_asked.is_note


class TestBalance:
    def test_a_unit_scaled_by_thirty(self):
        found = one(balance.far_from_equilibrium([layer([0.1, math.log(30), -0.2, 0.0])], 1000))
        assert found.severity == "act"
        assert "unit 1 of `0 -> 2`" in found.title
        assert "longer than this run (slow phase)" in found.means, "500 steps for each factor of e, 2,300 in all"

    def test_a_unit_that_noise_evens_out_within_the_run_asks_for_nothing(self):
        """The steps are its own, not the median of its layer; a curvature that holds the rate down is acted on."""
        off = layer([0.1, math.log(30), -0.2, 0.0])
        ask = lambda fact, steps, **options: one(balance.far_from_equilibrium([fact], steps, **options))
        soon = ask(off, 2500)
        assert soon.as_asked.severity == "good"
        assert "Noise evens most of it out over some 2,309 steps, within this run." in soon.title
        assert soon.advice.startswith(
            "nothing to do while the loss falls; if it does not, scale the two sides of `0 -> 2`"
        )
        assert ask(off, 2200).severity == "act"
        assert ask(off, 2500, limiting=True).severity == "act"
        assert ask(replace(off, each=(500.0, 400.0, 500.0, 500.0)), 2200).severity == "watch"
        assert ask(replace(off, steps=NAN), 2500).severity == "act", "how long it takes is not known"
        two = replace(off, factors=np.log([1.0, 30.0, 1.0, 1.0, 12.0]), errors=np.zeros(5))
        two = replace(two, each=(9.0, 9.0, 9.0, 9.0, 9e5))
        assert ask(two, 2500).severity == "act", "the other one stays"
        near = replace(STABLE, load=0.6, sharpening=0.1)
        assert near.held_by_imbalance
        assert replace(near, sharpening=NAN).held_by_imbalance, "nobody knows what makes the curvature"
        assert not replace(near, sharpening=0.9).held_by_imbalance
        assert not replace(near, load=0.1).held_by_imbalance
        assert not replace(near, load=NAN).held_by_imbalance

    @pytest.mark.parametrize(("start", "decay"), [(30.0, 0.0), (30.0, 0.01), (300.0, 0.0), (4.0, 0.003)])
    def test_steps_to_even_are_those_of_the_flow(self, start, decay):
        """Noise and decay on two weights whose product stays: their charge step by step until they are 3 times off."""
        noise, steps = 0.01, 0
        large, small = start, 1 / start
        while math.sqrt(large / small) > 3:
            change = noise * (large**-2 - large**2) - decay * (large**2 - small**2)
            charge = large**2 - small**2 + change
            large = math.sqrt((charge + math.sqrt(charge**2 + 4)) / 2)
            small, steps = 1 / large, steps + 1
        assert steps_to_even(math.log(start), 1 / (noise + decay)) == pytest.approx(steps, rel=0.02)

    def test_moderate_is_to_watch_and_uncertain_is_nothing(self):
        factors = [0.0, math.log(5), 0.0, 0.0]
        assert one(balance.far_from_equilibrium([layer(factors)], 1000)).severity == "watch"
        assert one(balance.far_from_equilibrium([layer(factors, [0.5] * 4)], 1000)).severity == "good"

    def test_a_whole_layer(self):
        found = one(balance.far_from_equilibrium([layer([math.log(15)] * 4)], 1000), "balance-layer")
        assert found.severity == "watch"
        assert one(balance.far_from_equilibrium([layer([math.log(50)] * 4)], 1000), "balance-layer").severity == "act"
        assert one(balance.far_from_equilibrium([layer([math.log(7)] * 4)], 1000)).severity == "good"
        assert one(balance.far_from_equilibrium([layer([math.log(15)] * 4, part="channel")], 1000)).severity == "good"

    def test_healthy_and_unknown(self):
        assert one(balance.far_from_equilibrium([layer([0.3, -0.5, 0.1])], 1000)).severity == "good"
        assert one(balance.far_from_equilibrium([layer([0.3, NAN, 0.1], [NAN] * 3)], 1000)).severity == "good"
        unknown = one(balance.far_from_equilibrium([layer([NAN, NAN])], 1000))
        assert unknown.severity == "open"
        assert "1 pair of layers can trade scale (`0 -> 2`)" in unknown.title
        assert "No two layers" in one(balance.far_from_equilibrium([], 1000)).title

    def test_each_layer_has_its_own_number(self):
        wide, near = layer([0.0] * 4 + [math.log(10.6)]), layer([0.0] * 4 + [math.log(3.9)], name="near")
        found = one(balance.far_from_equilibrium([wide, near], 1000))
        assert "unit 4 of `0 -> 2` 10.6 times; unit 4 of `near` 3.9 times" in found.title
        assert "`0 -> 2`; `near`" in found.advice
        whole = [layer([math.log(50)] * 4), layer([math.log(12)] * 4, name="near")]
        found = one(balance.far_from_equilibrium(whole, 1000), "balance-layer")
        assert "`0 -> 2` 50 times; `near` 12 times" in found.title
        large = one(balance.far_from_equilibrium([layer([0.0, 0.0, math.log(493.0)])], 1000))
        assert "e+0" not in str(large)

    def test_a_layer_that_the_beginning_of_the_run_evens_out_asks_for_nothing(self):
        off = layer([math.log(500)] * 4, steps=500.0)
        judged = lambda fact, steps: one(balance.far_from_equilibrium([fact], steps), "balance-layer")
        assert judged(off, 1000).severity == "act"
        soon = judged(off, 5000)
        assert (soon.severity, soon.advice) == ("good", "nothing to do")
        assert "over some 500 steps, a small part of the run" in soon.title
        zero = judged(replace(off, small="2.weight"), 1000)
        assert (zero.severity, zero.advice) == ("good", "nothing to do")
        assert "`2.weight` is much smaller than usual" in zero.title
        other = replace(off, name="other", small="4.weight")
        both = balance.far_from_equilibrium([off, other], 1000)
        assert [(f.severity, f.where) for f in both] == [("act", ("0 -> 2",)), ("good", ("other",))]

    def test_during_a_run(self):
        assert one(balance.far_during_run([RunBalance("a", 0.1, math.log(30), 100.0)], 100)).severity == "act"
        passing = one(balance.far_during_run([RunBalance("a", 0.1, math.log(30), 10.0)], 100))
        assert passing.as_asked.severity == "good"
        assert "over some 46 steps, within this run" in passing.title
        over = one(balance.far_during_run([RunBalance("a", 0.1, math.log(30), 10.0)], 0.0))
        assert over.severity == "act", "a run that has ended evens nothing out"
        assert "over some 46 steps more" in over.means
        assert one(balance.far_during_run([RunBalance("a", 0.1, 0.5, 10.0)], 100)).severity == "good"
        assert one(balance.far_during_run([RunBalance("a", NAN, NAN, NAN)], 100)).severity == "open"

    def test_dead_units(self):
        found = one(dead.dead_units([activity([1] * 4, [1, 0, 1e-9, 2])]))
        assert found.severity == "act"
        assert "(1, 2)" in found.title
        assert one(dead.dead_units([activity([1] * 8, [0, *[1] * 7])])).severity == "watch"
        assert one(dead.dead_units([activity([1] * 20, [0, *[1] * 19])])).severity == "good"
        assert one(dead.dead_units([activity([1] * 4, [1, 1e-3, 1, 2])])).severity == "good"

    def test_dead_units_of_layers_seen_by_their_activations(self):
        seen = replace(activity([1] * 8, [1, 0, 0, 1, 1, 1, 1, 1]), name="4", activation="gelu")
        found = one(dead.dead_units([activity([1] * 4, [1] * 4), seen]))
        assert found.title == "2 of 8 units of `4` are dead (1, 2)."
        assert "nn.LeakyReLU" in found.advice
        saturated = one(dead.dead_units([replace(seen, activation="tanh")]))
        assert "saturated in tanh" in saturated.title
        assert "by 10" in saturated.advice
        frozen = one(dead.dead_units([replace(seen, frozen=True)]))
        assert "whose weights are frozen" in frozen.title
        assert "prune these 2 units of `4`" in frozen.advice
        both = one(dead.dead_units([seen, replace(seen, name="6", gradient=np.zeros(8))]))
        assert both.title.endswith("Also: 2 of 8 units of `4` are dead (1, 2).")
        assert both.severity == "act"

    def test_layers_that_cannot_be_judged_for_dead_units_are_named(self):
        unknown = replace(activity([1] * 4, [NAN] * 4), name="2 -> 4")
        calm_one = one(dead.dead_units([activity([1] * 4, [1] * 4), unknown]))
        assert calm_one.title.startswith("No unit is dead in the 1 layer looked at.")
        assert calm_one.title.endswith("Not judged, for not all of their gradients were measured: `2 -> 4`.")
        assert one(dead.dead_units([unknown])).severity == "open"
        assert "Not judged" not in one(dead.dead_units([activity([1] * 4, [1] * 4)])).title
        assert dead.silent_parts([activity([1] * 4, [1, 0, 0, 1]), unknown]) == {"0 -> 2": 2}

    def test_a_unit_nearer_to_its_equilibrium_than_its_layer_is_no_outlier(self):
        off = math.log(5)
        (found,) = balance.far_from_equilibrium([layer([off, off, off, 0.1])], 1000)
        assert found.severity == "good"
        (found,) = balance.far_from_equilibrium([layer([off, off, off, -off])], 1000)
        assert found.severity == "watch"

    def test_heads_are_open_in_a_log_of_layers(self):
        assert heads.heads_not_logged([]) == []
        found = one(heads.heads_not_logged(["q -> k", "v -> o"]))
        assert found.severity == "open"
        assert "`q -> k` and 1 more" in found.title

    def test_the_farthest_head_is_named_while_none_is_far(self):
        (found,) = heads.heads_apart([layer([0.1, -0.5], part="head", name="v -> o"), layer([0.9], name="mlp")])
        assert found.severity == "good"
        assert "farthest, head 1 of `v -> o`, is a factor of 1.6" in found.title

    def test_heads_that_are_far_or_missing_are_left_to_the_other_rule(self):
        far = layer([0.0, 0.1, 0.0, 2.0], part="head")
        assert heads.heads_apart([far]) == heads.heads_apart([layer([0.1])]) == []
        assert balance.far_from_equilibrium([far], 100)[0].severity == "watch"

    def test_frozen_heads(self):
        found = one(heads.frozen_heads([activity([1, 1e-4, 1, 1], [1, 1e-2, 1, 1], "head")]))
        assert found.severity == "act"
        assert "head 1" in found.title
        silent = one(heads.frozen_heads([activity([1, 1, 1, 1], [1, 0, 1, 1], "head")]))
        assert silent.severity == "act"
        assert one(heads.frozen_heads([activity([1, 0.05, 1], [1, 1, 1], "head")])).severity == "watch"
        assert one(heads.frozen_heads([activity([1, 0.5, 2], [1, 0.4, 1], "head")])).severity == "good"
        assert heads.frozen_heads([activity([1, 0], [1, 0])]) == []


class TestStability:
    def test_too_short_a_warmup(self):
        fast = replace(STABLE, load=2.0, needed=200.0, safe=400.0, planned=20)
        found = one(stability.learning_rate(fast))
        assert found.severity == "act"
        assert "warmup of 20 steps is too short" in found.title
        assert "200" in found.advice
        assert one(stability.learning_rate(replace(fast, planned=None))).severity == "act"
        assert one(stability.learning_rate(replace(fast, planned=300))).severity == "watch"
        assert one(stability.learning_rate(replace(fast, planned=500))).severity == "good"
        assert "lower the peak" in one(stability.learning_rate(replace(fast, needed=None))).advice
        longer = one(stability.learning_rate(replace(fast, run=150)))
        assert longer.severity == "act"
        assert "the run has 150" in longer.title
        assert "warmup" not in longer.advice, "a warmup that is longer than the run cannot be followed"

    def test_edge_of_stability_is_no_alarm(self):
        assert one(stability.learning_rate(replace(STABLE, load=1.2, started=True))).severity == "watch"
        assert one(stability.learning_rate(replace(STABLE, load=3.0, needed=10.0, started=True))).severity == "act"

    def test_healthy_noisy_and_unknown(self):
        assert one(stability.learning_rate(RUNNING)).severity == "good"
        assert one(stability.learning_rate(replace(RUNNING, noisy_load=1.5))).severity == "watch"
        assert one(stability.learning_rate(replace(STABLE, load=NAN))).severity == "open"

    def test_sharpening(self):
        assert one(stability.sharpening(replace(STABLE, sharpening=4.0, load_later=1.3))).severity == "watch"
        assert one(stability.sharpening(replace(STABLE, sharpening=4.0, load_later=0.3))).severity == "good"
        assert one(stability.sharpening(replace(STABLE, sharpening=0.1))).severity == "good"
        assert stability.sharpening(replace(STABLE, sharpening=NAN)) == []

    def test_a_trace_that_is_not_positive_has_no_factor(self):
        found = one(stability.sharpening(replace(STABLE, sharpening=0.19, saddle=True)))
        assert found.severity == "open"
        assert "not positive" in found.title
        assert "function held fixed" in one(stability.sharpening(replace(STABLE, sharpening=0.19))).title

    def test_the_limit_of_the_minibatches_is_quoted(self):
        title = one(stability.learning_rate(replace(STABLE, lr=0.05, load=0.012, noisy_load=0.0275))).title
        assert (
            "0.012 of the largest stable one with full batches (4.167); on a quadratic loss minibatches would" in title
        )
        assert "allow 1.818" in title
        without = one(stability.learning_rate(replace(RUNNING, noisy_load=NAN))).title
        assert "with full batches (0.5)" in without

    def test_before_training_stable_means_at_these_weights(self):
        """Curvature rises in the first steps: only where it may rise 50 times there is nothing to ask."""
        found = one(stability.learning_rate(replace(STABLE, noisy_load=NAN)))
        assert found.severity == "open"
        assert found.title.startswith("At these weights, before training, the learning rate 0.1 is stable: 0.2 of")
        assert "a rise of 5 times ends it" in found.means
        assert found.advice.startswith("warm up over some tens of steps, which costs little; or train 50 steps")
        assert "nf.diagnose(model, loss_fn, loader, optimizer" in found.advice
        assert "worst case" in one(stability.learning_rate(replace(STABLE, noisy_load=1.5))).means
        planned = one(stability.learning_rate(replace(STABLE, planned=100)))
        assert (planned.severity, planned.title) == ("open", found.title)
        assert planned.advice.startswith("to know whether the planned warmup of 100 steps is enough, train 50 steps")
        assert planned.advice.endswith("try a third of the peak learning rate")
        assert one(stability.learning_rate(replace(STABLE, load=0.019))).severity == "good"
        assert one(stability.learning_rate(replace(STABLE, load=0.021))).severity == "open"
        assert one(stability.learning_rate(replace(RUNNING, load=0.021))).severity == "good"
        assert one(stability.learning_rate(replace(STABLE, load=1.0, needed=10.0))).severity == "act"

    def test_a_curvature_that_failed_names_its_remedy(self):
        assert "curvature=True" in one(stability.learning_rate(replace(STABLE, load=NAN))).advice
        failed = replace(STABLE, load=NAN, remedy="return one loss per sample")
        assert one(stability.learning_rate(failed)).advice == "return one loss per sample"

    def test_memory_of_squares(self):
        tiny = nf.AdamConfig(lr=1e-3, batch_size=8, betas=(0.9, 0.3))
        assert one(squares.memory_of_squares(tiny)).severity == "act"
        for b2 in (0.95, 0.99, 0.999):
            assert one(squares.memory_of_squares(replace(tiny, betas=(0.9, b2)))).severity == "good"
        assert squares.memory_of_squares(nf.SGDConfig(lr=0.1, batch_size=8)) == []

    def test_turning(self):
        turns = lambda course, *angles: one(stability.turning([Turn("conv", a) for a in angles], course))
        fast = turns(STALLED, 0.5, 0.01)
        assert fast.severity == "act"
        assert "within about 4 steps" in fast.means
        assert "within one step." in turns(STALLED, 1.5).means
        assert turns(STALLED, 0.15).severity == "watch"
        assert turns(STALLED, 0.01).severity == "good"
        late = one(stability.turning([Turn("conv", 0.01, rate_share=0.02)], STALLED))
        assert late.title.endswith("turned by 0.01 radians a step, at 0.02 of the largest learning rate.")
        assert stability.turning([Turn("conv", NAN)], STALLED) == []
        falling = turns(replace(STALLED, ended=0.01), 0.5)
        assert falling.severity == "watch"
        assert falling.advice.startswith("nothing to do")

    def test_curvature_of_weights_that_a_step_replaces_asks_for_no_warmup(self):
        fact = replace(STABLE, load=6.7, needed=2000.0, small=True)
        found = one(stability.learning_rate(fact))
        assert found.severity == "open"
        assert "much smaller than the others of their layer" in found.title
        assert one(stability.learning_rate(replace(fact, small=False))).severity == "act"

    def test_of_the_steps_between_recorded_ones_nothing_is_claimed(self):
        sparse = one(breaking.touched_from_outside([("rescaling", 0.0)], [], recorded=71, made=300))
        assert "in the 71 steps recorded of 300" in sparse.title
        all_of_them = one(breaking.touched_from_outside([("rescaling", 0.0)], [], recorded=300, made=300))
        assert all_of_them.title == "Nobody but the optimiser changed the weights."

    def test_a_step_that_drew_a_weight_anew_is_told(self):
        found = one(stability.turning([Turn("conv", 0.01, 0.1, largest=1.2, at=0), Turn("other", 0.02)], STALLED))
        assert found.severity == "watch"
        assert found.title.startswith("Step 0 turned `conv` by 1.2 radians")
        assert "a third of the peak learning rate" in found.advice
        still = one(stability.turning([Turn("conv", 0.01, 0.1, largest=0.9, at=0)], STALLED))
        assert still.severity == "good"

    def test_loss_course(self):
        calm_run = LossCourse(100, (), None, 1000, 2.3, 0.1)
        assert one(stability.loss_course(calm_run)).severity == "good"
        assert one(stability.loss_course(replace(calm_run, ended=5.0))).severity == "act"
        assert one(stability.loss_course(replace(calm_run, ended=2.25))).severity == "watch"
        thrown = one(stability.loss_course(replace(calm_run, ended=2.4, highest=22.7)))
        assert thrown.severity == "act"
        assert "thrown back" in thrown.title
        assert one(stability.loss_course(replace(calm_run, began=NAN, ended=NAN))).severity == "open"
        assert one(stability.loss_course(replace(calm_run, began=-1.0, ended=-3.0))).severity == "good"
        early = one(stability.loss_course(replace(calm_run, spikes=(120, 130))))
        assert early.severity == "act"
        assert "too short" in early.title
        assert one(stability.loss_course(replace(calm_run, spikes=(900,)))).severity == "watch"
        assert one(stability.loss_course(replace(calm_run, spikes=(900,), ended=9.0))).severity == "act"
        assert one(stability.loss_course(replace(calm_run, broken=900))).severity == "act"

    def test_the_question_about_the_warmup_is_answered_in_words(self):
        run = LossCourse(100, (), None, 1000, 2.3, 0.1)
        course = lambda **new: one(stability.loss_course(replace(run, **new))).title
        assert course().startswith("Yes, the warmup of 100 steps was long enough for stability")
        assert course(warmup=0).startswith("The run went without a warmup: the loss stayed in hand")
        assert course(spikes=(120,)).startswith("No, the warmup of 100 steps is too short")
        assert "whether the warmup was long enough" in course(began=NAN, ended=NAN)
        before = lambda **new: one(stability.learning_rate(replace(STABLE, **{"load": 0.01, **new}))).title
        assert before().startswith("No warmup is needed for stability at these weights")
        assert before(planned=100).startswith("Yes, the planned warmup of 100 steps is long enough")
        assert before(load=2.0, needed=200.0, planned=20).startswith("No, the warmup of 20 steps is too short")
        assert before(load=2.0, needed=200.0, planned=500).startswith("Yes, the warmup of 500 steps")
        assert "whether a warmup is needed" in before(load=NAN)

    def test_a_run_that_was_lost_is_said_to_be(self):
        found = one(stability.loss_course(LossCourse(0, (), None, 300, 2.3, 1e30, diverged=2)))
        assert found.severity == "act"
        assert found.title.startswith("The run diverged at step 2:")
        other = calm("norms", "norms", "Norms are fine.")
        more = [other, calm("grown-layers", "norms", "All grew."), calm("turning", "warmup", "Steps are small.")]
        kept, left = of_little_meaning([*more, found], ("loss-course",), "the run diverged at step 2")
        assert (left.severity, left.rule, kept) == ("open", "norms", found)
        assert left.title == "Means little, for the run diverged at step 2."
        assert "do: mend that first, and ask the new run again: ledger.diagnose()" in str(left)

    def test_the_same_advice_is_printed_once(self):
        same = [replace(calm(rule, "norms", rule), severity="open", advice="train on") for rule in ("a", "b", "c")]
        printed = str(Diagnosis.of("x", [*same, calm("d", "decay", "none")]))
        assert printed.count("do: train on") == 1
        assert printed.count("do: as above") == 2
        assert "GOOD  none" in printed

    def test_more_than_these_minibatches_allow_is_no_advice(self):
        found = one(stability.learning_rate(replace(RUNNING, noisy_load=74.0)))
        assert found.severity == "watch"
        assert Diagnosis.of("x", [found]).changes == ()


class TestSampling:
    def test_mean_gradient_regime(self):
        found = one(sampling.batch_size(BatchRegime(4096, scale(), 0.9, 50.0)))
        assert found.severity == "watch"
        assert found.title.startswith("Mean-gradient regime")
        uncertain = one(sampling.batch_size(BatchRegime(4096, scale(error=0.01), 0.9, 50.0)))
        assert uncertain.severity == "good"

    def test_a_fresh_run_is_given_time_and_a_full_batch_has_no_noise(self):
        fresh = BatchRegime(4096, scale(), 0.9, 50.0, started=False)
        found = one(sampling.batch_size(fresh))
        assert found.severity == "good"
        assert "mean-gradient regime for now" in found.title
        assert one(sampling.batch_size(replace(fresh, batch_size=40_000))).severity == "watch"
        assert "hold all samples" in one(sampling.batch_size(replace(fresh, noise_share=0.0))).title

    def test_healthy(self):
        for size in (2, 64, 512):
            assert one(sampling.batch_size(BatchRegime(size, scale(), 0.2, 50.0))).severity == "good"

    def test_a_noise_scale_that_cannot_be_told_from_infinity_says_above_what_it_lies(self):
        unknown = scale(signal=-0.01)
        (found,) = sampling.batch_size(BatchRegime(16, unknown, 0.0, 50.0))
        assert "too large to measure (above" in found.title
        assert "inf" not in " ".join([found.title, found.sure, *map(str, found.evidence)])

    def test_from_the_momentum_buffer(self):
        much = one(sampling.noise_share(100.0, "all"))
        assert (much.severity, "batches 4 times smaller" in much.advice) == ("watch", True)
        little = one(sampling.noise_share(0.004, "all"))
        assert (little.severity, "0.08 times" in little.title) == ("good", True)
        between = one(sampling.noise_share(0.5, "all"))
        assert (between.severity, "between 0.2 and 10 times" in between.title) == ("open", True)
        for unknown in (NAN, math.inf, 0.0):
            assert one(sampling.noise_share(unknown, "all")).title.startswith(
                "Not told by the log: the share of the mean"
            )
        assert one(sampling.noise_share(0.0, "all")).severity == "open"

    @pytest.mark.parametrize(
        ("shares", "ratio"),
        [([0.2] * 5, 0.25), ([0.01, -0.02, 0.03, 0.0, 0.01], 0.0), ([-0.1], 0.0), ([], NAN), ([1.0], math.inf)],
    )
    def test_a_share_around_zero_is_no_ratio(self, shares, ratio):
        assert batch_ratio(np.array(shares)) == pytest.approx(ratio, nan_ok=True)

    def test_before_a_run_it_is_the_scale_at_these_weights(self):
        title = one(sampling.batch_size(BatchRegime(64, scale(), 0.2, 50.0, started=False))).title
        assert "at these weights; it grows in training" in title


class TestBreaking:
    def test_certificate(self):
        assert one(breaking.broken_by_the_loss({"0 -> 2": "outputs change"})).severity == "watch"
        assert one(breaking.broken_by_the_loss({})).severity == "good"
        unproved = {"0 -> 2": "certificate: undetermined", "2 -> 4": "certificate: broken"}
        broken, open_ = breaking.broken_by_the_loss(unproved, {"0 -> 2": 40})
        assert (broken.severity, broken.where) == ("watch", ("2 -> 4",))
        assert (open_.severity, open_.where) == ("open", ("0 -> 2",))
        assert "40 units get no gradient on these data" in open_.title
        assert "no gradient" not in breaking.broken_by_the_loss(unproved)[1].title

    def test_violation(self):
        assert one(breaking.violated_in_training([("a", 0.2), ("b", 1e-7)])).where == ("a",)
        assert one(breaking.violated_in_training([("a", 1e-6)])).severity == "good"
        assert breaking.violated_in_training([("a", NAN)]) == []

    def test_preconditioner(self):
        much = one(breaking.moved_by_preconditioner([("rescaling", -3.0, 4.0)]))
        assert much.title.startswith("Adam breaks the symmetry `rescaling`: it moved 0.75 of the squared weights")
        little = one(breaking.moved_by_preconditioner([("rescaling", 0.1, 4.0)]))
        assert "too little to rule its balance" in little.title
        assert {much.severity, little.severity} == {"good"}
        assert breaking.moved_by_preconditioner([]) == []

    def test_outside(self):
        edited = [{"event": "edited", "step": 7}]
        assert "step 7" in one(breaking.touched_from_outside([("rescaling", 0.0)], edited)).title
        assert one(breaking.touched_from_outside([("rescaling", 0.2)], [])).severity == "watch"
        assert one(breaking.touched_from_outside([("rescaling", 0.9)], [])).severity == "act"
        assert (
            one(breaking.touched_from_outside([("rescaling", 1e-5)], [{"event": "resumed", "step": 1}])).severity
            == "good"
        )


class TestDiagnosis:
    def found(self):
        watch = Finding("w", "norms", "watch", "W.", "means", "do w", "sure", (Evidence("n", 1.0, 0.1),), weight=1.0)
        return [calm("g", "decay", "G."), watch, replace(watch, rule="v", weight=2.0, advice="do v"),
                replace(watch, rule="a", severity="act", advice="do a")]  # fmt: skip

    def test_the_most_urgent_comes_first(self):
        diagnosis = Diagnosis.of("Model", self.found())
        assert [f.rule for f in diagnosis] == ["a", "v", "w", "g"]
        assert diagnosis.verdict == "act"
        assert diagnosis.changes == ("do a", "do v", "do w")
        assert diagnosis["g"].severity == "good"
        with pytest.raises(KeyError, match="no finding by rule 'x'"):
            diagnosis["x"]

    def test_printed(self):
        text = str(Diagnosis.of("Model", self.found()))
        assert text.startswith("Model: 1 thing to act on, 2 to watch, 1 good answer.")
        assert QUESTIONS["decay"] in text
        assert "1. do a" in text
        assert text.index("ACT") < text.index("WATCH")

    def test_nothing_to_do_is_said(self):
        assert str(Diagnosis.of("Model", [calm("g", "decay", "G.")])).endswith("Nothing to do.")
        unknown = Finding("o", "warmup", "open", "Not known.", "", "", "open")
        assert str(Diagnosis.of("Model", [unknown])).endswith("Nothing to do by what was found; 1 question is open.")

    def test_json(self):
        assert Diagnosis.of("Model", self.found()).to_dict()["findings"][0]["question"] == QUESTIONS["norms"]


class TestStepLength:
    def test_steps_as_long_as_the_weight_are_to_act_on_and_curvature_is_silent(self):
        calm, wild = NormTrend("calm", 4.0, 0.01, step_square=0.04), NormTrend("wild", 4.0, 9.0, step_square=64.0)
        assert long_steps.step_length([calm, NormTrend("zero", 0.0, 1.0, 1.0)]) == []
        found = one(long_steps.step_length([calm, wild]))
        assert found.severity == "act"
        assert "4 times as long as `wild`" in found.title
        once = one(long_steps.step_length([replace(wild, step_square=16.0)]))
        assert once.severity == "watch"
        assert once.advice.startswith("warm up, or lower the learning rate of `wild`")
        assert once.as_asked.severity == "watch", "no good answer while a step replaces a weight"
        fact = StepStability(1.0, 0.5, NAN, NAN, NAN, NAN, NAN, None, True)
        assert one(stability.learning_rate(fact)).severity == "good"
        assert one(stability.learning_rate(replace(fact, replaced=True))).severity == "open"

    def test_a_warmup_begins_with_short_steps(self):
        long = NormTrend("wild", 4.0, 9.0, step_square=16.0)
        assert long_steps.step_length([long], warmup=100) == []
        assert (
            "first step of the warmup of 2 is as long as `wild`" in one(long_steps.step_length([long], warmup=2)).title
        )

    def test_before_a_normalisation_a_long_step_is_to_watch(self):
        hidden = NormTrend("conv", 4.0, 9.0, step_square=400.0, unseen=True)
        found = one(long_steps.step_length([hidden]))
        assert found.severity == "watch"
        assert "`conv`" in found.advice
        both = one(long_steps.step_length([hidden, NormTrend("head", 4.0, 9.0, step_square=36.0)]))
        assert both.severity == "act"
        assert "A step is 3 times as long as `head` itself (and too long for 1 more weight)." in both.title


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_first_step_is_as_long_as_simulated_ones(momentum: float) -> None:
    """Minibatch gradients of one mean and covariance, each from an empty buffer."""
    rng = torch.Generator().manual_seed(0)
    weight, mean, scatter = (torch.randn(40, generator=rng, dtype=torch.float64) for _ in range(3))
    settings = nf.SGDConfig(lr=0.1, batch_size=4, momentum=momentum)
    found = Step.of(settings, "w", weight, mean, scatter.square() + mean.square())
    noise = torch.randn(20_000, 40, generator=rng, dtype=torch.float64) * scatter * settings.covariance_factor**0.5
    steps = 0.1 * (mean + noise)
    for values, expected in ((steps.square().sum(1), found.square), (steps @ weight, found.along)):
        assert abs(float(values.mean()) - expected) < 4 * float(values.std()) / 20_000**0.5


def test_conditions_of_the_measurement_leave_good_answers_open():
    answers = [calm("g", "norms", "None grows."), calm("h", "decay", "It bites.")]
    norm, decay = doubted(answers, ("norms",), "measured with running statistics")
    assert (norm.severity, decay.severity) == ("open", "good")
    assert "running statistics" in norm.title
    text = str(Diagnosis.of("Model", [norm, decay], cautions=["measured in evaluation mode"]))
    assert "CAUTION: measured in evaluation mode" in text
    assert "CAUTION" not in str(Diagnosis.of("Model", answers))


@pytest.mark.parametrize(("traces", "told"), [((4.0, 2.0), "flattening by 2"), ((-20.43, -3.933), "not positive")])
def test_a_printed_forecast_of_sharpness_calls_no_negative_trace_flat(traces, told):
    found = Sharpness(*traces, 1.0, 1.0, 0.1, 0.1, 0.1, 8, 2.0, 0.1, 0.1, 0, 0)
    assert told in str(found)
    assert ("flattening by" in str(found)) == (min(traces) > 0)


def test_answers_on_a_flow_that_is_not_valid_are_open():
    """Good ones could not be judged; others say so; rules that do not rest on it stay."""
    watch = Finding("balance", "balance", "watch", "Far.", "", "nf.balance_(...)", "likely")
    good, far, decay = calm("balance", "balance", "Near."), watch, calm("decay-bites", "decay", "Yes.")
    found = not_judged([good, far, decay], ("balance",), "the flow is NOT VALID", "nf.Ledger(...)")
    assert [f.severity for f in found] == ["open", "watch", "good"]
    assert found[0].title == "Could not be judged, because the flow is NOT VALID. By present gradients alone: Near."
    assert "NOT VALID" in found[1].sure
    assert found[2] == decay


def test_a_forecast_that_is_not_valid_is_open_without_its_numbers():
    """Also one that asks for nothing while the loss falls; and it says what answers the question."""
    grows = norms.norm_growth([GROWING], 1000)
    assert one(grows).as_asked.severity == "good"
    asked = {"norm-growth": "How norms grow"}
    found = one(not_judged(grows, ("norm-growth",), "the flow is NOT VALID", "train with a ledger", asked))
    assert (found.severity, found.advice, found.evidence) == ("open", "train with a ledger", ())
    assert found.title == "How norms grow could not be forecast, because the flow is NOT VALID."
    assert "do: train with a ledger" in str(found)
    none = norms.norm_growth([], 1000)
    assert not_judged(none, ("norm-growth",), "the flow is NOT VALID", "x", asked) == none
    assert not_judged(grows, ("balance",), "the flow is NOT VALID") == grows


def test_numbers_of_steps_are_whole_and_at_least_one():
    assert [in_steps(k) for k in (0.0, 0.53, 37.4183, 1000.0)] == ["1 step", "1 step", "37 steps", "1,000 steps"]
    regime = Regime(0.9, 0.53, 10.0)
    assert "lasts 1 step at most" in regime.cautions[0]
    assert "by step 1 the" in regime.cautions[0]
    assert "lasts 37 steps at most" in Regime(0.9, 37.4183, 10.0).cautions[0]


def test_a_factor_of_sixty_is_not_called_near():
    wide = layer([math.log(20.0)] * 5 + [math.log(55.0)], part="channel")
    (found,) = balance.far_from_equilibrium([wide], 1000)
    assert found.title.startswith("None stands out from its layer.")
    (run,) = balance.far_during_run([RunBalance("a", math.log(7.0), math.log(8.0), NAN)], 1000)
    assert run.title.startswith("None stands out from its layer.")
    assert balance.far_during_run([RunBalance("a", 0.1, 0.5, NAN)], 1000)[0].title.startswith("None is far")


def test_few_minibatches_are_not_called_samples():
    assert few_samples(40, "minibatches") == ["40 minibatches are few: errors come out small"]
    assert few_samples(40)[0].startswith("40 samples")
    assert few_samples(400, "minibatches") == []


@pytest.mark.parametrize(
    ("value", "written"), [(493.2, "490"), (248.0, "250"), (0.00123, "0.0012"), (-51_234.0, "-51,000"), (1.0, "1")]
)
def test_numbers_of_sentences_have_no_powers_of_ten(value, written):
    assert plain(value) == written


def test_unknown_topics_are_named():
    with pytest.raises(DataError, match="no topic 'colours'; topics: norms"):
        Diagnosis("x", ()).about("colours")


def test_factors_of_a_run_are_those_of_the_steps_between_their_estimates():
    values, at = np.array([NAN, 2.0, NAN, 6.0, NAN]), np.array([0.0, 10.0, 20.0, 40.0, 50.0])
    found = span_of(values, at)
    assert (found.factor, found.steps) == (3.0, 30.0)
    assert span_of(np.array([NAN, 1.0]), at[:2]) is None


@pytest.mark.parametrize("power", [1, 2])
def test_a_warmup_from_zero_does_not_hide_the_first_change_of_a_norm(power):
    """At a learning rate of 0 the effective one over it is not known; the norm is, from the first step on."""
    norm, at = np.array([20.76, 39.98, 60.16]), np.array([0.0, 500.0, 1000.0])
    plain = norm ** (-power / 2)
    found = norm_history("w", norm, np.array([NAN, *plain[1:]]), at)
    assert found is not None
    assert found.rate_factor == pytest.approx(plain[2] / plain[0])
    assert found.span == "from step 0 to 1,000"
    assert found == replace(norm_history("w", norm, plain, at), rate_factor=found.rate_factor)
    still = norm_history("w", np.ones(3), np.array([NAN, 0.5, 0.5]), at)
    assert (still.start, still.steps, still.rate_factor) == (500.0, 500.0, 1.0)
    assert norm_history("w", norm, np.array([NAN, NAN, 1.0]), at) is None

    def test_a_weight_that_is_nearly_zero_grows_and_asks_for_nothing(self):
        head = NormTrend("head", 1e-8, 1e-4, step_square=1e-2, usual=1e-4)
        found = one(long_steps.step_length([head]))
        assert found.rule == "small-weights"
        assert (found.severity, found.advice) == ("good", "nothing to do")
        assert "1,000 times as long as `head`" in found.title
        assert "0.0001 of a usual initial one" in found.title
        ordinary = replace(head, usual=0.5)
        assert one(long_steps.step_length([ordinary])).severity == "act"
        both = long_steps.step_length([head, replace(ordinary, name="other")])
        assert [f.severity for f in both] == ["act", "good"]
        assert both[0].where == ("other",)

    def test_steps_as_long_as_usual_weights_are_to_act_on_whatever_the_weight(self):
        """Of length 10 against a weight of 1e-4; usual ones of its shape have 1."""
        found = one(long_steps.step_length([NormTrend("head", 1e-8, 1.0, step_square=100.0, usual=1e-4)]))
        assert found.severity == "act"
        assert "at least 100 times, so that a step is a tenth of a usual initial weight" in found.advice

    def test_a_small_weight_whose_norm_doubles_is_not_slowed(self):
        tiny = NormTrend("head", 1e-8, 1.0, usual=1e-4)
        found = one(norms.next_step([tiny]))
        assert (found.severity, found.advice) == ("good", "nothing to do")
        assert "grow at once: `head`" in found.title
        assert "`other`" in one(norms.next_step([tiny, NormTrend("other", 1.0, 2.0)])).advice
        assert "`head`" not in one(norms.next_step([tiny, NormTrend("other", 1.0, 2.0)])).advice


class TestTrials:
    """What users followed, and what became of it: the words are those that were measured to be true."""

    def test_a_loss_above_its_start_for_half_the_run_is_a_rate_too_large_whenever_it_spikes(self):
        run = LossCourse(0, (219,), None, 600, 2.3, 2.1, middle=4.9)
        found = one(stability.loss_course(run))
        assert found.severity == "act"
        assert "the learning rate is too large" in found.title
        assert "longer warmup would hardly help" in one(stability.loss_course(replace(run, middle=1.0))).title

    def test_a_longer_warmup_is_not_the_first_advice(self):
        run = LossCourse(30, (), None, 600, 2.3, 0.3, highest=5.0, up_at=20)
        assert one(stability.loss_course(run)).advice.startswith("try a third of the peak learning rate")

    def test_no_advice_on_dead_units_lowers_the_rate(self):
        silent = PartActivity("a -> b", "unit", np.ones(8), np.array([0.0, 0.0, 1, 1, 1, 1, 1, 1]))
        found = one(dead.dead_units([silent]))
        assert found.severity == "watch"
        assert "learning rate" not in found.advice
        assert "never" not in found.means

    def test_most_of_a_layer_that_died_in_training_begins_again_slower(self):
        silent = PartActivity("a -> b", "unit", np.ones(8), np.array([0.0] * 7 + [1.0]))
        assert "LeakyReLU" in one(dead.dead_units([silent])).advice
        assert "a third of the peak learning rate or less" in one(dead.dead_units([silent], started=True)).advice

    def test_a_norm_that_stood_still_neither_grew_nor_shrank(self):
        still, grown = NormHistory("still", 1 - 2e-7, 1.0, 300.0), NormHistory("grown", 4.0, 0.5, 300.0)
        title = one(norms.grown_layers([still, grown])).title
        assert title.startswith("The norms of 1 of 2 layers grew")
        assert "shrank" not in title

    def test_a_smaller_effective_rate_is_made_up_for_ten_times_at_most(self):
        found = one(norms.norms_so_far([NormHistory("conv", 60.0**2, 1 / 60, 400.0)], STALLED, watched=1))
        assert "10 times the learning rate for `conv`" in found.advice

    def test_eps_that_swamps_the_gradients_is_named(self):
        assert squares.eps_of_adam(0.05, 0.1) == []
        assert one(squares.eps_of_adam(0.2, 0.1)).severity == "watch"
        found = one(squares.eps_of_adam(0.9, 0.1))
        assert found.severity == "act"
        assert "eps = 0.1 is larger than the gradients of 90% of the entries" in found.title

    def test_a_strong_decay_is_told_before_training_too(self):
        assert one(decay.decay_rules([0.025], 600, "sure, by the settings")).severity == "watch"
        assert decay.decay_rules([2e-4], 600) == []
