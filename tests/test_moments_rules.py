"""Every rule against a per-sample autograd loop, in float64, legs of every kind, entries and groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from noetherflow import SymmetrySet, declare
from noetherflow.errors import MomentError
from noetherflow.moments import Meter, batch, contraction, convolution, forms, gradient_moments
from reference import moments_by_loop

TOLERANCE = 1e-10


def every_axis(model: nn.Module, linear: bool = True) -> SymmetrySet:
    """One-leg symmetries on every axis of every parameter: torus, and GL with one and two blocks."""
    out = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        for axis in range(p.ndim):
            label = f"{name}/{axis}"
            out += declare(model, "diagonal", [(name, axis)], name=f"{label}/torus").symmetries
            if linear:
                blocks = 2 if p.shape[axis] % 2 == 0 else 1
                out += declare(model, "general_linear", [(name, axis)], blocks=blocks, name=f"{label}/gl").symmetries
    return SymmetrySet(tuple(out))


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / (b.double().norm() + 1e-300))


def assert_agrees(model: nn.Module, loss_fn: Callable[..., Tensor], batches: list[Any], **options: Any) -> Any:
    syms = every_axis(model)
    names = [n for n, _ in model.named_parameters()]
    expected = moments_by_loop(model, loss_fn, batches, syms)
    for entries in (False, True):
        got = gradient_moments(model, loss_fn, batches, syms, entries=entries, parameters=names, **options)
        assert got.samples == expected.samples
        assert abs(got.loss - expected.loss) < 1e-12 * abs(expected.loss)
        for name, legs in expected.second.items():
            for a, b in zip(got.second[name], legs, strict=True):
                assert a.dtype == torch.float64
                assert relative_error(a, b) < TOLERANCE, name
        for name, g in expected.mean.items():
            assert relative_error(got.mean[name], g) < TOLERANCE, name
            if entries:
                assert relative_error(got.squares[name], expected.squares[name]) < TOLERANCE, name
    return got


def squared_output(model: nn.Module, batch: Tensor) -> Tensor:
    out = model(batch)
    weights = torch.linspace(0.5, 1.5, out[0].numel(), dtype=out.dtype).view_as(out[0])
    return (out.sin() * weights + out.square()).flatten(1).sum(1)


class Functional(nn.Module):
    """A model given by its parameters and one function."""

    def __init__(self, function: Callable[..., Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, dtype=torch.float64) / 2))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, **dict(self.named_parameters()))


def data(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


CONV = {"w": (6, 4, 3, 3), "b": (6,)}
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 4)), lambda: data(7, 5)),
    "linear-sequence": (lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)), lambda: data(7, 3, 5)),
    "linear-long": (lambda: nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 4)), lambda: data(3, 50, 4)),
    "linear-folded": (
        lambda: Functional(lambda x, w: F.linear(x.view(-1, 4), w).view(5, 3, 6), w=(6, 4)),
        lambda: data(5, 3, 4),
    ),
    "linear-time-first": (
        lambda: Functional(lambda x, w, b: F.linear(x.transpose(0, 1), w, b).transpose(0, 1), w=(6, 4), b=(6,)),
        lambda: data(5, 3, 4),
    ),
    "linear-time-first-folded": (
        lambda: Functional(
            lambda x, w, b: F.linear(x.transpose(0, 1).reshape(15, 4), w, b).view(3, 5, 6).transpose(0, 1),
            w=(6, 4),
            b=(6,),
        ),
        lambda: data(5, 3, 4),
    ),
    "square-batch": (
        lambda: Functional(lambda x, w: F.linear(x.transpose(0, 1), w).transpose(0, 1), w=(6, 4)),
        lambda: data(5, 5, 4),
    ),
    "matmul": (
        lambda: Functional(lambda x, v, w: torch.tanh(x @ v).matmul(w.t()), v=(4, 6), w=(2, 6)),
        lambda: data(7, 4),
    ),
    "matmul-left": (lambda: Functional(lambda x, w: (w @ x.T).T, w=(6, 4)), lambda: data(7, 4)),
    "matmul-left-batched": (lambda: Functional(lambda x, w: w @ x, w=(6, 4)), lambda: data(7, 4, 3)),
    "matvec": (lambda: Functional(lambda x, w: torch.stack([x @ w, (x * 2) @ w], 1), w=(4,)), lambda: data(7, 4)),
    "addmm": (
        lambda: Functional(lambda x, w, b: torch.addmm(b, x.view(-1, 4), w).view(7, 3, 6), w=(4, 6), b=(6,)),
        lambda: data(7, 3, 4),
    ),
    "einsum": (
        lambda: Functional(lambda x, w: torch.einsum("bti,hio->bhto", x, w), w=(2, 4, 3)),
        lambda: data(5, 3, 4),
    ),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, stride=2, dtype=torch.float64), lambda: data(5, 4, 9)),
    "conv2d": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(6, 2, 2)),
        lambda: data(5, 4, 5, 5),
    ),
    "conv2d-tokens": (lambda: nn.Conv2d(8, 6, 3, dilation=2), lambda: data(5, 8, 6, 5)),
    "conv2d-depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding="same"), lambda: data(5, 4, 5, 5)),
    "conv2d-channels-last": (
        lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last),
        lambda: data(5, 4, 5, 5),
    ),
    "conv2d-one": (lambda: nn.Conv2d(4, 6, 1), lambda: data(5, 4, 1, 1)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, stride=(1, 2, 1)), lambda: data(3, 2, 3, 4, 3)),
    "conv-transpose": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), lambda: data(3, 4, 3, 3)),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(9, 4, padding_idx=2), nn.Linear(4, 4)),
        lambda: torch.randint(0, 6, (5, 7)),
    ),
    "layer-norm": (lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)), lambda: data(5, 3, 4)),
    "layer-norm-2d": (lambda: nn.LayerNorm((3, 4)), lambda: data(5, 2, 3, 4)),
    "rms-norm": (lambda: nn.Sequential(nn.Linear(4, 6), nn.RMSNorm(6)), lambda: data(5, 3, 4)),
    "group-norm": (lambda: nn.Sequential(nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4)), lambda: data(5, 2, 3, 3)),
    "instance-norm": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 2), nn.InstanceNorm2d(4, affine=True)),
        lambda: data(5, 2, 4, 4),
    ),
    "batch-norm-eval": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 4), nn.BatchNorm1d(4)
        ).eval(),
        lambda: data(5, 2, 3, 3),
    ),
    "norms-of-large-eps": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 2),
            nn.BatchNorm2d(4, eps=0.3),
            nn.GroupNorm(2, 4, eps=0.2),
            nn.InstanceNorm2d(4, eps=0.4, affine=True),
            nn.LayerNorm((3, 3), eps=0.1),
            nn.RMSNorm(3, eps=0.5),
        ).eval(),
        lambda: data(5, 2, 4, 4),
    ),
    "padding-counted-from-the-end": (
        lambda: Functional(lambda x, w, v: F.embedding(x, w, padding_idx=-2) @ v, w=(6, 4), v=(4, 4)),
        lambda: torch.arange(30).reshape(5, 6) % 7 % 6,
    ),
    **{
        f"einsum {equation}": (
            lambda equation=equation, shape=shape: Functional(
                lambda x, w: torch.einsum(equation, torch.tanh(x), w), w=shape
            ),
            lambda given=given: data(*given),
        )
        for equation, shape, given in [
            ("bih,hnd->bind", (4, 2, 3), (5, 3, 4)),
            ("ibh,hnd->ibnd", (4, 2, 3), (3, 5, 4)),
            ("bih,hnd->bnid", (4, 2, 3), (5, 3, 4)),
            ("bih,ndh->bnid", (2, 3, 4), (5, 3, 4)),
            ("bih,nhd->bnid", (2, 4, 3), (5, 3, 4)),
            ("bind,ndh->bih", (2, 4, 6), (5, 3, 2, 4)),
            ("bind,hnd->bih", (6, 2, 4), (5, 3, 2, 4)),
            ("bh,hnd->bnd", (4, 2, 3), (5, 4)),
            ("bih,hndk->bindk", (4, 2, 3, 2), (5, 3, 4)),
        ]
    },
    "elementwise": (
        lambda: Functional(lambda x, g, b, s: (g * x + b) * s - b, g=(4,), b=(3, 1), s=()),
        lambda: data(5, 3, 4),
    ),
    "in-place-add": (lambda: Functional(lambda x, w, b: (x @ w).add_(b), w=(4, 4), b=(4,)), lambda: data(5, 3, 4)),
    "positions": (
        lambda: Functional(
            lambda x, w, p: torch.tanh(x + F.embedding(torch.arange(3), p)[None]) @ w, w=(4, 4), p=(5, 4)
        ),
        lambda: data(6, 3, 4),
    ),
    "positions-batch-sized": (
        lambda: Functional(lambda x, w, p: torch.tanh(x + F.embedding(torch.arange(3), p)) @ w, w=(4, 4), p=(5, 4)),
        lambda: data(3, 3, 4),
    ),
    "class-token": (
        lambda: Functional(lambda x, c, w: torch.cat([c.expand(6, -1, -1), x], 1) @ w, c=(1, 1, 4), w=(4, 4)),
        lambda: data(6, 3, 4),
    ),
    "tied": (lambda: Functional(lambda x, w: torch.tanh(x @ w.T) @ w, w=(6, 4)), lambda: data(5, 3, 4)),
    "tied-embedding": (
        lambda: Functional(lambda x, w: F.embedding(x, w) @ w.T, w=(6, 4)),
        lambda: torch.randint(0, 6, (5, 3)),
    ),
    "recurrent": (
        lambda: Functional(lambda x, w, b: torch.tanh(F.linear(torch.tanh(F.linear(x, w, b)), w, b)), w=(4, 4), b=(4,)),
        lambda: data(5, 4),
    ),
    "packed-split": (
        lambda: Functional(
            lambda x, w, b: sum(
                F.linear(x, u, c).pow(k) for k, (u, c) in enumerate(zip(w.chunk(3), b.chunk(3), strict=True), 1)
            ),
            w=(6, 4),
            b=(6,),
        ),
        lambda: data(5, 3, 4),
    ),
    "weight-norm": (
        lambda: Functional(lambda x, g, v: F.linear(x, g * v / v.norm(dim=1, keepdim=True)), g=(6, 1), v=(6, 4)),
        lambda: data(5, 3, 4),
    ),
    "product-of-weights": (
        lambda: Functional(lambda x, u, w, v: F.linear(x, v + u @ w), u=(6, 2), w=(2, 4), v=(6, 4)),
        lambda: data(5, 3, 4),
    ),
    "masked-weight": (
        lambda: Functional(lambda x, w: F.linear(x, w * torch.ones(6, 4, dtype=x.dtype).tril()), w=(6, 4)),
        lambda: data(6, 4),
    ),
    "matmul-heads": (lambda: Functional(lambda x, w: x.unsqueeze(1) @ w, w=(2, 4, 3)), lambda: data(5, 3, 4)),
    "gather": (lambda: Functional(lambda i, w, h: w[i] @ h, w=(6, 4), h=(4, 4)), lambda: torch.randint(-6, 6, (5,))),
    "scattered-rows": (
        lambda: Functional(
            lambda x, w: torch.zeros_like(x).index_add(0, x[:, 0].argsort(), F.linear(x[x[:, 0].argsort()], w)),
            w=(4, 4),
        ),
        lambda: data(6, 4),
    ),
    "overlapping": (
        lambda: Functional(
            lambda x, w, v: torch.tanh(x @ w.unfold(0, 4, 1)) @ v.as_strided((4, 4), (1, 1)), w=(7,), v=(7,)
        ),
        lambda: data(5, 4),
    ),
    "reshaped": (
        lambda: Functional(
            lambda x, w, u, v: F.linear(x * w.view(-1), v.view(6, 4)) * u.squeeze(), w=(4, 1), u=(1, 6), v=(24,)
        ),
        lambda: data(5, 4),
    ),
    "reshaped-heads": (
        lambda: Functional(lambda x, w: torch.einsum("bti,hio->bhto", x, w.view(2, 4, 3)), w=(8, 3)),
        lambda: data(5, 3, 4),
    ),
    "reshaped-table": (
        lambda: Functional(lambda i, p, v: F.embedding(i, p[0]) @ v, p=(1, 6, 4), v=(4, 3)),
        lambda: torch.randint(0, 6, (5, 3)),
    ),
    "matrix-as-convolution": (
        lambda: Functional(
            lambda x, w, v: F.conv2d(F.conv2d(x, w[:, :, None, None]), v.view(6, 8, 2, 2)), w=(8, 4), v=(6, 32)
        ),
        lambda: data(5, 4, 3, 3),
    ),
    "matrix-as-convolution-tokens": (
        lambda: Functional(lambda x, w: F.conv2d(x, w[:, :, None, None]), w=(24, 16)),
        lambda: data(5, 16, 2, 1),
    ),
    "gain-is-bias": (lambda: Functional(lambda x, g: F.layer_norm(x, (4,), g, g), g=(4,)), lambda: data(5, 3, 4)),
    "repeated": (lambda: Functional(lambda x, p: x * p.repeat(5, 2, 1), p=(1, 3, 4)), lambda: data(5, 6, 4)),
    "repeated-per-sample": (lambda: Functional(lambda x, p: x * p.repeat(5, 1), p=(4,)), lambda: data(5, 4)),
    "in-place-add-to-a-view": (
        lambda: Functional(lambda x, w, p: added_to_first(x @ w, p), w=(4, 4), p=(4,)),
        lambda: data(5, 3, 4),
    ),
    "complex": (
        lambda: Functional(lambda x, v, w: rotated(x @ v, w), v=(4, 4), w=(2, 2)),
        lambda: data(5, 4),
    ),
    "vmap-inside": (
        lambda: Functional(lambda x, v, w: torch.func.vmap(lambda t: torch.tanh(t @ v) @ w)(x), v=(4, 6), w=(6, 2)),
        lambda: data(5, 3, 4),
    ),
    "derivative-inside": (lambda: Functional(energy_and_force, v=(4, 6), w=(6, 1)), lambda: data(5, 4)),
    "prelu-one": (lambda: nn.Sequential(nn.PReLU(), nn.Linear(4, 2)), lambda: data(5, 4)),
    "prelu": (lambda: nn.Sequential(nn.Linear(4, 6), nn.PReLU(6), nn.Linear(6, 2)), lambda: data(5, 4)),
    "attention": (
        lambda: nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True),
        lambda: data(5, 3, 8),
    ),
    "lstm": (lambda: First(nn.LSTM(4, 3, batch_first=True)), lambda: data(5, 3, 4)),
    "gru": (lambda: First(nn.GRU(4, 3, batch_first=True, bidirectional=True)), lambda: data(5, 3, 4)),
    "gru-cell": (lambda: Scan(nn.GRUCell(4, 3)), lambda: data(5, 3, 4)),
}


def added_to_first(h: Tensor, p: Tensor) -> Tensor:
    h[:, 0].add_(p)
    return h


def rotated(x: Tensor, w: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.view(-1, 2, 2)) * torch.view_as_complex(w)
    return torch.view_as_real(pairs).flatten(1)


def energy_and_force(x: Tensor, v: Tensor, w: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    energy = torch.tanh(x @ v) @ w
    return torch.cat([energy, torch.autograd.grad(energy.sum(), x, create_graph=True)[0]], 1)


class First(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


class Scan(nn.Module):
    """A recurrent cell applied by hand: its weights are used once per step."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        h = x[:, 0, :3]
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return h


