"""Gains stored as a distance from a constant: the sum is what a symmetry multiplies."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import noetherflow as nf

D = torch.float64


class Net(nn.Module):
    """Linear, a norm whose gain is `read(g)`, linear."""

    def __init__(self, read, norm=lambda x: F.rms_norm(x, (4,), eps=1e-6)):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(5, 4, dtype=D), nn.Linear(4, 3, dtype=D)
        self.g = nn.Parameter(0.1 * torch.randn(4, dtype=D))
        self.read, self.norm = read, norm

    def forward(self, x):
        return self.b(self.norm(self.a(x)) * self.read(self.g))


READINGS = {
    "1 + g": (lambda g: 1 + g, 1.0),
    "g + 2": (lambda g: g + 2.0, 2.0),
    "g - 3": (lambda g: g - 3, -3.0),
    "1 - g": (lambda g: 1 - g, -1.0),
    "ones_like(g) + g": (lambda g: torch.ones_like(g) + g, 1.0),
    "g + full": (lambda g: g + torch.full((4,), 0.5, dtype=D), 0.5),
    "1 + cast g": (lambda g: 1.0 + g.to(torch.float64).clone(), 1.0),
    "add with alpha": (lambda g: torch.add(g, 2, alpha=3), 6.0),
    "square of the sum": (lambda g: (1 + g).square(), 1.0),
}


def gains(syms: nf.SymmetrySet) -> list[nf.Symmetry]:
    return [s for s in syms if "g" in s.parameters]


@pytest.mark.parametrize("reading", READINGS)
def test_the_sum_is_found_and_moved(reading):
    read, offset = READINGS[reading]
    model, x = Net(read), torch.randn(6, 5, dtype=D)
    syms = nf.find_symmetries(model, x)
    (sym,) = gains(syms)
    assert sym.offsets == {"g": offset}
    assert (sym.family, sym.blocks) == ("rescaling" if reading == "square of the sum" else "norm-gain", 4)
    assert nf.certify(model, syms, x)[sym.name].verdict == "exact"
    before, moved = model(x), copy.deepcopy(model)
    sym.act_(nf.tensors_of(moved), sym.random_element())
    assert not torch.allclose(moved.g, model.g)
    torch.testing.assert_close(moved(x), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "read",
    [
        lambda g: (1 + g) + g,
        lambda g: (1 + g) * (2 + g),
        lambda g: 1 + g.square(),
        lambda g: 1 + 2 * g,
        lambda g: g + torch.arange(4.0, dtype=D),
        lambda g: torch.add(2, g, alpha=3) + g,
    ],
    ids=["also bare", "two constants", "of a square", "of a multiple", "not one constant", "alpha on g"],
)
def test_a_parameter_that_is_read_otherwise_has_no_such_symmetry(read):
    model, x = Net(read), torch.randn(6, 5, dtype=D)
    assert not gains(nf.find_symmetries(model, x))


class LayerNorm1P(nn.Module):
    def __init__(self):
        super().__init__()
        self.g, self.bias = (nn.Parameter(0.1 * torch.randn(4, dtype=D)) for _ in range(2))

    def forward(self, x):
        return F.layer_norm(x, (4,), self.g + 1, self.bias, eps=1e-12)


def test_layer_norm_with_an_offset_gain_and_its_own_bias():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 4), LayerNorm1P(), nn.Linear(4, 3)).double(), torch.randn(6, 5, dtype=D)
    syms = nf.find_symmetries(model, x)
    (sym,) = [s for s in syms if "1.g" in s.parameters]
    assert sym.offsets == {"1.g": 1.0}
    assert set(sym.parameters) == {"1.g", "1.bias", "2.weight"}
    assert nf.certify(model, syms, x)[sym.name].verdict == "exact"


def test_gemmas_norms():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 30, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1, "head_dim": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "attn_implementation": "eager"}
    torch.manual_seed(0)
    model = transformers.GemmaForCausalLM(transformers.GemmaConfig(**sizes, **heads)).eval()
    inputs = {"input_ids": torch.randint(30, (2, 5)), "use_cache": False}
    syms = nf.find_symmetries(model, inputs)
    offset = [s for s in syms if s.offsets]
    assert {n for s in offset for n in s.offsets} == {
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.norm.weight",
    }
    assert sum(s.blocks for s in offset) == 8 + 8 + 1, "the final gain moves as a whole: its reader is the embedding"
    certificate = nf.certify(model, syms, inputs)
    assert {certificate[s.name].verdict for s in offset if s.blocks == 8} == {"exact"}
