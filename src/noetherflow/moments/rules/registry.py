"""Which operator has which rule.

A rule looks at the arguments of one call and answers which operands are consumed how (`Call`), or None when this use of
the operator is beyond it. Operands may be parameters or tensors made from parameters alone; every operand that a rule
does not claim counts as not covered.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from noetherflow.moments.forms import Form

Prepare = Callable[..., tuple[Tensor, ...]]
Build = Callable[..., Form]


@dataclass(eq=False, slots=True)
class Site:
    """One consumed operand, and how its per-sample gradients follow.

    `operand`: the parameter, or a tensor made from parameters alone. `prepare(delta, *saved)` runs in the backward, on
    the output gradient and the activations saved, and gives tensors that carry the samples on the same axes as the
    output. `build(layout, *tensors)` gets those tensors with the samples on axis 0, and gives the form of the
    gradients. For `y = x @ W`: `prepare` gives `(delta, x)`, `build` gives `Outer(x, delta)`, as `G_i = x_i^T delta_i`.
    `cancelled(delta, *saved)`, where `prepare` subtracts: the norm that its result would have without, to tell rounding
    from a difference (a layer norm over one feature leaves nothing but rounding).
    """

    operand: Tensor
    prepare: Prepare
    build: Build
    cancelled: Callable[..., Tensor] | None = None


@dataclass(eq=False, slots=True)
class Call:
    """A covered call, as a rule reads it.

    `saved`: activations to keep for the backward. `sample_axes(out)`: the axes of the output on which samples may lie.
    `sites`: the consumed operands. `seen(out)`: the output as the rule speaks of it, where its axes are permuted.
    """

    saved: tuple[Tensor, ...]
    sample_axes: Callable[[Tensor], Sequence[int]]
    sites: tuple[Site, ...]
    seen: Callable[[Tensor], Tensor] = lambda out: out


Owned = Callable[[Any], bool]
"""Whether an argument is a parameter, or made from parameters alone."""
MomentRule = Callable[[Owned, Callable[..., Any], dict[str, Any]], Call | None]
"""`rule(owned, function, arguments)`, arguments by name; None for a use that the rule does not cover."""


@dataclass(frozen=True)
class Signature:
    """Parameter names, defaults, and the name that takes further positional arguments, if any."""

    names: tuple[str, ...]
    defaults: dict[str, Any]
    rest: str | None

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Signature:
        """The signature of a Python function."""
        given = inspect.signature(function).parameters.values()
        rest = next((p.name for p in given if p.kind is p.VAR_POSITIONAL), None)
        return cls(
            tuple(p.name for p in given if p.kind is not p.VAR_POSITIONAL),
            {p.name: p.default for p in given if p.default is not p.empty},
            rest,
        )

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """All arguments by name; None for a call of another shape."""
        known = len(self.names)
        if (len(args) > known and self.rest is None) or any(k not in self.names for k in kwargs):
            return None
        bound = {**self.defaults, **dict(zip(self.names, args, strict=False)), **kwargs}
        if self.rest is not None:
            bound[self.rest] = args[known:]
        return bound if all(n in bound for n in self.names) else None


RULES: dict[Callable[..., Any], tuple[Signature, MomentRule]] = {}


def rule(signature: Callable[..., Any], *functions: Callable[..., Any]) -> Callable[[MomentRule], MomentRule]:
    """Register the decorated rule.

    Args:
        signature: any function with the parameters and defaults of those covered; its body is never run.
        functions: the functions as torch passes them to a `TorchFunctionMode`; they share the signature.
    """
    parsed = Signature.of(signature)

    def register(function: MomentRule) -> MomentRule:
        for f in functions:
            RULES[f] = (parsed, function)
        return function

    return register


def match(owned: Owned, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """The `Call` of a covered use of `func`, else None; `owned` tells operands made from parameters alone."""
    entry = RULES.get(func)
    if entry is None:
        return None
    signature, function = entry
    bound = signature.bind(args, kwargs)
    return None if bound is None else function(owned, func, bound)
