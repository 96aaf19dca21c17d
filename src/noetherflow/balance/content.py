"""The content of a PyTorch file, rebuilt around its moved weights, averages and optimiser states."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from noetherflow.balance.motion import Motion
from noetherflow.balance.names import NameMap
from noetherflow.balance.optimizer_state import EntryMove, StatePlan, plan_state, without_optimizer
from noetherflow.balance.pieces import Shift, move_in_place
from noetherflow.balance.state_naming import StateNaming
from noetherflow.balance.state_rules import saved_state_rule
from noetherflow.balance.waiting import WaitingTensor, memory_of, own_copy
from noetherflow.core.held import is_saved_optimizer
from noetherflow.core.tensors import tensors_of
from noetherflow.errors import CertificateError, CheckpointError


@dataclass(frozen=True, eq=False)
class FileMove:
    """What is to be done to all files of one checkpoint.

    Attributes:
        model: the model, maybe on the meta device.
        motion: the move of the weights.
        names: the stored weights by the model's names.
        weights: the stored weights by canonical name.
        naming: how the parameters of optimiser states are known.
        progress: called with the stored name of each tensor when it is done.
    """

    model: nn.Module
    motion: Motion
    names: NameMap
    weights: Mapping[str, Tensor]
    naming: StateNaming
    progress: Callable[[str], None]

    def canonical(self, stored: str) -> str | None:
        """The canonical name of a stored tensor that moves, None for one that stays."""
        name = self.names.canonical_name(stored)
        return name if name in self.motion.by_parameter else None

    def part(self, stored: str, wholes: dict[str, tuple[Tensor, Shift]]) -> tuple[Tensor, Shift]:
        """A part of a moved tensor that the file keeps in several.

        Args:
            stored: its name in the file.
            wholes: tensors moved before, by canonical name; the last two are kept for the parts that follow.
        """
        name = self.names.canonical[stored]
        if name not in wholes:
            for old in list(wholes)[:-1]:
                del wholes[old]
            whole = self.weights[name]
            wholes[name] = whole, move_in_place(self.motion, name, whole)
        whole, shift = wholes[name]
        return self.names.parts[stored].of(whole).contiguous(), shift


@dataclass(eq=False)
class MovedTensor:
    """A stored weight at its moved place, computed whenever it is asked for.

    Attributes:
        move: what is to be done.
        stored: its name in the file.
        name: the canonical name of the weight.
        before: where it was.
        wholes: of parts, the last tensors that were moved (`FileMove.part`).
        main: it is of the checkpoint's weights, not of averages of them.
        shift: what the move did to it, None before it was asked for.
    """

    move: FileMove
    stored: str
    name: str
    before: Tensor
    wholes: dict[str, tuple[Tensor, Shift]]
    main: bool
    shift: Shift | None = None

    def read(self) -> Tensor:
        """The moved value, in memory of its own."""
        if self.stored in self.move.names.parts:
            out, self.shift = self.move.part(self.stored, self.wholes)
        else:
            out = own_copy(self.before)
            self.shift = move_in_place(self.move.motion, self.name, out)
        self.move.progress(self.stored)
        return out

    def view(self) -> Tensor:
        """The moved value."""
        return self.read()


@dataclass(frozen=True, eq=False)
class MovedEntry:
    """An entry of an optimiser's state at the moved weights, computed whenever it is asked for."""

    entry: EntryMove
    motion: Motion

    def read(self) -> Tensor:
        """The moved value, in memory of its own.

        Raises:
            CheckpointError: it is NaN or infinite in its dtype.
        """
        held, key = self.entry.held, self.entry.key
        linear = self.entry.move.as_weights(self.motion, held.name)
        if linear is None:
            return self.entry.value(self.motion)
        out = own_copy(held.state[key])
        try:
            move_in_place(linear, held.name, out)
        except CertificateError as cause:
            raise CheckpointError(
                f"{key} of {held.name}, in the optimiser's state, is not finite in {out.dtype} at the moved weights; "
                "balance the weights alone, and begin with a fresh optimiser"
            ) from cause
        return out

    def view(self) -> Tensor:
        """The moved value."""
        return self.read()


