"""Captured passes against the pass itself and against a loop over samples; what is captured anew, and what never."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import noetherflow as nf
from noetherflow import SymmetrySet
from noetherflow.errors import DataError, MomentError
from noetherflow.moments.result import GradientMoments
from reference import moments_by_loop, without_buffers
from test_moments_rules import every_axis, squared_output
from zoo import ZOO

EXACT = 1e-12
BEFORE = 4
"""The first batch is verified, the second measured as usual, the third captured, the fourth compared."""


def inputs(count: int, *shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(*shape, dtype=dtype) for _ in range(count)]


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def conv_norm() -> nn.Sequential:
    body = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    return nn.Sequential(*body).double().eval()


class Tied(nn.Module):
    """One matrix used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight.T) @ self.weight


def meters(model: nn.Module, **more: Any) -> tuple[nf.Meter, nf.Meter]:
    """A meter without and one with captures."""
    syms = every_axis(model)
    return tuple(nf.Meter(model, squared_output, syms, capture=c, **more) for c in (False, True))  # type: ignore[return-value]


def assert_same(a: GradientMoments, b: GradientMoments, limit: float = EXACT) -> None:
    pairs = [(p, q) for s in b.second for p, q in zip(a.second[s], b.second[s], strict=True)]
    pairs += [(a.mean[n], b.mean[n]) for n in b.mean] + [(a.squares[n], b.squares[n]) for n in a.squares]
    rounding = limit**2 * max(float(q.norm()) for _, q in pairs)
    assert all(float((p - q).norm()) <= limit * float(q.norm()) + rounding for p, q in pairs)
    assert a.samples == b.samples
    assert abs(a.loss - b.loss) <= limit * abs(b.loss)


@dataclass
class Subject:
    model: nn.Module
    batches: list[Tensor]


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "mlp": lambda: Subject(mlp(), inputs(7, 4, 5)),
    "tokens": lambda: Subject(mlp(), inputs(7, 4, 3, 5)),
    "conv-norm-eval": lambda: Subject(conv_norm(), inputs(7, 3, 2, 4, 4)),
    "tied": lambda: Subject(Tied(), inputs(7, 4, 5)),
}


@pytest.mark.parametrize("entries", [False, True])
@pytest.mark.parametrize("name", SUBJECTS)
def test_replays_equal_the_loop_over_samples(name: str, entries: bool) -> None:
    torch.manual_seed(0)
    subject = SUBJECTS[name]()
    plain, captured = meters(subject.model, entries=entries)
    expected = moments_by_loop(subject.model, squared_output, subject.batches, captured.syms)
    found = captured.measure(subject.batches, groups=1)
    assert captured.captured == nf.moments.Captured(traces=1, replays=7 - BEFORE)
    assert_same(found, expected)
    assert_same(found, plain.measure(subject.batches, groups=1))


