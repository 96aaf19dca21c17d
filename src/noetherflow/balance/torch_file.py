"""PyTorch files read without running anything that they contain."""

from __future__ import annotations

import argparse
import mmap
import pathlib
import re
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy._core.multiarray as multiarray
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from noetherflow.balance.mapped import MappedTensor, unreadable
from noetherflow.balance.waiting import WaitingTensor, replace_tensors
from noetherflow.core.held import is_saved_optimizer
from noetherflow.errors import CheckpointError

STATE_KEYS = ("state_dict", "model", "model_state_dict", "module", "net", "network", "weights", "params")
"""Keys under which training scripts keep the weights."""
SAFE = (
    argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath, np.ndarray, np.dtype,
    multiarray._reconstruct, multiarray.scalar,
    *(kind for name, kind in vars(np.dtypes).items() if name.endswith("DType")),
)  # fmt: skip
"""Classes beside torch's own that only hold values, and may therefore be read."""


def load_torch(path: Path) -> Any:
    """The content of a PyTorch file; its tensors wait on the disk where its format allows.

    Only tensors, plain containers, numbers, strings, numpy arrays, paths and `argparse.Namespace` are read, and what
    the user has allowed by `torch.serialization.add_safe_globals`.

    Raises:
        CheckpointError: the file is no PyTorch file, or holds objects of other classes.
    """
    if not zipfile.is_zipfile(path):
        return load_safely(path, path)
    content = load_safely(path, path, mmap=True)
    base = _address(content, path)
    if base is not None:
        _let_wait(content, path, base)
    return content


def load_safely(file: Any, where: object, **options: Any) -> Any:
    """`torch.load` of tensors and of classes that only hold values.

    Args:
        file: a path, or a file that is open.
        where: what messages call it.
        options: of `torch.load`.

    Raises:
        CheckpointError: it is unreadable, or holds objects of other classes.
    """
    allowed = [*torch.serialization.get_safe_globals(), *SAFE]
    try:
        with torch.serialization.safe_globals(allowed):
            return load_mapped(file, {"map_location": "cpu", **options})
    except Exception as cause:
        found = re.search(r"(?:GLOBAL|Unsupported class|Trying to call) ([\w.]+)", str(cause))
        if found is not None:
            raise CheckpointError(
                f"{where} holds an object of {found[1]}, which could run code when it is read. Where you trust the "
                f"file, allow it: torch.serialization.add_safe_globals([{found[1].rsplit('.', 1)[-1]}]); or save the "
                "weights again without it"
            ) from cause
        text = str(cause).splitlines()[0] if str(cause) else ""
        raise CheckpointError(unreadable(where, cause, text)) from cause


def load_mapped(file: Any, options: Mapping[str, Any]) -> Any:
    """`torch.load` of plain values; with `mmap` in pages of its own. The system refuses those of a file larger than its
    memory, since they could all be changed; they are then the file's own, which nothing here writes to.
    """
    try:
        return torch.load(file, weights_only=True, **options)
    except RuntimeError as cause:
        if not (options.get("mmap") and "Cannot allocate memory" in str(cause)):
            raise
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        return torch.load(file, weights_only=True, **options)


def _address(content: Any, path: Path) -> int | None:
    """Where in memory the first byte of a mapped file lies; None where torch does not tell, or bytes were swapped."""
    with zipfile.ZipFile(path) as archive:
        orders = [archive.read(n) for n in archive.namelist() if n.endswith("/byteorder")]
    outline = load_safely(path, path, map_location="meta")
    places = [getattr(t.untyped_storage(), "_checkpoint_offset", None) for t in _plain_tensors(outline)]
    mapped = [t.untyped_storage().data_ptr() for t in _plain_tensors(content)]
    if len(places) != len(mapped) or None in places or orders not in ([], [sys.byteorder.encode()]):
        return None
    found = {here - place for here, place in zip(mapped, places, strict=True) if place is not None}
    return next(iter(found)) if len(found) == 1 else None


