"""A diagnosis under a learning rate schedule follows the rates of all steps, and leaves the scheduler alone."""

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
from noetherflow.core.schedule import CONSTANT, RateCourse, rates_of, warmup_of
from noetherflow.diagnosis.facts import LayerBalance, ScaleInvariantNorm, StepStability
from noetherflow.diagnosis.norms import norm_growth
from noetherflow.diagnosis.of_model import _under_schedule
from noetherflow.diagnosis.scheduled import at_peak
from noetherflow.diagnosis.stability import learning_rate
from noetherflow.errors import DataError

STEPS = 120
SCHEDULERS = {
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda k: min(1, (k + 1) / 50)),
    "warmup, cosine": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=50), lr_scheduler.CosineAnnealingLR(o, STEPS - 50)],
        [50],
    ),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=STEPS),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.1, total_iters=50), lr_scheduler.ExponentialLR(o, 0.99)]
    ),
    "steps": lambda o: lr_scheduler.MultiStepLR(o, [20, 70]),
}


def optimizer_of(kind=torch.optim.SGD, groups=False, **options):
    net = nn.Linear(3, 2)
    rows = [{"params": [net.weight], "lr": 0.2}, {"params": [net.bias]}] if groups else net.parameters()
    return kind(rows, lr=0.1, **options)


def state_of(optimizer, scheduler):
    """Everything that a scheduler may write to, as text: schedulers hold others, and state dicts are shared."""
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return repr((groups, scheduler.state_dict(), sorted(vars(optimizer)), len(optimizer.state)))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("begun", [0, 30])
@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_rates_are_those_of_a_training_and_the_scheduler_stays_as_it_is(name, groups, begun):
    optimizer = optimizer_of(groups=groups)
    scheduler = SCHEDULERS[name](optimizer)

    def along(steps):
        rates = []
        for _ in range(steps):
            rates.append([g["lr"] for g in optimizer.param_groups])
            optimizer.step()
            scheduler.step()
        return rates

    along(begun)
    before, params = state_of(optimizer, scheduler), [g["params"] for g in optimizer.param_groups]
    found = rates_of(scheduler, STEPS - 1 - begun)
    assert state_of(optimizer, scheduler) == before
    assert all(a is b for a, b in zip(params, (g["params"] for g in optimizer.param_groups), strict=True))
    np.testing.assert_array_equal(found, along(STEPS - 1 - begun))


def test_a_tensor_rate_is_not_written_to():
    optimizer = optimizer_of(torch.optim.Adam)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    assert rates_of(scheduler, 3).ravel().tolist() == pytest.approx([0.1, 0.05, 0.025])
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (lambda o: lr_scheduler.ReduceLROnPlateau(o), "depend on losses to come"),
        (lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=20), "ends after"),
        (lambda o: [0.1] * 29, "one rate for each step"),
        (lambda o: [0.1] * 29 + [math.nan], "finite"),
        (lambda o: lambda k: -0.1, "negative"),
        (lambda o: lambda k: 0.0, "all zero"),
        (lambda o: lambda k: None, "must be a number"),
        (lambda o: "cosine", "must be a torch LRScheduler"),
        (lambda o: 0.1, "must be a torch LRScheduler"),
    ],
)
def test_what_is_no_schedule_is_refused(schedule, words):
    with pytest.raises(DataError, match=words):
        rates_of(schedule(optimizer_of()), 30)


@pytest.mark.parametrize("stated", [1, 7, 50, 333])
def test_both_ways_to_write_a_linear_warmup_have_its_length(stated):
    at = np.arange(1000)
    for rise in ((at + 1) / stated, at / stated, 0.1 + 0.9 * at / stated):
        for after in (np.ones(1000), 0.5 * (1 + np.cos(np.pi * np.clip(at - stated, 0, None) / 1000))):
            rates = 3e-4 * np.where(rise < 1, rise, after)
            assert warmup_of(rates) == (stated if stated > 1 or rates[0] < rates.max() else 0)
    decaying = 0.5 * (1 + np.cos(np.pi * at / 1000))
    assert warmup_of(np.minimum(1, (at + 1) / stated) * decaying) == (stated if stated > 1 else 0)
    assert warmup_of(np.linspace(1, 0, 100)) == warmup_of(np.ones(100)) == 0


