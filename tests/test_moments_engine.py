"""Errors, groups, resuming, storage, checkpointing, autocast, minibatches and statistics of the moment measurement."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from noetherflow import SGDConfig, SymmetrySet, declare
from noetherflow.errors import CheckpointError, DataError, DeclarationError, MomentError
from noetherflow.moments import (
    GradientMoments,
    Meter,
    MinibatchMeter,
    gradient_moments,
    load_moments,
    merge_moments,
    minibatch_moments,
    save_moments,
    standard_error,
)
from noetherflow.moments.result import trace
from reference import moments_by_loop, per_sample_gradients

Batch = tuple[Tensor, Tensor]


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()


def hidden(model: nn.Module) -> SymmetrySet:
    torus = declare(model, "diagonal", [("0.weight", 0), ("0.bias", 0)], [("2.weight", 1)], name="hidden")
    linear = declare(model, "general_linear", [("0.weight", 0)], [("2.weight", 1)], blocks=2, name="linear")
    return SymmetrySet(torus.symmetries + linear.symmetries, shapes=torus.shapes)


def data(batches: int = 4, size: int = 6, seed: int = 1) -> list[Batch]:
    rng = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return [
        (
            torch.randn(size, 4, generator=rng, dtype=torch.float64),
            torch.randn(size, 3, generator=rng, dtype=torch.float64),
        )
        for _ in range(batches)
    ]


def squared(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0]) - batch[1]).square().sum(1)


def assert_same(a: GradientMoments, b: GradientMoments, tolerance: float = 1e-12) -> None:
    assert a.samples == b.samples
    assert math.isclose(a.loss, b.loss, rel_tol=tolerance)
    for kind in ("mean", "squares"):
        assert set(getattr(a, kind)) == set(getattr(b, kind))
        for name, t in getattr(a, kind).items():
            torch.testing.assert_close(t.double(), getattr(b, kind)[name].double(), rtol=tolerance, atol=tolerance)
    for name, legs in a.second.items():
        for x, y in zip(legs, b.second[name], strict=True):
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_scalar_loss_is_refused() -> None:
    model = net()
    with pytest.raises(DataError, match=r"per-sample losses, \[batch\], got shape \(\)"):
        gradient_moments(model, lambda m, b: squared(m, b).mean(), data(), hidden(model))


def test_loss_of_wrong_shape_is_refused() -> None:
    model = net()
    with pytest.raises(DataError, match=r"got shape \(6, 3\)"):
        gradient_moments(model, lambda m, b: (m(b[0]) - b[1]).square(), data(), hidden(model))


def test_loss_that_is_no_tensor_is_refused() -> None:
    model = net()
    with pytest.raises(DataError, match="got float"):
        gradient_moments(model, lambda m, b: 1.0, data(), hidden(model))  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_data_is_named(value: float) -> None:
    model, batches = net(), data()
    batches[2][0][3, 1] = value
    with pytest.raises(DataError, match=r"for 1 of 6 samples, first \[3\] \(the batch itself holds NaN or inf"):
        gradient_moments(model, squared, batches, hidden(model))


def test_bad_data_in_a_dataclass_is_named() -> None:
    @dataclass
    class Pair:
        x: Tensor
        y: Tensor

    model = net()
    x, y = data(1)[0]
    with pytest.raises(DataError, match="the batch itself holds NaN"):
        gradient_moments(model, lambda m, b: squared(m, (b.x, b.y)), [Pair(x * math.nan, y)], hidden(model))


def test_bad_loss_on_good_data_is_named() -> None:
    model = net()
    with pytest.raises(DataError, match=r"not finite for 6 of 6 samples, first \[0, 1, 2, 3, 4\]$"):
        gradient_moments(model, lambda m, b: squared(m, b).mul(-1).log(), data(), hidden(model))


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_an_embedding_that_renormalises_its_weights_is_refused(kind: type[nn.Embedding | nn.EmbeddingBag]) -> None:
    """And measured once its weights are renormalised and `max_norm` is None."""
    torch.manual_seed(0)
    embedding = kind(5, 4, max_norm=0.5)
    model = nn.Sequential(embedding, nn.Linear(4, 3)).double()
    syms = declare(model, "general_linear", plus=[("0.weight", 1)], minus=[("1.weight", 1)])
    batches = [(torch.randint(5, (6,) if kind is nn.Embedding else (6, 2)), torch.randn(6, 3).double())]
    before = embedding.weight.detach().clone()
    for measure in (gradient_moments, partial(minibatch_moments, batch_size=6)):
        with pytest.raises(DataError, match=r"0 has max_norm=0\.5: .*m\.max_norm = None"):
            measure(model, squared, batches, syms)
    assert torch.equal(embedding.weight, before)
    with torch.no_grad():
        embedding.weight.copy_(embedding.weight.renorm(embedding.norm_type, 0, 0.5))
    embedding.max_norm = None
    measured = gradient_moments(model, squared, batches, syms, entries=True, parameters=["1.bias"])
    assert_same(measured, moments_by_loop(model, squared, batches, syms))


def test_no_batch_is_refused() -> None:
    model = net()
    for measure in (
        lambda: gradient_moments(model, squared, [], hidden(model)),
        lambda: minibatch_moments(model, squared, iter(()), hidden(model), batch_size=6),
    ):
        with pytest.raises(DataError, match="iterator of batches is empty"):
            measure()


def test_empty_batch_is_refused() -> None:
    model = net()
    with pytest.raises(DataError, match="batch is empty"):
        gradient_moments(model, squared, data(1, 0), hidden(model))


def test_frozen_parameter_is_refused_by_name_and_leaves_the_rest() -> None:
    model = net()
    model[2].weight.requires_grad_(False)
    syms = hidden(model)
    with pytest.raises(MomentError, match=r"'2.weight' \(3, 6\) is frozen.*syms.trainable"):
        gradient_moments(model, squared, data(), syms)
    rest = declare(model, "diagonal", [("0.weight", 0), ("0.bias", 0)])
    expected = moments_by_loop(model, squared, data(), rest)
    got = gradient_moments(model, squared, data(), rest)
    torch.testing.assert_close(got.second[rest[0].name], expected.second[rest[0].name], rtol=1e-12, atol=0)


def test_parameter_without_gradient_is_refused_by_name() -> None:
    model = net()
    model.register_parameter("unused", nn.Parameter(torch.zeros(6, dtype=torch.float64)))
    syms = declare(model, "diagonal", [("0.weight", 0), ("unused", 0)])
    with pytest.raises(MomentError, match=r"no gradient reaches \['unused'\]"):
        gradient_moments(model, squared, data(), syms)
    with pytest.raises(MomentError, match=r"no gradient reaches \['unused'\]"):
        minibatch_moments(model, squared, data(), syms, batch_size=6)


def test_unknown_parameter_is_refused() -> None:
    model = net()
    with pytest.raises(MomentError, match=r"no parameter named '0.wieght'"):
        gradient_moments(model, squared, data(), hidden(model), parameters=["0.wieght"])


def test_loss_without_gradient_is_refused() -> None:
    model = net()

    @torch.no_grad()
    def blind(m: nn.Module, b: Batch) -> Tensor:
        return squared(m, b)

    with pytest.raises(MomentError, match="no_grad"):
        gradient_moments(model, blind, data(), hidden(model))


def test_batch_statistics_are_refused_and_left_untouched() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    syms = declare(model, "diagonal", [("1.weight", 0), ("1.bias", 0)], [("2.weight", 1)])
    with pytest.raises(MomentError, match=r"batch norm '1' uses batch statistics.*minibatch_moments"):
        gradient_moments(model, squared, data(), syms)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_samples_that_act_on_each_other_are_refused() -> None:
    model = net()

    def contrastive(m: nn.Module, b: Batch) -> Tensor:
        z = m(b[0])
        return (z @ z.T).logsumexp(1)

    with pytest.raises(MomentError, match=r"samples act on each other at linear of .*minibatch_moments"):
        gradient_moments(model, contrastive, data(), hidden(model))


def test_a_wrong_rule_is_caught_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from noetherflow.moments import rules
    from noetherflow.moments.forms import Outer

    model = net()
    signature, rule = rules.RULES[F.linear]

    def wrong(owned: Any, func: Any, a: dict[str, Any]) -> Any:
        call = rule(owned, func, a)
        site = call.sites[0]
        broken = replace(site, build=lambda layout, d, x: Outer(d.reshape(len(d), -1, d.shape[-1]), 1.01 * x[:, None]))
        return replace(call, sites=(broken, *call.sites[1:]))

    monkeypatch.setitem(rules.RULES, F.linear, (signature, wrong))
    with pytest.raises(MomentError, match=r"\['0.weight'\] summed by rule differs from autograd's at linear of"):
        gradient_moments(model, squared, data(), hidden(model))


class Unseen(torch.autograd.Function):
    """A use of a parameter that no rule can see."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return delta @ w, delta.T @ x


