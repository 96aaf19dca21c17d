"""`noise_equilibrium`: objective, classes and the joint solve in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from noetherflow.core.adaptive import AdamConfig, LionConfig
from noetherflow.core.host import on_host
from noetherflow.core.optimizers import Settings, check_settings
from noetherflow.core.tensors import tensors_of
from noetherflow.equilibrium.adaptive import adaptive_equilibrium, without_decay
from noetherflow.equilibrium.arguments import refuse_strangers
from noetherflow.equilibrium.conditioning import Stretches, moved_copy, orthogonalising
from noetherflow.equilibrium.feedback import SquareFeedback, refuse_feedback_of_others
from noetherflow.equilibrium.invariance import cautions, refuse_other_moments
from noetherflow.equilibrium.levels import level_equilibrium
from noetherflow.equilibrium.objective import OF_SGD, AnyObjective, LevelObjective, objective_of
from noetherflow.equilibrium.orbit import Remeasure, Samples, sizes_now
from noetherflow.equilibrium.potential import LegPair
from noetherflow.equilibrium.result import Equilibrium, Settled
from noetherflow.equilibrium.solve import drives, imbalance
from noetherflow.equilibrium.start import Start, no_moments, starts_of
from noetherflow.equilibrium.state_equilibrium import state_equilibrium
from noetherflow.equilibrium.task import Question, SolveOptions, Task, log_errors
from noetherflow.equilibrium.turning import turning
from noetherflow.equilibrium.verdict import Outcome
from noetherflow.errors import DataError, MomentError
from noetherflow.moments.result import GradientMoments
from noetherflow.symmetry.symmetry import Symmetry
from noetherflow.symmetry.symmetry_set import SymmetrySet, positions_of


@on_host
def noise_equilibrium(
    model: nn.Module,
    syms: SymmetrySet,
    mom: GradientMoments | None = None,
    sgd: Settings | None = None,
    *,
    optimizer: Any = None,
    objective: str | AnyObjective = "noise+decay",
    joint: bool = True,
    approximate: bool = True,
    remeasure: Remeasure | None = None,
    samples: Samples | None = None,
    tol: float | None = None,
    max_iterations: int = 500,
    recede: float = 1.0,
    errors: bool = False,
    feedback: SquareFeedback | None = None,
) -> Equilibrium:
    """The group elements at which the Noether flow of every symmetry stops: the minimiser of the convex Phi.

    With the other symmetries held, `Phi = Tr(P X) + Tr(P^-1 Y)` for `P = G^T G` of the group element `G`, where

    `X = 1/2 (d K_plus + M_minus)`, `Y = 1/2 (d K_minus + M_plus)`, and `E[C' - C] = 2 (Y - X)` today:

    `K = W W^T` of the weights `W`, `M = lr^2 E[dW dW^T]` of the minibatch gradient, summed over the legs of one sign;
    `d = lr w (2 - lr w)` of the weight decay `w`; `C = K_plus - K_minus` the charge. Momentum changes `d` and the
    factor of `M` (`Drift`). Of the parameters most are options that stand alone; they are few words in one call.

    Args:
        model: Only read.
        syms: Its symmetries; those on frozen parameters are excluded and listed.
        mom: Moments of per-sample gradients at these weights, best measured with `for_="equilibrium"`, which collects
            what these symmetries need: leg Grams do where legs share no entries, entries where tori meet, factors
            where a general_linear leg meets another one (else give `samples` or `remeasure`). None for an objective
            that needs no gradients (`norm`, `range`).
        sgd: Learning rate, batch size, weight decay, momentum; needed for the noise objectives. With AdamConfig or
            LionConfig these are the minimum of `Psi = sum (lr s + 2 w s theta^2)` over the tori (theory.md section 13),
            `s` the root mean square of each entry of the minibatch gradient; moments with `entries=True`.
        optimizer: In place of `mom` and `sgd`: momentum SGD, Adam, AdamW or RMSprop of a run, or its `state_dict()`;
            its averages of gradients are the noise, along scalar and diagonal symmetries (docs/adaptive.md).
        objective: `noise+decay`, `noise` (weight decay left out), `norm` (least norm), `fisher`, `hessian` (least
            trace; `mom` from `curvature_moments`), `range` (equal largest weights on both sides of each channel, as
            before quantisation), `nf.smoothing(...)` of activations, or your own (`docs/extend/objective.md`).
        joint: All symmetries move together; `False`: each with the others held.
        approximate: `False` leaves symmetries in place that a normalisation's eps makes approximate.
        remeasure: `remeasure(model) -> moments`, called on moved copies: at every sweep where one measurement does not
            determine the answer (not with `joint=False`), and once where factors are too stretched for Grams.
        samples: `samples[parameter]`: per-sample gradients, `gradient_factors` or dense `[N, *shape]`; by default the
            factors in `mom`.
        tol: Imbalance (relative Noether flow) at which the minimum counts as converged: by default 1e-11, with
            `remeasure` not below `8 eps` of the parameters' dtype.
        max_iterations: Sweeps at most.
        recede: Directions without a finite equilibrium stay where they are and are named in the result; below 1, those
            of general_linear symmetries move towards their limit by this factor.
        errors: Adds jackknife standard errors of `1/2 log(G^T G)`, from moments in groups that determine the answer
            without `samples` or `remeasure`.
        feedback: With AdamConfig: `nf.square_feedback(...)` of these weights, which counts what `v` does where it
            follows the fluctuations of the weights (b2 far below 1).

    Returns:
        An Equilibrium: one Settled per symmetry, with its element, class, charge and imbalance.

    Raises:
        MomentError: The moments do not determine the answer, or are not those of a loss with these symmetries at these
            weights (`theta^T A gbar` is not 0).
        DataError: An unknown objective; samples that disagree with the moments.
        ValueError: A bad `recede` or `max_iterations`.

    Example:
        ```
        mom = nf.gradient_moments(model, loss_fn, batches, syms, for_="equilibrium")
        eq = nf.noise_equilibrium(model, syms, mom, nf.SGDConfig(lr=0.05, batch_size=16, weight_decay=1e-4))
        print(eq)  # by family: what settles, and how far it moves
        eq["0 -> 2"].element  # G of one symmetry
        nf.balance_(model, eq, example_inputs=x)  # move there
        ```

    Source: theory.md section 5.
    """
    refuse_strangers("noise_equilibrium", model, syms, mom)
    if sgd is not None:
        check_settings(sgd)
    refuse_feedback_of_others(feedback, sgd)
    options = SolveOptions(joint, remeasure, samples, tol, max_iterations, recede, errors, feedback)
    syms = syms.trainable(model)
    if not approximate:
        syms = syms.without({s.name: f"only approximate (eps {s.eps:g})" for s in syms if s.eps is not None})
    found = _settled(model, syms, mom, sgd, optimizer, objective_of(objective), options)
    weights = positions_of(model, found.symmetries)
    return replace(found, solved_at={s.name: s.form(weights).detach() for s in found.symmetries})


def _settled(
    model: nn.Module,
    syms: SymmetrySet,
    mom: GradientMoments | None,
    sgd: Settings | None,
    optimizer: Any,
    chosen: AnyObjective,
    options: SolveOptions,
) -> Equilibrium:
    """The equilibrium by the way that objective and optimiser ask for."""
    if optimizer is not None:
        if mom is not None or sgd is not None or chosen.name != "noise+decay":
            raise DataError("optimizer= stands in place of mom and sgd, with objective='noise+decay'")
        return state_equilibrium(model, syms, optimizer, options)
    if isinstance(chosen, LevelObjective):
        return level_equilibrium(model, syms, chosen, options)
    if isinstance(sgd, AdamConfig | LionConfig) or (sgd is not None and sgd.groups):
        if chosen.name in OF_SGD and mom is not None:
            said = cautions(mom, refuse_other_moments(model, syms, mom))
            config = sgd if chosen.name == "noise+decay" else without_decay(sgd)
            return replace(adaptive_equilibrium(model, syms, mom, config, options), cautions=said)
        sgd = None
    if chosen.name == "noise+decay" and sgd is not None:
        syms = syms.without({s.name: why for s in syms if (why := s.pulled(lambda _: sgd.weight_decay > 0))})
    if mom is None and chosen.moments != "none":
        raise MomentError(f"objective {chosen.name!r} needs moments: pass nf.gradient_moments(...) of this model")
    if mom is None or chosen.moments == "none":
        mom = no_moments(model, tuple(syms))
    potential = chosen.coefficients(mom, sgd)
    said = cautions(mom, refuse_other_moments(model, syms, mom)) if chosen.moments != "none" else ()
    return replace(_answer(model, Question(syms, mom, sgd, chosen, potential, options)), cautions=said)


def _answer(model: nn.Module, question: Question) -> Equilibrium:
    """The equilibrium, solved from orthogonalised factors where they are too stretched for Grams and that is
    possible.
    """
    symmetries = tuple(question.symmetries)
    stretches = Stretches.of(model, symmetries)
    again, no_gradients = question.options.remeasure, question.objective.moments == "none"
    possible = not question.options.errors and (no_gradients or again is not None)
    if not stretches.imprecise or not possible:
        return _solved(model, question, stretches)
    tensors = tensors_of(model)
    frames = {s.name: orthogonalising(s, tensors) for s in symmetries if s.name in stretches.imprecise}
    there = moved_copy(model, [(s, frames[s.name]) for s in symmetries if s.name in frames], double=no_gradients)
    asked = question if no_gradients or again is None else question.with_moments(again(there))
    here = starts_of(model, symmetries, question.moments, question.potential)
    return _seen_from(_solved(there, asked, Stretches.of(there, symmetries)), here, frames)


def _solved(model: nn.Module, question: Question, stretches: Stretches) -> Equilibrium:
    """The equilibrium from the model's own Grams."""
    starts = starts_of(model, tuple(question.symmetries), question.moments, question.potential)
    task = Task.of(model, starts, question)
    minimum = task.solve()
    errors = log_errors(model, task, minimum, question) if question.options.errors else {}
    elements, pairs = task.elements(minimum.logs), task.pairs(minimum)
    charges = _charges_of_others(model, starts, [(s, elements[s.name]) for s in task.symmetries])
    decays = bool(question.potential.norm)
    settled = []
    for start in starts:
        name = start.symmetry.name
        verdict = start.verdict(decays, stretches)
        if name in pairs:
            settled.append(_moved(start, elements[name], pairs[name], question, verdict, errors.get(name)))
        else:
            settled.append(_held(start, charges[name], verdict))
    norm_now, trace_now = sizes_now(task.orbit.orbit)
    objective = question.objective.name
    return Equilibrium(
        objective="noise" if objective == "noise+decay" and not decays else objective,
        settled=tuple(settled),
        imbalance_now=max((float(s.imbalance_now.max()) for s in settled), default=0.0),
        imbalance=minimum.imbalance,
        iterations=minimum.iterations,
        evaluations=minimum.evaluations,
        converged=minimum.converged,
        joint=question.options.joint,
        norm_now=norm_now,
        norm=minimum.point.norm,
        trace_now=trace_now,
        trace=minimum.point.trace,
        symmetries=question.symmetries,
        regime=question.regime,
        assumptions=turning(s.charge_now for s in settled if s.name in pairs) if objective in OF_SGD else (),
    )


