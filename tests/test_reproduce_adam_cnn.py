"""The experiment adam_cnn: gradients, orbit and measurement of its student against autograd and sampling."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import noetherflow as nf

pytest.importorskip("sklearn")

from noetherflow_paper.experiment import Results
from noetherflow_paper.experiments import adam_cnn
from noetherflow_paper.experiments.adam import OptimizerRun
from noetherflow_paper.experiments.adam_cnn import ConvStudent
from noetherflow_paper.records import ExperimentPoint


@pytest.fixture(scope="module")
def student() -> ConvStudent:
    return ConvStudent.of(adam_cnn.SCALES["quick"])


def as_params(v: torch.Tensor, w: torch.Tensor, u: torch.Tensor) -> list[torch.Tensor]:
    """Tensors of the module's shapes as the student has them."""
    return [v.flatten(1), w.permute(0, 2, 3, 1).flatten(1), u.unflatten(1, (3, 4)).mT.flatten(1)]


def test_labels_are_those_of_a_plain_convolutional_net(student: ConvStudent) -> None:
    torch.testing.assert_close(student.model()(student.images), student.labels)


def test_gradients_of_the_student_are_autograds(student: ConvStudent) -> None:
    rng = torch.Generator().manual_seed(0)
    logs = torch.randn(2, 6, generator=rng, dtype=torch.float64)
    params = [p + 0.1 * torch.randn(p.shape, generator=rng, dtype=torch.float64) for p in student.moved(logs)]
    chosen = torch.randint(len(student.images), (2, 5), generator=rng)
    y = torch.randn(2, 5, 10, generator=rng, dtype=torch.float64)
    found = student.gradient(params, student.patches[chosen], y)
    for r in range(2):
        v, w, u = (p[r] for p in params)
        net = replace(student, teacher=(v, w, u)).model()
        (net(student.images[chosen[r]]) - y[r]).square().sum(1).mean().backward()
        grads = [net[i].weight.grad for i in (0, 2, 5)]
        plain = [
            grads[0].flatten(1),
            grads[1].permute(0, 2, 3, 1).flatten(1),
            grads[2].unflatten(1, (3, 4)).mT.flatten(1),
        ]
        for own, there in zip(found, plain, strict=True):
            torch.testing.assert_close(own[r], there)


def test_moved_teachers_are_one_function_at_the_position_that_they_were_moved_to(student: ConvStudent) -> None:
    logs = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    params = student.moved(logs)
    torch.testing.assert_close(student.position(params)["position"], logs)
    for r in range(3):
        net = replace(student, teacher=tuple(p[r] for p in params)).model()
        torch.testing.assert_close(net(student.images[:20]), student.labels[:20])
        assert float((net[0].weight - student.model()[0].weight).detach().abs().max()) > 0.1


def test_the_measurement_has_the_second_moments_of_minibatches(student: ConvStudent) -> None:
    """Squares of the gradients of minibatches drawn as in training, within five standard errors."""
    _, _, moments = adam_cnn.measured(student)
    settings = nf.AdamConfig(0.01, student.batch)
    rng = torch.Generator().manual_seed(2)
    wide = [t[None].expand(4000, *t.shape) for t in student.teacher]
    squares = [g.square() for g in student.minibatch_gradient(wide, rng)]
    plain = as_params(*(moments.squares[f"{i}.weight"] * settings.covariance_factor for i in (0, 2, 5)))
    for sampled, expected in zip(squares, plain, strict=True):
        z = (sampled.mean(0) - expected) / (sampled.std(0) / 4000**0.5)
        assert float(z.abs().max()) < 5
        assert float(z.square().mean()) < 2
    for mean in moments.mean.values():
        assert float(mean.abs().max()) < 0.05


def test_a_slower_run_keeps_what_the_equilibrium_depends_on() -> None:
    run = OptimizerRun(lr=0.02, steps=100, betas=(0.9, 0.998), decay=0.1)
    half = adam_cnn.slower(run, 2)
    assert (half.lr, half.decay, half.steps) == (0.01, 0.05, 400)
    assert half.betas == (0.9, pytest.approx(0.999))


@pytest.mark.slow
def test_sgd_and_adam_settle_at_different_points_both_predicted() -> None:
    """At larger rates than the experiment's: terms of order lr are still small beside what tells them apart."""
    runs = {
        "SGD": OptimizerRun(lr=0.045, steps=10_000),
        "Adam": OptimizerRun(lr=0.015, steps=7_000, betas=(0.9, 0.999)),
    }
    config = replace(adam_cnn.SCALES["quick"], starts=8, runs=runs)
    points = [ExperimentPoint(name=name) for name in runs]
    results = Results(config, tuple((p, adam_cnn.compute(config, p)) for p in points))
    for name in runs:
        off = adam_cnn.ends(results, name).mean(0) - results.array(name, "predicted")
        assert np.abs(off).max() < 0.15
    gap = results.array("Adam", "predicted") - results.array("SGD", "predicted")
    apart = (adam_cnn.ends(results, "Adam") - adam_cnn.ends(results, "SGD")).mean(1)
    assert abs(apart.mean() / gap.mean() - 1) < 0.25
    assert abs(apart.mean()) > 10 * apart.std() / 8**0.5
