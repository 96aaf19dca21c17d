"""What the page on the print says (`noetherflow_paper/printed.py`), by arithmetic that is easy to follow."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from noetherflow_paper import closed_form as cf
from noetherflow_paper.experiments import thm43, thm54
from noetherflow_paper.printed import PRINTED
from noetherflow_paper.statements import statement

DOUBLE = torch.float64


def test_every_entry_names_a_statement_or_is_tested_here():
    for entry in PRINTED:
        assert entry.place
        assert entry.says.endswith(".")
        assert entry.here.endswith(".")
        assert not entry.statement or statement(entry.statement)
    assert {p.place for p in PRINTED if not p.statement} == {
        "section 4.3 and appendix A.1",
        "section 5.4, equation (22)",
    }


def test_the_charge_moves_by_twice_the_printed_noise_term():
    """`l = (u w x - y)^2` at its minimum, batches of one: all samples enumerated, C = u^2 - w^2, sigma^2 = eta / 2."""
    u, w, eta = 1.5, 0.4, 0.01
    x = np.array([1.0, -2.0, 0.5, 3.0])
    residual = np.array([0.7, -0.3, 0.9, -0.1])
    residual = residual - x * (residual @ x) / (x @ x)
    gu, gw = 2 * residual * w * x, 2 * residual * u * x
    assert abs(gu.mean()) + abs(gw.mean()) < 1e-12
    after = ((u - eta * gu) ** 2 - (w - eta * gw) ** 2).mean()
    trace = (gu**2).mean() - (gw**2).mean()
    assert (after - (u**2 - w**2)) / eta == pytest.approx(2 * (eta / 2) * trace, rel=1e-9)


def test_decay_takes_four_gamma_of_the_charge():
    theta, gamma, eta = np.array([1.0, -2.0, 0.3]), 0.07, 1e-7
    after = theta - eta * 2 * gamma * theta
    assert (after @ after - theta @ theta) / eta / (theta @ theta) == pytest.approx(-4 * gamma, rel=1e-5)


@given(
    st.lists(st.tuples(st.floats(0.1, 5), st.floats(0.1, 5)), min_size=2, max_size=5),
    st.floats(-3, 3).filter(lambda lam: abs(lam) > 1e-3),
)
@settings(max_examples=200, deadline=None)
def test_the_smaller_ratio_bounds_the_approach_where_the_generator_squares_to_one(pairs, lam):
    """`d C / dt` and `C - C*` from matrices, not from the experiment's formula."""
    noise, weights = (np.array(v) for v in zip(*pairs, strict=True))
    a = np.where(np.arange(len(pairs)) < 1, 1.0, -1.0)
    noise[0] = noise[1:].sum()
    move = np.diag(np.exp(-lam * a))
    theta, sigma = move @ np.sqrt(weights), np.linalg.inv(move) @ np.diag(noise) @ np.linalg.inv(move)
    drift, gap = np.trace(sigma @ np.diag(a)), theta @ np.diag(a) @ theta - weights @ a
    assert drift / -gap == pytest.approx(thm43.speed(a, noise, weights, lam), rel=1e-8)
    smaller = min(noise[0] / weights[0], noise[1:].sum() / weights[1:].sum())
    assert drift / -gap >= smaller * (1 - 1e-9)


def test_lemma_b3_has_a_counterexample():
    """`-(C - C*) / lam <= 2 theta*^T A+^2 theta*` for `lam > 0`, at A = diag(1, -1) and theta* = (1, 1)."""
    a, lam = np.array([1.0, -1.0]), 1.0
    gap = (a * np.exp(-2 * lam * a)).sum() - a.sum()
    assert -gap / lam == pytest.approx(2 * math.sinh(2))
    assert -gap / lam > 2


def test_products_take_one_sign_and_the_weights_keep_both():
    """SGD on `(U W x - y)^2` with one input and one output, from signs of all four kinds."""
    rng = np.random.default_rng(0)
    u, w = np.array([1.0, -1.0, 0.8, -0.6]), np.array([0.7, 0.9, -0.5, -1.1])
    for _ in range(60_000):
        x, noise = rng.normal(size=(2, 4))
        factor = 2 * ((u @ w - 1) * x**2 + noise * x).mean()
        u, w = u - 0.02 * factor * w, w - 0.02 * factor * u
    assert np.abs(np.outer(u, u) - np.outer(w, w)).max() < 0.05
    products = u * w
    assert (products[np.abs(products) > 0.02] > 0).all()
    assert u.min() < -0.1 < 0.1 < u.max()


