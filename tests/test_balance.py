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
from noetherflow.balance.model import balance_
from noetherflow.balance.optimizer_state import EntryMove
from noetherflow.equilibrium import Equilibrium, noise_equilibrium
from noetherflow.errors import CertificateError, DataError, MomentError

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
    report = balance_(problem.model, eq, optimizer, example_inputs=problem.data[0])
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
        balance_(problem.model, eq, optimizer if rule == "moved" else None, example_inputs=problem.data[0])
        results[rule] = abs(drive_of(problem, optimizer) - inner)
    assert results["moved"] < 1e-10
    assert results["kept"] > 1e-3


def test_general_linear_state_is_moved_and_said_to_be_approximate() -> None:
    problem = linear((5, 3, 4))
    optimizer = torch.optim.Adam(problem.model.parameters(), lr=1e-3, weight_decay=1e-4)
    train(problem, optimizer)
    eq = noise_equilibrium(problem.model, problem.syms, problem.measure(), SGD)
    first = {n: optimizer.state[p]["exp_avg"].clone() for n, p in problem.model.named_parameters()}
    report = balance_(problem.model, eq, optimizer, example_inputs=problem.data[0])
    (s,) = problem.syms
    expected = s.act_on_gradients(first, eq.settled[0].element)
    for name, p in problem.model.named_parameters():
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], expected[name])
        assert bool((optimizer.state[p]["exp_avg_sq"] >= 0).all())
    assert any("exp_avg_sq" in a and "uncorrelated" in a for a in report.approximate_state)
    assert any("weight-decay part" in a for a in report.approximate_state)


