"""Models whose way changes from batch to batch, whose samples interact, or that run in unusual ways."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from noetherflow import SymmetrySet, declare
from noetherflow.errors import DataError, MomentError
from noetherflow.moments import (
    GradientMoments,
    Meter,
    gradient_moments,
    minibatch_moments,
)
from reference import moments_by_loop
from test_moments_rules import First, Functional, assert_agrees, data, relative_error, squared_output

INTERACTS = "samples act on each other"


def layers(function: Callable[..., Tensor], **modules: nn.Module) -> nn.Module:
    """A float64 model given by its layers and one function of them and the input."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, module in modules.items():
                self.add_module(name, module)

        def forward(self, x: Any) -> Any:
            return function(self, x)

    return Model().double()


def first_leg(model: nn.Module, name: str = "a.weight") -> SymmetrySet:
    return declare(model, "diagonal", [(name, 0)], name="rows")


def assert_legs(got: GradientMoments, expected: GradientMoments) -> None:
    assert got.samples == expected.samples
    for name, legs in expected.second.items():
        for a, b in zip(got.second[name], legs, strict=True):
            assert relative_error(a, b) < 1e-10, name


# --- ways that change ------------------------------------------------------------------------------------------------


def test_a_loss_may_use_another_output_each_time() -> None:
    torch.manual_seed(0)
    model = layers(
        lambda m, x: {"p": m.p(torch.tanh(m.a(x))), "q": m.q(torch.tanh(m.a(x)))},
        a=nn.Linear(4, 6),
        p=nn.Linear(6, 3),
        q=nn.Linear(6, 3),
    )
    loss = lambda m, b: (m(b[0])[b[1]] - 1).square().sum(1)
    assert_agrees(model, loss, [(data(7, 4), head) for head in "pqpq"])


