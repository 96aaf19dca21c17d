"""The certificate: exact families, eps, casts, and planted false symmetries."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from noetherflow import SymmetrySet, declare
from noetherflow.discovery import certify, find_symmetries
from noetherflow.errors import DataError
from zoo import ZOO, Case

EXACT = 1e-12


@pytest.mark.parametrize("name", ZOO)
def test_every_symmetry_of_the_zoo_holds(name: str) -> None:
    """Outputs and per-sample gradients of the real loss; nothing broken, exact families at rounding error."""
    case = ZOO[name]()
    syms = find_symmetries(case.model, case.inputs)
    certificate = certify(case.model, syms, case.inputs, case.loss_fn, case.batch)
    assert [row.name for row in certificate] == [item.name for item in syms.all_items]
    assert certificate.broken == ()
    for item, row in zip(syms.all_items, certificate, strict=True):
        if getattr(item, "eps", None) is None:
            assert row.verdict == "exact"
            assert row.outputs < EXACT


def test_size_of_an_approximate_symmetry_is_proportional_to_eps() -> None:
    case = ZOO["layernorm_mlp"]()
    syms = find_symmetries(case.model, case.inputs).filter(family="one-sided")
    (row,) = certify(case.model, syms, case.inputs)
    assert row.verdict == "approximate"
    (e0, v0), (e1, v1), (e2, v2) = row.eps_sizes
    assert (e0, e2) == (1e-5, 0.0)
    assert v0 == row.outputs
    assert v1 / v0 == pytest.approx(e1 / e0, rel=1e-2)
    assert v2 < EXACT


def test_a_cast_in_the_model_is_named_instead_of_failing() -> None:
    case = ZOO["t5_encoder"]()
    syms = find_symmetries(case.model, case.inputs)
    certificate = certify(case.model, syms, case.inputs)
    assert certificate.tolerance == EXACT
    assert "casts to a lower precision" in str(certificate)
    assert "layer_norm" in str(certificate)


def test_narrow_dtypes_are_reported_with_their_size() -> None:
    case = ZOO["mlp"]()
    syms = find_symmetries(case.model, case.inputs)
    certificate = certify(case.model, syms, case.inputs, dtypes=(torch.float32, torch.bfloat16))
    assert {row.verdict for row in certificate} == {"exact"}
    worst = {d: max(dict(row.dtypes)[d] for row in certificate) for d in ("float32", "bfloat16")}
    assert max(row.outputs for row in certificate) < 1e-15 < worst["float32"] < 1e-6 < worst["bfloat16"] < 1e-1


class _Float32(nn.Module):
    """A constant that is float32 whatever it meets."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.ones(4, 4)


def test_a_model_that_takes_no_float64_is_refused_with_the_place() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), _Float32())
    syms = declare(model, "diagonal", plus=[("0.weight", 0), ("0.bias", 0)], minus=[("2.weight", 1)])
    with pytest.raises(DataError, match=r"3 \(_Float32\): .*test_certify\.py:\d+: return x @ torch\.ones") as caught:
        certify(model, syms, torch.randn(2, 3))
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(DataError, match=r"itself fails on these example inputs.*shapes cannot be multiplied"):
        certify(model, syms, torch.randn(2, 5))


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.weight.mT) @ self.weight


class _SigmoidExperts(nn.Module):
    """Gates that are normalised to sum 1: scaling one expert's router row is no symmetry."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(3, 2, bias=False)
        self.experts = nn.ModuleList(nn.Linear(3, 2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.router(x))
        gate = gate / gate.sum(-1, keepdim=True)
        return sum(gate[:, k : k + 1] * expert(x) for k, expert in enumerate(self.experts))


def _hidden(activation: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), activation, nn.Linear(5, 2))


PLANTED = {
    "GELU hidden units": (_hidden(nn.GELU()), [("0.weight", 0), ("0.bias", 0)], [("2.weight", 1)]),
    "ReLU6": (_hidden(nn.ReLU6()), [("0.weight", 0), ("0.bias", 0)], [("2.weight", 1)]),
    "forgotten bias": (_hidden(nn.ReLU()), [("0.weight", 0)], [("2.weight", 1)]),
    "wrong sign": (_hidden(nn.ReLU()), [("0.weight", 0), ("0.bias", 0), ("2.weight", 1)], []),
    "tied weights": (_Tied(), [("weight", 0)], []),
    "sigmoid-normalised router": (_SigmoidExperts(), [("router.weight", 0)], []),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_false_symmetries_are_broken(name: str) -> None:
    model, plus, minus = PLANTED[name]
    torch.manual_seed(0)
    inputs = 40 * torch.randn(6, 3)
    planted = declare(model, "diagonal", plus, minus)
    assert certify(model, planted, inputs).broken == (planted.symmetries[0].name,)
    found = find_symmetries(model, inputs)
    assert name in ("forgotten bias", "wrong sign") or len(found) == 0


def test_mixing_through_a_relu_is_broken() -> None:
    model = _hidden(nn.ReLU())
    planted = declare(model, "general_linear", [("0.weight", 0), ("0.bias", 0)], [("2.weight", 1)])
    assert certify(model, planted, torch.randn(4, 3)).broken == (planted.symmetries[0].name,)


def test_a_false_eps_does_not_excuse() -> None:
    """A symmetry that claims a normalisation's eps, in a model where no eps explains the violation."""
    model = _hidden(nn.GELU())
    planted = declare(model, "diagonal", [("0.weight", 0), ("0.bias", 0)], [("2.weight", 1)])
    from dataclasses import replace

    claimed = SymmetrySet((replace(planted.symmetries[0], eps=1e-5),), shapes=planted.shapes)
    assert certify(model, claimed, torch.randn(4, 3)).broken != ()


def test_translations_are_certified_too() -> None:
    case = ZOO["nanogpt"]()
    syms = find_symmetries(case.model, case.inputs)
    certificate = certify(case.model, syms, case.inputs, case.loss_fn, case.batch)
    keys = next(t for t in syms.translations if t.family == "translation")
    assert (keys.leg.parameter, keys.leg.index.reshape(-1).tolist()) == ("block.c_attn.bias", list(range(8, 16)))
    means = {t.leg.parameter for t in syms.translations if t.family == "null"}
    assert means == {"wpe", "block.c_proj.weight", "block.c_proj.bias", "block.c_out.weight", "block.c_out.bias"}
    assert all(certificate[t.name].verdict == "exact" for t in syms.translations)


def test_what_cannot_be_certified_says_so() -> None:
    case = ZOO["mlp"]()
    syms = find_symmetries(case.model, case.inputs)
    with pytest.raises(DataError, match=r"one loss per sample, shape \[batch\]"):
        certify(case.model, syms, case.inputs, lambda m, b: m(b).sum(), case.inputs)
    with pytest.raises(DataError, match="not finite"):
        certify(case.model, syms, torch.full((4, 4), float("nan")))


def test_certificate_reads_as_a_table() -> None:
    case: Case = ZOO["cnn_batchnorm"]()
    certificate = certify(case.model, find_symmetries(case.model, case.inputs), case.inputs)
    sentence, header, first, *_ = str(certificate).splitlines()
    assert sentence == "checked in float64: 2 approximate, 2 exact"
    columns = ["symmetry", "family", "verdict", "outputs changed by", "gradients off by", "note"]
    assert re.split(r"\s{2,}", header) == columns
    assert "approximate" in first
    assert certificate.to_dict()["rows"][0]["verdict"] == "approximate"
