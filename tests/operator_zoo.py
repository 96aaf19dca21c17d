"""Small models around one operator each, with the dimension of their symmetry group counted by hand.

`OPERATORS[name]()` builds a fresh `Around`. A Linear in front gives units, a Linear behind reads them, and the operator
lies between. Without further words: ReLU units count 1 each, `d` coordinates between two linear maps `d^2`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OPERATORS: dict[str, Callable[[], Around]] = {}


@dataclass(frozen=True)
class Around:
    """A model, its inputs, and the dimension of its group: `d^2` per GL(d), 1 per scale, no translations."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    dimension: int


class Net(nn.Module):
    """`forward(self, *inputs)` over the given parts."""

    def __init__(self, forward: Callable[..., Tensor], parts: dict[str, Any]) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def add(
    name: str, forward: Callable[..., Tensor], parts: Callable[[], dict[str, Any]], inputs: Callable[[], Any], want: int
) -> None:
    """Register one model; parts and inputs are made anew, in float64, at every call."""

    def build() -> Around:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Net(forward, parts()).double().eval()
            made = inputs()
            return Around(model, made if isinstance(made, tuple) else (made,), want)

    OPERATORS[name] = build


def L(rows: int, columns: int, bias: bool = True) -> nn.Linear:
    return nn.Linear(rows, columns, bias=bias)


