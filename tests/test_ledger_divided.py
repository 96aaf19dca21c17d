"""Books of RMSprop and NAdam, and of groups with rates of their own, against snapshots of weights and state."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from noetherflow.monitor.ledger import Ledger
from noetherflow.monitor.rule import ENTRIES, PRECONDITIONED
from test_ledger import backward, batches, mlp, mlp_symmetries
from test_ledger_preconditioned import Tensors, gradients, signed

Snapshot = dict[str, dict[str, Any]]
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "rmsprop": (torch.optim.RMSprop, {"lr": 1e-2}),
    "rmsprop-momentum": (torch.optim.RMSprop, {"lr": 3e-3, "momentum": 0.8, "weight_decay": 0.2, "alpha": 0.95}),
    "rmsprop-centered": (torch.optim.RMSprop, {"lr": 3e-3, "centered": True, "eps": 1e-3}),
    "rmsprop-all": (
        torch.optim.RMSprop,
        {"lr": 1e-3, "centered": True, "momentum": 0.5, "weight_decay": 0.1, "maximize": True, "foreach": True},
    ),
    "nadam": (torch.optim.NAdam, {"lr": 1e-2}),
    "nadam-l2": (torch.optim.NAdam, {"lr": 1e-2, "weight_decay": 0.2, "momentum_decay": 0.1}),
    "nadamw": (
        torch.optim.NAdam,
        {"lr": 1e-2, "weight_decay": 0.3, "decoupled_weight_decay": True, "betas": (0.7, 0.9), "eps": 1e-3},
    ),
}
GROUPED: dict[str, tuple[Any, dict[str, Any]]] = {
    "adam": (torch.optim.Adam, {"lr": 1e-2}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.3, "eps": 1e-3, "betas": (0.8, 0.95)}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 3e-3, "momentum": 0.8, "weight_decay": 0.2}),
    "nadam": (torch.optim.NAdam, {"lr": 1e-2}),
}


def taken(model: nn.Module, optimizer: torch.optim.Optimizer) -> Snapshot:
    """Weights and state as they are, by parameter."""
    out = {}
    for n, p in model.named_parameters():
        state = optimizer.state.get(p, {})
        out[n] = {"theta": p.detach().clone()} | {
            k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()
        }
    return out


def divisors(shot: Snapshot, options: dict[str, Any]) -> Tensors | None:
    """What the optimiser divided by in its last step, from its state alone; None before the first."""
    out = {}
    for n, s in shot.items():
        if "step" not in s:
            return None
        if "square_avg" in s:
            square = s["square_avg"] - (s["grad_avg"] ** 2 if options["centered"] else 0)
        else:
            square = s["exp_avg_sq"] / (1 - options["betas"][1] ** float(s["step"]))
        out[n] = square.sqrt() + options["eps"]
    return out


def expected(
    was: Snapshot, now: Snapshot, g: Tensors, options: dict[str, Any], lr: Callable[[str], float]
) -> dict[str, Tensors]:
    """The parts of the preconditioned charge's change, entry by entry, from what was before and after the step.

    The noise is the square of the realised step; the momentum is what is left of the first-order change, whose part by
    this step's gradient is known from the weight that the step gives it.
    """
    d = divisors(now, options)
    assert d is not None
    old = divisors(was, options) or d
    parts: dict[str, Tensors] = {name: {} for name in ("before", "after", *PRECONDITIONED)}
    w = options["weight_decay"]
    decoupled = bool(options.get("decoupled_weight_decay"))
    for n in d:
        rate, ratio = lr(n), max(lr(m) for m in d) / lr(n)
        theta, new = was[n]["theta"], now[n]["theta"]
        shrunk = theta * (1 - rate * w * decoupled)
        step = shrunk - new
        lead = leads(now[n], options)
        grad = -g[n] if options.get("maximize") else g[n]
        coupled = 0.0 if decoupled else w
        first = -2 * d[n] * theta * step
        parts["before"][n], parts["after"][n] = ratio * old[n] * theta**2, ratio * d[n] * new**2
        parts["transport"][n] = ratio * (d[n] - old[n]) * theta**2
        parts["noise"][n] = ratio * d[n] * step**2
        parts["gradient"][n] = -2 * ratio * rate * lead * theta * grad
        held = -2 * rate * lead * coupled * theta**2
        parts["momentum"][n] = ratio * (first - held) - parts["gradient"][n]
        parts["decay"][n] = ratio * (held + d[n] * (shrunk**2 - theta**2) + 2 * d[n] * (theta - shrunk) * step)
    return parts


def leads(state: dict[str, Any], options: dict[str, Any]) -> float:
    """The weight of this step's gradient in the divided direction, by the optimisers' definitions."""
    if "square_avg" in state:
        return 1.0
    k, b1 = float(state["step"]), options["betas"][0]
    if "mu_product" not in state:
        return (1 - b1) / (1 - b1**k)
    now, later = (b1 * (1 - 0.5 * 0.96 ** (j * options["momentum_decay"])) for j in (k, k + 1))
    product = float(state["mu_product"])
    return (1 - now) / (1 - product) + later / (1 - product * later) * (1 - b1)


def compare(model: nn.Module, optimizer: torch.optim.Optimizer, every: int, lr: Callable[[str], float]) -> None:
    """Thirty steps; every row of both books against the snapshots around its step."""
    syms, found, plain = mlp_symmetries(model), [], []
    options = optimizer.param_groups[0]
    with Ledger(model, optimizer, syms, detail="symmetry", every=every) as ledger:
        for batch in batches(30):
            optimizer.zero_grad()
            backward(model, batch)
            was, g = taken(model, optimizer), gradients(model)
            optimizer.step()
            now = taken(model, optimizer)
            found.append(expected(was, now, g, options, lr))
            plain.append({n: now[n]["theta"] ** 2 - was[n]["theta"] ** 2 for n in was})
    rows = {(r["step"], r["symmetry"]): r for r in ledger.preconditioned(by="symmetry")}
    assert sorted({step for step, _ in rows}) == list(range(0, 30, every))
    for r in ledger.records(by="symmetry"):
        change = signed(syms[r["symmetry"]], plain[r["step"]])
        assert sum(r[e] for e in ENTRIES) == pytest.approx(change, abs=1e-12 * r["norm"])
    for (step, name), row in rows.items():
        s, parts, near = syms[name], found[step], 1e-10 * row["norm"]
        change = signed(s, parts["after"]) - signed(s, parts["before"])
        assert row["charge"] == pytest.approx(signed(s, parts["before"]), abs=near)
        assert row["change"] == pytest.approx(change, abs=near)
        assert sum(row[e] for e in PRECONDITIONED) == pytest.approx(change, abs=near)
        for entry in PRECONDITIONED:
            assert row[entry] == pytest.approx(signed(s, parts[entry]), abs=near), (entry, step)
        assert abs(row["gradient"]) < near
        assert row["noise"] != 0
    assert all((row["transport"] != 0) == (step > 0) for (step, _), row in rows.items())


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_books_are_those_of_snapshots(name: str, every: int) -> None:
    kind, options = CASES[name]
    model = mlp()
    compare(model, kind(model.parameters(), **options), every, lambda _: options["lr"])


@pytest.mark.parametrize("name", GROUPED)
def test_groups_with_rates_of_their_own_leave_the_charge_over_their_rates_alone(name: str) -> None:
    kind, options = GROUPED[name]
    model = mlp()
    names = dict(model.named_parameters())
    first = [n for n in names if n.startswith("0.")]
    groups = [
        {"params": [names[n] for n in first], "lr": 3 * options["lr"]},
        {"params": [p for n, p in names.items() if n not in first]},
    ]
    optimizer = kind(groups, **options)
    if name == "adamw":
        optimizer.param_groups[0]["decoupled_weight_decay"] = True
    compare(model, optimizer, 1, lambda n: options["lr"] * (3 if n in first else 1))


def test_without_the_rates_the_charge_of_such_groups_breaks_at_first_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("noetherflow.monitor.books._rate_ratios", lambda lr: 0 * lr + 1)
    with pytest.raises(AssertionError):
        test_groups_with_rates_of_their_own_leave_the_charge_over_their_rates_alone("adam")


def test_a_group_that_stands_still_counts_nothing_and_breaks_the_charge() -> None:
    model = mlp()
    first, *rest = model.parameters()
    optimizer = torch.optim.Adam([{"params": [first], "lr": 0.0}, {"params": rest}], lr=1e-2)
    with Ledger(model, optimizer, mlp_symmetries(model), every=1) as ledger:
        for batch in batches(3):
            optimizer.zero_grad()
            backward(model, batch)
            optimizer.step()
    rows = [r for r in ledger.preconditioned() if r["family"] == "rescaling"]
    for r in rows:
        assert all(math.isfinite(r[e]) for e in PRECONDITIONED)
        assert sum(r[e] for e in PRECONDITIONED) == pytest.approx(r["change"], abs=1e-11 * r["norm"])
        assert abs(r["gradient"]) > 1e-6 * r["norm"]


class Lion(torch.optim.Optimizer):
    """Lion as published."""

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99), "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_((b1 * m + (1 - b1) * p.grad).sign(), alpha=group["lr"])
                m.mul_(b2).add_(p.grad, alpha=1 - b2)


@pytest.mark.parametrize(
    ("kind", "why"),
    [(Lion, "steps by signs"), (torch.optim.SGD, "divides by nothing"), (torch.optim.Adagrad, "no charge is known")],
)
def test_what_is_not_booked_says_why(kind: Any, why: str, tmp_path: Any) -> None:
    model = mlp()
    optimizer = kind(model.parameters(), lr=1e-3)
    with Ledger(model, optimizer, mlp_symmetries(model), every=1, run_dir=tmp_path) as ledger:
        for batch in batches(3):
            optimizer.zero_grad()
            backward(model, batch)
            optimizer.step()
    assert ledger.preconditioned() == []
    assert why in ledger.run_data().header["not_booked"]
    for r in ledger.records():
        assert sum(r[e] for e in ENTRIES if not math.isnan(r[e])) == pytest.approx(r["change"], abs=1e-12 * r["norm"])


def test_what_is_booked_gives_no_reason(tmp_path: Any) -> None:
    model = mlp()
    optimizer = torch.optim.NAdam(model.parameters(), lr=1e-3)
    with Ledger(model, optimizer, mlp_symmetries(model), every=1, run_dir=tmp_path) as ledger:
        backward(model, batches(1)[0])
        optimizer.step()
    assert ledger.run_data().header["not_booked"] == ""


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_estimates_of_rmsprop_are_those_of_its_state(momentum: float) -> None:
    """Distance and persistence of the sum of root mean squares, by the state before the last step."""
    model = mlp()
    syms = mlp_symmetries(model).filter(family="rescaling")
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3, momentum=momentum, alpha=0.97, eps=1e-30)
    with Ledger(model, optimizer, syms, estimate_every=1, every=1) as ledger:
        for batch in batches(20):
            optimizer.zero_grad()
            backward(model, batch)
            was = taken(model, optimizer)
            optimizer.step()
    last = [r for r in ledger.estimates() if r["step"] == 19]
    for s, row in zip(syms, last, strict=True):
        plus, minus, held = torch.tensor(0.0), torch.tensor(0.0), 0.0
        for leg in s.weight_legs:
            root = was[leg.parameter]["square_avg"].sqrt()
            if leg.sign > 0:
                plus = plus + leg.row_sums(root)
            else:
                minus = minus + leg.row_sums(root)
            if momentum:
                mean = (1 - momentum) * was[leg.parameter]["momentum_buffer"]
                held += float(leg.row_sums(mean**2 * root).sum())
        far = (plus / minus).log().abs() / 2
        far = (plus / minus).log().abs() / 2
        far = far[far.isfinite()]  # units that never fired have no gradient
        assert len(far) > 2
        assert row["distance_max"] == pytest.approx(float(far.max()), rel=1e-6)
        if momentum:
            white = float((plus + minus).sum())
            assert row["persistence"] == pytest.approx((1 + momentum) / (1 - momentum) * held / white, rel=1e-6)
        else:
            assert math.isnan(row["persistence"])
