"""A default device set by the user changes nothing. A stray tensor would land on `meta` and fail to mix with others."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf

torch.manual_seed(0)
X, Y = torch.randn(64, 6).double(), torch.randn(64, 3).double()
SGD = nf.SGDConfig(lr=0.05, batch_size=4, weight_decay=1e-3)
MODELS = {
    "relu": nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).double(),
    "linear": nn.Sequential(nn.Linear(6, 4, bias=False), nn.LayerNorm(4), nn.Linear(4, 5), nn.Linear(5, 3)).double(),
}


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().sum(1)


def results(model: nn.Module) -> dict[str, Any]:
    """Everything that can be asked of a model, as text."""
    data = [(X, Y)]
    syms = nf.find_symmetries(model, X[:2])
    mom = nf.gradient_moments(model, loss, data, syms, entries=True)
    pieces = [(X[i : i + 4], Y[i : i + 4]) for i in range(0, 64, 4)]
    mini = nf.minibatch_moments(model, loss, pieces, syms, batch_size=4)
    factors = nf.gradient_factors(model, loss, data, syms)
    flow = nf.noether_flow(model, syms, mom, SGD, samples=factors)
    eq = nf.noise_equilibrium(model, syms, mom, SGD, samples=factors)
    remeasure = lambda m: nf.gradient_moments(m, placed_loss, data, syms, entries=True)
    again = nf.noise_equilibrium(model, syms, mom, SGD, remeasure=remeasure, max_iterations=2)
    trained = copy.deepcopy(model)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.01, momentum=0.9)
    with nf.Ledger(trained, optimizer, syms) as ledger:
        for _ in range(3):
            optimizer.zero_grad()
            loss(trained, (X, Y)).mean().backward()
            optimizer.step()
        rows = ledger.records(), ledger.estimates()
    return {
        "certificate": nf.certify(model, syms, X[:2]),
        "minibatches": mini,
        "flow": flow,
        "forecast": flow.forecast([0, 100], errors=False),
        "equilibrium": eq,
        "measured again": again,
        "error": nf.standard_error(mom, lambda m: m.batch_grams(syms[0], SGD)[0].sum()),
        "balance": nf.balance_(copy.deepcopy(model), eq, example_inputs=X[:4]),
        "ledger": rows,
    }


def placed_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """As `loss`, by a model that makes tensors where the user's default says."""
    assert torch.empty(0).device == WHERE["device"]
    return loss(model, batch)


WHERE = {"device": torch.device("cpu")}


@pytest.mark.parametrize("name", MODELS)
def test_nothing_depends_on_the_default_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = results(MODELS[name])
    monkeypatch.setitem(WHERE, "device", torch.device("meta"))
    with torch.device("meta"):
        got = results(MODELS[name])
    for what in expected:
        assert str(got[what]) == str(expected[what]), what
