"""Bring one checkpoint closest to another, file to file: `align` with its answer written like a balanced checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from noetherflow.balance.align import Alignment, align
from noetherflow.balance.check import OutputCheck
from noetherflow.balance.checkpoint import MatchedCheckpoint, WriteOptions, load_checkpoint_
from noetherflow.balance.file_check import checked_change
from noetherflow.balance.model import BalanceReport
from noetherflow.balance.motion import refuse_frozen
from noetherflow.core.arguments import expect
from noetherflow.errors import DataError
from noetherflow.symmetry.arguments import expect_model_and_symmetries
from noetherflow.symmetry.symmetry_set import SymmetrySet


@dataclass(frozen=True, eq=False)
class AlignedCheckpoint:
    """How a checkpoint was brought closest to another (`alignment`), and what was written (`report`)."""

    alignment: Alignment
    report: BalanceReport

    def __str__(self) -> str:
        return f"{self.alignment}\n{self.report}"

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        return {"alignment": self.alignment.to_dict(), "balance": self.report.to_dict()}


def align_checkpoint(
    approached: str | Path,
    source: str | Path,
    target: str | Path,
    model: nn.Module,
    syms: SymmetrySet,
    *,
    example_inputs: Any = None,
    permutations: bool = True,
    tolerance: float | None = None,
    dry_run: bool = False,
    key: str | None = None,
    prefix: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> AlignedCheckpoint:
    """Write the checkpoint `source`, moved on its orbit as close to `approached` as it gets, to `target`.

    The function of `source` stays. Both are loaded, into copies of `model`, and aligned in float64 in memory
    (`nf.align`); files, shards, folders and optimiser state are then read and written as `balance_checkpoint` does it.

    Args:
        approached: the checkpoint to come close to; only read.
        source: the checkpoint that is moved.
        target: where to write; see `balance_checkpoint`. (There is one argument per choice of a call that writes.)
        model: the model of both, with memory; its own weights do not matter and do not change.
        syms: its symmetries.
        example_inputs: some samples, on which outputs are compared; by default those of `find_symmetries`.
        permutations: whether units may change places; see `align`.
        tolerance: largest relative change of outputs; see `balance_`.
        dry_run: write nothing.
        key, prefix: where the weights lie in both checkpoints; see `load_checkpoint_`.
        progress: called with the name of each tensor when it is done.

    Returns:
        The alignment, with the distance before and after, and what was written.

    Raises:
        CheckpointError: a target that cannot be written (tried first), files that are unreadable or not of the model.
        DataError: no example inputs, weights that are not finite, frozen parameters that would move.
        CertificateError: outputs change; nothing is written.

    Example:
        ```
        syms = nf.find_symmetries(model, x)
        print(nf.align_checkpoint("a.safetensors", "b.safetensors", "b-near-a.safetensors", model, syms))
        ```

    Source: theory.md section 2.
    """
    call = "align_checkpoint(approached, source, target, model, syms)"
    for name, path in (("approached", approached), ("source", source), ("target", target)):
        expect(call, name, path, str | Path, "a path")
    expect_model_and_symmetries(call, model, syms)
    inputs = syms.example_inputs if example_inputs is None else example_inputs
    if inputs is None:
        raise DataError("example inputs tell which units can change places and prove the move: pass example_inputs")
    other, own = copy.deepcopy(model), copy.deepcopy(model)
    options = WriteOptions(dry_run) if progress is None else WriteOptions(dry_run, progress=progress)
    matched = MatchedCheckpoint.of(source, target, own, options, key=key, prefix=prefix)
    load_checkpoint_(other, approached, key=key, prefix=prefix)
    load_checkpoint_(own, source, key=key, prefix=prefix)
    found = align(other, own, syms, example_inputs=inputs, permutations=permutations)
    refuse_frozen(own, found.motion)
    matched.refuse_unlike(found.motion)
    change = checked_change(own, found.motion, matched.weights, OutputCheck(inputs, tolerance=tolerance), None)
    return AlignedCheckpoint(found, matched.write(target, found.motion, options, change))
