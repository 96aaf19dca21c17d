"""Weights of eight bits and fewer: refused by name with the remedy, in files and in models, never rounded unasked."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import noetherflow as nf
from equilibrium_cases import mlp
from noetherflow.balance.checkpoint import balance_checkpoint, load_checkpoint_, read_checkpoint
from noetherflow.core.tensors import is_narrow
from noetherflow.errors import CheckpointError, DataError, NoetherflowError

EIGHT_BITS = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
)
WEIGHT = "2.weight"


def cases() -> Any:
    return mlp((6, 8, 8, 3), scales=(4, 0.5, 1))


def stored(state: dict[str, Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("dtype", EIGHT_BITS, ids=str)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_files_with_eight_bit_weights_are_refused_by_name(dtype: torch.dtype, suffix: str, tmp_path: Path) -> None:
    problem = cases()
    state = {n: p.detach().clone() for n, p in problem.model.state_dict().items()}
    path = stored(state | {WEIGHT: state[WEIGHT].float().to(dtype)}, tmp_path / f"in{suffix}")
    before, weights = path.read_bytes(), copy.deepcopy(problem.model.state_dict())
    eq = nf.noise_equilibrium(problem.model, problem.syms, None, objective="norm")
    words = rf"{WEIGHT} is stored as {dtype}.*bfloat16"
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint_(problem.model, path)
    with pytest.raises(CheckpointError, match=words):
        balance_checkpoint(path, tmp_path / f"out{suffix}", problem.model, eq, unchecked=True)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert all(torch.equal(t, weights[n]) for n, t in problem.model.state_dict().items())
    assert read_checkpoint(path)[WEIGHT].dtype == dtype


def test_scales_of_an_mx_checkpoint_are_refused(tmp_path: Path) -> None:
    """The weights may look like bytes: one scale of eight bits is enough to know."""
    problem = cases()
    state = {n: p.detach().clone() for n, p in problem.model.state_dict().items()}
    scales = torch.ones(8, 1).to(torch.float8_e8m0fnu)
    for suffix in (".safetensors", ".pt"):
        path = stored(state | {"2.weight_scale": scales}, tmp_path / f"in{suffix}")
        with pytest.raises(CheckpointError, match=r"2\.weight_scale is stored as torch\.float8_e8m0fnu"):
            load_checkpoint_(problem.model, path)


@pytest.mark.parametrize("word", ["F4", "F6_E2M3", "F6_E3M2"])
def test_numbers_of_four_and_six_bits_are_named(word: str, tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": word, "shape": [4, 4], "data_offsets": [0, 8]}}).encode()
    path = tmp_path / "in.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match=rf"w is stored as {word}.*dequantise"):
        read_checkpoint(path)


def test_averages_in_eight_bits_are_not_rounded(tmp_path: Path) -> None:
    problem = cases()
    state = {n: p.detach().clone() for n, p in problem.model.state_dict().items()}
    torch.save(
        {"model": state, "ema": {n: t.float().to(torch.float8_e5m2) for n, t in state.items()}}, tmp_path / "in.pt"
    )
    eq = nf.noise_equilibrium(problem.model, problem.syms, None, objective="norm")
    with pytest.raises(CheckpointError, match="float8_e5m2"):
        balance_checkpoint(tmp_path / "in.pt", tmp_path / "out.pt", problem.model, eq, unchecked=True)


def narrow_model(dtype: torch.dtype) -> nn.Module:
    model: nn.Module = cases().model
    weight = model.get_parameter(WEIGHT)
    layer = model.get_submodule("2")
    layer.register_parameter("weight", nn.Parameter(weight.detach().float().to(dtype)))
    return model


def squares(model: nn.Module, batch: Tensor) -> Tensor:
    out: Tensor = model(batch).square().sum(1)
    return out


@pytest.mark.parametrize("dtype", EIGHT_BITS[:2], ids=str)
def test_verbs_refuse_trainable_weights_of_eight_bits(dtype: torch.dtype) -> None:
    model, x, syms = narrow_model(dtype), torch.randn(4, 6, dtype=torch.float64), cases().syms
    eq = nf.noise_equilibrium(cases().model, syms, None, objective="norm")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calls = {
        "find": lambda: nf.find_symmetries(model, x),
        "certify": lambda: nf.certify(model, syms, x),
        "count": lambda: nf.count_symmetries(model, x),
        "moments": lambda: nf.gradient_moments(model, squares, [x], syms),
        "equilibrium": lambda: nf.noise_equilibrium(model, syms, None, objective="norm"),
        "balance": lambda: nf.balance_(model, eq, example_inputs=x),
        "analyze": lambda: nf.analyze(model, squares, [x], nf.SGDConfig(lr=0.01, batch_size=2)),
        "diagnose": lambda: nf.diagnose(model, squares, [x], optimizer),
        "ledger": lambda: nf.Ledger(model, optimizer, syms),
    }
    for call in calls.values():
        with pytest.raises(NoetherflowError, match=rf"{WEIGHT} is held in {dtype}.*bfloat16"):
            call()


class Upcast(nn.Module):
    """A layer as those of quantised models: a frozen weight of eight bits, widened in use, under an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6).to(torch.float8_e4m3fn), requires_grad=False)
        self.down, self.up = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.to(x.dtype) + self.up @ self.down).T


def test_frozen_weights_of_eight_bits_under_an_adapter_are_no_hindrance() -> None:
    """Negative control: nothing that trains or moves is narrow."""
    torch.manual_seed(0)
    model, x = Upcast(), torch.randn(8, 6)
    syms = nf.find_symmetries(model, x)
    assert [set(s.parameters) for s in syms] == [{"down", "up"}]
    moments = nf.gradient_moments(model, squares, [x], syms)
    eq = nf.noise_equilibrium(model, syms, moments, nf.SGDConfig(lr=0.01, batch_size=2, weight_decay=1e-2))
    assert nf.balance_(model, eq, example_inputs=x).output_change < 1e-5


def test_which_types_are_narrow() -> None:
    assert all(is_narrow(t) for t in EIGHT_BITS)
    assert not any(is_narrow(t) for t in (torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.bool))
    with pytest.raises(DataError, match="freeze"):
        nf.find_symmetries(nn.Linear(2, 2).to(torch.float8_e4m3fn), torch.randn(1, 2))
