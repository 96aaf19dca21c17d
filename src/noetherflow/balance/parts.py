"""Model tensors that a file keeps in several: experts that transformers stacks in memory and stores one by one."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from noetherflow.core.unwrap import unwrap


@dataclass(frozen=True)
class Part:
    """Entries of one tensor of the model that a file keeps as a tensor of its own.

    Attributes:
        whole: the model's name.
        shape: of the part, as it is stored.
        strides, start: where its entries lie in the model's tensor when that is contiguous.
    """

    whole: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int

    def of(self, whole: Tensor) -> Tensor:
        """The part as a view of the model's tensor.

        Example:
            >>> Part("experts", (2,), (1,), 4).of(torch.arange(6).reshape(3, 2))
            tensor([4, 5])
        """
        return torch.as_strided(whole, self.shape, self.strides, whole.storage_offset() + self.start)


def parts_of(model: nn.Module) -> dict[str, Part]:
    """The parts, by the name in the file, of a transformers model whose files are laid out in another way than it is.

    What transformers does when it saves is run on a tensor of indices, so nothing is assumed about it. Tensors whose
    name and layout in the file are the model's own are left out, and so are those that come of several.
    """
    loading: Any = sys.modules.get("transformers.core_model_loading")
    revert = getattr(loading, "revert_weight_conversion", None)
    inner = unwrap(model)
    if revert is None or not hasattr(inner, "config"):
        return {}
    named = {n: t for n, t in inner.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    outlines = {n: torch.empty(t.shape, device="meta") for n, t in named.items()}
    try:
        stored = revert(inner, outlines)
    except Exception:  # a layout that transformers itself cannot write from outlines; then names must be the model's
        return {}
    changed = [n for n in named if n not in stored or stored[n].shape != named[n].shape]
    return {} if not changed else _probed(revert, inner, {n: tuple(named[n].shape) for n in changed})


def _probed(revert: Any, model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Part]:
    """What each of these tensors becomes in the file, found by saving the indices of its entries."""
    out: dict[str, Part] = {}
    for name, shape in shapes.items():
        numel = torch.Size(shape).numel()
        indices = torch.arange(numel, dtype=torch.int32 if numel < 2**31 else torch.int64).reshape(shape)
        try:
            found = revert(model, {name: indices})
        except Exception:  # it needs other tensors beside it
            continue
        for stored, values in found.items():
            part = _lattice(name, values.numpy())
            if part is not None:
                out[stored] = part
    return out


def _lattice(whole: str, indices: np.ndarray) -> Part | None:
    """The part with these entries; None where they do not lie on a lattice."""
    if not indices.size:
        return None
    start = int(indices.reshape(-1)[0])
    steps = [int(indices.take(1, axis=a).reshape(-1)[0]) - start if n > 1 else 0 for a, n in enumerate(indices.shape)]
    expected = np.full(indices.shape, start, dtype=np.int64)
    for a, (n, step) in enumerate(zip(indices.shape, steps, strict=True)):
        expected = expected + step * np.arange(n).reshape([-1 if b == a else 1 for b in range(indices.ndim)])
    if min(steps, default=0) < 0 or not np.array_equal(indices, expected):
        return None
    return Part(whole, tuple(indices.shape), tuple(steps), start)
