"""Weights and inputs in general position: what holds there holds, with probability one, everywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from noetherflow.core.inputs import ModelInputs

JITTER = 0.1
"""Deviation of jittered weights, relative to the root mean square of their tensor."""


def random_inputs(inputs: ModelInputs, rng: torch.Generator) -> ModelInputs:
    """Floating inputs drawn anew with the mean and deviation of the given ones; other inputs stay.

    Args:
        inputs: the example. A tensor of equal values (zeros, say) is replaced by draws around that value.
        rng: a generator on the CPU.

    Returns:
        Inputs of the same shapes. Tensors of one entry, and those with infinities (masks), are as given.
    """

    def draw(x: Tensor) -> Tensor:
        if not x.is_floating_point() or x.numel() < 2 or not bool(torch.isfinite(x).all()):
            return x
        deviation = float(x.std()) or float(x.abs().max()) or 1.0
        return x.mean() + deviation * _normal(x, rng)

    return inputs.map(draw)


def jittered_weights(weights: Mapping[str, Tensor], rng: torch.Generator) -> dict[str, Tensor]:
    """Weights near the given ones: no tensor is zero, no two entries are equal by accident.

    A symmetry that leaves out a bias holds while that bias is zero, as it is in a fresh model, and nowhere near it.

    Args:
        weights: floating tensors by name.
        rng: a generator on the CPU.

    Returns:
        New tensors of the same shapes and devices.
    """
    return {name: w.detach() + JITTER * _scale(w) * _normal(w, rng) for name, w in weights.items()}


def redrawn_weights(weights: Mapping[str, Tensor], rng: torch.Generator) -> dict[str, Tensor]:
    """Weights that forget the given ones, with the same size of each tensor: dead and always active units wake up.

    Args:
        weights: floating tensors by name.
        rng: a generator on the CPU.

    Returns:
        New tensors of the same shapes and devices.
    """
    return {name: _scale(w) * _normal(w, rng) for name, w in weights.items()}


def padding_kept(model: nn.Module, tensors: Mapping[str, Tensor], drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drawn weights with the rows of padding tokens as they were: autograd gives these rows no gradient, ever.

    Args:
        model: the module whose embeddings are meant.
        tensors: its tensors by canonical name.
        drawn: new weights by name.

    Returns:
        The drawn weights, those of embeddings with a padding row in new tensors.
    """
    names, kept = {id(t): n for n, t in tensors.items()}, dict(drawn)
    for module in model.modules():
        row = getattr(module, "padding_idx", None)
        weight = getattr(module, "weight", None)
        if isinstance(row, int) and isinstance(weight, Tensor) and (name := names.get(id(weight))) in kept:
            kept[name] = kept[name].clone()
            kept[name][row] = weight.detach()[row]
    return kept


def redrawn_statistics(model: nn.Module, tensors: Mapping[str, Tensor], rng: torch.Generator) -> dict[str, Tensor]:
    """Running statistics of batch normalisations, drawn around the present ones; a fresh model has means of zero.

    Args:
        model: the module whose normalisations are meant.
        tensors: its tensors by canonical name.
        rng: a generator on the CPU.

    Returns:
        New running means and variances by name.
    """
    names = {id(t): n for n, t in tensors.items()}
    drawn = {}
    for module in model.modules():
        mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if isinstance(mean, Tensor) and isinstance(variance, Tensor) and {id(mean), id(variance)} <= names.keys():
            drawn[names[id(mean)]] = mean + JITTER * variance.abs().sqrt() * _normal(mean, rng)
            drawn[names[id(variance)]] = variance * (JITTER * _normal(variance, rng)).exp()
    return drawn


def _normal(like: Tensor, rng: torch.Generator) -> Tensor:
    return torch.randn(like.shape, dtype=torch.float64, generator=rng, device="cpu").to(like)


def _scale(w: Tensor) -> float:
    """Root mean square of a tensor; of a tensor of zeros, what a fresh layer of its shape would have."""
    size = float(w.detach().square().mean().sqrt()) if w.numel() else 0.0
    return size or 1 / math.sqrt(max(1, w.numel() // max(1, w.shape[0] if w.ndim else 1)))
