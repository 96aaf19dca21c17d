"""What proves a move of `balance_`, and how optimiser state of other classes is dealt with."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import noetherflow as nf
from equilibrium_cases import Problem, mlp
from noetherflow.balance.check import OutputCheck
from noetherflow.balance.state_rules import saved_state_rule, state_rule_of
from noetherflow.errors import CertificateError, DataError
from noetherflow.extend import LIKE_GRADIENT, LIKE_WEIGHT, left, state_rule

SGD = nf.SGDConfig(0.05, 4, weight_decay=1e-3)


def solved(problem: Problem) -> Any:
    return nf.noise_equilibrium(problem.model, problem.syms, problem.measure(), SGD)


def wrongly_solved(problem: Problem, wrong: nf.SymmetrySet) -> Any:
    """Balanced norms along a wrong symmetry: only an objective without gradients does not notice that it is wrong."""
    other = Problem(problem.model, wrong, problem.data)
    return nf.noise_equilibrium(problem.model, wrong, other.measure(), objective="norm")


def train(problem: Problem, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        problem.loss(problem.model, problem.data).mean().backward()
        optimizer.step()


# --- what proves a move ----------------------------------------------------------------------------------------------


def test_nothing_moves_unchecked() -> None:
    problem = mlp(scales=(3, 1, 1))
    eq, before = solved(problem), problem.tensors()
    with pytest.raises(CertificateError, match=r"nothing proves .*example_inputs.*nf\.certify.*unchecked=True"):
        nf.balance_(problem.model, eq)
    assert all(torch.equal(t, before[n]) for n, t in problem.tensors().items())
    report = nf.balance_(problem.model, eq, unchecked=True)
    assert report.output_change is None
    assert "not measured" in str(report)
    assert not torch.equal(problem.tensors()["0.weight"], before["0.weight"])


def test_a_certificate_of_every_moved_symmetry_proves_a_move() -> None:
    problem = mlp(scales=(3, 1, 1))
    eq = solved(problem)
    whole = nf.certify(problem.model, problem.syms, problem.data[0])
    first = nf.certify(problem.model, problem.syms.filter(parameter="0.weight"), problem.data[0])
    model = copy.deepcopy(problem.model)
    with pytest.raises(CertificateError, match=r"does not prove .*2\.weight -> 2\.bias -> 4\.weight"):
        nf.balance_(model, eq, certificate=first)
    report = nf.balance_(model, eq, certificate=whole)
    assert report.output_change is None
    torch.testing.assert_close(model(problem.data[0]), problem.model(problem.data[0]))


def test_inputs_of_the_search_serve_where_no_others_are_given() -> None:
    problem = mlp(scales=(3, 1, 1))
    found = nf.find_symmetries(problem.model, problem.data[0][:2])
    problem = Problem(problem.model, found, problem.data)
    eq = solved(problem)
    narrow = copy.deepcopy(problem.model).float()
    with pytest.raises(CertificateError, match="nothing proves"):  # it no longer runs on inputs in float64
        nf.balance_(narrow, eq)
    report = nf.balance_(problem.model, eq)
    assert report.output_change is not None
    assert report.output_change < 1e-13


def test_a_wrong_symmetry_is_caught_on_the_inputs_of_the_search() -> None:
    problem = mlp((4, 6, 3))
    wrong = nf.declare(problem.model, "diagonal", [("0.weight", 0)], [("2.weight", 1)])
    eq = wrongly_solved(problem, wrong)
    eq = dataclasses.replace(eq, symmetries=dataclasses.replace(wrong, example_inputs=problem.data[0]))
    before = problem.tensors()
    with pytest.raises(CertificateError, match="changed the outputs"):
        nf.balance_(problem.model, eq)
    assert all(torch.equal(t, before[n]) for n, t in problem.tensors().items())


def test_a_certificate_never_loosens_the_check_of_the_outputs() -> None:
    """A wrong symmetry whose certificate says that it changes outputs by 33 % must not pass for that."""
    problem = mlp((4, 6, 3))
    wrong = nf.declare(problem.model, "diagonal", [("0.weight", 0)], [("2.weight", 1)])
    eq = wrongly_solved(problem, wrong)
    certificate = nf.certify(problem.model, wrong, problem.data[0])
    rows = tuple(dataclasses.replace(r, verdict="approximate") for r in certificate)
    assert max(r.outputs for r in rows) > 1e-2
    certificate = dataclasses.replace(certificate, rows=rows)
    with pytest.raises(CertificateError, match=r"more than the tolerance 1\.82e-11"):
        nf.balance_(problem.model, eq, example_inputs=problem.data[0], certificate=certificate)


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1.8190e-11), (torch.float32, 6.4155e-5), (torch.bfloat16, 0.26278)]
)
def test_the_default_tolerance_is_ten_eps_to_three_quarters(dtype: torch.dtype, limit: float) -> None:
    assert OutputCheck().limit([torch.float64, dtype], []) == pytest.approx(limit, rel=1e-4)
    assert OutputCheck(tolerance=0.5).limit([dtype], []) == 0.5


def test_outputs_may_change_by_the_default_tolerance_and_no_more() -> None:
    """The last layer is scaled by `1 + c` as if that were a symmetry: outputs change by exactly `c`."""
    for change, passes in ((1.5e-11, True), (2.2e-11, False)):
        problem = mlp((4, 6, 3))
        wrong = nf.declare(problem.model, "scalar", [("2.weight", 0), ("2.bias", 0)], family="one-sided")
        eq = wrongly_solved(problem, wrong)
        settled = dataclasses.replace(eq.settled[0], element=torch.tensor([1 + change], dtype=torch.float64))
        eq = dataclasses.replace(eq, settled=(settled,))
        if passes:
            assert nf.balance_(problem.model, eq, example_inputs=problem.data[0]).output_change == pytest.approx(
                change, rel=1e-3
            )
        else:
            with pytest.raises(CertificateError, match="more than the tolerance"):
                nf.balance_(problem.model, eq, example_inputs=problem.data[0])


def test_a_list_is_one_argument_and_the_error_says_so() -> None:
    problem = mlp()
    with pytest.raises(DataError, match="tuple"):
        nf.balance_(problem.model, solved(problem), example_inputs=[problem.data[0]])


# --- state by optimiser class ----------------------------------------------------------------------------------------


class Averaging(torch.optim.Optimizer):
    """Weights follow a second iterate `z`, as schedule-free optimisers do."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            if not state:
                state["z"], state["exp_avg"] = p.clone(), torch.zeros_like(p)
            state["exp_avg"].lerp_(p.grad, 0.1)
            state["z"].sub_(state["exp_avg"], alpha=self.param_groups[0]["lr"])
            p.lerp_(state["z"], 0.2)


