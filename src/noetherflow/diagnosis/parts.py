"""Facts on the parts of layers: how far units and heads are from their equilibrium, what they carry and learn, and the
logits of heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from noetherflow.core.optimizers import Settings
from noetherflow.core.settings import SGDConfig
from noetherflow.core.tensors import tensors_of
from noetherflow.diagnosis.examined import Examined, named
from noetherflow.diagnosis.facts import SMALL, LayerBalance, PartActivity
from noetherflow.diagnosis.logits import LogitGrowth, LogitSpread
from noetherflow.diagnosis.step import decay_share, of_parameter
from noetherflow.equilibrium.charge_flow import ChargeFlow
from noetherflow.equilibrium.potential import Drift
from noetherflow.equilibrium.result import Settled
from noetherflow.symmetry.heads import HEADS, QUERY_KEY, heads_in, part_of, scales_of
from noetherflow.symmetry.symmetry import Symmetry


def usual_size(weight: Tensor) -> float:
    """The root mean square of a matrix or kernel over `1 / sqrt(fan in)`, about what usual initialisations give.

    Example:
        >>> round(usual_size(torch.full((4, 25), 0.1)), 6)
        0.5
    """
    fan_in = weight.numel() / max(len(weight), 1)
    return float(weight.double().square().mean().sqrt()) * math.sqrt(fan_in)


def usual_sizes(examined: Examined) -> dict[str, float]:
    """`usual_size` of every matrix, as far as its layer makes it small: times that of a larger layer that it trades
    scale with, so that two layers of which one was divided by what the other was multiplied with are as before.
    """
    tensors = {n: t.detach().cpu() for n, t in tensors_of(examined.model).items() if t.ndim > 1 and t.numel()}
    own = {n: usual_size(t) for n, t in tensors.items()}
    partner = dict.fromkeys(own, 1.0)
    for symmetry in examined.symmetries:
        legs = [leg for leg in symmetry.weight_legs if leg.parameter in own]
        for leg in legs:
            other = [own[o.parameter] for o in legs if o.sign != leg.sign]
            partner[leg.parameter] = max([partner[leg.parameter], *other])
    return {n: size * partner[n] for n, size in own.items()}


def balances_of(examined: Examined) -> Iterator[LayerBalance]:
    small = {n for n, size in usual_sizes(examined).items() if size < SMALL}
    for symmetry, flow, settled in named(examined):
        if symmetry.one_sided:
            continue
        logs = _logs(settled)
        errors = _log_errors(flow, examined.settings)
        each = torch.where(flow.finite & (flow.relaxation_steps > 0), flow.relaxation_steps.double(), torch.nan)
        times = each[each.isfinite()]
        if symmetry.family in HEADS:
            heads = heads_in(symmetry, examined.symmetries)
            logs, errors, each = (_by_head(values, heads) for values in (logs, errors, each))
        yield LayerBalance(
            symmetry.name,
            symmetry.family,
            part_of(symmetry),
            logs.numpy(),
            errors.numpy(),
            float(times.median()) if times.numel() else math.nan,
            next((n for n in symmetry.parameters if n in small), ""),
            tuple(each.tolist()),
        )


STAYS = 1e-9
"""Log factors below this are those of directions that the equilibrium leaves alone."""


def _logs(settled: Settled) -> Tensor:
    """The signed log factor of each coordinate; of a matrix the mean over its directions. NaN where nothing settles.

    A matrix moves the directions that have an equilibrium, and leaves the others as they are: these do not count.
    """
    element = settled.element.double()
    if element.ndim == 1:
        return torch.where(settled.finite, element.log(), torch.nan)
    logs = torch.linalg.svdvals(element).log()
    moved = settled.finite.unsqueeze(-1) | (logs.abs() > STAYS)
    return torch.where(moved, logs, torch.nan).nanmean(-1)


def _by_head(values: Tensor, heads: int) -> Tensor:
    """Means over the coordinates of each head, NaN left out."""
    return values.reshape(heads, -1).nanmean(1)


def _log_errors(flow: ChargeFlow, settings: Settings) -> Tensor:
    """Standard errors of the log factors, by that of the flow; NaN where it has none or where nothing settles.

    The equilibrium is where two pulls balance, at `1/4 log(Y / X)` under SGD and `1/2 log(Y / X)` where gradients are
    divided by their size. The flow is their difference and its `imbalance` the difference over the sum, so that an
    error of the flow moves the logarithm by twice that error over the sum. Of a matrix the mean over its directions,
    taken to err together.
    """
    unknown = torch.full((len(flow.imbalance),), math.nan, dtype=torch.float64)
    if flow.error is None:
        return unknown
    error, size = (_size(values) for values in (flow.error, flow.drift))
    power = 0.25 if isinstance(settings, SGDConfig) else 0.5
    known = flow.finite & (flow.imbalance > 0) & (size > 0)
    return torch.where(known, 2 * power * error * flow.imbalance / size, unknown)


def _size(values: Tensor) -> Tensor:
    """The size of each coordinate of a torus, of each matrix the root of its squared diagonal."""
    if values.ndim == 1:
        return values.abs()
    return torch.linalg.vector_norm(values.diagonal(dim1=-2, dim2=-1), dim=-1)


def activities_of(examined: Examined) -> Iterator[PartActivity]:
    """Of every symmetry that was measured, by its moments."""
    for symmetry in examined.symmetries:
        if not symmetry.one_sided and symmetry.name in examined.moments.second:
            second = [diagonal(g) for g in examined.moments.second[symmetry.name]]
            yield _activity(examined, symmetry, sum_of(second))


def uncertified_activities(examined: Examined) -> Iterator[PartActivity]:
    """Of the units whose symmetry the certificate refused, by the squared gradients of all entries; heads are left out.

    NaN where the gradients of some parameter were not measured.
    """
    squares = examined.moments.squares
    for symmetry in examined.uncertified:
        if symmetry.one_sided or symmetry.family in HEADS:
            continue
        scales = scales_of(symmetry)
        gradient = torch.full((scales.blocks,), math.nan, dtype=torch.float64)
        if all(n in squares for n in scales.parameters):
            sizes = {n: squares[n].double().cpu().sqrt() for n in scales.parameters}
            gradient = sum_of(scales.grams(scales.positions(sizes)))
        yield _activity(examined, symmetry, gradient)


def _activity(examined: Examined, symmetry: Symmetry, gradient: Tensor) -> PartActivity:
    """How much the parts of one symmetry carry and learn: `gradient` is the mean squared one of each coordinate."""
    tensors = {n: t.detach() for n, t in tensors_of(examined.model).items()}
    scales = scales_of(symmetry)
    weights = scales.grams(scales.positions(tensors))
    sides = [
        sum_of([w for w, leg in zip(weights, scales.weight_legs, strict=True) if leg.sign == sign]) for sign in (1, -1)
    ]
    weight = (sides[0] * sides[1]).sqrt()
    if symmetry.family in HEADS:
        heads = heads_in(symmetry, examined.symmetries)
        weight, gradient = weight.reshape(heads, -1).mean(1), gradient.reshape(heads, -1).sum(1)
    return PartActivity(symmetry.name, part_of(symmetry), weight.numpy(), gradient.sqrt().numpy())


def seen_activities(examined: Examined) -> Iterator[PartActivity]:
    """Of the layers whose units no symmetry tells of, such as those before a tanh or frozen ones, by what was seen of
    their activations.
    """
    trained = {n for n, t in tensors_of(examined.model).items() if t.requires_grad}
    told = _told(examined)
    layers = dict.fromkeys((u.layer, len(u.alive)) for u in examined.seen.units if u.layer not in told)
    for layer, width in layers:
        through = [u for u in examined.seen.units if (u.layer, len(u.alive)) == (layer, width)]
        alive = torch.stack([u.alive for u in through]).all(0).double().numpy()  # it must pass all of them
        least = min(through, key=lambda u: int(u.alive.sum()))
        own = [n for n in tensors_of(examined.model) if n.rpartition(".")[0] == layer]
        frozen = bool(own) and trained.isdisjoint(own)
        yield PartActivity(layer, "unit", np.ones(width), alive, least.activation, frozen)


def _told(examined: Examined) -> set[str]:
    """The modules whose outputs, rows of weights and gains, are units of a symmetry that dead units are counted by."""
    measured = [s for s in examined.symmetries if s.name in examined.moments.second]
    units = [s for s in (*measured, *examined.uncertified) if not s.one_sided and s.family not in HEADS]
    rows = [leg for s in units for leg in s.weight_legs if 0 in leg.axes]
    return {leg.parameter.rpartition(".")[0] for leg in rows}


def logit_spreads(examined: Examined, growth: Sequence[LogitGrowth]) -> Iterator[LogitSpread]:
    """The logits of every head that was seen, each with the growth of its layer's norms."""
    for seen in examined.seen.logits:
        parts = [g for g in growth if examined.symmetries[g.name].parameters[0].startswith(_within(seen.module))]
        factor = max((g.factor for g in parts), default=1.0)
        for head, spread in enumerate(seen.spread.tolist()):
            yield LogitSpread(seen.module, head, spread, factor, examined.steps)


