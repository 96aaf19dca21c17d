"""What is read around one optimiser step: inner products on the legs of the watched parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from noetherflow.core.ranks import lost_ranks_named
from noetherflow.errors import DataError
from noetherflow.monitor import sharding
from noetherflow.monitor.charge_map import ChargeMap, Watched
from noetherflow.monitor.parameter import Grouping, Lasting, WatchedParameter
from noetherflow.monitor.rule import AnyRule, GradientRoots, Pairs, State, StepSettings, StepTensors
from noetherflow.monitor.sums import LayerSums, Value, tabulate, totals
from noetherflow.symmetry.leg import accumulation_dtype
from noetherflow.symmetry.symmetry import Symmetry

Rows = dict[str, list[Value]]
"""Inner products by name, one value per watched parameter: a number, or a tensor of all its leg values."""
PairsOf = Callable[[StepTensors], Pairs]


@dataclass(frozen=True, eq=False)
class StepTable:
    """The settings of one step: the `distinct` ones, and for each watched parameter `which` of them it has."""

    distinct: list[StepSettings]
    which: list[int]

    def of(self, parameter: int) -> StepSettings:
        """The settings of one parameter, by its place among the watched ones."""
        return self.distinct[self.which[parameter]]

    def moves(self, parameter: int) -> bool:
        """Whether the optimiser moves it in this step; the first of the distinct settings stands for those left."""
        return self.which[parameter] > 0


@dataclass
class Measurement:
    """One recorded step. `values`: inner products; `weight_square` and `weight_square_after` are its charges.

    A value stays a tensor on the weights' device until the books are closed; on a CPU totals are plain numbers.
    `losses`: those of the steps since the recorded one before, and its own, at the steps `losses_at`; `rates`: the
    learning rates of all these steps.
    `settings`: what the optimiser did with each parameter. `blocks`, `roots`, `matrix_charges`, `layers`: for the
    estimates, empty where none are due. `edited`: somebody wrote to a watched weight since the step before.
    """

    step: int
    lr: float
    settings: StepTable
    values: Rows = field(default_factory=dict)
    loss: Any = None
    losses: Sequence[float | Tensor] = ()
    losses_at: Sequence[int] = ()
    rates: Sequence[float] = ()
    blocks: Rows = field(default_factory=dict)
    roots: Rows = field(default_factory=dict)
    matrix_charges: Sequence[Value] = ()
    layers: LayerSums | None = None
    kept: dict[str, Tensor] = field(default_factory=dict)
    edited: bool = False


class StepMeter:
    """Reads weights, gradients and optimiser state before and after a step, each no more often than the rule asks.

    What is measured after one step is known before the next (`LedgerRule.carried`), as long as nobody writes between.
    """

    def __init__(
        self, layout: ChargeMap, rule: AnyRule, optimizer: torch.optim.Optimizer, watched: Mapping[str, nn.Parameter]
    ) -> None:
        self.layout, self.rule, self.optimizer, self.watched = layout, rule, optimizer, watched
        self.ranks = sharding.ranks_of(watched.values())
        self.carried = {"weight_square": "weight_square_after", **rule.carried}
        self._each = [WatchedParameter(name, p, name in layout.totals_only) for name, p in watched.items()]
        self._grouping = Grouping([one.parameter for one in self._each])
        self._idle = rule.step_settings.idle()
        self._products = frozenset(f.name for f in fields(rule.products))

    @property
    def sharded(self) -> bool:
        """Whether weights are spread over processes, which then close their books together."""
        return self.ranks is not None

    @property
    def rounding(self) -> float:
        """A charge measured twice may differ by this share of its norm; half precision rounds the weights as well."""
        return max((min(100 * torch.finfo(p.dtype).eps, 1e-3) for p in self.watched.values()), default=0.0)

    def forget(self) -> None:
        """Do not rely on what was measured after the last step."""
        for one in self._each:
            one.forget()

    def before(self, step: int) -> Measurement:
        """The part of a measurement that needs the weights, gradients and state before the step."""
        with torch.no_grad():
            states = self._states()
            lasting = self._lasting(states)
            lr = float(self.optimizer.param_groups[0].get("lr", math.nan))
            now = Measurement(step, lr, self._settings(states, lasting))
            for j, one in enumerate(self._each):
                self._measure_before(now, j, one, lasting[j])
        return now

    def after(self, now: Measurement) -> None:
        """Complete a measurement once the step is made; what the step wrote last comes first, still in the cache."""
        with torch.no_grad():
            lasting = self._lasting(self._states())
            for j in reversed(range(len(self._each))):
                one, c = self._each[j], now.settings.of(j)
                passing = {"weight_before": now.kept[one.name]} if one.name in now.kept else {}
                pairs_of = partial(self._pairs_after, c) if now.settings.moves(j) else _charge_after
                found = self._inner(one, lasting[j], passing, pairs_of)
                self._write(now.values, j, found)
                one.settle(lasting[j], {q: found[r] for q, r in self.carried.items() if r in found})
            now.kept.clear()

    def weights(self, layout: ChargeMap) -> Rows:
        """Squares of the weights as they are now, on the legs of another layout."""
        values: Rows = {}
        with torch.no_grad():
            for j, name in enumerate(layout.parameters):
                weight = accumulation_dtype(sharding.local(self.watched[name], False))
                self._write(values, j, layout.inner(name, _squares({"weight": weight})))
        return values

    def gradients(self, layout: ChargeMap) -> Rows:
        """Squares and product of weight, gradient and momentum on the legs of another layout.

        Its parameters are the first ones of this layout. Gradients that a fused optimiser has still to unscale
        (`grad_scale`) count unscaled.
        """
        scale = getattr(self.optimizer, "grad_scale", None)
        values: Rows = {}
        with torch.no_grad():
            for j, name in enumerate(layout.parameters):
                parameter = self.watched[name]
                tensors: dict[str, Tensor] = {"weight": parameter}
                if parameter.grad is not None:
                    tensors["gradient"] = _dense(parameter.grad)
                memory = self.optimizer.state.get(parameter, {}).get(self.rule.momentum_key)
                if memory is not None:
                    tensors["memory"] = memory
                whole = {k: accumulation_dtype(sharding.local(t, False)) for k, t in tensors.items()}
                if scale is not None and "gradient" in whole:
                    whole["gradient"] = whole["gradient"] / scale
                self._write(values, j, layout.inner(name, _squares(whole)))
        return values

    def roots(self, layout: ChargeMap, table: StepTable) -> Rows:
        """What the optimiser's average squares say of the gradient's noise, on the legs of another layout."""
        values: Rows = {}
        with torch.no_grad():
            for j, name in enumerate(layout.parameters):
                parameter = self.watched[name]
                state = self.optimizer.state.get(parameter, {})
                whole = {k: sharding.local(v, False) for k, v in state.items() if k in self.rule.state_keys}
                found = self.rule.gradient_roots(table.of(j), whole) if table.moves(j) else None
                if found is not None:
                    weight = accumulation_dtype(sharding.local(parameter, False))
                    self._write(values, j, layout.inner(name, _root_products(weight, found)))
        return values

    def matrix_charges(self, symmetries: Iterable[Watched]) -> list[Value]:
        """The Frobenius norm of each charge that is a matrix (general_linear); NaN for the others."""
        with torch.no_grad():
            return [self._matrix_charge(s) if isinstance(s, Symmetry) else math.nan for s in symmetries]

    def _matrix_charge(self, symmetry: Symmetry) -> Value:
        if symmetry.is_torus:
            return math.nan
        weights = {n: sharding.local(self.watched[n], False) for n in symmetry.parameters}
        return torch.linalg.vector_norm(symmetry.charge(weights))

    def gathered(self, values: Sequence[Mapping[str, list[Value]]]) -> dict[str, np.ndarray]:
        """All values of the given steps as float64 `[T, n_values]` by name: one transfer, summed over processes."""
        names = list(dict.fromkeys(("weight_square", "weight_square_after", *(q for row in values for q in row))))
        blank: list[Value] = [0.0] * len(self.watched)
        table = tabulate([[row.get(q, blank) for row in values] for q in names], list(self.layout.sizes.values()))
        if self.sharded:
            shares = [sharding.share(p, n in self.layout.totals_only) for n, p in self.watched.items()]
            device = next(iter(self.watched.values())).device
            total = torch.as_tensor(table * np.repeat(shares, list(self.layout.sizes.values())), device=device)
            with lost_ranks_named():
                torch.distributed.all_reduce(total, group=self.ranks)
            table = total.cpu().numpy()
        return dict(zip(names, table, strict=True))

    def _states(self) -> list[State]:
        """The optimiser's state of every watched parameter."""
        state = self.optimizer.state
        nothing: State = {}
        return [state.get(one.parameter, nothing) for one in self._each]

    def _lasting(self, states: Sequence[State]) -> list[Lasting]:
        """Weights and optimiser state of every watched parameter, as they are now."""
        keys = self.rule.state_keys
        return [one.lasting(keys, state) for one, state in zip(self._each, states, strict=True)]

    def _settings(self, states: Sequence[State], lasting: Sequence[Lasting]) -> StepTable:
        """The settings of all watched parameters, made once for those that share group, state and step count."""
        groups, rule = self.optimizer.param_groups, self.rule
        distinct, which = [self._idle], [0] * len(self._each)
        place: dict[tuple[int, bool, float], int] = {}
        steps = _steps_made(states) if rule.counts_steps else {}
        scale = getattr(self.optimizer, "grad_scale", None)
        for j, group in enumerate(self._grouping.of(groups)):
            if group is None or (self._each[j].parameter.grad is None and not rule.keeps_copy):
                continue
            key = (group, len(lasting[j].places) > 1, steps.get(j, 0.0))
            if key not in place:
                place[key] = len(distinct)
                c = rule.settings(groups[group], states[j], key[2])
                distinct.append(c if scale is None else rule.unscaled(c, float(scale)))
            which[j] = place[key]
        return StepTable(distinct, which)

    def settings_at_end(self, last: StepTable) -> StepTable:
        """The settings of a step after the run's last one, at the learning rates of the one recorded last.

        Gradients may be gone and the schedule at 0 by then: `last` tells which parameters move, and how fast.
        """
        states, groups = self._states(), self.optimizer.param_groups
        steps = _steps_made(states) if self.rule.counts_steps else {}
        distinct, which = [self._idle], [0] * len(self._each)
        for j, group in enumerate(self._grouping.of(groups)):
            if group is not None and last.moves(j):
                which[j] = len(distinct)
                known = {**groups[group], "lr": last.of(j).lr}
                distinct.append(self.rule.settings(known, states[j], steps.get(j, 0.0)))
        return StepTable(distinct, which)

    def _measure_before(self, now: Measurement, j: int, one: WatchedParameter, lasting: Lasting) -> None:
        """One parameter before the step: what is still known of it, and what else the rule asks for."""
        c, gradient, moves = now.settings.of(j), one.parameter.grad, now.settings.moves(j)
        known = one.known
        if one.touched(lasting):
            now.edited |= one.weight_touched(lasting)
            known = {}
        self._write(now.values, j, known)
        reads = moves and gradient is not None and self.rule.reads_gradient(c)
        passing: StepTensors = (
            {"gradient": sharding.laid_as(_dense(gradient), one.parameter)} if reads and gradient is not None else {}
        )
        if passing or len(known) < len(self.carried):
            pairs_of = partial(self._pairs_before, c) if moves else _charge_before
            self._write(now.values, j, self._inner(one, lasting, passing, pairs_of, known))
        if self.rule.keeps_copy and moves:
            now.kept[one.name] = sharding.local(one.parameter, one.totals_only).clone()

    def _inner(
        self,
        one: WatchedParameter,
        lasting: Lasting,
        passing: StepTensors,
        pairs_of: PairsOf,
        known: Container[str] = (),
    ) -> Mapping[str, Value]:
        """`<a, b>` on the legs of one parameter for the pairs that `pairs_of` makes of tensors, but those `known`."""
        parts = one.parts(lasting, passing) if one.totals_only else None
        if parts is not None:
            found: Mapping[str, Value] = totals(parts, pairs_of, known)
        else:
            local = {k: sharding.local(t, one.totals_only) for k, t in {**lasting.tensors, **passing}.items()}
            pairs = pairs_of({k: accumulation_dtype(t) for k, t in local.items()})
            found = self.layout.inner(one.name, {q: pair for q, pair in pairs.items() if q not in known})
        return found

    def _write(self, values: Rows, j: int, found: Mapping[str, Value]) -> None:
        for q, value in found.items():
            row = values.get(q)
            if row is None:
                values[q] = row = [0.0] * len(self._each)
            row[j] = value

    def _pairs_before(self, c: StepSettings, t: StepTensors) -> Pairs:
        pairs = self.rule.before(c, t)
        if not pairs.keys() <= self._products:
            self._refuse(pairs, "before")
        return {**_charge_before(t), **pairs}

    def _pairs_after(self, c: StepSettings, t: StepTensors) -> Pairs:
        pairs = self.rule.after(c, t)
        if not pairs.keys() <= self._products:
            self._refuse(pairs, "after")
        return {**_charge_after(t), **pairs}

    def _refuse(self, pairs: Pairs, method: str) -> None:
        """Raises DataError for names that the rule's record of products does not have."""
        rule, record = type(self.rule).__name__, self.rule.products
        raise DataError(
            f"{rule}.{method} asks for {sorted(pairs.keys() - self._products)}, and {record.__name__} has the "
            f"fields {sorted(self._products)}: the names must be the same"
        )


