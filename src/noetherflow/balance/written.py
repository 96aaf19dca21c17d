"""Write moved checkpoints: files tensor by tensor, folders with everything in them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from noetherflow.balance.content import ContentMover, FileMove
from noetherflow.balance.dcp_file import DcpFolder, without_unread
from noetherflow.balance.dcp_metadata import METADATA
from noetherflow.balance.dcp_written import write_dcp
from noetherflow.balance.layout import STATE_BESIDE, SUFFIXES, TORCH_SUFFIXES, OpenCheckpoint
from noetherflow.balance.optimizer_state import StatePlan
from noetherflow.balance.pieces import Shift, move_in_place
from noetherflow.balance.safetensors_file import SafetensorsFile, header_of, write_tensor
from noetherflow.balance.staging import check_space, staged
from noetherflow.balance.stored import late_tensor
from noetherflow.balance.torch_file import load_torch
from noetherflow.balance.torch_save import save_torch
from noetherflow.core.tensors import tensors_of
from noetherflow.errors import CheckpointError

UNTOUCHED = re.compile(r"(scheduler|scaler|rng_state|random_states|training_args|trainer_state).*")
"""PyTorch files of a run that hold nothing of the weights."""


@dataclass(frozen=True)
class FilesWritten:
    """What was done to the files.

    Attributes:
        shifts: what the move did to the weights, by canonical name.
        state: what moved of the optimiser states, and lines on what did not.
        averages: dicts and files that moved like the weights.
        notes: lines on what else was found.
    """

    shifts: dict[str, Shift] = field(default_factory=dict)
    state: StatePlan = field(default_factory=StatePlan)
    averages: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, mover: ContentMover) -> FilesWritten:
        """What a walk through the content of a PyTorch file did, now that it is written."""
        return cls(mover.shifts(), StatePlan.joined(mover.plans), tuple(mover.averages))

    def __add__(self, other: FilesWritten) -> FilesWritten:
        return FilesWritten(
            {**other.shifts, **self.shifts},
            StatePlan.joined([self.state, other.state]),
            self.averages + other.averages,
            self.notes + other.notes,
        )


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors of the disk, and of torch.save about it, as one of the library's own."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as cause:
        raise CheckpointError(f"could not write {path}: {cause}; free the place, or name another target") from cause


def bytes_needed(opened: OpenCheckpoint) -> int:
    """How much a moved checkpoint takes on the disk."""
    files = opened.files if opened.folder is None else [p for p in opened.folder.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files)


def moved_files(opened: OpenCheckpoint, move: FileMove, target: Path) -> FilesWritten:
    """What writing `target` would do; nothing is written."""
    return _folder(None, opened, move) if _as_folder(opened, target) else _file(None, opened, move, target)


def write_files(opened: OpenCheckpoint, move: FileMove, target: Path) -> FilesWritten:
    """Write the moved checkpoint at `target`, whole or not at all.

    Raises:
        CheckpointError: the disk is full or cannot be written; what was at the target is as it was.
    """
    with writing(target):
        check_space(target, bytes_needed(opened))
        with staged(target) as scratch:
            if _as_folder(opened, target):
                return _folder(scratch, opened, move)
            done = _file(scratch, opened, move, target)
            shutil.copymode(target if target.exists() else opened.files[0], scratch)
            return done


def _as_folder(opened: OpenCheckpoint, target: Path) -> bool:
    return opened.folder is not None and target.suffix not in (".safetensors", *TORCH_SUFFIXES)


def _file(scratch: Path | None, opened: OpenCheckpoint, move: FileMove, target: Path) -> FilesWritten:
    """One file; what it cannot hold of the source is listed."""
    if target.suffix == ".safetensors":
        done = _one_safetensors(scratch, opened, move)
        return done + FilesWritten(state=StatePlan(unmoved=tuple(_not_written(opened))))
    if len(opened.contents) == 1:
        mover = ContentMover(move, opened.states[0])
        content = mover.moved(opened.contents[0], "")
        if scratch is not None:
            save_torch(content if opened.dcp is None else without_unread(content), scratch)
        unread = {} if opened.dcp is None else opened.dcp.unread()
        lines = (*(f"{n}: not written: {why}" for n, why in unread.items()), *_beside(opened))
        return FilesWritten.of(mover) + FilesWritten(state=StatePlan(unmoved=lines))
    mover = ContentMover(move, {})
    content = mover.weights({n: late_tensor(opened.stored, n) for n in opened.stored.names}, True)
    if scratch is not None:
        save_torch(content, scratch)
    return FilesWritten.of(mover) + FilesWritten(state=StatePlan(unmoved=tuple(_not_written(opened))))


def _not_written(opened: OpenCheckpoint) -> list[str]:
    """A line for everything of the source that a file of weights cannot hold."""
    others = [
        k for content, state in zip(opened.contents, opened.states, strict=True) if content is not state
        for k, v in content.items() if v is not state
    ]  # fmt: skip
    return [f"{k}: not written, the target holds weights only" for k in others] + _beside(opened)


def _beside(opened: OpenCheckpoint) -> list[str]:
    """A line for every file beside the weights that holds state of them, and stays as it is."""
    folder = opened.files[0].parent if opened.dcp is None or opened.folder is None else opened.folder
    mine = {p.name for p in opened.files}
    found = sorted(p.name for p in folder.iterdir() if p.name not in mine and _holds_state(p))
    return [
        f"{name} beside {opened.files[0].name}: it belongs to the weights as they were; to move both, balance the "
        f"folder: {folder}"
        for name in found
    ]


def _holds_state(path: Path) -> bool:
    known = path.is_dir() or path.suffix in (*TORCH_SUFFIXES, ".safetensors")
    return known and not path.name.startswith(".") and STATE_BESIDE.search(path.stem) is not None


def _one_safetensors(scratch: Path | None, opened: OpenCheckpoint, move: FileMove) -> FilesWritten:
    """A single safetensors file of all the weights."""
    if opened.kind == "safetensors" and len(opened.files) == 1:
        return _safetensors(scratch, SafetensorsFile.open(opened.files[0]), move)
    stored, shifts, wholes = opened.stored, dict[str, Shift](), dict[str, tuple[Tensor, Shift]]()
    header = header_of(((n, stored.dtype(n), stored.shape(n)) for n in stored.names), {"format": "pt"})
    with _binary(scratch) as file:
        if file is not None:
            file.write(header)
        for name in stored.names:
            own, tensor = move.canonical(name), stored.read(name)
            if own is not None:
                tensor, shift = _moved(name, own, tensor, move, wholes)
                shifts.setdefault(own, shift)
            if file is not None:
                write_tensor(file, tensor)
            move.progress(name)
    return FilesWritten(shifts)


def _safetensors(scratch: Path | None, source: SafetensorsFile, move: FileMove) -> FilesWritten:
    """A safetensors file with the same header: bytes are copied, or moved tensor by tensor."""
    shifts, wholes = dict[str, Shift](), dict[str, tuple[Tensor, Shift]]()
    with _binary(scratch) as file:
        if file is not None:
            file.write(source.header)
        for name in source.entries:
            own = move.canonical(name)
            if own is not None:
                tensor, shift = _moved(name, own, source.read(name), move, wholes)
                shifts.setdefault(own, shift)
                if file is not None:
                    write_tensor(file, tensor)
                del tensor
            elif file is not None:
                source.copy_bytes(name, file)
            move.progress(name)
    return FilesWritten(shifts)


def _moved(
    stored: str, own: str, tensor: Tensor, move: FileMove, wholes: dict[str, tuple[Tensor, Shift]]
) -> tuple[Tensor, Shift]:
    """A stored tensor, which may be written in place, at the moved weights."""
    if stored in move.names.parts:
        return move.part(stored, wholes)
    return tensor, move_in_place(move.motion, own, tensor)


@contextmanager
def _binary(path: Path | None) -> Iterator[BinaryIO | None]:
    with ExitStack() as stack:
        yield None if path is None else stack.enter_context(path.open("wb"))


def _folder(scratch: Path | None, opened: OpenCheckpoint, move: FileMove) -> FilesWritten:
    """A folder: weights shard by shard, states and averages of them, everything else as it is, the index last."""
    folder = opened.folder
    assert folder is not None
    if scratch is not None:
        scratch.mkdir()
        shutil.copymode(folder, scratch)
    done = FilesWritten()
    if opened.dcp is not None:
        done += _parts(scratch, opened, opened.dcp, move)
    for position, path in enumerate(opened.files):
        out = None if scratch is None else scratch / path.relative_to(folder)
        if opened.dcp is None:
            done += _shard(out, opened, position, move)
        _like(path, out)
    mine = {*opened.files, opened.index, *([] if opened.dcp is None else [opened.dcp.path])}
    for path in sorted(folder.iterdir()):
        if path not in mine:
            done += _other(path, None if scratch is None else scratch / path.name, move)
    if opened.index is not None and opened.dcp is None and scratch is not None:
        shutil.copy2(opened.index, scratch / opened.index.name)
    return done


def _shard(out: Path | None, opened: OpenCheckpoint, position: int, move: FileMove) -> FilesWritten:
    if opened.kind == "safetensors":
        return _safetensors(out, SafetensorsFile.open(opened.files[position]), move)
    mover = ContentMover(move, opened.states[position])
    content = mover.moved(opened.contents[position], "")
    if out is not None:
        save_torch(content, out)
    return FilesWritten.of(mover)


def _parts(scratch: Path | None, opened: OpenCheckpoint, dcp: DcpFolder, move: FileMove) -> FilesWritten:
    """The parts of a torch.distributed.checkpoint, which may be a folder in the one that is written."""
    assert opened.folder is not None
    inside = dcp.path != opened.folder
    out = None if scratch is None else scratch / dcp.path.relative_to(opened.folder)
    mover = ContentMover(move, opened.states[0])
    content = mover.moved(opened.contents[0], "")
    if out is not None:
        _write_parts(out, dcp, content, with_others=inside)
    unread = (f"{n}: copied as it was, not looked into: {why}" for n, why in dcp.unread().items())
    lines = (*unread, *([] if inside else _state_folders(opened)))
    return FilesWritten.of(mover) + FilesWritten(state=StatePlan(unmoved=lines))


def _write_parts(out: Path, dcp: DcpFolder, content: Any, with_others: bool) -> None:
    """The parts with this content, what says where in them everything lies, and maybe whatever else is there."""
    out.mkdir(exist_ok=True)
    shutil.copymode(dcp.path, out)
    if with_others:
        own = {p.name for p in dcp.parts} | {METADATA}
        shutil.copytree(dcp.path, out, dirs_exist_ok=True, ignore=lambda _, names: own)
    write_dcp(dcp, content, out)


def _other_parts(path: Path, out: Path | None, move: FileMove) -> FilesWritten:
    """A torch.distributed.checkpoint beside the weights: an optimiser's state or averages in it move."""
    try:
        dcp = DcpFolder.open(path)
        mover = ContentMover(move, {})
        content = mover.moved(dcp.content(), path.name)
    except CheckpointError as why:
        if out is not None:
            shutil.copytree(path, out)
        return FilesWritten(state=StatePlan(unmoved=(f"{path.name}/: copied as it was, not looked into: {why}",)))
    if out is not None:
        _write_parts(out, dcp, content, with_others=True)
    unread = tuple(f"{path.name}/{n}: copied as it was: {why}" for n, why in dcp.unread().items())
    return FilesWritten.of(mover) + FilesWritten(state=StatePlan(unmoved=unread))


