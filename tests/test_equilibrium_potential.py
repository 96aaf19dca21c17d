"""Coefficients of the drift: momentum, sampling and decay against sums over the past and simulated linear chains."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import noetherflow as nf
from noetherflow.equilibrium.potential import Drift, decay_rate, epoch_factor, mean_rate, noise_rate, state_drive
from noetherflow.errors import DataError

MOMENTUM = [(0.0, False), (0.5, False), (0.9, False), (0.5, True), (0.9, True)]


@pytest.mark.parametrize(("momentum", "nesterov"), MOMENTUM)
def test_state_drive_is_the_noise_rate_for_white_and_the_mean_rate_for_constant_gradients(
    momentum: float, nesterov: bool
) -> None:
    powers = momentum ** np.arange(3000.0)
    update = momentum * powers + (np.arange(3000) == 0) if nesterov else powers
    for constant, rate in ((False, noise_rate(0.3, momentum)), (True, mean_rate(0.3, momentum, float(nesterov)))):
        product = (lambda a, b: a.sum() * b.sum()) if constant else (lambda a, b: a @ b)
        drive = state_drive(product(update, update), product(update, powers), 0.3, momentum, float(nesterov))
        assert drive == pytest.approx(rate, rel=1e-9)


@pytest.mark.parametrize(("momentum", "nesterov"), MOMENTUM)
@pytest.mark.parametrize("batches", [2, 4, 17])
@pytest.mark.parametrize("lr_curvature", [0.0, 0.01, 0.2])
def test_epoch_factor_by_the_covariance_of_every_pair_of_steps(
    momentum: float, nesterov: bool, batches: int, lr_curvature: float
) -> None:
    """`E` over all positions in the epoch of the state identity, with the covariance of the noise written out."""
    past, h = 600, lr_curvature
    buffer, update = _responses(momentum, nesterov, h, past)
    drives = []
    for shuffled in (True, False):
        total = np.zeros(2)
        for position in range(batches):
            epoch = (np.arange(past)[::-1] + batches - past + position + batches * past) // batches
            same = epoch[:, None] == epoch[None, :]
            noise = np.where(same, -1 / (batches - 1), 0.0) if shuffled else np.zeros((past, past))
            np.fill_diagonal(noise, 1.0)
            total += [update @ noise @ update, update @ noise @ buffer]
        drives.append(state_drive(total[0], total[1], 1.0, momentum, float(nesterov)))
    expected = drives[0] / drives[1]
    found = epoch_factor(momentum, batches, nesterov=nesterov, lr_curvature=lr_curvature)
    assert found == pytest.approx(expected, rel=1e-6 if h or momentum else 1e-12)
    if momentum and not h:
        assert found < 1


def _responses(m: float, nesterov: bool, h: float, past: int) -> tuple[np.ndarray, np.ndarray]:
    """Buffer and step after `0, 1, ...` steps of a unit gradient noise on a quadratic loss with `lr k = h`, lr 1."""
    theta = b = 0.0
    buffer, update = np.zeros(past), np.zeros(past)
    for t in range(past):
        g = (t == 0) + h * theta
        b = m * b + g
        buffer[t], update[t] = b, g + m * b if nesterov else b
        theta -= update[t]
    return buffer, update


def test_epoch_factor_is_the_closed_form_without_curvature() -> None:
    for m in (0.3, 0.9, 0.99):
        for n in (2, 8, 128):
            plain = 1 - 2 * m / ((n - 1) * (1 - m)) * (1 - (1 - m**n) / (n * (1 - m)))
            assert epoch_factor(m, n) == pytest.approx(plain, rel=1e-9, abs=1e-12)
            assert epoch_factor(m, n, nesterov=True) == pytest.approx(1 - m + m * plain, rel=1e-9)
    assert epoch_factor(0.9, 1) == epoch_factor(0.0, 8) == 1
    assert epoch_factor(0.9, 10**5) == pytest.approx(1, abs=1e-3)


def test_epochs_enter_the_drift_with_momentum_only() -> None:
    at = {"lr": 0.1, "batch_size": 5, "weight_decay": 0.3, "dataset_size": 40}
    for momentum, factor in ((0.0, 1.0), (0.9, epoch_factor(0.9, 8))):
        whole = Drift.of(nf.SGDConfig(**at, momentum=momentum))
        epochs = Drift.of(nf.SGDConfig(**at, momentum=momentum, sampling="epoch"))
        assert epochs.noise == pytest.approx(factor * whole.noise, rel=1e-12)
        assert (epochs.decay, epochs.mean) == (whole.decay, whole.mean)


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_state_identity_along_a_run_of_shuffled_epochs(nesterov: bool) -> None:
    """The summed change of a charge of heavy ball and Nesterov, decay included, up to terms at the ends."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)).double()
    syms = nf.find_symmetries(model, torch.randn(5, 3, dtype=torch.float64))
    lr, m, w = 0.02, 0.8, 0.01
    opt = torch.optim.SGD(model.parameters(), lr=lr, momentum=m, weight_decay=w, nesterov=nesterov)
    x, y = torch.randn(24, 3, dtype=torch.float64), torch.randn(24, 2, dtype=torch.float64)
    tensors, names = nf.tensors_of(model), [n for n, _ in model.named_parameters()]
    (s,) = syms
    summed = torch.zeros(4, dtype=torch.float64)
    cross = lambda a, b: (s.charge({n: a[n] + b[n] for n in names}) - s.charge({n: a[n] - b[n] for n in names})) / 4
    start, ends = s.charge(tensors).detach(), []
    for k in range(400):
        if k % 6 == 0:
            order = torch.randperm(24)
        pick = order[k % 6 * 4 : k % 6 * 4 + 4]
        opt.zero_grad()
        (model(x[pick]) - y[pick]).square().sum(1).mean().backward()
        before = {n: t.detach().clone() for n, t in tensors.items()}
        opt.step()
        b = {n: opt.state[tensors[n]]["momentum_buffer"].clone() for n in names}
        u = {n: (before[n] - tensors[n].detach()) / lr for n in names}
        drive = state_drive(s.charge(u).numpy(), cross(u, b).numpy(), lr, m, float(nesterov))
        summed += torch.as_tensor(drive)
        summed -= 2 * lr * w / (1 - m) * s.charge(before)
        ends.append(2 * lr / (1 - m) * cross(before, b).abs().max())
    change = s.charge(tensors).detach() - start
    assert float((change - summed).abs().max()) < 3 * float(max(ends[0], ends[-1]))
    assert float(change.abs().max()) > 10 * float((change - summed).abs().max())