def one_number(loss: Any) -> float | Tensor:
    """A loss as a number; on a device as a tensor of its own: compiled steps write the next loss to the same place.

    Raises:
        DataError: it is not one number.
    """
    what = repr(loss)
    if isinstance(loss, Tensor):
        if loss.numel() == 1 and not loss.is_complex():
            return float(loss.detach()) if loss.is_cpu else loss.detach().clone()
        what = f"a tensor of shape {tuple(loss.shape)} and {loss.dtype}"
    else:
        try:
            return float(loss)
        except (TypeError, ValueError):
            pass
    raise DataError(f"the loss of a step is one real number, got {what}; note(loss.mean())")


def _steps_made(states: Sequence[State]) -> dict[int, float]:
    """Steps the optimiser has made by the place of the parameter; those on a device are read with one transfer."""
    made: dict[int, float] = {}
    elsewhere: dict[int, Tensor] = {}
    for j, state in enumerate(states):
        count = state.get("step")
        if isinstance(count, Tensor) and not count.is_cpu:
            elsewhere[j] = count
        elif count is not None:
            made[j] = float(count)
    if elsewhere:
        device = next(iter(elsewhere.values())).device
        counts = torch.stack([count.to(device) for count in elsewhere.values()]).tolist()
        made |= dict(zip(elsewhere, counts, strict=True))
    return made


