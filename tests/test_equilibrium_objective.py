"""Objectives from outside and without moments, and the free test that refuses moments of another loss or other
weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import noetherflow as nf
from equilibrium_cases import Problem, linear, mlp, moved
from noetherflow import extend
from noetherflow.equilibrium import objective as registry
from noetherflow.equilibrium.invariance import first_order
from noetherflow.errors import DataError, MomentError
from noetherflow.moments import gradient_factors
from reference import moments_by_loop, per_sample_gradients

SGD = nf.SGDConfig(0.05, 4)


@pytest.fixture
def clean_registry() -> Iterator[None]:
    before = dict(registry._OBJECTIVES)
    yield
    registry._OBJECTIVES.clear()
    registry._OBJECTIVES.update(before)


@pytest.mark.usefixtures("clean_registry")
def test_an_objective_from_outside_is_solved_for() -> None:
    """`norm + second`: the closed form of one hidden layer, by hand."""

    @extend.objective("both", meaning="norm and noise alike")
    def both(moments: nf.GradientMoments, sgd: nf.SGDConfig | None) -> extend.Potential:
        return extend.Potential(norm=2.0, second=1.0, mean=0.0)

    problem = mlp((4, 5, 3))
    moments = problem.measure()
    eq = nf.noise_equilibrium(problem.model, problem.syms, moments, objective="both")
    s, params = problem.syms[0], problem.tensors()
    k, m = s.grams(params), moments.second[s.name]
    x, y = 2 * (k[0] + k[1]) + m[2], 2 * k[2] + m[0] + m[1]
    torch.testing.assert_close(eq.settled[0].element, (y / x) ** 0.25, rtol=1e-9, atol=0)
    assert eq.objective == "both"
    assert "both" in [o.name for o in registry.objectives()]
    with pytest.raises(DataError, match="exists already"):
        extend.objective("norm", meaning="another")(both)
    with pytest.raises(DataError, match="gradient, curvature, none"):
        extend.objective("other", meaning="bad", moments="samples")  # type: ignore[arg-type]


@pytest.mark.usefixtures("clean_registry")
def test_an_objective_without_a_minimum_is_refused() -> None:
    extend.objective("up", meaning="greatest norm", moments="none")(lambda m, s: extend.Potential(-1.0, 0.0, 0.0))
    problem = mlp((4, 5, 3))
    with pytest.raises(DataError, match="no minimum"):
        nf.noise_equilibrium(problem.model, problem.syms, None, objective="up")


@pytest.mark.parametrize("joint", [True, False])
def test_the_norm_objective_needs_no_moments(joint: bool) -> None:
    problem = mlp((4, 5, 6, 3), (3, 0.2, 1))
    eq = nf.noise_equilibrium(problem.model, problem.syms, None, objective="norm", joint=joint)
    given = nf.noise_equilibrium(problem.model, problem.syms, problem.measure(), objective="norm", joint=joint)
    for s in problem.syms:
        torch.testing.assert_close(eq[s.name].element, given[s.name].element, rtol=1e-12, atol=0)
    with pytest.raises(MomentError, match="needs moments"):
        nf.noise_equilibrium(problem.model, problem.syms, None, SGD)


def test_the_norm_objective_needs_no_samples_where_general_linear_legs_meet() -> None:
    problem = linear((4, 3, 3, 5))
    eq = nf.noise_equilibrium(problem.model, problem.syms, None, objective="norm")
    assert eq.converged
    a, b, c = (p.detach() for p in moved(problem.model, problem.syms, eq.elements).parameters())
    torch.testing.assert_close(a @ a.mT, b.mT @ b, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(b @ b.mT, c.mT @ c, rtol=1e-8, atol=1e-9)


def _penalised(weight: float, problem: Problem):  # type: ignore[no-untyped-def]
    return lambda model, batch: problem.loss(model, batch) + weight * model[0].weight.square().sum()


@pytest.mark.parametrize("family", ["torus", "general_linear"])
def test_first_order_is_the_derivative_of_the_loss_along_every_generator(family: str) -> None:
    """`d l / d lam` along `exp(lam A)` by autograd, for a loss that breaks the symmetry."""
    problem = mlp((4, 5, 3)) if family == "torus" else linear((4, 3, 5))
    loss = _penalised(0.3, problem)
    moments = moments_by_loop(problem.model, loss, [problem.data], problem.syms)
    s, params = problem.syms[0], problem.tensors()
    found = first_order(s, params, moments).value

    def along(a: torch.Tensor) -> torch.Tensor:
        if s.is_torus:
            grow, shrink = (lambda w: a.exp()[:, None] * w), (lambda w: w / a.exp())
        else:
            grow, shrink = (lambda w: torch.matrix_exp(a[0]) @ w), (lambda w: w @ torch.matrix_exp(-a[0]))
        last = "2.weight" if s.is_torus else "1.weight"
        here = dict(params)
        here["0.weight"], here[last] = grow(here["0.weight"]), shrink(here[last])
        if s.is_torus:
            here["0.bias"] = a.exp() * here["0.bias"]
        out = torch.func.functional_call(problem.model, here, (problem.data[0],))
        return (out - problem.data[1]).square().sum(1).mean() + 0.3 * here["0.weight"].square().sum()

    slope = torch.func.grad(along)(torch.zeros(s.shape, dtype=torch.float64))
    torch.testing.assert_close(found, slope, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", ["torus", "general_linear"])
@pytest.mark.parametrize("verb", [nf.noether_flow, nf.noise_equilibrium])
def test_a_loss_that_breaks_the_symmetry_is_refused(family: str, verb) -> None:  # type: ignore[no-untyped-def]
    problem = mlp((4, 5, 3)) if family == "torus" else linear((4, 3, 5))
    verb(problem.model, problem.syms, problem.measure(), SGD)
    for weight in (1e-3, 1.0):
        moments = moments_by_loop(problem.model, _penalised(weight, problem), [problem.data], problem.syms)
        with pytest.raises(MomentError, match=r"0\.weight.*theta\^T A gbar.*loss_fn"):
            verb(problem.model, problem.syms, moments, SGD)
        nf.noise_equilibrium(problem.model, problem.syms, moments, objective="norm")


def test_stale_moments_are_refused_also_after_one_small_step() -> None:
    problem = mlp((4, 5, 3))
    moments = problem.measure()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=1e-3)
    problem.loss(problem.model, problem.data).mean().backward()
    optimizer.step()
    with pytest.raises(MomentError, match="measure again"):
        nf.noise_equilibrium(problem.model, problem.syms, moments, SGD)


def test_another_models_moments_are_refused() -> None:
    problem, other = mlp((4, 5, 3)), mlp((4, 5, 3), seed=1)
    with pytest.raises(MomentError, match="another model"):
        nf.noise_equilibrium(problem.model, problem.syms, other.measure(), SGD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_of_coarse_weights_is_not_taken_for_a_broken_symmetry(dtype: torch.dtype) -> None:
    """At random weights and at a minimum, where the mean gradient is small against the gradients."""
    problem = mlp((6, 16, 16, 3), samples=64)
    model, data = problem.model.to(dtype), tuple(v.to(dtype) for v in problem.data)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for k in range(300):
        if k % 100 == 0:
            moments = nf.gradient_moments(model, problem.loss, [data], problem.syms, entries=True)
            nf.noise_equilibrium(model, problem.syms, moments, SGD)
        optimizer.zero_grad()
        problem.loss(model, data).mean().backward()
        optimizer.step()
    broken = nf.gradient_moments(model, _penalised(1.0, problem), [data], problem.syms, entries=True)
    if dtype == torch.float32:
        with pytest.raises(MomentError):
            nf.noise_equilibrium(model, problem.syms, broken, SGD)


def test_a_vanished_mean_gradient_is_judged_against_the_noise() -> None:
    """At the exact minimum `gbar` is rounding, and its shares mean nothing."""
    torch.manual_seed(0)
    x, noise = torch.randn(32, 3, dtype=torch.float64), torch.randn(32, 2, dtype=torch.float64)
    noise -= x @ torch.linalg.lstsq(x, noise).solution
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)).double()
    y = model(x).detach() + noise
    syms = nf.find_symmetries(model, x[:2])
    loss = lambda m, batch: (m(batch[0]) - batch[1]).square().sum(1)
    moments = nf.gradient_moments(model, loss, [(x, y)], syms)
    test = first_order(syms[0], nf.tensors_of(model), moments)
    assert float(test.share().max()) > 1e-6, "the share alone would refuse this"
    assert nf.noise_equilibrium(model, syms, moments, SGD).converged


def test_minibatches_along_a_run_are_accepted() -> None:
    problem = mlp((4, 6, 3))
    batches = [tuple(v[i * 4 : i * 4 + 4] for v in problem.data) for i in range(10)]
    moments = nf.minibatch_moments(problem.model, problem.loss, batches, problem.syms, batch_size=4)
    drifted = copy.deepcopy(problem.model)
    with torch.no_grad():
        for p in drifted.parameters():
            p.mul_(1.02)
    assert nf.noise_equilibrium(drifted, problem.syms, moments, SGD).converged


def stretched(condition: float) -> tuple[Problem, torch.Tensor]:
    problem = linear((6, 4, 5))
    s = problem.syms[0]
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))).Q
    spectrum = torch.logspace(0, 1, 4, dtype=torch.float64) ** torch.log10(torch.tensor(condition).double())
    element = (rotation * spectrum) @ rotation.mT
    s.act_(nf.tensors_of(problem.model), element[None])
    return problem, element


@pytest.mark.parametrize("condition", [1e6, 1e8])
def test_stretched_factors_reach_the_same_point_by_measuring_again(condition: float) -> None:
    """The equilibrium of a stretched network is that of the plain one; the imbalance there is measured anew."""
    plain = linear((6, 4, 5))
    expected = nf.noise_equilibrium(plain.model, plain.syms, plain.measure(), SGD).settled[0].charge
    problem, _ = stretched(condition)
    eq = nf.noise_equilibrium(problem.model, problem.syms, problem.measure(), SGD, remeasure=problem.measure)
    assert eq.settled[0].classification == "finite"
    assert eq.converged
    values = torch.linalg.eigvalsh(eq.settled[0].charge)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(expected), rtol=1e-5, atol=1e-6)
    there = moved(problem.model, problem.syms, eq.elements)
    plus, minus = problem.measure(there).batch_grams(problem.syms[0], SGD)
    assert float((plus - minus).abs().max() / plus.abs().max()) < 1e-5


def test_stretched_factors_without_a_way_out_are_called_ill_conditioned() -> None:
    """Second moments of condition 1e16 are positive or not by the last bit, which depends on the processor: the answer
    says what is the matter either way.
    """
    problem, _ = stretched(1e8)
    try:
        eq = nf.noise_equilibrium(problem.model, problem.syms, problem.measure(), SGD)
    except MomentError as refused:
        said = str(refused)
    else:
        assert eq.settled[0].classification == "ill-conditioned"
        said = f"{eq} {eq.settled[0].reason}"
        assert "more samples" not in said
    assert "orthogonalise" in said
    assert "ill-conditioned" in said
    fair, _ = stretched(1e6)
    only = nf.noise_equilibrium(fair.model, fair.syms, fair.measure(), SGD).settled[0]
    assert (only.classification, only.reason[:10]) == ("finite", "few digits")
    tame, _ = stretched(1e2)
    assert nf.noise_equilibrium(tame.model, tame.syms, tame.measure(), SGD).settled[0].reason == ""


def test_the_advice_for_ill_conditioned_factors_works() -> None:
    problem, _ = stretched(1e8)
    x = problem.data[0]
    nf.balance_(
        problem.model, nf.noise_equilibrium(problem.model, problem.syms, None, objective="norm"), example_inputs=x,
        tolerance=1e-4,
    )  # fmt: skip
    first, second = (p.detach() for p in problem.model.parameters())
    torch.testing.assert_close(first @ first.mT, second.mT @ second, rtol=1e-5, atol=1e-7)
    eq = nf.noise_equilibrium(problem.model, problem.syms, problem.measure(), SGD)
    assert (eq.settled[0].classification, eq.settled[0].reason) == ("finite", "")


def test_a_low_rank_is_no_stretch() -> None:
    problem = linear((6, 4, 5))
    with torch.no_grad():
        problem.model[0].weight[:] = torch.randn(4, 2, dtype=torch.float64) @ torch.randn(2, 6, dtype=torch.float64)
    eq = nf.noise_equilibrium(problem.model, problem.syms, problem.measure(), nf.SGDConfig(0.05, 4, weight_decay=0.1))
    assert eq.settled[0].classification == "degenerate"


def test_samples_of_stretched_factors_are_not_needed_for_the_norm() -> None:
    problem = linear((4, 3, 3, 5))
    factors = gradient_factors(problem.model, problem.loss, [problem.data], problem.syms)
    assert factors
    given = nf.noise_equilibrium(problem.model, problem.syms, problem.measure(), objective="norm", samples=factors)
    none = nf.noise_equilibrium(problem.model, problem.syms, None, objective="norm")
    for s in problem.syms:
        torch.testing.assert_close(given[s.name].charge, none[s.name].charge, rtol=1e-9, atol=1e-10)
    assert per_sample_gradients(problem.model, problem.loss, problem.data)


class OffsetGain(nn.Module):
    """`W2 ((1 + g) * W1 x)`: the group scales `1 + g`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5, bias=False), nn.Linear(5, 3)
        self.gain = nn.Parameter(torch.randn(5) * 0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last((1 + self.gain) * self.first(x))


def test_a_gain_with_an_offset_settles_where_its_noise_is_balanced() -> None:
    """The move is affine in the stored gain; noise measured again at the equilibrium, and the step identity."""
    torch.manual_seed(0)
    model = OffsetGain().double()
    shapes = nf.declare(model, "diagonal", [("gain", 0)], [("last.weight", 1)], offsets={"gain": 1.0})
    x, y = torch.randn(30, 4, dtype=torch.float64), torch.randn(30, 3, dtype=torch.float64)
    problem = Problem(model, shapes, (x, y))
    eq = nf.noise_equilibrium(model, shapes, problem.measure(), SGD)
    there = moved(model, shapes, eq.elements)
    torch.testing.assert_close(there(x).detach(), model(x).detach(), rtol=1e-12, atol=1e-12)
    plus, minus = problem.measure(there).batch_grams(shapes[0], SGD)
    torch.testing.assert_close(plus, minus, rtol=1e-9, atol=0)
    flow = nf.noether_flow(model, shapes, problem.measure(), SGD)
    by_hand = ((1 + model.gain).square() - model.last.weight.square().sum(0)).detach()
    torch.testing.assert_close(flow.details[0].charge, by_hand)
    decayed = nf.SGDConfig(0.05, 4, weight_decay=0.1)
    assert "gain" in nf.noether_flow(model, shapes, problem.measure(), decayed).excluded[shapes[0].name]
    assert "gain" in nf.noise_equilibrium(model, shapes, problem.measure(), decayed).excluded[shapes[0].name]


@pytest.mark.parametrize("decay", [0.0, 0.7])
@pytest.mark.parametrize("broken", [False, True])
def test_the_step_identity_is_exact_term_by_term(decay: float, broken: bool) -> None:
    """Also where the gradient does not obey the symmetry: then its own term is all of the residual."""
    torch.manual_seed(0)
    model = OffsetGain().double()
    syms = nf.declare(model, "diagonal", [("gain", 0)], [("last.weight", 1)], offsets={"gain": 1.0})
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, weight_decay=decay)
    loss = (model(x) - y).square().sum(1).mean() + (model.gain.square().sum() if broken else 0.0)
    loss.backward()
    before = {n: t.detach().clone() for n, t in nf.tensors_of(model).items()}
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    after = {n: t.detach() for n, t in nf.tensors_of(model).items()}
    step = nf.step_identity(syms[0], before, gradients, after, nf.SGDConfig(0.3, 8, weight_decay=decay))
    torch.testing.assert_close(step.residual, step.gradient, rtol=1e-10, atol=1e-12)
    assert (float(step.gradient.abs().max()) > 1e-3) == broken


