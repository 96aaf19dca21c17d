"""The ledger closes: entries sum to the measured change, against a dense float64 replay of the optimiser's update."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import noetherflow as nf
from noetherflow.equilibrium.step import step_identity
from noetherflow.monitor.ledger import Ledger
from noetherflow.monitor.rule import ENTRIES

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "sgd-decay": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 1e-2}),
    "momentum": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}),
    "dampening": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 1e-3}),
    "nesterov": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}),
    "nesterov-foreach": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "foreach": True}),
    "adam": (torch.optim.Adam, {"lr": 1e-3}),
    "adam-l2": (torch.optim.Adam, {"lr": 1e-3, "weight_decay": 1e-2, "foreach": True}),
    "amsgrad": (torch.optim.Adam, {"lr": 1e-3, "amsgrad": True}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1}),
    "adamw-fused": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1, "fused": True}),
    "momentum-maximize": (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-3, "maximize": True}),
    "nesterov-maximize": (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9, "nesterov": True, "maximize": True}),
    "adamw-maximize": (torch.optim.AdamW, {"lr": 1e-4, "weight_decay": 0.1, "maximize": True}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 1e-3, "momentum": 0.5}),
    "adagrad": (torch.optim.Adagrad, {"lr": 1e-2}),
}


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    return torch.tensor(x / 16.0, dtype=torch.float64), torch.tensor(y)


def mlp(seed: int = 0) -> nn.Sequential:
    """64-24-16-10 with two ReLU layers and, before the last layer, a linear one: diagonal and general_linear."""
    torch.manual_seed(seed)
    layers = [nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 10)]
    return nn.Sequential(*layers).double()


def mlp_symmetries(model: nn.Module) -> nf.SymmetrySet:
    relu = [
        nf.declare(model, "diagonal", [(f"{a}.weight", 0), (f"{a}.bias", 0)], [(f"{b}.weight", 1)], family="rescaling")
        for a, b in ((0, 2), (2, 4))
    ]
    linear = nf.declare(model, "general_linear", [("4.weight", 0), ("4.bias", 0)], [("5.weight", 1)], family="linear")
    return nf.SymmetrySet(tuple(s for part in (*relu, linear) for s in part), shapes=linear.shapes)


def batches(steps: int, size: int = 32, seed: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x, y = digits()
    rng = torch.Generator(torch.get_default_device()).manual_seed(seed)
    picks = [torch.randint(len(x), (size,), generator=rng) for _ in range(steps)]
    return [(x[p], y[p]) for p in picks]


def backward(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    return loss


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def column(rows: list[dict], field: str) -> torch.Tensor:
    return torch.tensor([r[field] for r in rows], dtype=torch.float64)


def assert_closed(rows: list[dict], steps: int) -> None:
    """Every step to 1e-10 of its entries or to rounding of the charge itself; the whole run to 1e-10."""
    assert sorted({r["step"] for r in rows}) == list(range(steps))
    totals: dict[str, list[float]] = {}
    for r in rows:
        parts = [r[k] for k in ENTRIES]
        size = sum(abs(p) for p in parts)
        assert size > 0
        assert r["residual"] == pytest.approx(r["change"] - sum(parts), abs=1e-14 * r["norm"])
        assert abs(r["residual"]) <= max(1e-10 * size, 8 * torch.finfo(torch.float64).eps * r["norm"])
        total = totals.setdefault(r.get("symmetry", r["family"]), [0.0, 0.0])
        total[0] += r["residual"]
        total[1] += max(size, 1e-6 * r["norm"])
    assert all(abs(residual) <= 1e-10 * size for residual, size in totals.values())


def entry(s: nf.Symmetry, theta: dict[str, torch.Tensor], u: dict[str, torch.Tensor]) -> torch.Tensor:
    """`-2 theta^T A u` coordinate-wise by polarisation: `-(C(theta + u) - C(theta) - C(u))`."""
    total = {n: theta[n] + u[n] for n in s.parameters}
    return -(s.charge(total) - s.charge(theta) - s.charge(u))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_closes_over_500_steps_with_clipping_and_schedule(name: str) -> None:
    model = mlp()
    kind, options = OPTIMIZERS[name]
    optimizer = kind(model.parameters(), **options)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options["lr"] * 2, total_steps=501, cycle_momentum=False)
    syms = mlp_symmetries(model)
    ledger = Ledger(model, optimizer, syms, detail="symmetry", every=1).attach()
    for batch in batches(500):
        optimizer.zero_grad()
        backward(model, batch)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    for level in ("family", "symmetry"):
        assert_closed(ledger.records(level), 500)
    last = {r["symmetry"]: r["charge"] + r["change"] for r in ledger.records("symmetry")[-3:]}
    for s in syms:
        trace = s.charge(tensors(model))
        expected = float(trace.sum() if s.is_torus else trace.diagonal(dim1=-2, dim2=-1).sum())
        assert last[s.name] == pytest.approx(expected, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("name", [n for n, (kind, _) in OPTIMIZERS.items() if kind is torch.optim.SGD])
def test_sgd_entries_equal_a_dense_replay(name: str) -> None:
    model = mlp()
    _, options = OPTIMIZERS[name]
    optimizer = torch.optim.SGD(model.parameters(), **options)
    syms = mlp_symmetries(model)
    ledger = Ledger(model, optimizer, syms, detail="coordinate", every=1).attach()
    lr, mu, w = options["lr"], options.get("momentum", 0.0), options.get("weight_decay", 0.0)
    tau, nesterov = options.get("dampening", 0.0), options.get("nesterov", False)
    memory: dict[str, torch.Tensor] = {}
    for k, batch in enumerate(batches(4)):
        optimizer.zero_grad()
        backward(model, batch)
        theta = tensors(model)
        g = {n: -p.grad if options.get("maximize") else p.grad.clone() for n, p in model.named_parameters()}
        optimizer.step()
        u: dict[str, dict[str, torch.Tensor]] = {"gradient": {}, "decay": {}, "momentum": {}}
        new = {}
        for n in theta:
            old = memory.get(n, torch.zeros_like(theta[n]))
            fresh = 1.0 if k == 0 else 1 - tau
            new[n] = mu * old + fresh * (g[n] + w * theta[n])
            lead = (1 + mu * fresh) if nesterov else (fresh if mu else 1.0)
            u["gradient"][n] = lr * lead * g[n]
            u["decay"][n] = lr * lead * w * theta[n]
            u["momentum"][n] = lr * (mu * mu if nesterov else mu) * old
        memory = new
        total = {n: sum(u[part][n] for part in u) for n in theta}
        for n, p in model.named_parameters():
            torch.testing.assert_close(theta[n] - total[n], p.detach(), rtol=0, atol=1e-15)
        rows = [r for r in ledger.records("coordinate") if r["step"] == k]
        for s in syms:
            mine = {f: column([r for r in rows if r["symmetry"] == s.name], f) for f in (*u, "second_order")}
            for part in u:
                torch.testing.assert_close(mine[part], entry(s, theta, u[part]).reshape(-1), rtol=1e-9, atol=1e-13)
            torch.testing.assert_close(mine["second_order"], s.charge(total).reshape(-1), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", [n for n, (kind, _) in OPTIMIZERS.items() if issubclass(kind, torch.optim.Adam)])
def test_adam_entries_equal_a_dense_replay(name: str) -> None:
    model = mlp()
    kind, options = OPTIMIZERS[name]
    optimizer = kind(model.parameters(), **options)
    syms = mlp_symmetries(model)
    ledger = Ledger(model, optimizer, syms, detail="coordinate", every=1).attach()
    lr, w, (b1, b2), eps = options["lr"], options.get("weight_decay", 0.0), (0.9, 0.999), 1e-8
    coupled, decoupled = (0.0, w) if kind is torch.optim.AdamW else (w, 0.0)
    m = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    v = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    top = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for k, batch in enumerate(batches(5), start=1):
        optimizer.zero_grad()
        backward(model, batch)
        theta = tensors(model)
        g = {n: -p.grad if options.get("maximize") else p.grad.clone() for n, p in model.named_parameters()}
        old = {n: x.clone() for n, x in m.items()}
        optimizer.step()
        p = {}
        for n in theta:
            d = g[n] + coupled * theta[n]
            m[n] = b1 * m[n] + (1 - b1) * d
            v[n] = b2 * v[n] + (1 - b2) * d * d
            top[n] = torch.maximum(top[n], v[n])
            second = top[n] if options.get("amsgrad") else v[n]
            p[n] = m[n] / ((second / (1 - b2**k)).sqrt() + eps)
        rate = lr / (1 - b1**k)
        length = [math.sqrt(sum(float((x[n] * x[n]).sum()) for n in syms.parameters)) for x in (p, m)]
        scalar = rate * length[0] / length[1]
        u: dict[str, dict[str, torch.Tensor]] = {"gradient": {}, "momentum": {}, "decay": {}, "preconditioner": {}}
        for n in theta:
            u["gradient"][n] = scalar * (1 - b1) * g[n]
            u["momentum"][n] = scalar * b1 * old[n]
            u["decay"][n] = scalar * (1 - b1) * coupled * theta[n] + lr * decoupled * theta[n]
            u["preconditioner"][n] = rate * p[n] - scalar * m[n]
        total = {n: sum(u[part][n] for part in u) for n in theta}
        for n, now in model.named_parameters():
            torch.testing.assert_close(theta[n] - total[n], now.detach(), rtol=0, atol=1e-14)
        rows = [r for r in ledger.records("coordinate") if r["step"] == k - 1]
        for s in syms:
            mine = [r for r in rows if r["symmetry"] == s.name]
            for part in u:
                torch.testing.assert_close(
                    column(mine, part), entry(s, theta, u[part]).reshape(-1), rtol=1e-8, atol=1e-13
                )
            torch.testing.assert_close(column(mine, "second_order"), s.charge(total).reshape(-1), rtol=1e-9, atol=1e-14)


def test_second_order_holds_the_square_of_decay() -> None:
    """`flow.step_identity` counts `(lr w)^2 C` under decay, the ledger under `u^T A u`."""
    model = mlp()
    lr, w = 0.1, 0.3
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, weight_decay=w)
    syms = mlp_symmetries(model)
    ledger = Ledger(model, optimizer, syms, detail="symmetry", every=1).attach()
    theta = tensors(model)
    backward(model, batches(1)[0])
    g = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    rows = {r["symmetry"]: r for r in ledger.records("symmetry")}

    def trace(s: nf.Symmetry, layout: torch.Tensor) -> float:
        return float(layout.sum() if s.is_torus else layout.diagonal(dim1=-2, dim2=-1).sum())

    for s in syms:
        identity = step_identity(s, theta, g, tensors(model), nf.SGDConfig(lr, 32, weight_decay=w))
        r, square = rows[s.name], (lr * w) ** 2 * trace(s, s.charge(theta))
        assert r["second_order"] - square == pytest.approx(trace(s, identity.noise), rel=1e-9, abs=1e-13)
        assert r["decay"] + square == pytest.approx(trace(s, identity.decay), rel=1e-9)
        assert abs(square) > 1e-3 * abs(r["second_order"])
