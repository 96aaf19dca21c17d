"""balance_: the function stays, charges arrive, optimiser state follows, refusals leave everything as it was."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf
from equilibrium_cases import Problem, linear, mlp, union
from noetherflow.balance import balance_
from noetherflow.equilibrium import noise_equilibrium
from noetherflow.errors import CertificateError

SGD = nf.SGDConfig(0.05, 4, weight_decay=1e-3)


def train(problem: Problem, optimizer: torch.optim.Optimizer, steps: int = 5) -> None:
    x, y = problem.data
    for i in range(steps):
        optimizer.zero_grad()
        problem.loss(problem.model, (x[i::steps], y[i::steps])).mean().backward()
        optimizer.step()


@pytest.mark.parametrize("family", ["torus", "general_linear"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_function_is_kept_and_charges_arrive(family: str, dtype: torch.dtype) -> None:
    problem = mlp(scales=(4, 0.3, 1)) if family == "torus" else linear((5, 3, 4))
    eq = noise_equilibrium(problem.model, problem.syms, problem.measure(), SGD)
    model = copy.deepcopy(problem.model).to(dtype)
    x = problem.data[0].to(dtype)
    before = model(x).detach().double()
    pointers = [p.data_ptr() for p in model.parameters()]
    report = balance_(model, eq, example_inputs=x)
    eps = torch.finfo(dtype).eps
    assert pointers == [p.data_ptr() for p in model.parameters()]
    assert all(p.dtype == dtype for p in model.parameters())
    assert report.output_change is not None
    assert report.output_change <= 30 * eps
    assert report.output_change == pytest.approx(
        float((model(x).detach().double() - before).abs().max() / before.abs().max()), abs=1e-15
    )
    assert report.rounding <= eps
    params = {n: t.detach().double() for n, t in nf.tensors_of(model).items()}
    for s in problem.syms:
        scale = float(sum(g.abs().max() for g in s.grams(params)))
        assert float((s.charge(params) - eq[s.name].charge).abs().max()) < 20 * eps * scale
    assert set(report.moved) == set(problem.syms.parameters)


@pytest.mark.parametrize(
    ("make", "linear_rule", "quadratic_rule"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9), ("momentum_buffer",), ()),
        (lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True), ("exp_avg",), ("exp_avg_sq", "max_exp_avg_sq")),
        (lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True), ("grad_avg",), ("square_avg",)),
        (lambda p: torch.optim.Adagrad(p, lr=0.01), (), ("sum",)),
    ],
)
def test_torus_state_moves_exactly_like_gradients(make: Any, linear_rule: Any, quadratic_rule: Any) -> None:
    """At a moved point every past gradient would have been `g / f`, its square `g^2 / f^2`, entry by entry."""
    problem = mlp()
    optimizer = make(problem.model.parameters())
    train(problem, optimizer)
    eq = noise_equilibrium(problem.model, problem.syms, problem.measure(), SGD)
    before = {n: copy.deepcopy(optimizer.state[p]) for n, p in problem.model.named_parameters()}
    weights = problem.tensors()
    report = balance_(problem.model, eq, optimizer)
    entries = 0
    for name, p in problem.model.named_parameters():
        factor = p.detach() / weights[name]
        for key in (*linear_rule, *quadratic_rule):
            power = 1 if key in linear_rule else 2
            torch.testing.assert_close(
                optimizer.state[p][key], before[name][key] / factor**power, rtol=1e-9, atol=1e-15
            )
            entries += name in report.moved
    assert report.state_entries == entries > 0
    assert report.approximate_state == ()


def drive_of(problem: Problem, optimizer: torch.optim.Optimizer) -> float:
    s = problem.syms[0]
    direction = s.tangent(problem.tensors(), torch.ones(s.shape, dtype=torch.float64))
    named = dict(problem.model.named_parameters())
    return float(sum((d * optimizer.state[named[n]]["momentum_buffer"]).sum() for n, d in direction.items()))


def test_momentum_keeps_its_product_with_the_symmetry_direction() -> None:
    """`theta^T A v`, through which momentum drives the charge, is the same before and after (theory.md section 3)."""
    results = {}
    for rule in ("moved", "kept"):
        problem = mlp(scales=(3, 1, 1))
        optimizer = torch.optim.SGD(problem.model.parameters(), lr=1e-5, momentum=0.9)
        train(problem, optimizer)
        eq = noise_equilibrium(problem.model, problem.syms, problem.measure(), SGD)
        inner = drive_of(problem, optimizer)
        balance_(problem.model, eq, optimizer if rule == "moved" else None)
        results[rule] = abs(drive_of(problem, optimizer) - inner)
    assert results["moved"] < 1e-10
    assert results["kept"] > 1e-3


def test_general_linear_state_is_moved_and_said_to_be_approximate() -> None:
    problem = linear((5, 3, 4))
    optimizer = torch.optim.Adam(problem.model.parameters(), lr=1e-3, weight_decay=1e-4)
    train(problem, optimizer)
    eq = noise_equilibrium(problem.model, problem.syms, problem.measure(), SGD)
    first = {n: optimizer.state[p]["exp_avg"].clone() for n, p in problem.model.named_parameters()}
    report = balance_(problem.model, eq, optimizer)
    (s,) = problem.syms
    expected = s.act_on_gradients(first, eq.settled[0].element)
    for name, p in problem.model.named_parameters():
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], expected[name])
        assert bool((optimizer.state[p]["exp_avg_sq"] >= 0).all())
    assert any("exp_avg_sq" in a and "uncorrelated" in a for a in report.approximate_state)
    assert any("weight-decay part" in a for a in report.approximate_state)


def test_tied_weights_and_buffers_move_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6, bias=False), nn.Linear(6, 3), nn.Linear(4, 6, bias=False)
            self.c.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)) + torch.relu(self.c(-x)))

    torch.manual_seed(0)
    model = Tied().double()
    syms = nf.declare(model, "diagonal", [("a.weight", 0)], [("b.weight", 1)])
    problem = Problem(model, syms, (torch.randn(20, 4).double(), torch.randn(20, 3).double()))
    eq = noise_equilibrium(model, syms, problem.measure(), SGD)
    report = balance_(model, eq, example_inputs=problem.data[0])
    assert model.c.weight is model.a.weight
    assert report.output_change is not None
    assert report.output_change < 1e-14


def test_an_approximate_symmetry_that_changes_too_much_is_named() -> None:
    problem = mlp((4, 6, 3))
    wrong = nf.declare(problem.model, "diagonal", [("0.weight", 0)], [("2.weight", 1)])
    held_up_to_eps = nf.SymmetrySet(tuple(dataclasses.replace(s, eps=1e-5) for s in wrong), shapes=wrong.shapes)
    problem = Problem(problem.model, held_up_to_eps, problem.data)
    eq = noise_equilibrium(problem.model, held_up_to_eps, problem.measure(), SGD)
    with pytest.raises(CertificateError, match=r"eps: leave such symmetries in place .*approximate=False"):
        balance_(problem.model, eq, example_inputs=problem.data[0])


def test_broken_symmetry_is_refused_and_nothing_moves() -> None:
    problem = mlp((4, 6, 3))
    wrong = nf.declare(problem.model, "diagonal", [("0.weight", 0)], [("2.weight", 1)])
    problem = Problem(problem.model, wrong, problem.data)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.01, momentum=0.9)
    train(problem, optimizer)
    eq = noise_equilibrium(problem.model, wrong, problem.measure(), SGD)
    before, state = problem.tensors(), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(CertificateError, match=r"changed the outputs by .* was restored"):
        balance_(problem.model, eq, optimizer, example_inputs=problem.data[0])
    for name, t in problem.tensors().items():
        assert torch.equal(t, before[name])
    for key, entry in optimizer.state_dict()["state"].items():
        assert torch.equal(entry["momentum_buffer"], state["state"][key]["momentum_buffer"])

    from noetherflow.discovery import certify

    certificate = certify(problem.model, wrong, problem.data[0])
    with pytest.raises(CertificateError, match="broken"):
        balance_(problem.model, eq, certificate=certificate)


def test_overflow_of_a_narrow_dtype_is_refused() -> None:
    problem = mlp((4, 6, 3))
    with torch.no_grad():
        problem.model[0].weight *= 1e-7
        problem.model[0].bias *= 1e-7
        problem.model[2].weight *= 5e6
    eq = noise_equilibrium(problem.model, problem.syms, problem.measure(), objective="norm")
    import dataclasses

    stretched = dataclasses.replace(eq.settled[0], element=eq.settled[0].element * 1e9)
    eq = dataclasses.replace(eq, settled=(stretched,))
    model = copy.deepcopy(problem.model).half()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(CertificateError, match=r"do not fit torch\.float16"):
        balance_(model, eq)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_training_mode_is_put_back_and_report_serialises() -> None:
    problem = mlp((4, 5, 5, 3))
    problem.model.train()
    problem.model[2].eval()
    eq = noise_equilibrium(problem.model, union(problem.model, [problem.syms]), problem.measure(), SGD)
    report = balance_(problem.model, eq, example_inputs=(problem.data[0],))
    assert problem.model.training
    assert not problem.model[2].training
    assert json.loads(json.dumps(report.to_dict()))["rounding"] == 0
    assert "output change" in str(report)
    assert {r["tensor"] for r in report.rows()} == set(report.moved)
