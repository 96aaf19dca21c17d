"""Whether a penalty in the loss or a normalisation's eps breaks a scale: both planted, apart and together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import noetherflow as nf
from noetherflow.diagnosis import breaking
from noetherflow.diagnosis.finding import NOTHING, Finding
from noetherflow.diagnosis.histories import recent
from noetherflow.diagnosis.penalty import norm_pulls, pull_of

pytestmark = pytest.mark.usefixtures("every_finding_says_what_to_do")

STEPS = 200


def net(norm: type[nn.Module], eps: float) -> nn.Sequential:
    torch.manual_seed(0)
    first = nn.Linear(12, 16, bias=False), norm(16, eps=eps), nn.ReLU()
    return nn.Sequential(*first, nn.Linear(16, 16, bias=False), norm(16, eps=eps), nn.ReLU(), nn.Linear(16, 5))


def run(
    norm: type[nn.Module], penalties: tuple[float, float], eps: float, kind: str = "SGD", every: int = 1
) -> nf.Ledger:
    """A run with `c |W|^2` of both layers before a normalisation in its loss."""
    model = net(norm, eps)
    x = torch.randn(512, 12)
    y = (x @ torch.randn(12, 5) + torch.randn(512, 5)).argmax(1)
    rates = {"SGD": {"lr": 0.1, "momentum": 0.9}, "AdamW": {"lr": 1e-3, "weight_decay": 0.1}}[kind]
    optimizer = getattr(torch.optim, kind)(model.parameters(), **rates)
    with nf.Ledger(model, optimizer, nf.find_symmetries(model, x[:4]), every=every, estimate_every=20) as ledger:
        for k in range(STEPS):
            chosen = torch.randint(512, (32,), generator=torch.Generator().manual_seed(k))
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[chosen]), y[chosen])
            for layer, strength in zip((0, 3), penalties, strict=True):
                loss = loss + strength * model[layer].weight.square().sum()
            loss.backward()
            optimizer.step()
    return ledger


def told(ledger: nf.Ledger) -> Finding:
    return ledger.diagnose()["violation"]


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm])
@pytest.mark.parametrize("strength", [0.01, 0.1])
def test_a_penalty_alone(norm: type[nn.Module], strength: float) -> None:
    found = told(run(norm, (strength, strength), 1e-5))
    assert "holds a penalty on the norm of" in found.title
    assert f"about {strength:g} |W|^2" in found.title
    assert "eps" not in found.title
    assert f"weight_decay={2 * strength:g}" in found.advice


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_eps_alone(kind: str) -> None:
    """At any size, also beyond a tenth, which used to be taken for a penalty."""
    ledger = run(nn.BatchNorm1d, (0.0, 0.0), 1.0, kind)
    checks = [recent(ledger.run_data(), "check", i) for i in range(2)]
    found = told(ledger)
    assert max(checks) > 0.1
    assert "is no exact symmetry here" in found.title
    assert "The eps of the normalisation after it explains" in found.means
    assert "a penalty would pull alike at every step" in found.sure
    assert found.advice.startswith(NOTHING)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm])
def test_both_together(norm: type[nn.Module]) -> None:
    found = told(run(norm, (0.01, 0.01), 0.3))
    assert "holds a penalty on the norm of" in found.title
    assert "The eps of the normalisation after it counts as well" in found.title


def test_neither() -> None:
    assert told(run(nn.BatchNorm1d, (0.0, 0.0), 1e-5)).severity == "good"


def test_a_penalty_under_adam_has_no_number() -> None:
    found = told(run(nn.BatchNorm1d, (0.01, 0.01), 1e-5, "AdamW"))
    assert "some c |W|^2" in found.title
    assert "give the optimiser weight_decay for it" in found.advice
    assert "eps" not in found.title


def test_a_penalty_on_one_layer_of_two_is_put_down_to_no_eps() -> None:
    """The layer that has it is named, by the norm that the pull of both is in proportion to."""
    ledger = run(nn.BatchNorm1d, (0.0, 0.05), 1e-5)
    assert "3 [scale]" in norm_pulls(ledger.run_data())
    found = told(ledger)
    assert "holds a penalty on the norm of `3 [scale]`, about 0.05" in found.title
    assert "eps" not in found.title
    assert list(norm_pulls(ledger.run_data())) == ["3 [scale]"]


def test_strided_recording_tells_the_same() -> None:
    assert "about 0.01 |W|^2" in told(run(nn.LayerNorm, (0.01, 0.01), 1e-5, every=10)).title


def test_a_pull_that_changes_is_left_open() -> None:
    """Positive and steady over some steps, but not along the run: neither is claimed."""
    rising = pull_of(np.linspace(0.01, 0.05, 40))
    assert rising is not None
    assert not rising.is_penalty
    assert not rising.is_clear
    either = pull_of(np.random.default_rng(0).standard_normal(40))
    assert either is not None
    assert either.is_clear
    assert not either.is_penalty
    steady = pull_of(np.full(40, -0.01))
    assert steady is not None
    assert steady.is_clear
    assert not steady.is_penalty
    (found,) = breaking.violated_in_training([("w", 0.02)], {"w"}, {})
    assert "a penalty on this weight would look alike" in found.sure