def test_an_iterate_without_a_rule_is_refused() -> None:
    problem = mlp(scales=(3, 1, 1))
    optimizer = Averaging(problem.model.parameters(), lr=1e-4)
    train(problem, optimizer)
    before = problem.tensors()
    with pytest.raises(DataError, match=r"0\.weight: .*'z' .*iterate of the weights.*state_rule"):
        nf.balance_(problem.model, solved(problem), optimizer, example_inputs=problem.data[0])
    assert all(torch.equal(t, before[n]) for n, t in problem.tensors().items())


def test_state_of_an_unknown_class_stays_and_a_registered_one_moves() -> None:
    class Own(Averaging):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            super().step()
            for state in self.state.values():
                state["z"].mul_(100)  # no longer near the weights

    for registered in (False, True):
        problem = mlp(scales=(3, 1, 1))
        optimizer = Own(problem.model.parameters(), lr=1e-4)
        train(problem, optimizer, 1)
        if registered:
            state_rule(Own)(lambda settings: {"z": LIKE_WEIGHT, "exp_avg": left("it is ours")})
        weight = problem.model[0].weight
        old, before = optimizer.state[weight]["z"].clone(), weight.detach().clone()
        report = nf.balance_(problem.model, solved(problem), optimizer, example_inputs=problem.data[0])
        factor = weight.detach() / before if registered else torch.ones_like(before)
        torch.testing.assert_close(optimizer.state[weight]["z"], old * factor, rtol=1e-12, atol=0)
        lines = [line for line in report.unmoved if line.startswith("0.weight")]
        assert len(lines) == 2 - registered
        if registered:
            assert "it is ours" in lines[0]


def test_a_subclass_with_its_own_step_is_another_class() -> None:
    class Twisted(torch.optim.Adam):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    class Same(torch.optim.Adam):
        pass

    assert list(state_rule_of(Same([torch.zeros(2)])).moves({})) == ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]
    assert not state_rule_of(Twisted([torch.zeros(2)])).moves({})


