"""A batch that goes a new way is verified and measured from one forward, where its graph can be used twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from noetherflow.errors import MomentError
from noetherflow.moments import batch as batch_module
from noetherflow.moments import gradient_moments
from reference import moments_by_loop
from test_moments_paths import assert_legs, contrastive, first_leg, layers
from test_moments_rules import data, squared_output


class Counts:
    """How often a loss is computed, and how often it is differentiated."""

    def __init__(self) -> None:
        self.forwards = self.backwards = 0

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        self.forwards += 1
        out = squared_output(model, batch)
        out.register_hook(self._differentiated)
        return out

    def _differentiated(self, _: Tensor) -> None:
        self.backwards += 1


def with_middle(middle: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module:
    """Two layers with something between them."""
    torch.manual_seed(0)
    return layers(lambda m, x: m.b(middle(m, m.a(x))), a=nn.Linear(4, 6), b=nn.Linear(6, 3))


def measured(model: nn.Module, count: int = 1, reference: nn.Module | None = None) -> Counts:
    """Measure some batches; the moments must be those of a loop over samples, which differentiates many times."""
    seen, batches = Counts(), [data(5, 4) + k for k in range(count)]
    got = gradient_moments(model, seen.loss, batches, first_leg(model), parameters=["b.weight"])
    assert got.fallback == ()
    reference = model if reference is None else reference
    assert_legs(got, moments_by_loop(reference, squared_output, batches, first_leg(reference)))
    return seen


class FreedAtOnce(torch.autograd.Function):
    """`tanh` whose backward lets go of what it needs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.out = x.tanh()
        return ctx.out.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        out = ctx.out
        del ctx.out
        return gradients[0] * (1 - out.square())


class Overwritten(torch.autograd.Function):
    """`tanh` whose backward overwrites what it needs, unnoticed by autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = 1 - x.tanh().square()
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return ctx.slope.mul_(gradients[0])


class Counted(nn.Module):
    """A layer that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = {"so far": [0]}

    def forward(self, x: Tensor) -> Tensor:
        self.calls["so far"][0] += 1
        return x.tanh()


def kept_elsewhere(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return x.tanh()


ONCE: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "plain": lambda m, x: x.tanh(),
    "in place": lambda m, x: x.tanh_(),
    "dropout": lambda m, x: x * (torch.rand(6, dtype=x.dtype) > 2),  # draws, and is the same every time
    "leaf made in the forward": lambda m, x: x * torch.ones(6, dtype=x.dtype, requires_grad=True),
}
TWICE: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "a backward that frees": lambda m, x: FreedAtOnce.apply(x),
    "a backward that overwrites": lambda m, x: Overwritten.apply(x),
    "a full backward hook": lambda m, x: x.tanh(),
}


@pytest.mark.parametrize("kind", ONCE)
def test_one_forward_and_two_backwards_verify_and_measure_a_batch(kind: str) -> None:
    seen = measured(with_middle(ONCE[kind]))
    assert (seen.forwards, seen.backwards) == (1, 2)


def test_every_batch_after_it_takes_one_of_each() -> None:
    seen = measured(with_middle(ONCE["plain"]), count=4)
    assert (seen.forwards, seen.backwards) == (4, 5)


@pytest.mark.parametrize("kind", TWICE)
def test_what_somebody_elses_backward_keeps_is_used_once(kind: str) -> None:
    model = with_middle(TWICE[kind])
    if "hook" in kind:
        model.b.register_full_backward_hook(lambda module, into, out: None)
    seen = measured(model, reference=with_middle(ONCE["plain"]))
    assert (seen.forwards, seen.backwards) == (2, 2)


def test_recomputed_activations_are_recomputed_for_one_backward() -> None:
    model = layers(
        lambda m, x: m.b(checkpoint(lambda h: m.a(h).tanh(), x, use_reentrant=False)),
        a=nn.Linear(4, 6),
        b=nn.Linear(6, 3),
    )
    seen = measured(model)
    assert (seen.forwards, seen.backwards) == (2, 2)


def test_activations_kept_elsewhere_come_back_for_one_backward() -> None:
    model = layers(lambda m, x: m.b(kept_elsewhere(m, m.a(x))), a=nn.Linear(4, 6), b=nn.Linear(6, 3))
    with torch.autograd.graph.save_on_cpu():
        seen = measured(model)
    assert (seen.forwards, seen.backwards) == (2, 2)


def test_a_counter_in_a_module_takes_a_second_forward_to_show_that_it_does_no_harm() -> None:
    counted = Counted()
    model = layers(lambda m, x: m.b(m.c(m.a(x))), a=nn.Linear(4, 6), b=nn.Linear(6, 3), c=counted)
    seen = measured(model)
    assert (seen.forwards, seen.backwards) == (2, 2)


def test_a_counter_in_a_module_that_changes_the_way_is_told() -> None:
    counted = Counted()

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.c(m.a(x))
        return m.b(m.d(h) if counted.calls["so far"][0] % 2 == 0 else h)

    model = layers(forward, a=nn.Linear(4, 6), b=nn.Linear(6, 3), c=counted, d=nn.Linear(6, 6))
    with pytest.raises(MomentError, match=r"takes another path .* linear of d\.bias, d\.weight"):
        gradient_moments(model, squared_output, [data(5, 4)], first_leg(model), parameters=["d.weight", "d.bias"])


@pytest.mark.parametrize("no_grad", [False, True])
def test_random_numbers_of_its_own_are_told(no_grad: bool) -> None:
    """Nothing resets a generator of the model's own, so that the second forward draws others."""
    own = torch.Generator().manual_seed(0)

    def noisy(_: nn.Module, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(not no_grad):
            kept = torch.rand(x.shape, generator=own, dtype=x.dtype) < 0.5
        return x * kept

    with pytest.raises(MomentError, match="samples act on each other"):
        measured(with_middle(noisy))


def test_random_numbers_go_on_as_after_one_forward() -> None:
    model = with_middle(lambda m, x: nn.functional.dropout(x, 0.5, training=True))
    x = data(5, 4)
    torch.manual_seed(3)
    squared_output(model, x)
    expected = torch.rand(4)
    torch.manual_seed(3)
    gradient_moments(model, squared_output, [x], first_leg(model))
    assert torch.equal(torch.rand(4), expected)


def test_samples_that_act_on_each_other_are_refused_from_one_forward_too() -> None:
    seen: list[int] = []

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        seen.append(len(batch))
        return contrastive(model, batch)

    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    with pytest.raises(MomentError, match="samples act on each other"):
        gradient_moments(model, loss_fn, [data(5, 4)], first_leg(model, "2.weight"))
    assert len(seen) == 1


def test_gradients_of_operands_are_let_go_of_as_they_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Together they would take as much memory as the model, beside all activations."""
    sizes, backward = [], batch_module.run_backward

    def watched(losses: Tensor, weights: Tensor, inputs: Any, keep: bool) -> Any:
        found = backward(losses, weights, inputs, keep)
        sizes.append([t.untyped_storage().nbytes() for t in found[1:] if t is not None])
        return found

    monkeypatch.setattr(batch_module, "run_backward", watched)
    measured(with_middle(ONCE["plain"]))
    assert sizes == [[8, 8, 8, 8], []]  # a number each for two weights and two biases, and nothing when measuring
