"""Answers for many layers, kept on the disk until they are used."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from noetherflow.balance.safetensors_file import write_tensor

LEAST = 1 << 14
"""Bytes from which on a tensor is worth a place in a file."""
ALIGNED = 64
"""Bytes to whose multiples tensors are set."""


def spilled(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors, those that are not small mapped from a temporary file instead of held in memory.

    The file has no name; the system removes it with the last tensor of it, or with the process. It lies in Python's
    temporary folder (`TMPDIR`). Where that has no room the tensors stay in memory.

    Args:
        tensors: of any shapes and dtypes, on the host.

    Returns:
        One tensor for each; they can be written to, which changes nobody else's.

    Example:
        >>> big, small = spilled([torch.ones(4000), torch.ones(2)])
        >>> bool((big == 1).all()), len(small)
        (True, 2)
    """
    large = {i: t.contiguous() for i, t in enumerate(tensors) if t.numel() * t.element_size() >= LEAST}
    if not large:
        return list(tensors)
    starts, size = {}, 0
    for i, t in large.items():
        starts[i] = size
        size += -(-t.numel() * t.element_size() // ALIGNED) * ALIGNED
    try:
        with tempfile.TemporaryFile() as file:
            for i, t in large.items():
                file.seek(starts[i])
                write_tensor(file, t)
            file.truncate(size)
            file.flush()
            every = torch.from_numpy(np.memmap(file, dtype=np.uint8, mode="r+", shape=(size,)))
    except OSError:
        return list(tensors)
    out = list(tensors)
    for i, t in large.items():
        part = every[starts[i] : starts[i] + t.numel() * t.element_size()]
        out[i] = part.view(t.dtype).reshape(t.shape)
    return out