def test_the_gradient_term_of_the_step_identity_is_taken_at_the_decayed_weights() -> None:
    problem = mlp((4, 5, 3))
    wrong = nf.declare(problem.model, "diagonal", [("0.weight", 0)], [("2.weight", 1)])
    sgd = nf.SGDConfig(0.3, 40, weight_decay=1.0)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=sgd.lr, weight_decay=sgd.weight_decay)
    problem.loss(problem.model, problem.data).mean().backward()
    before = problem.tensors()
    gradients = {n: p.grad.clone() for n, p in problem.model.named_parameters() if p.grad is not None}
    optimizer.step()
    step = nf.step_identity(wrong[0], before, gradients, problem.tensors(), sgd)
    torch.testing.assert_close(step.gradient, step.residual, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(step.decay, (0.7**2 - 1) * wrong[0].charge(before), rtol=1e-12, atol=0)
    assert float(step.gradient.abs().max()) > 1e-2


@pytest.mark.usefixtures("clean_registry")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3.5, r"must give a Potential\(norm=..., second=..., mean=...\), got 3.5"),
        (extend.Potential(float("nan"), 1.0, 0.0), "finite coefficients"),
        (extend.Potential(float("inf"), 1.0, 0.0), "finite coefficients"),
        (extend.Potential(0.0, 0.0, 0.0), "not all 0"),
        (extend.Potential(0.1, 1.0, -20.0), "second \\+ mean must not be negative"),
        (extend.Potential(-0.1, 1.0, 0.0), "must not be negative"),
    ],
)
def test_coefficients_without_a_minimum_are_refused(given, message) -> None:
    extend.objective("odd", meaning="odd")(lambda moments, sgd: given)
    problem = mlp((4, 5, 3))
    with pytest.raises(DataError, match=message):
        nf.noise_equilibrium(problem.model, problem.syms, problem.measure(), objective="odd")


@pytest.mark.usefixtures("clean_registry")
def test_pure_noise_is_an_objective_and_weighing_gradients_without_moments_is_none() -> None:
    extend.objective("pure noise", meaning="")(lambda moments, sgd: extend.Potential(0.0, 1.0, -1.0))
    extend.objective("lying", meaning="", moments="none")(lambda moments, sgd: extend.Potential(1.0, 1.0, 0.0))
    problem = mlp((4, 5, 3))
    moments = problem.measure()
    assert nf.noise_equilibrium(problem.model, problem.syms, moments, objective="pure noise").converged
    with pytest.raises(DataError, match="moments='none' but weighs gradients"):
        nf.noise_equilibrium(problem.model, problem.syms, moments, objective="lying")
