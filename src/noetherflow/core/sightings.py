"""What is seen of a model's activations while something else runs it: silent units, and how attention logits spread."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from noetherflow.core.torch_internals import is_python_function_of_torch, transparent, under_functional_transform

PASSES: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "relu": (0.0, math.inf),
        "relu6": (0.0, 6.0),
        "hardtanh": (-1.0, 1.0),
        "tanh": (-3.8, 3.8),
        "sigmoid": (-7.6, 7.6),
        "hardsigmoid": (-3.0, 3.0),
        "gelu": (-4.0, math.inf),
        "silu": (-10.0, math.inf),
        "mish": (-10.0, math.inf),
        "hardswish": (-3.0, math.inf),
        "elu": (-7.0, math.inf),
        "selu": (-7.0, math.inf),
        "celu": (-7.0, math.inf),
        "softplus": (-7.0, math.inf),
    }
)
"""Inputs between which an activation passes a gradient on. Outside its slope is 0, or below 0.002, where tanh is beyond
0.999 and sigmoid within 0.0005 of 0 or 1.
"""
CHANNELS_FIRST = ("out_channels", "num_features", "num_channels")
"""Attributes of modules whose units lie on the second axis of their output."""
MASKED = -1e4
"""Logits below this are masks."""
SAMPLED = 8
"""Samples of a batch that attention logits are taken from."""


@dataclass(frozen=True, eq=False)
class SeenUnits:
    """The units of one layer with an activation that can go silent.

    Attributes:
        layer: the module whose output the activation takes.
        activation: its name, such as `relu`.
        alive: which units passed a gradient on for at least one sample and position. `[units]`.
    """

    layer: str
    activation: str
    alive: Tensor


@dataclass(frozen=True, eq=False)
class SeenLogits:
    """The attention logits of one module.

    Attributes:
        module: that computes the attention.
        spread: their standard deviation over the keys that a query may look at, as the root mean square over queries;
            a softmax does not feel more of them than that. `[heads]`.
    """

    module: str
    spread: Tensor


@dataclass(frozen=True, eq=False)
class Sightings:
    """What was seen; empty where the model ran outside of what a `Sighting` sees, such as a fused kernel."""

    units: tuple[SeenUnits, ...] = ()
    logits: tuple[SeenLogits, ...] = ()


@dataclass(eq=False)
class Spread:
    """Sums over queries of the variance of logits over keys. `[heads]`."""

    total: Tensor
    queries: Tensor

    @property
    def value(self) -> Tensor:
        return (self.total / self.queries.clamp_min(1)).sqrt()


@dataclass(eq=False)
class Whereabouts:
    """Which module runs now, and which one made a tensor."""

    model: nn.Module
    running: list[str] = field(default_factory=list)
    made: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    last: str = ""
    handles: list[RemovableHandle] = field(default_factory=list)

    def follow(self) -> None:
        """Hook every module until `leave`."""
        for name, module in self.model.named_modules():
            self.handles.append(module.register_forward_pre_hook(lambda *_, name=name: self.running.append(name)))
            own = next(module.parameters(recurse=False), None) is not None
            ended = lambda _, __, out, name=name, own=own: self._ended(name, own, out)
            self.handles.append(module.register_forward_hook(ended, always_call=True))

    def leave(self) -> None:
        """Take the hooks away again."""
        for handle in self.handles:
            handle.remove()

    def _ended(self, name: str, own: bool, out: Any) -> None:
        while self.running and self.running.pop() != name:
            pass
        if own and isinstance(out, Tensor):
            self.last = name
            self.made[out] = (name, 0)

    @property
    def here(self) -> str:
        """The innermost module that runs now."""
        return self.running[-1] if self.running else ""

    def maker(self, value: Tensor) -> tuple[str, int]:
        """The module with weights of its own that made this tensor, where that is not known the last that ran, and how
        many activations came between.
        """
        found: tuple[str, int] = self.made.get(value, (self.last, 0))  # type: ignore[no-untyped-call]
        return found


@contextmanager
def looking_at(model: nn.Module) -> Iterator[Sighting]:
    """Looks at activations and attention logits while the block runs a model, and changes nothing.

    Seen are the functions of torch that the forward calls, by whatever runs it. What runs compiled, fused or under
    `torch.func` is not.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> with torch.no_grad():
        ...     _ = model[0].weight.zero_(), model[0].bias.copy_(torch.tensor([1.0, -1.0, 1.0, 1.0]))
        >>> with looking_at(model) as seen:
        ...     _ = model(torch.randn(5, 3))
        >>> [(s.layer, s.activation, s.alive.tolist()) for s in seen.found.units]
        [('0', 'relu', [True, False, True, True])]
    """
    places = Whereabouts(model)
    places.follow()
    try:
        with Sighting(model, places) as seen:
            yield seen
    finally:
        places.leave()


class Sighting(TorchFunctionMode):
    """The mode by which `looking_at` sees each call; `found` is what it saw so far."""

    def __init__(self, model: nn.Module, places: Whereabouts) -> None:
        super().__init__()
        self._places = places
        self._channels = {n for n, m in model.named_modules() if any(hasattr(m, a) for a in CHANNELS_FIRST)}
        self._alive: dict[tuple[str, str, int], Tensor] = {}
        self._spreads: dict[str, Spread] = {}
        self._inside: list[Any] = []
        """Functions looked into now. Those of pooling call themselves, by the name they are dispatched from."""

    @property
    def found(self) -> Sightings:
        """What was seen so far."""
        units = tuple(SeenUnits(layer, name, alive.cpu()) for (layer, name, _), alive in self._alive.items())
        return Sightings(units, tuple(SeenLogits(n, s.value.cpu()) for n, s in self._spreads.items()))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if args and _is_plain(args[0]):
            if name.rstrip("_") in PASSES:
                return self._activated(name.rstrip("_"), func, args, kwargs)
            with torch.no_grad():
                if name == "scaled_dot_product_attention":
                    self._see_logits(_logits(args, kwargs))
                elif name == "softmax" and _over_keys(args, kwargs):
                    self._see_logits(args[0])
        if is_python_function_of_torch(func) and name != "softmax" and func not in self._inside:
            self._inside.append(func)
            try:
                with self:
                    return transparent(func)(*args, **kwargs)
            finally:
                self._inside.pop()
        return func(*args, **kwargs)

    def _activated(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The result of an activation, after a look at its input, which it may overwrite."""
        layer, depth = self._places.maker(args[0])
        if args[0].ndim > 1 and args[0].numel():
            with torch.no_grad():
                self._see_units((layer, name, depth), args, kwargs)
        out = func(*args, **kwargs)
        if isinstance(out, Tensor):
            self._places.made[out] = (layer, depth + 1)
        return out

    def _see_units(self, where: tuple[str, str, int], args: Any, kwargs: dict[str, Any]) -> None:
        """Add which units of an activation's input lie where it passes a gradient on."""
        x: Tensor = args[0]
        layer, name, _ = where
        low, high = _bounds(name, args, kwargs)
        passing = (x > low) & (x < high)
        axis = 1 if layer in self._channels else x.ndim - 1
        alive = passing.transpose(axis, -1).flatten(0, -2).any(0)
        before = self._alive.get(where)
        if before is None or len(before) == len(alive):
            self._alive[where] = alive if before is None else before | alive

    def _see_logits(self, logits: Tensor) -> None:
        """Add the variance over keys of logits `[samples, heads, queries, keys]`."""
        logits = (logits if logits.ndim == 4 else logits.unsqueeze(1))[:SAMPLED].double()
        seen = logits > MASKED
        number = seen.sum(-1)
        kept = logits.where(seen, 0.0)
        mean = kept.sum(-1) / number.clamp_min(1)
        variance = ((kept - mean.unsqueeze(-1)).square() * seen).sum(-1) / number.clamp_min(1)
        counted = number > 1
        total, queries = (variance * counted).sum((0, 2)), counted.sum((0, 2))
        before = self._spreads.get(self._places.here)
        if before is None:
            self._spreads[self._places.here] = Spread(total, queries)
        elif len(before.total) == len(total):
            self._spreads[self._places.here] = Spread(before.total + total, before.queries + queries)