def random_course(seed=0, steps=300):
    rates = np.random.default_rng(seed).uniform(0, 0.1, steps)
    return rates, RateCourse.of(rates)


def test_what_decay_leaves_and_noise_adds_is_that_of_a_loop():
    rates, course = random_course()
    square, added = 1.0, 0.0
    for share in rates / rates.max():
        left = math.exp(-0.01 * share)
        square, added = square * left, added * left + share**2 * (1 - left) / (0.01 * share)
    assert course.kept(0.01, 300) == pytest.approx((square, added))
    assert CONSTANT.kept(0.01, 300) == pytest.approx((math.exp(-3), (1 - math.exp(-3)) / 0.01))
    assert CONSTANT.kept(0.0, 300) == pytest.approx((1.0, 300))
    assert course.kept(0.0, 300) == pytest.approx((1.0, ((rates / rates.max()) ** 2).sum()))


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("horizon", [40.0, math.inf])
def test_growth_of_a_norm_follows_the_rates(power, horizon):
    """SGD: `d(n^2) = 2 s^2 g n_0 - 2 s d n^2`, Adam: `dn = s^2 g - s d n`, a hundredth of a step at a time."""
    rates, course = random_course()
    fact = ScaleInvariantNorm("w", 4.0, 0.2, None, 0.003, power, horizon, 0.02, course)
    norm, gone = 4.0, 0.0
    for share in rates / rates.max():
        for _ in range(100):
            growth = 0.2 if gone < horizon else 0.02
            push = share**2 * growth * (4.0 / norm if power == 2 else 1.0)
            norm += (push - share * 0.003 * norm) / 100
            gone += share / 100
    assert fact.norm_factor(300) == pytest.approx(norm / 4, rel=2e-3)
    assert "times today's, schedule apart" in norm_growth([replace(fact, growth=2.0)], 300)[0].title
    steady = replace(fact, course=RateCourse.of(np.full(300, 0.1)))
    assert steady.norm_factor(300) == pytest.approx(replace(fact, course=CONSTANT).norm_factor(300))


