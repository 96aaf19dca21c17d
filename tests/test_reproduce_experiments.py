"""What single experiments compute and judge, against direct calculations."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from noetherflow import find_symmetries
from noetherflow.core import spd
from noetherflow.core.settings import SGDConfig
from noetherflow_paper import closed_form as cf
from noetherflow_paper import generic
from noetherflow_paper.alignment import at_norm_balance, correlation, distance, matrices, noisy_share
from noetherflow_paper.experiment import Results
from noetherflow_paper.experiments import fig1, fig2, fig3, fig5, fig5_runs, momentum, rates, repnorm, thm43, thm54
from noetherflow_paper.experiments import repnorm_inputs as treated
from noetherflow_paper.fluctuations import fluctuation_shifts
from noetherflow_paper.records import ExperimentPoint, changed
from noetherflow_paper.theory import stretched

F64 = torch.float64


def test_alignment_of_norm_balanced_and_of_noise_balanced_factors():
    d, variance, width = 6, 5.0, 9
    variances = torch.ones(d, dtype=F64)
    variances[0] = variance
    rows = torch.linalg.qr(torch.randn(width, d, dtype=F64, generator=torch.Generator().manual_seed(1))).Q.mT
    balanced = [rows.mT[None], rows[None]]
    a, b = matrices(balanced, variances)
    expected = at_norm_balance(variances)
    assert float(correlation(a, b)) == pytest.approx(expected[0], rel=1e-12)
    assert float(noisy_share(balanced, a, b)) == pytest.approx(expected[1], rel=1e-12)
    assert float(distance(a, b)) == pytest.approx(expected[2], rel=1e-12)
    root = variances**0.25
    aligned = [(rows.mT * root)[None], (rows / root[:, None])[None]]
    a, b = matrices(aligned, variances)
    assert float(correlation(a, b)) == pytest.approx(1, rel=1e-12)
    assert float(noisy_share(aligned, a, b)) == pytest.approx(1, rel=1e-12)


def test_an_orbit_without_equilibrium_fails_its_claims_and_stops_nothing():
    config = replace(thm43.SCALES["quick"], networks=1, generators=1, samples=8, grid=3, decay=0.0)
    lost = thm43.compute(config, ExperimentPoint(name="scale-invariant"))
    row = lost["rows"][0]
    assert row["root"] is None
    kept = {**lost, "rows": [{**row, "root": 0.5, "ends": [0.5, 0.51], "shifts": [1e-3, 2e-3]}]}
    results = Results(config, ((ExperimentPoint(name="kept"), kept), (ExperimentPoint(name="lost"), lost)))
    exists, attraction = thm43.verdicts(results)[2:4]
    assert not exists.holds
    assert exists.measured == 0.5
    assert attraction.measured == pytest.approx(0.01)
    thm43.plot(results)


def test_thm43_nets_have_every_family_of_symmetries():
    found = set()
    for build in thm43.BUILDERS.values():
        found |= {s.family for s in find_symmetries(build().double(), (torch.randn(2, 12, dtype=F64),))}
    attention = {"attention-qk", "attention-vo", "rotary-qk"}
    assert found == attention | {"rescaling", "linear-linear", "norm-gain", "gated", "stream", "one-sided"}


def test_thm54_norm_of_a_mean_drift_is_free_of_the_noise_and_has_an_error():
    rng = np.random.default_rng(0)
    drift = np.zeros(40)
    drift[:2] = 0.3, 0.4
    squares = [thm54.squared_norm(drift * scale + rng.normal(size=(8, 40))) for scale in (0, 1) for _ in range(400)]
    none, some = np.split(np.asarray(squares), 2)
    assert abs(none.mean()) < 4 * none.std() / 20
    assert abs(some.mean() - 0.25) < 4 * some.std() / 20
    value, error = thm54.norm(drift + 0.05 * rng.normal(size=(8, 40)))
    assert value == pytest.approx(0.5, abs=4 * error)
    assert 0 < error < 0.05
    value, error = thm54.norm(0.05 * rng.normal(size=(8, 40)))
    assert value + error < 0.1


def test_rates_loss_of_gd_is_the_sum_over_its_steps():
    config = rates.SCALES["quick"]
    u, w, lr, loss = config.start, config.gd_product / config.start, 1e-4, 0.0
    first = rates.imbalance(config, config.gd_product)
    for _ in range(20_000):
        g = 2 * (u * w - 1)
        loss += lr**2 * g**2
        u, w = u - lr * g * w, w - lr * g * u
    assert 1 - (u**2 - w**2) / first == pytest.approx(loss, rel=1e-3)
    assert rates.gd_loss(config) == pytest.approx(loss / lr, rel=1e-3)


def test_larger_rates_are_as_long_in_relaxation_times():
    """Steps times the square of every rate stay the same, to a step; the rates of all rules grow alike."""
    for factor in (2.0, 3.0):
        two, norm, net = (e.SCALES["paper"] for e in (fig2, repnorm, momentum))
        for config, larger in ((c, e.larger_rate(c, factor)) for e, c in ((fig2, two), (repnorm, norm))):
            assert larger.lr == pytest.approx(factor * config.lr)
            assert larger.lr**2 * larger.steps == pytest.approx(config.lr**2 * config.steps, rel=1e-4)
        assert fig2.larger_rate(two, factor).gd_steps * factor == pytest.approx(two.gd_steps, abs=factor)
        larger = momentum.larger_rate(net, factor)
        assert {n: r.lr / net.rules[n].lr for n, r in larger.rules.items()} == pytest.approx(
            dict.fromkeys(net.rules, factor)
        )
        assert larger.steps * factor**2 == pytest.approx(net.steps, rel=1e-4)
    assert [c.factor for e in (fig2, repnorm, momentum) for c in e.EXPERIMENT.larger_rates] == [2, 3] * 3


def test_fig2_entries_are_judged_against_an_exponential_theory():
    steps = np.arange(0, 1001, 10)
    config = replace(fig2.SCALES["quick"], gd_steps=100)
    theory, run = (np.exp(-rate * steps)[:, None, None, None] * np.arange(1, 10) for rate in (0.004, 0.0042))
    data = {n: {"steps": steps, "entries": e, "residual": e[..., 0]} for n, e in (("theory", theory), ("sgd", run))}
    results = Results(config, tuple((fig2.Fig2Point(name=name), kept) for name, kept in data.items()))
    assert fig2.entry_rates(results) == pytest.approx(1.05, abs=0.01)
    assert fig2.bend(results, "sgd") == pytest.approx(1, abs=1e-9)
    assert np.abs(fig2.entry_ends(results)).max() < 0.04


def test_fig5_counts_learned_directions_and_starts_on_the_orbit():
    singular = np.broadcast_to([[2.0, 0.9, 0.1], [2.0, 1.1, 0.9]], (8, 2, 3)).tolist()
    data = (
        (fig5_runs.Fig5Point(name="theory"), {"singular": [2.0, 1.0, 0.5]}),
        (fig5_runs.Fig5Point(name="sgd"), {"singular": singular}),
    )
    config = fig5_runs.SCALES["quick"]
    assert fig5.learned(Results(config, data), "sgd") == 2.5
    layers = [torch.randn(3, 3, dtype=F64, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    moved = fig5_runs.moved(layers, config, torch.Generator().manual_seed(9))
    product = layers[3] @ layers[2] @ layers[1] @ layers[0]
    assert torch.allclose(moved[3] @ moved[2] @ moved[1] @ moved[0], product.expand(8, -1, -1), atol=1e-12)
    assert moved[1].norm(dim=(1, 2)).std() > 0.05, "the norms are all over the orbit"


def test_fig1_orders_of_gd_growth():
    config = replace(fig1.SCALES["quick"], lrs=(0.02, 0.01))
    found = fig1.compute(config, fig1.Fig1Point(name="orders"))
    angle = torch.tensor(2.2, dtype=F64)
    for rate, step, whole in zip(config.lrs, found["step"], found["fixed_time"], strict=True):
        theta = torch.stack([angle.cos(), angle.sin()])
        first = None
        for _ in range(round(fig1.TIME / rate)):
            unit = theta / theta.norm()
            theta = theta - rate * 2 * (unit[0] * unit - torch.tensor([1.0, 0.0], dtype=F64)) / theta.norm()
            first = first or float(theta.square().sum() - 1)
        assert step == pytest.approx(first, rel=1e-6)
        assert whole == pytest.approx(float(theta.square().sum() - 1), rel=1e-6)


def test_the_theory_of_fig3_against_many_runs():
    config = changed(fig3.SCALES["quick"], {"d": 6, "phi": 0.4, "seeds": 100, "lrs": [[0.02, 8, 3000]]})
    point = next(p for p in fig3.points(config) if p.name == "lr0")
    found, theory = fig3.compute(config, point), fig3.predicted(config, point, 0.4)
    for values, expected, still in (
        (np.array(found["ratio"][0]), theory.ratio, cf.identity_norm_ratio(0.4)),
        (np.array(found["trace"][0]), theory.trace, cf.identity_hessian_trace(0.4, 6)),
    ):
        error = values.std() / 10
        assert abs(values.mean() - expected) < 3 * error
        assert abs(values.mean() - still) > 5 * error


def test_fig3_shift_of_one_scalar_chain_is_that_of_its_product():
    """`<log(1 - eta g)> = 0` gives `<e> = -kick` for `u = w`, `V = 1`."""
    assert fluctuation_shifts(1.0, 1, 1e-3) == pytest.approx((0, -1e-3), abs=1e-15)


def test_smallest_trace_over_the_orbit_is_that_of_the_equilibrium_only_with_isotropic_label_noise():
    rng = torch.Generator().manual_seed(2)
    u, w, root = (torch.randn(shape, dtype=F64, generator=rng) for shape in ((3, 3), (3, 4), (4, 6)))
    sigma_x, smallest = root @ root.mT, fig3.smallest_trace(u, w, root @ root.mT)
    for noise, sharper in ((torch.ones(3, dtype=F64), False), (torch.tensor([9.0, 1, 1], dtype=F64), True)):
        at = cf.two_layer(u @ w, *cf.noise_matrices(sigma_x, noise.diag()))
        found = float(cf.two_layer_hessian_trace(*at, sigma_x)) / smallest
        assert found > 1.1 if sharper else found == pytest.approx(1, rel=1e-8)


SIGMA = treated.covariance(treated.Dataset(scale=2.0, spread=6.0), 5)


def direct(treatment: str, minibatches: int, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`z` and the treated x of minibatches, samples as rows, by torch's own normalisations."""
    z = torch.randn(minibatches, batch, len(SIGMA), dtype=F64, generator=torch.Generator().manual_seed(3))
    x = z @ spd.sqrtm(SIGMA)
    if treatment == "layer":
        return z, torch.nn.functional.layer_norm(x, (len(SIGMA),), eps=0.0) @ treated.sum_free_basis(len(SIGMA)).mT
    channels = torch.nn.functional.batch_norm(
        x.transpose(0, 1).reshape(batch, -1), None, None, training=True, eps=1e-15
    )
    return z, channels.reshape(batch, minibatches, -1).transpose(0, 1)


