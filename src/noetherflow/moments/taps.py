"""Interception: every call that consumes a parameter gives its activations and output gradient to a rule.

A `Recorder` is active while the loss is computed and differentiated. It detaches each covered operand, so that
autograd does not build the ordinary gradient as well, and puts a `Tap` on the output. Whatever gradient still reaches
a parameter comes from a use that no rule saw.
"""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from noetherflow.core.tensors import named_tensors
from noetherflow.moments.layout import SampleLayout, candidates
from noetherflow.moments.rules import SPREADING, Call, Site, match, spread

Arrive = Callable[["Use", Tensor, tuple[Tensor, ...]], None]


@dataclass(eq=False, slots=True)
class Source:
    """An operand made from the parameters `names` alone; `view_of` is set when it is a parameter or a view of one."""

    operand: Tensor
    names: frozenset[str]
    view_of: str | None


CallId = tuple[str, tuple[str, ...], int]


@dataclass(eq=False, slots=True)
class Use:
    """One covered call: what it consumed and where samples may lie in its output.

    `id`: operator, parameters consumed, and how many such calls came before. `certain`: its input is known to depend on
    the samples.
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
        return tuple(candidates(self.out_shape, self.axes, samples, span))

    def key(self, samples: int, span: int) -> tuple[Any, ...]:
        """What must be the same for a layout found earlier to hold again."""
        return self.id, self.layouts(samples, span)

    def __str__(self) -> str:
        operator, names, before = self.id
        return f"{operator} of {', '.join(names)} (call {before + 1}, output {tuple(self.out_shape)})"


class Tap(torch.autograd.Function):
    """Identity on `out`; in the backward the recorder receives the output gradient and the saved activations."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, anchor: Tensor, arrive: Callable[..., None], saved: list[Tensor]) -> Tensor:
        ctx.arrive = arrive
        ctx.save_for_backward(*saved)
        if out._is_view():
            return torch.ops.aten._unsafe_view(out, out.shape)
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        saved = ctx.saved_tensors
        with torch._C.DisableTorchFunction():
            ctx.arrive(gradients[0], saved)
        return gradients[0], None, None, None


@lru_cache(maxsize=256)
def transparent(func: types.FunctionType) -> types.FunctionType:
    """A Python function of torch that would hand itself to the active mode, made to run its body under it instead."""
    never = {n: lambda *_: False for n in func.__globals__ if n.startswith("has_torch_function")}
    copy = types.FunctionType(
        func.__code__, {**func.__globals__, **never}, func.__name__, func.__defaults__, func.__closure__
    )
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for v in values:
        if isinstance(v, Tensor):
            found.append(v)
        elif isinstance(v, list | tuple):
            found.extend(_tensors(v))
    return found


def distinct(tensor: Tensor) -> bool:
    """No place in memory appears twice, as it would after `expand` or an overlapping `unfold`.

    Each axis must step beyond all that the axes of smaller stride reach; True is certain, False is not.
    """
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return False
            reach += stride * (size - 1)
    return True


def _beyond_rules(tensors: list[Tensor]) -> bool:
    """Complex tensors, and any under `torch.func.vmap`, which hides an axis."""
    return torch._C._functorch.maybe_current_level() is not None or any(t.is_complex() for t in tensors)


@dataclass(eq=False)
class Trace:
    """What one forward consumed: covered uses in order, and parameters that met an operator without a rule."""

    uses: list[Use] = field(default_factory=list)
    uncovered: dict[str, set[str]] = field(default_factory=dict)

    def leave(self, names: Iterable[str], why: str) -> None:
        """No rule covers these parameters."""
        for n in names:
            self.uncovered.setdefault(n, set()).add(why)