class HalfSeen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.Linear(4, 4)
        self.other = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(Unseen.apply(torch.tanh(self.seen(x)), self.seen.weight))


def test_an_unseen_use_goes_to_the_fallback_whole() -> None:
    torch.manual_seed(0)
    model = HalfSeen().double()
    syms = declare(model, "diagonal", [("seen.weight", 0)], [("other.weight", 1)])
    expected, got = (f(model, squared, data(), syms) for f in (moments_by_loop, gradient_moments))
    assert got.fallback == ("seen.weight",)
    torch.testing.assert_close(got.second[syms[0].name], expected.second[syms[0].name], rtol=1e-10, atol=0)


def test_what_nothing_covers_raises_with_its_name() -> None:
    class Once(Unseen):
        @staticmethod
        def backward(ctx: Any, delta: Tensor) -> Any:
            raise RuntimeError("this operator has no second backward")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return (Unseen if self.calls < 2 else Once).apply(x, self.w)

    model = Model()
    with pytest.raises(MomentError, match=r"no rule and no fallback for \['w'\]"):
        gradient_moments(model, squared, data(), declare(model, "diagonal", [("w", 0)]))


# --- what is left alone ----------------------------------------------------------------------------------------------


def test_model_gradients_and_buffers_are_untouched() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3))).double().train()
    squared(model, data()[0]).mean().backward()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    gradient_moments(model, squared, data(), declare(model, "diagonal", [("0.weight", 0), ("0.bias", 0)]))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(p.grad, grads[k]) for k, p in model.named_parameters() if p.grad is not None)
    assert grads