def P(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def C(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1)


def X(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def rows() -> Tensor:
    return X(8, 3)


def two_rows() -> tuple[Tensor, Tensor]:
    return X(8, 3), X(8, 3)


def steps() -> Tensor:
    return X(4, 6, 3)


def image() -> Tensor:
    return X(4, 2, 4, 4)


def units(name: str, between: Callable[[Tensor], Tensor], want: int = 5, width: int = 5) -> None:
    """Five ReLU units `[batch, 5]`, the operator, a reader of `width`."""
    add(name, lambda s, x: s.o(between(s.a(x).relu())), lambda: {"a": L(3, 5), "o": L(width, 2)}, rows, want)


def over_time(name: str, between: Callable[[Tensor], Tensor], want: int = 4) -> None:
    """Four ReLU channels over six time steps `[batch, 6, 4]`, an operator that keeps the channels."""
    add(name, lambda s, x: s.o(between(s.a(x).relu())), lambda: {"a": L(3, 4), "o": L(4, 2)}, steps, want)


def linear_over_time(name: str, between: Callable[[Tensor], Tensor], want: int = 16) -> None:
    """The same without ReLU: what a linear operator on other axes leaves is GL(4)."""
    add(name, lambda s, x: s.o(between(s.a(x))), lambda: {"a": L(3, 4), "o": L(4, 2)}, steps, want)


def over_space(name: str, between: Callable[[Tensor], Tensor], want: int = 4, width: int = 4) -> None:
    """Four ReLU channels of a 4 x 4 image, an operator on space."""
    add(name, lambda s, x: s.o(between(s.a(x).relu())), lambda: {"a": C(2, 4), "o": C(width, 2)}, image, want)


def on_two(name: str, forward: Callable[..., Tensor], want: int, width: int = 5) -> None:
    """Two layers on one input, `s.a` and `s.b`, and a reader `s.o`."""
    add(name, forward, lambda: {"a": L(3, width), "b": L(3, width), "o": L(width, 2)}, rows, want)


# --- contractions ---

add(
    "Bilinear",
    lambda s, x: s.o(s.a(x), s.b(x)),
    lambda: {"a": L(3, 4), "b": L(3, 5), "o": nn.Bilinear(4, 5, 2)},
    rows,
    16 + 25,
)
add(
    "Bilinear after relu",
    lambda s, x: s.o(s.a(x).relu(), s.b(x).relu()),
    lambda: {"a": L(3, 4), "b": L(3, 5), "o": nn.Bilinear(4, 5, 2)},
    rows,
    4 + 5,
)
add(
    "Bilinear of one",
    lambda s, x: s.o(s.a(x).relu(), s.a(x).relu()),
    lambda: {"a": L(3, 4), "o": nn.Bilinear(4, 4, 2)},
    rows,
    4,
)
add(
    "Bilinear hidden",
    lambda s, x: s.h(s.o(s.a(x), s.b(x)).relu()),
    lambda: {"a": L(3, 4), "b": L(3, 5), "o": nn.Bilinear(4, 5, 3), "h": L(3, 2)},
    rows,
    16 + 25 + 3,
)
add(
    "einsum of three",
    lambda s, x: torch.einsum("bd,de,ke->bk", s.a(x).relu(), s.u, s.v),
    lambda: {"a": L(3, 4), "u": P(4, 5), "v": P(2, 5)},
    rows,
    4 + 25,
)
add(
    "einsum bilinear",
    lambda s, x: torch.einsum("bd,be,de->b", s.a(x), s.b(x), s.u),
    lambda: {"a": L(3, 4), "b": L(3, 5), "u": P(4, 5)},
    rows,
    16 + 25,
)
add(
    "einsum CP",
    lambda s, x: s.o(torch.einsum("bd,dr,er,r->be", x, s.u, s.v, s.w).relu()),
    lambda: {"u": P(3, 4), "v": P(5, 4), "w": P(4), "o": L(5, 2)},
    rows,
    4 + 4 + 5,
)
add(
    "einsum gate",
    lambda s, x: torch.einsum("bd,bd,dk->bk", s.a(x), s.b(x), s.u),
    lambda: {"a": L(3, 4), "b": L(3, 4), "u": P(4, 2)},
    rows,
    8,
)
add(
    "einsum dots",
    lambda s, x: torch.einsum("...d,de,...e->...", s.a(x), s.u, s.b(x)),
    lambda: {"a": L(3, 4, False), "b": L(3, 5, False), "u": P(4, 5)},
    steps,
    16 + 25,
)
add(
    "einsum without arrow",
    lambda s, x: torch.einsum("bd,de", s.a(x), s.u),
    lambda: {"a": L(3, 4, False), "u": P(4, 5)},
    rows,
    16,
)
add(
    "einsum diagonal",
    lambda s, x: torch.einsum("bd,dd->bd", s.a(x).relu(), s.u) @ s.v,
    lambda: {"a": L(3, 4), "u": P(4, 4), "v": P(4, 2)},
    rows,
    4 + 4 + 3,
)
add(
    "multi_dot",
    lambda s, x: torch.linalg.multi_dot((s.a(x).relu(), s.u, s.v)),
    lambda: {"a": L(3, 4), "u": P(4, 5), "v": P(5, 2)},
    rows,
    4 + 25,
)
for _name, _inner in {
    "vecdot": torch.linalg.vecdot,
    "inner": torch.inner,
    "tensordot": lambda a, b: torch.tensordot(a, b, dims=([1], [1])),
}.items():
    add(
        _name,
        lambda s, x, y, f=_inner: f(s.a(x), s.b(y)),
        lambda: {"a": L(3, 4, False), "b": L(3, 4, False)},
        two_rows,
        16,
    )
add("mv", lambda s, x: torch.mv(s.a(x), s.v), lambda: {"a": L(3, 4, False), "v": P(4)}, rows, 16)
add("addmv", lambda s, x: torch.addmv(s.c, s.a(x), s.v), lambda: {"a": L(3, 4, False), "v": P(4), "c": P(1)}, rows, 16)
add(
    "addr",
    lambda s, x: s.o(torch.addr(torch.zeros(3, 4).double(), x, s.v)[0]),
    lambda: {"v": P(4), "o": L(4, 2)},
    lambda: X(3),
    16,
)
add(
    "bmm",
    lambda s, x, y: torch.bmm(s.a(x), s.b(y).mT),
    lambda: {"a": L(3, 4, False), "b": L(3, 4, False)},
    lambda: (X(4, 6, 3), X(4, 6, 3)),
    16,
)
add(
    "baddbmm",
    lambda s, x, y: torch.baddbmm(s.m, s.a(x), s.b(y).mT),
    lambda: {"a": L(3, 4, False), "b": L(3, 4, False), "m": P(1, 6, 6)},
    lambda: (X(4, 6, 3), X(4, 6, 3)),
    16,
)
add("outer", lambda s, x: x @ torch.outer(s.a, s.b), lambda: {"a": P(3), "b": P(4)}, rows, 1)
add("kron", lambda s, x: x @ torch.kron(s.a, s.b), lambda: {"a": P(2, 2), "b": P(3, 2)}, lambda: X(8, 6), 1)
add(
    "kron in front of relu",
    lambda s, x: s.o((x @ torch.kron(s.a, s.b)).relu()),
    lambda: {"a": P(2, 2), "b": P(3, 2), "o": L(4, 2)},
    lambda: X(8, 6),
    1 + 2 + 1,
)
add(
    "linalg.inv",
    lambda s, x: s.o(x @ torch.linalg.inv(s.w) @ s.v),
    lambda: {"w": P(3, 3), "v": P(3, 4), "o": L(4, 2)},
    rows,
    9 + 16,
)

# --- cells and bags ---

add(
    "embedding_bag sum",
    lambda s, i: s.o(s.l(s.e(i)).relu()),
    lambda: {"e": nn.EmbeddingBag(9, 4, mode="sum"), "l": L(4, 5), "o": L(5, 2)},
    lambda: torch.randint(9, (8, 3)),
    16 + 5,
)
add(
    "embedding_bag max",
    lambda s, i: s.o(s.l(s.e(i)).relu()),
    lambda: {"e": nn.EmbeddingBag(9, 4, mode="max"), "l": L(4, 5), "o": L(5, 2)},
    lambda: torch.randint(9, (8, 3)),
    4 + 5,
)
for _name, _cell in {"GRUCell": nn.GRUCell, "RNNCell tanh": nn.RNNCell}.items():
    add(
        _name,
        lambda s, x, h: s.o(s.c(s.e(x), h)),
        lambda c=_cell: {"e": L(3, 4), "c": c(4, 5), "o": L(5, 2)},
        lambda: (X(8, 3), X(8, 5)),
        16,
    )
add(
    "LSTMCell",
    lambda s, x, h: s.o(s.c(s.e(x), (h, h))[0]),
    lambda: {"e": L(3, 4), "c": nn.LSTMCell(4, 5), "o": L(5, 2)},
    lambda: (X(8, 3), X(8, 5)),
    16,
)
add(
    "RNNCell relu",
    lambda s, x, h: s.o(s.c(s.e(x), s.g(h))),
    lambda: {"e": L(3, 4), "g": L(2, 5), "c": nn.RNNCell(4, 5, nonlinearity="relu"), "o": L(5, 2)},
    lambda: (X(8, 3), X(8, 2)),
    16 + 25 + 5,
)
add(
    "GRU",
    lambda s, x: s.o(s.c(s.e(x))[0]),
    lambda: {"e": L(3, 4), "c": nn.GRU(4, 5, batch_first=True), "o": L(5, 2)},
    steps,
    16,
)

# --- gates, distances, norms ---

add("glu", lambda s, x: s.o(F.glu(s.a(x))), lambda: {"a": L(3, 8), "o": L(4, 2)}, rows, 4)
add(
    "cosine_similarity",
    lambda s, x: F.cosine_similarity(s.a(x)[:, None], s.c[None], dim=-1),
    lambda: {"a": L(3, 4), "c": P(5, 4)},
    rows,
    1 + 5,
)
add("cdist", lambda s, x: s.o(-torch.cdist(s.a(x), s.c)), lambda: {"a": L(3, 4), "c": P(5, 4), "o": L(5, 2)}, rows, 1)
add(
    "pairwise_distance",
    lambda s, x: s.o(F.pairwise_distance(s.a(x), s.b(x), eps=0.0, keepdim=True)),
    lambda: {"a": L(3, 4), "b": L(3, 4), "o": L(1, 2)},
    rows,
    1,
)
add("pdist", lambda s, x: s.o(F.pdist(s.a(x))[:, None]), lambda: {"a": L(3, 4, False), "o": L(1, 2)}, rows, 1)
add(
    "matrix_norm",
    lambda s, x: torch.linalg.matrix_norm(s.a(x))[:, None] * s.o,
    lambda: {"a": L(3, 4), "o": P(1, 2)},
    steps,
    1,
)
linear_over_time("norm", lambda h: h.norm(dim=1), 4)
linear_over_time("norm of order 1", lambda h: h.norm(p=1, dim=1), 4)
linear_over_time("variance", lambda h: h.var(1), 4)
linear_over_time("standard deviation", lambda h: h.std(1), 4)
linear_over_time("var_mean", lambda h: torch.var_mean(h, 1)[0], 4)
linear_over_time("product over time", lambda h: h[:, :2].prod(1), 4)
on_two("hypot", lambda s, x: s.o(torch.hypot(s.a(x), s.b(x))), 5)
on_two("atan2", lambda s, x: s.o(torch.atan2(s.a(x), s.b(x))), 5)
add("ldexp", lambda s, x: s.o(torch.ldexp(s.a(x), torch.full((), 2))), lambda: {"a": L(3, 4), "o": L(4, 2)}, rows, 16)
on_two("ldexp by a learned power", lambda s, x: s.o(torch.ldexp(s.a(x), s.b(x))), 5)
on_two("addcdiv", lambda s, x: s.o(torch.addcdiv(s.a(x), s.b(x), s.a(x))), 5)
on_two("clamp by a tensor", lambda s, x: s.o(torch.clamp(s.a(x), min=s.b(x).relu())), 5)

# --- signs, comparisons, order ---

on_two("lerp by a tensor", lambda s, x: s.o(torch.lerp(s.a(x).relu(), s.b(x).relu(), torch.sigmoid(x[:, :1]))), 5)
on_two("chosen by data", lambda s, x: s.o(torch.where(x[:, :1] > 0, s.a(x).relu(), s.b(x).relu())), 5)
units("relu by hand", lambda h: (h - 0.0) * (h > 0))
units("leaky relu by hand", lambda h: torch.where(h > 0, h, 0.1 * h))
units("root with sign", lambda h: h.sign() * h.abs().sqrt())
units("threshold", lambda h: F.threshold(h, 0, 0))
units("nan_to_num", torch.nan_to_num)
add("celu", lambda s, x: s.o(F.celu(s.a(x))), lambda: {"a": L(3, 5), "o": L(5, 2)}, rows, 0)
units("hardswish", F.hardswish, 0)
over_time("sort", lambda h: h.sort(1).values)
over_time("msort", lambda h: h.transpose(0, 1).msort().transpose(0, 1))
over_time("topk", lambda h: h.topk(3, 1).values)
over_time("max", lambda h: h.max(1).values)
over_time("median", lambda h: h.median(1).values)
over_time("kthvalue", lambda h: h.kthvalue(2, 1).values)
over_time("quantile", lambda h: h.quantile(0.3, 1))
over_time("aminmax", lambda h: h.aminmax(dim=1).max)
over_time("argsort, gather", lambda h: h.gather(1, h.argsort(1)))
over_time("argmax, gather", lambda h: h.gather(1, h.argmax(1, keepdim=True)))
over_time("cummax", lambda h: h.cummax(1).values)
over_time("cumprod", lambda h: h.cumprod(1), 0)
over_time("logcumsumexp", lambda h: h.logcumsumexp(1), 0)
over_time("logsumexp", lambda h: h.logsumexp(1), 0)
over_time("softmin", lambda h: F.softmin(h, 1), 0)

# --- linear along an axis ---

linear_over_time("cumsum", lambda h: h.cumsum(1))
linear_over_time("diff", lambda h: torch.diff(h, dim=1))
linear_over_time("trapezoid", lambda h: torch.trapezoid(h, dim=1))
linear_over_time("rfft, real part", lambda h: torch.fft.rfft(h, dim=1).real)
linear_over_time("fft, imaginary part", lambda h: torch.fft.fft(h, dim=1).imag[:, 1:3])
linear_over_time("fftshift", lambda h: torch.fft.fftshift(torch.fft.fft(h, dim=1), dim=1).real)
linear_over_time("hfft", lambda h: torch.fft.hfft(h, dim=1))
linear_over_time("rfft, absolute value", lambda h: torch.fft.rfft(h, dim=1).abs(), 4)
linear_over_time("fft over channels too", lambda h: torch.fft.fft2(h).real, 1)
add(
    "filter in frequency",
    lambda s, x: s.o(torch.fft.irfft(torch.fft.rfft(s.a(x), dim=1) * s.f, n=6, dim=1)),
    lambda: {"a": L(3, 4), "f": P(4), "o": L(4, 2)},
    steps,
    8,
)
add(
    "stft",
    lambda s, x: s.o(
        torch.stft(s.a(x).relu()[:, :, 0], 4, 2, window=torch.ones(4).double(), return_complex=True).abs().mean(-1)
    ),
    lambda: {"a": L(3, 1), "o": L(3, 2)},
    steps,
    1,
)

# --- space ---

for _name, _pool in {
    "LPPool2d": nn.LPPool2d(2, 2),
    "LPPool2d of order 3": nn.LPPool2d(3, 2),
    "AdaptiveAvgPool2d": nn.AdaptiveAvgPool2d(2),
    "AdaptiveMaxPool2d": nn.AdaptiveMaxPool2d(2),
    "AvgPool2d": nn.AvgPool2d(2),
    "MaxPool2d": nn.MaxPool2d(2),
    "rot90": lambda h: torch.rot90(h, 1, (2, 3)),
    "channel_shuffle": lambda h: F.channel_shuffle(h, 2),
    "nearest": lambda h: F.interpolate(h, scale_factor=2),
    "nearest-exact": lambda h: F.interpolate(h, scale_factor=2, mode="nearest-exact"),
    "bicubic": lambda h: F.interpolate(h, size=7, mode="bicubic"),
    "bilinear, antialias": lambda h: F.interpolate(h, size=3, mode="bilinear", antialias=True),
    "pad reflect": lambda h: F.pad(h, (1, 1, 1, 1), mode="reflect"),
    "pad circular": lambda h: F.pad(h, (1, 1, 1, 1), mode="circular"),
    "pad and cut": lambda h: F.pad(h, (-1, 0, 1, -1)),
    "max_unpool": lambda h: F.max_unpool2d(*F.max_pool2d(h, 2, return_indices=True), 2),
}.items():
    over_space(_name, _pool)
over_space("local_response_norm", lambda h: F.local_response_norm(h, 2), 0)
over_space("pixel_unshuffle", lambda h: F.pixel_unshuffle(h, 2), 4, 16)
add(
    "pixel_shuffle", lambda s, x: s.o(F.pixel_shuffle(s.a(x).relu(), 2)), lambda: {"a": C(2, 8), "o": C(2, 2)}, image, 2
)
add(
    "unfold",
    lambda s, x: s.o(F.unfold(s.a(x).relu(), 3, padding=1).mT),
    lambda: {"a": C(2, 4), "o": L(36, 2)},
    image,
    4,
)
add("unfold without relu", lambda s, x: s.o(F.unfold(s.a(x), 2).mT), lambda: {"a": C(2, 4), "o": L(16, 2)}, image, 16)
add(
    "fold",
    lambda s, x: s.o(F.fold(s.a(x).relu().mT, (3, 3), 2)),
    lambda: {"a": L(3, 16), "o": C(4, 2)},
    lambda: X(4, 4, 3),
    4,
)
add(
    "fold without relu",
    lambda s, x: s.o(F.fold(s.a(x).mT, (4, 4), 2, stride=2)),
    lambda: {"a": L(3, 16), "o": C(4, 2)},
    lambda: X(4, 4, 3),
    16,
)
add(
    "grid_sample",
    lambda s, x, g: s.o(F.grid_sample(s.a(x).relu(), g, align_corners=False)),
    lambda: {"a": C(2, 4), "o": C(4, 2)},
    lambda: (image(), torch.rand(4, 3, 3, 2).double() - 0.5),
    4,
)
add(
    "grid_sample, learned grid",
    lambda s, x, g: s.o(F.grid_sample(s.a(x).relu(), s.g(g), align_corners=False)),
    lambda: {"a": C(2, 4), "g": L(2, 2), "o": C(4, 2)},
    lambda: (image(), torch.rand(4, 3, 3, 2).double() - 0.5),
    4,
)
for _name, _pool in {
    "avg_pool1d": lambda h: F.avg_pool1d(h, 2),
    "max_pool1d": lambda h: F.max_pool1d(h, 2),
    "lp_pool1d": lambda h: F.lp_pool1d(h, 2, 2),
    "linear interpolation": lambda h: F.interpolate(h, size=7, mode="linear"),
}.items():
    add(
        _name,
        lambda s, x, f=_pool: s.o(f(s.a(x).relu())),
        lambda: {"a": nn.Conv1d(3, 4, 1), "o": nn.Conv1d(4, 2, 1)},
        lambda: X(4, 3, 6),
        4,
    )
for _name, _pool in {"avg_pool3d": lambda h: F.avg_pool3d(h, 2), "max_pool3d": lambda h: F.max_pool3d(h, 2)}.items():
    add(
        _name,
        lambda s, x, f=_pool: s.o(f(s.a(x).relu())),
        lambda: {"a": nn.Conv3d(2, 4, 1), "o": nn.Conv3d(4, 2, 1)},
        lambda: X(3, 2, 4, 4, 4),
        4,
    )

# --- moving entries ---

units("tile", lambda h: h.tile(2, 1))
units("roll", lambda h: h.roll(2, -1))
units("flip", lambda h: h.flip(-1))
units("diag_embed", lambda h: torch.diag_embed(h).sum(1))
units("hstack", lambda h: torch.hstack((h, h[:, :3] * 0)), 5, 8)
add(
    "concatenate",
    lambda s, x: s.o(torch.concatenate((s.a(x).relu(), x), -1)),
    lambda: {"a": L(3, 5), "o": L(8, 2)},
    rows,
    5,
)
add(
    "column_stack",
    lambda s, x: s.o(torch.column_stack((s.a(x).relu(), x))),
    lambda: {"a": L(3, 5), "o": L(8, 2)},
    rows,
    5,
)
add(
    "cat of nothing",
    lambda s, x: s.o(torch.cat((torch.empty(0), s.a(x)), dim=-1).relu()),
    lambda: {"a": L(3, 5), "o": L(5, 2)},
    rows,
    5,
)
on_two("vstack", lambda s, x: s.o(torch.vstack((s.a(x).relu(), s.b(x).relu()))), 5)
on_two("vstack without relu", lambda s, x: s.o(torch.vstack((s.a(x), s.b(x)))), 25)
add("diag", lambda s, x: s.o(s.a(x) @ torch.diag(s.d)), lambda: {"a": L(3, 5), "d": P(5), "o": L(5, 2)}, rows, 10)
add("halves added", lambda s, x: s.o(s.a(x)[:, :4] + s.a(x)[:, 4:]), lambda: {"a": L(3, 8), "o": L(4, 2)}, rows, 16)
add("read in part", lambda s, x: s.o(s.a(x)[:, :3]), lambda: {"a": L(3, 5), "o": L(3, 2)}, rows, 9)
add(
    "slice_scatter",
    lambda s, x: s.o(torch.slice_scatter(x, s.a(x).relu(), 1, 0, 2)),
    lambda: {"a": L(3, 2), "o": L(3, 2)},
    rows,
    2,
)
add(
    "slice_scatter into units",
    lambda s, x: s.o(torch.slice_scatter(s.b(x).relu(), s.a(x).relu(), 1, 1, 4, 2)),
    lambda: {"a": L(3, 2), "b": L(3, 5), "o": L(5, 2)},
    rows,
    5,
)
on_two("slice_scatter of rows", lambda s, x: s.o(torch.slice_scatter(s.b(x), s.a(x[:3]), 0, 0, 3)), 25)
add(
    "select_scatter",
    lambda s, x: s.o(torch.select_scatter(x, s.a(x).relu()[:, 0], 1, 1)),
    lambda: {"a": L(3, 1), "o": L(3, 2)},
    rows,
    1,
)


def _filled(h: Tensor) -> Tensor:
    z = h.new_empty(h.shape)
    z[:, :2], z[:, 2:] = h[:, :2], h[:, 2:]
    return z


units("new_empty, copy", _filled)
units("empty_like, copy_", lambda h: torch.empty_like(h).copy_(h))

# --- places given by data ---


def at(name: str, forward: Callable[..., Tensor], want: int, count: int = 4) -> None:
    """Five channels, and positions `0 .. count` for the eight rows of the batch."""
    add(name, forward, lambda: {"a": L(3, 5), "o": L(5, 2)}, lambda: (X(8, 3), torch.arange(8) % count), want)


def _zeros(count: int = 4) -> Tensor:
    return torch.zeros(count, 5, dtype=torch.float64)


def _wide(i: Tensor) -> Tensor:
    return i[:, None].expand(-1, 5)


at(
    "scatter_reduce mean",
    lambda s, x, i: s.o(_zeros().scatter_reduce(0, _wide(i), s.a(x).relu(), "mean", include_self=False)),
    5,
)
at("scatter_reduce amax", lambda s, x, i: s.o(_zeros().scatter_reduce(0, _wide(i), s.a(x).relu(), "amax")), 5)
at(
    "scatter_reduce prod",
    lambda s, x, i: s.o(torch.ones(4, 5).double().scatter_reduce(0, _wide(i), s.a(x).relu(), "prod")),
    0,
)
at("scatter_add", lambda s, x, i: s.o(_zeros().scatter_add(0, _wide(i), s.a(x))), 25)
at("scatter", lambda s, x, i: s.o(_zeros(8).scatter(0, _wide(i), s.a(x))), 25, 8)
at("scatter one", lambda s, x, i: s.o(s.a(x).relu().scatter(0, _wide(i[:4]), 1.0)), 0)
at("index_add", lambda s, x, i: s.o(_zeros().index_add(0, i, s.a(x).relu())), 5)
at("index_put, accumulating", lambda s, x, i: s.o(_zeros().index_put((i,), s.a(x).relu(), accumulate=True)), 5)
at("index_put, channels by data", lambda s, x, i: s.o(s.a(x).index_put((i, i), x[:, 0])), 0)
add(
    "take",
    lambda s, i: s.o(torch.take(s.t, i)),
    lambda: {"t": P(12), "o": L(3, 2)},
    lambda: torch.randint(12, (8, 3)),
    1,
)
linear_over_time("rows by one channel", lambda h: h.gather(1, h[..., :1].argmax(1)[:, None].expand(-1, 1, 4)), 1 + 9)
add(
    "gather, channel by channel",
    lambda s, x, i: s.o(s.a(x).gather(1, i)),
    lambda: {"a": L(3, 4), "o": L(4, 2)},
    lambda: (X(4, 6, 3), torch.randint(6, (4, 2, 4))),
    4,
)
add(
    "gather, all channels alike",
    lambda s, x, i: s.o(s.a(x).gather(1, i.expand(-1, -1, 4))),
    lambda: {"a": L(3, 4), "o": L(4, 2)},
    lambda: (X(4, 6, 3), torch.randint(6, (4, 2, 1))),
    16,
)
add(
    "mask of entries",
    lambda s, x: s.o(s.a(x).index_put((x.repeat(1, 2)[:, :5] > 0,), torch.zeros(()).double())),
    lambda: {"a": L(3, 5), "o": L(5, 2)},
    rows,
    5,
)

# --- places known from the code ---

add(
    "heads by a list",
    lambda s, x: torch.einsum("bqd,bkd->bqk", s.a(x).view(-1, 3, 4)[:, [0, 1]], s.a(x).view(-1, 3, 4)[:, [-1]]),
    lambda: {"a": L(3, 12, False)},
    lambda: X(4, 3),
    16,
)
add("channels by a list", lambda s, x: s.o(s.a(x)[:, [3, 1, 0]].relu()), lambda: {"a": L(3, 5), "o": L(3, 2)}, rows, 3)
add(
    "channels by a mask",
    lambda s, x: s.o(s.a(x)[:, torch.tensor([True, False, True, True])]),
    lambda: {"a": L(3, 4), "o": L(3, 2)},
    rows,
    9,
)
add(
    "index_select by a list",
    lambda s, x: s.o(s.a(x).index_select(1, torch.tensor([2, 0]))),
    lambda: {"a": L(3, 4), "o": L(2, 2)},
    rows,
    4,
)
add(
    "gather by a list",
    lambda s, x: s.o(s.a(x).relu().gather(1, torch.tensor([[0, 2]] * 8))),
    lambda: {"a": L(3, 4), "o": L(2, 2)},
    rows,
    2,
)
on_two(
    "diagonal of an outer product",
    lambda s, x: s.o(torch.diagonal(s.a(x)[:, None, :] * s.b(x)[:, :, None], dim1=1, dim2=2)),
    10,
)
on_two(
    "entries i, i of an outer product",
    lambda s, x: s.o((s.a(x)[:, None, :] * s.b(x)[:, :, None])[:, [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]),
    10,
)

# --- negative controls: what the rules above must not let through ---

add(
    "control: Bilinear of a tanh",
    lambda s, x: s.o(s.a(x).tanh(), s.b(x)),
    lambda: {"a": L(3, 4), "b": L(3, 5), "o": nn.Bilinear(4, 5, 2)},
    rows,
    25,
)
add(
    "control: bag weighed by a learned number",
    lambda s, i: s.o(F.embedding_bag(i, s.e, per_sample_weights=s.w.expand(8, 3), mode="sum").relu()),
    lambda: {"e": P(9, 5), "w": P(3), "o": L(5, 2)},
    lambda: torch.randint(9, (8, 3)),
    5,
)
add(
    "control: RNNCell tanh with a learned state",
    lambda s, x, h: s.o(s.c(x, s.g(h))),
    lambda: {"g": L(2, 5), "c": nn.RNNCell(3, 5), "o": L(5, 2)},
    lambda: (X(8, 3), X(8, 2)),
    25,
)
add("control: cosine of a tanh", lambda s, x: F.cosine_similarity(s.a(x).tanh(), s.c, dim=-1),
    lambda: {"a": L(3, 4), "c": P(4)}, rows, 1)  # fmt: skip
add(
    "control: distance to data", lambda s, x: s.o(torch.cdist(s.a(x), x)), lambda: {"a": L(3, 3), "o": L(8, 2)}, rows, 0
)
on_two("control: clamp by data", lambda s, x: s.o(torch.clamp(s.a(x), min=x.repeat(1, 2)[:, :5])), 0)
on_two("control: hypot with data", lambda s, x: s.o(torch.hypot(s.a(x), x.repeat(1, 2)[:, :5])), 0)
on_two(
    "control: ldexp, its power read besides",
    lambda s, x: torch.ldexp(x[:, :1], s.b(x)).sum(1, True) + s.o(s.b(x)),
    0,
)
on_two("control: ldexp by a learned power", lambda s, x: s.o(torch.ldexp(s.a(x), s.b(x)).tanh()), 0)
on_two("control: atan2 with a tanh", lambda s, x: s.o(torch.atan2(s.a(x), s.b(x).tanh())), 0)
on_two("control: compared with another", lambda s, x: s.o(s.a(x) * (s.a(x) > s.b(x).tanh())), 0)
units("control: compared with one", lambda h: h * (h > 1), 0)
units("control: sign added", lambda h: h + h.sign(), 0)
units("control: sorted over units", lambda h: h.sort(-1).values, 1)
units("control: largest unit", lambda h: h * (h == h.max(-1, keepdim=True).values), 1)
units("control: filled with one", lambda h: h.masked_fill(h > 0.5, 1.0), 0)
over_time("control: norm plus one", lambda h: 1 + h.norm(dim=1), 0)
over_time("control: product of sums", lambda h: (1 + h).prod(1), 0)
over_time("control: median of a tanh", lambda h: h.tanh().median(1).values, 0)
over_time("control: transform over units", lambda h: torch.fft.rfft(h, n=6).abs(), 1)
over_space("control: pool of a tanh", lambda h: F.lp_pool2d(h.tanh(), 2, 2), 0)
over_space("control: pad with one", lambda h: F.pad(h, (1, 1, 1, 1), value=1.0), 0)
on_two("control: slice_scatter into a tanh", lambda s, x: s.o(
    torch.slice_scatter(s.b(x).tanh(), s.a(x).relu()[:, :2], 1, 0, 2)), 2)  # fmt: skip
on_two("control: copied, then tanh of a part", lambda s, x: s.o(
    torch.empty_like(s.a(x)).copy_(s.a(x).relu())) + s.o(s.a(x).tanh()), 0)  # fmt: skip
on_two("control: rows joined, one a tanh", lambda s, x: s.o(torch.vstack((s.a(x), s.b(x).tanh()))), 0)
add("control: kron in front of tanh", lambda s, x: s.o((x @ torch.kron(s.a, s.b)).tanh()),
    lambda: {"a": P(2, 2), "b": P(3, 2), "o": L(4, 2)}, lambda: X(8, 6), 1)  # fmt: skip
add("control: einsum of a square", lambda s, x: torch.einsum("bd,bd,dk->bk", s.a(x), s.a(x), s.u),
    lambda: {"a": L(3, 4), "u": P(4, 2)}, rows, 4)  # fmt: skip
add("control: used at both signs, linear readers", lambda s, x: (s.a(x) * s.v) @ s.u + (s.a(x) / s.v) @ s.w,
    lambda: {"a": L(3, 4), "v": P(4), "u": P(4, 2), "w": P(4, 2)}, rows, 8)  # fmt: skip
add("control: used at both signs, tanh", lambda s, x: s.o((s.a(x) * s.v).tanh() + (s.a(x) / s.v).tanh()),
    lambda: {"a": L(3, 4), "v": P(4), "o": L(4, 2)}, rows, 0)  # fmt: skip
add("control: inverse of a tanh", lambda s, x: s.o(x @ torch.linalg.inv(s.w.tanh()) @ s.v),
    lambda: {"w": P(3, 3), "v": P(3, 4), "o": L(4, 2)}, rows, 16)  # fmt: skip

# --- weights of three axes ---

add(
    "attention with weights [width, heads, head width]",
    lambda s, x: _attention(s, torch.einsum("bti,ihd->bthd", x, s.q), torch.einsum("bti,ihd->bthd", x, s.k), x),
    lambda: {"q": P(3, 2, 4), "k": P(3, 2, 4), "v": P(3, 2, 4), "o": P(2, 4, 3)},
    steps,
    2 * (16 + 16),
)
add(
    "control: the same with tanh on the values",
    lambda s, x: _attention(s, torch.einsum("bti,ihd->bthd", x, s.q), torch.einsum("bti,ihd->bthd", x, s.k), x, True),
    lambda: {"q": P(3, 2, 4), "k": P(3, 2, 4), "v": P(3, 2, 4), "o": P(2, 4, 3)},
    steps,
    2 * 16,
)
add("units [heads, width]", lambda s, x: torch.einsum("bhd,hdk->bk", torch.einsum("bi,ihd->bhd", x, s.q).relu(), s.o),
    lambda: {"q": P(3, 2, 4), "o": P(2, 4, 5)}, rows, 8)  # fmt: skip
add(
    "weights mixed by data",
    lambda s, x: torch.einsum("be,eio->bio", x, s.w)[:, 0] @ s.u,
    lambda: {"w": P(3, 2, 4), "u": P(4, 2)},
    rows,
    16,
)


def _attention(s: Any, q: Tensor, k: Tensor, x: Tensor, bounded: bool = False) -> Tensor:
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
    values = torch.einsum("bti,ihd->bthd", x, s.v)
    mixed = torch.einsum("bhqk,bkhd->bqhd", weights, values.tanh() if bounded else values)
    return torch.einsum("bqhd,hdi->bqi", mixed, s.o)