def _charge_before(t: StepTensors) -> Pairs:
    return {"weight_square": (t["weight"], t["weight"])}


def _charge_after(t: StepTensors) -> Pairs:
    return {"weight_square_after": (t["weight"], t["weight"])}


def _root_products(weight: Tensor, at: GradientRoots) -> Pairs:
    """The fields of `LegRoots`."""
    root, mean, divisor = (accumulation_dtype(t) for t in (at.root, at.mean, at.divisor))
    held = torch.where(divisor > 0, mean / divisor, torch.zeros_like(mean))
    one = torch.ones_like(weight)
    return {
        "noise": (torch.where(divisor > 0, root / divisor, torch.zeros_like(root)), root),
        "scaled": (divisor * weight, weight),
        "held": (held, mean),
        "entries": (one, one),
    }


def _squares(t: StepTensors) -> Pairs:
    """What the estimates need, of those tensors that there are."""
    pairs: Pairs = {"weight_square": (t["weight"], t["weight"])}
    for name in ("gradient", "memory"):
        if name in t:
            pairs |= {f"weight_{name}": (t["weight"], t[name]), f"{name}_square": (t[name], t[name])}
    return pairs


def _dense(gradient: Tensor) -> Tensor:
    return gradient if gradient.layout is torch.strided else gradient.to_dense()