@pytest.mark.parametrize("treatment", ["batch", "layer"])
def test_repnorm_covariance_and_noise_of_normalised_inputs_are_those_of_a_direct_sample(treatment):
    batch, minibatches = 10, 20_000
    at = treated.minimum(treated.Inputs(treatment, SIGMA, batch), minibatches)
    z, x = direct(treatment, minibatches, batch)
    covariance = (x.mT @ x).mean(0) / batch
    torch.testing.assert_close(at.sigma, covariance, rtol=0, atol=0.02)
    torch.testing.assert_close(at.product @ covariance, (z.mT @ x).mean(0) / batch, rtol=0, atol=0.02)
    eps = torch.randn(z.shape, dtype=F64, generator=torch.Generator().manual_seed(4))
    g = (x @ at.product.mT - z - eps).mT @ x / batch
    for found, expected in ((at.gam_u, g @ g.mT), (at.gam_w, g.mT @ g)):
        torch.testing.assert_close(found, batch * expected.mean(0), rtol=0, atol=0.04 * float(found.max()))
        assert float((found.diagonal() - batch * expected.mean(0).diagonal()).abs().max()) < 0.03 * float(found.max())


def test_repnorm_noise_of_batch_normalised_inputs_to_leading_order():
    """`Gam_W = d C + C ((C o C) / 2 o C^-1) C`, C the correlations: the batch's scales have covariance `C o C / 2S`."""
    c = SIGMA / torch.outer(SIGMA.diagonal(), SIGMA.diagonal()).sqrt()
    at = treated.minimum(treated.Inputs("batch", SIGMA, 1000), 20_000)
    expected = len(c) * c + c @ (c * c / 2 * torch.linalg.inv(c)) @ c
    torch.testing.assert_close(at.gam_w, expected, rtol=0, atol=0.02 * float(expected.max()))
    assert float((expected - len(c) * c).max()) > 0.1 * float(expected.max())


