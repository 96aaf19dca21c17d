"""Single symmetries against closed forms: theory.md sections 5, 8 and Theorem 4.3."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import noetherflow as nf
from equilibrium_cases import linear, mlp, moved
from noetherflow.core import spd
from noetherflow.equilibrium import gl_equilibrium, noise_equilibrium, torus_equilibrium
from noetherflow.equilibrium.blocks import GLClasses, classify_gl, classify_torus

EYE = torch.eye


def random_spd(n: int, seed: int, condition: float = 1e3) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=rng))
    w = condition ** torch.rand(n, dtype=torch.float64, generator=rng)
    return q @ torch.diag(w) @ q.mT


def empirical_gammas(x: torch.Tensor, r: torch.Tensor, shift: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`Gam_U = E[|x|^2 r r^T] + shift I`, `Gam_W = E[|r|^2 x x^T] + shift I` (theory.md section 8)."""
    n = len(x)
    gam_u = (r.mT * x.square().sum(1)) @ r / n
    gam_w = (x.mT * r.square().sum(1)) @ x / n
    return gam_u + shift * EYE(len(gam_u), dtype=x.dtype), gam_w + shift * EYE(len(gam_w), dtype=x.dtype)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("decay", [0.0, 0.02])
def test_linear_factorisation_equals_theory_8(seed: int, decay: float) -> None:
    """`U = Gam_U^-1/2 L s^1/2 F`, `W = F^T s^1/2 R Gam_W^-1/2`: the equilibrium up to an orthogonal F."""
    problem = linear((6, 4, 4), seed=seed)
    sgd = nf.SGDConfig(0.02, 1, weight_decay=decay, dataset_size=10**9)
    moments = problem.measure()
    n = moments.samples
    eq = noise_equilibrium(problem.model, problem.syms, moments, sgd)
    end = moved(problem.model, problem.syms, eq.elements)
    w, u = end[0].weight.detach(), end[1].weight.detach()
    product = u @ w
    x, y = problem.data
    # S = 1 with replacement: R_B = E[g g^T], the correction for n samples cancels in f Sigma + gbar gbar.
    shift = decay * (1 - sgd.lr * decay / 2) / (2 * sgd.lr)
    gam_u, gam_w = empirical_gammas(x, (x @ product.mT - y), shift)
    residual = (w @ gam_w @ w.mT - u.mT @ gam_u @ u).norm() / (w @ gam_w @ w.mT).norm()
    assert n == 60
    assert float(residual) < 1e-8
    left, s, right = torch.linalg.svd(spd.sqrtm(gam_u) @ product @ spd.sqrtm(gam_w), full_matrices=False)
    expected_u = spd.inv_sqrtm(gam_u) @ (left * s.sqrt())
    expected_w = (s.sqrt()[:, None] * right) @ spd.inv_sqrtm(gam_w)
    frame = torch.linalg.lstsq(expected_u, u).solution
    torch.testing.assert_close(frame @ frame.mT, EYE(4, dtype=torch.float64), atol=1e-8, rtol=0)
    torch.testing.assert_close(expected_u @ frame, u, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(frame.mT @ expected_w, w, rtol=1e-8, atol=1e-9)


def test_wide_linear_factorisation_approaches_theory_8() -> None:
    """More hidden units than the product has rank: the closed form is the limit of receding directions."""
    problem = linear((4, 7, 3), seed=4)
    sgd = nf.SGDConfig(0.02, 1, dataset_size=10**9)
    moments = problem.measure()
    x, y = problem.data
    distances = []
    for recede in (1e-1, 1e-2, 1e-3):
        eq = noise_equilibrium(problem.model, problem.syms, moments, sgd, recede=recede)
        end = moved(problem.model, problem.syms, eq.elements)
        w, u = end[0].weight.detach(), end[1].weight.detach()
        gam_u, gam_w = empirical_gammas(x, x @ (u @ w).mT - y, 0.0)
        s = torch.linalg.svdvals(spd.sqrtm(gam_u) @ u @ w @ spd.sqrtm(gam_w))
        drives = torch.linalg.eigvalsh(w @ gam_w @ w.mT)[-3:], torch.linalg.eigvalsh(u.mT @ gam_u @ u)[-3:]
        distances.append(max(float((d - s.flip(0)).abs().max() / s[0]) for d in drives))
    assert eq.settled[0].classification == "degenerate"
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 1e-5


def test_torus_factorisation_closed_form() -> None:
    """Without mixing, each hidden unit balances `p^4 = y / x` by itself."""
    problem = linear((6, 4, 5), "diagonal", seed=2)
    sgd = nf.SGDConfig(0.02, 4, weight_decay=0.01)
    moments = problem.measure()
    (s,) = problem.syms
    (k_plus, k_minus), (m_plus, m_minus) = s.grams(problem.tensors()), moments.batch_grams(s, sgd)
    tilde = sgd.weight_decay * (1 - sgd.lr * sgd.weight_decay / 2)
    x, y = tilde * k_plus + sgd.lr / 2 * m_minus, tilde * k_minus + sgd.lr / 2 * m_plus
    eq = noise_equilibrium(problem.model, problem.syms, moments, sgd)
    torch.testing.assert_close(eq.settled[0].element, (y / x) ** 0.25, rtol=1e-12, atol=0)
    torch.testing.assert_close(torus_equilibrium(x, y), (y / x) ** 0.25)


@pytest.mark.parametrize("seed", range(4))
def test_gl_closed_form_beats_every_neighbour(seed: int) -> None:
    x, y = random_spd(5, seed), random_spd(5, seed + 100)

    def phi(g: torch.Tensor) -> float:
        p = g.mT @ g
        return float(torch.trace(p @ x) + torch.trace(torch.linalg.inv(p) @ y))

    g = gl_equilibrium(x, y)
    inverse = torch.linalg.inv(g)
    torch.testing.assert_close(g @ x @ g.mT, inverse.mT @ y @ inverse, rtol=1e-8, atol=1e-8)
    best = phi(g)
    rng = torch.Generator().manual_seed(seed)
    for size in (1e-3, 0.1, 1.0):
        for _ in range(10):
            a = spd.symmetric(torch.randn(5, 5, dtype=torch.float64, generator=rng))
            assert phi(spd.expm(size * a) @ g) > best


def test_classes_of_coordinates() -> None:
    x = torch.tensor([1.0, 0.0, 1.0, 0.0, -1.0, float("nan"), 1e-30])
    y = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1e30])
    c = classify_torus(x.double(), y.double())
    assert c.finite.tolist() == [True] + [False] * 6
    assert c.grows.tolist() == [False, True, False, False, False, False, True]
    assert c.shrinks.tolist() == [False, False, True, False, False, False, False]
    assert c.neutral.tolist() == [False, False, False, True, False, False, False]
    assert c.invalid.tolist() == [False, False, False, False, True, True, False]


