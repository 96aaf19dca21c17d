"""Inner products on the legs of a model's parameters, cheaply: cache-sized slices, no full-size temporaries."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from noetherflow.legs import accumulation_dtype
from noetherflow.monitor.layout import Layout

SLICE = 1 << 17
PairsOf = Callable[[Mapping[str, Tensor]], Mapping[str, tuple[Tensor, Tensor]]]


class Collector:
    """Gathers inner products by name and parameter; `vectors()` lays them out as the layout's values.

    A parameter that only needs totals over all its entries is read slice by slice, so that the several products of one
    slice come out of the cache; on a CPU the slices' sums are added in double precision.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.values: dict[str, dict[str, float | Tensor]] = {}

    def add(self, name: str, tensors: Mapping[str, Tensor], pairs_of: PairsOf) -> None:
        """Measure the pairs that `pairs_of` makes of one parameter's tensors, all of the parameter's shape."""
        if name in self.layout.totals_only and all(_plain(t) for t in tensors.values()):
            flat = {k: t.view(-1) for k, t in tensors.items()}
            self._add_sliced(name, flat, pairs_of)
            return
        for q, (a, b) in pairs_of({k: accumulation_dtype(t) for k, t in tensors.items()}).items():
            self.values.setdefault(q, {})[name] = self.layout.inner(name, a, b)

    def _add_sliced(self, name: str, flat: Mapping[str, Tensor], pairs_of: PairsOf) -> None:
        theta = next(iter(flat.values()))
        if theta.device.type != "cpu":
            for q, (a, b) in pairs_of(flat).items():
                self.values.setdefault(q, {})[name] = torch.dot(a, b)
            return
        sums: dict[str, float] = {}
        for start in range(0, theta.numel(), SLICE):
            part = flat if theta.numel() <= SLICE else {k: t[start : start + SLICE] for k, t in flat.items()}
            for q, (a, b) in pairs_of(part).items():
                sums[q] = sums.get(q, 0.0) + torch.dot(a, b).item()
        for q, value in sums.items():
            self.values.setdefault(q, {})[name] = value

    def vectors(self) -> dict[str, Tensor]:
        """One vector `[n_values]` per name; parameters without a value count zero."""
        return {q: self._vector(by_name) for q, by_name in self.values.items()}

    def _vector(self, by_name: Mapping[str, float | Tensor]) -> Tensor:
        sizes = self.layout.sizes
        if all(isinstance(v, float) for v in by_name.values()) and len(self.layout.totals_only) == len(sizes):
            return torch.from_numpy(np.array([by_name.get(n, 0.0) for n in sizes]))
        device = next((v.device for v in by_name.values() if isinstance(v, Tensor)), torch.device("cpu"))
        parts = [
            torch.as_tensor(by_name.get(n, 0.0), dtype=torch.float64, device=device).reshape(-1).expand(size)
            for n, size in sizes.items()
        ]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def _plain(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.dtype in (torch.float32, torch.float64)
