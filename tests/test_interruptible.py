"""Ctrl-C ends every verb wherever it comes, as KeyboardInterrupt, and leaves the model as it was."""

from __future__ import annotations

import copy
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers")
INSTANTS = 6
"""Interruptions of each verb, spread over the time that it takes."""


def model() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(24, 24), nn.LayerNorm(24), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(24, 3)).double()


def losses(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).square().sum(1)


NET = model()
DATA = list(torch.randn(6, 16, 24, dtype=torch.float64))
SGD = nf.SGDConfig(lr=0.01, batch_size=16)


@pytest.fixture(scope="module")
def known() -> tuple[nf.SymmetrySet, nf.GradientMoments]:
    syms = nf.find_symmetries(NET, DATA[0])
    return syms, nf.gradient_moments(NET, losses, DATA, syms, for_="equilibrium", entries=True)


Verb = Callable[[nn.Module, nf.SymmetrySet, nf.GradientMoments, Path], object]
VERBS: dict[str, Verb] = {
    "find": lambda net, syms, moments, out: nf.find_symmetries(net, DATA[0]),
    "certify": lambda net, syms, moments, out: nf.certify(net, syms, DATA[0]),
    "measure": lambda net, syms, moments, out: nf.gradient_moments(net, losses, DATA, syms),
    "minibatch": lambda net, syms, moments, out: nf.minibatch_moments(net, losses, DATA, syms, batch_size=16),
    "flow": lambda net, syms, moments, out: nf.noether_flow(net, syms, moments, SGD),
    "forecast": lambda net, syms, moments, out: nf.noether_flow(net, syms, moments, SGD).forecast([0, 100, 1000]),
    "equilibrium": lambda net, syms, moments, out: nf.noise_equilibrium(net, syms, moments, SGD),
    "diagnose": lambda net, syms, moments, out: nf.diagnose(
        net, losses, DATA, torch.optim.SGD(net.parameters(), lr=0.01), steps=1000
    ),
}


@pytest.fixture
def alarm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A timer that sends this process Ctrl-C, and Ctrl-C as Python answers it."""

    def ring(number: int, frame: FrameType | None) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(sys, "unraisablehook", lambda what: None)
    handlers = {signal.SIGALRM: ring, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in before.items():
        signal.signal(number, handler)


def is_interrupted(verb: Callable[[], object], after: float) -> bool:
    """Whether Ctrl-C ends the verb. Pressed again, a little earlier, where it was lost or the verb had ended before.

    Python raises nothing out of a callback of a weak reference, and C code that asks for an attribute clears any error:
    about one Ctrl-C in a thousand is lost so.
    """
    for again in range(5):
        try:
            signal.setitimer(signal.ITIMER_REAL, after * 0.7**again)
            verb()
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            return True
    return False


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_is_interrupted_at_any_instant(name: str, known, alarm: None, tmp_path: Path) -> None:
    net, (syms, moments) = copy.deepcopy(NET), known
    VERBS[name](net, syms, moments, tmp_path)  # what is imported and compiled at first use
    start = time.perf_counter()
    for _ in range(3):
        VERBS[name](net, syms, moments, tmp_path)
    took = (time.perf_counter() - start) / 3
    for k in range(INSTANTS):
        after = took * (k + 0.5) / (2 * INSTANTS)
        assert is_interrupted(lambda: VERBS[name](net, syms, moments, tmp_path), after), f"{name} went on after Ctrl-C"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        for (n, was), now in zip(NET.state_dict().items(), net.state_dict().values(), strict=True):
            assert torch.equal(was, now), n
        assert all(p.grad is None and p.requires_grad for p in net.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert VERBS[name](net, syms, moments, tmp_path) is not None


def test_ctrl_c_waits_for_the_end_of_a_trace(alarm: None) -> None:
    """Raised in a callback of torch's tracing, which is C++, it would end the whole process."""
    went_on = []

    class Pressing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            signal.raise_signal(signal.SIGINT)
            went_on.append(True)
            return super().forward(x)

    with pytest.raises(KeyboardInterrupt):
        nf.find_symmetries(nn.Sequential(Pressing(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.zeros(2, 4))
    assert went_on
