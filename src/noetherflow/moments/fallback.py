"""Per-sample gradients of parameters that no rule covers: `vmap(grad)`, else one backward per sample."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from noetherflow.core.tensors import tensors_of
from noetherflow.core.torch_internals import with_parameters
from noetherflow.errors import MomentError
from noetherflow.moments.batch import Share, Subject, buffers_kept
from noetherflow.moments.verify import independence

CHUNK_ENTRIES = 1 << 24
CHECKED = 2


@dataclass(eq=False)
class Fallback:
    """Measures parameters that no rule covers, from explicit gradients of every sample.

    The way is chosen once, on the first samples met: `vmap(grad)` where it equals autograd, else a loop of backwards.
    `split` says which tensors of a batch `vmap` divides into samples: () for the loop, None before the choice.
    """

    subject: Subject
    names: tuple[str, ...]
    split: tuple[bool, ...] | None = None

    @property
    def params(self) -> list[Tensor]:
        return [self.subject.roots[n] for n in self.names]

    def add(self, batch: Any, shares: Sequence[Share]) -> None:
        """Add one batch to the sums; buffers are left as they were.

        Raises MomentError naming the parameters when autograd itself fails, or when samples act on each other.
        """
        step = max(1, CHUNK_ENTRIES // sum(p.numel() for p in self.params))
        with buffers_kept(self.subject.modules):
            gradients = self._gradients(batch, shares[-1].hi)
            for share in shares:
                for start in range(share.lo, share.hi, step):
                    for name, g in zip(self.names, gradients(start, min(start + step, share.hi)), strict=True):
                        share.sums.target(name).add_dense(g)
                share.settle(self.names)

    def _gradients(self, batch: Any, samples: int) -> Callable[[int, int], list[Tensor]]:
        """The function of `lo, hi` that gives gradients of samples `lo .. hi - 1`."""
        rows = [v.shape[0] if isinstance(v, Tensor) and v.ndim else 0 for v in pytree.tree_leaves(batch)]
        if self.split is None:
            split = tuple(r == samples for r in rows)
            self.split = split if self._agrees(batch, split) else ()
        fits = len(rows) == len(self.split) and all(r == samples for r, s in zip(rows, self.split, strict=True) if s)
        return partial(self._vmapped, batch, self.split) if fits else partial(self._loop, self._losses(batch))

    def _losses(self, batch: Any) -> Tensor:
        """The losses of a batch, `[samples]`."""
        try:
            return self.subject.checked(self.subject.loss_fn(self.subject.model, batch)).flatten()
        except RuntimeError as cause:
            raise MomentError(f"no rule and no fallback for {list(self.names)}: {cause}") from cause

    def _loop(self, losses: Tensor, lo: int, hi: int) -> list[Tensor]:
        """Gradients of samples `lo .. hi - 1`, one backward each."""
        try:
            rows = [
                torch.autograd.grad(losses[i], self.params, retain_graph=True, materialize_grads=True)
                for i in range(lo, hi)
            ]
        except RuntimeError as cause:
            raise MomentError(f"no rule and no fallback for {list(self.names)}: {cause}") from cause
        return [torch.stack(column).detach() for column in zip(*rows, strict=True)]

    def _agrees(self, batch: Any, split: tuple[bool, ...]) -> bool:
        """Whether `vmap` gives the gradients that samples have in the batch. Raises MomentError if they interact."""
        if self.subject.sample_axes != 1 or not any(split):
            return False
        losses = self._losses(batch)
        n = min(CHECKED, len(losses))
        together = self._loop(losses, 0, n)
        vmapped = self._tried(batch, lambda f, b: f._vmapped(b, split, 0, n))
        if vmapped is not None and all(map(_same, vmapped, together)):
            return True
        if self.subject.measured <= set(self.names):  # else the rules have shown that samples do not interact
            self._refuse_interaction(batch, split, together)
        return False

    def _refuse_interaction(self, batch: Any, split: tuple[bool, ...], together: list[Tensor]) -> None:
        """Raises MomentError where the first sample's gradient points elsewhere in the batch than by itself.

        A multiple is no sign of it: losses may be scaled by something taken over the batch, such as a count of tokens.
        """
        alone = self._tried(batch, lambda f, b: f._loop(f._losses(_part(b, split, 0, 1)), 0, 1))
        if alone is None:  # not a batch to take a sample out of
            return
        again = self._loop(self._losses(batch), 0, 1)
        a, b, c = (torch.cat([g[0].flatten().double() for g in rows]) for rows in (alone, together, again))
        across = b - (a @ b) / (a @ a) * a
        if _same(c, b) and bool(across.norm() > independence(self.subject.model, together[0].dtype) * b.norm()):
            raise MomentError(
                f"samples act on each other: the gradient of {list(self.names)} for one sample depends on the rest of "
                "its batch. Per-sample gradients do not describe SGD here (batch statistics, contrastive loss?); use "
                "minibatch_moments. If a tensor of the batch has as many rows by chance, take another batch size"
            )

    def _tried(self, batch: Any, run: Callable[[Fallback, Any], list[Tensor]]) -> list[Tensor] | None:
        """`run(self, batch)`, None where that is an error: on a CPU first, as an index out of bounds ends the use of
        a GPU by the whole process.
        """
        try:
            if any(p.device.type != "cpu" for p in self.params):
                model = copy.deepcopy(self.subject.model).cpu()
                roots = {n: t for n, t in tensors_of(model).items() if t.requires_grad}
                with torch.device("cpu"):
                    there = Fallback(replace(self.subject, model=model, roots=roots), self.names)
                    run(there, pytree.tree_map_only(Tensor, Tensor.cpu, batch))
            return run(self, batch)
        except Exception:  # whatever vmap, or a part of a batch, stumbles over
            return None

    def _vmapped(self, batch: Any, split: tuple[bool, ...], lo: int, hi: int) -> list[Tensor]:
        """Gradients of samples `lo .. hi - 1` by `vmap(grad)`."""
        structure = pytree.tree_structure(batch)
        model = self.subject.model

        def loss(params: dict[str, Tensor], *parts: Any) -> Tensor:
            one = [p.unsqueeze(0) if s else p for p, s in zip(parts, split, strict=True)]
            with with_parameters(model, params):
                return self.subject.loss_fn(model, pytree.tree_unflatten(one, structure)).sum()

        given = {n: p.detach() for n, p in zip(self.names, self.params, strict=True)}
        axes = (None, *(0 if s else None for s in split))
        chunk = pytree.tree_leaves(_part(batch, split, lo, hi))
        grads = torch.func.vmap(torch.func.grad(loss), in_dims=axes, randomness="different")(given, *chunk)
        return [grads[n].detach() for n in self.names]


def _part(batch: Any, split: tuple[bool, ...], lo: int, hi: int) -> Any:
    """The batch of samples `lo .. hi - 1`."""
    values, structure = pytree.tree_flatten(batch)
    return pytree.tree_unflatten([v[lo:hi] if s else v for v, s in zip(values, split, strict=True)], structure)


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding."""
    rtol = 1e-9 if a.dtype == torch.float64 else 1e-4
    return a.shape == b.shape and bool((a - b).norm() <= rtol * b.norm() + torch.finfo(a.dtype).tiny)
