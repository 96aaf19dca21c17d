"""Models whose backward pass is not that of the forward: outputs obey a symmetry, the gradients of training do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from noetherflow import certify, declare, find_symmetries
from noetherflow.symmetry.conservation import conservation

X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return -g


class TwoHeads(nn.Module):
    """Two heads on one hidden layer; `path` is what lies in front of the second head."""

    def __init__(self, path: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)
        self.path = path

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        return self.b(h) + self.c(self.path(h))


def _without_graph(h: Tensor) -> Tensor:
    with torch.no_grad():
        return 1.0 * h


class DetachedScale(nn.Module):
    """A normalisation by a statistic that gets no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.detach().abs().mean(-1, keepdim=True)


def hooked(net: nn.Sequential, hook: Callable[[nn.Sequential], object]) -> nn.Sequential:
    hook(net)
    return net


def relu_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def linear_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False))


def _scaled_gradient(module: nn.Module, inputs: object, outputs: object) -> tuple[Tensor, ...]:
    return tuple(0.5 * g for g in inputs)  # type: ignore[attr-defined]


UNITS = {"plus": [("0.weight", 0), ("0.bias", 0)], "minus": [("2.weight", 1)]}
HEADS = {"plus": [("a.weight", 0), ("a.bias", 0)], "minus": [("b.weight", 1), ("c.weight", 1)]}
MIXED = {"plus": [("0.weight", 0)], "minus": [("1.weight", 1)]}
ALTERED: dict[str, tuple[Callable[[], nn.Module], str, dict]] = {
    "detach": (lambda: TwoHeads(lambda h: h.detach()), "diagonal", HEADS),
    "data": (lambda: TwoHeads(lambda h: h.data), "diagonal", HEADS),
    "no_grad": (lambda: TwoHeads(_without_graph), "diagonal", HEADS),
    "reversal": (lambda: TwoHeads(Reversed.apply), "diagonal", HEADS),
    "scaled by detach": (lambda: TwoHeads(lambda h: 0.3 * h + (0.7 * h).detach()), "diagonal", HEADS),
    "hook on a weight": (
        lambda: hooked(relu_net(), lambda net: net[0].weight.register_hook(lambda g: 2 * g)),
        "diagonal",
        UNITS,
    ),
    "hook on a module": (
        lambda: hooked(relu_net(), lambda net: net[1].register_full_backward_hook(_scaled_gradient)),
        "diagonal",
        UNITS,
    ),
    "hook, whole group": (
        lambda: hooked(linear_net(), lambda net: net[1].weight.register_hook(lambda g: g.flip(1))),
        "general_linear",
        MIXED,
    ),
    "statistic without gradient": (
        lambda: nn.Sequential(nn.Linear(4, 6, bias=False), DetachedScale(), nn.Linear(6, 2)),
        "scalar",
        {"plus": [("0.weight", 0)]},
    ),
}


@pytest.mark.parametrize("name", ALTERED)
def test_an_altered_backward_is_broken_and_named(name: str) -> None:
    """The truth is computed here: `theta^T A g` of the outputs' sum, at the model's own weights."""
    torch.manual_seed(0)
    make, kind, legs = ALTERED[name]
    model = make().double()
    syms = declare(model, kind, **legs)  # type: ignore[arg-type]
    (symmetry,) = syms
    params = dict(model.named_parameters())
    grads = dict(zip(params, torch.autograd.grad(model(X).sin().sum(), list(params.values())), strict=True))
    basis = torch.eye(symmetry.blocks) if symmetry.is_torus else torch.eye(9).reshape(9, 1, 3, 3)
    tangents = [symmetry.tangent(params, generator.double()) for generator in basis]
    sums = [sum(float((t[n] * grads[n]).sum().detach()) for n in t) for t in tangents]
    assert max(map(abs, sums)) > 1e-3
    (row,) = certify(model, syms, X)
    assert row.outputs < 1e-12
    assert (row.verdict, row.gradients > 1e-3) == ("broken", True)
    assert "detach, no_grad" in row.note


def test_the_same_models_with_their_own_backward_are_exact() -> None:
    torch.manual_seed(0)
    for model, kind, legs in (
        (TwoHeads(lambda h: 1.0 * h), "diagonal", HEADS),
        (relu_net(), "diagonal", UNITS),
        (linear_net(), "general_linear", MIXED),
        (hooked(relu_net(), lambda net: net[0].weight.register_hook(lambda g: None)), "diagonal", UNITS),
    ):
        (row,) = certify(model.double(), declare(model, kind, **legs), X)  # type: ignore[arg-type]
        assert (row.verdict, row.note) == ("exact", "")
        assert row.gradients < 1e-12


