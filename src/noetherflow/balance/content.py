"""The content of a PyTorch file, rebuilt around its moved weights, averages and optimiser states."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from noetherflow.balance.motion import Motion
from noetherflow.balance.names import NameMap
from noetherflow.balance.optimizer_state import StatePlan, plan_state, without_optimizer
from noetherflow.balance.pieces import Shift, move_in_place
from noetherflow.balance.state_naming import StateNaming
from noetherflow.balance.state_rules import saved_state_rule
from noetherflow.core.held import is_saved_optimizer
from noetherflow.core.tensors import tensors_of
from noetherflow.errors import CheckpointError


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


@dataclass
class ContentMover:
    """Walks through the content of PyTorch files; `state`: the dict in the file at hand that holds its weights."""

    move: FileMove
    state: Mapping[str, Any]
    plans: list[StatePlan] = field(default_factory=list)
    averages: list[str] = field(default_factory=list)
    shifts: dict[str, Shift] = field(default_factory=dict)
    done: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    wholes: dict[str, tuple[Tensor, Shift]] = field(default_factory=dict)

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
            if name is not None and stored in self.move.names.parts:
                out[stored], shift = self.move.part(stored, self.wholes)
                self.shifts.setdefault(name, shift)
            elif name is not None:
                key = (name, tensor.data_ptr())
                if key not in self.done:
                    self.done[key] = tensor.detach().clone()
                    shift = move_in_place(self.move.motion, name, self.done[key])
                    if main:
                        self.shifts.setdefault(name, shift)
                out[stored] = self.done[key]
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
            move.held.state[move.key] = move.value(motion)
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
