"""The experiment adam: gradients of its student, and SGD's and Adam's points told apart in a short run."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from noetherflow_paper import experiment
from noetherflow_paper.experiment import Results
from noetherflow_paper.experiments import adam, basis, rotational
from noetherflow_paper.experiments.adam import LeakyStudent, OptimizerRun
from noetherflow_paper.experiments.rotational import ScaleFreeLayer
from noetherflow_paper.records import ExperimentPoint


def test_gradients_of_the_student_are_autograds():
    student = LeakyStudent.of(adam.SCALES["quick"])
    torch.manual_seed(0)
    params = [torch.randn(3, *p.shape, dtype=torch.float64).requires_grad_() for p in student.teacher]
    found = student.minibatch_gradient([p.detach() for p in params], torch.Generator().manual_seed(1))
    x, y = student.draw(3, student.batch, torch.Generator().manual_seed(1))
    w, u = params
    prediction = torch.nn.functional.leaky_relu(x @ w.mT, student.slope) @ u.mT
    (prediction - y).square().sum(-1).mean(1).sum().backward()
    for p, g in zip(params, found, strict=True):
        torch.testing.assert_close(g, p.grad)


def test_the_position_on_the_orbit_is_the_log_of_the_group_element():
    student = LeakyStudent.of(adam.SCALES["quick"])
    w, u = student.teacher
    element = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)
    found = student.position([element[:, None] * w[None], u[None] / element])["position"][0]
    torch.testing.assert_close(found, element.log())


@pytest.fixture
def first_series(monkeypatch):
    """The task of the first series of seeds: on another one terms of order lr may be larger."""
    monkeypatch.setattr(experiment, "SERIES", 0)


def test_sgd_and_adam_settle_at_different_points_both_predicted(first_series):
    """The simulation of theory.md section 13 at larger rates: terms of order lr are still small."""
    runs = {
        "SGD": OptimizerRun(lr=0.04, steps=8000),
        "Adam": OptimizerRun(lr=0.02, steps=4500, betas=(0.9, 0.998)),
        "AdamW": OptimizerRun(lr=0.02, steps=3000, betas=(0.9, 0.998), decay=0.1),
    }
    config = replace(adam.SCALES["quick"], starts=8, measured=8000, runs=runs)
    points = [ExperimentPoint(name=name) for name in runs]
    results = Results(config, tuple((p, adam.compute(config, p)) for p in points))
    ends = {name: adam.ends(results, name) for name in runs}
    predicted = {name: results.array(name, "predicted") for name in runs}
    for name, end in ends.items():
        assert np.abs(end.mean(0) - predicted[name]).max() < 0.15, name
        spread = np.abs(results.array(name, "start")).mean()
        assert end.std(0).max() < spread / 3, f"{name} forgets where it started"
    apart = (ends["Adam"] - ends["SGD"]).mean(1)
    error = apart.std() / len(apart) ** 0.5
    assert abs(apart.mean() - (predicted["Adam"] - predicted["SGD"]).mean()) < 3 * error + 0.03
    assert apart.mean() > 10 * error, "told apart"
    assert np.abs(ends["AdamW"].mean(0) - ends["Adam"].mean(0)).max() > 0.1, "decay moves the point"


def test_the_starts_of_basis_are_one_map_and_the_unrotated_one_is_at_the_bound():
    target = basis.WhitenedTarget.of(basis.SCALES["quick"])
    w, u = target.starts(4, torch.Generator().manual_seed(0))
    torch.testing.assert_close(u @ w, target.net.product.expand(4, -1, -1), rtol=1e-10, atol=1e-12)
    root = target.singular.sqrt()
    a, b = target.sigma_x.sqrt().sum(), target.sigma_eps.sqrt().sum()
    share = b / a
    modes_w = (root / share.sqrt())[:, None] * target.right / target.sigma_x.sqrt()
    modes_u = target.left * (root * share.sqrt()) / target.sigma_eps.sqrt()[:, None]
    there = target.record([modes_w[None], modes_u[None]])
    torch.testing.assert_close(there["psi"], torch.ones(1, dtype=torch.float64))
    assert float(there["overlap"]) < 1e-12
    assert float(target.record([w, u])["psi"].min()) > 1


def test_gradient_noise_of_the_target_makes_psi_the_sum_of_roots():
    """At the target `E[g^2]` of an entry factors, so that `sum s` is Psi up to a factor that all entries share."""
    config = replace(basis.SCALES["quick"], batch=1)
    target = basis.WhitenedTarget.of(config)
    start = target.starts(6, torch.Generator().manual_seed(1))
    rng = torch.Generator().manual_seed(2)
    wide = [p.repeat_interleave(4000, 0) for p in start]
    squares = [torch.zeros_like(p) for p in start]
    for _ in range(10):
        for total, g in zip(squares, target.net.minibatch_gradient(wide, rng), strict=True):
            total += g.square().reshape(6, 4000, *total.shape[1:]).mean(1) / 10
    sums = sum(s.sqrt().sum((-2, -1)) for s in squares)
    psi = target.record(start)["psi"] * target.bound()
    ratio = sums / psi
    assert float(ratio.std() / ratio.mean()) < 0.005
    assert float(psi.std() / psi.mean()) > 0.015, "the starts differ in Psi itself"


def test_gradients_of_the_scale_free_layer_are_autograds():
    config = rotational.SCALES["quick"]
    layer = ScaleFreeLayer.of(config, 3.0)
    w = torch.randn(3, *layer.teacher.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w.requires_grad_()
    (found,) = layer.minibatch_gradient([w.detach()], torch.Generator().manual_seed(1))
    x, y = layer.draw(3, config.batch, torch.Generator().manual_seed(1))
    unit = w / w.flatten(1).norm(dim=1)[:, None, None]
    (x @ unit.mT - y).square().sum(-1).mean(1).sum().backward()
    torch.testing.assert_close(found, w.grad)
    assert float((found * w.detach()).sum((1, 2)).abs().max()) < 1e-12, "the scale does not matter"


def test_adamw_holds_a_normalised_layer_where_its_noise_says(first_series):
    """In a short run at a larger rate; the formula for uniform noise is off by far more."""
    config = replace(rotational.SCALES["quick"], lr=0.01, b2=0.998, steps=4000, starts=12, measured=8000)
    (_, point) = rotational.points(config)
    results = Results(config, ((point, rotational.compute(config, point)),))
    norms, target = rotational.ends(results, point.name), results[point.name]["predicted"]
    assert abs(norms.mean() / target - 1) < 0.05
    assert abs(norms.mean() / rotational.uniform_norm(config) - 1) > 0.2
    assert abs(results.array(point.name, "angles").mean() / rotational.angle(config, target) - 1) < 0.05


def test_lion_steps_are_lions_as_torch_would_write_them():
    """The rewritten updates of SGD against Lion written out, with weight decay."""
    run = OptimizerRun(lr=0.1, steps=5, betas=(0.9, 0.99), decay=0.2, lion=True)
    steps, mean = adam.LionSteps(run), torch.zeros(2, 3, dtype=torch.float64)
    p = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for k in range(5):
        g = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(k + 1))
        updates = [0.1 * g]
        steps(k, [p], updates)
        expected = (1 - 0.1 * 0.2) * p - 0.1 * torch.sign(0.9 * mean + 0.1 * g)
        mean = 0.99 * mean + 0.01 * g
        torch.testing.assert_close(p - updates[0], expected)
        p = expected


def test_lion_settles_near_where_adam_does():
    """Without decay; the rate is large here, and the deviation falls with it (0.09 at 0.001, 0.04 at 0.0005)."""
    runs = {"Lion": OptimizerRun(lr=0.004, steps=8000, betas=(0.9, 0.99), lion=True)}
    config = replace(adam.SCALES["quick"], starts=8, measured=8000, runs=runs)
    (point,) = adam.points(config)
    results = Results(config, ((point, adam.compute(config, point)),))
    end, target = adam.ends(results, "Lion").mean(0), results.array("Lion", "predicted")
    sgd = adam.predicted(LeakyStudent.of(config), config, OptimizerRun(lr=0.02, steps=1).settings(config.batch)).numpy()
    assert np.abs(end - target).max() < 0.25
    assert np.corrcoef(end, target)[0, 1] > 0.97
    assert np.linalg.norm(end - target) < 0.6 * np.linalg.norm(end - sgd), "SGD's point is another"