# --- groups, merging, resuming, storage ------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "groups"), [(1, 3), (4, 16), (7, 3)])
def test_groups_merge_to_the_whole(count: int, groups: int) -> None:
    model = net()
    syms = hidden(model)
    whole = gradient_moments(model, squared, data(count), syms, groups=1, entries=True)
    split = gradient_moments(model, squared, data(count), syms, groups=groups, entries=True)
    assert len(split.groups) == min(groups, 6 * count)
    assert whole.groups == ()
    assert_same(whole, split)
    assert_same(whole, merge_moments(list(split.groups)))
    assert_same(whole, keep(moments_by_loop(model, squared, data(count), syms), syms))


def test_uneven_batches_and_changing_shapes_are_measured() -> None:
    model = net()
    syms = hidden(model)
    batches = data(2, 5) + data(1, 1, seed=2) + data(1, 9, seed=3)
    expected = keep(moments_by_loop(model, squared, batches, syms), syms)
    assert_same(gradient_moments(model, squared, batches, syms, entries=True), expected)


@pytest.mark.parametrize("size", [1, 4, 6])
def test_micro_batches_equal_one_batch(size: int) -> None:
    """Gradient accumulation: 24 samples in micro-batches of any size, against one batch and against `.grad`."""
    model = net()
    syms = hidden(model)
    x, y = data(1, 24)[0]
    whole = gradient_moments(model, squared, [(x, y)], syms, entries=True, groups=1)
    micro = gradient_moments(
        model, squared, list(zip(x.split(size), y.split(size), strict=True)), syms, entries=True, groups=1
    )
    assert_same(micro, whole)
    for a, b in zip(x.split(size), y.split(size), strict=True):
        (squared(model, (a, b)).sum() / 24).backward()
    for name, p in model.named_parameters():
        if name in micro.mean:
            torch.testing.assert_close(micro.mean[name], p.grad, rtol=1e-12, atol=1e-12)


def test_resuming_from_disk_equals_one_go(tmp_path: Path) -> None:
    model = net()
    syms = hidden(model)
    first = gradient_moments(model, squared, data()[:2], syms, entries=True, groups=2)
    path = tmp_path / "sub" / "moments.safetensors"
    save_moments(first, path)
    loaded = load_moments(path)
    assert_same(first, loaded)
    assert str(loaded) == str(first)
    for a, b in zip(first.groups, loaded.groups, strict=True):
        assert_same(a, b)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    resumed = gradient_moments(model, squared, data()[2:], syms, entries=True, groups=2, resume=loaded)
    assert_same(resumed, gradient_moments(model, squared, data(), syms, entries=True, groups=2))


def test_resuming_other_moments_is_refused() -> None:
    model = net()
    other = gradient_moments(model, squared, data(), declare(model, "diagonal", [("0.weight", 0)]))
    with pytest.raises(MomentError, match="cannot resume"):
        gradient_moments(model, squared, data(), hidden(model), resume=other)
    with pytest.raises(MomentError, match="differ"):
        merge_moments([other, gradient_moments(model, squared, data(), hidden(model))])


@pytest.mark.parametrize("groups", [1, 2])
def test_resuming_in_single_precision_equals_one_go(groups: int) -> None:
    """Moments are kept in float64 whatever the parameters' type."""
    model = net().float()
    syms = hidden(model)
    batches = [(x.float(), y.float()) for x, y in data()]
    options = {"entries": True, "groups": groups}
    first = gradient_moments(model, squared, batches[:2], syms, **options)
    resumed = gradient_moments(model, squared, batches[2:], syms, resume=first, **options)
    assert_same(resumed, gradient_moments(model, squared, batches, syms, **options), 1e-6)


def test_resuming_moments_of_other_widths_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    for groups in (1, 2):
        earlier = gradient_moments(net(), squared, data(), hidden(net()), groups=groups)
        with pytest.raises(MomentError, match=r"cannot resume: .*'0.weight': \(\(6, 4\), \(8, 4\)\)"):
            gradient_moments(model, squared, data(), hidden(model), groups=groups, resume=earlier)


