"""Sizes of activations against hooks, and the point at which they meet the weights against SmoothQuant's formula."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf
from noetherflow.errors import DataError, MomentError
from zoo import ZOO, Case, output_of
from zoo import call as run

D = torch.float64


def hooked(case: Case, module: str, axis: int) -> Tensor:
    """What a module gets as input, channels last, `[values, channels]`."""
    seen: list[Tensor] = []
    handle = case.model.get_submodule(module).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        run(case.model, case.inputs)
    handle.remove()
    return torch.cat([t.movedim(axis, -1).flatten(0, -2) for t in seen])


@pytest.mark.parametrize(
    ("name", "symmetry", "module", "axis"),
    [
        ("mlp", "0 -> 2", "2", -1),
        ("cnn_batchnorm", "1 -> 3", "3", 1),
        ("depthwise_cnn", "0 -> 2", "2", 1),  # groups of one channel
        ("depthwise_cnn", "2 -> 4", "4", 1),  # two groups
        ("depthwise_cnn", "4 -> 6", "6", 1),  # transposed
        ("cnn", "0 -> 3", "3", 1),  # behind a pooling, which torch dispatches in Python
        ("gpt2", "transformer.h.0.ln_1 -> transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_attn", -1),
        ("llama", "model.norm -> lm_head", "lm_head", -1),
        ("llama", "model.layers.0.mlp.up_proj -> model.layers.0.mlp.down_proj", "model.layers.0.mlp.down_proj", -1),
    ],
)
def test_levels_are_those_of_the_inputs_of_the_readers(name: str, symmetry: str, module: str, axis: int) -> None:
    case = ZOO[name]().double()
    syms = nf.find_symmetries(case.model, case.inputs)
    found = nf.activation_moments(case.model, [case.inputs, case.inputs], syms)
    x = hooked(case, module, axis)
    torch.testing.assert_close(found.largest[symmetry], x.abs().amax(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.second[symmetry], x.square().mean(0), rtol=1e-12, atol=0)


def test_matrices_read_row_by_row() -> None:
    """`v -> o` of Llama, GL(4) read by two heads: the larger level of the heads' channels."""
    case = ZOO["llama"]().double()
    syms = nf.find_symmetries(case.model, case.inputs)
    found = nf.activation_moments(case.model, [case.inputs], syms)
    x = hooked(case, "model.layers.0.self_attn.o_proj", -1).abs().amax(0)
    name = next(s.name for s in syms if s.family == "attention-vo")
    torch.testing.assert_close(found.largest[name], x.reshape(2, 4).amax(0), rtol=1e-12, atol=0)


def outliers(case: Case) -> nn.Module:
    """The same function with a few channels of a norm's outputs 30 times as large, as in large language models."""
    model = copy.deepcopy(case.model)
    gains = nf.find_symmetries(model, case.inputs).filter(family="norm-gain")
    stretch = {}
    for s in gains:
        if s.kind == "diagonal":
            stretch[s.name] = torch.ones(s.shape, dtype=D)
            stretch[s.name][1] = 30.0
    nf.move_(model, gains, stretch)
    return model


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.8])
def test_scales_are_smoothquants(alpha: float) -> None:
    """One reader per norm: `p = max|W|^(1 - alpha) / max|X|^alpha`."""
    case = ZOO["gpt2"]().double()
    model = outliers(case)
    gains = nf.find_symmetries(model, case.inputs).filter(family="norm-gain")
    gains = gains.without({s.name: "stream" for s in gains if s.kind == "scalar"})
    found = nf.activation_moments(model, [case.inputs], gains)
    eq = nf.noise_equilibrium(model, gains, objective=nf.smoothing(found, alpha))
    s = gains[0]
    w = nf.tensors_of(model)["transformer.h.0.attn.c_attn.weight"].detach().abs().amax(1)
    want = w ** (1 - alpha) / found.largest[s.name] ** alpha
    torch.testing.assert_close(eq[s.name].element, want, rtol=1e-9, atol=0)
    assert eq.converged
    nf.balance_(model, eq)
    again = nf.activation_moments(model, [case.inputs], gains).largest[s.name]
    w = nf.tensors_of(model)["transformer.h.0.attn.c_attn.weight"].detach().abs().amax(1)
    torch.testing.assert_close(again**alpha, w ** (1 - alpha), rtol=1e-7, atol=0)


def rounded_error(model: nn.Module, inputs: Any, reference: Tensor) -> float:
    """Weights and inputs of every linear layer to 8 bits, one step per tensor."""
    other = copy.deepcopy(model)

    def grid(t: Tensor) -> Tensor:
        step = t.abs().max() / 127
        return (t / step).round() * step

    for module in other.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = grid(module.weight.data)
            module.register_forward_pre_hook(lambda _, args: (grid(args[0]), *args[1:]))
    with torch.no_grad():
        return float((output_of(run(other, inputs)) - reference).norm() / reference.norm())


@pytest.mark.parametrize("statistic", ["largest", "rms"])
def test_eight_bits_of_weights_and_activations_lose_less(statistic: Any) -> None:
    case = ZOO["llama"]().double()
    model = outliers(case)
    with torch.no_grad():
        reference = output_of(run(model, case.inputs))
    gains = nf.find_symmetries(model, case.inputs).filter(family="norm-gain")
    objective = nf.smoothing(nf.activation_moments(model, [case.inputs], gains), statistic=statistic)
    smooth = copy.deepcopy(model)
    nf.balance_(smooth, nf.noise_equilibrium(smooth, gains, objective=objective))
    before, after = (rounded_error(m, case.inputs, reference) for m in (model, smooth))
    assert after < before / 4


def test_what_is_not_read_is_named_and_forwards_of_ones_own_work() -> None:
    case = ZOO["cnn_batchnorm"]().double()
    syms = nf.find_symmetries(case.model, case.inputs)
    found = nf.activation_moments(case.model, [case.batch], syms, forward=case.loss_fn)
    assert set(found.left) == {s.name for s in syms if s.one_sided}
    assert "nothing reads it" in str(found)
    direct = nf.activation_moments(case.model, [case.inputs], syms)
    for name, level in direct.largest.items():
        torch.testing.assert_close(found.largest[name], level, rtol=1e-12, atol=0)
    assert found.to_dict()["values"] > 0


def test_legs_on_what_a_weight_makes_have_no_level() -> None:
    """GPT-2's queries and keys come from one weight: its - leg is on the keys, not on what the weight reads."""
    case = ZOO["gpt2"]().double()
    syms = nf.find_symmetries(case.model, case.inputs)
    found = nf.activation_moments(case.model, [case.inputs], syms)
    assert {s.name for s in syms if s.family == "attention-qk"} <= set(found.left)
    assert {s.name for s in syms if s.family == "attention-vo"} <= set(found.largest)


def test_faults_are_refused() -> None:
    case = ZOO["cnn_batchnorm"]().double()
    syms = nf.find_symmetries(case.model, case.inputs)
    with pytest.raises(DataError, match="batches is empty"):
        nf.activation_moments(case.model, [], syms)
    with pytest.raises(DataError, match="not finite"):
        nf.activation_moments(case.model, [case.inputs * torch.inf], syms)
    with pytest.raises(MomentError, match="norm-gain"):
        nf.activation_moments(case.model, [case.inputs], syms.filter(family="one-sided"))
    found = nf.activation_moments(case.model, [case.inputs], syms)
    with pytest.raises(DataError, match="between 0 and 1"):
        nf.smoothing(found, 1.5)
    with pytest.raises(DataError, match="'largest' or 'rms'"):
        nf.smoothing(found, statistic="mean")  # type: ignore[arg-type]
