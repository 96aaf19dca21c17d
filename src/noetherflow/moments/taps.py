"""Interception: every call that consumes a parameter gives its activations and output gradient to a rule.

A `Recorder` is active while the loss is computed and differentiated. It detaches each covered operand, so that
autograd does not build the ordinary gradient as well, and puts a `Tap` on the output. Whatever gradient still reaches
a parameter comes from a use that no rule saw.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from noetherflow.core.tensors import gathered
from noetherflow.core.torch_internals import (
    is_attribute_access,
    is_python_function_of_torch,
    saved_tensors_are_packed,
    transparent,
    under_functional_transform,
    unseen_by_modes,
    view_base,
)
from noetherflow.moments.layout import SampleLayout, candidates
from noetherflow.moments.origins import Origins, Source
from noetherflow.moments.rules import SPREADING, Call, Site, match, spread

CallId = tuple[str, tuple[str, ...], int]
"""Operator, names of the parameters consumed, and how many such calls came before in the same forward."""


@dataclass(eq=False, slots=True)
class Use:
    """One covered call: what it consumed and where samples may lie in its output.

    `axes`: the axes of the output on which samples may lie. `certain`: its input is known to depend on the samples.
    """

    id: CallId
    sites: tuple[Site, ...]
    sources: tuple[Source, ...]
    leaves: tuple[Tensor, ...]
    out_shape: torch.Size
    axes: tuple[int, ...]
    certain: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Parameters consumed."""
        return self.id[1]

    def layouts(self, samples: int, span: int) -> tuple[SampleLayout, ...]:
        """Every way in which the samples may lie in the output, most usual first."""
        return candidates(self.out_shape, self.axes, samples, span)

    def key(self, samples: int, span: int) -> tuple[Any, ...]:
        """What must be the same for a layout found earlier to hold again."""
        return self.id, self.layouts(samples, span)

    def __str__(self) -> str:
        operator, names, before = self.id
        return f"{operator} of {', '.join(names)} (call {before + 1}, output {tuple(self.out_shape)})"


class Receiver(ABC):
    """Takes what the taps hand over in the backward."""

    @abstractmethod
    def receive(self, use: Use, delta: Tensor, saved: tuple[Tensor, ...]) -> None:
        """Take the output gradient of one use, and the activations that its rule asked to keep."""


@dataclass(eq=False, slots=True)
class Tapped:
    """A use and the call as its rule reads it, with the recorder to hand its output gradient to."""

    use: Use
    call: Call
    recorder: Recorder


class Tap(torch.autograd.Function):
    """Identity on a call's output; in the backward the recorder gets the output gradient and the saved activations."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, anchor: Tensor, tapped: Tapped, saved: list[Tensor]) -> Tensor:
        ctx.tapped = tapped
        ctx.save_for_backward(*saved)
        if view_base(out) is not None:
            view: Tensor = torch.ops.aten._unsafe_view(out, out.shape)
            return view
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        saved = ctx.saved_tensors
        with unseen_by_modes():
            ctx.tapped.recorder.arrived(ctx.tapped, gradients[0], saved)
        return gradients[0], None, None, None


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among arguments, those in lists and tuples included."""
    found: list[Tensor] = []
    for v in values:
        if isinstance(v, Tensor):
            found.append(v)
        elif isinstance(v, list | tuple):
            found.extend(_tensors(v))
    return found


@dataclass(eq=False, slots=True)
class Operands:
    """The tensors among the arguments of one call.

    `owned`: those made from parameters alone, as names by `id`. `others`: whether there is any other tensor;
    `activations`: whether one of these needs a gradient, and so depends on parameters too.
    """

    tensors: list[Tensor]
    owned: dict[int, frozenset[str]]
    others: bool
    activations: bool

    @classmethod
    def among(cls, args: Any, kwargs: dict[str, Any], origins: Origins) -> Operands:
        """Sort the tensors among a call's arguments."""
        tensors = _tensors((*args, *kwargs.values()) if kwargs else args)
        owned: dict[int, frozenset[str]] = {}
        others = activations = False
        for t in tensors:
            names = origins.names_of(t)
            if names is not None:
                owned[id(t)] = names
            else:
                others = True
                activations = activations or t.requires_grad
        return cls(tensors, owned, others, activations)

    def owns(self, value: Any) -> bool:
        return id(value) in self.owned

    def names(self) -> frozenset[str]:
        return frozenset[str]().union(*self.owned.values())

    def within_rules(self) -> bool:
        """Not so with complex tensors, nor under `torch.func.vmap`, which hides an axis."""
        return not (under_functional_transform() or any(t.is_complex() for t in self.tensors))


@dataclass(eq=False, slots=True)
class Covered:
    """A call as its rule reads it, and where its operands come from."""

    id: CallId
    call: Call
    sources: tuple[Source, ...]


@dataclass(eq=False)
class Trace:
    """What one forward consumed: covered uses in order, and parameters that met an operator without a rule.

    `packed`: some activations are not kept as they are, but recomputed (checkpoints) or fetched from elsewhere.
    `generators`: it drew random numbers from generators of its own, which nothing resets.
    """

    uses: list[Use] = field(default_factory=list)
    uncovered: dict[str, set[str]] = field(default_factory=dict)
    packed: bool = False
    generators: bool = False

    @property
    def names(self) -> set[str]:
        """The parameters consumed."""
        return {n for use in self.uses for source in use.sources for n in source.names}

    def leave(self, names: Iterable[str], why: str) -> None:
        """Note that no rule covers these parameters."""
        for n in names:
            self.uncovered.setdefault(n, set()).add(why)


