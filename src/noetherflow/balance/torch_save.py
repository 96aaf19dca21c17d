"""PyTorch files written as `torch.save` does, with tensors that wait fetched one after the other."""

from __future__ import annotations

import io
import pickle
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from noetherflow.balance.waiting import LateSource, WaitingTensor

PROTOCOL = 2
"""Of pickle, as `torch.save` has it."""
FORMAT = "1"
"""Of the archive: storages lie in it in the order of their numbers."""


@dataclass(frozen=True, eq=False)
class LateStorage:
    """What stands for the storage of a waiting tensor in the pickle.

    Attributes:
        source: where the value comes from.
        kind: the class that the pickle names.
        numel: in the unit of that class, as the pickle says it.
        nbytes: of the value.
    """

    source: LateSource
    kind: type
    numel: int
    nbytes: int


@dataclass(eq=False)
class StorageRecords:
    """The storages met while pickling, by number."""

    numbers: dict[object, str] = field(default_factory=dict)
    storages: dict[str, Any] = field(default_factory=dict)

    def reference(self, place: object, storage: Any, kind: type, numel: int) -> tuple[str, type, str, str, int]:
        """What the pickle says of a storage. `place`: equal for the same storage."""
        number = self.numbers.setdefault(place, str(len(self.numbers)))
        self.storages[number] = storage
        return "storage", kind, number, "cpu", numel


class ContentPickler(pickle.Pickler):
    """Pickles the content of a PyTorch file, its storages by reference."""

    def __init__(self, file: io.BytesIO, records: StorageRecords) -> None:
        super().__init__(file, protocol=PROTOCOL)
        self.records = records

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, WaitingTensor):
            return NotImplemented
        rebuild, (storage, _, _, _, *rest) = torch.empty(0, dtype=obj.dtype).__reduce_ex__(PROTOCOL)  # type: ignore[no-untyped-call]
        untyped = isinstance(storage, torch.UntypedStorage)
        nbytes = obj.numel() * obj.dtype.itemsize
        late = LateStorage(obj.source, _kind(storage), nbytes if untyped else obj.numel(), nbytes)
        return rebuild, (late, 0, tuple(obj.shape), tuple(obj.stride()), *rest)

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, LateStorage):
            return self.records.reference(obj.source, obj, obj.kind, obj.numel)
        if isinstance(obj, torch.storage.TypedStorage):
            storage: Any = obj
            untyped = storage._untyped_storage
            return self.records.reference(untyped._cdata, untyped, _kind(storage), storage._size())
        if torch.is_storage(obj):
            return self.records.reference(obj._cdata, obj, _kind(obj), obj.nbytes())
        return None


def _kind(storage: Any) -> type:
    """The class that a pickle names for a storage."""
    if isinstance(storage, torch.UntypedStorage):
        return torch.UntypedStorage
    kind: type = getattr(torch, storage._pickle_storage_type())
    return kind


def save_torch(content: Any, path: Path | BinaryIO) -> None:
    """Write `content` as `torch.save(content, path)` would, byte by byte, with one waiting tensor in memory at a time.

    Args:
        content: what to save; its tensors are on the CPU.
        path: the file, or one that is open.
    """
    if not any(isinstance(t, WaitingTensor) for t in tree_leaves(content)):
        torch.save(content, path)
        return
    records, text = StorageRecords(), io.BytesIO()
    ContentPickler(text, records).dump(content)
    alignment = str(torch.serialization._get_storage_alignment())
    with torch.serialization._open_zipfile_writer(str(path) if isinstance(path, Path) else path) as file:
        for name, value in {
            "data.pkl": text.getvalue(), ".format_version": FORMAT, ".storage_alignment": alignment,
            "byteorder": sys.byteorder,
        }.items():  # fmt: skip
            file.write_record(name, value, len(value))
        for number, storage in records.storages.items():
            _write(file, f"data/{number}", storage)


def _write(file: Any, name: str, storage: Any) -> None:
    """One record; the value of a waiting tensor is gone when this returns."""
    value = _fetched(storage) if isinstance(storage, LateStorage) else storage
    file.write_record(name, value, value.nbytes())


def _fetched(late: LateStorage) -> torch.UntypedStorage:
    """The storage of a value, which it fills from end to end."""
    value: Tensor = late.source.read().contiguous()
    filled = value.untyped_storage().nbytes() == late.nbytes
    return value.untyped_storage() if filled else value.clone().untyped_storage()