@pytest.mark.parametrize("case", CASES)
def test_rule_equals_per_sample_loop(case: str) -> None:
    torch.manual_seed(0)
    build, sample = CASES[case]
    model = build().double()
    got = assert_agrees(model, squared_output, [sample(), sample()], groups=3)
    assert bool(got.fallback) == (case in FALLBACK), got.fallback


FALLBACK = {
    *("lstm", "gru", "gru-cell", "scattered-rows"),
    *("gain-is-bias", "repeated", "in-place-add-to-a-view", "complex", "vmap-inside", "derivative-inside"),
}


@pytest.mark.parametrize("tokens", [True, False])
@pytest.mark.parametrize("case", ["linear-sequence", "linear-long", "conv2d", "conv3d", "attention"])
def test_both_contractions_equal_the_loop(case: str, tokens: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token Grams and explicit gradients, whichever the cost model would choose."""
    chosen = []

    def choose(need: Any, count: int, m: int, n: int) -> bool:
        possible = not need.entries and not need.split(m).mixed
        chosen.append(tokens and possible)
        return chosen[-1]

    for module in (forms, convolution):
        monkeypatch.setattr(module, "prefer_token_grams", choose)
    torch.manual_seed(0)
    build, sample = CASES[case]
    assert_agrees(build().double(), squared_output, [sample()], groups=2)
    assert any(chosen) == tokens


@pytest.mark.parametrize("entries", [1, 100])
@pytest.mark.parametrize("case", ["linear-sequence", "conv2d", "conv-transpose", "einsum", "embedding", "tied"])
def test_chunks_of_any_size_equal_the_loop(case: str, entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "CHUNK_ENTRIES_CPU", entries)
    monkeypatch.setattr(contraction, "CHUNK_ENTRIES", entries)
    torch.manual_seed(0)
    build, sample = CASES[case]
    assert_agrees(build().double(), squared_output, [sample()], groups=2)


class Positions(nn.Module):
    """A learned position table whose index has no sample axis."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions, self.head = nn.Embedding(9, 4), nn.Embedding(6, 4), nn.Linear(4, 9)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))))


def test_position_table_is_measured_per_sample_and_not_per_position() -> None:
    """`sum_i g_i^2` over samples; Opacus takes the index's first axis for samples and gives `(sum_i g_i)^2` instead."""
    torch.manual_seed(0)
    model = Positions().double()
    ids = torch.randint(9, (5, 6))
    got = assert_agrees(model, squared_output, [ids])
    assert got.fallback == ()
    confused = 5 * got.mean["positions.weight"].square()
    assert relative_error(confused, got.squares["positions.weight"]) > 0.1


def test_a_reshaped_table_is_measured_without_explicit_gradients() -> None:
    torch.manual_seed(0)
    build, sample = CASES["reshaped-table"]
    model, ids = build().double(), sample()
    syms = every_axis(model, linear=False)
    for entries in (False, True):
        got = gradient_moments(model, squared_output, [ids], syms, entries=entries, groups=2)
        for name, legs in moments_by_loop(model, squared_output, [ids], syms).second.items():
            assert relative_error(got.second[name][0], legs[0]) < TOLERANCE, name


class NoSynchronisation(TorchDispatchMode):
    """Fails where the host would wait for a device: a value read back, or a size that depends on values."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in self.WAITS, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", sorted(CASES.keys() - FALLBACK))
def test_backward_does_not_wait_for_the_device(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second batch on; the first is also checked against autograd, which reads values back."""
    torch.manual_seed(0)
    build, sample = CASES[case]
    model = build().double()
    meter = Meter(model, squared_output, every_axis(model), entries=case in ("mlp", "conv2d", "embedding"))
    meter.update(sample())
    runs = []
    engine = batch.run_backward

    def watched(*args: Any, **kwargs: Any) -> Any:
        runs.append(case)
        with NoSynchronisation():
            return engine(*args, **kwargs)

    monkeypatch.setattr(batch, "run_backward", watched)
    meter.update(sample())
    assert runs == [case]


def test_reading_a_value_back_in_the_backward_is_noticed() -> None:
    with pytest.raises(AssertionError, match="waits for the device"), NoSynchronisation():
        float(torch.ones(()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(6, 4), (6, 5, 4)])
def test_a_norm_over_one_entry_leaves_rounding_alone(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Its output is its bias; what rule and autograd make of the rest differs wholly, and is no difference."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 1), nn.LayerNorm(1), nn.Linear(1, 3)).to(dtype)
    x = (3 * data(*shape) + 2).to(dtype)
    names = [n for n, _ in model.named_parameters()]
    got = gradient_moments(model, squared_output, [x], SymmetrySet(()), entries=True, parameters=names)
    expected = moments_by_loop(model, squared_output, [x], SymmetrySet(()))
    size = max(float(q.max()) for q in expected.squares.values())
    for name in names:
        close = 10 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            got.squares[name].double(), expected.squares[name], rtol=100 * close, atol=close * size
        )


def test_a_wrong_gain_is_no_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allowed for cancellation in a norm does not hide a rule that is off by one part in a million."""
    from noetherflow.moments.rules.norms import Normalisation

    right = Normalisation.gain
    monkeypatch.setattr(Normalisation, "gain", lambda self, delta, x: (right(self, delta, x)[0] * (1 + 1e-6),))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    with pytest.raises(MomentError, match="summed by rule differs"):
        gradient_moments(model, squared_output, [data(5, 4)], SymmetrySet(()), parameters=["1.weight"])
