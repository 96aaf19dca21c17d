"""The gradient noise scale against sums over single samples' gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import noetherflow as nf
from noetherflow.errors import MomentError


def loss(model, batch):
    x, y = batch
    return (model(x) - y).square().sum(1)


def setting(samples=64, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).double()
    return model, torch.randn(samples, 5).double(), torch.randn(samples, 2).double()


def single_gradients(model, x, y):
    """`[samples, entries]` by a plain loop."""
    rows = []
    for i in range(len(x)):
        grads = torch.autograd.grad(loss(model, (x[i : i + 1], y[i : i + 1])).sum(), list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def measured(model, batches, **options):
    names = [n for n, _ in model.named_parameters()]
    return nf.gradient_moments(model, loss, batches, nf.SymmetrySet(()), entries=True, parameters=names, **options)


def test_of_a_whole_data_set_it_is_the_ratio_of_plain_sums():
    model, x, y = setting()
    g = single_gradients(model, x, y)
    mean = g.mean(0)
    population = (g - mean).square().sum() / len(g)
    scale = measured(model, [(x, y)]).noise_scale(dataset_size=len(x))
    assert scale.total.signal == pytest.approx(float(mean.square().sum()), rel=1e-10)
    assert scale.value == pytest.approx(float(population / mean.square().sum()), rel=1e-10)


def test_of_fresh_data_signal_and_noise_are_unbiased():
    """The average over many small measurements is what the large data set has; one without the correction is not."""
    model, x, y = setting(4096)
    g = single_gradients(model, x, y)
    signal, noise = float(g.mean(0).square().sum()), float(g.var(0).sum())
    signals, noises = [], []
    for k in range(0, 4096, 16):
        total = measured(model, [(x[k : k + 16], y[k : k + 16])], groups=1).noise_scale().total
        signals.append(total.signal)
        noises.append(total.noise)
    error = torch.tensor(signals).std() / len(signals) ** 0.5
    assert abs(sum(signals) / len(signals) - signal) < 4 * float(error)
    assert sum(noises) / len(noises) == pytest.approx(noise, rel=0.05)
    uncorrected = signal + noise / 16
    assert abs(uncorrected - signal) > 4 * float(error)


def test_layers_add_up():
    model, x, y = setting()
    scale = measured(model, [(x, y)]).noise_scale()
    assert set(scale.layers) == {"0", "2"}
    assert scale.total.signal == pytest.approx(sum(s.signal for s in scale.layers.values()))
    assert scale.total.noise == pytest.approx(sum(s.noise for s in scale.layers.values()))


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    model, x, y = setting(8192, seed=1)
    g = single_gradients(model, x, y)
    truth = float(g.var(0).sum() / g.mean(0).square().sum())
    held = []
    for k in range(0, 8192, 256):
        low, high = measured(model, [(x[k : k + 256], y[k : k + 256])]).noise_scale().interval(0.9)
        held.append(low <= truth <= high)
    assert 0.7 < sum(held) / len(held) <= 1


def test_without_a_mean_gradient_it_has_no_upper_end():
    torch.manual_seed(0)
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.zero_()
    x = torch.randn(128, 1).double()
    y = torch.randn(128, 1).double()
    y = y - x * (x * y).sum() / x.square().sum()
    scale = measured(model, [(x, y)]).noise_scale()
    assert math.isinf(scale.value)
    assert math.isinf(scale.interval()[1])
    assert scale.interval()[0] > 10


def test_minibatches_give_the_same_number():
    model, x, y = setting(2048)
    batches = list(zip(x.split(8), y.split(8), strict=True))
    syms = nf.find_symmetries(model, x[:2])
    whole = nf.gradient_moments(model, loss, batches, syms, entries=True).noise_scale()
    parts = nf.minibatch_moments(model, loss, batches, syms, batch_size=8, entries=True).noise_scale()
    assert parts.total.noise == pytest.approx(whole.total.noise, rel=0.15)
    assert parts.interval()[0] < whole.value < parts.interval()[1]


def test_it_says_what_it_needs():
    model, x, y = setting()
    syms = nf.find_symmetries(model, x[:2])
    with pytest.raises(MomentError, match="entries=True"):
        nf.gradient_moments(model, loss, [(x, y)], syms).noise_scale()
