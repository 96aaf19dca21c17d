"""Checks before a file is moved: it holds the weights that were solved for, and its function stays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from noetherflow.balance.check import OutputCheck
from noetherflow.balance.model import ELSEWHERE
from noetherflow.balance.motion import Motion
from noetherflow.balance.pieces import leg_gram_of, move_in_place
from noetherflow.balance.stored import RenamedTensors
from noetherflow.core.tensors import tensors_of
from noetherflow.equilibrium.result import Equilibrium
from noetherflow.errors import CheckpointError, DataError


def refuse_other_weights(model: nn.Module, weights: RenamedTensors, where: Path) -> None:
    """Compare the file with the model, in the model's dtype, into which the file was loaded; a model on the meta device
    has nothing to compare.

    Raises:
        CheckpointError: a tensor differs.
    """
    tensors = tensors_of(model)
    for own, names in weights.names_of.items():
        mine = tensors[own].detach()
        if not mine.is_meta and not torch.equal(mine.cpu(), weights[own].to(mine.dtype)):
            raise CheckpointError(
                f"{names[0]} of {where} differs from the model the equilibrium was solved for; load the checkpoint "
                f"first (load_checkpoint_), measure and solve on it"
            )


def refuse_elsewhere(eq: Equilibrium, motion: Motion, weights: Mapping[str, Tensor]) -> None:
    """Raises DataError where the charges of stored weights are not those that the equilibrium was solved at.

    An equilibrium that was made from a file knows of none.
    """
    for s in motion.symmetries:
        if s.name not in eq.solved_at:
            continue
        difference, size = eq.solved_at[s.name].neg(), 0.0
        for leg in s.weight_legs:
            gram = leg_gram_of(s, leg, weights[leg.parameter])
            size += float(torch.linalg.vector_norm(gram))
            difference.add_(gram, alpha=leg.exponent)
        off = float(torch.linalg.vector_norm(difference))
        if not off <= ELSEWHERE * size:
            raise DataError(
                f"symmetry {s.name!r}: the charge of the stored weights is {off / size if size else off:.2g} of their "
                "squares away from where the equilibrium was solved: is it of another checkpoint? Solve again for this"
            )


def checked_change(
    model: nn.Module, motion: Motion, weights: Mapping[str, Tensor], check: OutputCheck, remembered: Any
) -> float | None:
    """By how much the outputs change; the model is moved in place for it and put back, no copy of it is made.

    Args:
        model: with the weights of the file.
        motion: the move.
        weights: the stored weights by canonical name.
        check: what is to prove that the function stays.
        remembered: the inputs that the symmetries were found with.

    Returns:
        The relative change, None where a certificate or `unchecked` stands for it.

    Raises:
        CertificateError: nothing proves the move, or outputs change by more than the tolerance.
        DataError: the model cannot be run.
    """
    tensors = tensors_of(model)
    if any(t.is_meta for t in tensors.values()):
        if check.example_inputs is not None:
            raise DataError("a model on the meta device has no weights to run: leave example_inputs out, and pass "
                            "certificate= of a model with weights, or unchecked=True")  # fmt: skip
        remembered = None
    before = check.before(model, motion, remembered)
    if before is None:
        return None
    with _moved_model(tensors, motion, weights):
        kinds = [*(t.dtype for t in tensors.values()), *(weights[n].dtype for n in motion.by_parameter)]
        return check.kept(before, model, [d for d in kinds if d.is_floating_point], motion)


@contextmanager
def _moved_model(tensors: Mapping[str, Tensor], motion: Motion, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The model at the moved stored weights within the block; afterwards at those in the file, which it had before."""
    with torch.no_grad():
        try:
            for name in motion.by_parameter:
                value = weights[name].clone()
                move_in_place(motion, name, value)
                tensors[name].copy_(value)
            yield
        finally:
            for name in motion.by_parameter:
                tensors[name].copy_(weights[name])
