"""Declared symmetries, symmetry sets and settings: what they accept and how they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import noetherflow as nf
from noetherflow.errors import DataError, DeclarationError


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def test_a_declared_rescaling_leaves_the_function_unchanged():
    model = mlp().double()
    syms = nf.declare(model, "diagonal", plus=[("0.weight", 0), ("0.bias", 0)], minus=[("2.weight", 1)])
    x = torch.randn(5, 3, dtype=torch.float64)
    before = model(x)
    syms[0].act_(nf.tensors_of(model), torch.tensor([0.5, 2.0, 3.0, 0.1], dtype=torch.float64))
    assert torch.allclose(model(x), before, rtol=1e-13)
    assert syms.n_charges() == 4


def test_a_flattened_channel_axis_is_read_as_replicas():
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).double()
    syms = nf.declare(model, "diagonal", plus=[("0.weight", 0), ("0.bias", 0)], minus=[("3.weight", 1)])
    x = torch.randn(2, 1, 3, 3, dtype=torch.float64)
    before = model(x)
    syms[0].act_(nf.tensors_of(model), torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64))
    assert torch.allclose(model(x), before, rtol=1e-13)


def test_general_linear_blocks():
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)).double()
    syms = nf.declare(model, "general_linear", plus=[("0.weight", 0)], minus=[("1.weight", 1)], blocks=2)
    x = torch.randn(5, 3, dtype=torch.float64)
    before = model(x)
    syms[0].act_(nf.tensors_of(model), syms[0].random_element())
    assert torch.allclose(model(x), before, rtol=1e-12)
    assert syms.n_charges() == 6


class OffsetGain(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain, self.out = nn.Parameter(0.1 * torch.randn(3)), nn.Linear(3, 2)

    def forward(self, x):
        return self.out(nn.functional.rms_norm(x, (3,)) * (1 + self.gain))


def test_a_declared_offset_gain_is_exact_and_a_plain_one_is_broken():
    model, x = OffsetGain().double(), torch.randn(5, 3, dtype=torch.float64)
    legs = {"plus": [("gain", 0)], "minus": [("out.weight", 1)]}
    right = nf.declare(model, "diagonal", **legs, offsets={"gain": 1.0})
    wrong = nf.declare(model, "diagonal", **legs)
    assert nf.certify(model, right, x).rows[0].verdict == "exact"
    assert nf.certify(model, wrong, x).rows[0].verdict == "broken"
    with pytest.raises(DeclarationError, match=r"offsets name \['gian'\]"):
        nf.declare(model, "diagonal", **legs, offsets={"gian": 1.0})


@pytest.mark.parametrize(
    ("kind", "plus", "blocks", "message"),
    [
        ("diagonal", [], 1, "at least one leg"),
        ("diagonal", [("0.wieght", 0)], 1, "did you mean.*0.weight"),
        ("diagonal", [("0.weight", 2)], 1, "no axis 2"),
        ("diagonal", [("0.weight", 0), ("0.weight", 1)], 1, "not a multiple"),
        ("general_linear", [("0.weight", 0)], 3, "does not split"),
        ("diagonal", [("0.weight", 0)], 2, "blocks=2"),
    ],
)
def test_bad_declarations_name_the_problem(kind, plus, blocks, message):
    with pytest.raises(DeclarationError, match=message):
        nf.declare(mlp(), kind, plus=plus, blocks=blocks)


def test_tied_tensors_appear_once():
    model = mlp()
    model.again = model[0]
    assert sum(t is model[0].weight for t in nf.tensors_of(model).values()) == 1


def test_set_filter_exclude_and_json_round_trip():
    model = mlp()
    syms = nf.declare(model, "diagonal", plus=[("0.weight", 0), ("0.bias", 0)], minus=[("2.weight", 1)])
    assert len(syms.filter(parameter="0.bias")) == 1
    assert len(syms.filter(module="2")) == 1
    assert len(syms.filter(family="attention-vo")) == 0
    again = nf.SymmetrySet.from_json(syms.to_json())
    assert str(again) == str(syms)
    assert again.n_charges() == 4
    model[2].weight.requires_grad_(False)
    frozen = syms.trainable(model)
    assert len(frozen) == 0
    assert "2.weight" in str(frozen)
    with pytest.raises(KeyError, match="no symmetry named"):
        syms["nope"]


def test_sgd_config_reads_an_optimizer_and_refuses_nonsense():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)
    sgd = nf.SGDConfig.from_optimizer(optimizer, 32, dataset_size=100)
    assert sgd == nf.SGDConfig(0.1, 32, 1e-3, 0.9, True, 100)
    assert sgd.effective_lr == pytest.approx(1.0)
    assert sgd.covariance_factor == pytest.approx((100 - 32) / 99 / 32)
    again = nf.SGDConfig.from_optimizer(optimizer, 128, dataset_size=100, replacement=True)
    assert again.covariance_factor == pytest.approx(1 / 128)
    with pytest.raises(DataError, match="Adam"):
        nf.SGDConfig.from_optimizer(torch.optim.Adam(model.parameters()), 32)
    for bad in (
        {"lr": -1, "batch_size": 1},
        {"lr": 1, "batch_size": 0},
        {"lr": 1, "batch_size": 1, "momentum": 1.0},
        {"lr": 1, "batch_size": 8, "dataset_size": 4},
        {"lr": 1, "batch_size": 8, "replacement": True},
        {"lr": float("nan"), "batch_size": 1},
        {"lr": 4.0, "batch_size": 1, "weight_decay": 0.5},
    ):
        with pytest.raises(DataError):
            nf.SGDConfig(**bad)
    groups = [{"params": [model[0].weight], "lr": 0.1}, {"params": [model[2].weight], "lr": 0.2}]
    with pytest.raises(DataError, match=r"groups differ in \{'lr': \[0.1, 0.2\]\}: a symmetry joins"):
        nf.SGDConfig.from_optimizer(torch.optim.SGD(groups), 4)
    with pytest.raises(DataError, match="decay alone makes the weights grow"):
        nf.SGDConfig(3.0, 4, weight_decay=1.0)


def test_without_replacement_factor_is_the_exact_variance_of_a_batch_mean():
    """Brute force over every batch of 2 from 5 numbers."""
    import itertools

    z = torch.tensor([1.0, 4.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    means = torch.stack([z[list(b)].mean() for b in itertools.combinations(range(5), 2)])
    factor = nf.SGDConfig(0.1, 2, dataset_size=5).covariance_factor
    assert torch.allclose(means.var(unbiased=False), factor * z.var(unbiased=False))
