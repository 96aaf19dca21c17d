"""Structures that span several operators: how many dimensions the group has by hand, each with a negative control."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import noetherflow as nf
from noetherflow import SymmetrySet, certify, count_symmetries, find_symmetries


class Net(nn.Module):
    """A model of a function and the modules and parameters it uses by name."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def drawn(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def dimension(syms: SymmetrySet) -> int:
    """Of the group found, without translations: d^2 per GL(d) block, 1 per coordinate of a torus."""
    return sum(s.blocks if s.is_torus else s.blocks * s.dim**2 for s in syms)


HEADS, DIM = 2, 3


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, DIM)).transpose(1, 2)


def join(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def recurrence(step: Callable[[Tensor, Tensor], Tensor], start: Callable[..., Tensor], x: Tensor) -> Tensor:
    h = start((len(x), 5), dtype=x.dtype)
    for t in range(3):
        h = step(x[:, t], h)
    return h


def experts(s: Net, x: Tensor, between: Callable[[Tensor], Tensor]) -> Tensor:
    return (torch.bmm(between(torch.bmm(x.expand(3, -1, -1), s.w) + s.b[:, None]), s.v) + s.c[:, None]).sum(0)


def chosen(x: Tensor) -> Tensor:
    """Numbers 0 to 4, all of which occur."""
    return (100 * x).abs().long() % 5


def attention_parts() -> dict[str, Any]:
    return {"q": L(3, 6), "k": L(3, 6), "v": L(3, 6), "o": L(6, 2)}


def expert_parts() -> dict[str, Any]:
    return {"w": drawn(3, 3, 4), "b": drawn(3, 4), "v": drawn(3, 4, 2), "c": drawn(3, 2)}


def recurrent_parts() -> dict[str, Any]:
    return {"i": L(3, 5), "h": L(5, 5, bias=False), "o": L(5, 2)}


def kernel_norm(dim: int) -> Callable[[], dict[str, Any]]:
    return lambda: {"a": parametrizations.weight_norm(nn.Conv1d(3, 4, 3), dim=dim)}


def low_rank() -> dict[str, Any]:
    return {"a": drawn(4, 2), "b": drawn(2, 3), "c": drawn(4, 2), "d": drawn(2, 3)}


def depthwise(activation: Callable[[], nn.Module]) -> Callable[[], dict[str, Any]]:
    conv = lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
    return lambda: {"n": nn.Sequential(nn.Conv2d(3, 4, 1), activation(), conv(), nn.BatchNorm2d(4), activation())}


L, relu = nn.Linear, F.relu
SEQUENCE, ROWS, IMAGE = (4, 6, 3), (8, 3), (4, 3, 6, 6)
PER_HEAD = HEADS * (DIM**2 + DIM**2 + 1)
"""GL of query and key, GL of value and output, and one scale of the scores against the output."""

CASES: dict[str, tuple[Callable[..., Tensor], Callable[[], dict[str, Any]], tuple[int, ...], int]] = {
    # a sum of products is a contraction
    "inner product": (lambda s, x: (s.a(x) * s.b(x)).sum(-1), lambda: {"a": L(3, 4), "b": L(3, 4)}, ROWS, 16),
    "inner product, mean": (
        lambda s, x: (s.a(x) * s.b(x)).mean(-1, keepdim=True),
        lambda: {"a": L(3, 4), "b": L(3, 4)},
        ROWS,
        16,
    ),
    "inner product of units": (
        lambda s, x: (relu(s.a(x)) * s.b(x)).sum(-1),
        lambda: {"a": L(3, 4), "b": L(3, 4)},
        ROWS,
        4,
    ),
    "product that is used besides": (
        lambda s, x: (lambda p: p.sum(-1, keepdim=True) + p.tanh().sum(-1, keepdim=True))(s.a(x) * s.b(x)),
        lambda: {"a": L(3, 4), "b": L(3, 4)},
        ROWS,
        4,
    ),
    "attention pooling": (
        lambda s, x: s.o((s.w(x).softmax(1) * s.v(x)).sum(1)),
        lambda: {"w": L(3, 1), "v": L(3, 4), "o": L(4, 2)},
        SEQUENCE,
        16,
    ),
    # attention without softmax
    "scores as they are": (
        lambda s, x: s.o(join(heads(s.q(x)) @ heads(s.k(x)).mT @ heads(s.v(x)))),
        attention_parts,
        SEQUENCE,
        PER_HEAD,
    ),
    "keys with values first": (
        lambda s, x: s.o(join(heads(s.q(x)) @ (heads(s.k(x)).mT @ heads(s.v(x))))),
        attention_parts,
        SEQUENCE,
        PER_HEAD,
    ),
    "causal": (
        lambda s, x: s.o(join((heads(s.q(x)) @ heads(s.k(x)).mT).tril() @ heads(s.v(x)))),
        attention_parts,
        SEQUENCE,
        PER_HEAD,
    ),
    "relu of the scores": (
        lambda s, x: s.o(join(relu(heads(s.q(x)) @ heads(s.k(x)).mT) @ heads(s.v(x)))),
        attention_parts,
        SEQUENCE,
        PER_HEAD,
    ),
    "tanh of the scores": (
        lambda s, x: s.o(join(torch.tanh(heads(s.q(x)) @ heads(s.k(x)).mT) @ heads(s.v(x)))),
        attention_parts,
        SEQUENCE,
        PER_HEAD - HEADS,
    ),
    # recurrences
    "units from zeros": (
        lambda s, x: s.o(recurrence(lambda z, h: relu(s.i(z) + s.h(h)), torch.zeros, x)),
        recurrent_parts,
        SEQUENCE,
        5,
    ),
    "linear from zeros": (
        lambda s, x: s.o(recurrence(lambda z, h: s.i(z) + s.h(h), torch.zeros, x)),
        recurrent_parts,
        SEQUENCE,
        25,
    ),
    "units from ones": (
        lambda s, x: s.o(recurrence(lambda z, h: relu(s.i(z) + s.h(h)), torch.ones, x)),
        recurrent_parts,
        SEQUENCE,
        0,
    ),
    # zeros beside real channels
    "padded shortcut": (
        lambda s, x: s.o(relu(s.b(relu(s.a(x))) + F.pad(s.c(x), (0, 2)))),
        lambda: {"a": L(3, 4), "b": L(4, 5), "c": L(3, 3), "o": L(5, 2)},
        ROWS,
        4 + 5,
    ),
    "shortcut padded with ones": (
        lambda s, x: s.o(relu(s.b(relu(s.a(x))) + F.pad(s.c(x), (0, 2), value=1.0))),
        lambda: {"a": L(3, 4), "b": L(4, 5), "c": L(3, 3), "o": L(5, 2)},
        ROWS,
        4,
    ),
    # stacks of matrices
    "experts": (lambda s, x: experts(s, x, relu), expert_parts, ROWS, 3 * 4),
    "linear experts": (lambda s, x: experts(s, x, lambda h: h), expert_parts, ROWS, 3 * 16),
    "experts with tanh": (lambda s, x: experts(s, x, torch.tanh), expert_parts, ROWS, 0),
    # weights that are computed
    "norm along the kernel": (lambda s, x: s.a(x.mT).tanh(), kernel_norm(2), SEQUENCE, 3),
    "norm along the channels": (lambda s, x: s.a(x.mT).tanh(), kernel_norm(0), SEQUENCE, 4),
    # rows that data choose
    "a norm of each row": (
        lambda s, i: s.o(F.rms_norm(s.e(chosen(i)), (4,)).tanh()),
        lambda: {"e": nn.Embedding(5, 4), "o": L(4, 2)},
        ROWS,
        5,
    ),
    "normalised to length one": (
        lambda s, i: s.o(s.g * F.normalize(s.e(chosen(i)), dim=-1)),
        lambda: {"e": nn.Embedding(5, 4), "g": drawn(4), "o": L(4, 2)},
        ROWS,
        5 + 4,
    ),
    "a norm of sums of rows": (
        lambda s, i: s.o(F.rms_norm(s.e(chosen(i)).sum(1), (4,)).tanh()),
        lambda: {"e": nn.Embedding(5, 4), "o": L(4, 2)},
        ROWS,
        1,
    ),
    "a norm of each row, and the row": (
        lambda s, i: (lambda h: s.o(F.rms_norm(h, (4,)).tanh()) + s.p(h))(s.e(chosen(i))),
        lambda: {"e": nn.Embedding(5, 4), "o": L(4, 2), "p": L(4, 2)},
        ROWS,
        1,
    ),
    # one motion that several coordinates give
    "depthwise before a batch norm": (lambda s, x: s.n(x), depthwise(nn.GELU), IMAGE, 4),
    "depthwise between units": (lambda s, x: s.n(x), depthwise(nn.ReLU), IMAGE, 4 + 4),
    "product of low ranks": (lambda s, x: x @ ((s.a @ s.b) * (s.c @ s.d)).T, low_rank, ROWS, 4 + 4 + 4 + 3 - 1),
    "sum of low ranks": (lambda s, x: x @ ((s.a @ s.b) + (s.c @ s.d)).T, low_rank, ROWS, 4 + 4),
}


def built(name: str) -> tuple[nn.Module, Tensor, SymmetrySet]:
    function, parts, shape, _ = CASES[name]
    torch.manual_seed(0)
    model = Net(function, **parts()).double().eval()
    x = torch.randn(shape, dtype=torch.float64)
    return model, x, find_symmetries(model, x)


@pytest.mark.parametrize("name", CASES)
def test_dimensions_by_hand(name: str) -> None:
    model, x, syms = built(name)
    assert not syms.unknown
    assert dimension(syms) == CASES[name][3]
    normalised = {"approximate"} if "depthwise" in name else set()  # the batch norm's eps
    assert {row.verdict for row in certify(model, syms, x)} <= {"exact"} | normalised


@pytest.mark.parametrize(
    "name", ["product of low ranks", "scores as they are", "relu of the scores", "padded shortcut"]
)
def test_the_oracle_counts_as_many(name: str) -> None:
    model, x, syms = built(name)
    assert count_symmetries(model, x, symmetric=False).symmetries == dimension(syms)


def squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return ((model(batch[0]) - batch[1]) ** 2).flatten(1).sum(-1)


def batches_for(model: nn.Module, x: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
    return [(z := torch.randn_like(x), torch.randn_like(model(z)).detach()) for _ in range(count)]


SETTINGS = nf.SGDConfig(lr=0.01, batch_size=4, weight_decay=0.1)


def test_low_ranks_go_through_the_whole_workflow() -> None:
    """Doubled coordinates made the joint equilibrium degenerate; now find, measure, solve and balance just run."""
    model, x, syms = built("product of low ranks")
    batches = batches_for(model, x, 4)
    measure = lambda m: nf.gradient_moments(m, squared_error, batches, syms)
    moments = measure(model)
    nf.noether_flow(model, syms, moments, SETTINGS)
    equilibrium = nf.noise_equilibrium(model, syms, moments, SETTINGS, remeasure=measure)
    before = model(x).detach()
    nf.balance_(model, equilibrium, example_inputs=x)
    assert float((model(x) - before).detach().abs().max()) < 1e-8 * float(before.abs().max())


def test_depthwise_kernels_go_through_the_whole_workflow() -> None:
    model, x, syms = built("depthwise before a batch norm")
    model.train()
    batches = batches_for(model, x, 8)
    moments = nf.minibatch_moments(model, squared_error, batches, syms, batch_size=4)
    nf.noether_flow(model, syms, moments, SETTINGS)
    equilibrium = nf.noise_equilibrium(model, syms, moments, SETTINGS)
    assert {s.name for s in equilibrium.symmetries} == {s.name for s in syms}


def cubed(s: Net, x: Tensor) -> Tensor:
    return s.o(relu(s.a(x)) ** 3)


@pytest.mark.parametrize(
    ("function", "power"),
    [
        (cubed, 3.0),
        (lambda s, x: s.o(relu(s.a(x)) ** (1 / 3)), 1 / 3),
        (lambda s, x: s.o((relu(s.a(x)) ** (1 / 3)) ** 0.3), 0.1),
        (lambda s, x: s.o(relu(s.a(x)) ** 7 / relu(s.b(x)) ** 7), 7.0),
    ],
)
def test_exponents_are_exact(function: Callable[..., Tensor], power: float) -> None:
    torch.manual_seed(0)
    model, x = Net(function, a=L(3, 4), b=L(3, 4), o=L(4, 2)).double(), torch.randn(ROWS, dtype=torch.float64)
    for s in find_symmetries(model, x):
        powers = {leg.parameter: leg.exponent for leg in s.legs}
        first = powers.get("a.weight", powers.get("b.weight"))
        assert abs(powers["o.weight"] / first) == power
