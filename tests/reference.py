"""Obviously right, slow references shared by the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from noetherflow import SymmetrySet, tensors_of
from noetherflow.moments.result import GradientMoments


def per_sample_gradients(
    model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any
) -> list[dict[str, Tensor]]:
    """One `autograd.grad` call per sample: a list over samples of {canonical parameter name: gradient}."""
    params = {n: p for n, p in tensors_of(model).items() if isinstance(p, nn.Parameter) and p.requires_grad}
    losses = loss_fn(model, batch)
    gradients = []
    for i in range(len(losses)):
        grads = torch.autograd.grad(losses[i], list(params.values()), retain_graph=True, allow_unused=True)
        gradients.append(
            {
                n: torch.zeros_like(p) if g is None else g.detach()
                for (n, p), g in zip(params.items(), grads, strict=True)
            }
        )
    return gradients


def moments_by_loop(
    model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batches: Iterable[Any], syms: SymmetrySet
) -> GradientMoments:
    """GradientMoments (entries included, no groups) from `per_sample_gradients`, float64."""
    gradients, losses = [], []
    for batch in batches:
        gradients += per_sample_gradients(model, loss_fn, batch)
        losses += loss_fn(model, batch).detach().double().tolist()
    n = len(gradients)
    doubles = [{k: v.double() for k, v in g.items()} for g in gradients]
    second = {}
    for s in syms:
        per_sample = [s.grams(g) for g in doubles]
        second[s.name] = tuple(sum(legs[i] for legs in per_sample) / n for i in range(len(s.weight_legs)))
    names = list(doubles[0])
    return GradientMoments(
        samples=n,
        loss=sum(losses) / n,
        second=second,
        mean={k: sum(g[k] for g in doubles) / n for k in names},
        squares={k: sum(g[k].square() for g in doubles) / n for k in names},
    )


def without_buffers(syms: SymmetrySet) -> SymmetrySet:
    """The same symmetries without the legs on running statistics, which carry no charge.

    For comparing moments of a batch norm in evaluation mode with a loop over samples that computes just those.
    """
    return SymmetrySet(tuple(replace(s, legs=s.weight_legs) for s in syms), shapes=syms.shapes)
