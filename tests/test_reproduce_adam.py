"""The experiment adam: gradients of its student, and SGD's and Adam's points told apart in a short run."""

from dataclasses import replace

import numpy as np
import torch

from noetherflow_paper.experiment import Results
from noetherflow_paper.experiments import adam
from noetherflow_paper.experiments.adam import LeakyStudent, OptimizerRun
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


def test_sgd_and_adam_settle_at_different_points_both_predicted():
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
