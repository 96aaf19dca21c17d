"""Balance checkpoints on disk: safetensors and PyTorch state dicts, written atomically or not at all."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from noetherflow.balance import BalanceReport, _balance
from noetherflow.equilibrium.result import Equilibrium
from noetherflow.errors import CheckpointError
from noetherflow.symmetry_set import tensors_of

STATE_KEYS = ("state_dict", "model", "model_state_dict")


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The named tensors of a `.safetensors` file, or of a PyTorch file (`weights_only`; also under `state_dict`,
    `model`).

    Raises CheckpointError when the file is missing, corrupt or holds no tensors.
    """
    return _read(Path(path))[0]


def load_checkpoint_(model: nn.Module, path: str | Path) -> dict[str, Tensor]:
    """Load a checkpoint into `model` (tied names may be missing); returns the tensors as stored.

    Raises CheckpointError naming what is missing, unexpected or of another shape; the model is then untouched.
    """
    state = read_checkpoint(path)
    _match(model, state, Path(path))
    with torch.no_grad():
        for name, tensor in _all_tensors(model).items():
            if name in state:
                tensor.copy_(state[name])
    return state


def balance_checkpoint(
    source: str | Path,
    target: str | Path,
    model: nn.Module,
    eq: Equilibrium,
    *,
    example_inputs: Any = None,
    certificate: Any = None,
    tolerance: float | None = None,
    dry_run: bool = False,
) -> BalanceReport:
    """Write the checkpoint `source`, moved to the equilibrium `eq`, to `target`; the function it computes stays the
    same.

    `model` holds the weights of `source` (`load_checkpoint_`) and is not changed. Moves are computed in float64 and
    stored in the dtype of each stored tensor; what has no leg is copied bit by bit. The file is written beside the
    target and then renamed, so an interruption leaves no half-written file. With `dry_run=True` nothing is written.

    Raises CheckpointError for an unreadable file, one that does not match the model, or weights other than those in
    `model`; CertificateError as `balance_` does.
    """
    source, target = Path(source), Path(target)
    state, wrapper, metadata = _read(source)
    _match(model, state, source)
    _same_weights(model, state, source)
    moved = copy.deepcopy(model)
    aliases = {id(t): n for n, t in tensors_of(model).items()}
    canonical = {n: aliases[id(t)] for n, t in _all_tensors(model).items()}
    report = _balance(
        moved,
        eq,
        example_inputs=example_inputs,
        certificate=certificate,
        tolerance=tolerance,
        dtypes={canonical[n]: t.dtype for n, t in state.items()},
    )
    if not dry_run:
        values = _all_tensors(moved)
        new = {n: values[n].detach().to(t.dtype) if canonical[n] in report.moved else t for n, t in state.items()}
        _write(target, new, wrapper, metadata)
    return report


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None, dict[str, str] | None]:
    """Tensors, the dict they were found in (PyTorch files) and safetensors metadata."""
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                return {k: file.get_tensor(k) for k in file.keys()}, None, file.metadata()  # noqa: SIM118
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as cause:
        raise CheckpointError(f"{path} is not a readable checkpoint ({type(cause).__name__}: {cause})") from cause
    wrapper = content if isinstance(content, dict) else {}
    inner: Any = next((wrapper[k] for k in STATE_KEYS if isinstance(wrapper.get(k), dict)), wrapper)
    state = {k: v for k, v in inner.items() if isinstance(v, Tensor)}
    if not state:
        raise CheckpointError(f"{path} holds no named tensors (keys: {list(wrapper)[:6]})")
    return state, wrapper, None


def _all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer under every name, tied ones included."""
    return dict(model.state_dict(keep_vars=True))


def _match(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    named = _all_tensors(model)
    present = {id(named[n]) for n in state if n in named}
    missing = [n for n, t in named.items() if n not in state and id(t) not in present]
    unexpected = [n for n in state if n not in named]
    shapes = [
        f"{n}: file {tuple(t.shape)}, model {tuple(named[n].shape)}"
        for n, t in state.items()
        if n in named and t.shape != named[n].shape
    ]
    problems = {"missing in the file": missing, "unknown to the model": unexpected, "of another shape": shapes}
    found = [f"{what}: {names[:3]} ({len(names)} in all)" for what, names in problems.items() if names]
    if found:
        raise CheckpointError(f"{path} does not match the model; {'; '.join(found)}")


def _same_weights(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    named = _all_tensors(model)
    for name, stored in state.items():
        if not torch.equal(named[name].detach().cpu().double(), stored.double()):
            raise CheckpointError(
                f"{name} of {path} differs from the model the equilibrium was solved for; load the checkpoint first "
                f"(load_checkpoint_), measure and solve on it"
            )


def _write(
    path: Path, state: dict[str, Tensor], wrapper: dict[str, Any] | None, metadata: dict[str, str] | None
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    os.close(handle)
    partial = Path(name)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(
                {k: v.clone(memory_format=torch.contiguous_format) for k, v in state.items()},
                partial,
                metadata=metadata,
            )
        else:
            torch.save(_put_back(wrapper or {}, state), partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as cause:
        raise CheckpointError(f"could not write {path}: {cause}") from cause
    finally:
        partial.unlink(missing_ok=True)


def _put_back(wrapper: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Any]:
    for key in STATE_KEYS:
        if isinstance(wrapper.get(key), dict):
            return {**wrapper, key: {**wrapper[key], **state}}
    return {**wrapper, **state}