def test_repnorm_equilibrium_of_layer_normalised_inputs_is_that_of_the_generic_machinery():
    at = treated.minimum(treated.Inputs("layer", SIGMA, 10), 20_000)
    u, w = cf.two_layer(at.product, at.gam_u, at.gam_w)
    z, x = (m.flatten(0, 1) for m in direct("layer", 1, 40_000))
    y = z + torch.randn(z.shape, dtype=F64, generator=torch.Generator().manual_seed(4))
    start_u, start_w = cf.norm_balanced(at.product)
    found_w, found_u = generic.generic_equilibrium([start_w, start_u], x, y, SGDConfig(0.01, 10))
    ratio = lambda u, w: float(u.square().sum() / w.square().sum())
    assert ratio(found_u, found_w) == pytest.approx(ratio(u, w), rel=0.02)
    independent = cf.two_layer(at.product, *cf.noise_matrices(at.sigma, torch.eye(5, dtype=F64)))
    assert abs(ratio(*independent) / ratio(u, w) - 1) > 0.1


def test_repnorm_starts_are_far_from_the_predictions_they_are_judged_against():
    norm_ratio = lambda u, w: u.square().sum((-2, -1)) / w.square().sum((-2, -1))
    config = repnorm.SCALES["quick"]
    for treatment in treated.TREATMENTS:
        at = treated.minima(config, treatment)
        predicted = cf.two_layer(at.product, at.gam_u, at.gam_w)
        for factor in (config.stretch, 1 / config.stretch):
            start = stretched(at.product, factor)
            ratio = norm_ratio(*start) / norm_ratio(*predicted)
            trace = cf.two_layer_hessian_trace(*start, at.sigma) / cf.two_layer_hessian_trace(*predicted, at.sigma)
            assert (ratio.log().abs() > 1.2).all(), treatment
            assert (trace > 1.2).all(), treatment