def model_of(lr=0.05, kind=torch.optim.SGD, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    return net, kind(net.parameters(), lr=lr, **options)


def data():
    torch.manual_seed(1)
    return [(torch.randn(16, 6), torch.randint(3, (16,))) for _ in range(16)]


def told(net, optimizer, asked="", **options):
    return nf.diagnose(
        net, nn.CrossEntropyLoss(), data(), optimizer, progress=lambda _: None, curvature="warmup" in asked, **options
    )


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_weight_decay_is_that_of_the_integral_of_the_rates(kind):
    """A cosine from 0.05 to 0 takes half of what the constant rate does, whichever way it is given."""
    rates = 0.05 * 0.5 * (1 + np.cos(np.pi * np.arange(1000) / 1000))
    expected = 1 - math.exp(-2 * 0.02 * rates.sum())
    for schedule in (rates, rates.tolist(), lambda k: rates[k], "scheduler"):
        net, optimizer = model_of(kind=kind, weight_decay=0.02)
        if isinstance(schedule, str):
            schedule = lr_scheduler.CosineAnnealingLR(optimizer, 1000)
        found = told(net, optimizer, steps=1000, schedule=schedule)["decay-bites"]
        assert int(re.search(r"takes (\d+)%", found.title)[1]) == round(100 * expected)
        assert "cosine" not in found.title
        assert found.sure == "sure for the schedule given"
    assert "takes 86%" in told(net, optimizer, steps=1000)["decay-bites"].title


def test_a_constant_schedule_is_the_rate_itself_and_less_of_it_is_a_shorter_run():
    plain = told(*model_of(0.02, weight_decay=1e-3), steps=1000)
    same = told(*model_of(0.5, weight_decay=1e-3), steps=1000, schedule=[0.02] * 1000)
    assert plain["decay-bites"].title.split(" at a")[0] in same["decay-bites"].title
    assert {f.rule: (f.severity, f.evidence) for f in same} == {f.rule: (f.severity, f.evidence) for f in plain}
    part = told(*model_of(0.02, weight_decay=1e-3), steps=1000, schedule=[0.02] * 100 + [0.0] * 900)
    short = told(*model_of(0.02, weight_decay=1e-3), steps=100)
    shares = [re.search(r"takes ([\d.]+) of", d["decay-bites"].title)[1] for d in (part, short)]
    assert shares[0] == shares[1]


def test_steps_to_equilibrium_are_those_of_the_noise_that_the_rates_make():
    """At a quarter of the mean square, noise takes four times the steps."""
    even = LayerBalance("a", "rescaling", "unit", np.zeros(2), np.zeros(2), 60.0, each=(30.0, 90.0))
    found = _under_schedule(even, RateCourse.of(np.array([1.0, 0.5, 0.0])))
    assert (found.steps, *found.each) == pytest.approx((144.0, 72.0, 216.0))
    net, optimizer = model_of(0.05)
    with torch.no_grad():
        net[0].weight[0].mul_(30)
        net[2].weight[:, 0].div_(30)
    steady, half = (told(net, optimizer, steps=1000, schedule=s) for s in ([0.05] * 1000, [0.05] * 250 + [0.0] * 750))
    steps = [float(re.search(r"some ([\d,]+) steps", str(d["balance"]))[1].replace(",", "")) for d in (steady, half)]
    assert steps[1] == pytest.approx(4 * steps[0], rel=1e-3)


def test_the_warmup_is_that_of_the_schedule():
    net, optimizer = model_of(weight_decay=1e-3)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda k: min(1, (k + 1) / 50))
    before = state_of(optimizer, scheduler)
    found = told(net, optimizer, "warmup", steps=1000, schedule=scheduler)
    assert state_of(optimizer, scheduler) == before
    assert "a warmup of 50 steps" in found.subject
    assert "warmup of 50 steps" in str(found["learning-rate"])
    assert found["learning-rate"].evidence[0].value == 0.05
    with pytest.raises(DataError, match="warmup=20"):
        told(net, optimizer, steps=1000, schedule=scheduler, warmup=20)


def test_a_warmup_counts_by_the_noise_that_it_lets_act():
    fact = StepStability(0.1, 3.0, math.nan, math.nan, math.nan, 100.0, 100.0, 120, False)
    (linear,) = learning_rate(fact)
    assert linear.severity == "good"
    steep = RateCourse.of(np.concatenate([(np.arange(120) / 120) ** 4, np.ones(500)]))
    assert steep.linear_warmup == pytest.approx(3 * sum((k / 120) ** 8 for k in range(120)))
    (slow,) = learning_rate(replace(fact, linear=steep.linear_warmup))
    assert slow.severity == "act"
    assert "the warmup of 120 steps (which acts as a linear one of 39) is too short" in slow.title


def test_groups_keep_their_ratio_and_settings_go_to_the_peak():
    optimizer = optimizer_of(groups=True)
    at, course = at_peak(optimizer, lambda k: 0.4 / (1 + k), 10)
    assert [g["lr"] for g in at.param_groups] == pytest.approx([0.4, 0.2])
    assert [g["lr"] for g in optimizer.param_groups] == [0.2, 0.1]
    assert course.mean == pytest.approx(np.mean(1 / (1 + np.arange(10))))
    settings, _ = at_peak(nf.SGDConfig(lr=0.1, batch_size=4), [0.2, 0.1], 2)
    assert settings.lr == 0.2
    with pytest.raises(DataError, match="another's"):
        at_peak(optimizer_of(), lr_scheduler.ExponentialLR(optimizer, 0.9), 10)
