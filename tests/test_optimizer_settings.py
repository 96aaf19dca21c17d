"""AdamConfig, LionConfig and rates by parameter group: what they refuse and the two sums over signs."""

from __future__ import annotations

import pytest
import torch

import noetherflow as nf
from noetherflow.errors import DataError


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.0, 0.9), (0.95, 0.8)])
def test_lions_sum_of_sign_correlations_by_simulation(betas: tuple[float, float]) -> None:
    """The variance of sums over long windows of the signs of Lion's average of white Gaussian gradients."""
    b1, b2 = betas
    torch.manual_seed(0)
    entries, steps, window = 400, 6000, 1500
    memory, total, sums = torch.zeros(entries), torch.zeros(entries), []
    for k in range(steps + window):
        g = torch.randn(entries)
        if k >= window:
            total = total + (b1 * memory + (1 - b1) * g).sign()
            if (k + 1) % window == 0:
                sums.append(total)
                total = torch.zeros(entries)
        memory = b2 * memory + (1 - b2) * g
    squares = torch.stack(sums).square().flatten() / window
    error = float(squares.std() / len(squares) ** 0.5)
    beta = nf.LionConfig(1e-4, 8, betas=betas).correlation_sum
    assert abs(float(squares.mean()) - beta) < 3 * error + 0.02 * beta, "windows miss a little at their ends"
    assert error < 0.04 * beta


def test_rates_by_group() -> None:
    config = nf.AdamConfig(1e-3, 8, weight_decay=0.1, groups=(nf.GroupRates(("b", "g"), 2e-3, 0.0),))
    assert (config.rates("b").lr, config.rates("b").weight_decay) == (2e-3, 0.0)
    assert (config.rates("w").lr, config.rates("w").weight_decay) == (1e-3, 0.1)


@pytest.mark.parametrize("config", [nf.AdamConfig, nf.LionConfig])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr": 0.0}, "lr must be"),
        ({"lr": float("nan")}, "lr must be"),
        ({"batch_size": 0}, "batch_size"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"weight_decay": 3e3}, "lr \\* weight_decay"),
        ({"sampling": "sometimes"}, "sampling"),
        ({"sampling": "epoch"}, "dataset_size"),
        ({"replacement": True}, "dataset_size"),
        ({"dataset_size": 4}, "larger than"),
        ({"groups": (nf.GroupRates(("a",), 1.0, 0.0), nf.GroupRates(("a", "b"), 2.0, 0.0))}, "two parameter groups"),
    ],
)
def test_settings_out_of_range_are_refused(config, wrong, message) -> None:
    with pytest.raises(DataError, match=message):
        config(**({"lr": 1e-3, "batch_size": 8} | wrong))


def test_negative_eps_is_refused() -> None:
    with pytest.raises(DataError, match="eps"):
        nf.AdamConfig(1e-3, 8, eps=-1e-8)