@pytest.mark.parametrize(
    "kind",
    [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop,
     torch.optim.Adagrad, torch.optim.ASGD, torch.optim.Muon],
)  # fmt: skip
def test_a_saved_state_is_known_by_its_settings(kind: Any) -> None:
    optimizer = kind([torch.zeros(2, 2)], lr=0.1)
    settings = optimizer.state_dict()["param_groups"][0]
    assert dict(saved_state_rule(settings).moves(settings)) == dict(state_rule_of(optimizer).moves(settings))


def test_a_saved_state_of_nobodys_settings_has_no_rule() -> None:
    assert not saved_state_rule({"lr": 0.1, "betas": (0.9, 0.99), "precondition_frequency": 10}).moves({})


def test_composite_optimisers_are_looked_into_and_shared_state_moves_once() -> None:
    class Composite(torch.optim.Optimizer):
        def __init__(self, params: list[Tensor]) -> None:
            super().__init__(params, {})
            self.parts = {
                "matrices": torch.optim.SGD([p for p in params if p.ndim == 2], lr=1e-3, momentum=0.9),
                "rest": [torch.optim.AdamW([p for p in params if p.ndim == 1], lr=1e-3)],
            }
            self.state = self.parts["matrices"].state

        def step(self, closure: Any = None) -> None:
            self.parts["matrices"].step()
            self.parts["rest"][0].step()

    problem = mlp(scales=(3, 1, 1))
    state_rule(Composite)(lambda settings: {"momentum_buffer": LIKE_GRADIENT})
    optimizer = Composite(list(problem.model.parameters()))
    train(problem, optimizer)
    weight, bias = problem.model[0].weight, problem.model[0].bias
    buffer = optimizer.parts["matrices"].state[weight]["momentum_buffer"].clone()
    square = optimizer.parts["rest"][0].state[bias]["exp_avg_sq"].clone()
    old = weight.detach().clone(), bias.detach().clone()
    nf.balance_(problem.model, solved(problem), optimizer, example_inputs=problem.data[0])
    torch.testing.assert_close(optimizer.state[weight]["momentum_buffer"], buffer * old[0] / weight.detach())
    moved = optimizer.parts["rest"][0].state[bias]["exp_avg_sq"]
    torch.testing.assert_close(moved, square * (old[1] / bias.detach()) ** 2)


def test_an_equilibrium_is_not_applied_twice_nor_to_another_model() -> None:
    problem = mlp(scales=(3, 1, 1))
    eq, inputs = solved(problem), problem.data[0]
    nf.balance_(problem.model, eq, example_inputs=inputs)
    at_equilibrium = problem.tensors()
    other = mlp(scales=(1, 1, 3), seed=5)
    for model in (problem.model, other.model):
        with pytest.raises(DataError, match="has the model been moved or trained since"):
            nf.balance_(model, eq, example_inputs=inputs)
    assert all(torch.equal(problem.tensors()[n], t) for n, t in at_equilibrium.items())