def _is_plain(value: Any) -> bool:
    """Whether a value is an ordinary floating tensor with values, outside of `torch.func`."""
    plain = type(value) in (Tensor, nn.Parameter) and not value.is_meta
    plain = plain and value.layout is torch.strided and not value.is_nested
    return plain and value.is_floating_point() and not under_functional_transform()


def _bounds(name: str, args: Any, kwargs: dict[str, Any]) -> tuple[float, float]:
    """Between which inputs this call passes a gradient on; those of hardtanh are arguments."""
    if name != "hardtanh":
        return PASSES[name]
    given = dict(zip(("min_val", "max_val"), args[1:3], strict=False)) | kwargs
    return float(given.get("min_val", -1.0)), float(given.get("max_val", 1.0))


def _over_keys(args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a softmax may be that of attention: over the last of four axes, or of three with as many queries."""
    x = args[0]
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    last = dim in (-1, x.ndim - 1)
    return last and x.shape[-1] > 1 and (x.ndim == 4 or (x.ndim == 3 and x.shape[-1] == x.shape[-2]))


def _logits(args: Any, kwargs: dict[str, Any]) -> Tensor:
    """The logits of `scaled_dot_product_attention` for the first samples, masked ones at minus infinity."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = dict(zip(names, args, strict=False)) | kwargs
    query, key = given["query"][:SAMPLED], given["key"][:SAMPLED]
    if query.ndim == 4 and query.shape[1] != key.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scale = given.get("scale") or query.shape[-1] ** -0.5
    logits: Tensor = query @ key.mT * scale
    mask = given.get("attn_mask")
    if given.get("is_causal"):
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if mask is None:
        return logits
    mask = mask[:SAMPLED] if mask.ndim == logits.ndim and len(mask) > 1 else mask
    masked: Tensor = logits.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else logits + mask
    return masked