@pytest.mark.parametrize("folded", [False, True])
def test_a_first_batch_without_gradient_settles_nothing(folded: bool) -> None:
    """Time first, as many steps as samples: only a gradient tells the axes apart."""
    torch.manual_seed(0)

    def forward(m: Any, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        h = x.reshape(-1, 4) if folded else x
        return m.b(torch.tanh(m.a(h))).view(x.shape).transpose(0, 1)

    model = layers(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    loss = lambda m, b: (m(b[0]) * b[1]).square().flatten(1).sum(1)
    scales = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    assert_agrees(model, loss, [(data(5, 5, 4), s) for s in scales])


def test_a_weight_behind_zeros_is_placed_once_they_move() -> None:
    """LoRA: `A` has no gradient while `B = 0`."""
    torch.manual_seed(0)

    def forward(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        h = torch.tanh(x @ w).transpose(0, 1)
        return (h + F.linear(F.linear(h, a), b)).transpose(0, 1)

    model = Functional(forward, w=(4, 4), a=(2, 4), b=(4, 2))
    with torch.no_grad():
        model.b.zero_()
    syms = declare(model, "general_linear", [("a", 0)], [("b", 1)])
    meter, x = Meter(model, squared_output, syms), data(5, 5, 4)
    meter.update(x)
    with torch.no_grad():
        model.b.normal_()
    assert_legs(meter.measure([x]), moments_by_loop(model, squared_output, [x], syms))


def test_an_operator_without_rule_may_appear_later() -> None:
    torch.manual_seed(0)

    def forward(x: Tensor, v: Tensor, w: Tensor) -> Tensor:
        h = torch.tanh(x @ v)
        return h @ w / w.diagonal() if bool(x[0, 0] > 0) else h @ w

    batches = [data(5, 4).abs() * sign for sign in (-1, 1, -1)]
    got = assert_agrees(Functional(forward, v=(4, 4), w=(4, 4)), squared_output, batches)
    assert got.fallback == ("w",)


def test_a_meter_with_half_a_batch_refuses() -> None:
    """An error in the middle of a batch; one before any sum is touched does no harm."""
    torch.manual_seed(0)
    model = Functional(lambda x, v, w: torch.tanh(x @ v) @ w, v=(4, 4), w=(4, 4))
    syms = first_leg(model, "v")
    meter, x = Meter(model, squared_output, syms), data(5, 4)
    meter.update(x)
    with pytest.raises(DataError, match="not finite"):
        meter.update(x * torch.nan)
    meter.update(x)
    assert_legs(meter.result(), moments_by_loop(model, squared_output, [x, x], syms))

    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, delta: Tensor) -> Tensor:
            raise RuntimeError("interrupted")

    model.function = lambda x, v, w: Breaks.apply(torch.tanh(x @ v)) @ w
    with pytest.raises(RuntimeError, match="interrupted"):
        meter.update(x)
    for call in (meter.result, lambda: meter.update(x)):
        with pytest.raises(MomentError, match=r"half added.*new Meter"):
            call()


# --- samples that interact -------------------------------------------------------------------------------------------


def contrastive(model: nn.Module, batch: Any) -> Tensor:
    z = model(batch)
    return (z @ z.T).logsumexp(1)


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: nn.Linear(4, 3), (5, 4)),
        (lambda: layers(lambda m, x: m.lstm(x)[0][:, -1], lstm=nn.LSTM(4, 3, batch_first=True)), (5, 2, 4)),
    ],
)
def test_interaction_is_refused_where_no_rule_sees_it(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = build().double()
    name = next(iter(dict(model.named_parameters())))
    with pytest.raises(MomentError, match=f"{INTERACTS}.*minibatch_moments"):
        gradient_moments(model, contrastive, [data(*shape)], first_leg(model, name))


def test_interaction_is_refused_after_a_batch_without_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    loss = lambda m, b: b[1] * contrastive(m, b[0])
    batches = [(data(5, 4), torch.tensor(scale, dtype=torch.float64)) for scale in (0, 1)]
    with pytest.raises(MomentError, match=INTERACTS):
        gradient_moments(model, loss, batches, first_leg(model, "2.weight"))


def test_losses_scaled_over_the_batch_are_no_interaction() -> None:
    torch.manual_seed(0)
    model = First(nn.LSTM(4, 3, batch_first=True)).double()
    loss = lambda m, b: (m(b[0]).square().sum(2) * b[1]).sum(1) / b[1].sum()
    assert_agrees(model, loss, [(data(5, 6, 4), torch.rand(5, 6, dtype=torch.float64))])


@pytest.mark.parametrize("sizes", [(8, 3, 5), (5, 8)])
def test_what_is_no_sample_is_not_split(sizes: tuple[int, ...]) -> None:
    """A fallback by `vmap`, class weights in the batch, and batches smaller, larger and of just as many samples."""
    torch.manual_seed(0)
    model = Functional(lambda x, v, g: torch.tanh(x @ v) / g, v=(4, 3), g=(3,))
    weights = torch.rand(5, dtype=torch.float64) + 0.5
    loss = lambda m, b: (m(b[0]) - b[1]).square().sum(1) * b[2][b[3]]
    batches = [(data(n, 4), data(n, 3), weights, torch.arange(n) * 3 % 5) for n in sizes]
    assert assert_agrees(model, loss, batches).fallback == ("g",)


# --- parameters ------------------------------------------------------------------------------------------------------


def test_complex_parameters_are_refused() -> None:
    model = nn.Linear(4, 4, dtype=torch.complex128)
    loss = lambda m, x: m(x.to(torch.complex128)).abs().sum(1)
    with pytest.raises(MomentError, match=r"'weight' is torch.complex128.*view_as_complex"):
        gradient_moments(model, loss, [data(5, 4)], first_leg(model, "weight"))


def test_sparse_embedding_gradients_are_compared_with_dense_ones() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 2)).double()
    syms = declare(model, "diagonal", [("0.weight", 1)], [("1.weight", 1)])
    ids = torch.randint(9, (5, 3))
    sparse = [f(model, squared_output, [ids], syms, **o) for f, o in ((gradient_moments, {}), MINIBATCHES)]
    model[0].sparse = False
    assert_legs(sparse[0], moments_by_loop(model, squared_output, [ids], syms))
    assert_legs(sparse[1], minibatch_moments(model, squared_output, [ids], syms, batch_size=5))


MINIBATCHES: tuple[Any, dict[str, int]] = (minibatch_moments, {"batch_size": 5})


# --- ways of running a model -----------------------------------------------------------------------------------------


