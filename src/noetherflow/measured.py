"""A model's symmetries with one measurement of its gradient noise: the first stages of `analyze`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from noetherflow.core.inputs import LossFn
from noetherflow.core.optimizers import Settings
from noetherflow.core.sightings import Sightings, looking_at
from noetherflow.core.tensors import tensors_of
from noetherflow.core.torch_internals import has_gradient_hooks
from noetherflow.core.unwrap import unwrap
from noetherflow.discovery import Certificate, certify, find_symmetries
from noetherflow.equilibrium import Equilibrium, noise_equilibrium
from noetherflow.errors import DataError, MomentError
from noetherflow.moments import GradientMoments, gradient_moments, minibatch_moments
from noetherflow.moments.batch import tensors_in
from noetherflow.moments.batch_statistics import running_statistics, uses_batch_statistics
from noetherflow.moments.purpose import Purpose, Wanted
from noetherflow.symmetry.heads import with_scales
from noetherflow.symmetry.symmetry import Symmetry
from noetherflow.symmetry.symmetry_set import SymmetrySet

LABELS = ("labels", "label", "targets", "target", "y")
FACTORS = 2**30
"""Bytes of factors of single samples' gradients that a measurement keeps at most."""
BATCH_STATISTICS = "holds with batch statistics only: model.train()"


@dataclass(frozen=True, eq=False)
class MeasuredModel:
    """Symmetries, their certificate and one measurement; `again` measures at another point.

    `uncertified` are the symmetries that were found and refused by the certificate; `seen` is what was seen of the
    activations on the way.
    """

    symmetries: SymmetrySet
    certificate: Certificate
    moments: GradientMoments
    again: Callable[[nn.Module], GradientMoments]
    uncertified: tuple[Symmetry, ...] = ()
    seen: Sightings = field(default_factory=Sightings)

    def equilibrium(self, model: nn.Module, sgd: Settings, **options: Any) -> Equilibrium:
        """`noise_equilibrium` from this measurement, re-measured where that is needed; `options` go there."""
        return noise_equilibrium(model, self.symmetries, self.moments, sgd, remeasure=self.again, **options)


def measure(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Any],
    example_inputs: Any,
    *,
    scales: bool = False,
    certified: bool = True,
    progress: Callable[[str], None] = lambda stage: None,
) -> MeasuredModel:
    """The first stages of `analyze`: find and certify the symmetries, measure the gradient noise along them.

    With `scales` matrix symmetries are replaced by the scale of each block once they are certified. Without `certified`
    all that were found are measured, whether they hold or not, and the certificate has no rows.
    """
    progress("tracing the model")
    syms = find_symmetries(model, example_inputs).trainable(model)
    progress("certifying the symmetries" if certified else "leaving the certificate out")
    certificate = certify(model, syms, example_inputs) if certified else Certificate((), 0.0)
    uncertified = tuple(s for s in syms if s.name in certificate.refused)
    syms = syms.without(certificate.refused)
    syms = with_scales(syms) if scales else syms
    progress("measuring gradient moments")
    if uses_batch_statistics(model.modules()):
        again = _by_minibatch(loss_fn, batches, syms)
        with looking_at(unwrap(model)) as seen:
            moments = again(model)
        return MeasuredModel(syms, certificate, moments, again, uncertified, seen.found)
    syms = syms.without(dict.fromkeys(running_statistics(syms), BATCH_STATISTICS))
    again = partial(gradient_moments, loss_fn=loss_fn, batches=batches, syms=syms, entries=True)
    used, purpose = _used(model, loss_fn, batches[0]), _purpose(model, loss_fn, batches, syms)
    with looking_at(unwrap(model)) as seen:
        moments = again(model, parameters=used, for_=purpose)
    return MeasuredModel(syms, certificate, moments, again, uncertified, seen.found)


def _purpose(model: nn.Module, loss_fn: LossFn, batches: Sequence[Any], syms: SymmetrySet) -> Purpose:
    """`equilibrium` where what a joint equilibrium needs fits into memory, by the factors of the first batch.

    One measurement with factors stands in place of one per sweep: about 90 for a small Llama under SGD.
    """
    try:
        if not Wanted.of(syms, syms.tensors_in(unwrap(model)), "equilibrium").factors:
            return "equilibrium"
        one = gradient_moments(model, loss_fn, batches[:1], syms, for_="equilibrium")
    except MomentError:
        return "flow"
    kept = sum(f.left.nbytes + f.right.nbytes for f in one.factors.values()) * len(batches)
    return "equilibrium" if kept <= FACTORS else "flow"


def _used(model: nn.Module, loss_fn: LossFn, batch: Any) -> list[str]:
    """The trainable parameters that the loss of a batch depends on, but for those with hooks on their gradients."""
    named = {n: t for n, t in tensors_of(unwrap(model)).items() if t.requires_grad and not has_gradient_hooks(t)}
    if not named:
        return []
    found = torch.autograd.grad(loss_fn(model, batch).sum(), list(named.values()), allow_unused=True)
    return [n for n, g in zip(named, found, strict=True) if g is not None]


def _by_minibatch(loss_fn: LossFn, batches: Sequence[Any], syms: SymmetrySet) -> Callable[[nn.Module], GradientMoments]:
    """`minibatch_moments` of a model, each batch a replicate; batches of another size than the first are left out."""
    sizes = [samples_in(batch) for batch in batches]
    whole = [b for b, size in zip(batches, sizes, strict=True) if size == sizes[0]]
    return partial(minibatch_moments, loss_fn=loss_fn, batches=whole, syms=syms, batch_size=sizes[0], entries=True)


def samples_in(batch: Any) -> int:
    """How many samples a batch has: the length of its first tensor that has one."""
    return next((len(t) for t in tensors_in(batch) if t.ndim), 0)


def batches_of(batches: Iterable[Any], samples: int, least: int) -> list[Any]:
    """All batches of a list; of a loader as many as hold the samples wanted, and at least so many batches.

    Raises:
        DataError: there is no batch, or one tuple of tensors in place of a list of batches.
    """
    if isinstance(batches, tuple) and all(isinstance(b, Tensor) for b in batches):
        raise DataError("batches is an iterable of batches, got one tuple of tensors; for a single batch: [(x, y)]")
    if isinstance(batches, Sequence):
        taken = list(batches)
    else:
        taken = _from_loader(batches, samples)
        while taken and len(taken) < least and isinstance(batches, DataLoader):
            taken += islice(batches, least - len(taken))
    if not taken:
        raise DataError("there are no batches; give at least one")
    return taken


def _from_loader(batches: Iterable[Any], samples: int) -> list[Any]:
    """The first batches that hold so many samples together."""
    taken: list[Any] = []
    found = 0
    for batch in batches:
        taken.append(batch)
        found += samples_in(batch)
        if found >= samples:
            break
    return taken


def inputs_of(batch: Any, samples: int = 2) -> Any:
    """The model's inputs in a batch: the first item of a pair, a dict without its labels, or the batch itself.

    Example:
        >>> inputs_of((torch.zeros(5, 3), torch.zeros(5))).shape
        torch.Size([2, 3])
    """
    if isinstance(batch, Mapping):
        inputs: Any = {n: v for n, v in dict(batch).items() if n not in LABELS}
    else:
        inputs = batch[0] if isinstance(batch, tuple | list) else batch
    return pytree.tree_map(lambda t: t[:samples] if isinstance(t, Tensor) and t.ndim else t, inputs)
