"""What is read around one optimiser step: inner products on the legs of the watched parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from noetherflow.errors import DataError
from noetherflow.monitor import sharding
from noetherflow.monitor.charge_map import ChargeMap, Watched
from noetherflow.monitor.rule import AnyRule, Pairs, State, StepSettings, StepTensors
from noetherflow.symmetry.leg import accumulation_dtype
from noetherflow.symmetry.symmetry import Symmetry

SLICE = 1 << 18
PLAIN = (torch.float32, torch.float64)
Value = float | Tensor
Rows = dict[str, list[Value]]
"""Inner products by name, one value per watched parameter: a number, or a tensor of all its leg values."""
Stamps = Mapping[str, tuple[Tensor, int, int]]
PairsOf = Callable[[Any, StepTensors], Mapping[str, tuple[Tensor, Tensor]]]


@dataclass(frozen=True, eq=False)
class StepTable:
    """The settings of one step: the `distinct` ones, and for each watched parameter `which` of them it has."""

    distinct: list[StepSettings]
    which: list[int]

    def of(self, parameter: int) -> StepSettings:
        """The settings of one parameter, by its place among the watched ones."""
        return self.distinct[self.which[parameter]]


@dataclass
class Measurement:
    """One recorded step. `values`: inner products; `weight_square` and `weight_square_after` are its charges.

    A value stays a tensor on the weights' device until the books are closed; on a CPU totals are plain numbers.
    `settings`: what the optimiser did with each parameter. `blocks`, `matrix_charges`: values for the estimates, empty
    where none are due. `edited`: somebody wrote to a watched weight since the step before.
    """

    step: int
    lr: float
    settings: StepTable
    values: Rows = field(default_factory=dict)
    loss: Any = None
    blocks: Rows = field(default_factory=dict)
    matrix_charges: Sequence[Value] = ()
    kept: dict[str, Tensor] = field(default_factory=dict)
    moving: frozenset[int] = frozenset()
    edited: bool = False


class ParameterMemory:
    """One parameter between steps: what was measured of it and its state, and flat views of these tensors.

    `known[q]`, measured after the last step, holds before the next one while nothing is `touched`. A write through
    `tensor.data` cannot be seen; it shows up in the residual.
    """

    def __init__(self) -> None:
        self.known: dict[str, Value] = {}
        self._seen: Stamps = {}
        self._viewed: Stamps = {}
        self._parts: list[StepTensors] | None = None

    def touched(self, lasting: Stamps) -> list[str]:
        """Which of these are not the tensors of the last `settle`, or were written to since."""
        return [k for k, stamp in lasting.items() if not _same(stamp, self._seen.get(k), 3)]

    def settle(self, lasting: Stamps, known: dict[str, Value]) -> None:
        """Remember what was measured of these tensors as they are."""
        self._seen, self.known = lasting, known

    def parts(self, lasting: Stamps, passing: StepTensors) -> list[StepTensors] | None:
        """All tensors as flat views, in slices on a CPU; None where that or single precision cannot be had.

        Views of `lasting` are made again only when these are other tensors, or lie elsewhere.
        """
        if len(lasting) != len(self._viewed) or not all(_same(v, self._viewed.get(k), 2) for k, v in lasting.items()):
            self._viewed, self._parts = lasting, slices(_tensors(lasting))
        if self._parts is None or not passing:
            return self._parts
        more = slices(passing)
        return None if more is None else [{**a, **b} for a, b in zip(self._parts, more, strict=True)]


class StepMeter:
    """Reads weights, gradients and optimiser state before and after a step, each no more often than the rule asks.

    What is measured after one step is known before the next (`LedgerRule.carried`), as long as nobody writes between.
    """

    def __init__(
        self, layout: ChargeMap, rule: AnyRule, optimizer: torch.optim.Optimizer, watched: Mapping[str, nn.Parameter]
    ) -> None:
        self.layout, self.rule, self.optimizer, self.watched = layout, rule, optimizer, watched
        self._named = list(watched.items())
        self.sharded = any(sharding.is_sharded(p) for p in watched.values())
        self.carried = {"weight_square": "weight_square_after", **rule.carried}
        self._products = frozenset(f.name for f in fields(rule.products))
        self.forget()

    def forget(self) -> None:
        """Do not rely on what was measured after the last step."""
        self._memories = {name: ParameterMemory() for name in self.watched}

    def before(self, step: int) -> Measurement:
        """The part of a measurement that needs the weights, gradients and state before the step."""
        with torch.no_grad():
            group_of = self._groups()
            moving = frozenset(j for j, p in enumerate(self.watched.values()) if self._moves(p, group_of))
            lr = float(self.optimizer.param_groups[0].get("lr", float("nan")))
            now = Measurement(step, lr, self._settings(moving, group_of), moving=moving)
            for j in range(len(self.watched)):
                self._measure_before(now, j)
        return now

    def after(self, now: Measurement) -> None:
        """Complete a measurement once the step is made; what the step wrote last comes first, still in the cache."""
        with torch.no_grad():
            for j, (name, parameter) in reversed(list(enumerate(self.watched.items()))):
                lasting = self._lasting(parameter, self.optimizer.state.get(parameter, {}))
                passing = {"weight_before": now.kept[name]} if name in now.kept else {}
                pairs_of = self._charge_and_after if j in now.moving else _charge_after
                found = self._inner(name, lasting, passing, pairs_of, now.settings.of(j))
                self._write(now.values, j, found)
                known = {q: found[r] for q, r in self.carried.items() if r in found}
                self._memories[name].settle(lasting, known)
            now.kept.clear()

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
            torch.distributed.all_reduce(total)
            table = total.cpu().numpy()
        return dict(zip(names, table, strict=True))

    def _groups(self) -> dict[Tensor, int]:
        """The number of the parameter group of each parameter that the optimiser holds."""
        return {p: i for i, group in enumerate(self.optimizer.param_groups) for p in group["params"]}

    def _moves(self, parameter: nn.Parameter, group_of: Mapping[Tensor, int]) -> bool:
        return parameter in group_of and (parameter.grad is not None or self.rule.keeps_copy)

    def _settings(self, moving: frozenset[int], group_of: Mapping[Tensor, int]) -> StepTable:
        """The settings of all watched parameters, made once for those that share group, state and step count."""
        distinct = [self.rule.step_settings.idle()]
        which = [0] * len(self.watched)
        place: dict[tuple[int, bool, float], int] = {}
        steps = self._steps_made() if self.rule.counts_steps else {}
        scale = getattr(self.optimizer, "grad_scale", None)
        for j, (name, parameter) in enumerate(self.watched.items()):
            if j not in moving:
                continue
            state = self.optimizer.state.get(parameter, {})
            started = any(state.get(k) is not None for k in self.rule.state_keys)
            key = (group_of[parameter], started, steps.get(name, 0.0))
            if key not in place:
                place[key] = len(distinct)
                c = self.rule.settings(self.optimizer.param_groups[key[0]], state, key[2])
                distinct.append(c if scale is None else self.rule.unscaled(c, float(scale)))
            which[j] = place[key]
        return StepTable(distinct, which)

    def _measure_before(self, now: Measurement, j: int) -> None:
        """One parameter before the step: what is still known of it, and what else the rule asks for."""
        name, parameter = self._named[j]
        rule, c, gradient, moves = self.rule, now.settings.of(j), parameter.grad, j in now.moving
        reads = moves and gradient is not None and rule.reads_gradient(c)
        passing: StepTensors = {"gradient": _dense(gradient)} if reads and gradient is not None else {}
        lasting = self._lasting(parameter, self.optimizer.state.get(parameter, {}))
        memory = self._memories[name]
        touched = memory.touched(lasting)
        now.edited |= bool(memory.known) and "weight" in touched
        known = {} if touched else memory.known
        self._write(now.values, j, known)
        if passing or len(known) < len(self.carried):
            pairs_of = self._charge_and_before if moves else _charge_before
            missing = [q for q in pairs_of(c, {**_tensors(lasting), **passing}) if q not in known]
            self._write(now.values, j, self._inner(name, lasting, passing, pairs_of, c, missing) if missing else {})
        if rule.keeps_copy and moves:
            now.kept[name] = sharding.local(parameter, name in self.layout.totals_only).clone()

    def _lasting(self, parameter: Tensor, state: State) -> Stamps:
        """Weights and optimiser state of one parameter, as they are now."""
        found = {"weight": _stamp(parameter)}
        for key in self.rule.state_keys:
            if (value := state.get(key)) is not None:
                found[key] = _stamp(value)
        return found

    def _inner(
        self,
        name: str,
        lasting: Stamps,
        passing: StepTensors,
        pairs_of: PairsOf,
        c: StepSettings,
        only: Sequence[str] | None = None,
    ) -> Mapping[str, Value]:
        """`<a, b>` on the legs of one parameter for the pairs (`only` those) that `pairs_of(c, .)` makes of tensors."""

        def chosen(t: StepTensors) -> Mapping[str, tuple[Tensor, Tensor]]:
            pairs = pairs_of(c, t)
            return pairs if only is None else {q: pairs[q] for q in only}

        only_totals = name in self.layout.totals_only
        parts = self._memories[name].parts(lasting, passing) if only_totals else None
        if parts is None:
            tensors = {k: sharding.local(t, only_totals) for k, t in {**_tensors(lasting), **passing}.items()}
            return self.layout.inner(name, chosen({k: accumulation_dtype(t) for k, t in tensors.items()}))
        return totals(parts, chosen)

    def _write(self, values: Rows, j: int, found: Mapping[str, Value]) -> None:
        for q, value in found.items():
            row = values.get(q)
            if row is None:
                values[q] = row = [0.0] * len(self.watched)
            row[j] = value

    def _charge_and_before(self, c: StepSettings, t: StepTensors) -> Pairs:
        return {**_charge_before(c, t), **self._known(self.rule.before(c, t), "before")}

    def _charge_and_after(self, c: StepSettings, t: StepTensors) -> Pairs:
        return {**_charge_after(c, t), **self._known(self.rule.after(c, t), "after")}

    def _known(self, pairs: Pairs, method: str) -> Pairs:
        """The pairs that a rule asks for. Raises DataError for a name that its record of products does not have."""
        if not pairs.keys() <= self._products:
            rule, record = type(self.rule).__name__, self.rule.products
            raise DataError(
                f"{rule}.{method} asks for {sorted(pairs.keys() - self._products)}, and {record.__name__} has the "
                f"fields {sorted(self._products)}: the names must be the same"
            )
        return pairs

    def _steps_made(self) -> dict[str, float]:
        """Steps the optimiser has made per parameter, read with one transfer."""
        states = {n: self.optimizer.state.get(p, {}).get("step") for n, p in self.watched.items()}
        found = {n: torch.as_tensor(s) for n, s in states.items() if s is not None}
        device = next((s.device for s in found.values() if s.device.type != "cpu"), None)
        if device is None:
            return {n: s.item() for n, s in found.items()}
        return dict(zip(found, torch.stack([s.to(device) for s in found.values()]).tolist(), strict=True))


def one_number(loss: Any) -> float | Tensor:
    """A loss as a number, or as a tensor that holds one and stays on its device.

    Raises:
        DataError: it is not one number.
    """
    what = repr(loss)
    if isinstance(loss, Tensor):
        if loss.numel() == 1 and not loss.is_complex():
            return loss.detach()
        what = f"a tensor of shape {tuple(loss.shape)} and {loss.dtype}"
    else:
        try:
            return float(loss)
        except (TypeError, ValueError):
            pass
    raise DataError(f"the loss of a step is one real number, got {what}; note(loss.mean())")


def totals(
    parts: Sequence[StepTensors], pairs_of: Callable[[StepTensors], Mapping[str, tuple[Tensor, Tensor]]]
) -> dict[str, Value]:
    """`<a, b>` for all pairs, summed over slices; on a CPU plain numbers, the slices added in double precision.

    Slices keep what `pairs_of` forms, and what several products read, in the cache and small.
    """
    sums: dict[str, Value] = {}
    for part in parts:
        for q, (a, b) in pairs_of(part).items():
            product = torch.dot(a, b)
            value: Value = product.item() if product.device.type == "cpu" else product
            sums[q] = sums[q] + value if q in sums else value
    return sums


def slices(tensors: StepTensors) -> list[StepTensors] | None:
    """Flat views of local tensors of one shape, in slices on a CPU; None if one is not contiguous or half precision."""
    tensors = {k: sharding.local(t, True) for k, t in tensors.items()}
    if any(t.dtype not in PLAIN or not t.is_contiguous() for t in tensors.values()):
        return None
    pieces = [t.view(-1).split(SLICE) if t.device.type == "cpu" else [t.view(-1)] for t in tensors.values()]
    return [dict(zip(tensors, piece, strict=True)) for piece in zip(*pieces, strict=True)]


def tabulate(rows: Sequence[Sequence[Sequence[Value]]], sizes: Sequence[int]) -> np.ndarray:
    """`rows[q][t][j]`, `sizes[j]` numbers each (a plain number stands for all of them), as float64 `[q, t, n]`."""
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
    tensors: list[Tensor] = []
    places: list[tuple[int, int, int]] = []
    for q, steps in enumerate(rows):
        for t, row in enumerate(steps):
            for j, value in enumerate(row):
                if isinstance(value, Tensor):
                    tensors.append(value.reshape(-1))
                    places.append((q, t, j))
    if not tensors and all(s == 1 for s in sizes):
        return np.array(rows, dtype=np.float64).reshape(len(rows), len(rows[0]), len(sizes))
    table = np.zeros((len(rows), len(rows[0]), starts[-1]))
    for q, steps in enumerate(rows):
        for t, row in enumerate(steps):
            table[q, t] = np.repeat([v if isinstance(v, float) else 0.0 for v in row], sizes)
    host = torch.cat(tensors).double().cpu().numpy() if tensors else np.zeros(0)
    end = 0
    for q, t, j in places:
        table[q, t, starts[j] : starts[j + 1]] = host[end : end + sizes[j]]
        end += sizes[j]
    return table


def _charge_before(c: StepSettings, t: StepTensors) -> Pairs:
    return {"weight_square": (t["weight"], t["weight"])}


def _charge_after(c: StepSettings, t: StepTensors) -> Pairs:
    return {"weight_square_after": (t["weight"], t["weight"])}


def _squares(t: StepTensors) -> Pairs:
    """What the estimates need, of those tensors that there are."""
    pairs: Pairs = {"weight_square": (t["weight"], t["weight"])}
    for name in ("gradient", "memory"):
        if name in t:
            pairs |= {f"weight_{name}": (t["weight"], t[name]), f"{name}_square": (t[name], t[name])}
    return pairs


def _stamp(tensor: Tensor) -> tuple[Tensor, int, int]:
    """A tensor, where its data lie and how often they were written."""
    plain = sharding.local(tensor, True)
    return tensor, plain.data_ptr(), plain._version


def _same(a: tuple[Tensor, int, int], b: tuple[Tensor, int, int] | None, fields: int) -> bool:
    return b is not None and a[0] is b[0] and a[1:fields] == b[1:fields]


def _tensors(lasting: Stamps) -> StepTensors:
    return {k: stamp[0] for k, stamp in lasting.items()}


def _dense(gradient: Tensor) -> Tensor:
    return gradient if gradient.layout is torch.strided else gradient.to_dense()
