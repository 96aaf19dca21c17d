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

from noetherflow.balance.check import OutputCheck
from noetherflow.balance.model import BalanceReport, balance_values
from noetherflow.balance.motion import Motion
from noetherflow.balance.optimizer_state import SHAPED, StatePlan, plan_state, without_optimizer
from noetherflow.balance.state_rules import saved_state_rule
from noetherflow.core.files import check_writable, replacing
from noetherflow.core.held import held_in, is_saved_optimizer
from noetherflow.core.tensors import tensors_of
from noetherflow.discovery.certificate import Certificate
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
    certificate: Certificate | None = None,
    tolerance: float | None = None,
    unchecked: bool = False,
    dry_run: bool = False,
) -> BalanceReport:
    """Write the checkpoint `source`, moved to the equilibrium `eq`, to `target`; the function it computes stays.

    Stored tensors move in float64 and are rounded once to their own dtypes; what has no leg is copied bit by bit. In a
    PyTorch file optimiser state (`optimizer.state_dict()`, its parameters known by `param_names` or the order of
    `model.parameters()`) moves as in `balance_`, and a dict of tensors with the model's names and shapes (averaged
    weights) moves like the weights; the report lists both, and as not moved all other tensors. The file is written
    beside the target and then renamed, so an interruption leaves no half-written file; it gets the permissions of the
    target, or else of the source.

    Args:
        source: a `.safetensors` or PyTorch file.
        target: where to write; may be the source.
        model: the model with the weights of `source` (`load_checkpoint_`); it is not changed.
        eq: where to.
        example_inputs: see `balance_`, as for the next three; there is one argument per choice of a call that
            overwrites files.
        certificate: what `nf.certify` said of the symmetries.
        tolerance: largest relative change of outputs.
        unchecked: move even where nothing proves that the function stays.
        dry_run: write nothing.

    Returns:
        What moved, or would.

    Raises:
        CheckpointError: a target that cannot be written (tried first), an unreadable file, one that does not match the
            model, or weights other than those in `model`.
        CertificateError: as `balance_` does, and so DataError.
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
    stored = {canonical[n]: t for n, t in file.tensors.items()}
    report = balance_values(moved, eq, OutputCheck(example_inputs, certificate, tolerance, unchecked), stored=stored)
    mover = _Mover(model, Motion.of(eq), canonical, file.state)
    content, lost = _moved_content(mover, file, weights_only=target.suffix == ".safetensors")
    if not dry_run:
        _write(target, content, file.metadata, mode_of=target if target.exists() else source)
    state = StatePlan.joined([*mover.plans, StatePlan(unmoved=tuple(lost))])
    return replace(
        report,
        state_entries=len(state.moves),
        approximate_state=state.approximate,
        unmoved=state.unmoved,
        averages=tuple(mover.averages),
        dry_run=dry_run,
    )


def _moved_content(mover: _Mover, file: _File, weights_only: bool) -> tuple[dict[str, Any], list[str]]:
    """What is to be written, and a line for everything else in the file that a weights-only format cannot hold."""
    if not weights_only:
        return mover.moved(file.content, ""), []
    others = [] if file.content is file.state else [k for k, v in file.content.items() if v is not file.state]
    return mover.weights(file.tensors), [f"{k}: not written, a .safetensors file holds weights only" for k in others]


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
    plans: list[StatePlan] = field(default_factory=list)
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
            held = held_in(new, self.model, SHAPED)
        except CheckpointError as why:
            if any(t.numel() > 1 for t in tree_leaves(saved["state"]) if isinstance(t, Tensor)):
                line = f"{path}: optimiser state, its parameters could not be identified: {why}"
                self.plans.append(StatePlan(unmoved=(line,)))
            return saved
        plan = plan_state(
            held, saved_state_rule(saved["param_groups"][0] if saved["param_groups"] else {}), self.motion
        )
        for move in plan.moves:
            move.held.state[move.key] = move.value(self.motion)
        lost = without_optimizer(held, tensors_of(self.model), self.motion)
        self.plans += [plan, StatePlan(unmoved=tuple(f"{path}: {line}" for line in lost))]
        return new

    def _left(self, tensors: Mapping[str, Tensor]) -> None:
        names = [n for n, t in tensors.items() if t.is_floating_point() and t.numel() > 1]
        if names:
            line = (
                f"{', '.join(names[:3])} ({len(names)} tensors): names or shapes are not those of the model's weights"
            )
            self.plans.append(StatePlan(unmoved=(line,)))


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
