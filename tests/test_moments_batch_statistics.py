"""Symmetries that hold with batch statistics only: refused where they cannot be measured, right where they can."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import noetherflow as nf
from noetherflow.errors import MomentError
from noetherflow.moments import MinibatchMeter

BATCH = 16
Batch = tuple[Tensor, Tensor]


def per_sample(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def net(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if kind == "linear":
        layers = [nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6, eps=1e-12), nn.ReLU(), nn.Linear(6, 3)]
        return nn.Sequential(*layers).double(), 3 * torch.randn(512, 4, dtype=torch.float64) + 1
    conv = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, eps=1e-12), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)]
    return nn.Sequential(*conv).double(), torch.randn(512, 1, 5, 5, dtype=torch.float64) + 0.5


def row_norms(model: nn.Module, batch: Batch) -> Tensor:
    """`|g_B|^2` of each row of the first weight."""
    weight: Any = model[0].weight  # type: ignore[index]
    return torch.autograd.grad(per_sample(model, batch).mean(), weight)[0].flatten(1).square().sum(1)


def settled(kind: str) -> tuple[nn.Module, list[Batch], nf.SymmetrySet, nf.SymmetrySet]:
    """The model after some batches, minibatches, the scales in front of the batch norm, and the other symmetries."""
    model, x = net(kind)
    y = torch.randint(3, (len(x),))
    for part in x.split(64):
        model(part)
    found = nf.find_symmetries(model.eval(), x[:3])
    moved = {s.name: "statistics" for s in found if any(leg.buffer for leg in s.legs)}
    assert moved
    rest = found.without(moved)
    scales = nf.SymmetrySet(tuple(s for s in found if s.name in moved), shapes=found.shapes)
    draw = torch.Generator().manual_seed(1)
    picks = [torch.randint(len(x), (BATCH,), generator=draw) for _ in range(300)]
    return model, [(x[i], y[i]) for i in picks], scales, rest


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_evaluation_mode_is_refused_with_the_right_advice(kind: str) -> None:
    model, batches, scales, rest = settled(kind)
    with pytest.raises(MomentError, match=r"hold with batch statistics only.*minibatch_moments, the model in training"):
        nf.gradient_moments(model, per_sample, batches, scales)
    with pytest.raises(MomentError, match=r"is in evaluation mode.*call model.train\(\)"):
        nf.minibatch_moments(model, per_sample, batches, scales, batch_size=BATCH)
    with pytest.raises(MomentError, match=r"is in evaluation mode"):
        MinibatchMeter(model, scales, BATCH).observe(0.0, [torch.ones(()) for _ in scales.parameters])
    assert nf.gradient_moments(model, per_sample, batches[:2], rest).samples == 2 * BATCH
    with pytest.raises(MomentError, match=r"uses batch statistics.*minibatch_moments"):
        nf.gradient_moments(model.train(), per_sample, batches[:2], rest)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_advice_gives_the_drive_of_training(kind: str) -> None:
    """`E|g_B|^2` of every channel, from independent minibatches in training mode; evaluation mode is far off."""
    model, batches, scales, _ = settled(kind)
    model.train()
    sgd = nf.SGDConfig(0.1, BATCH)
    moments = nf.minibatch_moments(model, per_sample, batches[:150], scales, batch_size=BATCH)
    (symmetry,) = scales
    got = symmetry.combine(moments.batch_grams(symmetry, sgd))
    seen = torch.stack([row_norms(model, b) for b in batches[150:]])
    error = (seen.std(0) ** 2 / len(seen) * 2).sqrt()
    assert float(((got - seen.mean(0)) / error).abs().max()) < 4
    model.eval()
    alone = [row_norms(model, b) for b in batches[150:]]
    off = (torch.stack(alone).mean(0) - seen.mean(0)) / error
    assert float(off.abs().max()) > 6, "negative control: the mode matters"


def test_gradients_obey_the_scale_in_training_alone() -> None:
    """`theta^T g` of the rows in front of the norm: zero with batch statistics, not with running ones."""
    model, batches, _, _ = settled("linear")
    rows: Any = model[0].weight  # type: ignore[index]
    weight = rows.detach()

    def along() -> float:
        g = torch.autograd.grad(per_sample(model, batches[0]).mean(), rows)[0]
        return float(((weight * g).sum(1) / (weight.norm(dim=1) * g.norm(dim=1))).abs().max())

    assert along() > 1e-3
    model.train()
    assert along() < 1e-10


def test_norms_without_running_statistics_have_no_evaluation_mode() -> None:
    model = (
        nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 3)).double().eval()
    )
    syms = nf.declare(model, "diagonal", [("1.weight", 0), ("1.bias", 0)], [("2.weight", 1)])
    loss = lambda m, b: m(b).square().sum(1)
    with pytest.raises(MomentError, match=r"minibatch_moments \(it keeps no running statistics"):
        nf.gradient_moments(model, loss, [torch.randn(5, 4, dtype=torch.float64)], syms)


def test_analyze_chooses_how_to_measure() -> None:
    model, batches, scales, rest = settled("conv")
    sgd, inputs = nf.SGDConfig(0.1, BATCH, weight_decay=1e-3), batches[0][0][:3]
    there = nf.analyze(model.eval(), per_sample, batches[:4], sgd, inputs)
    assert {s.name for s in there.symmetries} == {s.name for s in rest}
    assert there.moments.replicates is None
    assert all("model.train()" in str(there) and s.name in str(there) for s in scales)
    short = (batches[0][0][:5], batches[0][1][:5])
    training = nf.analyze(model.train(), per_sample, [*batches[:4], short], sgd, inputs)
    assert {s.name for s in training.symmetries} == {s.name for s in (*rest, *scales)}
    assert training.moments.replicates is not None
    assert training.moments.samples == 4
    expected = nf.minibatch_moments(model, per_sample, batches[:4], training.symmetries, batch_size=BATCH)
    for name, legs in expected.second.items():
        for a, b in zip(training.moments.second[name], legs, strict=True):
            torch.testing.assert_close(a, b)


def test_two_minibatches_have_moments_but_no_error() -> None:
    """Without either of them there is no covariance."""
    model, batches, scales, _ = settled("linear")
    moments = nf.minibatch_moments(model.train(), per_sample, batches[:2], scales, batch_size=BATCH)
    assert moments.groups == ()
    assert nf.noether_flow(model, scales, moments, nf.SGDConfig(0.1, BATCH))[scales[0].name].error is None
    assert len(nf.minibatch_moments(model, per_sample, batches[:3], scales, batch_size=BATCH).groups) == 3


def test_minibatches_at_fixed_weights_are_tested_as_samples_are() -> None:
    """A small penalty inside the loss breaks the symmetry; along a run only a large one can be told from the motion."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    x, y = torch.randn(256, 12, dtype=torch.float64), torch.randn(256, 3, dtype=torch.float64)
    syms, batches = nf.find_symmetries(net, x[:2]), list(zip(x.split(16), y.split(16), strict=True))
    sgd = nf.SGDConfig(0.01, 16, dataset_size=256)

    def loss(penalty):
        return lambda m, b: (m(b[0]) - b[1]).square().sum(1) + penalty * m[0].weight.square().sum()

    fine = nf.minibatch_moments(net, loss(0.0), batches, syms, batch_size=16, dataset_size=256)
    assert not fine.replicates.moving
    assert nf.noether_flow(net, syms, fine, sgd).details
    broken = nf.minibatch_moments(net, loss(1e-3), batches, syms, batch_size=16, dataset_size=256)
    with pytest.raises(MomentError, match="if the loss breaks the symmetry"):
        nf.noether_flow(net, syms, broken, sgd)
