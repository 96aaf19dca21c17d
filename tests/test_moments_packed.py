"""Groups in one byte per entry: what they take, and that errors and intervals are those of groups kept whole."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf
from noetherflow.moments import (
    GradientMoments,
    load_moments,
    measuring,
    merge_moments,
    packed,
    save_moments,
    standard_error,
)
from noetherflow.moments.contraction import Contraction
from noetherflow.moments.packed import PackedTensor, PackedTensors, ProductTensor
from noetherflow.moments.placement import GroupPlan


@pytest.mark.parametrize("shape", [(3000,), (40, 50), (300, 5), (20, 30, 3, 3), (1500, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packing_rounds_each_entry_relative_to_its_row(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """`|error| <= sqrt(|x| max) / 127 + max / (4 * 127^2)`: half a step of the square root."""
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype) * torch.logspace(-6, 6, shape[0], dtype=dtype).view(-1, *[1] * (len(shape) - 1))
    kept = PackedTensor.of(x)
    got = kept.unpack()
    assert got.shape == x.shape
    assert got.dtype == dtype
    rows = packed._rows(x)
    top = rows.abs().amax(1, keepdim=True)
    bound = ((rows.abs() * top).sqrt() / 127 + top / (4 * 127**2)) * (1 + 1e-5)
    assert bool(((packed._rows(got) - rows).abs() <= bound).all())
    assert bool((got.sign() * x.sign() >= 0).all())
    assert kept.codes.element_size() == 1
    assert kept.scales.numel() * packed.ROW <= x.numel()


def test_zeros_and_small_tensors_stay() -> None:
    zero = torch.zeros(50, 50)
    assert torch.equal(PackedTensor.of(zero).unpack(), zero)
    small = {"w": torch.randn(packed.SMALL), "v": torch.randn(packed.SMALL + 1)}
    kept = PackedTensors.of(small)
    assert kept["w"] is small["w"]
    assert kept["v"] is not small["v"]
    assert PackedTensors.of(kept) is kept


def kept_bytes(thing: Any, seen: dict[int, int]) -> int:
    """Bytes of all tensors held, packed ones as they are."""
    if isinstance(thing, Tensor):
        seen[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    elif isinstance(thing, PackedTensors):
        kept_bytes(thing.held, seen)
    elif isinstance(thing, Mapping):
        for value in thing.values():
            kept_bytes(value, seen)
    elif isinstance(thing, tuple):
        for value in thing:
            kept_bytes(value, seen)
    elif hasattr(thing, "__dict__"):
        kept_bytes(vars(thing), seen)
    return sum(seen.values())


@pytest.mark.parametrize(("entries", "limit"), [(False, 21), (True, 41.5)])
def test_bytes_kept_per_parameter(entries: bool, limit: int) -> None:
    width = 128
    model = nn.Sequential(*(k for _ in range(3) for k in (nn.Linear(width, width, bias=False), nn.ReLU())))
    x = torch.randn(32 * 16, width)  # groups of 32 samples, whose factors would take more
    syms = nf.find_symmetries(model, x[:2])
    moments = nf.gradient_moments(model, lambda m, b: m(b).square().sum(1), [x], syms, entries=entries)
    assert len(moments.groups) == 16
    small = 8 * sum(leg.numel() for m in (moments, *moments.groups) for legs in m.second.values() for leg in legs)
    count = sum(p.numel() for p in model.parameters())
    assert 15 < (kept_bytes(moments, {}) - small) / count < limit
    unpacked = sum(t.numel() * t.element_size() for g in moments.groups for t in g.mean.values())
    assert unpacked / count > 60, "what the groups would take as they were measured"


def test_groups_of_few_samples_are_kept_as_products_of_their_factors(tmp_path: Path) -> None:
    """Four samples of a layer of 128 x 128 take 4 kB, packed 16 kB; gradients, errors and files are exact."""
    torch.manual_seed(0)
    width = 128
    model = nn.Sequential(*(k for _ in range(3) for k in (nn.Linear(width, width), nn.ReLU())))
    x = torch.randn(64, width) + 0.5
    before = x.clone()
    syms = nf.find_symmetries(model, x[:2])
    loss = lambda m, b: m(b).square().sum(1)
    moments = nf.gradient_moments(model, loss, [x], syms)
    x.zero_()  # the caller's batch may be overwritten: factors are copies
    small = 8 * sum(leg.numel() for m in (moments, *moments.groups) for legs in m.second.values() for leg in legs)
    count = sum(p.numel() for p in model.parameters())
    assert (kept_bytes(moments, {}) - small) / count < 9, "4 of the mean, 4 of the factors"
    nf.save_moments(moments, tmp_path / "m.safetensors")
    loaded = load_moments(tmp_path / "m.safetensors")
    for k, (group, again) in enumerate(zip(moments.groups, loaded.groups, strict=True)):
        part = before[4 * k : 4 * k + 4]
        grads = torch.autograd.grad(loss(model, part).mean(), list(model.parameters()))
        for (name, p), g in zip(model.named_parameters(), grads, strict=True):
            if name not in moments.mean:
                continue
            assert isinstance(group.mean.held[name], ProductTensor if p.ndim == 2 else Tensor)  # type: ignore[attr-defined]
            torch.testing.assert_close(group.mean[name], g, rtol=1e-5, atol=1e-6)
            assert torch.equal(again.mean[name], group.mean[name])
        alone = nf.gradient_moments(model, loss, [part], syms, groups=1)
        for s in syms:
            for a, b in zip(group.second[s.name], alone.second[s.name], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))  # float32 sums
    grads = torch.autograd.grad(loss(model, before).mean(), list(model.parameters()))
    expected = dict(zip((n for n, _ in model.named_parameters()), grads, strict=True))
    for name, mean in moments.mean.items():
        torch.testing.assert_close(mean, expected[name], rtol=1e-5, atol=1e-6)
    joined = merge_moments([moments, loaded])
    assert joined.samples == 128
    resumed = nf.gradient_moments(model, loss, [before], syms, resume=moments)
    for name in moments.mean:
        torch.testing.assert_close(resumed.mean[name], moments.mean[name], rtol=1e-5, atol=1e-7)


class LoopedContraction(Contraction):
    """One group after the other, as it is done where groups cannot be summed at once."""

    @property
    def _divided(self) -> bool:
        return False


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Identity])
def test_groups_summed_at_once_are_those_measured_alone(
    activation: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of 7 and 8 samples, with biases; ReLU has diagonal symmetries, two linear layers a general_linear one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 150), activation(), nn.Linear(150, 160)).double()
    x = torch.randn(37, 200, dtype=torch.float64) + 0.5
    syms = nf.find_symmetries(model, x[:2])
    assert {s.is_torus for s in syms} == {activation is nn.ReLU}
    loss = lambda m, b: m(b).square().sum(1)
    whole = nf.gradient_moments(model, loss, [x], syms, groups=5)
    monkeypatch.setattr(measuring, "Contraction", LoopedContraction)
    looped = nf.gradient_moments(model, loss, [x], syms, groups=5)
    starts = [37 * k // 5 for k in range(6)]
    for group, other, lo, hi in zip(whole.groups, looped.groups, starts, starts[1:], strict=False):
        alone = nf.gradient_moments(model, loss, [x[lo:hi]], syms, groups=1)
        assert group.samples == other.samples == alone.samples == hi - lo
        for s in syms:
            for a, b, c in zip(group.second[s.name], other.second[s.name], alone.second[s.name], strict=True):
                scale = 1e-12 * float(c.abs().max())
                torch.testing.assert_close(a, b, rtol=0, atol=scale)
                torch.testing.assert_close(a, c, rtol=0, atol=scale)
        for name in whole.mean:
            torch.testing.assert_close(group.mean[name], alone.mean[name], rtol=1e-12, atol=1e-13)
    for name, mean in whole.mean.items():
        torch.testing.assert_close(mean, looped.mean[name], rtol=1e-12, atol=1e-14)


def test_groups_of_many_samples_are_packed() -> None:
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128))
    x = torch.randn(16 * 65, 128)  # 65 samples a group: factors of 66 kB, packed 16 kB
    moments = nf.gradient_moments(model, lambda m, b: m(b).square().sum(1), [x], nf.find_symmetries(model, x[:2]))
    assert isinstance(moments.groups[0].mean.held["0.weight"], PackedTensor)  # type: ignore[attr-defined]
    entries = nf.gradient_moments(
        model, lambda m, b: m(b).square().sum(1), [x[:64]], nf.find_symmetries(model, x[:2]), entries=True
    )
    assert isinstance(entries.groups[0].mean.held["0.weight"], PackedTensor)  # type: ignore[attr-defined]


def wide() -> tuple[nn.Module, nf.SymmetrySet, list[Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 40)).double()
    x = torch.randn(320, 40, dtype=torch.float64) + 1
    return model, nf.find_symmetries(model, x[:2]), list(x.split(10))


def measured(monkeypatch: pytest.MonkeyPatch, small: int, batches: list[Tensor] | None = None) -> GradientMoments:
    monkeypatch.setattr(packed, "SMALL", small)
    model, syms, data = wide()
    loss = lambda m, b: m(b).square().sum(1)
    return nf.gradient_moments(model, loss, data if batches is None else batches, syms, entries=True)


def drive(syms: nf.SymmetrySet) -> Any:
    """A statistic in which the mean gradient weighs as much as the noise: the second moment of a large batch."""
    sgd = nf.SGDConfig(0.1, 64)
    return lambda m: torch.cat([leg.flatten() for s in syms for leg in m.batch_grams(s, sgd)])


def entry_drive(m: GradientMoments) -> Tensor:
    return torch.stack([(m.squares[n].double() / 64 + m.mean[n].double().square()).sum() for n in m.mean])


def test_errors_are_those_of_groups_kept_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    _, syms, _ = wide()
    rounded, whole = measured(monkeypatch, 0), measured(monkeypatch, 10**9)
    assert all(isinstance(t, PackedTensor) for t in rounded.groups[0].mean.held.values())  # type: ignore[attr-defined]
    for statistic in (drive(syms), entry_drive):
        got, expected = standard_error(rounded, statistic), standard_error(whole, statistic)
        assert torch.equal(got.value, expected.value)
        assert float((got.error / expected.error - 1).abs().max()) < 0.03
        assert float(((got.bias - expected.bias) / expected.error).abs().max()) < 0.1


def test_the_mean_is_exact_through_merging_resuming_and_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, syms, data = wide()
    loss = lambda m, b: m(b).square().sum(1)
    monkeypatch.setattr(packed, "SMALL", 0)
    whole = nf.gradient_moments(model, loss, data, syms, entries=True)
    first, second = (nf.gradient_moments(model, loss, part, syms, entries=True) for part in (data[:16], data[16:]))
    save_moments(first, tmp_path / "first")
    loaded = load_moments(tmp_path / "first")
    for a, b in zip(loaded.groups, first.groups, strict=True):
        assert all(torch.equal(a.mean[n], b.mean[n]) and torch.equal(a.squares[n], b.squares[n]) for n in first.mean)
    resumed = nf.gradient_moments(model, loss, data[16:], syms, entries=True, resume=loaded)
    for other in (merge_moments([loaded, second]), resumed):
        for name, mean in whole.mean.items():
            torch.testing.assert_close(other.mean[name], mean, rtol=1e-12, atol=1e-15)
            torch.testing.assert_close(other.squares[name], whole.squares[name], rtol=1e-12, atol=1e-15)
        error, expected = (standard_error(m, drive(syms)).error for m in (other, whole))
        assert 0.5 < float((error / expected).median()) < 2


def test_a_group_left_out_is_what_the_others_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measured(monkeypatch, 10**9)
    for k, rest in enumerate(whole.leave_one_out()):
        others = merge_moments([g for j, g in enumerate(whole.groups) if j != k])
        for name, mean in others.mean.items():
            torch.testing.assert_close(rest.mean[name], mean, rtol=1e-11, atol=1e-14)
            torch.testing.assert_close(rest.squares[name], others.squares[name], rtol=1e-11, atol=1e-14)
        assert set(rest.mean) == set(others.mean)


def squared_mean(m: GradientMoments) -> Tensor:
    """`|gbar|^2` without bias: `E|g|^2 = |gbar|^2 + Tr Sigma`, and `|m|^2` holds `Tr Sigma / n` too much."""
    n, second = m.samples, m.second["s"][0].sum()
    return (n * m.mean["w"].double().square().sum() - second) / (n - 1)


@pytest.mark.parametrize(("keep", "low", "high"), [(1.0, 0.92, 0.98), (0.5, 0.0, 0.88)])
def test_intervals_cover_the_truth(monkeypatch: pytest.MonkeyPatch, keep: float, low: float, high: float) -> None:
    """`|gbar|^2` of Gaussian samples, from packed groups; with errors halved the same test fails."""
    monkeypatch.setattr(packed, "SMALL", 0)
    rng, runs, dim = torch.Generator().manual_seed(0), 250, 64
    truth = torch.linspace(0.1, 0.3, dim, dtype=torch.float64)
    hits = 0
    for _ in range(runs):
        samples = truth + torch.randn(16, 20, dim, generator=rng, dtype=torch.float64)
        parts = [
            GradientMoments(20, 0.0, {"s": (g.square().mean(0).sum().view(1),)}, {"w": g.mean(0)}) for g in samples
        ]
        moments = nf.moments.result.in_groups(parts)
        estimate = standard_error(moments, squared_mean)
        lower, upper = nf.moments.Estimate(
            estimate.value, keep * estimate.error, estimate.bias, estimate.groups
        ).interval()
        hits += bool(lower <= truth.square().sum() <= upper)
    assert low < hits / runs < high, f"{hits / runs:.3f} +- {math.sqrt(0.05 * 0.95 / runs):.3f}"


@pytest.mark.slow
@pytest.mark.parametrize(("size", "sized"), [(25, True), (10, True), (10, False), (200, True)])
def test_measured_intervals_cover_the_truth(monkeypatch: pytest.MonkeyPatch, size: int, sized: bool) -> None:
    """400 samples drawn from a population of 3,000 whose moments are known: 16 groups of a batch, of several
    neighbouring batches, joined in pairs where their number is not known, and parts of two batches.

    The statistic is a large batch's second moment on each leg, to which the mean gradient gives as much as the
    noise.
    """
    monkeypatch.setattr(packed, "SMALL", 0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    population = torch.randn(3000, 5, dtype=torch.float64) + 0.5
    syms, loss = nf.find_symmetries(model, population[:2]), lambda m, b: (m(b) - 0.3).square().sum(1)
    sgd = nf.SGDConfig(0.1, 16)
    statistic = lambda m: torch.stack([leg.sum() for s in syms for leg in m.batch_grams(s, sgd)])
    whole = nf.gradient_moments(model, loss, [population], syms, groups=1)
    truth = torch.stack([(second / 16 + mean * (15 / 16)).sum() for s in syms for second, mean in zip(
        whole.second[s.name], s.grams({n: whole.mean[n] for n in s.parameters}), strict=True)])  # fmt: skip
    rng, runs, meter = torch.Generator().manual_seed(1), 500, nf.Meter(model, loss, syms)
    hits = torch.zeros_like(truth)
    for _ in range(runs):
        batches = population[torch.randint(len(population), (400,), generator=rng)].split(size)
        estimate = standard_error(meter.measure(list(batches) if sized else iter(batches)), statistic)
        assert 8 < estimate.groups <= 16
        lower, upper = estimate.interval()
        hits += (lower <= truth) & (truth <= upper)
    coverage = float(hits.mean()) / runs
    assert 0.93 < coverage < 0.97, f"{coverage:.3f}"


@pytest.mark.parametrize(("groups", "count"), [(16, 16), (16, 17), (16, 5), (4, 40), (5, 23), (3, 10), (1, 9), (16, 1)])
@pytest.mark.parametrize("known", [True, False])
def test_groups_are_neighbours_each_filled_before_the_next(groups: int, count: int, known: bool) -> None:
    """By brute force: batches in sets, joined as the placements say."""
    plan, held, level = GroupPlan(groups, count if known else None), dict[int, list[int]](), 1
    done: set[int] = set()
    for k in range(count):
        placed = plan.place(k)
        while level < placed.level:
            level *= 2
            joined: dict[int, list[int]] = {}
            for g, batches in sorted(held.items()):
                joined.setdefault(g // 2, []).extend(batches)
            held, done = joined, set()
        assert not done & set(placed.groups), "a complete group was added to"
        for g in placed.groups:
            held.setdefault(g, []).append(k)
        done |= set(placed.groups) if placed.complete else set()
    assert sorted({k for batches in held.values() for k in batches}) == list(range(count))
    if known:
        assert sorted(held) == list(range(max(groups, 1) if count else 0))
    else:
        assert min(groups, count) / 2 <= len(held) <= groups
    if known or groups > 3:
        assert [k for _, batches in sorted(held.items()) for k in batches] == sorted(
            k for batches in held.values() for k in batches
        )


class Live:
    """Bytes of tensors allocated and not freed, and their peak, while torch works."""

    def __init__(self, work: Any) -> None:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            work()
        self.now = self.peak = 0
        for event in seen.profiler.kineto_results.events():
            if event.name() == "[memory]":
                self.now += event.nbytes()
                self.peak = max(self.peak, self.now)


@pytest.mark.parametrize(("entries", "limit"), [(False, 24), (True, 40.5)])
@pytest.mark.parametrize("count", [16, 3])
def test_bytes_per_parameter_while_measuring(
    entries: bool, limit: float, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond what one group takes for forward and backward: 16 bytes for 16 groups, 4 for the mean (8 and 32). Packed
    throughout: batches this small would be kept as products of their factors.
    """
    monkeypatch.setattr(Contraction, "_stays_product", lambda *_: False)
    peak, beside = _peak_per_parameter(entries, count)
    assert peak < limit + beside, "beside: activations, the scales of packed rows"
    assert peak > limit - 5, "the measure measures"


