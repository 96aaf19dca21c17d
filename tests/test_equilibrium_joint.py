"""The joint equilibrium of whole networks against re-measured noise and independent references."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

import noetherflow as nf
from equilibrium_cases import Problem, imbalance, linear, mlp, moved, union
from noetherflow.core import spd
from noetherflow.equilibrium import noise_equilibrium
from noetherflow.equilibrium.solve import classify
from noetherflow.equilibrium.solve import imbalance as imbalance_of
from noetherflow.errors import DataError, MomentError
from noetherflow.moments import Factors, gradient_factors
from noetherflow.moments.result import merge_moments
from reference import moments_by_loop, per_sample_gradients

SGD = nf.SGDConfig(0.05, 4)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


def samples_of(problem: Problem) -> dict[str, torch.Tensor]:
    gradients = per_sample_gradients(problem.model, problem.loss, problem.data)
    return {n: torch.stack([g[n] for g in gradients]) for n in gradients[0]}


@pytest.mark.parametrize("decay", [0.0, 1e-3])
def test_mis_scaled_mlp_is_balanced_by_one_measurement(decay: float) -> None:
    problem = mlp((20, 30, 40, 25, 5), (10, 0.1, 3, 0.3), seed=1, samples=96)
    assert problem.syms.n_charges() == 95
    sgd = nf.SGDConfig(0.1, 8, weight_decay=decay)
    eq = noise_equilibrium(problem.model, problem.syms, problem.measure(), sgd)
    other = moved(problem.model, problem.syms, eq.elements)
    assert eq.converged
    assert imbalance(problem, problem.model, sgd) > 0.5
    assert imbalance(problem, other, sgd) < 1e-10
    x = problem.data[0]
    assert relative(other(x).detach(), problem.model(x).detach()) < 1e-12


def test_predicted_charges_and_grams_are_the_measured_ones() -> None:
    problem = mlp(scales=(4, 0.5, 1))
    sgd = nf.SGDConfig(0.1, 4, weight_decay=1e-2)
    eq = noise_equilibrium(problem.model, problem.syms, problem.measure(), sgd)
    other = moved(problem.model, problem.syms, eq.elements)
    again = problem.measure(other)
    params = {n: t.detach() for n, t in nf.tensors_of(other).items()}
    for s in problem.syms:
        torch.testing.assert_close(eq[s.name].charge, s.charge(params), rtol=1e-10, atol=1e-12)
        for predicted, measured in zip(eq[s.name].noise_grams, again.batch_grams(s, sgd), strict=True):
            torch.testing.assert_close(predicted, sgd.lr**2 * measured, rtol=1e-9, atol=1e-15)
    assert eq.norm == pytest.approx(
        sum(float(p.square().sum()) for n, p in params.items() if n in problem.syms.parameters)
    )


@pytest.mark.parametrize("kind", ["diagonal", "general_linear"])
def test_equilibrium_does_not_depend_on_the_point_of_the_orbit(kind: str) -> None:
    problem = linear((5, 3, 4), kind)
    sgd = nf.SGDConfig(0.05, 4, weight_decay=1e-2)
    (s,) = problem.syms
    start = {s.name: s.random_element(1.0, torch.Generator().manual_seed(3))}
    far = moved(problem.model, problem.syms, start)
    ends = []
    for model in (problem.model, far):
        eq = noise_equilibrium(model, problem.syms, problem.measure(model), sgd)
        ends.append(moved(model, problem.syms, eq.elements))
    assert relative(far[0].weight, problem.model[0].weight) > 0.3
    first, second = (end[0].weight.detach() for end in ends)
    if kind == "diagonal":
        assert relative(second, first) < 1e-10
    else:
        rotation = second @ torch.linalg.pinv(first)
        torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3, dtype=torch.float64), atol=1e-9, rtol=0)
        assert relative(second, first) > 1e-3
        assert relative(rotation @ first, second) < 1e-9
        assert relative(ends[0][1].weight @ rotation.mT, ends[1][1].weight) < 1e-9


def test_torus_network_reaches_the_same_point_from_everywhere_on_the_orbit() -> None:
    problem = mlp(scales=(3, 1, 0.2))
    rng = torch.Generator().manual_seed(5)
    far = moved(problem.model, problem.syms, {s.name: s.random_element(1.5, rng) for s in problem.syms})
    sgd = nf.SGDConfig(0.05, 4, weight_decay=1e-3)
    ends = []
    for model in (problem.model, far):
        eq = noise_equilibrium(model, problem.syms, problem.measure(model), sgd)
        ends.append(torch.cat([p.detach().flatten() for p in moved(model, problem.syms, eq.elements).parameters()]))
    assert relative(ends[1], ends[0]) < 1e-9


def test_chain_of_general_linear_symmetries() -> None:
    problem = linear((6, 3, 3, 5))
    sgd = nf.SGDConfig(0.05, 4, weight_decay=1e-2, dataset_size=60)
    moments = problem.measure()
    with pytest.raises(MomentError, match=r"samples=nf.gradient_factors.* remeasure=.* or joint=False"):
        noise_equilibrium(problem.model, problem.syms, moments, sgd)
    by_samples = noise_equilibrium(problem.model, problem.syms, moments, sgd, samples=samples_of(problem))
    by_measuring = noise_equilibrium(problem.model, problem.syms, moments, sgd, remeasure=problem.measure)
    factors = gradient_factors(problem.model, problem.loss, [problem.data], problem.syms)
    by_factors = noise_equilibrium(problem.model, problem.syms, moments, sgd, samples=factors)
    assert by_samples.converged
    assert by_measuring.converged
    assert by_factors.converged
    for s in problem.syms:
        torch.testing.assert_close(by_samples[s.name].charge, by_measuring[s.name].charge, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(by_samples[s.name].charge, by_factors[s.name].charge, rtol=1e-8, atol=1e-10)
        assert by_samples[s.name].classification == "finite"
    assert imbalance(problem, moved(problem.model, problem.syms, by_samples.elements), sgd) < 1e-10


def test_measuring_again_in_float32_converges_to_its_precision() -> None:
    problem = linear((6, 3, 3, 5))
    x, y = (t.float() for t in problem.data)
    narrow = Problem(problem.model.float(), problem.syms, (x, y))

    def measure(model: nn.Module) -> nf.GradientMoments:
        return nf.gradient_moments(model, narrow.loss, [(x, y)], narrow.syms)

    sgd = nf.SGDConfig(0.05, 4, weight_decay=1e-2, dataset_size=60)
    eq = noise_equilibrium(narrow.model, narrow.syms, measure(narrow.model), sgd, remeasure=measure)
    assert eq.converged
    assert eq.imbalance < 8 * torch.finfo(torch.float32).eps
    strict = noise_equilibrium(
        narrow.model, narrow.syms, measure(narrow.model), sgd, remeasure=measure, tol=1e-14, max_iterations=30
    )
    assert not strict.converged


def test_directions_beyond_the_rank_recede_as_far_as_asked() -> None:
    problem = linear((3, 6, 6, 2))
    sgd = nf.SGDConfig(0.05, 4, weight_decay=1e-2, dataset_size=60)
    left = {}
    for recede in (1e-1, 1e-2):
        eq = noise_equilibrium(
            problem.model, problem.syms, problem.measure(), sgd, samples=samples_of(problem), recede=recede, tol=1e-10
        )  # rounding leaves 2e-11 where some directions are 1e4 times smaller than others
        assert eq.converged
        assert all(s.classification == "degenerate" and "directions" in s.reason for s in eq)
        left[recede] = imbalance(problem, moved(problem.model, problem.syms, eq.elements), sgd)
    assert left[1e-2] < 0.2 * left[1e-1]


@pytest.mark.parametrize("joint", [True, False])
def test_badly_scaled_hidden_units_make_no_difference_to_a_general_linear_symmetry(joint: bool) -> None:
    """The charge at the equilibrium of the same function, its hidden units scaled by (1, 1e-6, 1e6)."""
    problem, sgd = linear((5, 3, 4)), nf.SGDConfig(0.01, 4, weight_decay=1e-3)
    (s,) = problem.syms
    good = noise_equilibrium(problem.model, problem.syms, problem.measure(), sgd)[s.name]
    scales = torch.diag(torch.tensor([1.0, 1e-6, 1e6], dtype=torch.float64))[None]
    bad = moved(problem.model, problem.syms, {s.name: scales})
    eq = noise_equilibrium(bad, problem.syms, problem.measure(bad), sgd, joint=joint)
    assert eq.converged
    assert imbalance(problem, moved(bad, problem.syms, eq.elements), sgd) < 1e-12
    torch.testing.assert_close(*(torch.linalg.eigvalsh(c) for c in (eq[s.name].charge, good.charge)))


@pytest.mark.parametrize("recede", [1e-7, 1e-9])
def test_far_receding_directions_leave_rounding_and_no_crash(recede: float) -> None:
    """Flow of the finite part is solved to `eps / recede`, what is left of the others falls with `recede`."""
    problem = linear((3, 6, 2))
    eq = noise_equilibrium(problem.model, problem.syms, problem.measure(), SGD, recede=recede)
    assert eq.imbalance < torch.finfo(torch.float64).eps / recede
    assert eq.settled[0].largest_change == pytest.approx(1 / recede, rel=1e-2)


def test_one_sweep_suffices_for_a_lone_symmetry() -> None:
    for problem in (mlp((5, 6, 2)), linear((5, 3, 4))):
        eq = noise_equilibrium(problem.model, problem.syms, problem.measure(), nf.SGDConfig(0.1, 4, weight_decay=1e-2))
        assert eq.iterations == 1


@pytest.mark.parametrize("problem", [mlp(scales=(5, 0.2, 1)), linear((6, 3, 3, 5))], ids=["torus", "general_linear"])
def test_no_point_of_the_orbit_is_below_the_joint_equilibrium(problem: Problem) -> None:
    """`2 Phi = lr w (2 - lr w) |theta|^2 + lr^2 Tr R_B`, measured: at identity, one by one, and near the minimum."""
    sgd = nf.SGDConfig(0.05, 4, weight_decay=1e-2)

    def phi(elements: dict[str, torch.Tensor]) -> float:
        model = moved(problem.model, problem.syms, elements)
        norm = sum(float(p.detach().square().sum()) for p in model.parameters())
        gradients = per_sample_gradients(model, problem.loss, problem.data)
        flat = torch.stack([torch.cat([g.flatten() for g in gs.values()]) for gs in gradients])
        trace = flat.var(0).sum() * (1 / sgd.batch_size - 1 / len(flat)) + flat.mean(0).square().sum()
        return sgd.lr * sgd.weight_decay * (2 - sgd.lr * sgd.weight_decay) * norm + sgd.lr**2 * float(trace)

    moments = problem.measure()
    eq = noise_equilibrium(problem.model, problem.syms, moments, sgd, remeasure=problem.measure)
    alone = noise_equilibrium(problem.model, problem.syms, moments, sgd, joint=False)
    best = phi(eq.elements)
    assert best < 0.99 * min(phi({}), phi(alone.elements))
    rng = torch.Generator().manual_seed(0)
    for size in (1e-3, 0.1):
        near = {s.name: s.compose(s.random_element(size, rng), eq[s.name].element) for s in problem.syms}
        assert phi(near) > best


def test_self_coupled_layer_and_unequal_powers() -> None:
    """A recurrent weight carries the same torus on both axes, a scale enters squared: the one solver does both."""
    torch.manual_seed(2)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.loop, self.last = nn.Linear(4, 5), nn.Linear(5, 5, bias=False), nn.Linear(5, 3)
            self.gain = nn.Parameter(torch.rand(5) + 0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.relu(self.first(x)) * self.gain.abs().sqrt()
            return self.last(torch.relu(self.loop(torch.relu(self.loop(h)))))

    model = Net().double()
    legs = [
        nf.Leg(name, torch.arange(5).reshape(5, 1, 1).numpy(), sign, (axis,), power=power)
        for name, sign, axis, power in [
            ("first.weight", 1, 0, 1.0),
            ("first.bias", 1, 0, 1.0),
            ("loop.weight", -1, 1, 1.0),
            ("loop.weight", 1, 0, 1.0),
            ("last.weight", -1, 1, 1.0),
        ]
    ]
    stream = nf.Symmetry("stream", "rescaling", "diagonal", tuple(legs))
    gain = nf.Symmetry(
        "gain",
        "rescaling",
        "diagonal",
        (
            nf.Leg("gain", torch.arange(5).reshape(5, 1, 1).numpy(), 1, (0,), power=2.0),
            nf.Leg("first.weight", torch.arange(5).reshape(5, 1, 1).numpy(), -1),
            nf.Leg("first.bias", torch.arange(5).reshape(5, 1, 1).numpy(), -1),
        ),
    )
    syms = nf.SymmetrySet((stream, gain), shapes={n: tuple(t.shape) for n, t in nf.tensors_of(model).items()})
    data = torch.randn(30, 4, dtype=torch.float64), torch.randn(30, 3, dtype=torch.float64)
    problem = Problem(model, syms, data)
    sgd = nf.SGDConfig(0.05, 4, weight_decay=1e-2)
    eq = noise_equilibrium(model, syms, problem.measure(), sgd)
    other = moved(model, syms, eq.elements)
    assert stream.self_coupled
    assert relative(other(data[0]), model(data[0])) < 1e-13
    moments, params = problem.measure(other), {n: t.detach() for n, t in nf.tensors_of(other).items()}
    decay = sgd.lr * sgd.weight_decay * (2 - sgd.lr * sgd.weight_decay)
    for s in syms:
        drift = -decay * s.charge(params) + sgd.lr**2 * s.combine(moments.batch_grams(s, sgd))
        assert float((drift.abs() / (decay * sum(s.grams(params)))).max()) < 1e-9


def test_shared_square_matrix_of_a_linear_recurrence() -> None:
    """`h = B W W A x`: one GL(3) acts on both axes of W, so Grams alone say nothing away from today's point."""
    torch.manual_seed(0)

    class Recurrence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.w, self.b = (nn.Linear(m, n, bias=False) for m, n in ((4, 3), (3, 3), (3, 4)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.w(self.w(self.a(x))))

    model = Recurrence().double()
    with torch.no_grad():
        model.a.weight *= 4
    data = torch.randn(30, 4, dtype=torch.float64), torch.randn(30, 4, dtype=torch.float64)
    everything = nf.find_symmetries(model, data[0][:3])
    problem, sgd = Problem(model, everything, data), nf.SGDConfig(0.01, 4, weight_decay=1e-3)
    moments = dataclasses.replace(problem.measure(), squares={})
    factors = gradient_factors(model, problem.loss, [data], everything)
    ways = [{"samples": samples_of(problem)}, {"samples": factors}, {"remeasure": problem.measure}]
    for way in ways:
        eq = noise_equilibrium(model, everything, moments, sgd, **way)  # type: ignore[arg-type]
        assert eq.converged
        assert imbalance(problem, moved(model, everything, eq.elements), sgd) < 1e-10
    assert imbalance(problem, model, sgd) > 0.5
    with pytest.raises(MomentError, match=r"of 'a .* others held: it moves entries of \['w.weight'\].*samples="):
        noise_equilibrium(model, everything, moments, sgd, joint=False)
    alone = noise_equilibrium(model, everything, problem.measure(), sgd, joint=False, samples=factors)
    for s in everything:
        own = Problem(model, nf.SymmetrySet((s,), shapes=everything.shapes), data)
        assert imbalance(own, moved(model, own.syms, alone.elements), sgd) < 1e-10
    flow = nf.noether_flow(model, everything, problem.measure(), sgd, samples=factors)
    for s in everything:
        torch.testing.assert_close(flow[s.name].equilibrium, alone[s.name].charge)


def test_factors_of_other_samples_are_refused() -> None:
    """Factors are right in sequence-first layers too; those of anything else than samples are refused."""
    problem = linear((5, 3, 3, 4))
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(6, 20, 5, dtype=torch.float64, generator=rng) * torch.rand(1, 20, 1, generator=rng).double()
    y = torch.randn(6, 20, 4, dtype=torch.float64, generator=rng)

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return (model(batch[0]) - batch[1]).square().sum((0, 2))

    moments = nf.gradient_moments(problem.model, loss, [(x, y)], problem.syms)
    gradients = [per_sample_gradients(problem.model, loss, (x[:, [i]], y[:, [i]]))[0] for i in range(20)]
    dense = {"1.weight": torch.stack([g["1.weight"] for g in gradients])}
    assert noise_equilibrium(problem.model, problem.syms, moments, SGD, samples=dense).converged
    factors = gradient_factors(problem.model, loss, [(x, y)], problem.syms)
    torch.testing.assert_close(factors["1.weight"].dense(), dense["1.weight"], rtol=1e-12, atol=1e-12)
    other = {"1.weight": Factors(*(t.roll(1, 0) for t in (factors["1.weight"].left, factors["1.weight"].right)))}
    assert noise_equilibrium(problem.model, problem.syms, moments, SGD, samples=other).converged, "in another order"
    sides = (t.flatten(0, 1).unsqueeze(1) for t in (factors["1.weight"].left, factors["1.weight"].right))
    by_token = {"1.weight": Factors(*sides)}
    with pytest.raises(DataError, match=r"samples of '1.weight' are not the gradients.*batch axis first"):
        noise_equilibrium(problem.model, problem.syms, moments, SGD, samples=by_token)
    with pytest.raises(DataError, match="not the gradients"):
        noise_equilibrium(problem.model, problem.syms, moments, SGD, samples={"1.weight": 1.01 * dense["1.weight"]})
    with pytest.raises(DataError, match="not the gradients"):
        noise_equilibrium(
            problem.model, problem.syms, moments, SGD, samples={"1.weight": torch.nan * dense["1.weight"]}
        )


def test_factors_of_layers_called_by_keyword_and_of_no_batches() -> None:
    class ByKeyword(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self:
                x = layer(input=x)
            return x

    problem = linear((5, 3, 3, 4))
    model = ByKeyword(*problem.model)
    by_name = gradient_factors(model, problem.loss, [problem.data], problem.syms)["1.weight"]
    torch.testing.assert_close(by_name.dense(), samples_of(problem)["1.weight"], rtol=1e-12, atol=1e-12)
    with pytest.raises(DataError, match="no batch to measure"):
        gradient_factors(problem.model, problem.loss, [], problem.syms)


def test_one_sided_scale_without_and_with_decay() -> None:
    """`2 w~ C = eta Tr R_B`; without decay the norm grows for ever, which is said and not clamped."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.LayerNorm(4, eps=0.0), nn.Linear(4, 2)).double()
    syms = nf.declare(model, "scalar", [("0.weight", 0)], family="one-sided")
    syms = nf.SymmetrySet((nf.Symmetry("scale", "one-sided", "scalar", _scalar_leg(syms[0].legs)),), shapes=syms.shapes)
    problem = Problem(model, syms, (torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 2, dtype=torch.float64)))
    moments = problem.measure()
    free = noise_equilibrium(model, syms, moments, SGD)
    assert free["scale"].classification == "one-sided"
    assert "grows for ever" in free["scale"].reason
    assert torch.equal(free["scale"].element, torch.ones(1, dtype=torch.float64))
    sgd = nf.SGDConfig(0.05, 4, weight_decay=1e-2)
    held = noise_equilibrium(model, syms, moments, sgd)["scale"]
    other = moved(model, syms, {"scale": held.element})
    norm = float(other[0].weight.detach().square().sum())
    trace = float(problem.measure(other).batch_grams(syms[0], sgd)[0])
    assert held.classification == "finite"
    assert 2 * sgd.weight_decay * (1 - sgd.lr * sgd.weight_decay / 2) * norm == pytest.approx(sgd.lr * trace, rel=1e-9)


@pytest.mark.parametrize("sign", [1, -1])
def test_one_sided_scale_grows_for_ever_whichever_sign_its_legs_have(sign: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.LayerNorm(4, eps=0.0), nn.Linear(4, 2)).double()
    rows = torch.arange(4).reshape(1, 1, 4).numpy()
    syms = nf.SymmetrySet((nf.Symmetry("scale", "one-sided", "scalar", (nf.Leg("0.weight", rows, sign, (0,)),)),))
    problem = Problem(model, syms, (torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 2, dtype=torch.float64)))
    only = noise_equilibrium(model, syms, problem.measure(), SGD)["scale"]
    assert only.classification == "one-sided"
    assert "grows for ever" in only.reason
    with torch.no_grad():
        model[2].weight.zero_()
    still = noise_equilibrium(model, syms, problem.measure(), SGD)["scale"]
    assert still.classification == "degenerate"
    assert "dead or unused" in still.reason


def _scalar_leg(legs: tuple[nf.Leg, ...]) -> tuple[nf.Leg, ...]:
    rows = torch.arange(4).reshape(1, 1, 4).numpy()
    return tuple(nf.Leg(leg.parameter, rows, leg.sign, leg.axes) for leg in legs)


def test_dead_and_cut_off_neurons_are_named() -> None:
    problem = mlp((4, 6, 3))
    with torch.no_grad():
        problem.model[0].bias[1] = -1e3
        problem.model[2].weight[:, 4] = 0
    moments = problem.measure()
    eq = noise_equilibrium(problem.model, problem.syms, moments, SGD)
    (only,) = eq
    assert only.classification == "degenerate"
    assert (~only.finite).nonzero().flatten().tolist() == [1, 4]
    assert "dead or unused" in only.reason
    assert "recedes to zero" in only.reason
    assert bool(torch.isfinite(only.element).all())
    assert only.element[1] == only.element[4] == 1
    assert "degenerate" in str(eq)
    held = noise_equilibrium(problem.model, problem.syms, moments, nf.SGDConfig(0.05, 4, weight_decay=1e-3))
    assert (~held.settled[0].finite).nonzero().flatten().tolist() == [4]


def test_lora_at_initialisation_is_degenerate() -> None:
    problem = linear((5, 2, 4))
    with torch.no_grad():
        problem.model[1].weight.zero_()
    eq = noise_equilibrium(problem.model, problem.syms, problem.measure(), nf.SGDConfig(0.05, 4, weight_decay=1e-3))
    (only,) = eq
    assert only.classification == "degenerate"
    assert torch.equal(only.element, torch.eye(2, dtype=torch.float64)[None])
    assert "2 directions" in only.reason


def test_frozen_parameters_exclude_their_symmetries() -> None:
    problem = mlp((4, 6, 5, 3))
    moments = problem.measure()
    problem.model[0].weight.requires_grad_(False)
    eq = noise_equilibrium(problem.model, problem.syms, moments, SGD)
    assert [s.name for s in eq] == [problem.syms[1].name]
    assert "frozen parameter 0.weight" in eq.excluded[problem.syms[0].name]


def test_objectives_on_the_same_orbit() -> None:
    problem = mlp(scales=(5, 1, 1))
    moments = problem.measure()
    norm = noise_equilibrium(problem.model, problem.syms, moments, objective="norm")
    for s in norm:
        torch.testing.assert_close(s.charge, torch.zeros_like(s.charge), atol=1e-8, rtol=0)
    fisher = noise_equilibrium(problem.model, problem.syms, moments, objective="fisher")
    noise = noise_equilibrium(problem.model, problem.syms, moments, SGD, objective="noise")
    traces = {}
    for name, eq in (("norm", norm), ("fisher", fisher), ("noise", noise)):
        again = problem.measure(moved(problem.model, problem.syms, eq.elements))
        traces[name] = sum(float(again.squares[n].sum()) for n in problem.syms.parameters)
        assert eq.trace is not None
    assert traces["fisher"] == pytest.approx(fisher.trace, rel=1e-9)
    assert traces["fisher"] < traces["noise"] < traces["norm"]
    with pytest.raises(ValueError, match="not one of"):
        noise_equilibrium(problem.model, problem.syms, moments, SGD, objective="loss")  # type: ignore[arg-type]
    with pytest.raises(MomentError, match="sgd=SGDConfig"):
        noise_equilibrium(problem.model, problem.syms, moments)


def test_norm_objective_is_enorm_and_path_rescaling() -> None:
    """ENorm (Stock et al. 2019) for p = 2: sweeps of `d = sqrt(|out| / |in|)` per neuron until norms agree."""
    problem = mlp((5, 7, 6, 3), (6, 0.2, 1))
    eq = noise_equilibrium(problem.model, problem.syms, problem.measure(), objective="norm", tol=1e-13)
    by_solver = moved(problem.model, problem.syms, eq.elements)
    by_enorm = copy.deepcopy(problem.model)
    with torch.no_grad():
        for _ in range(300):
            for i in (0, 2):
                first, second = by_enorm[i], by_enorm[i + 2]
                size = (first.weight.square().sum(1) + first.bias.square()).sqrt()
                d = (second.weight.norm(dim=0) / size).sqrt()
                first.weight *= d[:, None]
                first.bias *= d
                second.weight /= d
    for a, b in zip(by_solver.parameters(), by_enorm.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_separate_solve_holds_the_others() -> None:
    problem = mlp(scales=(4, 1, 0.3))
    moments = problem.measure()
    alone = noise_equilibrium(problem.model, problem.syms, moments, SGD, joint=False)
    for s in problem.syms:
        other = Problem(problem.model, problem.syms.filter(parameter=s.parameters[-1]), problem.data)
        own = nf.SymmetrySet((s,), shapes=problem.syms.shapes)
        single = noise_equilibrium(problem.model, own, moments, SGD)
        torch.testing.assert_close(alone[s.name].element, single[s.name].element, rtol=1e-9, atol=0)
        assert imbalance(Problem(other.model, own, other.data), moved(problem.model, own, single.elements), SGD) < 1e-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_small_singular_values_of_narrow_adapters_are_not_taken_for_rounding(dtype: torch.dtype) -> None:
    """Rank 8 down to a singular value of 0.03 is finite as in float64; rank 6 plus rounding still has rank 6."""
    torch.manual_seed(0)
    (left, _), (right, _), (mix, _) = (torch.linalg.qr(torch.randn(m, 8, dtype=torch.float64)) for m in (16, 16, 8))
    data = torch.randn(64, 16).to(dtype), torch.randn(64, 16).to(dtype)
    for rank in (8, 6):
        w = torch.logspace(0, -1.5, 8, dtype=torch.float64) * (torch.arange(8) < rank)
        problem = linear((16, 8, 16))
        with torch.no_grad():
            problem.model[0].weight.copy_((mix * w) @ right.mT)
            problem.model[1].weight.copy_((left * w) @ mix.mT)
        narrow = Problem(problem.model.to(dtype), problem.syms, data)
        moments = nf.gradient_moments(narrow.model, narrow.loss, [data], narrow.syms)
        (only,) = noise_equilibrium(narrow.model, narrow.syms, moments, nf.SGDConfig(0.01, 4, weight_decay=1e-2))
        assert only.classification == ("finite" if rank == 8 else "degenerate")
        assert only.reason == "" or only.reason.startswith("of 8: 2 directions are moved by nothing")


def test_missing_moments_are_named() -> None:
    problem = mlp()
    with pytest.raises(ValueError, match="max_iterations must be at least 0, got -1"):
        noise_equilibrium(problem.model, problem.syms, problem.measure(), SGD, max_iterations=-1)
    moments = dataclasses.replace(problem.measure(), squares={})
    with pytest.raises(MomentError, match=r"entries=True"):
        noise_equilibrium(problem.model, problem.syms, moments, SGD)
    with pytest.raises(MomentError, match="two groups"):
        noise_equilibrium(problem.model, problem.syms, problem.measure(), SGD, errors=True)


@pytest.mark.parametrize(("momentum", "batch"), [(0.0, 1000), (0.9, 4), (0.95, 8)])
@pytest.mark.parametrize("problem", [mlp(samples=40), linear((5, 3, 4))], ids=["torus", "general_linear"])
def test_too_few_samples_for_the_mean_gradient_are_refused_with_the_number_needed(
    problem: Problem, momentum: float, batch: int
) -> None:
    """Unbiased `noise (E[gg] - m) / S + mean (m - (E[gg] - m) / n)` has a non-negative part in `E[gg]` from n on."""
    moments, sgd = problem.measure(), nf.SGDConfig(0.01, batch, momentum=momentum, weight_decay=1e-3)
    need = round(batch * (1 + momentum) / (1 - momentum))
    with pytest.raises(MomentError, match=f"batch size {batch} and momentum {momentum:g}; measure at least {need} sam"):
        noise_equilibrium(problem.model, problem.syms, moments, sgd)
    few = dataclasses.replace(moments, samples=need - 1)
    with pytest.raises(MomentError, match=f"at least {need} samples"):
        noise_equilibrium(problem.model, problem.syms, few, sgd)
    enough = dataclasses.replace(moments, samples=need + 1)
    assert noise_equilibrium(problem.model, problem.syms, enough, sgd).converged


def test_fewer_minibatches_than_a_batch_holds_suffice() -> None:
    """`E[C' - C]` of minibatch gradients is zero at the element found: `p = (y / x)^(1/4)` of their own Grams."""
    problem = mlp((4, 6, 3), samples=400)
    x, y = problem.data
    batches = [(x[i : i + 40], y[i : i + 40]) for i in range(0, 400, 40)]
    moments = nf.minibatch_moments(problem.model, problem.loss, batches, problem.syms, batch_size=40)
    sgd, (s,) = nf.SGDConfig(0.01, 40), problem.syms
    *plus, minus = moments.batch_grams(s, sgd)
    eq = noise_equilibrium(problem.model, problem.syms, moments, sgd)
    torch.testing.assert_close(eq[s.name].element, (sum(plus) / minus) ** 0.25, rtol=1e-10, atol=0)


def test_negative_estimates_on_the_way_are_refused_by_name() -> None:
    """Noisy estimates may be positive where they were measured and negative elsewhere on the orbit."""
    tori, chain = mlp(), linear((6, 3, 3, 5))
    moments = tori.measure()
    wrong = dataclasses.replace(moments, squares={n: -v for n, v in moments.squares.items()})
    with pytest.raises(MomentError, match=r"symmetry '0.weight -> .*not positive or not finite"):
        noise_equilibrium(tori.model, tori.syms, wrong, SGD)

    def measure(model: nn.Module) -> nf.GradientMoments:
        again = chain.measure(model)
        return dataclasses.replace(again, second={n: tuple(-m for m in ms) for n, ms in again.second.items()})

    with pytest.raises(MomentError, match=r"symmetry '0.weight -> .*not positive or not finite"):
        noise_equilibrium(chain.model, chain.syms, chain.measure(), SGD, remeasure=measure)


@pytest.mark.parametrize("family", ["torus", "general_linear"])
def test_a_drive_that_is_not_a_number_is_no_equilibrium(family: str) -> None:
    (s,) = mlp((4, 6, 3)).syms if family == "torus" else linear((5, 3, 4)).syms
    good = torch.ones(s.shape, dtype=torch.float64) if s.is_torus else s.identity()
    classes = classify(s, good, good, 1e-12)
    assert float(imbalance_of(s, classes, good, good).max()) == 0
    assert bool(imbalance_of(s, classes, good * torch.nan, good).isnan().all())
    assert float(imbalance_of(s, classes, -good, good).max()) == 1


@pytest.mark.parametrize("family", ["torus", "general_linear"])
def test_jackknife_errors_cover_the_truth(family: str) -> None:
    problem = mlp((4, 6, 3), samples=4000) if family == "torus" else linear((5, 2, 4), samples=4000)
    x, y = problem.data
    (s,) = problem.syms
    truth = noise_equilibrium(problem.model, problem.syms, problem.measure(), SGD).settled[0]
    deviations = []
    for k in range(0, 2000, 200):
        parts = [
            moments_by_loop(problem.model, problem.loss, [(x[i : i + 25], y[i : i + 25])], problem.syms)
            for i in range(k, k + 200, 25)
        ]
        moments = dataclasses.replace(merge_moments(parts), groups=tuple(parts))
        eq = noise_equilibrium(problem.model, problem.syms, moments, SGD, errors=True).settled[0]
        assert eq.log_error is not None
        assert eq.log_error.shape == s.shape
        logs = [e.log() if s.is_torus else spd.logm(e.mT @ e) / 2 for e in (eq.element, truth.element)]
        deviations.append((logs[0] - logs[1]) / eq.log_error)
    spread = torch.stack(deviations).square().mean().sqrt()
    assert 0.5 < float(spread) < 2.0


def test_union_of_everything_serialises() -> None:
    problem = mlp()
    eq = noise_equilibrium(problem.model, union(problem.model, [problem.syms]), problem.measure(), SGD)
    import json

    data = json.loads(json.dumps(eq.to_dict()))
    assert data["converged"] is True
    assert len(data["settled"]) == 2
    assert eq.rows()[0]["class"] == "finite"
    with pytest.raises(KeyError, match="no symmetry named"):
        eq["nothing"]


def test_a_neuron_that_one_group_alone_lights_up_has_an_infinite_error() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    x, y = torch.randn(160, 4).double(), torch.randn(160, 2).double()
    with torch.no_grad():
        net[0].bias[0], net[0].weight[0] = -6.0, torch.tensor([1.0, 0.0, 0.0, 0.0])
        x[5, 0] = 7.0
    syms = nf.find_symmetries(net, x[:2])
    batches = list(zip(x.split(10), y.split(10), strict=True))
    moments = nf.gradient_moments(net, lambda m, b: (m(b[0]) - b[1]).square().sum(1), batches, syms, entries=True)
    sgd = nf.SGDConfig(0.05, 16)
    error = noise_equilibrium(net, syms, moments, sgd, errors=True).settled[0].log_error
    assert torch.isinf(error).tolist() == [True] + [False] * 5
    assert bool((error[1:] > 0).all())
