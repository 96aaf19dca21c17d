"""After a move training goes on as that of a twin that lived at the other point: the next losses, by optimiser."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf

Batch = tuple[Tensor, Tensor]


class Lion(torch.optim.Optimizer):
    """As it is usually written: steps by the sign of an average, which it keeps as `exp_avg`."""

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99), "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.sub_((0.9 * average + 0.1 * p.grad).sign(), alpha=group["lr"])
                average.mul_(0.99).add_(p.grad, alpha=0.01)


MAKERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=3e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1, betas=(0.9, 0.99)),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=3e-3, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=3e-3),
    "radam": lambda p: torch.optim.RAdam(p, lr=3e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "lion": lambda p: Lion(p),
}
if hasattr(torch.optim, "Muon"):
    MAKERS["muon"] = lambda p: torch.optim.Muon(p, lr=1e-2, weight_decay=0.0)


def batches(count: int, seed: int) -> list[Batch]:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 16, 6, generator=rng, dtype=torch.float64)
    return [(a, a[:, :2].sin() + 0.1 * torch.randn(16, 2, generator=rng, dtype=torch.float64)) for a in x]


def losses(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[Batch]) -> list[float]:
    out = []
    for x, y in data:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        out.append(float(loss.detach()))
    return out


def lived(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A past at these weights: 30 steps fill the optimiser's state, and each is taken back."""
    here = copy.deepcopy(model.state_dict())
    for batch in batches(30, seed=1):
        losses(model, optimizer, [batch])
        model.load_state_dict(here)


def net() -> tuple[nn.Sequential, nf.Equilibrium]:
    """A ReLU net off the point of least norm, and that point."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 2, bias=False)).double()
    with torch.no_grad():
        model[0].weight.mul_(torch.linspace(0.6, 2.0, 5, dtype=torch.float64)[:, None])
    syms = nf.find_symmetries(model, batches(1, seed=2)[0][0])
    return model, nf.noise_equilibrium(model, syms, objective="norm")


@pytest.mark.parametrize("name", MAKERS)
def test_the_next_losses_are_those_of_a_twin_that_lived_there(name: str) -> None:
    model, there = net()
    inputs, after = batches(1, seed=2)[0][0], batches(20, seed=3)
    twin = copy.deepcopy(model)
    nf.balance_(twin, there, example_inputs=inputs)
    alone = copy.deepcopy(model)
    optimizers = [MAKERS[name](m.parameters()) for m in (model, twin, alone)]
    for one, optimizer in zip((model, twin, alone), optimizers, strict=True):
        lived(one, optimizer)
    report = nf.balance_(model, there, optimizers[0], example_inputs=inputs)
    assert not report.unmoved
    nf.balance_(alone, there, example_inputs=inputs)
    moved, lives, forgets = (
        torch.tensor(losses(m, o, after)) for m, o in zip((model, twin, alone), optimizers, strict=True)
    )
    torch.testing.assert_close(moved, lives, rtol=1e-7, atol=0.0)
    assert float((forgets - lives).abs().max() / lives.abs().max()) > 1e-4, "a state left behind shows"


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_decay_inside_the_gradients_makes_the_move_approximate_and_that_is_said(kind: Any) -> None:
    model, there = net()
    inputs, after, more = batches(1, seed=2)[0][0], batches(20, seed=3), {"lr": 3e-3, "weight_decay": 0.1}
    twin = copy.deepcopy(model)
    nf.balance_(twin, there, example_inputs=inputs)
    more |= {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizers = [kind(m.parameters(), **more) for m in (model, twin)]
    lived(model, optimizers[0])
    lived(twin, optimizers[1])
    report = nf.balance_(model, there, optimizers[0], example_inputs=inputs)
    assert any("its weight-decay part moves like a weight" in line for line in report.approximate_state)
    moved, lives = (torch.tensor(losses(m, o, after)) for m, o in zip((model, twin), optimizers, strict=True))
    assert 1e-7 < float((moved - lives).abs().max() / lives.abs().max()) < 0.05


def test_codes_of_eight_bits_stay_and_are_listed() -> None:
    """Whole numbers are codes of some table: scaled, they would be other codes."""
    model, there = net()
    optimizer = MAKERS["adamw"](model.parameters())
    lived(model, optimizer)
    for state in optimizer.state.values():
        state["exp_avg"] = (state["exp_avg"] * 1e3).to(torch.int8)
        state["exp_avg_sq"] = (state["exp_avg_sq"] * 1e4).to(torch.uint8)
    before = [state["exp_avg"].clone() for state in optimizer.state.values()]
    report = nf.balance_(model, there, optimizer, example_inputs=batches(1, seed=2)[0][0])
    assert {line.split(" left as it was")[0] for line in report.unmoved} == {
        f"{name}: {key}" for name in ("0.weight", "2.weight") for key in ("exp_avg", "exp_avg_sq")
    }
    for state, old in zip(optimizer.state.values(), before, strict=True):
        assert torch.equal(state["exp_avg"], old)