def test_decay_rate_is_exact_without_momentum() -> None:
    assert decay_rate(0.1, 0.5, 0.0) == pytest.approx(1 - (1 - 0.05) ** 2, rel=1e-14)


def test_settings_are_read_from_the_loader() -> None:
    data = torch.utils.data.TensorDataset(torch.zeros(40, 3))
    opt = torch.optim.SGD(torch.nn.Linear(3, 1).parameters(), lr=0.1, momentum=0.9)
    read = lambda **how: nf.SGDConfig.from_optimizer(opt, 8, loader=torch.utils.data.DataLoader(data, 8, **how))
    shuffled = read(shuffle=True)
    assert (shuffled.sampling, shuffled.dataset_size, shuffled.batches_per_epoch) == ("epoch", 40, 5)
    drawn = read(sampler=torch.utils.data.RandomSampler(data, replacement=True, num_samples=40))
    assert (drawn.sampling, drawn.replacement, drawn.dataset_size) == ("independent", True, 40)
    with pytest.raises(DataError, match=r"SequentialSampler.*shuffle=True"):
        read(shuffle=False)

    class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self):  # type: ignore[no-untyped-def]
            return iter([])

    fresh = nf.SGDConfig.from_optimizer(opt, 8, loader=torch.utils.data.DataLoader(Stream(), 8))
    assert fresh.dataset_size is None


def test_sampling_without_a_meaning_is_refused() -> None:
    for bad in (
        {"sampling": "epoch"},
        {"sampling": "epoch", "dataset_size": 9, "replacement": True},
        {"sampling": "epochs", "dataset_size": 9},
        {"curvature": 30.0},
        {"curvature": -1.0},
        {"curvature": math.nan},
    ):
        with pytest.raises(DataError):
            nf.SGDConfig(0.1, 3, **bad)  # type: ignore[arg-type]
