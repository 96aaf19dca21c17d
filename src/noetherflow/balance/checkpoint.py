"""Balance checkpoints on disk: safetensors and PyTorch state dicts, written atomically or not at all."""

from __future__ import annotations

import copy
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from noetherflow.balance.model import BalanceReport, balance_values
from noetherflow.balance.motion import Motion
from noetherflow.balance.optimizer_state import RULES, MoveTally, moved_state, without_optimizer
from noetherflow.core.files import check_writable, replacing
from noetherflow.core.held import held_in, is_saved_optimizer
from noetherflow.core.tensors import tensors_of
from noetherflow.equilibrium.result import Equilibrium
from noetherflow.errors import CheckpointError

STATE_KEYS = ("state_dict", "model", "model_state_dict")


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The named tensors of a `.safetensors` file, or of a PyTorch file (`weights_only`; also under `state_dict`,
    `model`).

    Raises CheckpointError when the file is missing, corrupt, one of several shards or holds no tensors.
    """
    return _read(Path(path)).tensors


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

    `model` holds the weights of `source` (`load_checkpoint_`) and is not changed. Stored tensors move in float64 and
    are rounded once to their own dtypes; what has no leg is copied bit by bit. In a PyTorch file optimiser state
    (`optimizer.state_dict()`, its parameters known by `param_names` or the order of `model.parameters()`) moves as in
    `balance_`, and a dict of tensors with the model's names and shapes (averaged weights) moves like the weights; the
    report lists both, and as not moved all other tensors. The file is written beside the target and then renamed, so
    an interruption leaves no half-written file; it gets the permissions of the target, or else of the source. With
    `dry_run=True` nothing is written.

    Raises CheckpointError for a target that cannot be written (tried first), an unreadable file, one that does not
    match the model, or weights other than those in `model`; CertificateError and DataError as `balance_` does.
    """
    source, target = Path(source), Path(target)
    if not dry_run:
        check_target(target)
    file = _read(source)
    _match(model, file.tensors, source)
    _same_weights(model, file.tensors, source)
    aliases = {id(t): n for n, t in tensors_of(model).items()}
    canonical = {n: aliases[id(t)] for n, t in _all_tensors(model).items()}
    moved = copy.deepcopy(model)
    moved.zero_grad()
    report = balance_values(
        moved,
        eq,
        stored={canonical[n]: t for n, t in file.tensors.items()},
        example_inputs=example_inputs,
        certificate=certificate,
        tolerance=tolerance,
    )
    mover = _Mover(model, Motion.of(eq), canonical, file.state)
    weights_only = target.suffix == ".safetensors"
    content = mover.weights(file.tensors) if weights_only else mover.moved(file.content, "")
    if weights_only and file.content is not file.state:
        lost = [k for k, v in file.content.items() if v is not file.state]
        mover.tally.unmoved.extend(f"{k}: not written, a .safetensors file holds weights only" for k in lost)
    if not dry_run:
        _write(target, content, file.metadata, mode_of=target if target.exists() else source)
    return replace(
        report,
        state_entries=mover.tally.entries,
        approximate_state=tuple(mover.tally.approximate),
        unmoved=tuple(mover.tally.unmoved),
        averages=tuple(mover.averages),
        dry_run=dry_run,
    )


def check_target(path: str | Path) -> None:
    """Raise CheckpointError unless a file can be written at `path`; a missing folder is made."""
    path = Path(path)
    with _writing(path):
        if path.is_dir():
            raise IsADirectoryError("it is a folder; name a file in it")
        check_writable(path)


@dataclass(frozen=True)
class _File:
    """`content` as read; `state`: the dict in it (or itself) that holds the weights; `metadata` of safetensors."""

    content: dict[str, Any]
    state: dict[str, Any]
    metadata: dict[str, str] | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.state.items() if isinstance(v, Tensor)}


def _read(path: Path) -> _File:
    if path.name.endswith(".index.json"):
        raise CheckpointError(f"{path} is the index of a sharded checkpoint, which is not supported; save it unsharded")
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; name the checkpoint file in it")
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
                return _File(tensors, tensors, file.metadata())
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as cause:
        raise CheckpointError(f"{path} is not a readable checkpoint ({type(cause).__name__}: {cause})") from cause
    wrapper = content if isinstance(content, dict) else {}
    file = _File(wrapper, next((wrapper[k] for k in STATE_KEYS if isinstance(wrapper.get(k), dict)), wrapper))
    if not file.tensors:
        raise CheckpointError(f"{path} holds no named tensors (keys: {list(wrapper)[:6]})")
    return file


