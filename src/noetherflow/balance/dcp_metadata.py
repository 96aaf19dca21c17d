"""The `.metadata` of torch.distributed.checkpoint, a pickle, read by an unpickler that knows its classes only."""

from __future__ import annotations

import io
import math
import pathlib
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from noetherflow.errors import CheckpointError

METADATA = ".metadata"
CLASSES: Mapping[str, frozenset[str]] = {
    "torch.distributed.checkpoint.metadata": frozenset({
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties", "BytesStorageMetadata",
        "ChunkStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING",
    }),
    "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo"}),
    "torch.serialization": frozenset({"_get_layout"}),
}  # fmt: skip
"""What a `.metadata` is made of, by module: records of values, and the look-up of a layout by its name."""


@dataclass(frozen=True)
class DcpChunk:
    """A piece of a tensor, or another object, as it lies in a part file.

    Attributes:
        key: the record of it in the metadata (`MetadataIndex`).
        part: the file.
        start, length: its bytes there.
        offsets, sizes: where in the tensor the piece lies, and its shape; empty for other objects.
    """

    key: Any
    part: Path
    start: int
    length: int
    offsets: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()

    @property
    def place(self) -> tuple[slice, ...]:
        """The piece as an index of the whole tensor."""
        return tuple(slice(o, o + n) for o, n in zip(self.offsets, self.sizes, strict=True))


@dataclass(frozen=True)
class DcpEntry:
    """A tensor or another object of a state dict.

    Attributes:
        name: its flattened name.
        path: its keys in the nested state dict; whole numbers are places in lists.
        chunks: where it lies.
        shape, dtype: of a tensor; `dtype` is None for other objects.
    """

    name: str
    path: tuple[str | int, ...]
    chunks: tuple[DcpChunk, ...]
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None


class MetadataUnpickler(pickle.Unpickler):
    """Reads a `.metadata`; whatever else a pickle names is refused before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        """The class of that name.

        Raises:
            UnpicklingError: it is none that a `.metadata` has.
        """
        if name in CLASSES.get(module, ()):
            return super().find_class(module, name)
        if (module, name) == ("torch", "Size"):
            return torch.Size
        if module == "torch" and isinstance(found := vars(torch).get(name), torch.dtype):
            return found
        if module.split(".")[0] == "pathlib" and name in ("PosixPath", "PurePosixPath"):
            return pathlib.PurePosixPath
        if module.split(".")[0] == "pathlib" and name in ("WindowsPath", "PureWindowsPath"):
            return pathlib.PureWindowsPath
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of such a file and could run code")


def read_metadata(folder: Path) -> Any:
    """The `Metadata` record of a folder.

    Raises:
        CheckpointError: the file is unreadable, or names anything but the records of such a file; nothing of it is run.
    """
    path = folder / METADATA
    try:
        found = MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
    except Exception as cause:
        raise CheckpointError(
            f"{path} is not a readable description of a torch.distributed.checkpoint, nothing of it was run "
            f"({type(cause).__name__}: {cause}); copy it again, or save the checkpoint again"
        ) from cause
    kind = getattr(found, "state_dict_metadata", None)
    if not (isinstance(kind, dict) and isinstance(getattr(found, "storage_data", None), dict)):
        raise CheckpointError(f"{path} describes no state dict and where it is stored; save the checkpoint by dcp.save")
    return found


def entries_of(folder: Path, metadata: Any) -> dict[str, DcpEntry]:
    """Everything in a folder by its flattened name, each held against the files that are there.

    Raises:
        CheckpointError: a part is missing, cut off or outside the folder, or the pieces of a tensor do not make it up.
    """
    paths = metadata.planner_data if isinstance(metadata.planner_data, dict) else {}
    parts = _parts(folder, metadata.storage_data)
    out = {}
    for name, kind in metadata.state_dict_metadata.items():
        path = paths.get(name, (name,))
        if not (isinstance(path, tuple) and path and all(isinstance(k, str | int) for k in path)):
            raise CheckpointError(
                f"{folder / METADATA}: {name!r} lies at {path!r}, which is no place in a state dict; save it again"
            )
        if hasattr(kind, "chunks"):
            chunks = tuple(
                _chunk(folder, metadata, parts, name, (tuple(c.offsets), tuple(c.sizes))) for c in kind.chunks
            )
            out[name] = DcpEntry(name, path, chunks, tuple(kind.size), kind.properties.dtype)
            _refuse_incomplete(folder, out[name])
        else:
            out[name] = DcpEntry(name, path, (_chunk(folder, metadata, parts, name, None),))
    return out


def _parts(folder: Path, storage: Mapping[Any, Any]) -> dict[str, int]:
    """The part files by name, with their lengths."""
    out: dict[str, int] = {}
    for key, info in storage.items():
        where = info.relative_path
        if where in out:
            continue
        if not isinstance(where, str) or Path(where).name != where or (folder / where).is_symlink():
            raise CheckpointError(
                f"{folder / METADATA}: {key.fqn} lies at {where!r}, which is no file of that folder itself: copy all "
                "parts into it"
            )
        if not (folder / where).is_file():
            raise CheckpointError(
                f"{folder / where} is missing: {METADATA} names it, and {key.fqn} lies in it; copy all parts here"
            )
        out[where] = (folder / where).stat().st_size
    return out


def _chunk(
    folder: Path,
    metadata: Any,
    parts: Mapping[str, int],
    name: str,
    piece: tuple[tuple[int, ...], tuple[int, ...]] | None,
) -> DcpChunk:
    """Where one piece lies; `piece`: its offsets and sizes, None for other objects than tensors."""
    from torch.distributed.checkpoint.metadata import MetadataIndex

    key: Any = MetadataIndex(name, None if piece is None else piece[0])
    info = metadata.storage_data.get(key)
    if info is None:
        raise CheckpointError(
            f"{folder / METADATA} does not say where {name} lies; was the save finished? Save it again"
        )
    if getattr(info, "transform_descriptors", None):
        raise CheckpointError(
            f"{folder}: {name} went through the stream transforms {list(info.transform_descriptors)}; save it again "
            "without extensions"
        )
    start, length, size = info.offset, info.length, parts[info.relative_path]
    if not (start >= 0 and length > 0 and start + length <= size):
        raise CheckpointError(
            f"{folder / info.relative_path} is cut off: {name} lies at bytes {start:,} to {start + length:,}, and the "
            f"file has {size:,}; copy it again"
        )
    return DcpChunk(key, folder / info.relative_path, start, length, *(piece or ((), ())))


def _refuse_incomplete(folder: Path, entry: DcpEntry) -> None:
    """Raises CheckpointError unless the pieces lie within the tensor and have its number of entries together."""
    assert entry.dtype is not None
    inside = all(
        len(c.offsets) == len(c.sizes) == len(entry.shape)
        and all(o >= 0 and n >= 0 and o + n <= m for o, n, m in zip(c.offsets, c.sizes, entry.shape, strict=True))
        and math.prod(c.sizes) * entry.dtype.itemsize <= c.length
        for c in entry.chunks
    )
    if not inside or sum(math.prod(c.sizes) for c in entry.chunks) != math.prod(entry.shape):
        raise CheckpointError(
            f"{folder}: the stored pieces of {entry.name} do not make up its shape {entry.shape}; was it saved by "
            "every process? Save it again"
        )
