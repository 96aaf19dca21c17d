"""Optimisers of other libraries: whether they decay the weights, and states of 8 bits, read and moved.

The last tests are of the packages themselves: `pip install --no-deps bitsandbytes torchao`, then
`pytest -m slow tests/test_foreign_optimizers.py`.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf
from noetherflow.core.codes import BLOCK, BlockCodes, is_coded, numbers_in, plain
from noetherflow.core.foreign import decays_weights, state_of
from noetherflow.errors import DataError
from noetherflow.monitor.realised_rules import DecoupledRule
from noetherflow.monitor.rules import rule_for

VALUES = torch.cat([-torch.logspace(-4, 0, 127).flip(0), torch.zeros(1), torch.logspace(-4, 0, 128)])
SQUARES = torch.cat([torch.zeros(1), torch.logspace(-6, 0, 255)])


def coded(numbers: Tensor, values: Tensor = VALUES) -> BlockCodes:
    blocks = -(-numbers.numel() // BLOCK)
    out = BlockCodes(torch.zeros(numbers.shape, dtype=torch.uint8), values, torch.zeros(blocks))
    out.copy_(numbers)
    return out


@pytest.mark.parametrize("shape", [(BLOCK,), (3, 200), (1, 5), (40, 64)])
def test_numbers_are_stored_as_the_nearest_code_of_their_block(shape: tuple[int, ...]) -> None:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    stored = coded(numbers)
    for start in range(0, numbers.numel(), BLOCK):
        block = numbers.flatten()[start : start + BLOCK]
        choices = VALUES * block.abs().max()
        nearest = (block[:, None] - choices[None]).abs().min(1).values
        error = (stored.dequantize().flatten()[start : start + BLOCK] - block).abs()
        assert torch.allclose(error, nearest, atol=1e-7)
    again = coded(stored.dequantize())
    assert torch.equal(again.codes, stored.codes)
    assert torch.equal(again.largest, stored.largest)


def test_a_block_of_zeros_stays_zero_and_a_copy_keeps_what_it_was() -> None:
    stored = coded(torch.zeros(2, BLOCK))
    assert torch.equal(stored.dequantize(), torch.zeros(2, BLOCK))
    kept = stored.clone()
    stored.copy_(torch.ones(2, BLOCK))
    assert torch.equal(kept.dequantize(), torch.zeros(2, BLOCK))
    assert torch.equal(plain(stored), torch.ones(2, BLOCK))
    assert is_coded(stored)
    assert not is_coded(torch.ones(2))
    assert numbers_in({"a": [stored]}) == 2 * BLOCK


class Adam(torch.optim.Optimizer):
    """The steps of AdamW, with the state of bitsandbytes: `state1`, `state2`, in 32 or in 8 bits."""

    __module__ = "bitsandbytes.optim.adam"
    optimizer_name = "adam"

    def __init__(self, params: Iterable[Tensor], bits: int, lr: float = 3e-3, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": weight_decay})
        self.bits = bits

    def _begin(self, p: Tensor) -> dict[str, Any]:
        blocks = -(-p.numel() // BLOCK)
        if self.bits == 32:
            return {"step": 0, "state1": torch.zeros_like(p), "state2": torch.zeros_like(p)}
        new: dict[str, Any] = {"step": 0}
        for number, values in (("1", VALUES), ("2", SQUARES)):
            new |= {f"state{number}": torch.zeros(p.shape, dtype=torch.uint8), f"qmap{number}": values}
            new[f"absmax{number}"] = torch.zeros(blocks)
        return new

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                kept = self.state[p]
                if not kept:
                    kept.update(self._begin(p))
                kept["step"] += 1
                state, k = state_of(self, p), kept["step"]
                mean = plain(state["exp_avg"]) * b1 + (1 - b1) * p.grad
                square = plain(state["exp_avg_sq"]) * b2 + (1 - b2) * p.grad.square()
                state["exp_avg"].copy_(mean)
                state["exp_avg_sq"].copy_(square)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * (mean / (1 - b1**k)) / ((square / (1 - b2**k)).sqrt() + group["eps"]))


def net_and_data() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 48, bias=False), nn.ReLU(), nn.Linear(48, 16, bias=False))
    return net, torch.randn(20, 32, 16)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, batches: Tensor) -> list[float]:
    out = []
    for x in batches:
        optimizer.zero_grad()
        loss = (net(x) - x.tanh()).square().mean()
        loss.backward()
        optimizer.step()
        out.append(loss.item())
    return out


ELEMENTS = {"0 -> 2": torch.linspace(0.5, 2.0, 48)}


def test_decay_of_every_kind_is_told_by_the_class() -> None:
    weights = [nn.Parameter(torch.zeros(2, 2))]
    assert decays_weights(Adam(weights, 32)) is True
    assert nf.optimizer_config(Adam(weights, 32), 8).decoupled
    assert isinstance(rule_for(Adam(weights, 32)), DecoupledRule)
    named = type("AdamWFp8", (torch.optim.Optimizer,), {"__module__": "elsewhere", "step": Adam.step})
    plainly = type("Adam8bit", (torch.optim.Optimizer,), {"__module__": "elsewhere", "step": Adam.step})
    unknown = type("Odd", (torch.optim.Optimizer,), {"__module__": "elsewhere", "step": Adam.step})
    assert [decays_weights(c(weights, {})) for c in (named, plainly, unknown)] == [True, False, None]
    fused = type("FusedAdam", (torch.optim.Optimizer,), {"__module__": "apex", "step": Adam.step})(weights, {})
    for mode in (0, 1):
        fused.adam_w_mode = mode
        assert decays_weights(fused) is bool(mode)
    assert decays_weights(torch.optim.Adafactor(weights)) is True
    adafactor = pytest.importorskip("transformers").Adafactor(weights)
    assert decays_weights(adafactor) is None, "it decays by a learning rate times the size of the weights"
    for made in (torch.optim.SGD(weights, lr=0.1), torch.optim.Adagrad(weights), torch.optim.Adam(weights)):
        assert decays_weights(made) is False


def test_states_of_32_bits_move_exactly_and_without_a_word_on_decay() -> None:
    net, data = net_and_data()
    torch_twin = copy.deepcopy(net)
    own, its = (
        Adam(net.parameters(), 32),
        torch.optim.AdamW(torch_twin.parameters(), 3e-3, (0.9, 0.99), weight_decay=0.1),
    )
    assert train(net, own, data[:10]) == pytest.approx(train(torch_twin, its, data[:10]), rel=1e-5)
    for model, optimizer in ((net, own), (torch_twin, its)):
        report = nf.move_(model, nf.find_symmetries(model, data[0, :2]), ELEMENTS, optimizer)
        assert not report.approximate_state
        assert not report.unmoved
        assert report.state_entries == 4
    for p, q in zip(net.parameters(), torch_twin.parameters(), strict=True):
        assert torch.allclose(own.state[p]["state1"], its.state[q]["exp_avg"], rtol=1e-4, atol=1e-9)
        assert torch.allclose(own.state[p]["state2"], its.state[q]["exp_avg_sq"], rtol=1e-4, atol=1e-12)
    assert train(net, own, data[10:]) == pytest.approx(train(torch_twin, its, data[10:]), rel=1e-4)


def test_an_adam_of_unknown_origin_moves_as_one_is_usually_written_and_says_so() -> None:
    net, data = net_and_data()
    kind = type(
        "AdamW", (torch.optim.AdamW,), {"__module__": "elsewhere", "step": lambda self: super(kind, self).step()}
    )
    optimizer = kind(net.parameters(), 3e-3)
    train(net, optimizer, data[:3])
    report = nf.move_(net, nf.find_symmetries(net, data[0, :2]), ELEMENTS, optimizer)
    assert report.state_entries == 4
    assert all("as AdamW is usually written" in line for line in report.approximate_state)
    assert len(report.approximate_state) == 4


def test_states_of_8_bits_move_to_the_codes_nearest_to_the_exact_move() -> None:
    net, data = net_and_data()
    optimizer = Adam(net.parameters(), 8)
    train(net, optimizer, data[:10])
    before = {p: {k: plain(v) for k, v in state_of(optimizer, p).items() if k != "step"} for p in net.parameters()}
    report = nf.move_(net, nf.find_symmetries(net, data[0, :2]), ELEMENTS, optimizer)
    assert len(report.approximate_state) == 4
    assert all("few bits" in line for line in report.approximate_state)
    factors = [ELEMENTS["0 -> 2"][:, None], 1 / ELEMENTS["0 -> 2"][None]]
    for p, factor in zip(net.parameters(), factors, strict=True):
        for key, exact in (
            ("exp_avg", before[p]["exp_avg"] / factor),
            ("exp_avg_sq", before[p]["exp_avg_sq"] / factor**2),
        ):
            values = VALUES if key == "exp_avg" else SQUARES
            assert torch.allclose(plain(state_of(optimizer, p)[key]), coded(exact, values).dequantize(), rtol=1e-5)


def test_a_refused_move_puts_states_of_8_bits_back() -> None:
    net, data = net_and_data()
    optimizer = Adam(net.parameters(), 8)
    train(net, optimizer, data[:5])
    kept = copy.deepcopy([optimizer.state[p] for p in net.parameters()])
    weights = [p.detach().clone() for p in net.parameters()]
    syms = nf.find_symmetries(net, data[0, :2])
    first = optimizer.state[next(net.parameters())]
    first["absmax2"] = torch.zeros(1)  # of another size: writing to it fails half-way
    with pytest.raises(RuntimeError):
        nf.move_(net, syms, ELEMENTS, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(weights, net.parameters(), strict=True))
    for old, p in zip(kept, net.parameters(), strict=True):
        assert torch.equal(old["state1"], optimizer.state[p]["state1"])


def test_the_flow_of_states_of_8_bits_says_so_and_is_near_that_of_32() -> None:
    net, data = net_and_data()
    optimizer = Adam(net.parameters(), 32)
    train(net, optimizer, data.repeat(10, 1, 1))
    syms = nf.find_symmetries(net, data[0, :2])
    exact = nf.noether_flow(net, syms, optimizer=optimizer)
    small = Adam(net.parameters(), 8)
    for p in net.parameters():
        small.state[p] = small._begin(p) | {"step": optimizer.state[p]["step"]}
        for key, value in state_of(small, p).items():
            if is_coded(value):
                value.copy_(state_of(optimizer, p)[key])
    flow = nf.noether_flow(net, syms, optimizer=small)
    assert "stored in 8 bits" in " ".join(flow.assumptions())
    assert "stored in 8 bits" not in " ".join(exact.assumptions())
    a, b = (f.details[0].from_squares.drift for f in (flow, exact))
    assert float((a - b).norm() / b.norm()) < 0.03


def test_a_state_saved_by_bitsandbytes_is_refused_for_what_it_is() -> None:
    net, data = net_and_data()
    saved = {
        "state": {i: {"step": 3, "__bnb_optimizer_quant_state__": {"state1": torch.zeros(4)}} for i in range(2)},
        "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0, 1]}],
    }
    with pytest.raises(DataError, match=r"saved by bitsandbytes.*pass that"):
        nf.noether_flow(net, nf.find_symmetries(net, data[0, :2]), optimizer=saved)


PACKAGED = [
    ("bitsandbytes.optim", "Adam", 0.0),
    ("bitsandbytes.optim", "AdamW8bit", 0.02),
    ("bitsandbytes.optim", "PagedAdamW8bit", 0.02),
    ("bitsandbytes.optim", "Lion", 0.0),
    ("bitsandbytes.optim", "SGD8bit", 0.02),
    ("torchao.optim", "AdamW8bit", 0.02),
    ("torchao.optim", "AdamWFp8", 0.05),
    ("torchao.optim", "AdamW4bit", 0.2),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("module", "name", "rounding"), PACKAGED)
def test_the_packages_themselves(module: str, name: str, rounding: float) -> None:
    """Decay as measured on a step without gradients; moved states against the exact move; then it trains."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(module.partition(".")[0])
        make = getattr(importlib.import_module(module), name)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128, bias=False), nn.ReLU(), nn.Linear(128, 64, bias=False))
    options = {"momentum": 0.9} if name.startswith("SGD") else {}
    optimizer = make(net.parameters(), lr=1e-3, weight_decay=0.1, **options)
    weight, before = net[0].weight, net[0].weight.detach().clone()
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    if not name.startswith("SGD"):
        assert decays_weights(optimizer) is True
        assert float((weight.detach() / before - 1).median()) == pytest.approx(-1e-4, rel=2e-2)
    data = torch.randn(20, 32, 64)
    train(net, optimizer, data[:10])
    kept = {
        p: {k: plain(v).clone() for k, v in state_of(optimizer, p).items() if numbers_in(v) > 1}
        for p in net.parameters()
    }
    elements = {"0 -> 2": torch.linspace(0.5, 2.0, 128)}
    report = nf.move_(net, nf.find_symmetries(net, data[0, :2]), elements, optimizer)
    assert not report.unmoved
    assert report.state_entries == sum(map(len, kept.values()))
    for p, factor in zip(net.parameters(), [elements["0 -> 2"][:, None], 1 / elements["0 -> 2"][None]], strict=True):
        for key, old in kept[p].items():
            exact = old / factor ** (2 if key == "exp_avg_sq" else 1)
            off = plain(state_of(optimizer, p)[key]) - exact
            assert float(off.norm() / exact.norm()) <= rounding + 1e-6, key
    assert train(net, optimizer, data[10:])[-1] < 1.0
