"""Books of the charge that Adam leaves alone at first order, against a dense float64 replay (theory.md section 13)."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from torch import nn

import noetherflow as nf
from noetherflow.monitor.ledger import Ledger
from noetherflow.monitor.rule import PRECONDITIONED
from test_ledger import backward, batches, mlp, mlp_symmetries

Tensors = dict[str, torch.Tensor]
SETTINGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adam": (torch.optim.Adam, {"lr": 1e-2}),
    "adam-l2": (torch.optim.Adam, {"lr": 1e-2, "weight_decay": 1e-1}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.3, "eps": 1e-3, "betas": (0.8, 0.95)}),
    "amsgrad": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": True}),
    "memoryless": (torch.optim.Adam, {"lr": 1e-2, "betas": (0.0, 0.9)}),
}


class Replay:
    """Adam step by step by its definition, and the charge `sum a d theta^2` entry by entry."""

    def __init__(self, options: dict[str, Any], decoupled: bool) -> None:
        self.lr, self.w, self.decoupled = options["lr"], options.get("weight_decay", 0.0), decoupled
        self.b1, self.b2 = options.get("betas", (0.9, 0.999))
        self.eps, self.amsgrad, self.k = options.get("eps", 1e-8), options.get("amsgrad", False), 0
        self.m: Tensors = {}
        self.v: Tensors = {}
        self.top: Tensors = {}
        self.d: Tensors = {}

    def step(self, theta: Tensors, g: Tensors) -> dict[str, Tensors]:
        """The parts of the charge's change, entry by entry and not yet signed; `theta` is moved."""
        self.k += 1
        parts: dict[str, Tensors] = {name: {} for name in ("before", "after", *PRECONDITIONED)}
        for n, old in list(theta.items()):
            m = self.m.get(n, torch.zeros_like(old))
            fed = g[n] + (0 if self.decoupled else self.w) * old
            self.m[n] = self.b1 * m + (1 - self.b1) * fed
            self.v[n] = self.b2 * self.v.get(n, torch.zeros_like(old)) + (1 - self.b2) * fed**2
            self.top[n] = torch.maximum(self.top.get(n, self.v[n]), self.v[n]) if self.amsgrad else self.v[n]
            d = (self.top[n] / (1 - self.b2**self.k)).sqrt() + self.eps
            was = self.d.get(n, d)
            scale = self.lr / (1 - self.b1**self.k)
            shrunk = (1 - self.lr * self.w * self.decoupled) * old
            new = shrunk - scale * self.m[n] / d
            parts["before"][n], parts["after"][n] = was * old**2, d * new**2
            parts["transport"][n] = (d - was) * old**2
            parts["noise"][n] = scale**2 * self.m[n] ** 2 / d
            parts["momentum"][n] = -2 * scale * self.b1 * old * m
            parts["gradient"][n] = -2 * scale * (1 - self.b1) * old * g[n]
            coupled = -2 * scale * (1 - self.b1) * (fed - g[n]) * old
            parts["decay"][n] = d * (shrunk**2 - old**2) + 2 * scale * (old - shrunk) * self.m[n] + coupled
            theta[n], self.d[n] = new, d
        return parts


def signed(s: nf.Symmetry, entries: Tensors) -> float:
    """The total of a torus symmetry's charge, of given squares per entry."""
    return sum(float(leg.exponent * leg.row_sums(entries[leg.parameter]).sum()) for leg in s.weight_legs)


