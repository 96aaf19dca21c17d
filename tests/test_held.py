"""Which parameter a saved optimiser state belongs to: by name, by order, or refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import noetherflow as nf
from noetherflow.core.held import held_by, held_in
from noetherflow.errors import CheckpointError

SHAPED = ("exp_avg",)


def trained(groups, named: bool = False):
    """A net with three steps of AdamW on parameter groups that `groups` makes of its named parameters."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    chosen = groups(dict(net.named_parameters()))
    optimizer = torch.optim.AdamW(
        [
            {"params": list(c.items()) if named else list(c.values()), "weight_decay": 0.1 * i}
            for i, c in enumerate(chosen)
        ]
    )
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
    return net, optimizer


def by_kind(parameters):
    """Weights in one group, biases and gains in another: the norm, and another order than the model's."""
    matrices = {n: p for n, p in parameters.items() if p.ndim > 1}
    return matrices, {n: p for n, p in parameters.items() if n not in matrices}


def same_state(net, optimizer, held) -> bool:
    tensors = nf.tensors_of(net)
    return all(torch.equal(optimizer.state[tensors[h.name]]["exp_avg"], h.state["exp_avg"]) for h in held)


@pytest.mark.parametrize("named", [False, True])
def test_groups_by_kind_are_told_apart(named: bool) -> None:
    net, optimizer = trained(by_kind, named)
    held = held_in(optimizer.state_dict(), net, SHAPED)
    assert same_state(net, optimizer, held)
    assert {h.name for h in held if h.settings["weight_decay"] == 0} == {
        n for n, p in net.named_parameters() if p.ndim > 1
    }
    assert [h.name for h in held] == [h.name for h in held_by(optimizer, nf.tensors_of(net))]


def test_same_shapes_in_two_groups_are_refused_without_names() -> None:
    def odd(parameters):
        last = {n: p for n, p in parameters.items() if n.startswith("3.")}
        return last, {n: p for n, p in parameters.items() if n not in last}

    net, optimizer = trained(odd)
    with pytest.raises(CheckpointError, match="two groups"):
        held_in(optimizer.state_dict(), net, SHAPED)
    net, optimizer = trained(odd, named=True)
    assert same_state(net, optimizer, held_in(optimizer.state_dict(), net, SHAPED))


def test_another_model_is_refused() -> None:
    _, optimizer = trained(by_kind)
    other = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    with pytest.raises(CheckpointError, match="shape"):
        held_in(optimizer.state_dict(), other, SHAPED)
