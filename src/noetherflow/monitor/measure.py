"""What is read around one optimiser step: inner products on the legs of the watched parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from noetherflow.legs import accumulation_dtype
from noetherflow.monitor import sharding
from noetherflow.monitor.decompose import Rule
from noetherflow.monitor.layout import Layout

SLICE = 1 << 18
PLAIN = (torch.float32, torch.float64)
Value = float | Tensor
PairsOf = Callable[[Mapping[str, float], Mapping[str, Tensor]], Mapping[str, tuple[Tensor, Tensor]]]


@dataclass
class Measurement:
    """One recorded step. `values[name][j]`: the inner products of parameter j (`tt`, `tt_after`: its charges).

    A value stays a tensor on the weights' device until the books are closed; on a CPU totals are plain numbers.
    `settings`: the rule's coefficients per parameter. `blocks`: values for the estimates, empty where none are due.
    """

    step: int
    lr: float
    values: dict[str, list[Value]]
    settings: list[dict[str, float]]
    loss: Any = None
    blocks: dict[str, list[Value]] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    moving: set[int] = field(default_factory=set)
    edited: bool = False


class Probe:
    """Reads weights, gradients and optimiser state before and after a step, each no more often than the rule asks.

    The charges after one step are the charges before the next as long as nobody writes to the weights in between.
    """

    def __init__(
        self, layout: Layout, rule: Rule, optimizer: torch.optim.Optimizer, watched: Mapping[str, nn.Parameter]
    ) -> None:
        self.layout, self.rule, self.optimizer, self.watched = layout, rule, optimizer, watched
        self.sharded = any(sharding.is_sharded(p) for p in watched.values())
        self._charges: list[Value] | None = None
        self._seen: list[int] = []

    def forget(self) -> None:
        """Do not rely on the charges of the last step."""
        self._charges = None

    def before(self, step: int) -> Measurement:
        """The part of a measurement that needs the weights, gradients and state before the step."""
        rule, optimizer = self.rule, self.optimizer
        group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        settings = _Settings(rule, getattr(optimizer, "grad_scale", None))
        steps = self._steps_made() if rule.counts_steps else {}
        chained = self._charges is not None and self._versions() == self._seen
        values: dict[str, list[Value]] = {}
        now = Measurement(step, float(optimizer.param_groups[0].get("lr", float("nan"))), values, [])
        if self._charges is not None and chained:
            values["tt"] = self._charges
        elif self._charges is not None:
            now.edited = True
        with torch.no_grad():
            for j, (name, parameter) in enumerate(self.watched.items()):
                if not chained:
                    self._enter(values, j, name, {"theta": parameter}, _charge_before, settings.idle)
                group, gradient = group_of.get(id(parameter)), parameter.grad
                if group is None or gradient is None:
                    now.settings.append(settings.idle)
                    continue
                state = optimizer.state.get(parameter, {})
                c = settings.of(group, state, steps.get(name, 0.0))
                now.settings.append(c)
                now.moving.add(j)
                if rule.keeps_copy:
                    now.kept[name] = sharding.local(parameter, name in self.layout.totals_only).clone()
                else:
                    tensors = {"theta": parameter, "grad": _dense(gradient)} | _present(state, rule.reads_before(c))
                    self._enter(values, j, name, tensors, rule.before, c)
        return now

    def after(self, now: Measurement) -> None:
        """Complete a measurement once the step is made."""
        with torch.no_grad():
            for j, ((name, parameter), c) in enumerate(zip(self.watched.items(), now.settings, strict=True)):
                tensors: dict[str, Tensor] = {"theta": parameter}
                if j not in now.moving:
                    self._enter(now.values, j, name, tensors, _charge_after, c)
                    continue
                if name in now.kept:
                    tensors["kept"] = now.kept.pop(name)
                tensors |= _present(self.optimizer.state.get(parameter, {}), self.rule.reads_after(c))
                self._enter(now.values, j, name, tensors, self._charge_and_rule, c)
        self._charges, self._seen = now.values.get("tt_after", []), self._versions()

    def gradients(self, layout: Layout) -> dict[str, list[Value]]:
        """`tt`, `tg`, `gg` on the legs of another layout, whose parameters are the first of this one's."""
        values: dict[str, list[Value]] = {}
        with torch.no_grad():
            for j, name in enumerate(layout.parameters):
                parameter = self.watched[name]
                tensors = {"t": sharding.local(parameter, False)}
                if parameter.grad is not None:
                    tensors["g"] = sharding.local(_dense(parameter.grad), False)
                self._write(values, j, inner_products(layout, name, tensors, _squares, {}))
        return values

    def gathered(self, values: Sequence[Mapping[str, list[Value]]]) -> dict[str, np.ndarray]:
        """All values of the given steps as float64 `[T, n_values]` by name: one transfer, summed over processes."""
        names = list(dict.fromkeys(("tt", "tt_after", *(q for row in values for q in row))))
        blank: list[Value] = [0.0] * len(self.watched)
        table = tabulate([[row.get(q, blank) for row in values] for q in names], list(self.layout.sizes.values()))
        if self.sharded:
            shares = [sharding.share(p, n in self.layout.totals_only) for n, p in self.watched.items()]
            device = next(iter(self.watched.values())).device
            total = torch.as_tensor(table * np.repeat(shares, list(self.layout.sizes.values())), device=device)
            torch.distributed.all_reduce(total)
            table = total.cpu().numpy()
        return dict(zip(names, table, strict=True))

    def _enter(
        self,
        values: dict[str, list[Value]],
        j: int,
        name: str,
        tensors: Mapping[str, Tensor],
        pairs_of: PairsOf,
        c: Mapping[str, float],
    ) -> None:
        if self.sharded:
            tensors = {k: sharding.local(t, name in self.layout.totals_only) for k, t in tensors.items()}
        self._write(values, j, inner_products(self.layout, name, tensors, pairs_of, c))

    def _write(self, values: dict[str, list[Value]], j: int, found: Mapping[str, Value]) -> None:
        for q, value in found.items():
            row = values.get(q)
            if row is None:
                values[q] = row = [0.0] * len(self.watched)
            row[j] = value

    def _charge_and_rule(self, c: Mapping[str, float], t: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        return {"tt_after": (t["theta"], t["theta"]), **self.rule.after(c, t)}

    def _versions(self) -> list[int]:
        if self.sharded:
            return [sharding.local(p, True)._version for p in self.watched.values()]
        return [p._version for p in self.watched.values()]

    def _steps_made(self) -> dict[str, float]:
        """Steps the optimiser has made per parameter, read with one transfer."""
        states = {n: self.optimizer.state.get(p, {}).get("step") for n, p in self.watched.items()}
        found = {n: torch.as_tensor(s) for n, s in states.items() if s is not None}
        device = next((s.device for s in found.values() if s.device.type != "cpu"), None)
        if device is None:
            return {n: s.item() for n, s in found.items()}
        return dict(zip(found, torch.stack([s.to(device) for s in found.values()]).tolist(), strict=True))


def inner_products(
    layout: Layout, name: str, tensors: Mapping[str, Tensor], pairs_of: PairsOf, c: Mapping[str, float]
) -> Mapping[str, Value]:
    """`<a, b>` on the legs of one parameter, for every pair that `pairs_of(c, .)` makes of tensors of its shape.

    A parameter that needs only totals is read in slices, so that what `pairs_of` forms stays in the cache and is never
    as large as the parameter; on a CPU the sums of slices are added in double precision.
    """
    flat = _flat(tensors) if name in layout.totals_only else None
    if flat is None:
        return layout.inner(name, pairs_of(c, {k: accumulation_dtype(t) for k, t in tensors.items()}))
    theta = next(iter(flat.values()))
    if theta.device.type != "cpu":
        return {q: torch.dot(a, b) for q, (a, b) in pairs_of(c, flat).items()}
    if theta.numel() <= SLICE:
        return {q: torch.dot(a, b).item() for q, (a, b) in pairs_of(c, flat).items()}
    sums: dict[str, float] = {}
    for start in range(0, theta.numel(), SLICE):
        for q, (a, b) in pairs_of(c, {k: t[start : start + SLICE] for k, t in flat.items()}).items():
            sums[q] = sums.get(q, 0.0) + torch.dot(a, b).item()
    return sums


def _flat(tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """All tensors as vectors without a copy, None where that or single precision cannot be had."""
    flat = {}
    for k, t in tensors.items():
        if t.dtype not in PLAIN or not t.is_contiguous():
            return None
        flat[k] = t.view(-1)
    return flat


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


class _Settings:
    """The coefficients of one step, made once for all parameters that share them."""

    def __init__(self, rule: Rule, scale: Any) -> None:
        self.rule, self.scale = rule, scale
        self.idle = dict.fromkeys(rule.coefficients, 0.0)
        self._made: dict[tuple[Any, ...], dict[str, float]] = {}

    def of(self, group: dict[str, Any], state: Mapping[str, Any], steps: float) -> dict[str, float]:
        started = any(state.get(k) is not None for k in self.rule.state_keys)
        key = (id(group), started, steps)
        if key not in self._made:
            c = self.rule.settings(group, state, steps)
            if self.scale is not None and "sign" in c:
                c["sign"] /= float(self.scale)
            self._made[key] = c
        return self._made[key]


def _charge_before(c: Mapping[str, float], t: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    return {"tt": (t["theta"], t["theta"])}


def _charge_after(c: Mapping[str, float], t: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    return {"tt_after": (t["theta"], t["theta"])}


def _squares(c: Mapping[str, float], t: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    return {q: (t[q[0]], t[q[1]]) for q in ("tt", "tg", "gg") if q[1] in t}


def _present(state: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Tensor]:
    return {k: state[k] for k in keys if state.get(k) is not None}


def _dense(gradient: Tensor) -> Tensor:
    return gradient if gradient.layout is torch.strided else gradient.to_dense()