def gradients(model: nn.Module) -> Tensors:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("name", SETTINGS)
def test_books_are_those_of_a_replay_by_definition(name: str, every: int) -> None:
    kind, options = SETTINGS[name]
    model = mlp()
    optimizer = kind(model.parameters(), **options)
    syms = mlp_symmetries(model)
    replay = Replay(options, kind is torch.optim.AdamW)
    theta = {n: p.detach().clone() for n, p in model.named_parameters()}
    expected = []
    with Ledger(model, optimizer, syms, detail="symmetry", every=every) as ledger:
        for batch in batches(30):
            optimizer.zero_grad()
            backward(model, batch)
            expected.append(replay.step(theta, gradients(model)))
            optimizer.step()
    rows = {(r["step"], r["symmetry"]): r for r in ledger.preconditioned(by="symmetry")}
    assert sorted({step for step, _ in rows}) == list(range(0, 30, every))
    for s in syms:
        for step in range(0, 30, every):
            row, parts = rows[step, s.name], expected[step]
            assert row["charge"] == pytest.approx(signed(s, parts["before"]), abs=1e-11 * row["norm"])
            change = signed(s, parts["after"]) - signed(s, parts["before"])
            assert row["change"] == pytest.approx(change, abs=1e-11 * row["norm"])
            for entry in PRECONDITIONED:
                assert row[entry] == pytest.approx(signed(s, parts[entry]), abs=1e-11 * row["norm"]), (entry, step)
            assert sum(row[e] for e in PRECONDITIONED) == pytest.approx(change, abs=1e-11 * row["norm"])
            assert abs(row["gradient"]) < 1e-11 * row["norm"]
            assert row["noise"] != 0


def test_the_plain_charge_breaks_at_first_order_where_this_one_does_not() -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.0, 0.999))
    with Ledger(model, optimizer, mlp_symmetries(model), every=1) as ledger:
        for batch in batches(20):
            optimizer.zero_grad()
            backward(model, batch)
            optimizer.step()
    plain = sum(abs(r["preconditioner"]) / r["norm"] for r in ledger.records())
    own = sum(abs(r["gradient"] + r["momentum"]) / r["norm"] for r in ledger.preconditioned())
    assert plain > 1e-3
    assert own < 1e-12


def test_momentum_is_the_memory_of_the_noise_term() -> None:
    """Over a run the momentum entry is `2 b1 / (1 - b1)` times the noise entry but for its ends (state identity)."""
    model, b1 = mlp(), 0.9
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(b1, 0.99))
    with Ledger(model, optimizer, mlp_symmetries(model), every=1, capacity=10**4) as ledger:
        for batch in batches(1500):
            optimizer.zero_grad()
            backward(model, batch)
            optimizer.step()
    rows = [r for r in ledger.preconditioned() if r["family"] == "rescaling"]
    late = rows[300:]  # the bias correction has died out
    memory, noise = sum(r["momentum"] for r in late), sum(r["noise"] for r in late)
    ends = abs(late[0]["momentum"]) + abs(late[-1]["momentum"])
    assert memory == pytest.approx(2 * b1 / (1 - b1) * noise, abs=ends * b1 / (1 - b1))
    assert ends * b1 / (1 - b1) < 0.2 * abs(memory)


def test_optimisers_without_a_preconditioned_charge_have_no_rows() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with Ledger(model, optimizer, mlp_symmetries(model), every=1) as ledger:
        backward(model, batches(1)[0])
        optimizer.step()
    assert ledger.records()
    assert ledger.preconditioned() == []


# --- Estimates -------------------------------------------------------------------------------------------------------

LR, W, B1 = 1e-3, 0.2, 0.8


