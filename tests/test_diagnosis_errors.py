"""How well the factors of a diagnosis are known: their error bars against the scatter over sets of samples."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import noetherflow as nf
from noetherflow.diagnosis.parts import _log_errors
from noetherflow.errors import SampleNumberError

SETS, BATCHES, SIZE = 12, 40, 16


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16, dtype=torch.float64), torch.tensor(y)


def trained() -> nn.Sequential:
    """A small classifier after 60 steps, where the mean gradient still counts."""
    torch.manual_seed(0)
    x, y = digits()
    model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(60):
        i = torch.randint(len(x), (32,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[i]), y[i]).backward()
        optimizer.step()
    return model


def drawn(seed: int, batches: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x, y = digits()
    generator = torch.Generator().manual_seed(seed)
    chosen = [torch.randint(len(x), (SIZE,), generator=generator) for _ in range(batches)]
    return [(x[i], y[i]) for i in chosen]


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda model: torch.optim.SGD(model.parameters(), lr=0.05),
        lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3),
    ],
    ids=["SGD", "momentum", "AdamW"],
)
def test_the_error_of_a_factor_is_its_scatter_over_sets_of_samples(
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
) -> None:
    model = trained()
    logs, errors = [], []
    for seed in range(SETS):
        found = nf.analyze(
            model, nn.CrossEntropyLoss(), drawn(seed, BATCHES), optimizer(model), steps=100, curvature=False
        )
        logs.append(found.equilibrium["0 -> 2"].element.log().numpy())
        errors.append(_log_errors(found.flow["0 -> 2"], found.sgd).numpy())
    scatter, known = np.std(logs, axis=0, ddof=1), np.isfinite(errors).all(0)
    assert known.sum() > 8
    ratio = np.mean(errors, axis=0)[known] / scatter[known]
    assert 0.7 < np.median(ratio) < 2.5  # the scatter of 12 sets is known to 21 %, and the median is over units
    assert ratio.min() > 0.3


def test_no_equilibrium_of_adam_from_samples_that_cannot_tell_the_mean_gradient_from_noise() -> None:
    """Its b1 counts the mean gradient 19 times, so that 128 samples at batch size 16 put units of a trained Llama 20
    times away from an equilibrium that they are at.
    """
    model = trained()
    adam = nf.AdamConfig(lr=1e-3, batch_size=SIZE)
    syms = nf.find_symmetries(model, digits()[0][:2])

    def settled(batches: int, settings: nf.AdamConfig) -> nf.Equilibrium:
        loss = nf.per_sample(nn.CrossEntropyLoss())
        moments = nf.gradient_moments(model, loss, drawn(0, batches), syms, entries=True)
        return nf.noise_equilibrium(model, syms, moments, settings)

    with pytest.raises(SampleNumberError, match=r"b1 0\.9; measure at least 304 samples"):
        settled(8, adam)
    with pytest.raises(SampleNumberError):
        settled(18, adam)
    assert settled(19, adam).converged
    assert settled(8, nf.AdamConfig(lr=1e-3, batch_size=SIZE, betas=(0.0, 0.999))).converged
    assert settled(8, nf.AdamConfig(lr=1e-3, batch_size=SIZE, dataset_size=8 * SIZE)).converged


def test_a_loader_gives_as_many_samples_as_an_equilibrium_takes() -> None:
    x, y = digits()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x.repeat(4, 1), y.repeat(4)), batch_size=256)
    model = trained()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = nf.analyze(model, nn.CrossEntropyLoss(), loader, optimizer, steps=100, curvature=False)
    assert found.moments.samples >= 19 * 256
    assert not found.unanswered


@pytest.mark.parametrize(("eps", "severity"), [(1e-8, None), (0.1, "act")])
def test_the_share_of_entries_below_eps_is_measured(eps: float, severity: str | None) -> None:
    model = trained()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=eps)
    found = nf.diagnose(model, nn.CrossEntropyLoss(), drawn(0, 20), optimizer, curvature=False)
    told = [f for f in found.findings if f.rule == "eps"]
    assert [f.severity for f in told] == ([] if severity is None else [severity])


def test_the_noise_scale_is_told_with_its_interval() -> None:
    model = trained()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    found = nf.analyze(model, nn.CrossEntropyLoss(), drawn(0, 40), optimizer, curvature=False)
    low, high = found.moments.noise_scale().interval()
    assert 0 < low < found.moments.noise_scale().value < high
    assert (
        f"against a noise scale of {found.moments.noise_scale().total} at these" in found.diagnosis["batch-size"].title
    )


class Attention(nn.Module):
    """Gains and value heads act on the same weights, so that leg Grams do not determine the equilibrium."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(6, eps=0.0)
        self.v, self.o = nn.Linear(6, 4, bias=False), nn.Linear(4, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(self.v(self.norm(x)).cumsum(1)).sum(1)


def test_a_joint_equilibrium_that_takes_factors_has_them_from_the_one_measurement() -> None:
    """Its elements are those of a measurement for the equilibrium alone; the flow takes no factors."""
    torch.manual_seed(0)
    model = Attention().double()
    x, y = torch.randn(160, 3, 6, dtype=torch.float64), torch.randint(5, (160,))
    batches = list(zip(x.split(16), y.split(16), strict=True))
    loss = nn.CrossEntropyLoss()
    found = nf.analyze(model, loss, batches, nf.SGDConfig(lr=0.1, batch_size=16), curvature=False)
    assert found.moments.factors
    assert not found.flow.moments.factors
    assert found.equilibrium.joint
    moments = nf.gradient_moments(model, nf.per_sample(loss), batches, found.symmetries, for_="equilibrium")
    alone = nf.noise_equilibrium(model, found.symmetries, moments, found.sgd)
    for name, element in found.equilibrium.elements.items():
        torch.testing.assert_close(element, alone.elements[name], rtol=1e-6, atol=1e-9)


def test_without_room_for_factors_each_symmetry_is_solved_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("noetherflow.measured.FACTORS", 0)
    torch.manual_seed(0)
    model = Attention().double()
    x, y = torch.randn(160, 3, 6, dtype=torch.float64), torch.randint(5, (160,))
    batches = list(zip(x.split(16), y.split(16), strict=True))
    settings = nf.SGDConfig(lr=0.1, batch_size=16)
    found = nf.analyze(model, nn.CrossEntropyLoss(), batches, settings, curvature=False)
    assert not found.moments.factors
    assert not found.equilibrium.joint