def test_spectral_norm_may_have_moved() -> None:
    """Each forward makes a power iteration: the probe and the measuring pass must start from the same vectors."""
    torch.manual_seed(0)
    norm = nn.utils.parametrizations.spectral_norm
    model = layers(
        lambda m, x: m.c(torch.tanh(m.b(torch.tanh(m.a(x))))),
        a=nn.Linear(4, 8),
        b=norm(nn.Linear(8, 8)),
        c=nn.Linear(8, 2),
    ).train()
    with torch.no_grad():
        model.b.parametrizations.weight.original.normal_()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = data(5, 4)
    got = gradient_moments(model, squared_output, [x], first_leg(model))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    def from_the_same_vectors(m: nn.Module, b: Any) -> Tensor:
        m.load_state_dict(before)
        return squared_output(m, b)

    assert_legs(got, moments_by_loop(model, from_the_same_vectors, [x], first_leg(model)))


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_other_random_numbers_are_the_same_in_both_passes(draw: Callable[[], float]) -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002

    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.tanh(m.a(x)) * torch.tensor([[draw()] for _ in x])
        return m.c(h + m.b(h) if draw() < 0.5 else h)

    model = layers(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 2))
    got = gradient_moments(
        model, squared_output, [data(5, 4)] * 8, first_leg(model), parameters=["b.weight", "c.weight"]
    )
    assert got.samples == 40
    assert got.fallback == ()


def test_a_forward_that_counts_its_calls_is_named() -> None:
    turns = cycle([False, True])
    model = layers(lambda m, x: m.b(m.a(x)) if next(turns) else m.a(x), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    with pytest.raises(MomentError, match=r"takes another path .* linear of b.bias, b.weight .* is new"):
        gradient_moments(model, squared_output, [data(5, 4)], first_leg(model, "b.weight"))


@pytest.mark.parametrize("inside", [False, True])
def test_compiled_models_run_as_written(inside: bool) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    plain, x = first_leg(model, "0.weight"), data(5, 4)
    expected = moments_by_loop(model, squared_output, [x, x], plain)
    if inside:
        model.compile(backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    squared_output(model, x)
    syms = plain if inside else first_leg(model, "0.weight")
    assert_legs(gradient_moments(model, squared_output, [x, x], syms), expected)


def test_reentrant_checkpoints_are_refused_with_the_remedy() -> None:
    model = layers(lambda m, x: checkpoint(m.b, m.a(x), use_reentrant=True), a=nn.Linear(4, 6), b=nn.Linear(6, 6))
    with pytest.raises(MomentError, match="use_reentrant=False"):
        gradient_moments(model, squared_output, [data(5, 4)], first_leg(model))


class Buffers(nn.Module):
    """A buffer that the forward replaces, one it overwrites, and one whose entries share their memory."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 3)
        self.register_buffer("average", torch.zeros(3))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("one", torch.ones(1).expand(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        self.average = 0.9 * self.average + 0.1 * y.detach().mean(0)
        self.calls += 1
        return y * self.one


@pytest.mark.parametrize(("measure", "options"), [(gradient_moments, {}), MINIBATCHES])
def test_buffers_are_left_as_they_were(measure: Any, options: dict[str, int]) -> None:
    model = Buffers().double()
    model.one = torch.ones(1, dtype=torch.float64).expand(3)
    held = dict(model.named_buffers())
    measure(model, squared_output, [data(5, 4), data(5, 4)], first_leg(model), **options)
    assert all(b is held[n] for n, b in model.named_buffers())
    assert float(model.calls) == 0
    assert torch.equal(model.average, torch.zeros(3, dtype=torch.float64))


# --- low precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_bfloat16_models_with_norms_are_measured(seed: int) -> None:
    torch.manual_seed(seed)
    low = nn.Sequential(nn.Embedding(9, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4)).bfloat16()
    ids = torch.randint(9, (64, 7))
    syms = declare(low, "diagonal", [("1.weight", 0), ("1.bias", 0)], [("2.weight", 1)], name="gain")
    got = gradient_moments(low, squared_output, [ids], syms)
    expected = moments_by_loop(low.double(), squared_output, [ids], syms)
    for a, b in zip(got.second["gain"], expected.second["gain"], strict=True):
        assert relative_error(a, b) < 2e-2


class NormsInFloat32(TorchFunctionMode):
    """CUDA's autocast, which on a CPU leaves normalisations in bfloat16."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.layer_norm, torch.layer_norm):
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("norms", [NormsInFloat32, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_norms_under_autocast_are_measured(norms: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 10))
    x, y = 3 * torch.randn(256, 64), torch.randint(10, (256,))

    def loss(m: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out = m(batch[0])
        return F.cross_entropy(out.float(), batch[1], reduction="none")

    syms = declare(model, "diagonal", [("3.weight", 0), ("3.bias", 0)], [("4.weight", 1)], name="gain")
    with norms():
        got = gradient_moments(model, loss, [(x, y)], syms)
    expected = moments_by_loop(model, lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"), [(x, y)], syms)
    for a, b in zip(got.second["gain"], expected.second["gain"], strict=True):
        assert relative_error(a, b) < 3e-2
