"""Folders of torch.distributed.checkpoint written again: the same parts, the same pieces in each."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from noetherflow.balance.dcp_file import DcpFolder, DcpTensor
from noetherflow.balance.dcp_metadata import METADATA, DcpChunk, DcpEntry
from noetherflow.balance.mapped import copy_bytes
from noetherflow.balance.torch_save import save_torch
from noetherflow.balance.waiting import WaitingTensor, own_copy


def write_dcp(folder: DcpFolder, moved: Any, target: Path) -> None:
    """Write the parts and, last, the `.metadata`; what did not move is copied bit by bit.

    Every moved tensor is put together and moved once, whatever number of parts it lies in.

    Args:
        folder: the source.
        moved: its content with what moved in it, as `DcpFolder.content` has it.
        target: a folder that is there.
    """
    places: dict[Any, tuple[int, int]] = {}
    for entry in sorted(folder.entries.values(), key=_position):
        for chunk, place in _written(entry, _at(moved, folder.paths[entry.name]), target):
            places[chunk.key] = place
    storage = {
        key: dataclasses.replace(info, offset=places[key][0], length=places[key][1])
        for key, info in folder.metadata.storage_data.items()
        if key in places
    }
    with (target / METADATA).open("wb") as file:
        pickle.dump(dataclasses.replace(folder.metadata, storage_data=storage), file)


def _position(entry: DcpEntry) -> tuple[int, str]:
    return min(((c.start, c.part.name) for c in entry.chunks), default=(0, ""))


def _at(content: Any, path: tuple[str | int, ...]) -> Any:
    """What lies under these keys; numbers that stand for parameters are words in the file."""
    for key in path:
        content = content[int(key) if isinstance(content, dict) and key not in content else key]
    return content


def _written(entry: DcpEntry, value: Any, target: Path) -> Iterator[tuple[DcpChunk, tuple[int, int]]]:
    """Append one entry to its parts; yields for each piece where it begins now, and its length."""
    moves = any(isinstance(t, WaitingTensor) and not isinstance(t.source, DcpTensor) for t in tree_leaves(value))
    whole = own_copy(value) if moves and isinstance(value, Tensor) else None
    for chunk in entry.chunks:
        with (target / chunk.part.name).open("ab") as file:
            start = file.tell()
            if whole is not None:
                torch.save(whole if len(entry.chunks) == 1 else whole[chunk.place].clone(), file)
            elif moves:
                save_torch(value, file)
            else:
                copy_bytes(chunk.part, chunk.start, chunk.length, file, entry.name)
            yield chunk, (start, file.tell() - start)
