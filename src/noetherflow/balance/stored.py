"""Named tensors on disk, read one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from noetherflow.balance.parts import Part
from noetherflow.balance.safetensors_file import SafetensorsFile
from noetherflow.balance.waiting import WaitingTensor, looked_at, own_copy


class StoredTensors(Protocol):
    """The named tensors of a checkpoint. Their shapes and dtypes are known; a tensor is read when it is asked for."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str) -> Tensor:
        """The tensor in memory of its own, which the caller may change."""

    def view(self, name: str) -> Tensor:
        """The tensor to look at: mapped from the disk where possible."""


@dataclass(frozen=True, eq=False)
class NamedSource:
    """One of several stored tensors, fetched whenever it is asked for."""

    stored: StoredTensors
    name: str

    def read(self) -> Tensor:
        """The tensor in memory of its own."""
        return self.stored.read(self.name)

    def view(self) -> Tensor:
        """The tensor to look at."""
        return self.stored.view(self.name)


def late_tensor(stored: StoredTensors, name: str) -> WaitingTensor:
    """A stored tensor that waits where it is."""
    return WaitingTensor(stored.shape(name), stored.dtype(name), NamedSource(stored, name))


@dataclass(frozen=True)
class ShardedTensors:
    """The tensors of one safetensors file, or of several that make up one checkpoint."""

    files: tuple[SafetensorsFile, ...]

    @cached_property
    def _file_of(self) -> dict[str, SafetensorsFile]:
        return {n: file for file in self.files for n in file.entries}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file_of[name].entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._file_of[name].entries[name].dtype

    def read(self, name: str) -> Tensor:
        return self._file_of[name].read(name)

    def view(self, name: str) -> Tensor:
        return self._file_of[name].mapped(name)


@dataclass(frozen=True, eq=False)
class LoadedTensors:
    """The tensors of a PyTorch file: they wait on the disk where its format allows, else they are there already."""

    tensors: Mapping[str, Tensor]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str) -> Tensor:
        return own_copy(self.tensors[name])

    def view(self, name: str) -> Tensor:
        return looked_at(self.tensors[name])


@dataclass(frozen=True, eq=False)
class RenamedTensors(Mapping[str, Tensor]):
    """Stored tensors under the model's names, as a mapping that reads when it is asked.

    Attributes:
        stored: where they lie.
        names_of: by the model's canonical name the name in the file, or all the names of its parts.
        parts: the parts by the name in the file.
        shapes: the shapes of tensors that are kept in parts, by canonical name.
    """

    stored: StoredTensors
    names_of: Mapping[str, tuple[str, ...]]
    parts: Mapping[str, Part]
    shapes: Mapping[str, tuple[int, ...]]

    def __getitem__(self, name: str) -> Tensor:
        names = self.names_of[name]
        if names[0] not in self.parts:
            return self.stored.view(names[0])
        whole = torch.empty(self.shapes[name], dtype=self.stored.dtype(names[0]))
        for stored in names:
            self.parts[stored].of(whole).copy_(self.stored.view(stored))
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self.names_of)

    def __len__(self) -> int:
        return len(self.names_of)