@pytest.mark.parametrize("groups", [2, 7, 14])
def test_groups_and_their_errors_are_the_same(groups: int) -> None:
    """Groups of several batches, of one, and parts of a batch, whose gradients are kept packed or as factors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 3))
    batches = inputs(7, 4, 40, dtype=torch.float32)
    plain, captured = meters(model)
    captured.measure(batches, groups=groups)
    found, expected = captured.measure(batches, groups=groups), plain.measure(batches, groups=groups)
    assert captured.captured.replays >= 7
    assert_same(found, expected, 1e-6)
    assert len(found.groups) == len(expected.groups) == groups
    for mine, theirs in zip(found.groups, expected.groups, strict=True):
        assert_same(mine, theirs, 1e-6)


@pytest.mark.parametrize("name", ["gpt2_eager", "cnn_batchnorm", "shared_layer"])
def test_models_of_the_zoo_are_captured(name: str) -> None:
    compare_zoo_model(name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ZOO)
def test_every_model_of_the_zoo_is_captured(name: str) -> None:
    compare_zoo_model(name)


def compare_zoo_model(name: str) -> None:
    """Random weights in float64, six batches that differ, with what no rule covers left to the fallback."""
    case = ZOO[name]().double()
    syms = without_buffers(nf.find_symmetries(case.model, case.inputs).trainable(case.model))
    batches = [varied(case.batch, k) for k in range(6)]
    found = [nf.Meter(case.model, case.loss_fn, syms, capture=c) for c in (False, True)]
    plain, captured = (m.measure(batches, groups=1) for m in found)
    assert (found[1].captured.traces, found[1].captured.replays) == (1, 2)
    assert_same(captured, plain)


def varied(batch: Any, seed: int) -> Any:
    """The batch with its numbers changed a little and whole numbers in another order."""
    rng = torch.Generator().manual_seed(seed)

    def other(t: Tensor) -> Tensor:
        if t.is_floating_point():
            return t * (1 + 0.1 * torch.randn(t.shape, generator=rng, dtype=t.dtype))
        return t[torch.randperm(len(t), generator=rng)] if t.ndim else t

    return pytree.tree_map_only(Tensor, other, batch)


def test_a_replay_runs_no_forward_and_one_graph_serves_all_calls() -> None:
    torch.manual_seed(0)
    runs = []

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        runs.append(len(batch))
        return squared_output(model, batch)

    model, batches = mlp(), inputs(6, 4, 5)
    meter = nf.Meter(model, loss_fn, every_axis(model), capture=True)
    meter.measure(batches, groups=1)
    before = len(runs)
    for _ in range(3):
        meter.measure(batches, groups=1)
    assert len(runs) == before
    assert meter.captured.traces == 1
    assert meter.captured.replays == 2 + 18
    plain = nf.Meter(model, loss_fn, every_axis(model))
    plain.measure(batches, groups=1)
    assert len(runs) == before + 6  # the first serves to verify as well


def test_weights_and_buffers_changed_in_place_are_seen() -> None:
    torch.manual_seed(0)
    subject = SUBJECTS["conv-norm-eval"]()
    model, batches = subject.model, subject.batches
    _, meter = meters(model)
    before = meter.measure(batches, groups=1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        model[1].running_mean.add_(0.5)
        model[1].running_var.mul_(1.5)
    kept = {n: b.clone() for n, b in model.named_buffers()}
    after = meter.measure(batches, groups=1)
    assert meter.captured.traces == 1
    assert meter.captured.replays == 3 + 6  # the first with other weights is compared again
    assert_same(after, moments_by_loop(model, squared_output, batches, meter.syms))
    with pytest.raises(AssertionError):
        assert_same(after, before)
    assert all(torch.equal(b, kept[n]) for n, b in model.named_buffers())


class Counting(nn.Module):
    """Overwrites a buffer in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3).double()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x) * self.calls


def test_buffers_that_a_forward_overwrites_are_left() -> None:
    torch.manual_seed(0)
    model, batches = Counting(), inputs(6, 4, 5)
    plain, captured = meters(model)
    assert_same(captured.measure(batches, groups=1), plain.measure(batches, groups=1))
    assert captured.captured.replays == 2
    assert float(model.calls) == 0


def _other_parameter(model: Any) -> None:
    model[0].weight = nn.Parameter(2 * model[0].weight.detach())


def _frozen(model: Any) -> None:
    model[0].bias.requires_grad_(False)


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "a parameter in the place of another": (_other_parameter, "0.weight"),
    "a frozen parameter": (_frozen, "0.bias.as"),
    "another layer": (lambda m: m.__setitem__(1, nn.ReLU()), "1"),
    "another mode": (lambda m: m.train(), "training"),
    "another setting": (lambda m: setattr(m[1], "negative_slope", 0.5), "1.negative_slope"),
    "a hook": (lambda m: m[0].register_forward_hook(lambda _, __, out: 2 * out) and None, "0._forward_hooks"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_the_model_is_captured_anew(name: str) -> None:
    torch.manual_seed(0)
    change, place = CHANGES[name]
    model = nn.Sequential(nn.Linear(5, 6), nn.LeakyReLU(), nn.Linear(6, 3)).double().eval()
    batches = inputs(6, 4, 5)
    syms = SymmetrySet(tuple(s for s in every_axis(model) if "2." in s.name))  # the first layer stays unmeasured
    meter = nf.Meter(model, squared_output, syms, capture=True)
    meter.measure(batches, groups=1)
    assert meter.captured.replays == 2
    change(model)
    after = meter.measure(batches, groups=1)
    assert meter.captured.traces == 2
    assert meter._captures.changed.startswith(place)
    expected = nf.Meter(model, squared_output, syms).measure(batches, groups=1)
    assert_same(after, expected)


def test_other_shapes_are_captured_beside_those_known() -> None:
    torch.manual_seed(0)
    model = mlp()
    batches = [*inputs(6, 4, 5), *inputs(6, 3, 5)]
    plain, captured = meters(model)
    assert_same(captured.measure(batches, groups=1), plain.measure(batches, groups=1))
    assert (captured.captured.traces, captured.captured.replays) == (2, 2 + 3)  # no verification of its own
    captured.measure(batches[4:8], groups=1)
    assert (captured.captured.traces, captured.captured.replays) == (2, 5 + 4)


def test_autocast_is_written_out_in_the_graph() -> None:
    torch.manual_seed(0)
    model, batches = mlp().float(), inputs(6, 4, 5, dtype=torch.float32)
    plain, captured = meters(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = (m.measure(batches, groups=1) for m in (captured, plain))
    assert captured.captured.replays == 2
    assert_same(found, expected, 1e-6)
    without = captured.measure(batches, groups=1)
    assert captured.captured.traces == 2
    with pytest.raises(AssertionError):
        assert_same(without, expected, 1e-6)


def test_dropout_draws_anew_in_every_replay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 20), nn.Dropout(0.5), nn.Linear(20, 3)).double().train()
    batches = inputs(1, 4, 5) * 6
    plain, captured = meters(model)
    found = []
    for meter in (plain, captured):
        torch.manual_seed(1)
        found.append(meter.measure(batches, groups=1))
    assert_same(found[1], found[0])  # the same random numbers, in the same order
    first, second = (captured.measure(batches[:1], groups=1) for _ in range(2))
    assert captured.captured.replays == 2 + 2
    with pytest.raises(AssertionError):
        assert_same(first, second, 1e-3)


