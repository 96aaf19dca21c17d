"""What weight decay took in a run: the same however the log was sampled, and told where it is too much."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import noetherflow as nf
from noetherflow.diagnosis.decay import decay_rules, decays_of
from noetherflow.diagnosis.rates import mean_rate, run_rates

pytestmark = pytest.mark.usefixtures("every_finding_says_what_to_do")

STEPS = 240


def trained(every, decay=5e-4, momentum=0.9, frozen=False):
    """The data of a run of SGD under a cosine to 0, and the learning rates of all its steps."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3))
    if frozen:
        net[2].requires_grad_(False)
    weights = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=0.1, momentum=momentum, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    x, y, rates = torch.randn(64, 8), torch.randint(3, (64,)), []
    with nf.Ledger(net, optimizer, nf.find_symmetries(net, x[:2]), every=every) as ledger:
        for _ in range(STEPS):
            some = torch.randint(64, (16,))
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x[some]), y[some])
            loss.backward()
            ledger.note(loss)
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return ledger.run_data(), np.array(rates)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("every", [1, 7, 50])
def test_the_share_is_that_of_the_schedule_however_it_is_recorded(every, momentum):
    data, rates = trained(every, momentum=momentum)
    found = run_rates(data, STEPS)
    assert found.mean == pytest.approx(rates.mean(), rel=1e-6)
    for share in decays_of(data, found.mean):
        assert share == pytest.approx(2 * rates.mean() * 5e-4 / (1 - momentum), rel=2e-3)


def test_mean_rate_is_that_of_a_loop():
    steps = np.array([0, 1, 2, 10, 40])
    lr = np.array([0.0, 0.5, 1.0, 0.8, 0.2])
    at = np.interp(np.arange(41), steps, lr).tolist() + [max(0.0, 0.2 - 0.02 * k) for k in range(1, 60)]
    assert mean_rate(steps, lr, 100) == pytest.approx(np.mean(at))
    assert mean_rate(steps, lr, 41) == pytest.approx(np.mean(at[:41]))
    assert mean_rate(np.array([3]), np.array([0.1]), 50) == pytest.approx(0.1)


def test_without_a_symmetry_the_reason_is_told_and_decay_is_that_of_the_settings():
    data, rates = trained(1, frozen=True)
    assert not data.symmetries
    assert decays_of(data, run_rates(data, STEPS).mean) == pytest.approx([2 * rates.mean() * 5e-4 / 0.1])
    text = str(nf.diagnose_run(data))
    assert "No symmetry is watched" in text
    assert "SGD with momentum only" not in text
    assert "Adam" not in text


class TestStrongDecay:
    def test_planted_and_healthy(self):
        strong, usual = (nf.diagnose_run(trained(1, decay)[0]) for decay in (0.05, 5e-4))
        assert strong["decay-rules"].severity == "watch"
        assert "third of the weight decay" in strong["decay-rules"].advice
        assert "decay-rules" not in {f.rule for f in usual}

    @pytest.mark.parametrize(("share", "steps"), [(1e-3, 10_000), (2e-4, 100_000), (0.02, 100), (float("nan"), 1000)])
    def test_ordinary_settings_and_beginnings_are_not_told(self, share, steps):
        assert decay_rules([share], steps) == []
        assert decay_rules([], steps) == []