class Recorder(TorchFunctionMode):
    """Intercepts consumption of the parameters in `roots` (`names` by `id`); those `measured` are tapped.

    `shared`: calls known to give the same output for every sample, which run as they are and whose result
    is an operand in turn. `leaf`: give every operand a gradient of its own, for comparison with autograd.
    """

    def __init__(
        self,
        model: nn.Module,
        roots: dict[str, Tensor],
        names: dict[int, str],
        measured: frozenset[str],
        arrive: Arrive,
        shared: frozenset[CallId],
        leaf: bool,
    ) -> None:
        super().__init__()
        self._model, self._measured = model, measured
        self.roots = dict(roots)
        self.trace = Trace()
        self.anchor = torch.zeros((), requires_grad=True)  # its gradient is asked for, so that every tap runs
        self._names = dict(names)
        self._made: dict[int, Tensor] = {}  # kept, so that no other tensor gets their id
        self._origin: dict[int, frozenset[str]] = {}
        self._arrive, self._shared, self._leaf = arrive, shared, leaf
        self._before: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self._recording = True

    def stop(self) -> None:
        """From now on (the backward, where checkpoints recompute) calls are tapped but not recorded."""
        self._recording = False

    def _find(self, tensor: Tensor) -> frozenset[str] | None:
        """Names of the parameters a tensor is made from, or None."""
        key = id(tensor)
        if key in self._names:
            return frozenset((self._names[key],))
        found = self._origin.get(key)
        if found is not None or not tensor.requires_grad:
            return found
        if tensor.is_leaf:
            return self._stand_in(tensor) if isinstance(tensor, nn.Parameter) else None
        base = tensor._base
        return None if base is None else self._find(base)

    def _stand_in(self, tensor: Tensor) -> frozenset[str] | None:
        """The name under which a sharded model holds this gathered parameter just now."""
        for name, held in named_tensors(self._model):
            if held is tensor and name in self.roots:
                self._names[id(tensor)], self.roots[name] = name, tensor
                return frozenset((name,))
        return None

    def _source(self, tensor: Tensor) -> Source:
        names = self._find(tensor) or frozenset()
        if id(tensor) in self._names:
            return Source(tensor, names, self._names[id(tensor)])
        base = tensor._base if tensor._is_view() else tensor
        plain = distinct(tensor) and base is not None and tensor.dtype == base.dtype
        return Source(tensor, names, self._names.get(id(base)) if plain else None)

    def __torch_function__(self, func: Any, types_: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if type(func) is types.MethodWrapperType or not torch.is_grad_enabled():  # an attribute, at most a view
            return func(*args, **kwargs)
        owned: dict[int, frozenset[str]] = {}
        activations = others = False
        given = _tensors((*args, *kwargs.values()) if kwargs else args)
        for t in given:
            names = self._find(t)
            if names is not None:
                owned[id(t)] = names
            else:
                others = True
                activations = activations or t.requires_grad
        if not owned:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            with self:
                spreaded = spread(args, kwargs)
            if spreaded is not None:
                return func(**spreaded)
        if (others or func in SPREADING) and not _beyond_rules(given):
            call = match(lambda v: id(v) in owned, func, args, kwargs)
            if call is not None:
                sources = tuple(self._source(s.operand) for s in call.sites)
                kind = (getattr(func, "__name__", str(func)), tuple(sorted(set().union(*(s.names for s in sources)))))
                self._before[kind] += 1
                call_id = (*kind, self._before[kind] - 1)
                if call_id not in self._shared:
                    return self._tapped(call_id, func, call, sources, args, kwargs, activations)
        if isinstance(func, types.FunctionType) and func.__module__ == "torch.nn.functional":
            with self:
                return transparent(func)(*args, **kwargs)
        out = func(*args, **kwargs)
        made = [t for t in _tensors((out,)) if t.requires_grad]
        if made:
            names = frozenset().union(*owned.values())
            if activations:
                self.trace.leave(names, getattr(func, "__name__", str(func)))
            else:
                for t in made:
                    self._made[id(t)], self._origin[id(t)] = t, names
        return out

    def _tapped(
        self,
        call_id: CallId,
        func: Any,
        call: Call,
        sources: tuple[Source, ...],
        args: Any,
        kwargs: Any,
        certain: bool,
    ) -> Any:
        if self._measured.isdisjoint(call_id[1]):
            return func(*args, **kwargs)
        leaves = tuple(s.operand.detach() for s in call.sites)
        if self._leaf:
            for leaf in leaves:
                leaf.requires_grad_()
        replaced = {id(s.operand): leaf for s, leaf in zip(call.sites, leaves, strict=True)}
        given = {k: replaced.get(id(a), a) for k, a in kwargs.items()} if kwargs else kwargs
        out = func(*[replaced.get(id(a), a) for a in args], **given)
        view = call.seen
        seen = view(out)
        use = Use(call_id, call.sites, sources, leaves, seen.shape, tuple(call.sample_axes(seen)), certain)
        if self._recording:
            self.trace.uses.append(use)
        saved = [t.detach() for t in call.saved]
        return Tap.apply(out, self.anchor, lambda delta, kept: self._receive(use, view(delta), kept), saved)

    def _receive(self, use: Use, delta: Tensor, saved: tuple[Tensor, ...]) -> None:
        """An output gradient; one that comes during the forward is of a derivative that is part of the loss."""
        if self._recording:
            self.trace.leave(use.names, "autograd.grad in the forward")
        else:
            self._arrive(use, delta, saved)
