"""An analysis comes back with what can be said: what the samples do not determine is open, with the remedy."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import noetherflow as nf
from noetherflow.diagnosis import dead
from noetherflow.diagnosis.facts import PartActivity
from noetherflow.errors import MomentError, SampleNumberError
from noetherflow.report.analysis import write_analysis

pytestmark = pytest.mark.usefixtures("every_finding_says_what_to_do")

LOSS = nn.CrossEntropyLoss()


def setting(samples=512, batch=32, normalised=False):
    """A classifier and a list of batches: fresh data as far as anybody knows, so that the mean is one of a sample."""
    torch.manual_seed(0)
    x = torch.randn(samples, 16)
    y = (x[:, :2].sum(1) > 0).long()
    norm = [nn.BatchNorm1d(32)] if normalised else []
    model = nn.Sequential(nn.Linear(16, 32), *norm, nn.ReLU(), nn.Linear(32, 2))
    return model, list(zip(x.split(batch), y.split(batch), strict=True))


def momentum(model, lr=0.05):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def test_too_few_samples_for_momentum_leave_the_flow_open_and_the_rest_answered():
    model, data = setting()
    analysis = nf.analyze(model, LOSS, data, momentum(model))
    (why,) = analysis.unanswered
    assert "608" in why.advice
    for topic in ("norms", "balance"):
        asked = analysis.diagnosis.about(topic)[0]
        assert asked.severity == "open"
        assert "512 samples cannot tell" in asked.title
        assert "608 samples" in asked.advice
    top = nf.top_eigenvalue(model, nf.per_sample(LOSS), data[:4])
    assert analysis.diagnosis["learning-rate"].title.startswith("At these weights, before training, the learning rate")
    assert analysis.diagnosis["learning-rate"].evidence[1].value == pytest.approx(2 * 1.9 / top, rel=1e-3)
    assert analysis.diagnosis["batch-size"].severity == "good"
    assert analysis.diagnosis["certificate"].severity == "good"
    with pytest.raises(SampleNumberError, match="608"):
        _ = analysis.equilibrium
    with pytest.raises(MomentError, match="608"):
        _ = analysis.flow


def test_as_many_samples_as_it_says_are_enough():
    model, data = setting(608)
    analysis = nf.analyze(model, LOSS, data, momentum(model), curvature=False)
    assert not analysis.unanswered
    assert len(analysis.equilibrium.settled) == len(analysis.flow.details) == 1
    assert "cannot tell" not in str(analysis)


def test_it_prints_writes_a_page_and_becomes_json(tmp_path):
    model, data = setting()
    analysis = nf.analyze(model, LOSS, data, momentum(model), curvature=False)
    assert "where they settle is not known" in str(analysis)
    assert analysis.rows() == []
    assert json.loads(json.dumps(analysis.to_dict()))["flow"] is None
    assert "608" in write_analysis(tmp_path / "page.html", analysis, "a classifier").read_text()


@pytest.mark.parametrize("normalised", [False, True])
def test_one_sample_or_minibatch_leaves_all_that_noise_does_open(normalised):
    model, data = setting(32 if normalised else 1, normalised=normalised)
    found = nf.diagnose(model, LOSS, data, nf.SGDConfig(lr=0.05, batch_size=32))
    assert all(found.about(topic)[0].severity == "open" for topic in ("norms", "balance", "batch"))
    assert "at least 2" in found["batch-size"].advice
    assert found["certificate"].severity == "good"


def test_batches_that_hold_all_the_data_have_no_noise_to_settle_by():
    model, data = setting(32, normalised=True)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*data[0]), batch_size=32, shuffle=True, generator=torch.Generator()
    )
    found = nf.diagnose(model, LOSS, loader, momentum(model), curvature=False)
    assert "hold all samples" in found["balance"].title
    assert found["balance"].severity == "open"


def test_repeated_minibatches_are_not_asked_for_fewer_than_there_are():
    """Two minibatches an epoch: what momentum leaves of their noise takes more than the 120 that were measured."""
    model, data = setting(64, normalised=True)
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=32, shuffle=True)
    (why,) = nf.analyze(model, LOSS, loader, momentum(model), curvature=False).unanswered
    assert isinstance(why.cause, SampleNumberError)
    assert why.cause.unit == "minibatches"
    assert why.cause.needed > 120


def test_dead_units_take_a_hundred_samples():
    silent = PartActivity("a -> b", "unit", torch.ones(4).numpy(), torch.tensor([0.0, 0.0, 0.0, 1.0]).numpy())
    (few,) = dead.dead_units([silent], samples=99)
    (many,) = dead.dead_units([silent], samples=100)
    assert (few.severity, many.severity) == ("open", "act")
    assert "3 of 4" in few.title


@pytest.mark.parametrize("frozen", ["0", "2"])
def test_a_frozen_layer_leaves_no_symmetry_and_the_rest_answered(frozen):
    model, data = setting()
    model.get_submodule(frozen).requires_grad_(False)
    found = nf.diagnose(model, LOSS, data, nf.SGDConfig(lr=0.05, batch_size=32), curvature=False)
    assert found["balance"].title == "No two layers can trade scale here, so none is imbalanced."
    assert found["batch-size"].severity == "good"


def test_the_command_line_says_it():
    from noetherflow.cli.app import app

    args = ["analyze", "linear-factorisation", "--momentum", "0.99", "--batch-size", "256", "--lr", "0.01"]
    outcome = CliRunner().invoke(app, args)
    assert outcome.exit_code == 0, outcome.output
    assert "measure at least" in outcome.output