def test_classes_of_directions() -> None:
    """X misses e1 and e4, Y misses e2 and e4, badly scaled: one finite, one growing, one shrinking, one still."""
    t = torch.diag(torch.tensor([1.0, 1e5, 1e-5, 3.0], dtype=torch.float64))
    x = t @ torch.diag(torch.tensor([1.0, 0.0, 2.0, 0.0], dtype=torch.float64)) @ t
    y = t @ torch.diag(torch.tensor([1.0, 3.0, 0.0, 0.0], dtype=torch.float64)) @ t
    c = classify_gl(x[None], y[None], 1e-12)
    ranks = [int(GLClasses.rank(p)) for p in (c.finite, c.grows, c.shrinks, c.neutral)]
    assert ranks == [1, 1, 1, 1]
    torch.testing.assert_close(c.finite[0], torch.diag(torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)))
    torch.testing.assert_close(c.grows[0], torch.diag(torch.tensor([0, 1.0, 0, 0], dtype=torch.float64)))
    torch.testing.assert_close(c.finite + c.grows + c.shrinks + c.neutral, EYE(4, dtype=torch.float64)[None])


# --- Theorem 4.3: along one generator the drive G falls, the charge C rises, G has one zero, and it attracts ---------

FAMILIES = {
    "torus": lambda seed: mlp((4, 5, 3), seed=seed, samples=24),
    "general_linear": lambda seed: linear((4, 3, 3), seed=seed, samples=24),
}


