"""Folders of torch.distributed.checkpoint: a `.metadata`, and parts in which every process wrote its pieces."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from noetherflow.balance.dcp_metadata import METADATA, DcpChunk, DcpEntry, entries_of, read_metadata
from noetherflow.balance.torch_file import load_safely
from noetherflow.balance.waiting import WaitingTensor
from noetherflow.core.held import is_saved_optimizer
from noetherflow.errors import CheckpointError


@dataclass(frozen=True, eq=False)
class DcpTensor:
    """A tensor in the parts, put together from its pieces whenever it is asked for."""

    entry: DcpEntry

    def read(self) -> Tensor:
        """The tensor in memory of its own."""
        assert self.entry.dtype is not None
        if len(self.entry.chunks) == 1:
            return _loaded(self.entry.chunks[0], self.entry)
        whole = torch.empty(self.entry.shape, dtype=self.entry.dtype)
        for chunk in self.entry.chunks:
            whole[chunk.place] = _loaded(chunk, self.entry)
        return whole

    def view(self) -> Tensor:
        """The tensor."""
        return self.read()


@dataclass(frozen=True)
class UnreadObject:
    """An object whose class is not known to hold values only; it is copied as it is. `reason`: why."""

    reason: str


@dataclass(frozen=True, eq=False)
class DcpFolder:
    """A folder by its metadata.

    Attributes:
        path: the folder.
        metadata: the record that its `.metadata` holds.
        entries: tensors and other objects by flattened name.
    """

    path: Path
    metadata: Any
    entries: Mapping[str, DcpEntry]

    @classmethod
    def open(cls, path: Path) -> DcpFolder:
        """Read the metadata, and hold it against the files.

        Raises:
            CheckpointError: it is unreadable, or parts are missing or cut off.
        """
        metadata = read_metadata(path)
        try:
            return cls(path, metadata, entries_of(path, metadata))
        except CheckpointError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as cause:
            raise CheckpointError(
                f"{path / METADATA} is damaged, its records are not of the kinds that they should be "
                f"({type(cause).__name__}: {cause}); copy the folder again, or save it again"
            ) from cause

    @property
    def parts(self) -> tuple[Path, ...]:
        """The files with the tensors."""
        return tuple(sorted({c.part for e in self.entries.values() for c in e.chunks}))

    @cached_property
    def paths(self) -> dict[str, tuple[str | int, ...]]:
        """Where each entry lies in `content`, by flattened name: its own place, but for flattened optimiser states,
        which come as `optimizer.state_dict()` has them.
        """
        flat = {e.path[:-1] for e in self.entries.values() if str(e.path[-1]).startswith("param_groups.")}
        out, numbers = {}, dict[tuple[tuple[str | int, ...], str], int]()
        for name, entry in self.entries.items():
            outer, last = entry.path[:-1], str(entry.path[-1])
            kind, _, rest = last.partition(".")
            parameter, _, key = rest.rpartition(".")
            if outer not in flat or kind not in ("state", "param_groups") or not parameter:
                out[name] = entry.path
            elif kind == "state":
                out[name] = (*outer, kind, parameter, key)
            else:
                number = numbers.setdefault((outer, parameter), sum(o == outer for o, _ in numbers))
                out[name] = (*outer, kind, number, key)
        return out

    def content(self) -> dict[str, Any]:
        """The nested state dict; its tensors wait on the disk."""
        tree: dict[Any, Any] = {}
        for name, entry in self.entries.items():
            *outer, last = self.paths[name]
            node = tree
            for key in outer:
                node = node.setdefault(key, {})
                if not isinstance(node, dict):
                    raise CheckpointError(f"{self.path}: {name} lies inside another entry; save it again")
            node[last] = self._value(entry)
            if entry.path != self.paths[name] and outer[-2:-1] == ["param_groups"]:
                node["params"] = [str(entry.path[-1]).partition(".")[2].rpartition(".")[0]]
        out = _with_lists(tree)
        assert isinstance(out, dict)
        return out

    def _value(self, entry: DcpEntry) -> Any:
        if entry.dtype is not None:
            return WaitingTensor(entry.shape, entry.dtype, DcpTensor(entry))
        try:
            return load_safely(io.BytesIO(_bytes(entry.chunks[0])), f"{entry.name} in {entry.chunks[0].part}")
        except CheckpointError as why:
            return UnreadObject(str(why))

    def unread(self) -> dict[str, str]:
        """By flattened name why objects could not be looked into."""
        values = {e.name: self._value(e) for e in self.entries.values() if e.dtype is None}
        return {name: value.reason for name, value in values.items() if isinstance(value, UnreadObject)}


def without_unread(node: Any) -> Any:
    """A copy of nested dictionaries without the objects that could not be looked into."""
    if not isinstance(node, dict):
        return node
    return {k: without_unread(v) for k, v in node.items() if not isinstance(v, UnreadObject)}


def _loaded(chunk: DcpChunk, entry: DcpEntry) -> Tensor:
    """One piece of a tensor, in memory of its own."""
    from torch.distributed.checkpoint.utils import _create_file_view

    with chunk.part.open("rb") as file:
        window = _create_file_view(file, chunk.start, chunk.length)
        found = load_safely(window, f"{entry.name} in {chunk.part}")
    if not isinstance(found, Tensor) or tuple(found.shape) != chunk.sizes or found.dtype != entry.dtype:
        what = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise CheckpointError(
            f"{entry.name} in {chunk.part}: the piece is {what}, the metadata says {entry.dtype} {chunk.sizes}; "
            "copy the folder again, or save it again"
        )
    return found.detach()


def _bytes(chunk: DcpChunk) -> bytes:
    with chunk.part.open("rb") as file:
        file.seek(chunk.start)
        return file.read(chunk.length)


def _with_lists(node: Any) -> Any:
    """Dictionaries whose keys are whole numbers as the lists that they were; numbers that parameter groups and states
    know parameters by, which the file keeps as words, as numbers.
    """
    if not isinstance(node, dict):
        return node
    if node and all(isinstance(k, int) for k in node):
        return [_with_lists(node[k]) for k in sorted(node)]
    out = {k: _with_lists(v) for k, v in node.items()}
    if is_saved_optimizer(out) and any(isinstance(p, int) for g in out["param_groups"] for p in g["params"]):
        out["state"] = {int(k) if str(k).isdigit() else k: v for k, v in out["state"].items()}
    return out
