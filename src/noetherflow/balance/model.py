"""Move a model along its orbits to an equilibrium without changing its function (theory.md section 5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from noetherflow.balance.motion import Motion
from noetherflow.balance.optimizer_state import MoveTally, moved_state, without_optimizer
from noetherflow.core.held import held_by
from noetherflow.core.tensors import check_same_model, tensors_of
from noetherflow.equilibrium.result import Equilibrium
from noetherflow.errors import CertificateError, DataError
from noetherflow.symmetry.symmetry import Symmetry

APPROXIMATE = 1e-3
"""Default tolerance on outputs when a moved symmetry is only approximate (a normalisation's eps)."""
REMEDY = "pass the model it was solved for, without wrappers that rename parameters"
SHOWN = 20
"""Lines of each kind in a printed report; its fields hold all."""


@dataclass(frozen=True)
class BalanceReport:
    """What `balance_` moved.

    `output_change`: `max |y' - y| / max |y|` over the finite outputs on the examples (None without examples).
    `rounding`: the largest relative error, in norm, of writing a moved tensor in its own dtype. `moved`: relative
    change in norm by tensor. `state_entries`, `gradients`: how many optimiser entries and `.grad` moved along.
    `approximate_state`: those for which no exact rule exists, with the rule used. `unmoved`: what belongs to moved
    tensors and was left as it was. `averages`: dicts of a checkpoint that moved like the weights. `converged`,
    `imbalance`: of the equilibrium given; without convergence the model is on its orbit, but not balanced. `dry_run`:
    nothing was written.
    """

    moved: dict[str, float]
    output_change: float | None
    rounding: float
    state_entries: int
    approximate_state: tuple[str, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    gradients: int = 0
    unmoved: tuple[str, ...] = ()
    averages: tuple[str, ...] = ()
    converged: bool = True
    imbalance: float = 0.0
    dry_run: bool = False

    def __str__(self) -> str:
        change = (
            "not measured (no example_inputs)" if self.output_change is None else f"{self.output_change:.2e} relative"
        )
        gradients = f" and {self.gradients} gradients" if self.gradients else ""
        verb = "would move" if self.dry_run else "moved"
        lines = [
            f"{verb} {len(self.moved)} tensors, {self.state_entries} optimiser entries{gradients}; output change: "
            f"{change}; rounding to the stored precision: {self.rounding:.1e}"
        ]
        if not self.converged:
            lines.append(
                f"NOT balanced: the equilibrium given had not converged (relative Noether flow {self.imbalance:.2e})"
            )
        lines += _shown("NOT moved", self.unmoved)
        lines += _shown("moved like the weights", self.averages)
        lines += _shown("approximate", self.approximate_state)
        lines += [f"left in place: {name}: {why}" for name, why in self.skipped.items()]
        return "\n".join(lines)

    __repr__ = __str__

    def rows(self) -> list[dict[str, Any]]:
        """One row per moved tensor."""
        return [{"tensor": n, "relative_change": c} for n, c in self.moved.items()]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def moved_tensors(tensors: Mapping[str, Tensor], motion: Motion) -> tuple[dict[str, Tensor], float]:
    """The tensors on the legs of all symmetries, moved in float64 and rounded once to their own dtypes.

    Returns them by name with the largest relative rounding error in norm. Raises CertificateError when a value leaves
    the range of its dtype.
    """
    out, rounding = {}, 0.0
    for name in motion.by_parameter:
        exact = motion.weight(name, tensors[name])
        out[name] = exact.to(tensors[name].dtype)
        rounding = max(rounding, _relative(out[name].double(), exact))
    overflow = [n for n, t in out.items() if not bool(torch.isfinite(t).all())]
    if overflow:
        raise CertificateError(
            f"balanced values of {overflow[:4]} do not fit {out[overflow[0]].dtype}; use a wider dtype"
        )
    return out, rounding


def balance_(
    model: nn.Module,
    eq: Equilibrium,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    *,
    example_inputs: Any = None,
    certificate: Any = None,
    tolerance: float | None = None,
) -> BalanceReport:
    """Move `model` in place to the equilibrium; the function it computes stays the same.

    Weights (and running statistics) move by `eq`'s group elements, in float64, rounded once; `.grad`, where there is
    one, as gradients do. The state of `optimizer`, one or several, follows: momentum buffers like gradients;
    squared-gradient averages by squared factors, exact for tori and, for general_linear symmetries, as if entries were
    uncorrelated (`v -> (G * G) v`), which is listed in the report, as is state without a rule, which stays.
    `example_inputs` (a tensor, a tuple of positional or a dict of keyword arguments) are run in evaluation mode before
    and after; infinities and NaN in the outputs must stay where they are.

    Raises CertificateError when `certificate` calls a symmetry broken, when a weight would leave the range of its
    dtype, or when outputs change by more than `tolerance`: by default `10 eps^(3/4)` of the least precise tensor of the
    model or its outputs (2e-11 in float64, 6e-5 in float32), or `APPROXIMATE` where a normalisation's eps makes a moved
    symmetry approximate, or a hundred times what the certificate measured. Raises DataError for an equilibrium of
    another model, or outputs without a finite entry. These and any other error or interruption leave model, gradients
    and optimiser as they were.
    """
    return balance_values(
        model,
        eq,
        [] if optimizer is None else optimizer if isinstance(optimizer, Sequence) else [optimizer],
        example_inputs=example_inputs,
        certificate=certificate,
        tolerance=tolerance,
    )


def balance_values(
    model: nn.Module,
    eq: Equilibrium,
    optimizers: Sequence[torch.optim.Optimizer] = (),
    *,
    stored: Mapping[str, Tensor] | None = None,
    example_inputs: Any,
    certificate: Any,
    tolerance: float | None,
) -> BalanceReport:
    """`balance_`, with the values (and dtypes) of `stored` in place of the model's own."""
    motion = Motion.of(eq)
    tensors = tensors_of(model)
    _refuse_broken(certificate, motion.symmetries)
    check_same_model(tensors, motion.by_parameter, eq.symmetries.shapes, "the equilibrium belongs", REMEDY, DataError)
    before = _outputs(model, example_inputs)
    source = {**tensors, **(stored or {})}
    new, rounding = moved_tensors(source, motion)
    changes = {n: _relative(t.double(), source[n].detach().double()) for n, t in new.items()}
    precisions = [t.dtype for t in (*tensors.values(), *new.values(), *(before or ())) if t.is_floating_point()]
    limit = _tolerance(precisions, motion, certificate) if tolerance is None else tolerance
    tally, gradients = MoveTally(), 0
    held = [held_by(o, tensors) for o in optimizers]
    with _all_or_nothing() as write:
        for name, value in new.items():
            write(tensors[name], value)
        change = _output_change(before, _outputs(model, example_inputs))
        if change is not None and not change <= limit:
            raise CertificateError(_too_much(change, limit, motion.symmetries))
        for name in new:
            grad = tensors[name].grad if isinstance(tensors[name], nn.Parameter) else None
            if grad is not None and grad.layout is not torch.strided:
                tally.unmoved.append(f"{name}: sparse .grad left as it was")
            elif grad is not None:
                write(grad, motion.gradient(name, grad))
                gradients += 1
        for own in held:
            for h, key, value in moved_state(own, motion, tally):
                write(h.state[key], value)
    if held:
        tally.unmoved.extend(without_optimizer([h for own in held for h in own], tensors, motion))
    return BalanceReport(
        changes,
        change,
        rounding,
        tally.entries,
        tuple(tally.approximate),
        skipped={**eq.excluded, **{s.name: s.reason for s in eq if s.reason}},
        gradients=gradients,
        unmoved=tuple(tally.unmoved),
        converged=eq.converged,
        imbalance=eq.imbalance,
    )


@contextmanager
def _all_or_nothing() -> Iterator[Callable[[Tensor, Tensor], None]]:
    """Gives `write(target, value)`; what was written is put back when the block raises or is interrupted."""
    old: list[tuple[Tensor, Tensor]] = []

    def write(target: Tensor, value: Tensor) -> None:
        old.append((target, target.detach().clone()))
        target.copy_(value)

    with torch.no_grad():
        try:
            yield write
        except BaseException:
            for target, value in reversed(old):
                target.copy_(value)
            raise


def _shown(what: str, lines: Sequence[str]) -> list[str]:
    rest = [f"{what}: {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return [f"{what}: {line}" for line in lines[:SHOWN]] + rest


def _refuse_broken(certificate: Any, symmetries: Sequence[Symmetry]) -> None:
    if certificate is None:
        return
    wanted = {s.name for s in symmetries}
    broken = [c.name for c in certificate if c.name in wanted and c.verdict == "broken"]
    if broken:
        raise CertificateError(f"certificate calls {broken[:5]} broken; drop them (syms.without) before solving")


def _relative(a: Tensor, b: Tensor) -> float:
    scale = torch.linalg.vector_norm(b)
    return float(torch.linalg.vector_norm(a - b) / scale) if scale else 0.0


def _tolerance(precisions: Sequence[torch.dtype], motion: Motion, certificate: Any) -> float:
    limit = 10 * max((torch.finfo(dtype).eps for dtype in precisions), default=0.0) ** 0.75
    if any(s.eps is not None for s in motion.symmetries):
        limit = max(limit, APPROXIMATE)
    names = {s.name for s in motion.symmetries}
    certified = [c.outputs for c in certificate or () if c.name in names]
    return max([limit, *(100 * c for c in certified)])


def _too_much(change: float, limit: float, symmetries: Sequence[Symmetry]) -> str:
    approximate = [s.name for s in symmetries if s.eps is not None]
    cause = (
        f"{approximate[:3]} hold only up to a normalisation's eps: leave such symmetries in place with "
        f"noise_equilibrium(..., approximate=False)"
        if approximate
        else "Certify the symmetries (nf.certify)"
    )
    return (
        f"balancing changed the outputs by {change:.2e} relative, more than the tolerance {limit:.2e}; the model "
        f"was restored. {cause}, or pass tolerance= if this change is acceptable"
    )


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor] | None:
    """Every floating tensor the model returns in evaluation mode; the training flags are put back."""
    if inputs is None:
        return None
    flags = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            if isinstance(inputs, Mapping):
                out = model(**inputs)
            else:
                out = model(*(inputs if isinstance(inputs, tuple | list) else (inputs,)))
    finally:
        for module, flag in flags.items():
            module.training = flag
    return [t.detach().clone() for t in _leaves(out) if t.is_floating_point()]


def _leaves(out: Any) -> list[Tensor]:
    from torch.utils._pytree import tree_leaves

    values = list(out.values()) if isinstance(out, Mapping) else out
    return [t for t in tree_leaves(values) if isinstance(t, Tensor)]


def _output_change(before: list[Tensor] | None, after: list[Tensor] | None) -> float | None:
    """The largest `max |y' - y| / max |y|`; inf where an infinity or NaN came, went or changed."""
    if before is None or after is None:
        return None
    if before and not any(bool(t.isfinite().any()) for t in before):
        raise DataError("the outputs on example_inputs have no finite entry, so that nothing can be compared")
    changes = [_change(a.double(), b.double()) for a, b in zip(before, after, strict=True)]
    return max(changes, default=0.0)


def _change(before: Tensor, after: Tensor) -> float:
    finite = before.isfinite()
    rest_kept = torch.equal(finite, after.isfinite()) and torch.allclose(
        before[~finite], after[~finite], equal_nan=True
    )
    if not rest_kept:
        return math.inf
    a, b = before[finite], after[finite]
    return float((b - a).abs().max() / a.abs().max().clamp_min(1e-300)) if a.numel() else 0.0
