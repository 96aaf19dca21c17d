"""The ledger of a fused optimiser under a gradient scaler, which divides by the scale inside its step."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import noetherflow as nf

OPTIMIZERS: dict[str, Any] = {
    "sgd": torch.optim.SGD,
    "heavy ball": partial(torch.optim.SGD, momentum=0.9),
    "nesterov": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "adam": torch.optim.Adam,
}


def rows(optimizer: str, scale: float | None) -> list[dict[str, Any]]:
    """Three steps, every entry at each; of a rescaling that is none, so that the gradient has an entry of its own."""
    torch.manual_seed(8)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))
    x = torch.randn(8, 3)
    made = OPTIMIZERS[optimizer](model.parameters(), lr=0.01, weight_decay=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    syms = nf.declare(model, "diagonal", [("0.weight", 0), ("0.bias", 0)], [("2.weight", 1)])
    with nf.Ledger(model, made, syms, every=1) as ledger:
        for _ in range(3):
            made.zero_grad()
            scaler.scale(model(x).square().mean()).backward()
            scaler.step(made)
            scaler.update()
        return list(ledger.records())


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.*")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_entries_are_of_unscaled_gradients(optimizer: str) -> None:
    plain, scaled = rows(optimizer, None), rows(optimizer, 1024.0)
    numbers = [k for k, v in plain[0].items() if isinstance(v, float)]
    assert any(abs(row["gradient"]) > 1e-4 for row in plain) or optimizer == "adam"
    assert len(plain) == len(scaled) > 0
    for a, b in zip(plain, scaled, strict=True):
        for k in numbers:
            assert b[k] == pytest.approx(a[k], rel=1e-3, abs=1e-6, nan_ok=True), k