def _state_folders(opened: OpenCheckpoint) -> list[str]:
    """A line for every folder of torch.distributed.checkpoint beside this one that holds state of its weights."""
    assert opened.folder is not None
    here = opened.folder.resolve()
    found = sorted(p.parent.name for p in here.parent.glob(f"*/{METADATA}") if STATE_BESIDE.search(p.parent.name))
    return [
        f"{name}/ beside {here.name}/: it belongs to the weights as they were; save both as one, dcp.save({{'model': "
        "..., 'optimizer': ...}), and balance that"
        for name in found
        if name != here.name
    ]


def _like(source: Path, out: Path | None) -> None:
    if out is not None:
        shutil.copymode(source, out)


def _other(path: Path, out: Path | None, move: FileMove) -> FilesWritten:
    """A file or folder beside the weights."""
    if (path / METADATA).is_file():
        return _other_parts(path, out, move)
    if path.is_dir():
        if out is not None:
            shutil.copytree(path, out)
        inside = [p for p in path.rglob("*") if p.suffix in (*SUFFIXES, ".distcp")]
        lines = (f"{path.name}/: a folder inside with {len(inside)} weight or state files, copied as it was",)
        return FilesWritten(state=StatePlan(unmoved=lines)) if inside else FilesWritten()
    if path.suffix == ".safetensors":
        return _other_safetensors(path, out, move)
    if path.suffix in TORCH_SUFFIXES and not UNTOUCHED.match(path.name):
        return _other_torch(path, out, move)
    if out is not None:
        shutil.copy2(path, out)
    return FilesWritten()


