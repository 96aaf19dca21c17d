"""Bytes of files: tensors read from them or mapped, and pieces copied."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from noetherflow.errors import CheckpointError

AT_A_TIME = 1 << 24
"""Bytes that are copied at a time."""


@dataclass(frozen=True)
class MappedTensor:
    """A contiguous tensor in a file: its bytes begin at `start`. `name`: what messages call it."""

    path: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    name: str = "a tensor"

    def read(self) -> Tensor:
        """The tensor in memory of its own."""
        out = torch.empty(self.shape, dtype=self.dtype)
        if out.numel():
            with self.path.open("rb") as file:
                file.seek(self.start)
                read = file.readinto(bytes_of(out))
            if read != out.nbytes:
                raise _ended(self.path, self.name)
        return out

    def view(self) -> Tensor:
        """The tensor in pages of the file, which are given back with it, where its place in the file allows."""
        length = torch.Size(self.shape).numel() * self.dtype.itemsize
        if not length or self.start % self.dtype.itemsize:
            return self.read()
        pages = np.memmap(self.path, dtype=np.uint8, mode="c", offset=self.start, shape=(length,))
        out: Tensor = torch.from_numpy(pages).view(self.dtype).reshape(self.shape)
        return out


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, which may be written to."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def copy_bytes(path: Path, start: int, length: int, file: BinaryIO, name: str) -> None:
    """Write some bytes of the file at `path` to another one, piece by piece; `name`: what messages call them."""
    with path.open("rb") as own:
        own.seek(start)
        while length:
            part = own.read(min(AT_A_TIME, length))
            if not part:
                raise _ended(path, name)
            file.write(part)
            length -= len(part)


def unreadable(where: object, cause: Exception, text: str) -> str:
    """The message where a file cannot be read: what it is called, why, in words, and the way out."""
    return (
        f"{where} is not a readable checkpoint ({type(cause).__name__}: {text}): it is cut off, or of another format; "
        "copy it again, or save it again"
    )


def _ended(path: Path, name: str) -> CheckpointError:
    return CheckpointError(f"{path} ended within {name}; has it been changed meanwhile? Copy it again")