@pytest.mark.parametrize("treatment", treated.TREATMENTS)
def test_repnorm_few_columns_have_the_law_of_the_samples(treatment):
    inputs = treated.Inputs(treatment, SIGMA, 10)
    moments = []
    for draw in (inputs.samples, inputs.columns):
        z, x = draw(20_000, torch.Generator().manual_seed(6))
        if treatment == "batch":
            z = z - z.mean(-1, keepdim=True) if draw == inputs.samples else z
            torch.testing.assert_close((x @ x.mT).diagonal(dim1=1, dim2=2), torch.full((20_000, 5), 10, dtype=F64))
        gram, cross = x @ x.mT / 10, z @ x.mT / 10
        moments.append([m.mean(0) for m in (gram, cross, gram @ gram, cross.mT @ cross)])
    for of_samples, of_columns in zip(*moments, strict=True):
        torch.testing.assert_close(of_columns, of_samples, rtol=0, atol=0.03 * float(of_samples.max()))


def test_repnorm_noise_common_to_a_batch_normalised_minibatch_of_a_relu_net():
    rng = torch.Generator().manual_seed(7)
    u, w = torch.randn(5, 8, dtype=F64, generator=rng), torch.randn(8, 5, dtype=F64, generator=rng)
    c = SIGMA / torch.outer(SIGMA.diagonal(), SIGMA.diagonal()).sqrt()
    batch = 500
    z, x = direct("batch", 2000, batch)
    mean, hidden = z.mean(1), x @ w.mT
    on_u = mean.unsqueeze(2) * torch.relu(hidden).mean(1).unsqueeze(1)
    on_w = (mean @ u).unsqueeze(2) * ((hidden > 0).to(x).mT @ x / batch)
    extra_w, extra_u = treated.common_noise(u, w, c)
    assert 2 * batch * float(on_u.square().sum((1, 2)).mean()) == pytest.approx(float(extra_u), rel=0.05)
    assert 2 * batch * float(on_w.square().sum((1, 2)).mean()) == pytest.approx(float(extra_w), rel=0.05)


