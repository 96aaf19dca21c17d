"""Balance checkpoints on disk: files, shards and folders, written atomically or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from noetherflow.balance.check import OutputCheck
from noetherflow.balance.content import FileMove
from noetherflow.balance.file_check import checked_change, refuse_elsewhere, refuse_other_weights
from noetherflow.balance.layout import INDEX, TORCH_SUFFIXES, OpenCheckpoint, open_checkpoint
from noetherflow.balance.model import BalanceReport
from noetherflow.balance.motion import Motion
from noetherflow.balance.names import NameMap, match_names
from noetherflow.balance.safetensors_file import DEQUANTISE
from noetherflow.balance.state_naming import StateNaming, StateOrder
from noetherflow.balance.stored import RenamedTensors
from noetherflow.balance.written import moved_files, write_files, writing
from noetherflow.core.files import check_writable
from noetherflow.core.tensors import is_narrow, tensors_of
from noetherflow.core.unwrap import unwrap_optimizer
from noetherflow.discovery.certificate import Certificate
from noetherflow.equilibrium.result import Equilibrium
from noetherflow.errors import CheckpointError

Progress = Callable[[str], None]


def read_checkpoint(path: str | Path, *, key: str | None = None) -> dict[str, Tensor]:
    """The named tensors of a checkpoint, mapped from the disk where its format allows.

    Args:
        path: a `.safetensors` or PyTorch file, the index of a sharded checkpoint, or a folder with one of these
            (`save_pretrained`, a `checkpoint-1000/` of the Hugging Face Trainer) or of torch.distributed.checkpoint.
        key: where the weights lie in a PyTorch file, nested keys joined by dots; the usual ones (`state_dict`, `model`,
            `model_state_dict` ...) are found without it.

    Returns:
        The tensors by the names in the file.

    Raises:
        CheckpointError: nothing there, unreadable, one of several shards, or without named tensors.
    """
    stored = open_checkpoint(path, key).stored
    return {n: stored.view(n) for n in stored.names}


def load_checkpoint_(
    model: nn.Module, path: str | Path, *, key: str | None = None, prefix: str | None = None
) -> dict[str, Tensor]:
    """Load a checkpoint into `model`, tensor by tensor; returns the tensors as stored.

    Tied names may be missing. What training frameworks put in front of all names (`module.`, `_orig_mod.`, `model.`) is
    found and taken off. A PEFT adapter alone is loaded into a model that has the adapter.

    Args:
        model: takes the values, in its own dtypes.
        path: see `read_checkpoint`, as for `key`.
        key: where the weights lie in a PyTorch file.
        prefix: what the names in the file have in front of the model's; names without it are left aside.

    Raises:
        CheckpointError: names what is missing, unexpected, of another shape, or different in the file though the model
            ties it; the model is then untouched.
    """
    opened = _wide_checkpoint(path, key)
    names = match_names(model, opened.stored, opened.path, prefix, opened.adapter)
    tensors = tensors_of(model)
    meta = next((own for own in names.canonical.values() if tensors[own].is_meta), None)
    if meta is not None:
        raise CheckpointError(
            f"{meta} of the model is on the meta device: make memory for it first, model.to_empty(...)"
        )
    weights = _weights(opened, names, model)
    with torch.no_grad():
        for own in weights:
            tensors[own].copy_(weights[own])
    return {n: opened.stored.view(n) for n in opened.stored.names}


def balance_checkpoint(
    source: str | Path,
    target: str | Path,
    model: nn.Module,
    eq: Equilibrium,
    *,
    example_inputs: Any = None,
    certificate: Certificate | None = None,
    tolerance: float | None = None,
    unchecked: bool = False,
    dry_run: bool = False,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    state_order: StateOrder = "checked",
    key: str | None = None,
    prefix: str | None = None,
    progress: Progress | None = None,
) -> BalanceReport:
    """Write the checkpoint `source`, moved to the equilibrium `eq`, to `target`; the function it computes stays.

    Stored tensors move one by one in float64 and are rounded once to their own dtypes; what has no leg is copied bit by
    bit. Shards keep their sharding, a folder keeps everything that lies in it. Optimiser state (in a PyTorch file, or
    `optimizer.pt` in the folder) moves as in `balance_`, and a dict or file of tensors with the model's names and
    shapes (averaged weights) moves like the weights; the report lists both, and as not moved all other tensors. All is
    written beside the target and then renamed, so an interruption leaves the target as it was; what a killed writer
    left is removed by the next one.

    Args:
        source: a `.safetensors` or PyTorch file, an index of shards, or a folder (`read_checkpoint`).
        target: where to write: a file (may be the source; `.safetensors` joins shards), or for a folder or index a
            folder that is not there yet.
        model: the model with the weights of `source` (`load_checkpoint_`), which is not changed; or on the meta device.
        eq: where to.
        example_inputs: see `balance_`, as for the next three; there is one argument per choice of a call that
            overwrites files.
        certificate: what `nf.certify` said of the symmetries.
        tolerance: largest relative change of outputs.
        unchecked: move even where nothing proves that the function stays.
        dry_run: write nothing.
        optimizer: the optimiser or optimisers whose state the file holds; they say whose state is whose.
        state_order: how state without names is assigned: `checked` only where shapes leave no doubt, `parameters` in
            the order of `model.parameters()`, which you then vouch for.
        key: where the weights lie in a PyTorch file.
        prefix: what the names in the file have in front of the model's.
        progress: called with the name of each tensor when it is done.

    Returns:
        What moved, or would.

    Raises:
        CheckpointError: a target that cannot be written (tried first) or has no room, an unreadable file, one that does
            not match the model, or weights other than those in `model`.
        CertificateError: as `balance_` does, and so DataError.
    """
    given = [] if optimizer is None else optimizer if isinstance(optimizer, Sequence) else [optimizer]
    options = WriteOptions(dry_run, tuple(unwrap_optimizer(o) for o in given), state_order, progress or _silent)
    matched, motion = MatchedCheckpoint.of(source, target, model, options, key=key, prefix=prefix), Motion.of(eq)
    matched.refuse_unlike(motion)
    refuse_elsewhere(eq, motion, matched.weights)
    check = OutputCheck(example_inputs, certificate, tolerance, unchecked)
    change = checked_change(model, motion, matched.weights, check, eq.symmetries.example_inputs)
    report = matched.write(target, motion, options, change)
    return replace(
        report,
        skipped={**eq.excluded, **{s.name: s.reason for s in eq if s.reason}},
        converged=eq.converged,
        imbalance=eq.imbalance,
    )


def _silent(name: str) -> None:
    """No progress to show."""


@dataclass(frozen=True, eq=False)
class WriteOptions:
    """How a moved checkpoint is written.

    Attributes:
        dry_run: write nothing.
        optimizers: whose state the files hold.
        state_order: how state without names is assigned.
        progress: called with the name of each tensor when it is done.
    """

    dry_run: bool = False
    optimizers: tuple[torch.optim.Optimizer, ...] = ()
    state_order: StateOrder = "checked"
    progress: Progress = _silent


@dataclass(frozen=True, eq=False)
class MatchedCheckpoint:
    """The files of a checkpoint with their tensors under the names of its model."""

    opened: OpenCheckpoint
    names: NameMap
    weights: RenamedTensors
    model: nn.Module

    @classmethod
    def of(
        cls,
        source: str | Path,
        target: str | Path,
        model: nn.Module,
        options: WriteOptions,
        *,
        key: str | None = None,
        prefix: str | None = None,
    ) -> MatchedCheckpoint:
        """Open a checkpoint that is to be moved to `target`, which is tried first.

        Raises CheckpointError for a target that cannot be written, and files that are unreadable or not of the model.
        """
        if not options.dry_run:
            check_target(target, folder=_is_folder(Path(source)))
        opened = _wide_checkpoint(source, key)
        names = match_names(model, opened.stored, opened.path, prefix, opened.adapter)
        return cls(opened, names, _weights(opened, names, model), model)

    def refuse_unlike(self, motion: Motion) -> None:
        """Raises CheckpointError where the files lack a tensor that moves, or hold others than the model does."""
        _refuse_absent(motion, self.weights, self.opened)
        refuse_other_weights(self.model, self.weights, self.opened.path)

    def write(self, target: str | Path, motion: Motion, options: WriteOptions, change: float | None) -> BalanceReport:
        """Write the moved files, or say what would move.

        Args:
            target: where to.
            motion: the move.
            options: how.
            change: by how much the outputs change, for the report.
        """
        naming, said = _naming(self.opened, options.optimizers, options.state_order)
        move = FileMove(self.model, motion, self.names, self.weights, naming, options.progress)
        done = (moved_files if options.dry_run else write_files)(self.opened, move, Path(target))
        return BalanceReport(
            {n: s.change for n, s in done.shifts.items()},
            change,
            max((s.rounding for s in done.shifts.values()), default=0.0),
            len(done.state.moves),
            done.state.approximate,
            unmoved=done.state.unmoved,
            averages=done.averages,
            dry_run=options.dry_run,
            notes=(*self.names.notes, *said, *done.notes),
        )


def _wide_checkpoint(path: str | Path, key: str | None) -> OpenCheckpoint:
    """A checkpoint whose numbers have more than eight bits. Raises CheckpointError for others, by name."""
    opened = open_checkpoint(path, key)
    narrow = [n for n in opened.stored.names if is_narrow(opened.stored.dtype(n))]
    if narrow:
        raise CheckpointError(
            f"{opened.path}: {narrow[0]} is stored as {opened.stored.dtype(narrow[0])} ({len(narrow)} of "
            f"{len(opened.stored.names)} tensors), whose rounding by 3 to 6 % a move would repeat; {DEQUANTISE}"
        )
    return opened


def _naming(
    opened: OpenCheckpoint, optimizers: tuple[torch.optim.Optimizer, ...], order: StateOrder
) -> tuple[StateNaming, tuple[str, ...]]:
    """How the parameters of saved optimisers are known, and a line where that rests on who wrote the folder."""
    trainer = opened.folder is not None and (opened.folder / "trainer_state.json").is_file()
    if trainer and not optimizers and order == "checked":
        said = (
            "optimiser state without names is taken in the order of the Trainer's own groups (trainer_state.json is "
            "there); where it was given an optimizer of your own making, pass optimizer="
        )
        return StateNaming((), "parameters"), (said,)
    return StateNaming(optimizers, order), ()


def _is_folder(source: Path) -> bool:
    return source.is_dir() or source.name.endswith(INDEX)


def _weights(opened: OpenCheckpoint, names: NameMap, model: nn.Module) -> RenamedTensors:
    """The stored tensors under the model's names."""
    shapes = {n: tuple(t.shape) for n, t in tensors_of(model).items()}
    return RenamedTensors(opened.stored, names.stored_names, names.parts, shapes)


def _refuse_absent(motion: Motion, weights: RenamedTensors, opened: OpenCheckpoint) -> None:
    absent = [n for n in motion.by_parameter if n not in weights]
    if absent:
        raise CheckpointError(
            f"the equilibrium moves {absent[:3]} ({len(absent)} in all), which {opened.path} does not hold; freeze "
            "them (requires_grad_(False)) before the symmetries are found, or balance the file that holds them"
        )


def check_target(path: str | Path, *, folder: bool = False) -> None:
    """Raise CheckpointError unless a file (or a new `folder`) can be written at `path`; a missing parent is made."""
    path = Path(path)
    with writing(path):
        if folder and path.suffix not in (".safetensors", *TORCH_SUFFIXES):
            if path.exists():
                raise FileExistsError("the folder of a moved checkpoint must be a new one")
        elif path.is_dir():
            raise IsADirectoryError("it is a folder; name a file in it")
        check_writable(path)