def _plain_tensors(content: Any) -> list[Tensor]:
    """Tensors that have entries and are no parameters or subclasses, in order."""
    return [t for t in tree_leaves(content) if type(t) is Tensor and t.layout is torch.strided and t.numel()]


def _let_wait(content: Any, path: Path, base: int) -> None:
    """Replace, in place, the mapped tensors that fill their storage by ones that wait on the disk.

    Those that are one and the same share a source; views of one storage that differ stay as they are.
    """
    sources: dict[int, MappedTensor] = {}
    made: dict[Tensor, WaitingTensor] = {}
    every = [t for t in tree_leaves(content) if isinstance(t, Tensor) and t.layout is torch.strided]
    differing = {t.untyped_storage().data_ptr() for t in every if type(t) is not Tensor or not _fills(t)}
    for t in _plain_tensors(content):
        new = MappedTensor(path, t.untyped_storage().data_ptr() - base, tuple(t.shape), t.dtype)
        if sources.setdefault(new.start, new) != new:
            differing.add(new.start + base)

    def waiting(t: Tensor) -> Tensor:
        source = sources.get(t.untyped_storage().data_ptr() - base) if t.layout is torch.strided else None
        if source is None or source.start + base in differing:
            return t
        return made.setdefault(t, WaitingTensor(t.shape, t.dtype, source))

    replace_tensors(content, waiting)


def _fills(t: Tensor) -> bool:
    return t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes and not t.requires_grad


def weights_in(content: Any, path: Path, key: str | None = None) -> dict[str, Any]:
    """The dictionary in a file's content that holds the weights by name; other entries may lie among them.

    Args:
        content: what `load_torch` gave.
        path: for messages.
        key: where they lie, keys of nested dictionaries joined by dots; the usual ones are tried without it, at the top
            and in a dictionary there.

    Raises:
        CheckpointError: nothing there, or nothing under the usual keys and several dictionaries that could be it.

    Example:
        >>> weights_in({"epoch": 3, "model": {"w": torch.zeros(2)}}, Path("run.pt"))
        {'w': tensor([0., 0.])}
    """
    if isinstance(content, argparse.Namespace):
        content = vars(content)
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, not a dictionary of named tensors: save model.state_dict()"
        )
    if key is not None:
        return _under(content, path, key)
    found = next((content[k] for k in STATE_KEYS if _holds_tensors(content.get(k))), None)
    if found is not None:
        return dict_of(found)
    if _holds_tensors(content):
        return content
    nested = [k for k, v in content.items() if _holds_tensors(v) and not is_saved_optimizer(v)]
    if len(nested) == 1:
        return dict_of(content[nested[0]])
    deeper = [v for v in content.values() if isinstance(v, dict) and any(_holds_tensors(v.get(k)) for k in STATE_KEYS)]
    if not nested and len(deeper) == 1:
        return weights_in(deeper[0], path)
    several = (
        f"; weights may lie under {nested}: say which by key= (--key)" if nested else ": say which by key= (--key)"
    )
    raise CheckpointError(f"{path} holds no named tensors (keys: {list(content)[:6]}{several})")


def dict_of(value: Any) -> dict[str, Any]:
    """A mapping as the dictionary that it is."""
    assert isinstance(value, dict)
    return value


def _under(content: Mapping[str, Any], path: Path, key: str) -> dict[str, Any]:
    node: Any = content
    rest = key
    while rest:
        if isinstance(node, argparse.Namespace):
            node = vars(node)
        keys = (
            [k for k in node if isinstance(k, str) and (rest == k or rest.startswith(k + "."))]
            if isinstance(node, dict)
            else []
        )
        if not keys:
            raise CheckpointError(f"{path} has nothing under {key!r}; give one of its keys: {list(content)[:8]}")
        longest = max(keys, key=len)
        node, rest = node[longest], rest[len(longest) + 1 :]
    if not _holds_tensors(node):
        raise CheckpointError(
            f"{path} holds no named tensors under {key!r}, but {type(node).__name__}: "
            "give the key of a dictionary of them"
        )
    return dict_of(node)


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def tensors_in(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors among the entries."""
    return {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)}
