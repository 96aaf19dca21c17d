"""Safetensors files read and written tensor by tensor: only the header is ever held as a whole."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from noetherflow.balance.mapped import MappedTensor, bytes_of, copy_bytes, unreadable
from noetherflow.errors import CheckpointError

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DEQUANTISE = (
    "dequantise the checkpoint to bfloat16 first (values times their scales, where it has such; Hugging Face models by "
    "from_pretrained(folder, dtype=torch.bfloat16) and save_pretrained), balance that, and quantise the result again"
)
"""What to do with weights of eight bits and fewer."""
LARGEST_HEADER = 100_000_000
"""The format's own limit on the bytes of a header."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file: its dtype, shape, and the bytes from `start` to `stop` in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class SafetensorsFile:
    """A safetensors file by its header.

    Attributes:
        path: the file.
        header: the header's bytes, its length in front, as they lie in the file.
        entries: the tensors by name, in the order of their bytes.
        metadata: the strings that a file may carry.
    """

    path: Path
    header: bytes
    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]

    @classmethod
    def open(cls, path: Path) -> SafetensorsFile:
        """Read the header.

        Raises:
            CheckpointError: the file is cut off or no safetensors file.
        """
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if not 0 < length <= LARGEST_HEADER:
                    raise ValueError("its first eight bytes are no header length")
                text = file.read(length)
                if len(text) < length:
                    raise ValueError("it ends within its header")
                content: dict[str, Any] = json.loads(text)
                metadata = content.pop("__metadata__", None) or {}
                entries = {n: _entry(n, e, 8 + length) for n, e in content.items()}
                size = file.seek(0, 2)
            ends = max((e.stop for e in entries.values()), default=8 + length)
            if ends != size:
                raise ValueError(f"its tensors end at byte {ends:,}, the file at {size:,}")
        except _Packed as packed:
            raise CheckpointError(f"{path}: {packed}; {DEQUANTISE}") from None
        except Exception as cause:
            raise CheckpointError(unreadable(path, cause, str(cause))) from cause
        ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
        return cls(path, length.to_bytes(8, "little") + text, ordered, metadata)

    def read(self, name: str) -> Tensor:
        """A tensor in memory of its own."""
        return self._place(name).read()

    def mapped(self, name: str) -> Tensor:
        """A tensor mapped from the disk where its place in the file allows, so that it takes no memory until used."""
        return self._place(name).view()

    def copy_bytes(self, name: str, file: BinaryIO) -> None:
        """Write the bytes of a tensor to another file, piece by piece."""
        entry = self.entries[name]
        copy_bytes(self.path, entry.start, entry.stop - entry.start, file, name)

    def _place(self, name: str) -> MappedTensor:
        entry = self.entries[name]
        return MappedTensor(self.path, entry.start, entry.shape, entry.dtype, name)


class _Packed(Exception):
    """A tensor whose numbers have fewer than eight bits."""


def _entry(name: str, data: Mapping[str, Any], offset: int) -> TensorEntry:
    """One record of a header; `offset`: where the tensors begin. Raises _Packed for numbers of four or six bits."""
    if str(data["dtype"]).startswith(("F4", "F6_")):
        raise _Packed(f"{name} is stored as {data['dtype']}, several numbers to a byte")
    dtype, shape = DTYPES.get(data["dtype"]), tuple(int(n) for n in data["shape"])
    if dtype is None:
        raise ValueError(f"dtype {data['dtype']} is unknown")
    start, stop = data["data_offsets"]
    numel = 1
    for n in shape:
        numel *= n
    if stop - start != numel * dtype.itemsize:
        raise ValueError(f"a tensor of shape {shape} has {stop - start} bytes")
    return TensorEntry(dtype, shape, offset + start, offset + stop)


def write_tensor(file: BinaryIO, tensor: Tensor) -> None:
    """The bytes of a tensor."""
    if tensor.numel():
        file.write(bytes_of(tensor.detach().cpu().contiguous()))


def header_of(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The header of a file that will hold these tensors in this order, its length in front.

    Raises:
        CheckpointError: a dtype that the format does not know.

    Example:
        >>> header_of([("w", torch.float32, (2,))], {})[8:]
        b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}   '
    """
    known = {dtype: word for word, dtype in DTYPES.items()}
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, dtype, shape in tensors:
        if dtype not in known:
            raise CheckpointError(f"{name}: safetensors files hold no {dtype}; name a target that ends in .pt")
        stop = start + torch.Size(shape).numel() * dtype.itemsize
        content[name] = {"dtype": known[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
