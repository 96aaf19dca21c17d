"""Entry-wise `sum_z g_z^2` by other means: `vmap(grad)`, Opacus, BackPACK. None of them is a dependency.

Install for comparison: `pip install --no-deps opacus backpack-for-pytorch opt_einsum einops unfoldNd`.
Each factory returns a function of one batch that gives `{parameter: sum over samples of g^2}`, or raises.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Squares = dict[str, Tensor]
Peer = Callable[[nn.Module, Any], Callable[[Any], Squares]]


def by_vmap(model: nn.Module, loss_fn: Any) -> Callable[[Any], Squares]:
    params = {n: p.detach() for n, p in model.named_parameters()}

    def one(values: Squares, x: Tensor, y: Tensor) -> Tensor:
        out = torch.func.functional_call(model, values, (x[None],))
        return F.cross_entropy(out.flatten(0, -2), y.flatten(), reduction="mean")

    grads = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))
    return lambda batch: {n: g.square().sum(0) for n, g in grads(params, *batch).items()}


def by_opacus(model: nn.Module, loss_fn: Any) -> Callable[[Any], Squares]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.grad_sample import GradSampleModule

        wrapped = GradSampleModule(copy.deepcopy(model), loss_reduction="sum")

    def squares(batch: Any) -> Squares:
        wrapped.zero_grad()
        loss_fn(wrapped, batch).sum().backward()
        out = {n.removeprefix("_module."): p.grad_sample.square().sum(0) for n, p in wrapped.named_parameters()}
        for p in wrapped.parameters():
            p.grad_sample = None
        return out

    return squares


def by_backpack(model: nn.Module, loss_fn: Any) -> Callable[[Any], Squares]:
    """Refuses what its extensions skip without a word: normalisation with sequences, attention, functional calls."""
    from backpack import backpack, extend
    from backpack.extensions import SumGradSquared

    supported = (nn.Linear, nn.ReLU, nn.Conv2d, nn.Flatten, nn.Sequential)
    foreign = {type(m).__name__ for m in model.modules() if not isinstance(m, supported)}
    if foreign:
        raise NotImplementedError(f"not extended: {sorted(foreign)}")
    extended, criterion = extend(copy.deepcopy(model)), extend(nn.CrossEntropyLoss(reduction="sum"))

    def squares(batch: Any) -> Squares:
        extended.zero_grad()
        with backpack(SumGradSquared()):
            criterion(extended(batch[0]), batch[1]).backward()
        return {n: p.sum_grad_squared for n, p in extended.named_parameters()}

    return squares


PEERS: dict[str, Peer] = {"vmap(grad)": by_vmap, "Opacus": by_opacus, "BackPACK": by_backpack}
