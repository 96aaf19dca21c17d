"""Whether a saved momentum can belong to the weights it is said to belong to: gradients obey the symmetries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from noetherflow.core.held import Held
from noetherflow.symmetry.symmetry import Symmetry

CLEARER = 0.05
"""An exchange that leaves less than this share of a violation shows that the order is wrong."""
SEEN = 0.2
"""Share of the leg terms that does not cancel, below which nothing is looked for."""
COORDINATES = 4
"""With fewer coordinates a small violation may be chance."""
LARGEST = 2 * 10**9
"""Products of entries that the search may take; larger models are not searched."""


def exchanged(
    held: Sequence[Held], symmetries: Sequence[Symmetry], weights: Mapping[str, Tensor]
) -> tuple[str, str] | None:
    """Two parameters of one shape whose momenta obey the symmetries only when they are exchanged; None for none.

    A gradient `g` of a loss satisfies `<theta_+, g_+> = <theta_-, g_->`, coordinate by coordinate, and so does an
    average of gradients while the weights have moved little. Where the sides of the given order do not cancel, and
    those of another order do, the given order is wrong: single parameters are exchanged, and all those of two
    symmetries alike. Where nothing is found nothing is proven.

    Args:
        held: the saved state under the names that it is said to have.
        symmetries: of the model.
        weights: the stored weights by canonical name.

    Source: theory.md section 2.
    """
    momenta = {h.name: m for h in held if (m := _momentum(h)) is not None}
    known = [s for s in symmetries if all(n in momenta for n in s.parameters)]
    left, every = _violation(known, weights, momenta)
    if left <= SEEN * every:
        return None
    trials = [*_singly(known, momenta), *_together(known, momenta)]
    if sum(momenta[n].numel() for trial in trials for n in trial.exchange) > LARGEST:
        return None
    for trial in trials:
        if sum(s.blocks * s.dim for s in trial.symmetries) < COORDINATES:
            continue
        given, size = _violation(trial.symmetries, weights, momenta)
        moved = {a: momenta[b] for a, b in trial.exchange.items()}
        other, _ = _violation(trial.symmetries, weights, {**momenta, **moved})
        if given > SEEN * size and other < CLEARER * given:
            return next(iter(trial.exchange.items()))
    return None


@dataclass(frozen=True, eq=False)
class _Trial:
    """An exchange of momenta, and the symmetries that tell whether it makes things right."""

    exchange: Mapping[str, str]
    symmetries: Sequence[Symmetry]


def _singly(known: Sequence[Symmetry], momenta: Mapping[str, Tensor]) -> Iterator[_Trial]:
    """Two parameters of one shape, judged by all symmetries on either."""
    for a, b in combinations(momenta, 2):
        own = [s for s in known if a in s.parameters or b in s.parameters]
        if own and momenta[a].shape == momenta[b].shape:
            yield _Trial({a: b, b: a}, own)


def _together(known: Sequence[Symmetry], momenta: Mapping[str, Tensor]) -> Iterator[_Trial]:
    """All parameters of two symmetries whose shapes are alike, judged by the two."""
    for s, t in combinations(known, 2):
        alike = [momenta[n].shape for n in s.parameters] == [momenta[n].shape for n in t.parameters]
        if alike and not set(s.parameters) & set(t.parameters):
            forth = dict(zip(s.parameters, t.parameters, strict=True))
            yield _Trial(forth | {b: a for a, b in forth.items()}, (s, t))


def _momentum(held: Held) -> Tensor | None:
    """The average of gradients in the state of one parameter."""
    key = "momentum_buffer" if "square_avg" not in held.state else "grad_avg"
    found = held.state.get("exp_avg", held.state.get(key))
    fits = isinstance(found, Tensor) and found.shape == held.parameter.shape
    return found if fits else None


def _violation(
    symmetries: Iterable[Symmetry], weights: Mapping[str, Tensor], momenta: Mapping[str, Tensor]
) -> tuple[float, float]:
    """The sum of squares over coordinates of `sum_legs exponent <theta, m>`, and that of its terms one by one."""
    left = every = 0.0
    for s in symmetries:
        total = torch.zeros(s.blocks, s.dim, dtype=torch.float64)
        for leg in s.weight_legs:
            theta = weights[leg.parameter].double() + s.offsets.get(leg.parameter, 0.0)
            term = leg.exponent * (leg.unfold(theta) * leg.unfold(momenta[leg.parameter].double())).sum(-1)
            total = total + term
            every += float(term.square().sum())
        left += float(total.square().sum())
    return left, every