def test_isotropic_noise_and_inputs_balance_as_equation_14_says():
    rng = torch.Generator().manual_seed(0)
    v = torch.randn(3, 5, dtype=DOUBLE, generator=rng)
    sx, se = 2.0 * torch.eye(5, dtype=DOUBLE), 0.3 * torch.eye(3, dtype=DOUBLE)
    u, w = cf.two_layer(v, *cf.noise_matrices(sx, se))
    assert torch.allclose(w @ w.mT / 5, u.mT @ u / 3, atol=1e-12)


@pytest.mark.parametrize("d", [1, 4, 16])
def test_kaiming_with_variance_one_over_the_width_has_no_flattening_at_equal_widths_alone(d):
    """`S_init = d_x d (s_U^2 + s_W^2) Tr Sig_x` against `S_end = 2 min(d, d_x) Tr Sig_x`, `Tr Sig_x = d_x`."""
    end = cf.equilibrium_sharpness(d, d, d)
    assert cf.initial_sharpness(d, d, 1 / d, 1 / d, d) == pytest.approx(end)
    assert cf.initial_sharpness(d, d, 1.0, 1 / d, d) == pytest.approx((d + 1) / 2 * end)
    assert cf.initial_sharpness(d, 2 * d, 1 / (2 * d), 1 / d, d) > cf.equilibrium_sharpness(d, 2 * d, d)


def test_the_proof_of_theorem_5_4_holds_with_the_identity_in_place_of_covariances():
    """(127) has `d` where (122) has `Tr Sig_x`: the printed layers fulfil the first and not the second."""
    rng = torch.Generator().manual_seed(1)
    v, sx, se = thm54.task(4, rng)
    first, middle, last = thm54.printed(v, sx, se, 3)
    assert torch.allclose(last @ middle @ first, v, atol=1e-9)
    outer = se @ last
    left = middle.mT @ (last.mT @ outer) @ middle / torch.trace(last.mT @ outer)
    right = first @ sx @ first.mT
    assert torch.allclose(left, right / 4, atol=1e-9), "as (127) has it"
    assert not torch.allclose(left, right / torch.trace(sx), rtol=0.05), "as (122) has it"


def test_a_negative_decay_makes_the_drift_rise():
    """Theorem D.1 is printed for any real gamma: G = -4 gamma C + sigma^2 Tr[Sigma A] on an orbit of two weights."""
    drift = lambda lam, gamma: (
        -4 * gamma * (math.exp(2 * lam) - math.exp(-2 * lam)) + 0.1 * (math.exp(-2 * lam) - math.exp(2 * lam))
    )
    lams = np.linspace(-2, 2, 41)
    assert (np.diff([drift(lam, 0.1) for lam in lams]) < 0).all()
    assert (np.diff([drift(lam, -0.1) for lam in lams]) > 0).all()


def test_the_shift_of_the_charge_goes_by_the_curvature_along_the_orbit():
    """Equation (22): `l_2 = (|u|^2 - 2.5)^2 / 2` on the orbit of `u w = 1`, exact balance against both curvatures."""
    strength, zeta, preferred = 1e-6, 1.0, 2.5
    low, high = 1.0, preferred
    for _ in range(200):  # bisection of zeta grad l_2 . A theta = strength (1 / p - p), p = u^2 = 1 / w^2
        p = (low + high) / 2
        low, high = (p, high) if strength * (1 / p - p) - zeta * 2 * (p - preferred) * p > 0 else (low, p)
    shift = (p - 1 / p) - (preferred - 1 / preferred)
    hessian = 4 * preferred  # of l_2 in u, at its minimum
    trace = strength * (1 / preferred - preferred)
    printed = 2 * trace / (zeta * hessian)
    along = hessian * preferred / (preferred + 1 / preferred)
    assert shift == pytest.approx(2 * trace / (zeta * along), rel=1e-4)
    assert shift / printed == pytest.approx(1 + 1 / preferred**2, rel=1e-4)