def test_bytes_per_parameter_while_measuring_few_samples() -> None:
    """Groups of three samples, kept as products: the mean gradient is the only copy."""
    peak, beside = _peak_per_parameter(False, 3)
    assert 4 < peak < 8 + beside


def _peak_per_parameter(entries: bool, count: int) -> tuple[float, float]:
    """Peak bytes per parameter of a measurement, and what may be needed beside the parameters' own sums."""
    width, depth = 192, 30
    model = nn.Sequential(*(k for _ in range(depth) for k in (nn.Linear(width, width, bias=False), nn.ReLU())))
    x = torch.randn(16 * count, width)
    syms = nf.find_symmetries(model, x[:2])
    parameters = sum(p.numel() for p in model.parameters())
    meter = nf.Meter(model, lambda m, b: m(b).square().sum(1), syms, entries=entries)
    meter.measure(list(x.split(16)))
    kept: list[GradientMoments] = []
    peak = Live(lambda: kept.append(meter.measure(list(x.split(16))))).peak / parameters
    grams = 8 * sum(leg.numel() for m in (kept[0], *kept[0].groups) for legs in m.second.values() for leg in legs)
    layers = 3 * 8 * width**2  # two parameters of a symmetry in float64, and a square
    assert len(kept[0].groups) == 16
    return peak, (2 * grams + layers) / parameters + 1