def test_general_linear_squares_follow_the_dense_definition() -> None:
    """`dW -> A dW B^T` is `kron(A, B)` on entries; uncorrelated ones then have the second moments `kron(A, B)^2 v`."""
    problem = linear((5, 3, 3, 4))
    optimizer = torch.optim.Adam(problem.model.parameters(), lr=1e-3)
    train(problem, optimizer)
    eq = noise_equilibrium(problem.model, problem.syms, problem.measure(), SGD, joint=False)
    before = {n: optimizer.state[p]["exp_avg_sq"].clone() for n, p in problem.model.named_parameters()}
    balance_(problem.model, eq, optimizer, example_inputs=problem.data[0])
    g, h = (s.element[0] for s in eq)
    for name, a, b in (
        ("0.weight", torch.linalg.inv(g).T, torch.eye(5).double()),
        ("1.weight", torch.linalg.inv(h).T, g),
        ("2.weight", torch.eye(4).double(), h),
    ):
        expected = (torch.kron(a, b).square() @ before[name].flatten()).reshape(before[name].shape)
        moved = optimizer.state[problem.model.get_parameter(name)]["exp_avg_sq"]
        torch.testing.assert_close(moved, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("family", ["torus", "general_linear"])
def test_gradients_are_those_of_the_moved_model(family: str) -> None:
    problem = mlp(scales=(4, 0.3, 1)) if family == "torus" else linear((5, 3, 4))
    eq = noise_equilibrium(problem.model, problem.syms, problem.measure(), SGD)
    problem.loss(problem.model, problem.data).mean().backward()
    report = balance_(problem.model, eq, example_inputs=problem.data[0])
    params = list(problem.model.parameters())
    fresh = torch.autograd.grad(problem.loss(problem.model, problem.data).mean(), params)
    for p, g in zip(params, fresh, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-9, atol=1e-12)
    assert report.gradients == len(report.moved)
    assert f"and {report.gradients} gradients" in str(report)


def closure_of(problem: Problem, optimizer: torch.optim.Optimizer) -> Any:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.loss(problem.model, problem.data).mean()
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize(
    ("make", "left"),
    [
        (lambda p: torch.optim.Adafactor(p), ("0.weight: row_var", "0.weight: col_var", "0.bias: variance")),
        (lambda p: torch.optim.LBFGS(p, max_iter=3), ("0.weight: d", "0.weight: prev_flat_grad", "0.weight: old_dirs")),
        (lambda p: torch.optim.LBFGS(p[::-1], max_iter=3), ("4.bias: d", "4.bias: prev_flat_grad", "4.bias: old_dirs")),
        (lambda p: torch.optim.RMSprop(p, momentum=0.9), ("0.weight: momentum_buffer",)),
    ],
    ids=["adafactor", "lbfgs", "lbfgs from an unmoved parameter", "rmsprop with momentum"],
)
def test_state_without_a_rule_stays_and_is_listed(make: Any, left: tuple[str, ...]) -> None:
    problem = mlp()
    optimizer = make(list(problem.model.parameters()))
    optimizer.step(closure_of(problem, optimizer))
    eq = noise_equilibrium(problem.model, problem.syms, problem.measure(), SGD)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    report = balance_(problem.model, eq, optimizer, example_inputs=problem.data[0])
    for entry in left:
        (line,) = [u for u in report.unmoved if u.startswith(f"{entry} ")]
        assert "no rule" in line
        assert f"NOT moved: {line}" in str(report)
        name, key = entry.split(": ")
        index = [n for n, _ in problem.model.named_parameters()].index(name)
        if "LBFGS" in type(optimizer).__name__:
            index = 0
        torch.testing.assert_close(optimizer.state_dict()["state"][index][key], before[index][key], rtol=0, atol=0)


def test_several_optimisers_move_and_parameters_of_none_are_listed() -> None:
    problem, params = mlp(), ["0.weight", "0.bias"]
    named = dict(problem.model.named_parameters())
    first = torch.optim.SGD([named[n] for n in params], lr=1e-3, momentum=0.9)
    second = torch.optim.SGD([p for n, p in named.items() if n not in params], lr=1e-3, momentum=0.9)
    problem.loss(problem.model, problem.data).mean().backward()
    first.step()
    second.step()
    eq = noise_equilibrium(problem.model, problem.syms, problem.measure(), SGD)
    other = Problem(copy.deepcopy(problem.model), problem.syms, problem.data)
    both = torch.optim.SGD(other.model.parameters(), lr=1e-3, momentum=0.9)
    state = {n: (first if n in params else second).state[p]["momentum_buffer"].clone() for n, p in named.items()}
    for n, p in other.model.named_parameters():
        both.state[p]["momentum_buffer"] = state[n]
    report, expected = (
        balance_(problem.model, eq, [first, second], example_inputs=problem.data[0]),
        balance_(other.model, eq, both, example_inputs=other.data[0]),
    )
    assert report.state_entries == expected.state_entries == len(report.moved)
    assert report.unmoved == expected.unmoved == ()
    for n, p in other.model.named_parameters():
        moved = (first if n in params else second).state[named[n]]["momentum_buffer"]
        torch.testing.assert_close(moved, both.state[p]["momentum_buffer"], rtol=0, atol=0)
    far = mlp()
    partial = torch.optim.SGD([p for n, p in far.model.named_parameters() if n in params], lr=1e-3)
    eq = noise_equilibrium(far.model, far.syms, far.measure(), SGD)
    report = balance_(far.model, eq, partial, example_inputs=far.data[0])
    assert [line.split(":")[0] for line in report.unmoved] == ["2.weight", "2.bias", "4.weight"]
    assert all("in no optimiser given" in line for line in report.unmoved)


class Watched(nn.Module):
    """A ReLU network; `after` makes its outputs, which can tell whether the first layer has grown past `limit`."""

    def __init__(self, after: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.after, self.limit = nn.Linear(4, 6), nn.Linear(6, 3), after, float("inf")
        with torch.no_grad():
            self.a.weight *= 0.1
            self.a.bias *= 0.1
        self.double()

    def forward(self, x: Tensor) -> Any:
        return self.after(self.b(torch.relu(self.a(x))), float(self.a.weight.detach().norm()) > self.limit)


def watched(after: Any) -> tuple[Problem, Equilibrium]:
    model = Watched(lambda y, grown: y)
    syms = nf.declare(model, "diagonal", [("a.weight", 0), ("a.bias", 0)], [("b.weight", 1)])
    problem = Problem(model, syms, (torch.randn(20, 4).double(), torch.randn(20, 3).double()))
    eq = noise_equilibrium(model, syms, problem.measure(), SGD)
    model.after, model.limit = after, 1.01 * float(model.a.weight.detach().norm())
    return problem, eq


def interrupted(y: Tensor, grown: bool) -> Tensor:
    if grown:
        raise KeyboardInterrupt
    return y


def fails(y: Tensor, grown: bool) -> Tensor:
    if grown:
        raise RuntimeError("boom")
    return y


def second_becomes_nan(y: Tensor, grown: bool) -> tuple[Tensor, Tensor]:
    return y, y * float("nan" if grown else 1)


def mask_moves(y: Tensor, grown: bool) -> Tensor:
    return y.index_fill(1, torch.tensor([1 if grown else 0]), float("-inf"))


@pytest.mark.parametrize(
    ("after", "error", "message"),
    [
        (interrupted, KeyboardInterrupt, None),
        (fails, RuntimeError, "boom"),
        (second_becomes_nan, CertificateError, "outputs by inf"),
        (mask_moves, CertificateError, "outputs by inf"),
        (lambda y, grown: y * float("nan"), DataError, "no finite entry"),
    ],
)
def test_any_failure_puts_everything_back(after: Any, error: Any, message: str | None) -> None:
    problem, eq = watched(after)
    before = problem.tensors()
    with pytest.raises(error, match=message):
        balance_(problem.model, eq, example_inputs=problem.data[0])
    for name, t in problem.tensors().items():
        assert torch.equal(t, before[name])


def test_an_interruption_among_the_optimiser_state_puts_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = mlp()
    optimizer = torch.optim.Adam(problem.model.parameters(), lr=1e-3)
    train(problem, optimizer)
    eq = noise_equilibrium(problem.model, problem.syms, problem.measure(), SGD)
    before = problem.tensors()
    state = copy.deepcopy(optimizer.state_dict()["state"])
    grads = [p.grad.clone() for p in problem.model.parameters() if p.grad is not None]

    value = EntryMove.value

    def interrupted(move: EntryMove, motion: Any) -> Tensor:
        if move.key == "exp_avg_sq":
            raise KeyboardInterrupt
        return value(move, motion)

    monkeypatch.setattr(EntryMove, "value", interrupted)
    with pytest.raises(KeyboardInterrupt):
        balance_(problem.model, eq, optimizer, example_inputs=problem.data[0])
    assert all(torch.equal(t, before[n]) for n, t in problem.tensors().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(problem.model.parameters(), grads, strict=True))  # type: ignore[arg-type]
    for index, entry in optimizer.state_dict()["state"].items():
        assert all(torch.equal(entry[k], state[index][k]) for k in entry)


def test_infinities_that_stay_are_compared_around() -> None:
    problem, eq = watched(lambda y, grown: torch.cat([y, torch.full_like(y[:, :1], -torch.inf)], 1))
    report = balance_(problem.model, eq, example_inputs=problem.data[0])
    assert report.moved
    assert report.output_change is not None
    assert report.output_change < 1e-14


@pytest.mark.parametrize("narrow", ["frozen layer", "outputs"])
def test_the_least_precise_tensor_sets_the_tolerance(narrow: str) -> None:
    """float32 factors in front of a bfloat16 layer: outputs can only be kept to the rounding of bfloat16."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(8, 4, bias=False), nn.Linear(4, 8, bias=False)
            self.base = nn.Linear(8, 8, bias=False, dtype=torch.bfloat16) if narrow == "frozen layer" else None

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(self.a(x)).bfloat16()
            return y if self.base is None else self.base(y).float()

    model = Mixed()
    syms = nf.declare(model, "general_linear", [("a.weight", 0)], [("b.weight", 1)])
    wide = nn.Sequential(copy.deepcopy(model.a), copy.deepcopy(model.b)).double()
    named = nf.declare(wide, "general_linear", [("0.weight", 0)], [("1.weight", 1)])
    problem = Problem(wide, named, (torch.randn(30, 8).double(), torch.randn(30, 8).double()))
    eq = noise_equilibrium(wide, named, problem.measure(), SGD)
    eq = dataclasses.replace(eq, settled=(dataclasses.replace(eq.settled[0], name=syms[0].name),), symmetries=syms)
    report = balance_(model, eq, example_inputs=torch.randn(100_000, 8))
    assert report.output_change is not None
    assert 1e-4 < report.output_change < torch.finfo(torch.bfloat16).eps


def test_an_equilibrium_of_another_model_is_refused() -> None:
    problem = mlp((6, 8, 7, 3))
    eq = noise_equilibrium(problem.model, problem.syms, problem.measure(), SGD)
    with pytest.raises(DataError, match=r"another model .*0\.weight: \(9, 6\) instead of \(8, 6\)"):
        balance_(mlp((6, 9, 7, 3)).model, eq)
    with pytest.raises(DataError, match=r"another model .*0\.weight: missing.*model\.module"):
        balance_(nn.ModuleDict({"module": problem.model}), eq)


def test_a_solution_that_has_not_converged_is_said_to_be_none() -> None:
    problem = mlp(scales=(4, 0.3, 1))
    eq = noise_equilibrium(problem.model, problem.syms, problem.measure(), SGD, max_iterations=2)
    report = balance_(problem.model, eq, example_inputs=problem.data[0])
    assert not report.converged
    assert report.imbalance == eq.imbalance > 1e-11
    assert f"NOT balanced: the equilibrium given had not converged (relative Noether flow {eq.imbalance:.2e}" in str(
        report
    )


def test_long_lists_are_cut_in_print_only() -> None:
    report = nf.BalanceReport({}, None, 0.0, 0, unmoved=tuple(f"line {i}" for i in range(30)))
    assert "NOT moved: line 19\nNOT moved: 10 more" in str(report)
    assert len(report.to_dict()["unmoved"]) == 30


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
    with pytest.raises(MomentError, match="theta"):
        noise_equilibrium(problem.model, wrong, problem.measure(), SGD)
    eq = noise_equilibrium(problem.model, wrong, None, objective="norm")
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
        problem.model[2].weight *= 1e4
    eq = noise_equilibrium(problem.model, problem.syms, problem.measure(), objective="norm")
    import dataclasses

    stretched = dataclasses.replace(eq.settled[0], element=eq.settled[0].element * 1e9)
    eq = dataclasses.replace(eq, settled=(stretched,))
    model = copy.deepcopy(problem.model).half()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(CertificateError, match=r"do not fit torch\.float16"):
        balance_(model, eq, unchecked=True)
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