def test_a_forward_that_draws_is_compared_with_equal_draws() -> None:
    class Noisy(torch.nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.dropout(super().forward(x), 0.5, True)

    problem = mlp(scales=(3, 1, 1))
    eq, noisy = solved(problem), Noisy(*problem.model)
    report = nf.balance_(noisy, eq, example_inputs=problem.data[0])
    assert report.output_change is not None
    assert report.output_change < 1e-12


def test_an_equilibrium_of_adam_is_not_applied_twice() -> None:
    """Its charges are preconditioned, which weights alone do not tell; those of the weights are kept beside them."""
    model, x, syms, moments = _measured()
    eq = nf.noise_equilibrium(model, syms, moments, nf.AdamConfig(lr=1e-3, batch_size=2, weight_decay=0.1))
    assert eq.assumptions
    nf.balance_(model, eq, example_inputs=x)
    with pytest.raises(DataError, match="away from where the equilibrium was solved"):
        nf.balance_(model, eq, example_inputs=x)


def test_an_equilibrium_of_adam_is_not_applied_to_a_file_of_other_weights(tmp_path: Path) -> None:
    """Nor where the model given has no weights to compare the file with."""
    model, _, syms, moments = _measured()
    eq = nf.noise_equilibrium(model, syms, moments, nf.AdamConfig(lr=1e-3, batch_size=2, weight_decay=0.1))
    outline = copy.deepcopy(model).to("meta")
    own, other = tmp_path / "own.safetensors", tmp_path / "other.safetensors"
    save_file(model.state_dict(), own)
    save_file({n: (2 if n == "0.weight" else 1) * t for n, t in model.state_dict().items()}, other)
    nf.balance_checkpoint(own, tmp_path / "out.safetensors", outline, eq, unchecked=True)
    with pytest.raises(DataError, match="is it of another checkpoint"):
        nf.balance_checkpoint(other, tmp_path / "no.safetensors", outline, eq, unchecked=True)


def test_parameters_frozen_after_the_solve_are_not_moved() -> None:
    model, x, syms, moments = _measured()
    eq = nf.noise_equilibrium(model, syms, moments, nf.SGDConfig(lr=0.1, batch_size=8))
    model[0].weight.requires_grad_(False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(DataError, match=r"'0.weight'.*are frozen.*solve again"):
        nf.balance_(model, eq, example_inputs=x)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    model[0].weight.requires_grad_(True)
    assert nf.balance_(model, eq, example_inputs=x).moved


def _measured() -> tuple[nn.Sequential, Tensor, nf.SymmetrySet, nf.GradientMoments]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    x = torch.randn(64, 3, dtype=torch.float64)
    syms = nf.find_symmetries(model, x[:2])
    return model, x, syms, nf.gradient_moments(model, lambda m, b: m(b).square().sum(1), [x], syms, entries=True)


def test_a_certificate_of_an_approximate_symmetry_does_not_stand_for_a_comparison() -> None:
    """A LayerNorm over two entries: outputs change by percents, though the certificate says approximate."""
    model, x, syms, moments = _before_a_norm(2, seed=2)
    certificate = nf.certify(model, syms, x[:32])
    assert certificate.rows[0].verdict == "approximate"
    eq = nf.noise_equilibrium(model, syms, moments, nf.SGDConfig(0.05, 16, weight_decay=1e-3))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(CertificateError, match=r"more than the tolerance 3\.91e-03"):
        nf.balance_(model, eq, certificate=certificate)
    forgetful = dataclasses.replace(eq, symmetries=dataclasses.replace(eq.symmetries, example_inputs=None))
    with pytest.raises(CertificateError, match="approximate: outputs change by as much as it is moved"):
        nf.balance_(model, forgetful, certificate=certificate)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert nf.balance_(model, eq, certificate=certificate, tolerance=0.5).output_change > 1e-2


@pytest.mark.parametrize("width", [2, 4, 16])
def test_what_eps_leaves_of_the_imbalance_is_of_the_order_that_is_said(width: int) -> None:
    """Noise measured again after the move, against `gradients off by` of the certificate times the square of the
    factor; the equilibrium itself, solved for eps 0, says 1e-11.
    """
    model, x, syms, moments = _before_a_norm(width, seed=0)
    sgd = nf.SGDConfig(0.05, 16, weight_decay=1e-3)
    row = nf.certify(model, syms, x[:32]).rows[0]
    eq = nf.noise_equilibrium(model, syms, moments, sgd)
    factor = eq.settled[0].largest_change
    assert f"about {factor**2:.2g} times what nf.certify finds gradients off by for {row.name}" in str(eq)
    nf.balance_(model, eq, example_inputs=x, tolerance=1.0)
    again = nf.gradient_moments(model, lambda m, b: m(b).square().sum(1), [x], syms, entries=True)
    left = float(nf.noise_equilibrium(model, syms, again, sgd)[row.name].imbalance_now.max())
    assert eq.imbalance < 1e-10
    assert left > 1e3 * eq.imbalance
    assert left < 10 * row.gradients * factor**2


def _before_a_norm(width: int, seed: int) -> tuple[nn.Sequential, Tensor, nf.SymmetrySet, nf.GradientMoments]:
    torch.manual_seed(seed)
    layers = (nn.Linear(4, width), nn.LayerNorm(width), nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 2))
    model, x = nn.Sequential(*layers).double(), torch.randn(256, 4, dtype=torch.float64)
    found = nf.find_symmetries(model, x[:32])
    syms = found.without({s.name: "not asked for" for s in found if s.eps is None})
    loss = lambda m, b: m(b).square().sum(1)
    return model, x, syms, nf.gradient_moments(model, loss, [x], syms, entries=True)