def _all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer under every name, tied ones included."""
    return {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}


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
    """Compares in the dtype of the model, into which the file was loaded."""
    named = _all_tensors(model)
    for name, stored in state.items():
        if not torch.equal(named[name].detach().cpu(), stored.to(named[name].dtype)):
            raise CheckpointError(
                f"{name} of {path} differs from the model the equilibrium was solved for; load the checkpoint first "
                f"(load_checkpoint_), measure and solve on it"
            )


@dataclass
class _Mover:
    """Rebuilds the content of a file around its moved weights; `canonical`: the model's tensors by every name."""

    model: nn.Module
    motion: Motion
    canonical: Mapping[str, str]
    state: dict[str, Any]
    tally: MoveTally = field(default_factory=MoveTally)
    averages: list[str] = field(default_factory=list)
    done: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def moved(self, node: Any, path: str) -> Any:
        """A copy of `node` in which weights, their averages and optimiser state are moved; the rest as it was."""
        if is_saved_optimizer(node):
            return self._optimizer(node, path)
        inside = f"{path}." if path else ""
        if isinstance(node, dict):
            own = {k: v for k, v in node.items() if isinstance(v, Tensor)}
            new = {k: self.moved(v, f"{inside}{k}") for k, v in node.items() if k not in own}
            if node is self.state or self._averages(own, path):
                new |= self.weights(own)
            else:
                self._left({f"{inside}{k}": v for k, v in own.items()})
            out = copy.copy(node)
            out.update(new)
            return out
        if type(node) in (list, tuple):
            self._left({f"{inside}{i}": v for i, v in enumerate(node) if isinstance(v, Tensor)})
            return type(node)(self.moved(v, f"{inside}{i}") for i, v in enumerate(node))
        return node

    def weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors moved; those that shared memory under names of one parameter still do."""
        out = dict(tensors)
        for name, tensor in tensors.items():
            if self.canonical[name] in self.motion.by_parameter:
                key = (self.canonical[name], tensor.data_ptr())
                if key not in self.done:
                    self.done[key] = self.motion.weight(key[0], tensor).to(tensor.dtype)
                out[name] = self.done[key]
        return out

    def _averages(self, tensors: Mapping[str, Tensor], path: str) -> bool:
        """Whether these can only be weights by the model's names: kinds and shapes agree as well."""
        named = _all_tensors(self.model)
        agree = all(
            n in named and t.shape == named[n].shape and t.is_floating_point() == named[n].is_floating_point()
            for n, t in tensors.items()
        )
        if agree and any(self.canonical[n] in self.motion.by_parameter for n in tensors):
            self.averages.append(f"{path} ({len(tensors)} tensors)")
        return agree

    def _optimizer(self, saved: dict[str, Any], path: str) -> dict[str, Any]:
        new = copy.copy(saved)
        new["state"] = {index: dict(state) for index, state in saved["state"].items()}
        try:
            held = held_in(new, self.model, RULES)
        except CheckpointError as why:
            if any(t.numel() > 1 for t in tree_leaves(saved["state"]) if isinstance(t, Tensor)):
                self.tally.unmoved.append(f"{path}: optimiser state, its parameters could not be identified: {why}")
            return saved
        for h, key, value in moved_state(held, self.motion, self.tally):
            h.state[key] = value
        self.tally.unmoved.extend(
            f"{path}: {line}" for line in without_optimizer(held, tensors_of(self.model), self.motion)
        )
        return new

    def _left(self, tensors: Mapping[str, Tensor]) -> None:
        names = [n for n, t in tensors.items() if t.is_floating_point() and t.numel() > 1]
        if names:
            self.tally.unmoved.append(
                f"{', '.join(names[:3])} ({len(names)} tensors): names or shapes are not those of the model's weights"
            )


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as cause:  # safetensors and torch.save report a full disk by types of their own
        raise CheckpointError(f"could not write {path}: {cause}") from cause


def _write(path: Path, content: dict[str, Any], metadata: dict[str, str] | None, mode_of: Path) -> None:
    mode = stat.S_IMODE(mode_of.stat().st_mode)
    with _writing(path), replacing(path, mode=mode, durable=True) as scratch:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            contiguous = {k: v.clone(memory_format=torch.contiguous_format) for k, v in content.items()}
            save_file(contiguous, scratch, metadata=metadata)
        else:
            torch.save(content, scratch)
