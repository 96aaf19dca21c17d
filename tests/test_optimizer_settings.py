"""AdamConfig, LionConfig and rates by parameter group: what they refuse and the two sums over signs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import typer
from torch import nn

import noetherflow as nf
from noetherflow.cli import main
from noetherflow.cli.options import GivenSettings, OptimizerName
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


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


class Lion(torch.optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 1.0})


class Muon2(torch.optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-4})


class SOAP(Muon2):
    pass


class SignSGD(Muon2):
    pass


class Homemade(Muon2):
    pass


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda p: torch.optim.AdamW(p, lr=2e-3, betas=(0.8, 0.95)), nf.AdamConfig(2e-3, 32, (0.8, 0.95), 1e-8, 1e-2)),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), nf.AdamConfig(1e-3, 32, weight_decay=0.1, decoupled=False)),
        (lambda p: torch.optim.RMSprop(p, lr=1e-3, alpha=0.9), nf.AdamConfig(1e-3, 32, (0.0, 0.9), decoupled=False)),
        (
            lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5, weight_decay=0.1),
            nf.AdamConfig(2e-3, 32, (0.5, 0.99), weight_decay=0.1, decoupled=False),
        ),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), nf.SGDConfig(0.1, 32, 0.0, 0.9, True)),
        (Lion, nf.LionConfig(1e-4, 32, weight_decay=1.0)),
    ],
)
def test_settings_are_read_from_the_optimizer(make: Any, expected: Any) -> None:
    assert nf.optimizer_config(make(net().parameters()), 32) == expected


def test_accelerate_is_looked_into_and_loaders_are_read() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = net()
    data = torch.utils.data.TensorDataset(torch.zeros(40, 3))
    loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
    _, optimizer, prepared = accelerate.Accelerator(cpu=True).prepare(
        model, torch.optim.AdamW(model.parameters(), lr=1e-3), loader
    )
    for given in (loader, prepared):
        config = nf.optimizer_config(optimizer, 8, loader=given)
        assert (config.dataset_size, config.sampling, config.replacement) == (40, "epoch", False)
    drawn = torch.utils.data.RandomSampler(data, replacement=True)
    again = nf.optimizer_config(optimizer, 8, loader=torch.utils.data.DataLoader(data, batch_size=8, sampler=drawn))
    assert (again.sampling, again.replacement) == ("independent", True)
    with pytest.raises(DataError, match="SequentialSampler"):
        nf.optimizer_config(optimizer, 8, loader=torch.utils.data.DataLoader(data, batch_size=8))


def test_groups_of_sgd_are_read_too() -> None:
    model = net()
    groups = [{"params": [model[0].weight, model[2].weight], "weight_decay": 0.1},
              {"params": [model[0].bias, model[2].bias]}]  # fmt: skip
    config = nf.optimizer_config(torch.optim.SGD(groups, lr=0.1, momentum=0.9), 32, model=model)
    assert (config.rates("0.bias").weight_decay, config.rates("0.weight").weight_decay) == (0.0, 0.1)
    assert config.momentum == 0.9


def test_groups_get_their_own_rates() -> None:
    model = net()
    optimizer = torch.optim.AdamW(
        [
            {"params": [model[0].weight, model[2].weight], "weight_decay": 0.1},
            {"params": [model[0].bias, model[2].bias], "weight_decay": 0.0, "lr": 3e-3},
        ],
        lr=1e-3,
    )
    config = nf.optimizer_config(optimizer, 32, model=model)
    assert (config.rates("0.bias").lr, config.rates("0.bias").weight_decay) == (3e-3, 0.0)
    assert (config.rates("2.weight").lr, config.rates("2.weight").weight_decay) == (1e-3, 0.1)
    with pytest.raises(DataError, match="model=model"):
        nf.optimizer_config(optimizer, 32)
    optimizer.param_groups[1]["betas"] = (0.5, 0.5)
    with pytest.raises(DataError, match=r"differ in.*betas"):
        nf.optimizer_config(optimizer, 32, model=model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Muon2, "whole matrices"),
        (SOAP, "rotated basis"),
        (SignSGD, "diffuses at first order"),
        (Homemade, "Homemade"),
        (torch.optim.Adagrad, "Adagrad"),
        (torch.optim.NAdam, "NAdam"),
        (torch.optim.RAdam, "RAdam"),
        (lambda p: torch.optim.Adam(p, amsgrad=True), "amsgrad"),
        (lambda p: torch.optim.SGD(p, lr=1.0, dampening=0.1, momentum=0.1), "dampening"),
        (lambda p: torch.optim.AdamW(p, maximize=True), "maximize"),
        (lambda p: torch.optim.RMSprop(p, centered=True), "centred"),
    ],
)
def test_what_has_no_theory_is_refused_with_the_reason_and_the_way_out(make: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        nf.optimizer_config(make(net().parameters()), 32)
    assert "Ledger" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, nf.SGDConfig(0.05, 16)),
        ({"optimizer": "adamw", "weight_decay": 0.1}, nf.AdamConfig(1e-3, 16, weight_decay=0.1)),
        ({"optimizer": "adam", "betas": (0.5, 0.9)}, nf.AdamConfig(1e-3, 16, (0.5, 0.9), decoupled=False)),
        ({"optimizer": "rmsprop", "betas": (0.5, 0.9)}, nf.AdamConfig(1e-3, 16, (0.0, 0.9), decoupled=False)),
        ({"optimizer": "lion", "lr": 1e-3, "dataset_size": 99}, nf.LionConfig(1e-3, 16, dataset_size=99)),
    ],
)
def test_command_line_options_make_settings(options: dict[str, Any], expected: Any) -> None:
    given = {"optimizer": "sgd", "lr": None, "batch_size": 16, "weight_decay": 0.0} | options
    assert GivenSettings(**given | {"optimizer": OptimizerName(given["optimizer"])}).settings() == expected


def test_options_of_another_optimizer_are_refused() -> None:
    with pytest.raises(typer.BadParameter, match="--betas"):
        GivenSettings(OptimizerName.sgd, 0.1, 16, 0.0, betas=(0.9, 0.99)).settings()
    with pytest.raises(typer.BadParameter, match="--momentum"):
        GivenSettings(OptimizerName.adamw, 0.1, 16, 0.0, momentum=0.9).settings()


def test_analyze_takes_an_optimizer(capsys: Any) -> None:
    for word in ("adamw", "lion"):
        with pytest.raises(SystemExit) as end:
            main(["analyze", "digits-mlp", "--optimizer", word, "--weight-decay", "0.1"])
        assert not end.value.code
        printed = capsys.readouterr().out
        assert word.lower() in printed.lower()
        assert "assumed" in printed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": "0.1", "batch_size": 4}, "lr must be a number, got '0.1'"),
        ({"lr": True, "batch_size": 4}, "lr must be a number, got True"),
        ({"lr": 0.1, "batch_size": 4.5}, "batch_size must be a whole number of samples, got 4.5"),
        ({"lr": 0.1, "batch_size": None}, "batch_size must be a whole number of samples, got None"),
    ],
)
def test_settings_that_are_no_numbers_are_named(settings, message):
    with pytest.raises(DataError, match=message):
        nf.SGDConfig(**settings)