def _within(module: str) -> str:
    """What the names of all parameters inside a module begin with."""
    return f"{module}." if module else ""


def logit_growths(examined: Examined) -> Iterator[LogitGrowth]:
    """Growth of query and key norms by noise and decay alone over the steps to come."""
    tensors = {n: t.detach() for n, t in tensors_of(examined.model).items()}
    for symmetry in examined.symmetries:
        if symmetry.family not in QUERY_KEY or symmetry.name not in examined.moments.second:
            continue
        scales = scales_of(symmetry)
        heads = heads_in(symmetry, examined.symmetries)
        norm = sum_of(scales.grams(scales.positions(tensors))).reshape(heads, -1).sum(1)
        growth = _growth(symmetry, examined).reshape(heads, -1).sum(1) / norm
        decay = decay_share(examined.settings, symmetry.parameters[0])
        left, reach = examined.course.kept(decay, examined.steps)
        factors = left + growth.numpy() * reach
        head = int(np.argmax(factors))
        width = 2 * symmetry.blocks / heads if symmetry.is_torus else symmetry.dim
        spread = float(norm[head]) * factors[head] / (2 * width)
        yield LogitGrowth(symmetry.name, head, float(factors[head]), spread, examined.steps, measured=False)


def _growth(symmetry: Symmetry, examined: Examined) -> Tensor:
    """What noise adds to the squared weights of each coordinate per step: `lr^2 E|g|^2` under SGD, `lr^2` per entry
    under optimisers whose steps have one size.
    """
    settings = examined.settings
    if isinstance(settings, SGDConfig):
        grams = zip(symmetry.weight_legs, examined.moments.batch_grams(symmetry, settings), strict=True)
        return sum_of([Drift.of(of_parameter(settings, leg.parameter)).noise * diagonal(g) for leg, g in grams])
    scales = scales_of(symmetry)
    ones = {n: torch.ones_like(t) for n, t in tensors_of(examined.model).items() if n in symmetry.parameters}
    return settings.lr**2 * sum_of(scales.grams(ones))


def sum_of(parts: Sequence[Tensor]) -> Tensor:
    """The sum of some tensors on the host, in float64."""
    return torch.stack([p.double().cpu() for p in parts]).sum(0)


def diagonal(gram: Tensor) -> Tensor:
    """Second moments per coordinate or block."""
    return gram if gram.ndim == 1 else gram.diagonal(dim1=-2, dim2=-1).sum(-1)