def test_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "moments.safetensors"
    path.write_bytes(b"not a safetensors file")
    with pytest.raises(CheckpointError, match="holds no gradient moments"):
        load_moments(path)
    with pytest.raises(CheckpointError, match="holds no gradient moments"):
        load_moments(tmp_path / "absent")


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    moments = gradient_moments(model, squared, data(), hidden(model))
    path = tmp_path / "moments.safetensors"
    save_moments(moments, path)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="disk full"):
        save_moments(moments, path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_until_stops_at_the_asked_error() -> None:
    model = net()
    syms = hidden(model)
    loose = gradient_moments(model, squared, data(200), syms, until=0.3)
    tight = gradient_moments(model, squared, data(200), syms, until=0.1)
    assert loose.samples < tight.samples < 1200
    leg = lambda m: m.second["hidden"][0].sum()
    assert float(standard_error(tight, leg).relative) < 0.11


def test_until_looks_at_the_groups_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments are merged once, at the end; the error is that of the group means of `Tr g g^T`."""
    from noetherflow.moments import result

    model = net()
    syms = hidden(model)
    merged = []
    merge = result.merge_moments
    monkeypatch.setattr(result, "merge_moments", lambda parts: merged.append(len(parts)) or merge(parts))
    moments = gradient_moments(model, squared, data(40), syms, until=1e-9, groups=8)
    assert merged == [5], "five groups of eight batches, as four would not hold all and eight of five were not foreseen"
    for entries in (False, True):
        meter = Meter(model, squared, syms, entries=entries)
        for k, batch in enumerate(data(40)):
            meter.update(batch, [k // 8])
            meter.noise_error()
        estimate = standard_error(
            moments, lambda m: torch.stack([trace(leg) for ls in m.second.values() for leg in ls])
        )
        assert math.isclose(meter.noise_error(), float(estimate.relative.max()), rel_tol=1e-10)
    with pytest.raises(MomentError, match="at least 4 groups of samples, got groups=3"):
        gradient_moments(model, squared, data(), syms, until=0.1, groups=3)


def test_progress_is_called_per_batch() -> None:
    model = net()
    seen: list[int] = []
    gradient_moments(model, squared, data(), hidden(model), progress=lambda n, loss: seen.append(n))
    assert seen == [6, 12, 18, 24]


# --- statistics ------------------------------------------------------------------------------------------------------


def test_jackknife_of_a_mean_is_its_textbook_error() -> None:
    model = net()
    moments = gradient_moments(model, squared, data(8), hidden(model), groups=8)
    estimate = standard_error(moments, lambda m: m.second["hidden"][0])
    parts = torch.stack([g.second["hidden"][0] for g in moments.groups]).cpu()
    torch.testing.assert_close(estimate.error, parts.std(0) / math.sqrt(8), rtol=1e-10, atol=0)
    torch.testing.assert_close(estimate.bias, torch.zeros_like(estimate.bias), rtol=0, atol=1e-12)
    low, high = estimate.interval(0.95)
    torch.testing.assert_close(high - low, 2 * 2.364624 * estimate.error, rtol=1e-6, atol=0)


def test_jackknife_covers_the_truth_of_a_nonlinear_statistic() -> None:
    """A 90 % interval of the balance `log(M_0 / M_1)` covers the large-sample value in 90 % of 60 draws (3 sigma)."""
    model = net()
    syms = hidden(model)
    sgd = SGDConfig(lr=0.1, batch_size=4)

    def balance(m: GradientMoments) -> Tensor:
        plus, _, minus = m.batch_grams(syms["hidden"], sgd)
        return (plus.sum() / minus.sum()).log()

    truth = balance(gradient_moments(model, squared, data(1, 40_000, seed=99), syms, groups=1))
    covered = 0
    for seed in range(60):
        moments = gradient_moments(model, squared, data(1, 160, seed=seed), syms, groups=16)
        low, high = standard_error(moments, balance).interval(0.9)
        covered += bool(low <= truth <= high)
    assert abs(covered - 54) <= 3 * math.sqrt(60 * 0.9 * 0.1)


def test_leaving_one_group_out_merges_the_others() -> None:
    """Also of different sizes, and exactly: what only one group saw is zero without it."""
    model = net()
    batches = [data(1, n, seed=n)[0] for n in (3, 9, 4, 1, 7)]
    groups = [moments_by_loop(model, squared, [b], hidden(model)) for b in batches]
    silent = {k: tuple(torch.zeros_like(t) for t in legs) for k, legs in groups[0].second.items()}
    groups[1:] = [replace(g, second=silent) for g in groups[1:]]
    moments = replace(merge_moments(groups), groups=tuple(groups))
    parts = list(moments.leave_one_out())
    assert [p.samples for p in parts] == [21, 15, 20, 23, 17]
    for i, part in enumerate(parts):
        assert_same(part, merge_moments([g for j, g in enumerate(groups) if j != i]))
    assert not any(bool(leg.any()) for legs in parts[0].second.values() for leg in legs)


def test_error_of_a_part_of_a_data_set_by_brute_force() -> None:
    """Every 4 of 6 numbers: the mean squared error estimate is the variance of their mean."""
    numbers = [1.0, 4.0, -2.0, 0.5, 3.0, 7.0]
    means, errors = [], []
    for subset in combinations(numbers, 4):
        groups = tuple(GradientMoments(1, v, {}, {}) for v in subset)
        estimate = standard_error(replace(merge_moments(list(groups)), groups=groups), lambda m: m.loss, dataset_size=6)
        means.append(float(estimate.value))
        errors.append(float(estimate.error) ** 2)
    variance = float(torch.tensor(means, dtype=torch.float64).var(correction=0))
    assert sum(errors) / len(errors) == pytest.approx(variance, rel=1e-12)


def test_standard_error_needs_groups() -> None:
    model = net()
    moments = gradient_moments(model, squared, data(), hidden(model), groups=1)
    with pytest.raises(MomentError, match="at least 2 groups"):
        standard_error(moments, lambda m: m.loss)


@pytest.mark.parametrize(("measured", "batch"), [(2, 1), (4, 3), (5, 5), (6, 2), (6, 6)])
def test_weights_of_a_part_of_a_data_set_are_unbiased(measured: int, batch: int) -> None:
    """`f Sigma` and `gbar gbar^T` of 6 samples, averaged over every subset that could have been measured; their sum
    against the mean of `g_B g_B^T` over every batch."""
    torch.manual_seed(0)
    gradients = torch.randn(6, 3, dtype=torch.float64) + 1
    sgd = SGDConfig(lr=0.1, batch_size=batch, dataset_size=6)
    means = [gradients[list(b)].mean(0) for b in combinations(range(6), batch)]
    outer = torch.stack([torch.outer(g, g) for g in means]).mean(0)
    mean = torch.outer(gradients.mean(0), gradients.mean(0))
    estimates = []
    for subset in combinations(range(6), measured):
        g = gradients[list(subset)]
        second, m = g.T @ g / measured, torch.outer(g.mean(0), g.mean(0))
        (a, b), (c, d) = GradientMoments(measured, 0.0, {}, {}).batch_weights(sgd)
        estimates.append(torch.stack([a * second + b * m, c * second + d * m]))
    noise, drift = torch.stack(estimates).mean(0)
    torch.testing.assert_close(drift, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(noise, outer - mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("measured", "batch"), [(2, 3), (4, 1), (5, 3), (6, 3), (6, 6)])
def test_weights_with_replacement_are_exact_over_every_draw(measured: int, batch: int) -> None:
    """`f Sigma + gbar gbar^T` of 6 samples, averaged over every subset that could have been measured, against the mean
    of `g_B g_B^T` over all `6^batch` draws with replacement."""
    torch.manual_seed(0)
    gradients = torch.randn(6, 3, dtype=torch.float64) + 1
    draws = torch.cartesian_prod(*[torch.arange(6)] * batch).reshape(-1, batch)
    means = gradients[draws].mean(1)
    sgd = SGDConfig(lr=0.1, batch_size=batch, dataset_size=6, replacement=True)
    (a, b), (c, d) = GradientMoments(measured, 0.0, {}, {}).batch_weights(sgd)
    estimates = []
    for subset in combinations(range(6), measured):
        g = gradients[list(subset)]
        estimates.append((a + c) * g.T @ g / measured + (b + d) * torch.outer(g.mean(0), g.mean(0)))
    torch.testing.assert_close(torch.stack(estimates).mean(0), means.T @ means / len(means), rtol=1e-12, atol=1e-12)


def test_one_sample_has_no_covariance() -> None:
    with pytest.raises(MomentError, match="measure at least two"):
        GradientMoments(1, 0.0, {}, {}).batch_weights(SGDConfig(lr=0.1, batch_size=1, dataset_size=6))


# --- ways of running a model -----------------------------------------------------------------------------------------


class Deep(nn.Module):
    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.first, self.last, self.checkpointed = nn.Linear(4, 6), nn.Linear(6, 3), checkpointed
        self.inner = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.3), nn.Tanh()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.inner:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return self.last(x)


def test_gradient_checkpointing_changes_nothing() -> None:
    torch.manual_seed(0)
    plain, checkpointed = Deep(False).double(), Deep(True).double()
    checkpointed.load_state_dict(plain.state_dict())
    results = []
    for model in (plain, checkpointed):
        torch.manual_seed(5)
        syms = declare(model, "general_linear", [("inner.0.0.weight", 0), ("inner.1.0.weight", 0)])
        results.append(gradient_moments(model.train(), squared, data(), syms, entries=True))
    assert_same(*results)


def test_sequence_losses_with_padding() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 9)).double()
    ids = torch.randint(9, (5, 7))
    mask = (torch.arange(7) < torch.tensor([7, 3, 5, 1, 6])[:, None]).double()

    def loss(m: nn.Module, batch: Batch) -> Tensor:
        each = F.cross_entropy(m(batch[0]).mT, batch[0].roll(-1, 1), reduction="none")
        return (each * batch[1]).sum(1) / batch[1].sum(1)

    syms = declare(model, "diagonal", [("1.weight", 0), ("1.bias", 0)], [("2.weight", 1)])
    args = (model, loss, [(ids, mask)], syms)
    assert_same(gradient_moments(*args, entries=True), keep(moments_by_loop(*args), syms))


def keep(moments: GradientMoments, syms: SymmetrySet) -> GradientMoments:
    """Only the parameters of `syms`."""
    part = lambda named: {n: t for n, t in named.items() if n in syms.parameters}
    return replace(moments, mean=part(moments.mean), squares=part(moments.squares))


def flat_loop(model: nn.Module, loss_fn: Any, batch: Any, syms: SymmetrySet) -> GradientMoments:
    return keep(moments_by_loop(model, lambda m, b: loss_fn(m, b).flatten(), [batch], syms), syms)


def test_tokens_as_samples() -> None:
    """Token-wise models by rule; models that mix tokens by one backward per token, and they say so."""
    torch.manual_seed(0)
    x, y = torch.randn(3, 4, 8, dtype=torch.float64), torch.randn(3, 4, 8, dtype=torch.float64)
    each = lambda m, b: (m(b[0]) - b[1]).square().sum(-1)
    tokenwise = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 8)).double()
    mixing = nn.TransformerEncoderLayer(8, 2, 6, dropout=0.0, batch_first=True).double()
    for model, legs, by_rule in (
        (tokenwise, ([("1.weight", 0), ("1.bias", 0)], [("2.weight", 1)]), True),
        (mixing, ([("linear1.weight", 0)], [("linear2.weight", 1)]), True),
        (mixing, ([("norm1.weight", 0)], []), True),
        (mixing, ([("self_attn.in_proj_weight", 0)], []), False),
    ):
        syms = declare(model, "diagonal", *legs)
        got = gradient_moments(model, each, [(x, y)], syms, sample_axes=2, entries=True)
        assert got.samples == 12
        assert (got.fallback == ()) == by_rule
        assert_same(got, flat_loop(model, each, (x, y), syms), 1e-10)


def test_bfloat16_autocast_accumulates_in_float32() -> None:
    model, exact = net().float(), net()
    syms = hidden(model)
    batches = data(1, 512)
    single = [(x.float(), y.float()) for x, y in batches]

    def loss(m: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out = m(batch[0])
        return (out.float() - batch[1]).square().sum(1)

    got = gradient_moments(model, loss, single, syms, entries=True, groups=1)
    expected = gradient_moments(exact, squared, batches, syms, entries=True, groups=1)
    for name, legs in expected.second.items():
        for a, b in zip(got.second[name], legs, strict=True):
            assert a.dtype == torch.float64
            assert float((a - b).norm() / b.norm()) < 2e-2
    assert all(t.dtype == torch.float32 for t in (*got.mean.values(), *got.squares.values()))


def test_float32_agrees_to_single_precision() -> None:
    model, exact = net().float(), net()
    syms = hidden(model)
    batches = data()
    got = gradient_moments(model, squared, [(x.float(), y.float()) for x, y in batches], syms)
    expected = gradient_moments(exact, squared, batches, syms)
    for name, legs in expected.second.items():
        for a, b in zip(got.second[name], legs, strict=True):
            assert float((a - b).norm() / b.norm()) < 1e-5


def test_iterators_need_no_length() -> None:
    model = net()
    syms = hidden(model)
    assert_same(gradient_moments(model, squared, iter(data()), syms), gradient_moments(model, squared, data(), syms))


def test_meter_reports_at_any_time() -> None:
    model = net()
    meter = Meter(model, squared, hidden(model))
    for k, batch in enumerate(data()):
        meter.update(batch)
        assert meter.result().samples == 6 * (k + 1)
    assert "24 samples" in str(meter.result())
    assert meter.result().to_dict()["samples"] == 24


# --- minibatches -----------------------------------------------------------------------------------------------------


def dense_grams(gradients: list[dict[str, Tensor]], syms: SymmetrySet) -> dict[str, tuple[Tensor, ...]]:
    out = {}
    for s in syms:
        each = [s.grams(g) for g in gradients]
        out[s.name] = tuple(torch.stack(legs).mean(0) for legs in zip(*each, strict=True))
    return out


def test_minibatch_moments_are_grams_of_batch_gradients() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double().train()
    syms = declare(model, "diagonal", [("1.weight", 0), ("1.bias", 0)], [("3.weight", 1)])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    got = minibatch_moments(model, squared, data(5), syms, batch_size=6, entries=True, groups=2)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    gradients = []
    for batch in data(5):
        model.zero_grad()
        squared(model, batch).mean().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for name, legs in dense_grams(gradients, syms).items():
        torch.testing.assert_close(got.second[name], legs, rtol=1e-12, atol=0)
    for n in syms.parameters:
        squares = torch.stack([g[n].square() for g in gradients]).mean(0)
        torch.testing.assert_close(got.squares[n], squares, rtol=1e-12, atol=0)
    assert len(got.groups) == 2


@pytest.mark.parametrize("sampling", ["replacement", "independent", "epoch"])
@pytest.mark.parametrize("complete", [True, False])
def test_minibatch_estimate_is_unbiased(sampling: Any, complete: bool) -> None:
    """`Tr` of noise and drift at another batch size, against the exact moments of the whole data set, within 4 SE."""
    model = net()
    syms = declare(model, "diagonal", [("0.weight", 0), ("0.bias", 0)], [("2.weight", 1)], name="hidden")
    n, size = 24, 4
    x, y = data(1, n)[0]
    sgd = SGDConfig(lr=0.1, batch_size=3, dataset_size=n)
    exact = gradient_moments(model, squared, [(x, y)], syms).batch_grams(syms["hidden"], sgd)
    per_sample = per_sample_gradients(model, squared, (x, y))
    stacked = {k: torch.stack([g[k] for g in per_sample]) for k in syms.parameters}
    rng = torch.Generator(torch.get_default_device()).manual_seed(0)
    count = n // size if complete else n // size - 2
    draws = []
    for _ in range(400):
        if sampling == "epoch":
            picks = torch.randperm(n, generator=rng).view(-1, size)[:count]
        elif sampling == "independent":
            picks = torch.stack([torch.randperm(n, generator=rng)[:size] for _ in range(count)])
        else:
            picks = torch.randint(n, (count, size), generator=rng)
        meter = MinibatchMeter(model, syms, size, n, sampling)
        for pick in picks:
            meter.observe(0.0, [stacked[k][pick].mean(0) for k in meter.params])
        draws.append(torch.stack([leg.sum() for leg in meter.result().batch_grams(syms["hidden"], sgd)]))
    draws = torch.stack(draws)
    error = draws.std(0) / math.sqrt(len(draws))
    truth = torch.stack([leg.sum() for leg in exact])
    assert ((draws.mean(0) - truth).abs() < 4 * error).all()
    assert (error < 0.05 * truth).all()


def test_meter_refuses_gradients_that_a_scaler_has_scaled():
    """Second moments would be off by the square of the scale; unscaled, or divided by it, they are right."""
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2).double(), torch.randn(8, 3, dtype=torch.float64)
    syms = declare(model, "diagonal", [("weight", 0)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    (wanted,) = torch.autograd.grad(model(x).square().mean(), [model.weight])
    for way in ("refused", "divided", "unscaled"):
        optimizer.zero_grad()
        scaler.scale(model(x).square().mean()).backward()
        meter = MinibatchMeter(model, syms, 8)
        if way == "refused":
            with pytest.raises(MomentError, match=r"unscale_.*scale=scaler\.get_scale"):
                meter.observe(0.0)
            continue
        if way == "unscaled":
            scaler.unscale_(optimizer)
        meter.observe(0.0, scale=scaler.get_scale() if way == "divided" else None)
        (second,) = meter.result().second[syms[0].name]
        torch.testing.assert_close(second, wanted.square().sum(1).cpu())


def test_minibatch_meter_reads_gradients_in_training() -> None:
    model = net()
    syms = hidden(model)
    meter = MinibatchMeter(model, syms, 6)
    for batch in data():
        model.zero_grad()
        loss = squared(model, batch).mean()
        loss.backward()
        meter.observe(float(loss.detach()))
    assert_same(meter.result(), minibatch_moments(model, squared, data(), syms, batch_size=6))


def test_minibatch_settings_are_checked() -> None:
    model = net()
    with pytest.raises(DataError, match="larger than dataset_size"):
        minibatch_moments(model, squared, data(), hidden(model), batch_size=6, dataset_size=5)
    with pytest.raises(DataError, match="have no noise"):
        minibatch_moments(model, squared, data(2), hidden(model), batch_size=6, dataset_size=6, sampling="independent")
    with pytest.raises(DataError, match="not finite"):
        minibatch_moments(model, lambda m, b: squared(m, b) * math.nan, data(), hidden(model), batch_size=6)
    with pytest.raises(DataError, match=r"a batch of 6 samples, but batch_size=8.*drop_last"):
        minibatch_moments(model, squared, data(), hidden(model), batch_size=8)
    with pytest.raises(DataError, match=r"a batch of 3 samples, but batch_size=6"):
        minibatch_moments(model, squared, [*data(), *data(1, 3)], hidden(model), batch_size=6)
    with pytest.raises(DataError, match=r"4 batches of 6 are more than an epoch of dataset_size=23"):
        minibatch_moments(model, squared, data(), hidden(model), batch_size=6, dataset_size=23)
    with pytest.raises(DataError, match="mean loss or per-sample losses, got float"):
        minibatch_moments(model, lambda m, b: 1.0, data(), hidden(model), batch_size=6)  # type: ignore[arg-type, return-value]
    with pytest.raises(MomentError, match="no_grad"):
        minibatch_moments(model, lambda m, b: squared(m, b).detach(), data(), hidden(model), batch_size=6)
    with pytest.raises(DeclarationError, match=r"another model \(0.weight: missing"):
        minibatch_moments(model[0], squared, data(), hidden(model), batch_size=6)


def test_minibatch_moments_without_symmetries_are_of_all_parameters() -> None:
    model = net()
    none = SymmetrySet(())
    got = minibatch_moments(model, squared, data(), none, batch_size=6)
    assert set(got.mean) == set(gradient_moments(model, squared, data(), none).mean)
    assert set(got.mean) == {name for name, _ in model.named_parameters()}


def test_gradients_that_are_not_finite_are_reported() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].bias.zero_()
    x = torch.randn(8, 4, dtype=torch.float64)
    syms = declare(model, "diagonal", [("0.weight", 0), ("0.bias", 0)], [("2.weight", 1)])

    def root(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).abs().sqrt().sum(1)

    def huge(model: nn.Module, batch: Any) -> Tensor:
        return 1e200 * (model(batch[0]) - 1).square().sum(1)

    with pytest.raises(MomentError, match=r"is NaN or inf although the loss is finite"):
        gradient_moments(model, root, [(x,)], syms)
    for measure in (gradient_moments, partial(minibatch_moments, batch_size=8)):
        with pytest.raises(MomentError, match=r"moments of .* are NaN or inf"):
            measure(model, huge, [(x,), (x,)], syms)


def test_errors_of_moments_merged_with_ungrouped_ones_are_refused() -> None:
    model = net()
    parts = [gradient_moments(model, squared, data(4), hidden(model), groups=g) for g in (1, 4)]
    with pytest.raises(MomentError, match=r"groups hold 24 of 48 samples"):
        standard_error(merge_moments(parts), lambda m: m.loss)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_empty_parameters_have_empty_moments() -> None:
    """A layer of width zero passes no gradient; what its neighbours measure is that of a loop."""

    class WithEmpty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.empty, self.other, self.out = nn.Linear(4, 0), nn.Linear(4, 3), nn.Linear(3, 2)
            self.last = nn.Linear(0, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.cat([self.empty(x), self.other(x)], -1)
            return self.out(torch.tanh(h)) + self.last(self.empty(x))

    torch.manual_seed(0)
    for shape in ((6, 4), (6, 5, 4)):
        model, x = WithEmpty().double(), torch.randn(shape, dtype=torch.float64)
        names = [n for n, _ in model.named_parameters()]
        loss = lambda m, b: m(b).square().flatten(1).sum(1)
        got = gradient_moments(model, loss, [x, x], SymmetrySet(()), entries=True, parameters=names)
        expected = moments_by_loop(model, loss, [x], SymmetrySet(()))
        for name in names:
            assert got.squares[name].shape == model.get_parameter(name).shape
            torch.testing.assert_close(got.squares[name], expected.squares[name], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named(bad: float) -> None:
    model = net()
    syms = hidden(model)
    with torch.no_grad():
        model[2].weight[0, 0] = bad
    with pytest.raises(DataError, match=r"not finite.*NaN or inf in the model's \['2.weight'\]"):
        gradient_moments(model, squared, data(), syms)
    with pytest.raises(DataError, match=r"not finite.*NaN or inf in the model's \['2.weight'\]"):
        minibatch_moments(model, squared, data(), syms, batch_size=6)


def test_hooks_that_change_gradients_are_refused_or_seen() -> None:
    """A mask on half of the rows: samples' own gradients are not what SGD sees; minibatch gradients are."""
    model = net()
    syms = hidden(model)
    free = minibatch_moments(model, squared, data(), syms, batch_size=6)
    mask = torch.tensor([1.0, 0.0] * (len(model[0].weight) // 2), dtype=torch.float64).unsqueeze(1)
    handle = model[0].weight.register_hook(lambda g: g * mask)
    with pytest.raises(MomentError, match=r"\['0.weight'\] have gradient hooks.*minibatch_moments"):
        gradient_moments(model, squared, data(), syms)
    masked = minibatch_moments(model, squared, data(), syms, batch_size=6)
    torch.testing.assert_close(masked.second["hidden"][0], free.second["hidden"][0] * mask.flatten())
    handle.remove()
    handle = model[0].weight.register_post_accumulate_grad_hook(lambda p: p.grad.zero_())
    for measure in (gradient_moments, partial(minibatch_moments, batch_size=6)):
        with pytest.raises(MomentError, match=r"\['0.weight'\] have hooks that run when .grad is complete.*observe"):
            measure(model, squared, data(), syms)
    handle.remove()
    assert gradient_moments(model, squared, data(), syms).samples == 24


F32, F64 = torch.float32, torch.float64


@pytest.mark.parametrize(
    ("dtype", "spread", "lost"), [(F32, 1e-5, True), (F32, 1e-2, False), (F64, 1e-5, False), (F64, 1e-9, True)]
)
def test_noise_below_rounding_is_said(dtype: torch.dtype, spread: float, lost: bool, tmp_path: Path) -> None:
    """Samples that differ by a part in `spread`: their variance is `spread^2` of the squared mean."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).to(dtype)
    syms = hidden(model)
    x = (1 + spread * torch.randn(64, 4, dtype=torch.float64)).to(dtype)
    loss = lambda m, b: m(b).square().sum(1)
    moments = gradient_moments(model, loss, [x], syms)
    assert (moments.unresolved != ()) == lost
    assert ("noise below rounding along hidden" in str(moments)) == lost
    assert minibatch_moments(model, loss, x.split(8), syms, batch_size=8).unresolved == moments.unresolved
    save_moments(moments, tmp_path / "m")
    assert load_moments(tmp_path / "m").unresolved == moments.unresolved == merge_moments([moments, moments]).unresolved


def test_samples_fed_twice_are_said() -> None:
    model = net()
    syms = hidden(model)
    once = gradient_moments(model, squared, data(), syms)
    assert once.repeated == 0
    assert "fed twice" not in str(once)
    first = data()
    for moments, times in (
        (gradient_moments(model, squared, [*first, first[1]], syms, groups=5), 1),
        (gradient_moments(model, squared, [*first, *first], syms, groups=8), 4),
        (merge_moments([once, once]), len(once.groups)),
    ):
        assert moments.repeated == times
        assert "the same samples as another: fed twice" in str(moments)


def test_equal_losses_alone_are_no_repetition() -> None:
    """A head of zeros gives every sample the same loss; the gradients differ."""
    model = net()
    torch.nn.init.zeros_(model[2].weight)
    torch.nn.init.zeros_(model[2].bias)
    syms = hidden(model)
    batches = [(x, torch.ones_like(y)) for x, y in data()]
    moments = gradient_moments(model, squared, batches, syms, groups=4)
    assert len({g.loss for g in moments.groups}) == 1
    assert moments.repeated == 0
