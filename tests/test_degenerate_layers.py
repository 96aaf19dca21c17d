"""Layers without width, norms over one entry, gradients near zero: no error, nothing false."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf

MODELS: dict[str, Callable[[], nn.Module]] = {
    "a layer norm over one entry": lambda: nn.Sequential(
        nn.Linear(4, 1), nn.LayerNorm(1), nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 2)
    ),
    "an instance norm of equal entries": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4)),
        nn.Conv1d(1, 3, 4, padding=1),
        nn.InstanceNorm1d(3, affine=True),
        nn.Flatten(),
        nn.Linear(9, 2),
    ),
    "a layer without width": lambda: nn.Sequential(
        nn.Linear(4, 0), nn.ReLU(), nn.Linear(0, 3), nn.ReLU(), nn.Linear(3, 2)
    ),
    "a layer of width one": lambda: nn.Sequential(nn.Linear(4, 1), nn.ReLU(), nn.Linear(1, 2)),
}


def squares(model: nn.Module, batch: Tensor) -> Tensor:
    out: Tensor = model(batch).square().sum(1)
    return out


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
@pytest.mark.parametrize("size", [1.0, 1e-9])
@pytest.mark.parametrize("what", list(MODELS))
def test_moments_are_those_of_autograd(what: str, size: float) -> None:
    """Sums of squares against one backward pass per sample; `size` makes gradients nearly vanish."""
    torch.manual_seed(0)
    model, x = MODELS[what]().double(), size * torch.randn(8, 4, dtype=torch.float64)
    syms = nf.find_symmetries(model, x)
    moments = nf.gradient_moments(model, squares, [x], syms, entries=True)
    for name, second in moments.squares.items():
        weight = model.get_parameter(name)
        rows = [torch.autograd.grad(squares(model, x[k : k + 1]).sum(), weight)[0].square() for k in range(len(x))]
        torch.testing.assert_close(second, torch.stack(rows).mean(0), rtol=1e-6, atol=1e-26)
    if size == 1.0:  # else eps is all of the variance, and the scale of the input no symmetry
        flow = nf.noether_flow(model, syms, moments, nf.SGDConfig(lr=0.01, batch_size=2))
        assert "nan" not in str(flow).split()
