"""`noise_equilibrium`: objectives, classes and the joint solve in one call."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from noetherflow.core.host import on_host
from noetherflow.core.settings import SGDConfig
from noetherflow.core.tensors import tensors_of
from noetherflow.equilibrium.blocks import GLClasses, TorusClasses, gl_frame
from noetherflow.equilibrium.orbit import (
    FramedOrbit,
    MeasuredOrbit,
    Orbit,
    Remeasure,
    RemeasuredOrbit,
    Samples,
    leg_pairs,
    orbit_of,
    separate_orbits,
)
from noetherflow.equilibrium.potential import Drift, Potential, samples_needed
from noetherflow.equilibrium.result import Class, Equilibrium, Settled
from noetherflow.equilibrium.solve import Classes, Minimum, classify, drives, elements_of, imbalance, logs_of, minimise
from noetherflow.errors import DataError, MomentError
from noetherflow.moments.result import GradientMoments
from noetherflow.moments.statistics import jackknife
from noetherflow.symmetry.overlap import leg_coordinates, stiffness
from noetherflow.symmetry.symmetry import Symmetry
from noetherflow.symmetry.symmetry_set import SymmetrySet

Objective = Literal["noise+decay", "noise", "norm", "fisher", "hessian"]
TOLERANCE = 1e-11
"""Relative Noether flow at which a minimum from one measurement counts as converged."""


def potential_of(objective: Objective, moments: GradientMoments, sgd: SGDConfig | None) -> Potential:
    """The coefficients of `Phi = 1/2 (norm ||theta||^2 + second Tr E[g g^T] + mean Tr gbar gbar^T)` for an objective.

    `noise+decay`: `E[C' - C] = -dPhi/dlam` per SGD step; `noise`: the same with weight decay left out; `norm`:
    `||theta||^2 / 2` alone; `fisher`, `hessian`: half the trace of the second moments given (gradients, or
    `curvature_moments`).

    Raises DataError for another objective, MomentError for a noise objective without `sgd` or with too few samples,
    and for `hessian` from gradients.
    """
    if objective == "norm":
        return Potential(1.0, 0.0, 0.0)
    if objective == "hessian" and any(bool(m.any()) for m in moments.mean.values()):
        raise MomentError("objective 'hessian' needs curvature_moments(...), got gradient moments: that is 'fisher'")
    if objective in ("fisher", "hessian"):
        return Potential(0.0, 1.0, 0.0)
    if objective not in ("noise+decay", "noise"):
        raise DataError(_no_objective(objective))
    if sgd is None:
        raise MomentError(f"objective {objective!r} needs the optimiser settings: pass sgd=SGDConfig(...)")
    used = sgd if objective == "noise+decay" else replace(sgd, weight_decay=0.0)
    potential = Potential.of(Drift.of(used), moments, used)
    if potential.second < 0:
        raise MomentError(_too_few(moments, used))
    return potential


def _no_objective(objective: Any) -> str:
    names = get_args(Objective)
    close = difflib.get_close_matches(str(objective), names, n=1)
    return f"objective {objective!r} is not one of {', '.join(names)}" + (
        f"; did you mean {close[0]!r}?" if close else ""
    )


def _too_few(moments: GradientMoments, sgd: SGDConfig) -> str:
    """Why the coefficient of the measured second moment is negative, and how many samples mend that."""
    need = samples_needed(moments, sgd)
    unit = "samples" if moments.replicates is None else "minibatches"
    return (
        f"moments of {moments.samples} {unit} cannot tell the mean gradient from noise at batch size {sgd.batch_size} "
        f"and momentum {sgd.momentum:g}; measure at least {need} {unit}"
    )


@on_host
def noise_equilibrium(
    model: nn.Module,
    syms: SymmetrySet,
    mom: GradientMoments,
    sgd: SGDConfig | None = None,
    *,
    objective: Objective = "noise+decay",
    joint: bool = True,
    approximate: bool = True,
    remeasure: Remeasure | None = None,
    samples: Samples | None = None,
    tol: float | None = None,
    max_iterations: int = 500,
    recede: float = 1.0,
    errors: bool = False,
) -> Equilibrium:
    """The group elements at which the Noether flow of every symmetry stops: the minimiser of the convex Phi.

    With the other symmetries held, `Phi = Tr(P X) + Tr(P^-1 Y)` for `P = G^T G` of the group element `G`, where

    `X = 1/2 (d K_plus + M_minus)`, `Y = 1/2 (d K_minus + M_plus)`, and `E[C' - C] = 2 (Y - X)` today:

    `K = W W^T` of the weights `W`, `M = lr^2 E[dW dW^T]` of the minibatch gradient, summed over the legs of one sign;
    `d = lr w (2 - lr w)` of the weight decay `w`; `C = K_plus - K_minus` the charge. Section 5 of docs/theory.md
    derives it; momentum changes `d` and the factor of `M` (`Drift`).

    ```
    mom = nf.gradient_moments(model, loss_fn, batches, syms, entries=True)
    eq = nf.noise_equilibrium(model, syms, mom, nf.SGDConfig(lr=0.05, batch_size=16, weight_decay=1e-4))
    print(eq)  # by family: what settles, and how far it moves
    eq["0 -> 2"].element  # G of one symmetry
    nf.balance_(model, eq)  # move there
    ```

    - `model`: only read; `syms`: its symmetries, those on frozen parameters are excluded and listed.
    - `mom`: moments of per-sample gradients. Leg Grams do where legs share no entries, `entries=True` where tori meet;
      where a general_linear leg meets another one, give `samples` or `remeasure` too.
    - `sgd`: learning rate, batch size, weight decay, momentum; needed for the noise objectives.
    - `objective`: `noise+decay`, `noise` (weight decay left out), `norm` (least norm), `fisher`, `hessian` (least
      trace; `mom` from `curvature_moments`).
    - `joint`: all symmetries move together; `False`: each with the others held.
    - `approximate`: `False` leaves symmetries in place that a normalisation's eps makes approximate.
    - `samples[parameter]`: per-sample gradients, `gradient_factors` or dense `[N, *shape]`.
    - `remeasure(model) -> moments`: called on a moved copy at every sweep (not with `joint=False`).
    - `tol`: imbalance (relative Noether flow) at which the minimum counts as converged: by default 1e-11, with
      `remeasure` not below `8 eps` of the parameters' dtype. `max_iterations`: sweeps at most.
    - `recede`: directions without a finite equilibrium stay where they are and are named in the result; below 1, those
      of general_linear symmetries move towards their limit by this factor.
    - `errors`: adds jackknife standard errors of `1/2 log(G^T G)`, from moments in groups that determine the answer
      without `samples` or `remeasure`.

    Raises MomentError when the moments do not determine the answer, DataError for an unknown objective and samples that
    disagree with the moments, ValueError for a bad `recede` or `max_iterations`.
    """
    if not 0 < recede <= 1:
        raise ValueError(f"recede must lie in (0, 1], got {recede!r}")
    if max_iterations < 0:
        raise ValueError(f"max_iterations must be at least 0, got {max_iterations!r}")
    syms = syms.trainable(model)
    if not approximate:
        syms = syms.without({s.name: f"only approximate (eps {s.eps:g})" for s in syms if s.eps is not None})
    potential = potential_of(objective, mom, sgd)
    symmetries = tuple(syms)
    singular = _rank_tolerance(model, symmetries)
    identity = [s.identity() for s in symmetries]
    now = leg_pairs(model, symmetries, mom, potential)
    xy = [drives(s, pairs, potential) for s, pairs in zip(symmetries, now, strict=True)]
    classes = [classify(s, x, y, singular) for s, (x, y) in zip(symmetries, xy, strict=True)]
    moving = [i for i, c in enumerate(classes) if bool(c.finite.any())]
    movers = [symmetries[i] for i in moving]
    own = [classes[i] for i in moving]
    orbit: Orbit = (
        orbit_of(model, movers, mom, potential, samples=samples, remeasure=remeasure)
        if joint
        else separate_orbits(model, movers, mom, potential, samples)
    )
    if errors:
        _refuse_errors(mom, orbit)
    kappa = _kappa(model, movers, joint)
    if tol is None:
        tol = max(TOLERANCE, 8 * _eps(model, movers)) if isinstance(orbit, RemeasuredOrbit) else TOLERANCE
    frame = tuple(_frame(symmetries[i], classes[i], *xy[i], recede) for i in moving)
    framed = FramedOrbit(orbit, frame)
    minimum = minimise(framed, own, kappa, tolerance=tol, max_iterations=max_iterations)
    by_error = _jackknife(model, framed, own, kappa, minimum, mom, objective, sgd, joint) if errors else {}
    elements = dict(zip(moving, framed.unframed(elements_of(movers, minimum.logs)), strict=True))
    moved_pairs = dict(zip(moving, minimum.point.pairs, strict=True))
    settled = []
    for i, (s, c) in enumerate(zip(symmetries, classes, strict=True)):
        kind, finite, reason = _verdict(s, c, potential)
        pairs = moved_pairs.get(i, ())
        charge = s.combine(tuple(k for k, _ in pairs)) if pairs else _moved_charge(model, s, movers, elements.values())
        after = imbalance(s, c, *drives(s, pairs, potential)) if pairs else torch.zeros(s.blocks, dtype=torch.float64)
        settled.append(
            Settled(
                name=s.name,
                family=s.family,
                kind=s.kind,
                element=elements.get(i, identity[i]),
                classification=kind,
                charge_now=s.combine(tuple(k for k, _ in now[i])),
                charge=charge,
                weight_grams=tuple(k for k, _ in pairs),
                noise_grams=tuple(m for _, m in pairs),
                imbalance_now=imbalance(s, c, *xy[i]),
                imbalance=after,
                finite=finite,
                reason=reason,
                log_error=by_error.get(s.name),
            )
        )
    start_point = orbit.at([s.identity() for s in movers])
    return Equilibrium(
        objective="noise" if objective == "noise+decay" and not potential.norm else objective,
        settled=tuple(settled),
        imbalance_now=max((float(s.imbalance_now.max()) for s in settled), default=0.0),
        imbalance=minimum.imbalance,
        iterations=minimum.iterations,
        evaluations=minimum.evaluations,
        converged=minimum.converged,
        joint=joint,
        norm_now=start_point.norm,
        norm=minimum.point.norm,
        trace_now=start_point.trace,
        trace=minimum.point.trace,
        excluded=dict(syms.excluded),
        symmetries=syms,
    )


def _rank_tolerance(model: nn.Module, symmetries: Sequence[Symmetry]) -> float:
    """Eigenvalues of Grams below this fraction of the largest are rounding: `10 n eps` of the dtype that sums them (at
    least float32), `eps^2` of the least precise parameter, whose rounding enters squared.
    """
    eps, n = _eps(model, symmetries), max((s.dim for s in symmetries), default=1)
    return max(10 * n * min(eps, torch.finfo(torch.float32).eps), eps**2)


def _eps(model: nn.Module, symmetries: Sequence[Symmetry]) -> float:
    """Machine epsilon of the least precise parameter that the symmetries move."""
    names = {n for s in symmetries for n in s.parameters}
    return max((torch.finfo(t.dtype).eps for n, t in tensors_of(model).items() if n in names), default=0.0)


def _kappa(model: nn.Module, symmetries: Sequence[Symmetry], joint: bool) -> list[Tensor]:
    shapes = {n: tuple(t.shape) for n, t in tensors_of(model).items()}
    if joint:
        return stiffness(leg_coordinates(symmetries, shapes), symmetries)
    return [stiffness(leg_coordinates([s], shapes), [s])[0] for s in symmetries]


def _frame(symmetry: Symmetry, classes: Classes, x: Tensor, y: Tensor, recede: float) -> Tensor:
    """The element from which the solve starts: the identity for tori, `gl_frame` for general_linear."""
    return symmetry.identity() if isinstance(classes, TorusClasses) else gl_frame(classes, x, y, recede)


def _verdict(symmetry: Symmetry, classes: Classes, potential: Potential) -> tuple[Class, Tensor, str]:
    """Class, which coordinates (torus) or blocks (GL) have a finite equilibrium `[blocks]`, and why not all."""
    if isinstance(classes, GLClasses):
        return _gl_verdict(symmetry, classes)
    finite = classes.finite
    if bool(finite.all()):
        return "finite", finite, ""
    recedes = bool((classes.grows | classes.shrinks).any())
    if symmetry.one_sided and not potential.norm and recedes and not bool(classes.invalid.any()):
        return (
            "one-sided",
            finite,
            "all legs scale the same way and no weight decay holds the norm: it grows for ever",
        )
    causes = (
        (classes.neutral, "no noise and no decay on either side (dead or unused)"),
        (classes.grows, "scale recedes to infinity: nothing pulls back (no gradient through the - legs)"),
        (classes.shrinks, "scale recedes to zero: nothing pushes back (no gradient on the + legs)"),
        (classes.invalid, "an estimated second moment is negative or not finite: measure more samples"),
    )
    parts = [f"{int(mask.sum())} of {symmetry.blocks}: {why}" for mask, why in causes if bool(mask.any())]
    return "degenerate", finite, "; ".join(parts)


def _gl_verdict(symmetry: Symmetry, classes: GLClasses) -> tuple[Class, Tensor, str]:
    ranks = {
        "shrink to zero (no gradient noise or weight beyond this rank)": GLClasses.rank(classes.shrinks),
        "grow without bound": GLClasses.rank(classes.grows),
        "are moved by nothing": GLClasses.rank(classes.neutral),
    }
    finite = GLClasses.rank(classes.finite) == symmetry.dim
    if bool(finite.all()):
        return "finite", finite, ""
    parts = [f"{int(r.sum())} directions {what}" for what, r in ranks.items() if int(r.sum())]
    total = symmetry.blocks * symmetry.dim
    reason = f"of {total}: " + ", ".join(parts)
    if not int(GLClasses.rank(classes.finite).sum()):
        reason += "; if a factor is zero (LoRA's B at initialisation), train some steps first, then balance"
    return "degenerate", finite, reason


def _moved_charge(
    model: nn.Module, symmetry: Symmetry, movers: Sequence[Symmetry], elements: Iterable[Tensor]
) -> Tensor:
    tensors = tensors_of(model)
    moved = {n: tensors[n].detach().double().cpu() for n in symmetry.parameters}
    for mover, element in zip(movers, elements, strict=True):
        for name in moved:
            moved[name] = mover.move(name, moved[name], element)
    return symmetry.charge(moved)


def _refuse_errors(moments: GradientMoments, orbit: Orbit) -> None:
    if len(moments.groups) < 2:
        raise MomentError("errors=True needs moments measured in at least two groups")
    if not isinstance(orbit, MeasuredOrbit) or orbit.needs_samples:
        raise MomentError(
            "errors=True needs an equilibrium that moments alone determine: samples= and remeasure= carry no groups; "
            "leave errors out, or solve with joint=False"
        )


def _jackknife(
    model: nn.Module,
    orbit: FramedOrbit,
    classes: Sequence[Classes],
    kappa: Sequence[Tensor],
    minimum: Minimum,
    moments: GradientMoments,
    objective: Objective,
    sgd: SGDConfig | None,
    joint: bool,
) -> dict[str, Tensor]:
    """Standard errors of `logs_of` the elements: the solve repeated without each group of samples, from the full
    minimum. Infinite for torus coordinates that have no finite equilibrium without one of the groups.
    """
    symmetries, build = orbit.symmetries, orbit_of if joint else separate_orbits

    def logs(part: GradientMoments) -> dict[str, Tensor]:
        own = FramedOrbit(build(model, symmetries, part, potential_of(objective, part, sgd)), orbit.frame)
        pairs = own.at([s.identity() for s in symmetries]).pairs
        left = [
            _left_finite(c, *drives(s, p, own.potential)) for s, c, p in zip(symmetries, classes, pairs, strict=True)
        ]
        found = named(minimise(own, left, kappa, start=minimum.logs, tolerance=1e-6).logs)
        for s, before, after in zip(symmetries, classes, left, strict=True):
            found[s.name][before.finite != after.finite] = torch.nan
        return found

    def named(values: Sequence[Tensor]) -> dict[str, Tensor]:
        elements = orbit.unframed(elements_of(symmetries, values))
        return {s.name: v for s, v in zip(symmetries, logs_of(symmetries, elements), strict=True)}

    size = None if sgd is None or objective == "hessian" else sgd.dataset_size
    found = jackknife(moments, named(minimum.logs), logs, size)
    return {n: torch.where(e.error.isnan(), torch.inf, e.error) for n, e in found.items()}


def _left_finite(classes: Classes, x: Tensor, y: Tensor) -> Classes:
    """The classes of a torus without the coordinates whose drives are not positive."""
    return replace(classes, finite=classes.finite & (x > 0) & (y > 0)) if isinstance(classes, TorusClasses) else classes
