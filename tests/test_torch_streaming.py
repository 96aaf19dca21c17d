"""PyTorch files are moved tensor by tensor: what is written is what torch.save writes, and memory stays small."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf
from equilibrium_cases import linear, mlp
from noetherflow.balance.motion import Motion
from noetherflow.balance.torch_file import load_torch
from noetherflow.balance.torch_save import save_torch
from noetherflow.balance.waiting import WaitingTensor
from noetherflow.errors import CheckpointError


def everything() -> dict[str, Any]:
    """Tensors of all kinds that a file may hold, shared and nested ones among them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    state = model.state_dict()
    part, whole = torch.randn(8), torch.randn(12)
    return {
        "model": state, "optimizer": optimizer.state_dict(), "same object": state["0.weight"], "part": part[2:],
        "all of it": part, "turned": torch.randn(3, 4).t(), "other shape": whole.view(3, 4), "whole": whole,
        "same memory": state["3.bias"].detach(), "float8": torch.randn(4).to(torch.float8_e4m3fn),
        "bfloat16": torch.randn(5).bfloat16(), "complex": torch.randn(3, dtype=torch.complex64), "none": torch.empty(0),
        "uint16": torch.ones(3).to(torch.uint16), "number": torch.tensor(2.0), "mask": torch.ones(3, dtype=torch.bool),
        "list": [torch.ones(2), (torch.ones(3), 4)], "parameter": nn.Parameter(torch.ones(2)), "epoch": 3,
        "sparse": torch.eye(3).to_sparse(), "gradient": torch.ones(2, requires_grad=True),
    }  # fmt: skip


def test_rewritten_file_is_that_of_torch_byte_by_byte(tmp_path: Path) -> None:
    for folder in ("in", "torch", "here"):
        (tmp_path / folder).mkdir()
    torch.save(everything(), tmp_path / "in" / "run.pt")
    torch.save(torch.load(tmp_path / "in" / "run.pt", weights_only=True), tmp_path / "torch" / "run.pt")
    content = load_torch(tmp_path / "in" / "run.pt")
    waiting = {name for name, value in content.items() if isinstance(value, WaitingTensor)}
    assert waiting == {"same object", "same memory", "float8", "bfloat16", "complex", "uint16", "number", "mask"}
    assert all(isinstance(t, WaitingTensor) for t in content["model"].values())
    save_torch(content, tmp_path / "here" / "run.pt")
    assert (tmp_path / "here" / "run.pt").read_bytes() == (tmp_path / "torch" / "run.pt").read_bytes()
    save_torch(content, tmp_path / "here" / "größe.pt")
    again = torch.load(tmp_path / "here" / "größe.pt", weights_only=True, mmap=True)
    assert torch.equal(again["model"]["0.weight"], content["model"]["0.weight"])
    assert again["same memory"].data_ptr() == again["model"]["3.bias"].data_ptr()