class _NoisyGradients:
    """Gradients of mean 1 with standard deviations 3 for W `[R, 4, 2]` and 2 for U `[R, 5, 4]`, at any weights."""

    def minibatch_gradient(self, params, rng):
        return [
            1 + scale * torch.randn(p.shape, dtype=F64, generator=rng)
            for p, scale in zip(params, (3.0, 2.0), strict=True)
        ]


def test_repnorm_a_formula_for_the_noise_is_held_against_drawn_minibatches():
    params = [torch.ones(16, 4, 2, dtype=F64), torch.ones(16, 5, 4, dtype=F64)]
    rates, right, with_mean = torch.full((16,), 0.01, dtype=F64), 9 * 8 / (4 * 20), 10 * 8 / (5 * 20)
    for balance, expected in ((right, 0.0), (1.1 * right, 0.1), (with_mean, with_mean / right - 1)):
        formula = lambda p, balance=balance: torch.full((len(p[0]),), balance, dtype=F64)
        rng = torch.Generator().manual_seed(8)
        gaps = treated.formula_gaps(_NoisyGradients(), params, rates, formula, rng)
        assert float(gaps.mean()) == pytest.approx(expected, abs=4 * float(gaps.std()) / 4)
        assert float(gaps.std()) < 0.03


def test_repnorm_small_run_is_judged_and_drawn():
    small = {
        "d": 5,
        "steps": 8,
        "relu_steps": 8,
        "hidden_steps": 8,
        "seeds": 2,
        "widths": dict.fromkeys(treated.WIDTHS, 4),
    }
    config = changed(repnorm.SCALES["quick"], {**small, "hidden": {"window": [0.5, 0.75]}})
    results = Results(config, tuple((p, repnorm.compute(config, p)) for p in repnorm.points(config)))
    claims = [v.claim for v in repnorm.verdicts(results)]
    assert len(set(claims)) == len(claims)
    assert all(any(f"{net}, {t} norm" in c for c in claims) for net in ("linear", "ReLU") for t in ("batch", "layer"))
    assert sum("off from that of drawn minibatches by" in v.analysis for v in repnorm.verdicts(results)) == 2
    repnorm.EXPERIMENT.figure(results)
