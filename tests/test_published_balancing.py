"""Objective `norm` against two published rescalings, written here from their definitions.

ENorm (Stock et al. 2019, "Equi-normalization of neural networks"): minimise `sum_k ||W_k||_p^p` over the rescaling
orbit by cycles of `d_j = sqrt(||out_j||_p / ||in_j||_p)` per hidden neuron j.

PathCond (Lebeurrier, Vayer, Gribonval 2026, "Path-conditioned training"; definition from the paper's code,
github.com/Artim436/pathcond): with the path lifting `Phi_p = prod of the weights on path p` and
`G_i = sum_p (dPhi_p / dtheta_i)^2`, minimise `n log(sum_i G_i e^{(B z)_i} / n) - sum_i (B z)_i`, n parameters,
`theta_i -> theta_i e^{-(B z)_i / 2}`, where (B z)_i is z of the neuron that i leaves minus z of the one it enters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

import noetherflow as nf
from equilibrium_cases import Problem, moved, union
from noetherflow.equilibrium import noise_equilibrium
from reference import moments_by_loop


def network(widths: Sequence[int], bias: bool = False, seed: int = 0) -> Problem:
    """A ReLU network in float64 whose layers and neurons start at very different scales."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b, bias=bias), nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).double()
    with torch.no_grad():
        for k, layer in enumerate(model[::2]):
            layer.weight *= (3.0, 0.3, 1.0)[k % 3] * torch.rand(len(layer.weight), 1).double().add(0.2)
    syms = [
        nf.declare(
            model,
            "diagonal",
            [(f"{i}.weight", 0), *([(f"{i}.bias", 0)] if bias else [])],
            [(f"{i + 2}.weight", 1)],
        )
        for i in range(0, 2 * len(widths) - 4, 2)
    ]
    data = (torch.randn(12, widths[0]).double(), torch.randn(12, widths[-1]).double())
    return Problem(model, union(model, syms), data)


def by_norm(problem: Problem) -> nn.Module:
    eq = noise_equilibrium(problem.model, problem.syms, problem.measure(), objective="norm", tol=1e-13)
    assert eq.converged
    return moved(problem.model, problem.syms, eq.elements)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach() for n, p in model.named_parameters() if n.endswith("weight")]