def _other_safetensors(path: Path, out: Path | None, move: FileMove) -> FilesWritten:
    """Averages of the weights in a file of their own move like them; other tensors stay."""
    file, known = SafetensorsFile.open(path), tensors_of(move.model)
    owners = {n: move.names.canonical_name(n) or "" for n in file.entries}
    agree = all(own in known and file.entries[n].shape == tuple(known[own].shape) for n, own in owners.items())
    if agree and any(move.canonical(n) is not None for n in owners):
        _safetensors(out, file, move)
        _like(path, out)
        return FilesWritten(averages=(f"{path.name} ({len(owners)} tensors)",))
    if out is not None:
        shutil.copy2(path, out)
    line = f"{path.name} ({len(owners)} tensors): names or shapes are not those of the model's weights"
    return FilesWritten(state=StatePlan(unmoved=(line,)))


def _other_torch(path: Path, out: Path | None, move: FileMove) -> FilesWritten:
    """An optimiser's state or averages of the weights move; what cannot be read is copied and listed."""
    done, content = FilesWritten(), None
    try:
        content = load_torch(path)
    except CheckpointError as why:
        done = FilesWritten(state=StatePlan(unmoved=(f"{path.name}: copied as it was, not looked into: {why}",)))
    if content is not None:
        mover = ContentMover(move, {})
        new: Any = mover.moved(content, path.name)
        if mover.changes and out is not None:
            save_torch(new, out)
            _like(path, out)
        done = FilesWritten.of(mover)
        if mover.changes:
            return done
    if out is not None:
        shutil.copy2(path, out)
    return done
