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

from noetherflow.balance.dcp_file import DcpFolder
from noetherflow.balance.dcp_metadata import METADATA
from noetherflow.balance.mapped import unreadable
from noetherflow.balance.torch_file import STATE_KEYS, load_mapped, tensors_in, weights_in
from noetherflow.core.held import is_saved_optimizer
from noetherflow.core.tensors import named_tensors
from noetherflow.errors import CheckpointError

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
STATE_FILES = (
    "optimizer.pt",
    "optimizer.bin",
    "optimizer.pth",
    "optimizer.safetensors",
    "optimizer_state.safetensors",
)
GROUP_FILES = ("optimizer_param_groups.json", "optimizer.json", "param_groups.json")
"""Files beside a state in safetensors that may hold its parameter groups; its own metadata comes first."""
STATE_NAMES = frozenset(
    {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg"}
)
"""Keys of the states that are read from safetensors."""
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
            not, or `pytorch_model.bin`, and `optimizer.pt` or `optimizer.safetensors`: `optimizer_in_safetensors`), a
            folder of torch.distributed.checkpoint with both, or one PyTorch file that holds both, such as
            `{"model": ..., "optimizer": ...}`.

    Returns:
        Both, mapped from disk, so that a large model need not fit into memory.

    Raises:
        CheckpointError: a file is missing, unreadable, or holds no optimiser state.
    """
    path = Path(path)
    if (path / METADATA).is_file():
        content = DcpFolder.open(path).content()
        return RunFiles(tensors_in(weights_in(content, path)), _optimizer(_with_optimizer(content), path))
    if path.is_dir():
        weights = _first(path, WEIGHT_FILES, "weights")
        state = _first(path, STATE_FILES, "optimiser state")
        return RunFiles(_weights(weights), saved_optimizer(state))
    content = _load(path)
    tensors = next((content[k] for k in STATE_KEYS if isinstance(content.get(k), dict)), None)
    if tensors is None:
        raise CheckpointError(
            f"{path} holds no weights under {', '.join(STATE_KEYS)}; give a folder with {WEIGHT_FILES[0]} and "
            f"{STATE_FILES[0]}, or a file with both"
        )
    return RunFiles(tensors, _optimizer(content, path))


def saved_optimizer(path: Path) -> Mapping[str, Any]:
    """An optimiser's `state_dict()` from a PyTorch or safetensors file, mapped into memory.

    Raises:
        CheckpointError: the file is unreadable or holds none.
    """
    return optimizer_in_safetensors(path) if path.suffix == ".safetensors" else _optimizer(_load(path), path)


def optimizer_in_safetensors(path: Path) -> dict[str, Any]:
    """An optimiser's `state_dict()` from a safetensors file, whose tensors are named by parameter and key of the state.

    Names are parameter and key in either order, joined by `.` or `/`, perhaps behind `state` or `optimizer`:
    `state/0/exp_avg`, `layers.0.weight.exp_avg`, `exp_avg.layers.0.weight`. Parameter groups are JSON, in the metadata
    of the file under `param_groups` or in a file beside it.

    Args:
        path: the file.

    Raises:
        CheckpointError: the file is unreadable, a name has no key of a state, or there are no parameter groups.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except Exception as cause:
        raise CheckpointError(unreadable(path, cause, str(cause))) from cause
    state: dict[Any, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        parameter, key = _parameter_and_key(name, path)
        state.setdefault(parameter, {})[key] = tensor
    return {"state": state, "param_groups": _groups(metadata, path, list(state))}


def _parameter_and_key(name: str, path: Path) -> tuple[int | str, str]:
    """The parameter, by number or name, and the key of its state in the name of a stored tensor."""
    parts = name.replace("/", ".").split(".")
    while len(parts) > 2 and parts[0] in ("state", *OPTIMIZER_KEYS):
        parts = parts[1:]
    first, last = parts[0] in STATE_NAMES, parts[-1] in STATE_NAMES
    if len(parts) < 2 or first == last:
        raise CheckpointError(
            f"{path}: {name!r} does not say which entry of an optimiser's state it is; expected names such as "
            f"'0.exp_avg' or 'layers.0.weight.exp_avg' with one of {', '.join(sorted(STATE_NAMES))}"
        )
    key, rest = (parts[0], parts[1:]) if first else (parts[-1], parts[:-1])
    return int(rest[0]) if len(rest) == 1 and rest[0].isdigit() else ".".join(rest), key


def _groups(metadata: Mapping[str, str], path: Path, parameters: list[Any]) -> list[dict[str, Any]]:
    """The parameter groups of a state in safetensors; one without parameters has them all."""
    beside = next((path.parent / n for n in GROUP_FILES if (path.parent / n).is_file()), None)
    text = metadata.get("param_groups") or (None if beside is None else beside.read_text())
    if text is None:
        raise CheckpointError(
            f"{path} has no parameter groups (lr, betas, weight_decay ...): neither 'param_groups' in its metadata nor "
            f"one of {', '.join(GROUP_FILES)} beside it; write optimizer.state_dict()['param_groups'] there as JSON"
        )
    try:
        content = json.loads(text)
    except ValueError as cause:
        raise CheckpointError(f"the parameter groups of {path} are no JSON: {cause}") from cause
    groups = content.get("param_groups") if isinstance(content, dict) else content
    if not (isinstance(groups, list) and groups and all(isinstance(g, dict) for g in groups)):
        raise CheckpointError(f"the parameter groups of {path} are no list of settings: {str(content)[:80]}")
    if len(groups) == 1 and "params" not in groups[0]:
        groups = [
            {**groups[0], "params": sorted(parameters) if all(isinstance(n, int) for n in parameters) else parameters}
        ]
    return groups


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
        content = load_mapped(path, {"map_location": "cpu", "mmap": zipfile.is_zipfile(path)})
    except Exception as cause:
        raise CheckpointError(unreadable(path, cause, str(cause))) from cause
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


def _with_optimizer(content: dict[str, Any]) -> dict[str, Any]:
    """The dictionary that has an optimiser's state under a usual key: the content, or one that lies in it."""
    inside = [content, *(v for v in content.values() if isinstance(v, dict))]
    return next((d for d in inside if any(k in d for k in OPTIMIZER_KEYS)), content)


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
        raise CheckpointError(unreadable(path, cause, str(cause))) from cause
