"""Numerical proof of a symmetry: outputs stay, per-sample gradients move as they must (theory.md section 2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from noetherflow.core.inputs import LossFn, ModelInputs
from noetherflow.core.members import modules_of
from noetherflow.discovery.bench import Bench, widened
from noetherflow.discovery.certificate import Certificate, CertificateRow
from noetherflow.discovery.copies import ModelCopy, flat_outputs, in_dtype
from noetherflow.discovery.export import export
from noetherflow.discovery.survey import Item, Looks, Survey, relative, survey
from noetherflow.discovery.unusable import refuse_unusable
from noetherflow.discovery.verdict import EXACT, Ruling, holds, rule, rule_with_eps, tolerance_of, unsteady
from noetherflow.discovery.violations import (
    EpsLevel,
    EpsSize,
    Move,
    Violations,
    effect_of,
    eps_levels,
    eps_sizes,
    moves,
    rounding,
    violations,
)
from noetherflow.errors import ExportError
from noetherflow.symmetry.arguments import expect_model_and_symmetries
from noetherflow.symmetry.symmetry import Symmetry
from noetherflow.symmetry.symmetry_set import SymmetrySet


def certify(
    model: nn.Module,
    syms: SymmetrySet,
    example_inputs: Any = (),
    loss_fn: LossFn | None = None,
    batch: Any = None,
    *,
    spread: float = 0.3,
    trials: int = 2,
    samples: int = 2,
    dtypes: Sequence[torch.dtype] = (),
    seed: int = 0,
) -> Certificate:
    """Check every symmetry by applying random group elements `G = exp(A)` and by looking at gradients.

    Works on a float64 copy of the model in evaluation mode, in which casts to narrower types stay in float64; every
    call starts from the same random state. Three things are measured: the change of the outputs at `G theta`; the
    per-sample gradients there, against the ones the group predicts; and `theta^T A g` for all generators A, which
    vanishes if the gradients of training obey the symmetry. The first trial uses the model and `example_inputs` as they
    are, the others random inputs and weights near the model's; gradients are looked at with weights drawn anew, too, so
    that dead units, zero inputs and zero weights prove nothing.

    Args:
        model: the model, wrapped or not; it is not changed.
        syms: what to check, found or declared.
        example_inputs: a tensor, a tuple of arguments or a mapping of keyword arguments; nothing for a model without.
        loss_fn: `loss_fn(model, batch)`, one loss per sample, shape `[batch]`. Without it gradients are those of a
            random projection of each sample's outputs.
        batch: what `loss_fn` gets, `example_inputs` by default.
        spread: standard deviation of the entries of A.
        trials: choices of weights and inputs in which group elements are applied, the example among them.
        samples: of how many samples gradients are taken.
        dtypes: also measure the change of the outputs in these types.
        seed: of all random draws. (There are many parameters because each is an option of its own.)

    Returns:
        One row per symmetry. Verdicts: `exact` below 1e-12 (or 30 times the measured rounding of the outputs);
        `approximate` when a normalisation's eps explains the violation, shown by varying eps; `undetermined` when the
        outputs never depended on some of the moved weights; else `broken`.

    Raises:
        DataError: outputs are not finite, there is no floating output, the model cannot be copied, does not run in
            float64, or holds weights that are no numbers or on the meta device.
        DeclarationError: the symmetries are another model's.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> from noetherflow.discovery.find import find_symmetries
        >>> x = torch.randn(5, 3)
        >>> [row.verdict for row in certify(net, find_symmetries(net, x), x)]
        ['exact']

    Source:
        theory.md section 2.
    """
    call = "certify(model, syms, example_inputs)"
    expect_model_and_symmetries(call, model, syms)
    tensors = syms.tensors_in(model)
    refuse_unusable(model, "certify")
    trainable = [n for n, t in tensors.items() if isinstance(t, nn.Parameter) and t.requires_grad]
    items = syms.all_items
    with torch.inference_mode(False), torch.enable_grad():
        example = widened(example_inputs)
        looks = Looks(loss_fn, widened(batch), trials, samples, spread, seed)
        bench = Bench(model, example, {n for item in items for n in item.parameters})
        found = survey(bench, example, looks, items, trainable)
        measured = _measured(items, bench, found, looks)
        rulings = _rulings(items, measured, bench, found, looks)
        rows = tuple(
            _row(item, v, *ruling, _narrow(model, item, example, dtypes, spread, seed + k))
            for k, (item, v, ruling) in enumerate(zip(items, measured, rulings, strict=True))
        )
    casts = syms.casts or (_casts(model, example_inputs) if bench.widened or bench.narrow else ())
    members = {item.name: modules_of(item.parameters) for item in items}
    return Certificate(rows, tolerance_of(bench.narrow, 0.0), casts, _notes(bench, found), members)


def _measured(items: Sequence[Item], bench: Bench, found: Survey, looks: Looks) -> list[Violations]:
    """The violations of every symmetry. A group that does not hold as a whole is measured one by one."""
    measured: dict[str, Violations] = {}
    tolerance = tolerance_of(bench.narrow, 0.0)
    for move in moves(items, looks.spread, looks.seed):
        effect = effect_of(move, bench, found)
        for item, seed in zip(move.items, move.seeds, strict=True):
            v = violations(item, effect, found)
            if len(move.items) > 1 and not holds(v, tolerance, moves_statistics(item)):
                v = violations(item, effect_of(Move((item,), (seed,), looks.spread), bench, found), found)
            measured[item.name] = v
    return [measured[item.name] for item in items]


def moves_statistics(item: Item) -> bool:
    """Whether a symmetry moves running statistics, which get no gradient."""
    return isinstance(item, Symmetry) and any(leg.buffer for leg in item.legs)


def _rulings(
    items: Sequence[Item], measured: Sequence[Violations], bench: Bench, found: Survey, looks: Looks
) -> list[tuple[Ruling, tuple[EpsSize, ...]]]:
    """A verdict for every symmetry, with the sizes of its violation at smaller eps where it was varied."""
    if found.unsteady > EXACT:
        return [(unsteady(found.unsteady), ()) for _ in items]
    tolerance = tolerance_of(bench.narrow, 0.0)
    if not all(holds(v, tolerance, moves_statistics(item)) for v, item in zip(measured, items, strict=True)):
        tolerance = tolerance_of(bench.narrow, rounding(bench, found))
    levels: tuple[EpsLevel, ...] | None = None
    rulings: list[tuple[Ruling, tuple[EpsSize, ...]]] = []
    for k, (item, v) in enumerate(zip(items, measured, strict=True)):
        statistics = moves_statistics(item)
        eps = item.eps if isinstance(item, Symmetry) else None
        if eps is None or holds(v, tolerance, statistics):
            rulings.append((rule(v, tolerance, statistics), ()))
            continue
        levels = eps_levels(bench, found) if levels is None else levels
        sizes = eps_sizes(Move((item,), (looks.seed + k,), looks.spread), bench, levels)
        rulings.append((rule_with_eps(v, sizes, eps, tolerance, statistics), sizes))
    return rulings


def _row(
    item: Item, v: Violations, ruling: Ruling, sizes: Sequence[EpsSize], dtypes: tuple[tuple[str, float], ...]
) -> CertificateRow:
    statistics = ruling.mode == "training"
    eps = item.eps if isinstance(item, Symmetry) else None
    own = ((eps, v.outputs),) if eps is not None and sizes else ()
    return CertificateRow(
        name=item.name,
        family=item.family,
        verdict=ruling.verdict,
        outputs=_number(v.outputs),
        gradients=max(_number(v.covariance), (v.training or 0.0) if statistics else max(v.loss, v.conserved)),
        eps=eps,
        eps_sizes=(*own, *((s.factor * (eps or 0.0), s.outputs) for s in sizes)),
        dtypes=dtypes,
        note=ruling.note,
        mode=ruling.mode,
    )


def _number(violation: float) -> float:
    """Infinite in place of NaN: what cannot be compared is not small."""
    return math.inf if math.isnan(violation) else violation


def _narrow(
    model: nn.Module, item: Item, example: Any, dtypes: Sequence[torch.dtype], spread: float, seed: int
) -> tuple[tuple[str, float], ...]:
    """Output violation with weights and inputs rounded to narrower types, by the name of the type."""
    found = []
    for dtype in dtypes:
        copied = ModelCopy.of(model, dtype)
        inputs = in_dtype(ModelInputs.of(example), dtype)
        base = flat_outputs(copied.model, inputs)
        wide = {n: t.detach().double() if t.is_floating_point() else t.detach() for n, t in copied.tensors.items()}
        with torch.no_grad():
            for n, value in Move((item,), (seed,), spread).act(wide)[0].items():
                copied.tensors[n].copy_(value)
        found.append((str(dtype).removeprefix("torch."), _number(relative(flat_outputs(copied.model, inputs), base))))
    return tuple(found)


def _notes(bench: Bench, found: Survey) -> tuple[str, ...]:
    """What the reader must know about the forward: casts, random draws."""
    notes = []
    if bench.narrow:
        notes.append(f"casts to float32 could not be widened, so that exact means below {tolerance_of(True, 0):.0e}")
    if found.random and found.unsteady < EXACT:
        notes.append("the forward draws random numbers; outputs and gradients are compared with equal draws")
    return tuple(notes)


def _casts(model: nn.Module, example_inputs: Any) -> tuple[str, ...]:
    try:
        return export(model, example_inputs).casts()
    except ExportError:
        return ()