@torch.no_grad()
def apart(a: nn.Module, b: nn.Module) -> float:
    """Largest relative difference in norm over the parameters."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((p - q).norm() / q.norm()) for p, q in pairs)


# --- ENorm ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def enorm(model: nn.Sequential, p: float = 2, layers: int | None = None, biases_count: bool = False) -> nn.Module:
    """Cycles until nothing moves. `layers`: how many hidden layers are balanced (default all). In the published code
    biases move with their rows but do not count in the norms."""
    model = copy.deepcopy(model)
    linear = [m for m in model if not isinstance(m, nn.ReLU)]
    for _ in range(2000):
        largest = 0.0
        for first, second in list(pairwise(linear))[:layers]:
            rows = first.weight.flatten(1)
            if biases_count:
                rows = torch.cat([rows, first.bias[:, None]], dim=1)
            d = (second.weight.transpose(0, 1).flatten(1).norm(p=p, dim=1) / rows.norm(p=p, dim=1)).sqrt()
            tail = [1] * (first.weight.ndim - 2)
            first.weight *= d.view(-1, 1, *tail)
            second.weight /= d.view(1, -1, *tail)
            if first.bias is not None:
                first.bias *= d
            largest = max(largest, float(d.log().abs().max()))
        if largest < 1e-13:
            break
    return model


def test_enorm_of_this_file_is_the_minimiser_of_its_objective() -> None:
    """Not a fixed point only: a quasi-Newton method over all log scales finds nothing lower, and the same weights."""
    problem = network((4, 6, 5, 3))
    start = weights(problem.model)

    def scaled(z: Tensor) -> list[Tensor]:
        logs = [torch.zeros(4).double(), *z.split([6, 5]), torch.zeros(3).double()]
        return [w * (b[:, None] - a[None]).exp() for w, (a, b) in zip(start, pairwise(logs), strict=True)]

    for p in (1.0, 2.0, 3.0):
        found = _minimise(lambda z, p=p: sum(w.abs().pow(p).sum() for w in scaled(z)), 11)
        ours = weights(enorm(problem.model, p))
        for a, b in zip(scaled(found), ours, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def _minimise(value: Callable[[Tensor], Tensor], count: int) -> Tensor:
    def evaluate(x: np.ndarray) -> tuple[float, np.ndarray]:
        z = torch.tensor(x, requires_grad=True)
        out = value(z)
        (slope,) = torch.autograd.grad(out, z)
        return float(out.detach()), slope.numpy()

    found = minimize(evaluate, np.zeros(count), jac=True, method="BFGS", options={"gtol": 1e-10, "maxiter": 5000})
    return torch.tensor(found.x)


def test_norm_is_enorm_for_p_2() -> None:
    problem = network((5, 7, 6, 8, 3))
    assert apart(by_norm(problem), enorm(problem.model)) < 1e-8
    assert apart(by_norm(problem), problem.model) > 0.1


def test_norm_is_enorm_on_convolutions() -> None:
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(2, 5, 3, bias=False), nn.ReLU(), nn.Conv2d(5, 4, 3, bias=False), nn.ReLU()]
    model = nn.Sequential(*convolutions, nn.Conv2d(4, 3, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight *= 5
    x = torch.randn(4, 2, 6, 6).double()
    syms = nf.find_symmetries(model, x)
    assert len(syms.symmetries) == 2
    moments = moments_by_loop(model, lambda m, x: m(x).square().flatten(1).sum(1), [x], syms)
    eq = noise_equilibrium(model, syms, moments, objective="norm", tol=1e-13)
    assert apart(moved(model, syms, eq.elements), enorm(model)) < 1e-8


@pytest.mark.parametrize("p", [1.0, 3.0])
def test_enorm_of_another_p_is_norm_on_powers_of_the_weights(p: float) -> None:
    """`sum |w|^p = sum (|w|^(p/2))^2`: the same problem on `sign(w) |w|^(p/2)`, whose scales are powers `p/2`."""
    problem = network((4, 6, 5, 3))
    powers = copy.deepcopy(problem.model)
    with torch.no_grad():
        for w in powers.parameters():
            w.copy_(w.sign() * w.abs().pow(p / 2))
    eq = noise_equilibrium(powers, problem.syms, problem.measure(powers), objective="norm", tol=1e-13)
    elements = {name: g ** (2 / p) for name, g in eq.elements.items()}
    published = enorm(problem.model, p)
    assert apart(moved(problem.model, problem.syms, elements), published) < 1e-8
    assert apart(by_norm(problem), published) > 0.01


def test_biases_count_in_norm_but_not_in_the_published_code() -> None:
    problem = network((4, 6, 5, 3), bias=True)
    assert apart(by_norm(problem), enorm(problem.model, biases_count=True)) < 1e-8
    assert apart(by_norm(problem), enorm(problem.model)) > 0.01


def test_published_enorm_leaves_the_last_layer_out() -> None:
    """Its loop ends before the last pair of layers: the same as `norm` without that symmetry."""
    problem = network((4, 6, 5, 3))
    inner = problem.syms.without({problem.syms[1].name: "the last hidden layer"})
    held = Problem(problem.model, inner, problem.data)
    assert apart(by_norm(held), enorm(problem.model, layers=1)) < 1e-8
    assert apart(by_norm(problem), enorm(problem.model, layers=1)) > 0.01


# --- PathCond ------------------------------------------------------------------------------------------------------


def path_values(model: nn.Module, paths: tuple[Tensor, ...]) -> Tensor:
    """`Phi_p`, the product of the weights along every path given by its neurons, one index tensor per layer."""
    out = torch.ones(len(paths[0]), dtype=torch.float64)
    for (a, b), w in zip(pairwise(paths), (p for n, p in model.named_parameters()), strict=True):
        out = out * w[b, a]
    return out


def all_paths(widths: Sequence[int]) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(list(product(*map(range, widths)))).T)


def path_kernel(problem: Problem, widths: Sequence[int]) -> nf.GradientMoments:
    """The paths taken as samples with loss `Phi_p`: `E[g_i^2] = G_i / (number of paths)`."""
    return moments_by_loop(problem.model, path_values, [all_paths(widths)], problem.syms)


def pathcond(problem: Problem, widths: Sequence[int]) -> nn.Module:
    """The published criterion, minimised over all z at once."""
    names = [n for n, _ in problem.model.named_parameters()]
    squares = path_kernel(problem, widths).squares
    g = [squares[n] for n in names]
    n = sum(x.numel() for x in g)

    def exponents(z: Tensor) -> list[Tensor]:
        edges = [torch.zeros(widths[0]).double(), *z.split(list(widths[1:-1])), torch.zeros(widths[-1]).double()]
        return [a[None] - b[:, None] for a, b in pairwise(edges)]

    def criterion(z: Tensor) -> Tensor:
        bz = exponents(z)
        logs = torch.cat([(x.log() + e).flatten() for x, e in zip(g, bz, strict=True)])
        return n * torch.logsumexp(logs, 0) - sum(e.sum() for e in bz)

    z = _minimise(criterion, sum(widths[1:-1]))
    out = copy.deepcopy(problem.model)
    with torch.no_grad():
        for w, e in zip(out.parameters(), exponents(z), strict=True):
            w *= (-e / 2).exp()
    return out


def test_diagonal_of_the_path_kernel_is_the_gradient_of_the_path_norm() -> None:
    """As the published code computes it: `d/d(w^2)` of the network with squared weights at an input of ones."""
    widths = (3, 4, 5, 2)
    problem = network(widths)
    moments = path_kernel(problem, widths)
    squared = [w.square().requires_grad_() for w in weights(problem.model)]
    h = torch.ones(3, dtype=torch.float64)
    for w in squared:
        h = w @ h
    for name, slope in zip(moments.squares, torch.autograd.grad(h.sum(), squared), strict=True):
        torch.testing.assert_close(moments.squares[name] * moments.samples, slope, rtol=1e-12, atol=0)


def test_pathcond_keeps_the_function_and_its_coordinate_update_does_not_move_it() -> None:
    """The published update of one neuron is the positive root of `b (a + n) X^2 + d a X + c (a - n)`, `X = e^z`."""
    widths = (3, 5, 4, 2)
    problem = network(widths)
    best = pathcond(problem, widths)
    torch.testing.assert_close(best(problem.data[0]), problem.model(problem.data[0]), rtol=1e-9, atol=1e-12)
    squares = list(path_kernel(Problem(best, problem.syms, problem.data), widths).squares.values())
    n = sum(x.numel() for x in squares)
    total = sum(x.sum() for x in squares)
    for first, second in pairwise(squares):
        incoming, outgoing = first.sum(1), second.sum(0)
        a = first.shape[1] - second.shape[0]
        b, c = outgoing * (a + n), incoming * (a - n)
        middle = (total - incoming - outgoing) * a
        root = (-middle + (middle.square() - 4 * b * c).sqrt()) / (2 * b)
        torch.testing.assert_close(root, torch.ones_like(root), rtol=0, atol=1e-6)


@pytest.mark.parametrize("widths", [(4, 6, 4), (1, 1, 1, 1)])
def test_norm_is_pathcond_for_two_layers_as_many_outputs_as_inputs_and_for_chains(widths: tuple[int, ...]) -> None:
    problem = network(widths)
    assert apart(by_norm(problem), pathcond(problem, widths)) < 1e-6
    assert apart(by_norm(problem), problem.model) > 0.1


def test_norm_is_not_pathcond_where_fan_in_and_fan_out_differ() -> None:
    """Two layers: PathCond asks `d_in (1 - |out_j|^2 / c) = d_out (1 - |in_j|^2 / c)`, c the mean over neurons, so it
    agrees with equal norms only if all neurons have the same product `|in_j| |out_j|`."""
    widths = (6, 5, 2)
    problem = network(widths)
    assert apart(by_norm(problem), pathcond(problem, widths)) > 0.02
    with torch.no_grad():
        w, u = problem.model[0].weight, problem.model[2].weight
        w /= w.norm(dim=1, keepdim=True) * torch.arange(1.0, 6.0).double()[:, None]
        u /= u.norm(dim=0, keepdim=True) / torch.arange(1.0, 6.0).double()
    assert apart(by_norm(problem), pathcond(problem, widths)) < 1e-6


def test_deep_networks_of_one_width_pathcond_is_the_fisher_objective_of_the_path_kernel() -> None:
    """There `sum_i (B z)_i = 0` and the criterion is `n log Tr G`: the flattest point of the orbit, not the one of
    least norm, once the path kernel stands for the curvature."""
    widths = (4, 4, 4, 4)
    problem = network(widths)
    eq = noise_equilibrium(problem.model, problem.syms, path_kernel(problem, widths), objective="fisher", tol=1e-13)
    best = pathcond(problem, widths)
    assert apart(moved(problem.model, problem.syms, eq.elements), best) < 1e-6
    assert apart(by_norm(problem), best) > 0.02
