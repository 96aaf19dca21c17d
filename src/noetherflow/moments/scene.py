"""What a captured pass takes for fixed: the tensors and settings of a model's modules, and modes of torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
"""Types whose values are compared; of anything else it counts whether it is the same object."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

Key = tuple[str, ...]
"""Where in the model a fact is: the module's name, the attribute, and what of it."""


@dataclass(frozen=True, eq=False, slots=True)
class Same:
    """Equal to another `Same` only if both hold one and the same object."""

    held: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.held is self.held

    def __hash__(self) -> int:
        return hash(id(self.held))


@dataclass(frozen=True, eq=False)
class Scene:
    """All that Python may read of a model while it runs, but the values of tensors.

    Attributes:
        facts: By place: numbers, words and types by value, tensors and other objects by identity; of tensors also type,
            device, shape and whether they are trained.
        tensors: The parameters, buffers and other tensors of the modules, each once.
    """

    facts: dict[Key, Any]
    tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, modules: Sequence[tuple[str, nn.Module]], loss_fn: Any) -> Scene:
        """The scene at this moment.

        Args:
            modules: the modules with their names.
            loss_fn: the loss, of which it counts whether it is the same object.
        """
        facts: dict[Key, Any] = {("", "loss_fn"): Same(loss_fn), **_modes()}
        tensors: dict[int, Tensor] = {}
        for name, module in modules:
            for key, value in _attributes(name, module):
                facts[key] = value if type(value) in PLAIN else Same(value)
                if isinstance(value, Tensor):
                    facts[(*key, "as")] = _told_apart(value)
                    tensors[id(value)] = value
        return cls(facts, tuple(tensors.values()))

    def difference(self, other: Scene) -> str | None:
        """What is another thing in the other scene, by name; None if nothing is.

        Example:
            >>> layer = nn.Dropout(0.5)
            >>> before = Scene.of([("drop", layer)], None)
            >>> layer.p = 0.1
            >>> before.difference(Scene.of([("drop", layer)], None))
            'drop.p'
        """
        if self.facts == other.facts:
            return None
        both = self.facts.keys() & other.facts.keys()
        changed = [k for k in {**self.facts, **other.facts} if k not in both or self.facts[k] != other.facts[k]]
        return ".".join(part for part in changed[0] if part)


OWN = frozenset(vars(nn.Module()))
"""What every module holds."""


def numbers_held(modules: Sequence[nn.Module]) -> list[Any]:
    """What a forward may count or switch in Python: the numbers and words among the modules' own attributes.

    Example:
        >>> layer = nn.Identity()
        >>> layer.calls = {"so far": 3}
        >>> numbers_held([layer, nn.ReLU()])
        [3, False]
    """
    found = []
    for module in modules:
        for key, value in vars(module).items():
            if key not in OWN and not isinstance(value, Tensor):
                found += [held for _, held in _within((key,), value) if type(held) in PLAIN]
    return found


def _modes() -> dict[Key, Any]:
    """Modes of torch that change what operators a forward runs, or how exactly."""
    found: dict[Key, Any] = {
        ("torch", "default dtype"): torch.get_default_dtype(),
        ("torch", "deterministic algorithms"): torch.are_deterministic_algorithms_enabled(),
        ("torch", "float32 matmul precision"): torch.get_float32_matmul_precision(),
    }
    for device in ("cpu", "cuda"):
        on = torch.is_autocast_enabled(device)
        found["torch", f"autocast on {device}"] = torch.get_autocast_dtype(device) if on else None
    return found


def _attributes(name: str, module: nn.Module) -> Iterator[tuple[Key, Any]]:
    """What a module holds: its parameters, buffers and modules, its hooks, and its own attributes."""
    yield (name, "training"), module.training
    for held in (module._parameters, module._buffers, module._modules):
        for key, value in held.items():
            yield (name, key), value
    for hooks in HOOKS:
        for number in getattr(module, hooks, None) or ():
            yield (name, hooks, str(number)), True
    for key, value in vars(module).items():
        if not key.startswith("_"):
            yield from _within((name, key), value)


def _within(key: Key, value: Any) -> Iterator[tuple[Key, Any]]:
    """A value, or what lists, tuples and dictionaries hold."""
    if type(value) is dict:
        for k, v in value.items():
            yield from _within((*key, str(k)), v)
    elif type(value) in (list, tuple):
        for k, v in enumerate(value):
            yield from _within((*key, str(k)), v)
    else:
        yield key, value


def _told_apart(tensor: Tensor) -> tuple[Any, ...]:
    """What a captured pass relies on besides a tensor's values; its address only where launches hold on to it."""
    address = tensor.data_ptr() if tensor.is_cuda else 0
    layout = tensor.stride() if tensor.layout is torch.strided else tensor.layout
    return tensor.dtype, tensor.device, tensor.requires_grad, tensor.shape, layout, address