def _moved(
    start: Start,
    element: Tensor,
    pairs: list[LegPair],
    question: Question,
    verdict: Outcome,
    error: Tensor | None,
) -> Settled:
    """A symmetry that moves, from its leg Grams at the minimum."""
    s = start.symmetry
    return Settled(
        name=s.name,
        family=s.family,
        kind=s.kind,
        element=element,
        classification=verdict.classification,
        charge_now=start.charge,
        charge=s.combine(tuple(k for k, _ in pairs)),
        weight_grams=tuple(k for k, _ in pairs),
        noise_grams=tuple(m for _, m in pairs),
        imbalance_now=start.imbalance,
        imbalance=imbalance(s, start.classes, *drives(s, pairs, question.potential)),
        finite=verdict.finite,
        reason=verdict.reason,
        log_error=error,
        eps=s.eps,
    )


def _held(start: Start, charge: Tensor, verdict: Outcome) -> Settled:
    """A symmetry that stays: nothing of it has a finite equilibrium. `charge`: what the others make of its charge."""
    s = start.symmetry
    return Settled(
        name=s.name,
        family=s.family,
        kind=s.kind,
        element=s.identity(),
        classification=verdict.classification,
        charge_now=start.charge,
        charge=charge,
        weight_grams=(),
        noise_grams=(),
        imbalance_now=start.imbalance,
        imbalance=torch.zeros(s.blocks, dtype=torch.float64),
        finite=verdict.finite,
        reason=verdict.reason,
        eps=s.eps,
    )


def _charges_of_others(
    model: nn.Module, starts: Sequence[Start], moves: Sequence[tuple[Symmetry, Tensor]]
) -> dict[str, Tensor]:
    """The charges, after the moves, of the symmetries that do not move themselves."""
    tensors, out = tensors_of(model), {}
    for start in starts:
        if start.moves:
            continue
        moved = {n: tensors[n].detach().double().cpu() for n in start.symmetry.parameters}
        for mover, element in moves:
            moved = {n: mover.move_weight(n, t, element) for n, t in moved.items()}
        out[start.symmetry.name] = start.symmetry.charge(moved)
    return out


def _seen_from(eq: Equilibrium, starts: Sequence[Start], frames: dict[str, Tensor]) -> Equilibrium:
    """An equilibrium solved from weights under `frames`, as seen from the weights at `starts`."""
    settled = []
    for start, there in zip(starts, eq.settled, strict=True):
        element = there.element
        if there.name in frames:
            element = start.symmetry.compose(element, frames[there.name])
        settled.append(replace(there, element=element, charge_now=start.charge, imbalance_now=start.imbalance))
    worst = max((float(s.imbalance_now.max()) for s in settled), default=0.0)
    return replace(eq, settled=tuple(settled), imbalance_now=worst)
