"""Move a model along its orbits to an equilibrium without changing its function (theory.md section 5)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from noetherflow.balance.check import OutputCheck
from noetherflow.balance.motion import Motion, refuse_frozen
from noetherflow.balance.optimizer_state import StatePlan, optimizers_in, plan_state, without_optimizer
from noetherflow.balance.state_rules import state_rule_of
from noetherflow.core.arguments import A_MODEL, EQUILIBRIUM, OPTIMISER, expect
from noetherflow.core.codes import BlockCodes, copied
from noetherflow.core.held import held_by
from noetherflow.core.printing import grouped
from noetherflow.core.tensors import check_same_model, refuse_inference_tensors, tensors_of
from noetherflow.core.unwrap import unwrap_optimizer
from noetherflow.discovery.certificate import Certificate
from noetherflow.discovery.unusable import refuse_bad_numbers, refuse_without_values
from noetherflow.equilibrium.result import Equilibrium
from noetherflow.errors import CertificateError, DataError
from noetherflow.symmetry.symmetry_set import SymmetrySet

REMEDY = "pass the model it was solved for; inside another module its parameters have other names (model.module)"
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
    nothing was written. `notes`: what was found out about a checkpoint's files.
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
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        change = "not measured" if self.output_change is None else f"{self.output_change:.2e} relative"
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
        lines += _shown("note", self.notes)
        lines += _shown("NOT moved", self.unmoved)
        lines += _shown("moved like the weights", self.averages)
        lines += _shown("approximate", self.approximate_state)
        lines += grouped("left in place", self.skipped)
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
    certificate: Certificate | None = None,
    tolerance: float | None = None,
    unchecked: bool = False,
) -> BalanceReport:
    """Move `model` in place to the equilibrium; the function it computes stays the same.

    Weights (and running statistics) move by `eq`'s group elements, in float64, rounded once; `.grad`, where there is
    one, as gradients do. The state of `optimizer`, one or several, follows by the rule of its class
    (`noetherflow.extend.state_rule`): momentum buffers like gradients; squared-gradient averages by squared factors,
    exact for tori and, for general_linear symmetries, as if entries were uncorrelated (`v -> (G * G) v`). What is only
    approximate, and what has no rule and stays, is listed in the report.

    The model never moves unchecked. Its outputs on example inputs, run in evaluation mode, are compared before and
    after; infinities and NaN in them must stay where they are. The inputs are `example_inputs`, or else those that the
    symmetries were found with. A certificate of every moved symmetry of this model does instead.

    Args:
        model: the model that the equilibrium was solved for.
        eq: where to.
        optimizer: the optimiser or optimisers whose state moves along; composite ones are looked into.
        example_inputs: one argument, a tuple of positional arguments, or a dict of keyword arguments.
        certificate: of `nf.certify`; what it calls broken is refused. It never widens the tolerance.
        tolerance: largest relative change of outputs; by default `10 eps^(3/4)` of the least precise tensor of the
            model or its outputs (2e-11 in float64; 6e-5 in float32, and where the model casts to it inside; more where
            a matrix moves weights whose condition number asks for it), or 4e-3 where a normalisation's eps explains
            the change (`OutputCheck.kept`).
        unchecked: move even where nothing proves that the function stays.

    Returns:
        What moved, and by how much the outputs changed.

    Raises:
        CertificateError: nothing proves the move, a moved symmetry is broken, a weight would leave the range of its
            dtype, or outputs change by more than the tolerance.
        DataError: an equilibrium of another model or of other weights (moved already), parameters frozen since, inputs
            that the model does not run on, outputs without a finite entry, or state that seems to be an iterate of the
            weights and has no rule. These and any other error or interruption leave model, gradients and optimiser as
            they were.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
        >>> x = torch.randn(64, 3, dtype=torch.float64)
        >>> syms = nf.find_symmetries(model, x[:2])
        >>> loss = lambda model, batch: model(batch).square().sum(1)
        >>> moments = nf.gradient_moments(model, loss, [x], syms)
        >>> eq = nf.noise_equilibrium(model, syms, moments, nf.SGDConfig(0.1, 8))
        >>> report = nf.balance_(model, eq, example_inputs=x)
        >>> report.output_change < 1e-12
        True

    Source: theory.md section 5.
    """
    call = "balance_(model, eq, optimizer)"
    expect(call, "model", model, nn.Module, A_MODEL)
    expect(call, "eq", eq, Equilibrium, EQUILIBRIUM)
    refuse_inference_tensors(tensors_of(model), "balance_")
    tensors = tensors_of(model)
    refuse_without_values(tensors, "balance_")
    refuse_bad_numbers({n: tensors[n] for n in eq.symmetries.parameters if n in tensors}, "balance_")
    refuse_frozen(model, Motion.of(eq))
    given: Sequence[Any] = (
        [] if optimizer is None else optimizer if isinstance(optimizer, list | tuple) else [optimizer]
    )
    for one in given:
        if not hasattr(one, "param_groups"):
            expect(call, "optimizer", one, torch.optim.Optimizer, OPTIMISER)
    optimizers = [unwrap_optimizer(o) if isinstance(o, torch.optim.Optimizer) else o for o in given]
    return balance_values(model, eq, OutputCheck(example_inputs, certificate, tolerance, unchecked), optimizers)


ELSEWHERE = 0.02
"""Difference of a charge, relative to the squares of its legs, beyond which an equilibrium is of other weights."""


def _refuse_elsewhere(eq: Equilibrium, motion: Motion, tensors: Mapping[str, Tensor]) -> None:
    """Raises DataError where the charges are not those that the equilibrium was solved at."""
    for s in motion.symmetries:
        if s.name not in eq.solved_at:
            continue
        weights = {n: tensors[n].detach().double().cpu() for n in s.parameters}
        off = float(torch.linalg.vector_norm(s.charge(weights) - eq.solved_at[s.name]))
        size = sum(float(torch.linalg.vector_norm(k)) for k in s.grams(s.positions(weights)))
        if not off <= ELSEWHERE * size:
            raise DataError(
                f"symmetry {s.name!r}: the charge of these weights is {off / size if size else off:.2g} of their "
                "squares away from where the equilibrium was solved: has the model been moved or trained since, or is "
                "it another one? Measure and solve again"
            )


def balance_values(
    model: nn.Module,
    eq: Equilibrium,
    check: OutputCheck,
    optimizers: Sequence[torch.optim.Optimizer] = (),
    stored: Mapping[str, Tensor] | None = None,
) -> BalanceReport:
    """`balance_`, with the values (and dtypes) of `stored` in place of the model's own."""
    motion, tensors = Motion.of(eq), tensors_of(model)
    check_same_model(tensors, motion.by_parameter, eq.symmetries.shapes, "the equilibrium belongs", REMEDY, DataError)
    _refuse_elsewhere(eq, motion, {**tensors, **(stored or {})})
    report = move_values(model, motion, eq.symmetries, check, optimizers, stored)
    return replace(
        report,
        skipped={**eq.excluded, **{s.name: s.reason for s in eq if s.reason}},
        converged=eq.converged,
        imbalance=eq.imbalance,
    )