class Way(nn.Module):
    """A linear layer and a way through it that Python chooses."""

    def __init__(self, way: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.way = nn.Linear(5, 3).double(), way

    def forward(self, x: Tensor) -> Tensor:
        return self.way(x, self.linear(x))


def _to_numpy(x: Tensor, h: Tensor) -> Tensor:
    return h * torch.from_numpy(1 + x.numpy() ** 2).sum(1, keepdim=True)


def _past_torch(x: Tensor, h: Tensor) -> Tensor:
    """Reads the first number of the batch where it lies, as a kernel written by hand does."""
    return h * (1 + ctypes.c_double.from_address(x.data_ptr()).value ** 2)


def _dropped_and_recomputed(x: Tensor, h: Tensor) -> Tensor:
    return checkpoint(lambda t: F.dropout(t.sin(), 0.5), h, use_reentrant=False)


NEVER: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "if": (lambda x, h: 2 * h if x.sum() > 0 else h, "reads a number"),
    "item": (lambda x, h: h * float(x.abs().max()), "reads a number"),
    "mask": (lambda x, h: h * x[x > 0].sum(), "makes a shape"),
    "random": (lambda x, h: h * (1 + random.random() * 0), "Python or NumPy"),
    "numpy random": (lambda x, h: h * (1 + np.random.rand() * 0), "Python or NumPy"),  # noqa: NPY002
    "numpy": (_to_numpy, "another library (numpy)"),
    "past torch": (_past_torch, "something else than the pass itself"),
    "recomputed dropout": (_dropped_and_recomputed, "restored random numbers"),
}


@pytest.mark.parametrize("name", NEVER)
def test_what_no_graph_holds_is_measured_without_and_said(name: str) -> None:
    torch.manual_seed(0)
    way, reason = NEVER[name]
    model = Way(way)
    batches = inputs(8, 4, 5)
    plain, captured = meters(model)
    found = []
    for meter in (plain, captured):
        torch.manual_seed(1)
        found.append(meter.measure(batches, groups=1))
    assert captured.captured.replays == 0
    assert len(captured.captured.refused) == 1
    assert reason in str(captured.captured)
    if name != "recomputed dropout":  # its comparison draws further numbers
        assert_same(found[1], found[0])


def _first_number(tensor: Tensor) -> float:
    return float(ctypes.c_double.from_address(tensor.data_ptr()).value)


