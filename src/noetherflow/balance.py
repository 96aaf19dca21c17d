"""Move a model along its orbits to an equilibrium without changing its function (theory.md section 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from noetherflow.equilibrium.result import Equilibrium
from noetherflow.errors import CertificateError
from noetherflow.symmetry import Symmetry
from noetherflow.symmetry_set import tensors_of

GRADIENT_LIKE = ("momentum_buffer", "exp_avg", "grad_avg")
APPROXIMATE = 1e-3
"""Default tolerance on outputs when a moved symmetry is only approximate (a normalisation's eps)."""
SQUARE_LIKE = ("exp_avg_sq", "square_avg", "max_exp_avg_sq", "sum")


@dataclass(frozen=True)
class BalanceReport:
    """What `balance_` moved.

    `output_change`: `max |y' - y| / max |y|` over the example outputs (None without examples). `rounding`: the largest
    relative error, in norm, of writing a moved tensor in its own dtype. `moved`: relative change in norm by tensor.
    `approximate_state`: optimiser entries for which no exact rule exists, with the rule used.
    """

    moved: dict[str, float]
    output_change: float | None
    rounding: float
    state_entries: int
    approximate_state: tuple[str, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        change = (
            "not measured (no example_inputs)" if self.output_change is None else f"{self.output_change:.2e} relative"
        )
        lines = [
            f"moved {len(self.moved)} tensors and {self.state_entries} optimiser entries; output change: {change}; "
            f"rounding to the stored precision: {self.rounding:.1e}"
        ]
        lines += [f"approximate: {what}" for what in self.approximate_state]
        lines += [f"left in place: {name}: {why}" for name, why in self.skipped.items()]
        return "\n".join(lines)

    def rows(self) -> list[dict[str, Any]]:
        """One row per moved tensor."""
        return [{"tensor": n, "relative_change": c} for n, c in self.moved.items()]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def moved_tensors(
    tensors: Mapping[str, Tensor],
    symmetries: Sequence[Symmetry],
    elements: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
) -> tuple[dict[str, Tensor], float]:
    """The tensors on the legs of all symmetries, moved in float64 and rounded once to `dtypes` (default their own).

    Returns them by name with the largest relative rounding error in norm.
    """
    out, rounding = {}, 0.0
    for name, legs in _by_parameter(symmetries).items():
        exact = tensors[name].detach().double()
        for symmetry in legs:
            exact = symmetry.move(name, exact, elements[symmetry.name].double())
        stored = exact.to(dtypes.get(name, tensors[name].dtype)).to(tensors[name].dtype)
        rounding = max(rounding, _relative(stored.double(), exact))
        out[name] = stored
    return out, rounding


def balance_(
    model: nn.Module,
    eq: Equilibrium,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    example_inputs: Any = None,
    certificate: Any = None,
    tolerance: float | None = None,
) -> BalanceReport:
    """Move `model` in place to the equilibrium; the function it computes stays the same.

    Weights (and running statistics) move by `eq`'s group elements, in float64, rounded once. Optimiser state follows:
    momentum buffers like gradients; squared-gradient averages by squared factors, exact for tori and, for
    general_linear symmetries, as if entries were uncorrelated (`v -> (G * G) v`), which is listed in the report.
    `example_inputs` (a tensor, a tuple of positional or a dict of keyword arguments) are run in evaluation mode before
    and after.

    Raises CertificateError, leaving model and optimiser untouched, when `certificate` calls a symmetry broken, when a
    weight would leave the range of its dtype, or when outputs change by more than `tolerance`: by default
    `10 eps^(3/4)` of the parameters' dtype (2e-11 in float64, 6e-5 in float32), or `APPROXIMATE` where a
    normalisation's eps makes a moved symmetry approximate, or a hundred times what the certificate measured.
    """
    return _balance(
        model, eq, optimizer, example_inputs=example_inputs, certificate=certificate, tolerance=tolerance, dtypes={}
    )


def _balance(
    model: nn.Module,
    eq: Equilibrium,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    example_inputs: Any,
    certificate: Any,
    tolerance: float | None,
    dtypes: Mapping[str, torch.dtype],
) -> BalanceReport:
    """`balance_`, with tensors rounded to the `dtypes` given by name instead of their own."""
    symmetries = [s for s in eq.symmetries if _moves(eq[s.name].element, s)]
    _refuse_broken(certificate, symmetries)
    tensors = tensors_of(model)
    before = _outputs(model, example_inputs)
    new, rounding = moved_tensors(tensors, symmetries, eq.elements, dtypes)
    overflow = [n for n, t in new.items() if not bool(torch.isfinite(t).all())]
    if overflow:
        raise CertificateError(
            f"balanced values of {overflow[:4]} do not fit {new[overflow[0]].dtype}; use a wider dtype"
        )
    changes = {n: _relative(t.double(), tensors[n].detach().double()) for n, t in new.items()}
    old = {n: tensors[n].detach().clone() for n in new}
    _write(tensors, new)
    change = _output_change(before, _outputs(model, example_inputs))
    limit = _tolerance(tensors, new, symmetries, certificate, dtypes, tolerance)
    if change is not None and not change <= limit:
        _write(tensors, old)
        approximate = [s.name for s in symmetries if s.eps is not None]
        cause = (
            f"{approximate[:3]} hold only up to a normalisation's eps: leave such symmetries in place with "
            f"noise_equilibrium(..., approximate=False)"
            if approximate
            else "Certify the symmetries (nf.certify)"
        )
        raise CertificateError(
            f"balancing changed the outputs by {change:.2e} relative, more than the tolerance {limit:.2e}; the model "
            f"was restored. {cause}, or pass tolerance= if this change is acceptable"
        )
    entries, averaged = _move_state(optimizer, tensors, symmetries, eq.elements) if optimizer is not None else (0, ())
    skipped = {**eq.excluded, **{s.name: s.reason for s in eq if s.reason}}
    return BalanceReport(changes, change, rounding, entries, averaged, skipped)


def _moves(element: Tensor, symmetry: Symmetry) -> bool:
    return not torch.equal(element, symmetry.identity())


def _by_parameter(symmetries: Sequence[Symmetry]) -> dict[str, list[Symmetry]]:
    out: dict[str, list[Symmetry]] = {}
    for s in symmetries:
        for name in dict.fromkeys(leg.parameter for leg in s.legs):
            out.setdefault(name, []).append(s)
    return out


def _refuse_broken(certificate: Any, symmetries: Sequence[Symmetry]) -> None:
    if certificate is None:
        return
    wanted = {s.name for s in symmetries}
    broken = [c.name for c in certificate if c.name in wanted and c.verdict == "broken"]
    if broken:
        raise CertificateError(f"certificate calls {broken[:5]} broken; drop them (syms.without) before solving")


def _write(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            tensors[name].copy_(value)


def _relative(a: Tensor, b: Tensor) -> float:
    scale = torch.linalg.vector_norm(b)
    return float(torch.linalg.vector_norm(a - b) / scale) if scale else 0.0


def _tolerance(
    tensors: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    symmetries: Sequence[Symmetry],
    certificate: Any,
    dtypes: Mapping[str, torch.dtype],
    tolerance: float | None,
) -> float:
    if tolerance is not None:
        return tolerance
    limit = 10 * max((torch.finfo(dtypes.get(n, tensors[n].dtype)).eps for n in new), default=0.0) ** 0.75
    if any(s.eps is not None for s in symmetries):
        limit = max(limit, APPROXIMATE)
    names = {s.name for s in symmetries}
    certified = [c.outputs for c in certificate or () if c.name in names]
    return max([limit, *(100 * c for c in certified)])


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
    return [t.detach().double() for t in _leaves(out) if t.is_floating_point()]


def _leaves(out: Any) -> list[Tensor]:
    from torch.utils._pytree import tree_leaves

    values = list(out.values()) if isinstance(out, Mapping) else out
    return [t for t in tree_leaves(values) if isinstance(t, Tensor)]


def _output_change(before: list[Tensor] | None, after: list[Tensor] | None) -> float | None:
    if before is None or after is None:
        return None
    changes = [float((b - a).abs().max() / a.abs().max().clamp_min(1e-300)) for a, b in zip(before, after, strict=True)]
    return max(changes, default=0.0)


def _move_state(
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    symmetries: Sequence[Symmetry],
    elements: Mapping[str, Tensor],
) -> tuple[int, tuple[str, ...]]:
    """Transform the optimiser's per-entry state; returns how many entries moved and which only approximately."""
    count, approximate = 0, []
    coupled = {
        id(p): group["weight_decay"]
        and not group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW))
        for group in optimizer.param_groups
        if "weight_decay" in group
        for p in group["params"]
    }
    for name, own in _by_parameter(symmetries).items():
        state = optimizer.state.get(tensors[name], {}) if isinstance(tensors[name], nn.Parameter) else {}
        torus = all(s.is_torus for s in own)
        for key, value in state.items():
            if key == "step" or not isinstance(value, Tensor) or value.shape != tensors[name].shape:
                continue
            preconditioned = key == "momentum_buffer" and "square_avg" in state
            if key in GRADIENT_LIKE and not preconditioned:
                value.copy_(_like_gradient(name, value, own, elements))
                if coupled.get(id(tensors[name])):
                    approximate.append(
                        f"{name}: {key} moved like a gradient; its weight-decay part moves like a weight"
                    )
            elif key in SQUARE_LIKE:
                value.copy_(_like_squares(name, value, own, elements))
                if not torus:
                    approximate.append(f"{name}: {key} moved as if gradient entries were uncorrelated")
            elif key == "ax":
                value.copy_(_like_weight(name, value, own, elements))
            else:
                approximate.append(f"{name}: {key} left as it was (no rule for this optimiser state)")
                continue
            count += 1
    return count, tuple(approximate)


def _like_weight(name: str, value: Tensor, own: Sequence[Symmetry], elements: Mapping[str, Tensor]) -> Tensor:
    out = value.double()
    for s in own:
        out = s.move(name, out, elements[s.name])
    return out.to(value.dtype)


def _like_gradient(name: str, value: Tensor, own: Sequence[Symmetry], elements: Mapping[str, Tensor]) -> Tensor:
    out = value.double()
    for s in own:
        out = s.move(name, out, _dual(s, elements[s.name]))
    return out.to(value.dtype)


def _like_squares(name: str, value: Tensor, own: Sequence[Symmetry], elements: Mapping[str, Tensor]) -> Tensor:
    """Second moments of gradients whose entries are taken as uncorrelated: `v -> (G * G) v` per leg."""
    out = value.double()
    for s in own:
        dual = _dual(s, elements[s.name])
        if s.is_torus:
            out = s.move(name, out, dual.square())
            continue
        other = torch.linalg.inv(dual).mT
        for leg in s.legs:
            if leg.parameter == name:
                out = leg.multiply(out, (dual if leg.sign > 0 else other).to(out.device).square())
    return out.to(value.dtype)


def _dual(symmetry: Symmetry, element: Tensor) -> Tensor:
    inverse = symmetry.inverse(element.double())
    return inverse if symmetry.is_torus else inverse.mT