@dataclass
class ContentMover:
    """Walks through the content of PyTorch files; `state`: the dict in the file at hand that holds its weights.

    What moves waits: it is computed when it is written, and forgotten then.
    """

    move: FileMove
    state: Mapping[str, Any]
    plans: list[StatePlan] = field(default_factory=list)
    averages: list[str] = field(default_factory=list)
    done: dict[tuple[str, object], WaitingTensor] = field(default_factory=dict)
    wholes: dict[str, tuple[Tensor, Shift]] = field(default_factory=dict)
    late: dict[tuple[str, object], MovedTensor] = field(default_factory=dict)

    @property
    def changes(self) -> bool:
        """Whether anything moves."""
        return bool(self.late) or any(plan.moves for plan in self.plans)

    def shifts(self) -> dict[str, Shift]:
        """What the move did to the weights, by canonical name; those that were not written are moved and forgotten."""
        out: dict[str, Shift] = {}
        for late in self.late.values():
            if late.shift is None:
                late.read()
            if late.main and late.shift is not None:
                out.setdefault(late.name, late.shift)
        return out

    def moved(self, node: Any, path: str) -> Any:
        """A copy of `node` in which weights, their averages and optimiser state are moved; the rest as it was."""
        if is_saved_optimizer(node):
            return self._optimizer(node, path)
        inside = f"{path}." if path else ""
        if isinstance(node, dict):
            own = {k: v for k, v in node.items() if isinstance(v, Tensor)}
            new = {k: self.moved(v, f"{inside}{k}") for k, v in node.items() if k not in own}
            if node is self.state or self._averages(own, path):
                new |= self.weights(own, node is self.state)
                self._left({f"{inside}{k}": v for k, v in own.items() if k in self.move.names.others})
            else:
                self._left({f"{inside}{k}": v for k, v in own.items()})
            out = copy.copy(node)
            out.update(new)
            return out
        if type(node) in (list, tuple):
            self._left({f"{inside}{i}": v for i, v in enumerate(node) if isinstance(v, Tensor)})
            return type(node)(self.moved(v, f"{inside}{i}") for i, v in enumerate(node))
        return node

    def weights(self, tensors: Mapping[str, Tensor], main: bool) -> dict[str, Tensor]:
        """The tensors moved; those that shared memory under names of one parameter still do.

        Args:
            tensors: by stored name.
            main: these are the checkpoint's weights, not averages of them.
        """
        out = dict(tensors)
        for stored, tensor in tensors.items():
            name = self.move.canonical(stored)
            if name is None:
                continue
            place = stored if stored in self.move.names.parts else memory_of(tensor)
            if (name, place) not in self.done:
                self.late[name, place] = MovedTensor(self.move, stored, name, tensor, self.wholes, main)
                self.done[name, place] = WaitingTensor(tensor.shape, tensor.dtype, self.late[name, place])
            self.late[name, place].main |= main
            out[stored] = self.done[name, place]
        return out

    def _averages(self, tensors: Mapping[str, Tensor], path: str) -> bool:
        """Whether these can only be weights by the model's names: kinds and shapes agree as well."""
        known = tensors_of(self.move.model)
        agree = all(
            (own := known.get(self.move.names.canonical_name(n) or "")) is not None
            and n not in self.move.names.parts
            and t.shape == own.shape
            and t.is_floating_point() == own.is_floating_point()
            for n, t in tensors.items()
        )
        if agree and any(self.move.canonical(n) is not None for n in tensors):
            self.averages.append(f"{path} ({len(tensors)} tensors)")
        return agree

    def _optimizer(self, saved: dict[str, Any], path: str) -> dict[str, Any]:
        motion, model = self.move.motion, self.move.model
        new = copy.copy(saved)
        new["state"] = {index: dict(state) for index, state in saved["state"].items()}
        try:
            held = self.move.naming.held(new, model, motion, self.move.weights)
        except CheckpointError as why:
            if any(t.numel() > 1 for t in tree_leaves(saved["state"]) if isinstance(t, Tensor)):
                line = f"{path}: optimiser state, its parameters could not be identified: {why}"
                self.plans.append(StatePlan(unmoved=(line,)))
            return saved
        plan = plan_state(held, saved_state_rule(saved["param_groups"][0] if saved["param_groups"] else {}), motion)
        for move in plan.moves:
            old = move.held.state[move.key]
            before = replace(move, held=replace(move.held, state={move.key: old}))
            move.held.state[move.key] = WaitingTensor(old.shape, old.dtype, MovedEntry(before, motion))
        lost = without_optimizer(held, tensors_of(model), motion)
        self.plans += [plan, StatePlan(unmoved=tuple(f"{path}: {line}" for line in lost))]
        return new

    def _left(self, tensors: Mapping[str, Tensor]) -> None:
        names = [n for n, t in tensors.items() if t.is_floating_point() and t.numel() > 1]
        if names:
            line = (
                f"{', '.join(names[:3])} ({len(names)} tensors): names or shapes are not those of the model's weights"
            )
            self.plans.append(StatePlan(unmoved=(line,)))