def trained(model: nn.Module, syms: nf.SymmetrySet, decay: float = W) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The last step's estimates, and the state they are about: weights, roots and means of the gradient by name."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=decay, betas=(B1, 0.97), eps=1e-30)
    with Ledger(model, optimizer, syms, estimate_every=1, every=1) as ledger:
        for k, (x, y) in enumerate(batches(40)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            if k == 39:
                state = {n: optimizer.state[p] for n, p in model.named_parameters()}
                theta = {n: p.detach().clone() for n, p in model.named_parameters()}
                root = {n: (s["exp_avg_sq"] / (1 - 0.97**39)).sqrt() for n, s in state.items()}
                mean = {n: s["exp_avg"] / (1 - B1**39) for n, s in state.items()}
            optimizer.step()
    rows = ledger.estimates()
    assert all(math.isnan(r["distance"]) and math.isnan(r["at_infinity"]) for r in rows if r["step"] == 0)
    return [r for r in rows if r["step"] == 39], {"theta": theta, "root": root, "mean": mean}


def sides(s: nf.Symmetry, entries: Tensors) -> dict[int, torch.Tensor]:
    """Sums over the legs of each sign, by coordinate."""
    totals: dict[int, torch.Tensor] = {1: torch.tensor(0.0), -1: torch.tensor(0.0)}
    for leg in s.weight_legs:
        totals[leg.sign] = totals[leg.sign] + leg.row_sums(entries[leg.parameter])
    return totals


@pytest.mark.parametrize("decay", [0.0, W])
def test_distance_and_steps_are_those_of_the_sum_of_root_mean_squares(decay: float) -> None:
    optimize, integrate = (pytest.importorskip(f"scipy.{m}") for m in ("optimize", "integrate"))
    model = mlp()
    syms = mlp_symmetries(model).filter(family="rescaling")
    rows, at = trained(model, syms, decay)
    pull = decay * (2 - LR * decay)
    for s, row in zip(syms, rows, strict=True):
        noise = sides(s, at["root"])
        scaled = sides(s, {n: at["root"][n] * at["theta"][n] ** 2 for n in s.parameters})
        found, steps = [], []
        for j in range(len(noise[1])):
            a, b = ({sign: float(x[sign][j]) for sign in (1, -1)} for x in (noise, scaled))

            def potential(lam: float, a: dict[int, float] = a, b: dict[int, float] = b) -> float:
                z = math.exp(lam)
                return LR * (a[1] / z + a[-1] * z) + pull * (b[1] * z + b[-1] / z)

            def speed(_: float, at: Any, a: dict[int, float] = a, b: dict[int, float] = b) -> list[float]:
                z = math.exp(at[0])
                drift = LR**2 * (a[1] / z - a[-1] * z) - LR * pull * (b[1] * z - b[-1] / z)
                return [drift / (2 * (b[1] * z + b[-1] / z))]

            lam = float(optimize.minimize_scalar(potential, bracket=(-1.0, 1.0), tol=1e-12).x)
            found.append(abs(lam))

            def near(k: float, at: Any, lam: float = lam) -> float:
                return abs(at[0] - lam) - abs(lam) * math.exp(-1)

            near.terminal = True  # type: ignore[attr-defined]
            end = integrate.solve_ivp(speed, (0, 1e9), [0.0], events=near, rtol=1e-10, atol=1e-12, method="LSODA")
            steps.append(float(end.t[-1]))
        assert row["distance"] == pytest.approx(statistics.median(found), rel=1e-4)
        assert row["distance_max"] == pytest.approx(max(found), rel=1e-4)
        assert row["steps"] == pytest.approx(statistics.median(steps), rel=1e-3)
        assert row["at_infinity"] == 0
        squares = {n: torch.nan_to_num(at["mean"][n] ** 2 / at["root"][n]) for n in s.parameters}
        held = sum(float(v.sum()) for v in sides(s, squares).values())
        white = sum(float(v.sum()) for v in noise.values())
        assert row["persistence"] == pytest.approx((1 + B1) / (1 - B1) * held / white, rel=1e-5)


def test_rotation_and_effective_rate_of_scale_invariant_weights() -> None:
    """At `sum s theta^2 / sum s = lr / (2 w)`, each entry stepping by `lr` times a filtered number of variance 1."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 12, bias=False), nn.BatchNorm1d(12, affine=False), nn.Linear(12, 10)).double()
    syms = nf.declare(model, "diagonal", [("0.weight", 0)], family="norm")
    rows, at = trained(model, syms)
    s, theta = at["root"]["0.weight"], at["theta"]["0.weight"]
    square = float((theta**2).sum()) * LR / (2 * W) * float(s.sum()) / float((s * theta**2).sum())
    expected = LR * math.sqrt(theta.numel() * (1 - B1) / (1 + B1) / square)
    assert rows[0]["angular_predicted"] == pytest.approx(expected, rel=1e-5)
    assert rows[0]["angular_predicted"] != pytest.approx(math.sqrt(2 * LR * W * (1 - B1) / (1 + B1)), rel=1e-3)
    assert rows[0]["effective_lr"] == pytest.approx(LR / float(theta.norm()), rel=1e-6)


def test_coupled_decay_has_no_predicted_equilibrium() -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=0.1)
    with Ledger(model, optimizer, mlp_symmetries(model), estimate_every=1, every=1) as ledger:
        for batch in batches(3):
            optimizer.zero_grad()
            backward(model, batch)
            optimizer.step()
    assert all(math.isnan(r[k]) for r in ledger.estimates() for k in ("distance", "steps", "at_infinity"))
