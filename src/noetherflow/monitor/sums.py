"""Inner products over tensors in slices, and the table that all of them end in."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from noetherflow.monitor import sharding
from noetherflow.monitor.rule import StepTensors

SLICE = 1 << 18
PLAIN = (torch.float32, torch.float64)
Value = float | Tensor
"""An inner product: a number, or a tensor of all leg values of one parameter."""


@dataclass(frozen=True, eq=False)
class LayerSums:
    """Of one step: sums over the entries of every layer, `[layers]`, on the weights' device.

    `weight`: `|W|^2`; `gradient`: `|g|^2` of the minibatch gradient; `lasting`: `<g, h>` with `h` the average of
    earlier minibatch gradients out of the momentum buffer, NaN where the optimiser keeps none.
    """

    weight: Tensor
    gradient: Tensor
    lasting: Tensor


def totals(
    parts: Sequence[StepTensors],
    pairs_of: Callable[[StepTensors], Mapping[str, tuple[Tensor, Tensor]]],
    known: Container[str] = (),
) -> dict[str, Value]:
    """`<a, b>` for all pairs, summed over slices; on a CPU plain numbers, the slices added in double precision.

    Slices keep what `pairs_of` forms, and what several products read, in the cache and small. Pairs of the names in
    `known` are left out.
    """
    sums: dict[str, Value] = {}
    for part in parts:
        for q, (a, b) in pairs_of(part).items():
            if q in known:
                continue
            product = torch.dot(a, b)
            value: Value = product.item() if product.is_cpu else product
            sums[q] = sums[q] + value if q in sums else value
    return sums


def slices(tensors: StepTensors) -> list[StepTensors] | None:
    """Flat views of local tensors of one shape, in slices on a CPU; None if one is not contiguous or half precision."""
    flat: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = sharding.local(tensor, True)
        if plain.dtype not in PLAIN or not plain.is_contiguous():
            return None
        flat[name] = plain.view(-1)
    first = next(iter(flat.values()))
    if first.numel() <= SLICE or not first.is_cpu:
        return [flat]
    return [dict(zip(flat, piece, strict=True)) for piece in zip(*(t.split(SLICE) for t in flat.values()), strict=True)]


def tabulate(rows: Sequence[Sequence[Sequence[Value]]], sizes: Sequence[int]) -> np.ndarray:
    """`rows[q][t][j]`, `sizes[j]` numbers each (a plain number stands for all of them), as float64 `[q, t, n]`."""
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
    tensors: list[Tensor] = []
    places: list[tuple[int, int, int]] = []
    for q, steps in enumerate(rows):
        for t, row in enumerate(steps):
            for j, value in enumerate(row):
                if isinstance(value, Tensor):
                    tensors.append(value.reshape(-1))
                    places.append((q, t, j))
    if not tensors and all(s == 1 for s in sizes):
        return np.array(rows, dtype=np.float64).reshape(len(rows), len(rows[0]), len(sizes))
    table = np.zeros((len(rows), len(rows[0]), starts[-1]))
    for q, steps in enumerate(rows):
        for t, row in enumerate(steps):
            table[q, t] = np.repeat([v if isinstance(v, float) else 0.0 for v in row], sizes)
    host = torch.cat(tensors).double().cpu().numpy() if tensors else np.zeros(0)
    end = 0
    for q, t, j in places:
        table[q, t, starts[j] : starts[j + 1]] = host[end : end + sizes[j]]
        end += sizes[j]
    return table