@pytest.mark.parametrize("of", ["weights", "second input"])
def test_what_was_the_same_when_compared_is_compared_once_it_is_another(of: str) -> None:
    """Numbers read past torch, of what first changes after replays have been trusted."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()

    def loss_fn(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        read = model.weight if of == "weights" else batch[1]
        return squared_output(model, batch[0]) * (1 + _first_number(read) ** 2)

    meters = [nf.Meter(model, loss_fn, every_axis(model), capture=c) for c in (False, True)]
    same = torch.ones(4, dtype=torch.float64)
    batches = [(x, same) for x in inputs(6, 4, 5)]
    assert_same(*(m.measure(batches, groups=1) for m in meters))
    assert meters[1].captured.replays == 2
    if of == "weights":
        with torch.no_grad():
            model.weight.mul_(2)
    else:
        batches = [(x, 3 * same) for x, _ in batches]
    assert_same(*(m.measure(batches, groups=1) for m in meters))
    assert meters[1].captured.replays == 2
    assert "something else than the pass itself" in str(meters[1].captured)


def test_numbers_that_no_input_decides_are_held() -> None:
    """The negative of the above: a number read of `arange` is the same each time."""
    torch.manual_seed(0)
    model = Way(lambda x, h: h * float(torch.arange(4, device=x.device).max()))
    plain, captured = meters(model)
    batches = inputs(6, 4, 5)
    assert_same(captured.measure(batches, groups=1), plain.measure(batches, groups=1))
    assert captured.captured.replays == 2


class Remembering(nn.Module):
    """Puts another tensor into an attribute in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.last = nn.Linear(5, 3).double(), torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.linear(x)
        return self.last


def test_a_model_that_changes_with_every_forward_is_given_up_by_name() -> None:
    torch.manual_seed(0)
    model = Remembering()
    plain, captured = meters(model)
    batches = inputs(8, 4, 5)
    assert_same(captured.measure(batches, groups=1), plain.measure(batches, groups=1))
    assert captured.captured.replays == 0
    assert "last is another" in str(captured.captured)


class Opened(dict):  # type: ignore[type-arg]
    """A mapping of a type of its own."""


def test_a_batch_of_another_type_is_named() -> None:
    torch.manual_seed(0)
    model, batches = mlp(), inputs(5, 4, 5)
    syms = every_axis(model)
    loss_fn = lambda m, b: squared_output(m, b["x"])
    meter = nf.Meter(model, loss_fn, syms, capture=True)
    found = meter.measure([Opened(x=x) for x in batches], groups=1)
    assert "holds a Opened" in str(meter.captured)
    assert_same(found, moments_by_loop(model, squared_output, batches, syms))
    plain = nf.Meter(model, loss_fn, syms, capture=True)
    plain.measure([{"x": x} for x in batches], groups=1)
    assert plain.captured.replays == 1


def test_a_loss_that_is_not_finite_is_refused_in_a_replay() -> None:
    torch.manual_seed(0)
    model, batches = mlp(), inputs(6, 4, 5)
    _, meter = meters(model)
    meter.measure(batches, groups=1)
    broken = batches[0].clone()
    broken[2, 1] = torch.nan
    with pytest.raises(DataError, match=r"1 of 4 samples, first \[2\]"):
        meter.measure([broken], groups=1)
    assert_same(meter.measure(batches, groups=1), moments_by_loop(model, squared_output, batches, meter.syms))


def test_a_use_that_no_gradient_had_reached_is_verified_after_a_replay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        model[0].bias.fill_(-100.0)  # all units are dead
    batches = inputs(6, 4, 5)
    _, meter = meters(model)
    dead = meter.measure(batches, groups=1)
    assert meter.captured.replays == 2
    assert not dead.mean["0.weight"].any()
    with torch.no_grad():
        model[0].bias.fill_(0.1)
    expected = moments_by_loop(model, squared_output, batches, meter.syms)
    assert_same(meter.measure(batches, groups=1), expected)
    assert meter.captured.traces == 2


def test_factors_are_those_of_the_pass() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 3, bias=False), nn.Linear(3, 3, bias=False), nn.Linear(3, 4, bias=False)]
    model = nn.Sequential(*layers).double()
    syms = nf.find_symmetries(model, torch.randn(2, 4, dtype=torch.float64))
    batches = inputs(6, 4, 4)
    found = [nf.Meter(model, squared_output, syms, for_="equilibrium", capture=c) for c in (False, True)]
    plain, captured = (m.measure(batches, groups=1) for m in found)
    assert found[1].captured.replays == 2
    assert plain.factors.keys() == captured.factors.keys() != set()
    for name, factors in plain.factors.items():
        assert torch.allclose(captured.factors[name].dense(), factors.dense(), rtol=EXACT, atol=0)


def test_what_cannot_be_measured_is_refused_as_without() -> None:
    """Batch statistics, for which there are no gradients of single samples."""
    model = conv_norm().train()
    for meter in meters(model):
        with pytest.raises(MomentError, match="minibatch_moments"):
            meter.measure(inputs(5, 3, 2, 4, 4), groups=1)
