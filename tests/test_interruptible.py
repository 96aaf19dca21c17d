"""Ctrl-C ends every verb wherever it comes, as KeyboardInterrupt, and leaves the model as it was."""

from __future__ import annotations

import copy
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

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


class Alarm:
    """Raises KeyboardInterrupt as Ctrl-C does. `lost`: it came in a callback of a weak reference or a finaliser, out of
    which Python raises nothing; torch's export has many.
    """

    def __init__(self) -> None:
        self.rang = self.lost = False

    def unraisable(self, what: Any) -> None:
        self.lost |= what.exc_type is KeyboardInterrupt

    def ring(self, number: int, frame: FrameType | None) -> None:
        self.rang = True
        raise KeyboardInterrupt


@pytest.fixture
def alarm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Alarm]:
    made = Alarm()
    monkeypatch.setattr(sys, "unraisablehook", made.unraisable)
    before = signal.signal(signal.SIGALRM, made.ring)
    yield made
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_is_interrupted_at_any_instant(name: str, known, alarm: Alarm, tmp_path: Path) -> None:
    net, (syms, moments) = copy.deepcopy(NET), known
    VERBS[name](net, syms, moments, tmp_path)  # what is imported and compiled at first use
    start = time.perf_counter()
    VERBS[name](net, syms, moments, tmp_path)
    took = time.perf_counter() - start
    interrupted = 0
    for k in range(INSTANTS):
        alarm.rang = alarm.lost = False
        signal.setitimer(signal.ITIMER_REAL, took * (k + 0.5) / (2 * INSTANTS))
        try:
            VERBS[name](net, syms, moments, tmp_path)
        except KeyboardInterrupt:
            interrupted += 1
        else:
            assert alarm.lost or not alarm.rang, f"{name} went on after Ctrl-C"
        signal.setitimer(signal.ITIMER_REAL, 0)
        for (n, was), now in zip(NET.state_dict().items(), net.state_dict().values(), strict=True):
            assert torch.equal(was, now), n
        assert all(p.grad is None and p.requires_grad for p in net.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert interrupted >= INSTANTS // 2
    assert VERBS[name](net, syms, moments, tmp_path) is not None