class SimSiam(nn.Module):
    """Two views, a predictor on one, and no gradient through the other (Chen and He 2021)."""

    def __init__(self, stop: bool) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5))
        self.predictor = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 5))
        self.stop = stop

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.encoder(x), self.encoder(x.flip(1))
        target = second.detach() if self.stop else second
        return (self.predictor(first) * target).sum(1)


def test_a_stopped_gradient_breaks_only_what_passes_through_it() -> None:
    """The units inside the encoder leave the target alone; a scale of the encoder's output moves the target."""
    verdicts = {}
    for stop in (True, False):
        torch.manual_seed(0)
        model = SimSiam(stop).double()
        certificate = certify(model, find_symmetries(model, X), X)
        verdicts[stop] = {row.name: row.verdict for row in certificate}
    assert set(verdicts[False].values()) == {"exact"}
    whole = {name for name, verdict in verdicts[True].items() if verdict == "broken"}
    assert len(whole) == 1 < len(verdicts[True])
    assert next(iter(whole)).startswith("encoder.2 -> predictor.0")


def test_a_loss_that_looks_inside_the_model_is_named() -> None:
    torch.manual_seed(0)
    model = relu_net().double()

    def penalised(net: nn.Module, x: Tensor) -> Tensor:
        return net(x).square().sum(1) + net[1](net[0](x)).square().sum(1)  # type: ignore[index, operator]

    syms = declare(model, "diagonal", **UNITS)  # type: ignore[arg-type]
    (row,) = certify(model, syms, X, penalised)
    assert row.verdict == "broken"
    assert "loss_fn" in row.note
    (plain,) = certify(model, syms, X, lambda net, x: net(x).square().sum(1))
    assert plain.verdict == "exact"


def test_an_altered_backward_is_no_matter_of_eps() -> None:
    """A scale in front of a LayerNorm holds up to eps; with half of its gradient stopped it does not hold at all."""

    class Half(nn.Module):
        def __init__(self, stop: bool) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)
            self.stop = stop

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(self.a(x))
            return self.b(h + (h.detach() if self.stop else h))

    for stop, expected in ((False, "approximate"), (True, "approximate")):
        torch.manual_seed(0)
        model = Half(stop).double()
        syms = find_symmetries(model, X).filter(family="one-sided")
        assert {row.verdict for row in certify(model, syms, X)} == {expected}
    torch.manual_seed(0)
    model = Half(True).double()
    gains = find_symmetries(model, X).filter(family="norm-gain")
    assert {row.verdict for row in certify(model, gains, X)} == {"broken"}


def test_conservation_is_the_sum_over_tangents() -> None:
    """Every entry of `amount` against the tangent of one generator, for weights and gradients of no model at all."""
    rng = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False)).double()
    weights = dict(net.named_parameters())
    gradients = {n: torch.randn(p.shape, dtype=torch.float64, generator=rng) for n, p in weights.items()}
    for kind, blocks in (("diagonal", 1), ("general_linear", 2)):
        (s,) = declare(net, kind, plus=[("0.weight", 0)], minus=[("1.weight", 1)], blocks=blocks)  # type: ignore[arg-type]
        found = conservation(s, weights, gradients).amount
        for place in range(found.numel()):
            generator = torch.zeros(found.numel(), dtype=torch.float64)
            generator[place] = 1.0
            generator = generator.reshape(found.shape)
            if s.is_torus:
                tangent = s.tangent(weights, generator)
                by_hand = sum((tangent[n] * gradients[n]).sum() for n in tangent)
            else:  # minus legs go with the transposed inverse, whose generator is -A^T
                zero, one = s.legs
                by_hand = (generator @ zero.unfold(weights["0.weight"]) * zero.unfold(gradients["0.weight"])).sum()
                by_hand -= (generator.mT @ one.unfold(weights["1.weight"]) * one.unfold(gradients["1.weight"])).sum()
            torch.testing.assert_close(found.reshape(-1)[place], by_hand.detach(), rtol=1e-12, atol=1e-12)  # type: ignore[union-attr]
