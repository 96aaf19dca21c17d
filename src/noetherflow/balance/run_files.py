"""What a training run left on disk: its weights and its optimiser's state, mapped into memory where possible."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from noetherflow.balance.torch_file import STATE_KEYS
from noetherflow.core.held import is_saved_optimizer
from noetherflow.core.tensors import named_tensors
from noetherflow.errors import CheckpointError

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
STATE_FILES = ("optimizer.pt", "optimizer.bin", "optimizer.pth")
OPTIMIZER_KEYS = ("optimizer", "optimizer_state_dict", "optimizer_state", "optim")
"""Keys under which training scripts keep the optimiser's state beside the weights in one file."""


@dataclass(frozen=True, eq=False)
class RunFiles:
    """The files of one saved training step.

    Attributes:
        weights: tensors by the names in the file, mapped into memory and not copied.
        optimizer: what `optimizer.state_dict()` gave.
    """

    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]


def read_run(path: str | Path) -> RunFiles:
    """Weights and optimiser state of a run.

    Args:
        path: a folder as the Hugging Face Trainer writes it (`checkpoint-1000/` with `model.safetensors`, sharded or
            not, or `pytorch_model.bin`, and `optimizer.pt`), or one PyTorch file that holds both, such as
            `{"model": ..., "optimizer": ...}`.

    Returns:
        Both, mapped from disk, so that a large model need not fit into memory.

    Raises:
        CheckpointError: a file is missing, unreadable, or holds no optimiser state.
    """
    path = Path(path)
    if path.is_dir():
        weights = _first(path, WEIGHT_FILES, "weights")
        state = _first(path, STATE_FILES, "optimiser state")
        return RunFiles(_weights(weights), _optimizer(_load(state), state))
    content = _load(path)
    tensors = next((content[k] for k in STATE_KEYS if isinstance(content.get(k), dict)), None)
    if tensors is None:
        raise CheckpointError(
            f"{path} holds no weights under {', '.join(STATE_KEYS)}; give a folder with {WEIGHT_FILES[0]} and "
            f"{STATE_FILES[0]}, or a file with both"
        )
    return RunFiles(tensors, _optimizer(content, path))


def weights_for(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stored weights under the model's canonical names; a tied tensor may be stored under any of its names.

    Raises:
        CheckpointError: a parameter is missing or has another shape.
    """
    canonical: dict[int, str] = {}
    found: dict[str, Tensor] = {}
    shapes: dict[str, torch.Size] = {}
    for name, tensor in named_tensors(model):
        first = canonical.setdefault(id(tensor), name)
        if isinstance(tensor, nn.Parameter):
            shapes[first] = tensor.shape
            if name in weights:
                found.setdefault(first, weights[name])
    wrong = [
        f"{n}: {'missing' if n not in found else f'{tuple(found[n].shape)} instead of {tuple(shape)}'}"
        for n, shape in shapes.items()
        if n not in found or found[n].shape != shape
    ]
    if wrong:
        raise CheckpointError(
            f"the stored weights are not those of the model ({'; '.join(wrong[:3])}, {len(wrong)} in all); stored: "
            f"{list(weights)[:3]}"
        )
    return found


def _first(folder: Path, names: tuple[str, ...], what: str) -> Path:
    """The first of the files that is there."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder} has no {what}: looked for {', '.join(names)}")


def _load(path: Path) -> dict[str, Any]:
    """A PyTorch file, mapped into memory where its format allows."""
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as cause:
        raise CheckpointError(f"{path} is not a readable checkpoint ({type(cause).__name__}: {cause})") from cause
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dictionary")
    return content


def _optimizer(content: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """The optimiser's state: the content itself, or what it has under a usual key."""
    for saved in (content, *(content[k] for k in OPTIMIZER_KEYS if k in content)):
        if isinstance(saved, Mapping) and is_saved_optimizer(saved):
            return saved
    raise CheckpointError(
        f"{path} holds no optimizer.state_dict(): no 'state' with 'param_groups', also not under "
        f"{', '.join(OPTIMIZER_KEYS)}; keys: {list(content)[:6]}"
    )


def _weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, or of all the files that an index names."""
    if path.suffix == ".json":
        shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        return {n: t for shard in shards for n, t in _weights(path.parent / shard).items()}
    if path.suffix != ".safetensors":
        return {n: t for n, t in _load(path).items() if isinstance(t, Tensor)}
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as cause:
        raise CheckpointError(f"{path} is not a readable checkpoint ({type(cause).__name__}: {cause})") from cause