class Recorder(TorchFunctionMode):
    """Intercepts every call that consumes a parameter in `origins.roots`; those `measured` are tapped.

    Args:
        origins: which parameters a tensor comes from.
        measured: names of the parameters whose gradients are wanted.
        shared: calls known to give the same output for every sample; they run as they are, and their result is an
            operand in turn.
        leaf: give every operand a gradient of its own, for comparison with autograd.

    Attributes:
        receiver: gets the output gradients of the backward that comes next; set before each.
    """

    receiver: Receiver

    def __init__(self, origins: Origins, measured: frozenset[str], shared: frozenset[CallId], leaf: bool) -> None:
        super().__init__()
        self.trace = Trace()
        self.anchor = torch.zeros((), requires_grad=True)  # its gradient is asked for, so that every tap runs
        self._origins, self._measured = origins, measured
        self._shared, self._leaf = shared, leaf
        self._before: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self._recording = True

    @property
    def roots(self) -> dict[str, Tensor]:
        """The parameters by name, as they are during this forward (a sharded model gathers them)."""
        return self._origins.roots

    def stop(self) -> None:
        """From now on (the backward, where checkpoints recompute) calls are tapped but not recorded."""
        self._recording = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("generator") is not None:
            self.trace.generators = True
        if is_attribute_access(func) or not torch.is_grad_enabled():  # at most a view
            return func(*args, **kwargs)
        operands = Operands.among(args, kwargs, self._origins)
        if not operands.owned:
            return func(*args, **kwargs)
        return self._consume(func, operands, args, kwargs)

    def _consume(self, func: Any, operands: Operands, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run a call that has parameters among its arguments: tapped, opened, or followed to what it makes."""
        if func is F.scaled_dot_product_attention:
            with self:
                spreaded = spread(args, kwargs)
            if spreaded is not None:
                return func(**spreaded)
        covered = self._covered(func, operands, args, kwargs)
        if covered is not None:
            return self._run_tapped(covered, func, operands.activations, args, kwargs)
        if is_python_function_of_torch(func):
            with self:
                return transparent(func)(*args, **kwargs)
        out = func(*args, **kwargs)
        self._follow(func, out, operands)
        return out

    def _covered(self, func: Any, operands: Operands, args: Any, kwargs: dict[str, Any]) -> Covered | None:
        """The call as its rule reads it; None where no rule covers it, or its output is shared by all samples."""
        if not (operands.others or func in SPREADING) or not operands.within_rules():
            return None
        call = match(operands.owns, func, args, kwargs)
        if call is None:
            return None
        sources = tuple(self._origins.source(s.operand) for s in call.sites)
        kind = (getattr(func, "__name__", str(func)), tuple(sorted(set().union(*(s.names for s in sources)))))
        self._before[kind] += 1
        found = Covered((*kind, self._before[kind] - 1), call, sources)
        return None if found.id in self._shared else found

    def _follow(self, func: Any, out: Any, operands: Operands) -> None:
        """Note what an operator without a rule makes of parameters."""
        made = [t for t in _tensors((out,)) if t.requires_grad]
        if not made:
            return
        names = operands.names()
        if operands.activations:
            self.trace.leave(names, getattr(func, "__name__", str(func)))
            return
        for t in made:
            self._origins.note(t, names)

    def _run_tapped(self, found: Covered, func: Any, certain: bool, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run a covered call on detached operands, with a tap on its output."""
        if self._measured.isdisjoint(found.id[1]):
            return func(*args, **kwargs)
        call = found.call
        leaves = tuple(s.operand.detach() for s in call.sites)
        if self._leaf:
            for leaf in leaves:
                leaf.requires_grad_()
        replaced = {id(s.operand): leaf for s, leaf in zip(call.sites, leaves, strict=True)}
        given = {k: replaced.get(id(a), a) for k, a in kwargs.items()} if kwargs else kwargs
        out = func(*[replaced.get(id(a), a) for a in args], **given)
        seen = call.seen(out)
        use = Use(found.id, call.sites, found.sources, leaves, seen.shape, tuple(call.sample_axes(seen)), certain)
        if self._recording:
            self.trace.uses.append(use)
            self.trace.packed = self.trace.packed or saved_tensors_are_packed()
        return Tap.apply(  # type: ignore[no-untyped-call]
            out, self.anchor, Tapped(use, call, self), [t.detach() for t in call.saved]
        )

    def arrived(self, tapped: Tapped, delta: Tensor, saved: tuple[Tensor, ...]) -> None:
        """Called by a tap; an output gradient during the forward is of a derivative that is part of the loss.

        Of layers that tensor parallelism splits, rules get whole output gradients and activations.
        """
        if self._recording:
            self.trace.leave(tapped.use.names, "autograd.grad in the forward")
        else:
            self.receiver.receive(tapped.use, tapped.call.seen(gathered(delta)), tuple(map(gathered, saved)))
