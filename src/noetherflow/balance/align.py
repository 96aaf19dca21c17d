"""Bring one model as close to another as its orbit allows: the step before weights are averaged."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from noetherflow.balance.check import OutputCheck
from noetherflow.balance.model import BalanceReport, move_values
from noetherflow.balance.motion import Motion, Reordering, refuse_frozen
from noetherflow.balance.units import Units, permutable_units, rows_of, write
from noetherflow.core.host import on_host
from noetherflow.core.tensors import tensors_of
from noetherflow.discovery.unusable import refuse_without_values
from noetherflow.equilibrium.joint import noise_equilibrium
from noetherflow.errors import DataError
from noetherflow.symmetry.arguments import expect_model_and_symmetries
from noetherflow.symmetry.symmetry import Symmetry
from noetherflow.symmetry.symmetry_set import SymmetrySet, positions_of

ROUNDS = 30
"""Rounds of assignments and rotations at most; each brings the models closer, and there are few to make."""
STEPS = 200
"""Steps of the last refinement of all scales and matrices at once."""
MET = 1e-20
"""Squared distance, relative to the squared norm, at which there is nothing to refine."""
Elements = dict[str, Tensor]
Positions = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Alignment:
    """How to bring one model closest to another.

    Attributes:
        elements: Group elements by symmetry name.
        reorderings: The units that change places first.
        distance_before, distance: Norm of the difference of all parameters, before and after.
        norm: Norm of the parameters of the model that is approached.
        symmetries: Of the model that moves.
    """

    elements: Elements
    reorderings: tuple[Reordering, ...]
    distance_before: float
    distance: float
    norm: float
    symmetries: SymmetrySet

    @property
    def motion(self) -> Motion:
        """What carries it out."""
        return Motion([s for s in self.symmetries if s.name in self.elements], self.elements, self.reorderings)

    def move_(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        *,
        example_inputs: Any = None,
        tolerance: float | None = None,
    ) -> BalanceReport:
        """Move `model_b` there, in place, as `nf.move_` does: outputs compared, optimiser state moved along.

        Args:
            model: the second model of `nf.align`.
            optimizer: whose state moves along, one or several.
            example_inputs: on which outputs are compared; by default those of `find_symmetries`.
            tolerance: largest relative change of outputs; see `balance_`.

        Returns:
            What moved, and by how much the outputs changed.

        Raises:
            CertificateError: outputs change; the model is then as it was.
            DataError: frozen parameters would move.
        """
        optimizers = [] if optimizer is None else optimizer if isinstance(optimizer, Sequence) else [optimizer]
        refuse_frozen(model, self.motion)
        inputs = _inputs_of(self.symmetries, example_inputs)
        return move_values(model, self.motion, self.symmetries, OutputCheck(inputs, tolerance=tolerance), optimizers)

    def __str__(self) -> str:
        moved = sum(int((r.order != torch.arange(len(r.order))).sum()) for r in self.reorderings)
        share = self.distance / self.distance_before if self.distance_before else 1.0
        return (
            f"distance {self.distance_before:.4g} -> {self.distance:.4g} ({share:.2%} of it is left; the norm of the "
            f"parameters is {self.norm:.4g}): {len(self.elements)} group elements, {moved} units change places"
        )

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        return {
            "distance_before": self.distance_before,
            "distance": self.distance,
            "norm": self.norm,
            "elements": {n: e.tolist() for n, e in self.elements.items()},
            "reorderings": [
                {"parameters": [leg.label for leg in r.legs], "order": r.order.tolist()} for r in self.reorderings
            ],
        }


@on_host
def align(
    model_a: nn.Module,
    model_b: nn.Module,
    syms: SymmetrySet,
    *,
    example_inputs: Any = None,
    permutations: bool = True,
) -> Alignment:
    """The group elements and permutations of units that bring `model_b` closest to `model_a`.

    Neither model changes; `align(...).move_(model_b)` moves the second one, whose function stays the same. Both are
    brought to the least norm on their orbits, where scales are no question any more; units are matched there by linear
    assignment and general_linear factors by rotations (Procrustes) in turn, and in the end all scales and matrices are
    refined at once, back at `model_a` as it is. The assignments are found unit layer by unit layer: for copies of one
    model they are right, for models trained apart they are a good answer, not surely the best.

    Args:
        model_a: The model to approach.
        model_b: A model of the same architecture.
        syms: Symmetries of either (they have the same). Those that a normalisation's eps makes approximate stay out.
        example_inputs: Some samples that tell which units can change places; by default those of `find_symmetries`.
        permutations: Whether units may change places. Only channels of scalar or diagonal symmetries do: hidden units
            behind a relu or a gate, channels of convolutions; not heads, and not units behind a gelu.

    Returns:
        An Alignment: elements, permutations, and the distance before and after, over all parameters.

    Raises:
        DataError: The models have different parameters, or weights that are not finite; no example inputs.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
        >>> other = copy.deepcopy(model)
        >>> x = torch.randn(16, 3, dtype=torch.float64)
        >>> syms = nf.find_symmetries(model, x)
        >>> report = nf.move_(other, syms, {"0 -> 2": [2.0, 0.5, 3.0, 1.0]})
        >>> found = nf.align(model, other, syms)
        >>> found.distance_before > 0.5, found.distance < 1e-12
        (True, True)

    Source: theory.md section 2; Ainsworth et al. 2023 (Git Re-Basin) for matching by assignment.
    """
    for model in (model_a, model_b):
        expect_model_and_symmetries("align(model_a, model_b, syms)", model, syms)
        refuse_without_values(tensors_of(model), "align")
    exact = syms.without({s.name: "only approximate" for s in syms if s.eps is not None})
    a, b = (_in_double(model, exact) for model in (model_a, model_b))
    _refuse_different(a, b)
    units = permutable_units(b, syms, _inputs_of(syms, example_inputs)) if permutations else []
    own = [s for s in exact if s.blocks]
    pa, pb = _canonical(a, exact), _canonical(b, exact)
    starts = [_matched(pa[0], pb[0], own, units, orders) for orders in _first_orders(pa[0], pb[0], units)]
    found = min(starts, key=lambda orders: _distance(pa[0], _rotated(pa[0], _reordered(pb[0], units, orders), own)))
    reorderings = tuple(
        u.reordering(o) for u, o in zip(units, found, strict=True) if not torch.equal(o, torch.arange(u.count))
    )
    write(tensors_of(b), Motion((), {}, reorderings))
    elements = _refined(positions_of(a, own), positions_of(b, own), own, _frames(a, b, exact, own))
    here, there = (
        {n: t for n, t in tensors_of(m).items() if isinstance(t, nn.Parameter) and t.is_floating_point()}
        for m in (a, _in_double(model_b, exact))
    )
    answer = Motion([s for s in own if s.name in elements], elements, reorderings)
    moved = {n: answer.weight(n, t) for n, t in there.items()}
    before, after = _distance(here, there), _distance(here, moved)
    norm = math.sqrt(sum(float(t.detach().square().sum()) for t in here.values()))
    if not after < before:
        return Alignment({}, (), before, before, norm, exact)
    return Alignment(elements, reorderings, before, after, norm, exact)


def orbit_distance(
    model_a: nn.Module,
    model_b: nn.Module,
    syms: SymmetrySet,
    *,
    example_inputs: Any = None,
    permutations: bool = True,
) -> float:
    """How far two models are apart once one of them is moved along its orbit: the distance that `align` ends at.

    Args:
        model_a, model_b: Two models of one architecture.
        syms: Symmetries of either.
        example_inputs, permutations: See `align`.

    Returns:
        The norm of the difference of all parameters; 0 up to rounding for two points of one orbit.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
        >>> syms = nf.find_symmetries(model, torch.randn(16, 3, dtype=torch.float64))
        >>> orbit_distance(model, copy.deepcopy(model), syms)
        0.0

    Source: theory.md section 2.
    """
    return align(model_a, model_b, syms, example_inputs=example_inputs, permutations=permutations).distance


def _inputs_of(syms: SymmetrySet, example_inputs: Any) -> Any:
    inputs = syms.example_inputs if example_inputs is None else example_inputs
    if inputs is None:
        raise DataError("example inputs tell which units can change places and prove the move: pass example_inputs")
    return inputs


def _in_double(model: nn.Module, syms: SymmetrySet) -> nn.Module:
    """A float64 copy on the host with nothing frozen. Raises DeclarationError for a model without these symmetries."""
    syms.tensors_in(model)
    return copy.deepcopy(model).to("cpu", torch.float64).requires_grad_(True)


def _refuse_different(a: nn.Module, b: nn.Module) -> None:
    """Raises DataError unless both have the same parameters, all finite."""
    first, second = ({n: t for n, t in tensors_of(m).items() if isinstance(t, nn.Parameter)} for m in (a, b))
    other = [n for n in {**first, **second} if n not in first or n not in second or first[n].shape != second[n].shape]
    if other:
        raise DataError(f"the models differ in {other[:4]} (missing, or of another shape); align needs equal shapes")
    broken = [n for tensors in (first, second) for n, t in tensors.items() if not bool(t.isfinite().all())]
    if broken:
        raise DataError(f"weights of {broken[:4]} are not finite")


def _canonical(model: nn.Module, syms: SymmetrySet) -> tuple[dict[str, Tensor], Elements]:
    """The positions at the least norm on the orbit, up to rotations, and the elements that lead there."""
    elements = noise_equilibrium(model, syms, objective="norm").elements
    tensors = positions_of(model, syms)
    there = {n: t.detach().clone() for n, t in tensors.items() if t.is_floating_point()}
    for s in syms:
        if s.name in elements:
            there |= {n: s.move(n, there[n], elements[s.name]) for n in s.parameters}
    return there, elements


def _first_orders(a: Positions, b: Positions, units: Sequence[Units]) -> list[list[Tensor]]:
    """Two places to start from: all units where they are, and those with the most similar sizes of weights matched.

    Sorted absolute weights of a unit do not change when the units that it reads from change places.
    """
    sizes = [assignment(_squares(_sizes(u, a), _sizes(u, b))) for u in units]
    return [[torch.arange(u.count) for u in units], sizes]


def _sizes(units: Units, positions: Positions) -> Tensor:
    """The absolute weights of each unit, sorted leg by leg, `[units, entries]`."""
    return torch.cat([rows.abs().sort(1).values for rows in rows_of(units, positions)], 1)


def assignment(cost: Tensor) -> Tensor:
    """The order of least total cost: for each row `i` of a square matrix its column `order[i]`.

    Example:
        >>> assignment(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor([1, 0])
    """
    from scipy.optimize import linear_sum_assignment

    return torch.as_tensor(linear_sum_assignment(cost.numpy())[1])


def _matched(
    a: Positions, b: Positions, symmetries: Sequence[Symmetry], units: Sequence[Units], orders: list[Tensor]
) -> list[Tensor]:
    """Better orders of all units: each matched anew with the others held, while that brings b closer."""
    best = _distance(a, _rotated(a, _reordered(b, units, orders), symmetries))
    for _ in range(ROUNDS):
        start = best
        for i, u in enumerate(units):
            now = _rotated(a, _reordered(b, units, orders), symmetries)
            cost = sum(_squares(x, y) for x, y in zip(rows_of(u, a), rows_of(u, now), strict=True))
            assert isinstance(cost, Tensor)
            tried = [*orders[:i], orders[i][assignment(cost)], *orders[i + 1 :]]
            value = _distance(a, _rotated(a, _reordered(b, units, tried), symmetries))
            if value < best:
                best, orders = value, tried
        if not best < start:
            break
    return orders


def _squares(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances of all rows, `[rows, rows]`."""
    return x.square().sum(1)[:, None] + y.square().sum(1)[None] - 2 * x @ y.mT


def _reordered(b: Positions, units: Sequence[Units], orders: Sequence[Tensor]) -> dict[str, Tensor]:
    motion = Motion((), {}, tuple(u.reordering(o) for u, o in zip(units, orders, strict=True)))
    return {n: motion.weight(n, t) for n, t in b.items()}


def _rotation(a: Positions, b: Positions, symmetry: Symmetry) -> Tensor:
    """The orthogonal matrices, block by block, that bring `b` closest to `a` (Procrustes)."""
    together = sum(leg.unfold(a[leg.parameter]) @ leg.unfold(b[leg.parameter]).mT for leg in symmetry.weight_legs)
    assert isinstance(together, Tensor)
    u, _, v = torch.linalg.svd(together)
    rotation: Tensor = u @ v
    return rotation


def _rotated(a: Positions, b: dict[str, Tensor], symmetries: Sequence[Symmetry]) -> dict[str, Tensor]:
    """`b` with all general_linear factors rotated towards `a`."""
    for s in symmetries:
        if not s.is_torus:
            rotation = _rotation(a, b, s)
            b = b | {n: s.move(n, b[n], rotation) for n in s.parameters}
    return b


def _frames(a: nn.Module, b: nn.Module, syms: SymmetrySet, own: Sequence[Symmetry]) -> Elements:
    """The elements from `b` to `a` by way of the least norm of both."""
    (here, from_a), (there, from_b) = _canonical(a, syms), _canonical(b, syms)
    out = {}
    for s in own:
        if s.name in from_a and s.name in from_b:
            middle = s.identity() if s.is_torus else _rotation(here, there, s)
            there |= {n: s.move(n, there[n], middle) for n in s.parameters}
            out[s.name] = s.compose(s.inverse(from_a[s.name]), s.compose(middle, from_b[s.name]))
    return out


def _distance(a: Positions, b: Positions) -> float:
    return math.sqrt(sum(float((t.detach() - b[n].detach()).double().square().sum()) for n, t in a.items()))


def _refined(a: Positions, b: Positions, symmetries: Sequence[Symmetry], start: Elements) -> Elements:
    """All elements together at the least distance near `start`, or near the identity if that ends closer."""
    names = dict.fromkeys(n for s in symmetries for n in s.parameters)
    here, there = ({n: p[n].detach().double().cpu() for n in names} for p in (a, b))
    if float(_squared(here, there, symmetries, start)) <= MET * sum(float(t.square().sum()) for t in here.values()):
        return start
    ends = [_descended(here, there, symmetries, begin) for begin in (start, {})]
    return min(ends, key=lambda elements: float(_squared(here, there, symmetries, elements)))


def _squared(a: Positions, b: dict[str, Tensor], symmetries: Sequence[Symmetry], elements: Elements) -> Tensor:
    """The squared distance under these elements; it can be differentiated by them."""
    for s in symmetries:
        if s.name in elements:
            b = b | {n: s.move(n, b[n], elements[s.name]) for n in s.parameters}
    return torch.stack([(t - b[n]).square().sum() for n, t in a.items()]).sum()


def _descended(a: Positions, b: dict[str, Tensor], symmetries: Sequence[Symmetry], start: Elements) -> Elements:
    """L-BFGS on logs of scales and on matrices; the start itself where that ends no closer."""
    first = {s.name: start.get(s.name, s.identity()) for s in symmetries}
    if not first:
        return {}
    free = {s.name: (first[s.name].log() if s.is_torus else first[s.name].clone()) for s in symmetries}
    variables = [v.requires_grad_(True) for v in free.values()]

    def elements() -> Elements:
        return {s.name: free[s.name].exp() if s.is_torus else free[s.name] for s in symmetries}

    scale = 1 / max(sum(float(t.square().sum()) for t in a.values()), 1e-300)
    optimizer = torch.optim.LBFGS(
        variables, max_iter=STEPS, history_size=20, tolerance_grad=1e-15, tolerance_change=1e-18,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> float:
        optimizer.zero_grad()
        value = scale * _squared(a, b, symmetries, elements())
        value.backward()  # type: ignore[no-untyped-call]
        return float(value.detach())

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        found = {n: e.clone() for n, e in elements().items()}
        better = _squared(a, b, symmetries, found) < _squared(a, b, symmetries, first)
    return found if bool(better) else first
