"""Per-sample gradients of parameters that no rule covers: `vmap(grad)`, else one backward per sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils import _pytree as pytree

from noetherflow.errors import MomentError
from noetherflow.moments.batch import Slices, Subject

CHUNK_ENTRIES = 1 << 24
CHECKED = 2


@dataclass(eq=False)
class Fallback:
    """Chooses the way once, on the first samples it meets: `vmap(grad)` where it equals autograd, else a loop."""

    subject: Subject
    names: tuple[str, ...]
    vectorised: bool | None = None

    @property
    def params(self) -> list[Tensor]:
        return [self.subject.roots[n] for n in self.names]

    def add(self, batch: Any, slices: Slices) -> None:
        """Add one batch to the sums. Raises MomentError naming the parameters when autograd itself fails."""
        losses = self._losses(batch)
        if self.vectorised is None:
            self.vectorised = self._agrees(losses, batch)
        step = max(1, CHUNK_ENTRIES // sum(p.numel() for p in self.params))
        for lo, hi, sums in slices:
            for start in range(lo, hi, step):
                stop = min(start + step, hi)
                rows = self._vmapped(batch, start, stop) if self.vectorised else self._loop(losses, start, stop)
                for name, g in zip(self.names, rows, strict=True):
                    sums.target(name).add_dense(g)

    def _losses(self, batch: Any) -> Tensor:
        try:
            return self.subject.checked(self.subject.loss_fn(self.subject.model, batch)).flatten()
        except RuntimeError as cause:
            raise MomentError(f"no rule and no fallback for {list(self.names)}: {cause}") from cause

    def _loop(self, losses: Tensor, lo: int, hi: int) -> list[Tensor]:
        try:
            rows = [
                torch.autograd.grad(losses[i], self.params, retain_graph=True, materialize_grads=True)
                for i in range(lo, hi)
            ]
        except RuntimeError as cause:
            raise MomentError(f"no rule and no fallback for {list(self.names)}: {cause}") from cause
        return [torch.stack(column).detach() for column in zip(*rows, strict=True)]

    def _agrees(self, losses: Tensor, batch: Any) -> bool:
        n = min(CHECKED, len(losses))
        if self.subject.sample_axes != 1:
            return False
        try:
            quick = self._vmapped(batch, 0, n)
        except Exception:
            return False
        return all(_same(a, b) for a, b in zip(quick, self._loop(losses, 0, n), strict=True))

    def _vmapped(self, batch: Any, lo: int, hi: int) -> list[Tensor]:
        values, structure = pytree.tree_flatten(batch)
        samples = max((v.shape[0] for v in values if isinstance(v, Tensor) and v.ndim), default=0)
        split = [isinstance(v, Tensor) and v.ndim > 0 and v.shape[0] == samples for v in values]
        if not any(split):
            raise MomentError("no tensor to split into samples")
        model = self.subject.model

        def loss(params: dict[str, Tensor], *parts: Any) -> Tensor:
            one = [p.unsqueeze(0) if s else p for p, s in zip(parts, split, strict=True)]
            with _reparametrize_module(model, params, tie_weights=True):
                return self.subject.loss_fn(model, pytree.tree_unflatten(one, structure)).sum()

        given = {n: p.detach() for n, p in zip(self.names, self.params, strict=True)}
        axes = (None, *(0 if s else None for s in split))
        chunk = [v[lo:hi] if s else v for v, s in zip(values, split, strict=True)]
        grads = torch.func.vmap(torch.func.grad(loss), in_dims=axes, randomness="different")(given, *chunk)
        return [grads[n].detach() for n in self.names]


def _same(a: Tensor, b: Tensor) -> bool:
    rtol = 1e-9 if a.dtype == torch.float64 else 1e-4
    return a.shape == b.shape and bool((a - b).norm() <= rtol * b.norm() + torch.finfo(a.dtype).tiny)