def move_values(
    model: nn.Module,
    motion: Motion,
    syms: SymmetrySet,
    check: OutputCheck,
    optimizers: Sequence[torch.optim.Optimizer] = (),
    stored: Mapping[str, Tensor] | None = None,
) -> BalanceReport:
    """Carry out a motion of a model's own symmetries, all of it or nothing.

    Args:
        model: what moves.
        motion: how.
        syms: the symmetries as they were found: their inputs, for the check where it has none, and where the model
            casts to a lower precision inside.
        check: what proves that the function stays.
        optimizers: whose state moves along.
        stored: values (and dtypes) in place of the model's own.

    Returns:
        What moved.

    Raises:
        CertificateError: nothing proves the move, or outputs change; the model is as it was.
    """
    tensors = tensors_of(model)
    source = {**tensors, **(stored or {})}
    before = check.before(model, motion, syms.example_inputs)
    new, rounding = moved_tensors(source, motion)
    changes = {n: _relative(t.double(), source[n].detach().double()) for n, t in new.items()}
    precisions = [t.dtype for t in (*tensors.values(), *new.values()) if t.is_floating_point()]
    precisions += [torch.float32] if syms.casts else []
    state = _state_plan(optimizers, tensors, motion)
    gradients, sparse = _gradients(new, tensors)
    with _all_or_nothing() as write:
        for name, value in new.items():
            write(tensors[name], value)
        change = None if before is None else check.kept(before, model, precisions, motion)
        for name, grad in gradients.items():
            write(grad, motion.gradient(name, grad))
        for move in state.moves:
            write(move.held.state[move.key], move.value(motion))
    return BalanceReport(
        changes,
        change,
        rounding,
        len(state.moves),
        state.approximate,
        gradients=len(gradients),
        unmoved=(*sparse, *state.unmoved),
    )


def _state_plan(
    optimizers: Sequence[torch.optim.Optimizer], tensors: Mapping[str, Tensor], motion: Motion
) -> StatePlan:
    """What is to happen to the state of these optimisers, those inside them included, each entry once."""
    every = [inner for optimizer in optimizers for inner in optimizers_in(optimizer)]
    held = [held_by(optimizer, tensors) for optimizer in every]
    known: set[int] = set()
    plans = []
    for optimizer, own in zip(every, held, strict=True):
        fresh = [h for h in own if id(h.state) not in known]
        known.update(id(h.state) for h in fresh if h.state)
        plans.append(plan_state(fresh, state_rule_of(optimizer), motion))
    lost = without_optimizer([h for own in held for h in own], tensors, motion) if held else []
    return StatePlan.joined([*plans, StatePlan(unmoved=tuple(lost))])


def _gradients(names: Iterable[str], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The dense gradients of these parameters, and a line for each sparse one, which stays as it is."""
    found = {n: tensors[n].grad for n in names if isinstance(tensors[n], nn.Parameter)}
    there = {n: grad for n, grad in found.items() if grad is not None}
    dense = {n: grad for n, grad in there.items() if grad.layout is torch.strided}
    return dense, [f"{n}: sparse .grad left as it was" for n in there if n not in dense]


@contextmanager
def _all_or_nothing() -> Iterator[Callable[[Tensor | BlockCodes, Tensor], None]]:
    """Gives `write(target, value)`; what was written is put back when the block raises or is interrupted."""
    old: list[tuple[Tensor | BlockCodes, Any]] = []

    def write(target: Tensor | BlockCodes, value: Tensor) -> None:
        old.append((target, copied(target)))
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


def _relative(a: Tensor, b: Tensor) -> float:
    scale = torch.linalg.vector_norm(b)
    return float(torch.linalg.vector_norm(a - b) / scale) if scale else 0.0