def test_a_waiting_tensor_is_read_when_it_is_computed_with(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    value = torch.randn(4, 3)
    torch.save({"w": value}, path)
    waiting = load_torch(path)["w"]
    assert waiting.shape == (4, 3)
    assert waiting.dtype == torch.float32
    assert type(waiting + 1) is Tensor
    assert torch.equal(waiting.double().sum(0), value.double().sum(0))
    assert float(waiting.reshape(-1)[5]) == float(value.reshape(-1)[5])
    with pytest.raises(RuntimeError, match="own_copy"):
        waiting.mul_(2)
    with path.open("rb+") as file:
        file.truncate(waiting.source.start + 4)
    with pytest.raises(CheckpointError, match="ended within a tensor"):
        waiting.source.read()


def test_moved_file_is_what_torch_writes_of_the_moved_tensors(tmp_path: Path) -> None:
    """Byte by byte: the file against torch.save of the content with every tensor moved in memory."""
    problem = mlp(scales=(4, 0.5, 1))
    model = problem.model
    optimizer = torch.optim.Adam(model.named_parameters(), amsgrad=True)
    model(problem.data[0]).square().sum().backward()
    optimizer.step()
    eq = nf.noise_equilibrium(model, problem.syms, None, objective="norm")
    state = model.state_dict()
    for folder in ("in", "out", "torch"):
        (tmp_path / folder).mkdir()
    torch.save({"ema": dict(state), "model": state, "optimizer": optimizer.state_dict()}, tmp_path / "in" / "run.pt")
    nf.balance_checkpoint(tmp_path / "in" / "run.pt", tmp_path / "out" / "run.pt", model, eq, unchecked=True)
    content, motion = torch.load(tmp_path / "in" / "run.pt", weights_only=True), Motion.of(eq)
    moved = {n: motion.weight(n, t) if n in motion.by_parameter else t for n, t in content["model"].items()}
    content["model"].update(moved)
    content["ema"].update(moved)
    names = content["optimizer"]["param_groups"][0]["param_names"]
    for n, entries in zip(names, content["optimizer"]["state"].values(), strict=True):
        if n in motion.by_parameter:
            entries["exp_avg"] = motion.gradient(n, entries["exp_avg"])
            entries["exp_avg_sq"] = motion.squares(n, entries["exp_avg_sq"])
            entries["max_exp_avg_sq"] = motion.squares(n, entries["max_exp_avg_sq"])
    torch.save(content, tmp_path / "torch" / "run.pt")
    found = torch.load(tmp_path / "out" / "run.pt", weights_only=True)
    for n, t in content["model"].items():
        torch.testing.assert_close(found["model"][n], t, rtol=1e-14, atol=0)
        assert found["ema"][n].data_ptr() == found["model"][n].data_ptr()
    for key, entries in content["optimizer"]["state"].items():
        for what, t in entries.items():
            torch.testing.assert_close(found["optimizer"]["state"][key][what], t, rtol=1e-14, atol=0)
    assert (tmp_path / "out" / "run.pt").read_bytes() == (tmp_path / "torch" / "run.pt").read_bytes()


@pytest.mark.parametrize("kind", ["diagonal", "offset", "general_linear"])
def test_gradients_and_squares_move_as_weights_of_another_motion(kind: str) -> None:
    """The reference is the rule for gradients itself, on scales (of weights plus an offset too) and on matrices."""
    made = linear([4, 5, 3]) if kind == "general_linear" else mlp()
    offset = 0.7 if kind == "offset" else 0.0
    syms = [replace(s, legs=tuple(replace(leg, offset=offset) for leg in s.legs)) for s in made.syms]
    generator = torch.Generator().manual_seed(0)
    elements = {
        s.name: torch.rand(s.shape, generator=generator, dtype=torch.float64)
        + (2 * torch.eye(s.dim) if s.kind == "general_linear" else 0.5)
        for s in syms
    }
    motion = Motion(syms, elements)
    tried = 0
    for name in motion.by_parameter:
        tensor = torch.randn(made.tensors()[name].shape, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(motion.of_gradients.weight(name, tensor), motion.gradient(name, tensor))
        assert not torch.allclose(motion.weight(name, tensor), motion.gradient(name, tensor))
        if motion.is_torus(name):
            tried += 1
            torch.testing.assert_close(motion.of_squares.weight(name, tensor**2), motion.squares(name, tensor**2))
    assert (tried > 0) == (kind != "general_linear")


def test_state_that_is_no_number_is_named(tmp_path: Path) -> None:
    problem = mlp(scales=(4, 0.5, 1))
    optimizer = torch.optim.Adam(problem.model.named_parameters())
    problem.model(problem.data[0]).sum().backward()
    optimizer.step()
    optimizer.state[problem.model[0].weight]["exp_avg"][0, 0] = float("nan")
    torch.save({"model": problem.model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "in.pt")
    eq = nf.noise_equilibrium(problem.model, problem.syms, None, objective="norm")
    with pytest.raises(CheckpointError, match=r"exp_avg of 0\.weight.*not finite"):
        nf.balance_checkpoint(tmp_path / "in.pt", tmp_path / "out.pt", problem.model, eq, unchecked=True)
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("state", [False, True])
def test_memory_is_that_of_three_tensors(tmp_path: Path, state: bool) -> None:
    """Resident memory, mapped pages included, while a file of several large tensors is moved."""
    script = Path(__file__).with_name("torch_file_memory.py")
    words = [str(tmp_path), "4096", "3", *(["--optimizer"] if state else [])]
    done = subprocess.run([sys.executable, script, *words], check=True, capture_output=True, text=True, timeout=600)
    took = json.loads(done.stdout.splitlines()[-1])
    assert took["file_MB"] > 3 * took["largest_MB"] - 1
    assert took["move_MB"] < 3 * took["largest_MB"], took
    assert took["solve_MB"] < 3 * took["largest_MB"], took


def test_a_file_whose_pages_cannot_be_its_readers_own_is_balanced_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of files larger than memory the system gives pages of the file itself: a write to them would change it."""
    problem = mlp(scales=(4, 0.5, 1))
    model, syms = problem.model, problem.syms
    eq = nf.noise_equilibrium(model, syms, objective="norm")
    source, load = tmp_path / "in.pt", torch.load
    torch.save({"model": model.state_dict()}, source)
    before = source.read_bytes()
    nf.balance_checkpoint(source, tmp_path / "expected.pt", model, eq, example_inputs=problem.data[0])

    def refused(file: Any, **options: Any) -> Any:
        if options.get("mmap") and torch.serialization.get_default_mmap_options() == mmap.MAP_PRIVATE:
            raise RuntimeError("unable to mmap 26953908759 bytes from file: Cannot allocate memory (12)")
        return load(file, **options)

    monkeypatch.setattr(torch, "load", refused)
    nf.balance_checkpoint(source, tmp_path / "out.pt", model, eq, example_inputs=problem.data[0])
    assert source.read_bytes() == before
    expected = load(tmp_path / "expected.pt", weights_only=True)["model"]
    found = load(tmp_path / "out.pt", weights_only=True)["model"]
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert any(not torch.equal(value, model.state_dict()[name]) for name, value in found.items())