def along(problem: object, generator: torch.Tensor, lam: float, sgd: nf.SGDConfig) -> tuple[float, float]:
    """`(G, C)` at `exp(lam A) theta`, moved and measured: `G = -eta (2w - eta w^2) C + eta^2 Tr[A R_B]`."""
    (s,) = problem.syms  # type: ignore[attr-defined]
    element = s.exp(lam * generator)
    model = moved(problem.model, problem.syms, {s.name: element})  # type: ignore[attr-defined]
    params = {n: t.detach() for n, t in nf.tensors_of(model).items()}
    charge = float((generator * s.charge(params)).sum())
    drive = s.combine(problem.measure(model).batch_grams(s, sgd))  # type: ignore[attr-defined]
    decay = sgd.lr * sgd.weight_decay * (2 - sgd.lr * sgd.weight_decay)
    return -decay * charge + sgd.lr**2 * float((generator * drive).sum()), charge


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 10**6), decay=st.sampled_from([0.0, 1e-2]))
def test_theorem_43(family: str, seed: int, decay: float) -> None:
    problem = FAMILIES[family](seed)
    (s,) = problem.syms
    sgd = nf.SGDConfig(0.1, 3, weight_decay=decay)
    rng = torch.Generator().manual_seed(seed)
    generator = torch.randn(s.shape, dtype=torch.float64, generator=rng)
    generator = generator if s.is_torus else spd.symmetric(generator)
    generator = generator / generator.norm()
    grid = torch.linspace(-3, 3, 13).tolist()
    values = [along(problem, generator, lam, sgd) for lam in grid]
    drives, charges = [v[0] for v in values], [v[1] for v in values]
    assert all(b < a for a, b in pairwise(drives)), "G strictly decreasing"
    assert all(b > a for a, b in pairwise(charges)), "C increasing"
    low, high = -20.0, 20.0
    assert along(problem, generator, low, sgd)[0] > 0 > along(problem, generator, high, sgd)[0]
    for _ in range(45):
        middle = (low + high) / 2
        positive = along(problem, generator, middle, sgd)[0] > 0
        low, high = (middle, high) if positive else (low, middle)
    for offset in (-0.3, 0.3):
        drive = along(problem, generator, low + offset, sgd)[0]
        assert drive * offset < 0, "attraction from both sides"


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6))
def test_equilibrium_moves_smoothly_with_the_weights(seed: int) -> None:
    """`lam*` is differentiable in theta: halving a perturbation halves the shift, up to second order."""
    problem = linear((4, 3, 3), "diagonal", seed=seed, samples=24)
    sgd = nf.SGDConfig(0.1, 3, weight_decay=1e-2)
    rng = torch.Generator().manual_seed(seed)
    direction = torch.randn(problem.model[0].weight.shape, dtype=torch.float64, generator=rng)
    base = noise_equilibrium(problem.model, problem.syms, problem.measure(), sgd).settled[0].element.log()
    shifts = []
    for size in (1e-4, 5e-5):
        with torch.no_grad():
            problem.model[0].weight += size * direction
        element = noise_equilibrium(problem.model, problem.syms, problem.measure(), sgd).settled[0].element
        with torch.no_grad():
            problem.model[0].weight -= size * direction
        shifts.append((element.log() - base) / size)
    assert float((shifts[0] - shifts[1]).norm()) < 0.05 * float(shifts[1].norm()) + 1e-6
