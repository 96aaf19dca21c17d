"""Files are written whole or not at all, and what cannot be moved rightly is refused with the way out."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import noetherflow as nf
from equilibrium_cases import mlp
from noetherflow.balance.checkpoint import balance_checkpoint, load_checkpoint_, read_checkpoint
from noetherflow.balance.motion import Motion
from noetherflow.balance.pieces import leg_gram_of, move_in_place
from noetherflow.balance.staging import staged
from noetherflow.errors import CheckpointError


def least_norm(problem: Any) -> Any:
    return nf.noise_equilibrium(problem.model, problem.syms, None, objective="norm")


def sharded(state: dict[str, torch.Tensor], folder: Path, shards: int) -> None:
    """A folder as `save_pretrained` writes it."""
    folder.mkdir(parents=True)
    names = list(state)
    weight_map = {}
    for k in range(shards):
        file = f"model-{k + 1:05d}-of-{shards:05d}.safetensors"
        own = {n: state[n].clone() for n in names[k::shards]}
        save_file(own, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text("{}")


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def removed(folder: Path) -> None:
    for path in folder.iterdir() if folder.exists() else ():
        path.unlink()
    if folder.exists():
        folder.rmdir()


@pytest.mark.slow
def test_killed_at_any_instant(tmp_path: Path) -> None:
    """SIGKILL at 50 random instants or more: source intact, target absent or whole, no litter after the next run."""
    problem = mlp((64, 700, 600, 3), scales=(4, 0.5, 1))
    eq = least_norm(problem)
    source, target = tmp_path / "in", tmp_path / "out"
    sharded(problem.model.state_dict(), source, 3)
    before = contents(source)
    began = time.perf_counter()
    balance_checkpoint(source, target, problem.model, eq, unchecked=True)
    duration = time.perf_counter() - began
    whole = contents(target)
    rng, kills, absent, litter = random.Random(0), 0, 0, 0
    while kills < 50 or (kills < 500 and (absent <= 10 or litter <= 5)):  # on a busy machine the instants are others
        kills += 1
        removed(target)
        child = os.fork()
        if child == 0:
            balance_checkpoint(source, target, problem.model, eq, unchecked=True)
            os._exit(0)
        time.sleep(rng.uniform(0, 1.1 * duration))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert contents(source) == before
        assert not target.exists() or contents(target) == whole
        absent += not target.exists()
        litter += any(p.name.startswith(".out.partial") for p in tmp_path.iterdir())
    assert absent > 10, "many were killed before the end"
    assert litter > 5, "many were killed while they wrote"
    removed(target)
    balance_checkpoint(source, target, problem.model, eq, unchecked=True)
    assert contents(target) == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_litter_of_running_writers_stays(tmp_path: Path) -> None:
    with staged(tmp_path / "out.pt") as first:
        first.write_bytes(b"first")
        with staged(tmp_path / "out.pt") as second:
            second.write_bytes(b"second")
        assert first.read_bytes() == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["out.pt"]
    (tmp_path / ".out.pt.partial-dead").mkdir()
    with staged(tmp_path / "out.pt") as third:
        third.write_bytes(b"third")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"third"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_pieces_are_the_whole(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Cut along any axis, with views, offsets and matrices: the same numbers as the move of the whole tensor."""
    monkeypatch.setattr("noetherflow.balance.cuts.PIECE", 40)

    def rows(n: int, dim: int = 1) -> np.ndarray:
        return np.arange(n * dim).reshape(n, dim, 1)

    legs = {
        "matrix": nf.Leg("w", rows(4, 6)),
        "columns": nf.Leg("w", rows(16), -1, (1,)),
        "pairs": nf.Leg("w", rows(12), 1, (0, 2), (4, 2, 3, 16)),
        "gain": nf.Leg("w", rows(16), 1, (1,), None, 1.0, False, 1.0),
    }
    torch.manual_seed(0)
    weight = torch.randn(24, 16).to(dtype)
    for names in (["matrix"], ["columns"], ["pairs"], ["matrix", "columns"], ["columns", "pairs"], ["gain"]):
        symmetries = [
            nf.Symmetry(n, "test", "general_linear" if n == "matrix" else "diagonal", (legs[n],)) for n in names
        ]
        motion = Motion(symmetries, {s.name: s.random_element() for s in symmetries})
        expected, moved = motion.weight("w", weight), weight.clone()
        shift = move_in_place(motion, "w", moved)
        torch.testing.assert_close(moved.double(), expected.to(dtype).double(), rtol=1e-14, atol=1e-14)
        change = (moved.double() - weight.double()).norm() / weight.double().norm()
        assert shift.change == pytest.approx(float(change), rel=1e-9)
        rounding = (moved.double() - expected).norm() / expected.norm()
        assert shift.rounding == pytest.approx(float(rounding), rel=1e-6, abs=1e-15)
        for s in symmetries:
            position = weight.double() + s.offsets.get("w", 0.0)
            torch.testing.assert_close(leg_gram_of(s, s.legs[0], weight), s.leg_gram(s.legs[0], position))


class Twins(nn.Module):
    """Two networks of the same shapes in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        self.second = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def trained_twins(order: str) -> tuple[Any, torch.optim.Optimizer, Any]:
    """Twins whose optimiser has them in the model's order, swapped, or named and swapped."""
    torch.manual_seed(0)
    model = Twins().double()
    with torch.no_grad():
        model.second[0].weight.mul_(4)
    x = torch.randn(32, 4).double()
    swapped: list[Any] = [*model.second.parameters(), *model.first.parameters()]
    if order == "model":
        swapped = list(model.parameters())
    if order == "named":
        swapped = [*model.second.named_parameters(prefix="second"), *model.first.named_parameters(prefix="first")]
    optimizer = torch.optim.SGD(swapped, lr=1e-3, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    syms = nf.find_symmetries(model, x[:2])
    return model, optimizer, nf.noise_equilibrium(model, syms, None, objective="norm")


@pytest.mark.parametrize(
    ("order", "options", "right"),
    [("swapped", {}, False), ("model", {}, False), ("named", {}, True), ("model", {"state_order": "parameters"}, True),
     ("swapped", {"optimizer": True}, True)],
)  # fmt: skip
def test_state_moves_with_its_own_weights_or_not_at_all(
    tmp_path: Path, order: str, options: dict[str, Any], right: bool
) -> None:
    model, optimizer, eq = trained_twins(order)
    given = {k: optimizer if k == "optimizer" else v for k, v in options.items()}
    path, out = tmp_path / "a.pt", tmp_path / "b.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    report = balance_checkpoint(path, out, model, eq, **given)
    new = torch.load(out)["optimizer"]["state"]
    old = optimizer.state_dict()["state"]
    if not right:
        (line,) = report.unmoved
        assert all(word in line for word in ("order", "optimizer=", "state_order='parameters'", "named_parameters"))
        assert all(torch.equal(new[k]["momentum_buffer"], old[k]["momentum_buffer"]) for k in old)
        return
    assert report.unmoved == ()
    nf.balance_(model, eq, optimizer)
    for k, state in optimizer.state_dict()["state"].items():
        torch.testing.assert_close(new[k]["momentum_buffer"], state["momentum_buffer"], rtol=1e-14, atol=0)


def test_a_wrong_order_is_contradicted_by_the_momenta(tmp_path: Path) -> None:
    """Even where the caller vouches for the order: exchanged momenta break the conservation law that gradients obey."""
    for order, wrong in (("swapped", True), ("model", False)):
        model, optimizer, eq = trained_twins(order)
        path = tmp_path / f"{order}.pt"
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
        report = balance_checkpoint(path, tmp_path / "out.pt", model, eq, state_order="parameters")
        assert ("obey the symmetries only when they are exchanged" in "".join(report.unmoved)) == wrong
        assert bool(report.state_entries) != wrong


def test_names_of_another_model_in_the_state_are_not_taken_by_position(tmp_path: Path) -> None:
    model, optimizer, eq = trained_twins("named")
    saved = optimizer.state_dict()
    saved["param_groups"][0]["param_names"] = [f"other.{k}" for k in range(8)]
    torch.save({"model": model.state_dict(), "optimizer": saved}, tmp_path / "a.pt")
    report = balance_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt", model, eq)
    assert "names are not the model's" in report.unmoved[0]
    saved["param_groups"][0]["param_names"] = [
        f"_orig_mod.{n}" for n in [*(f"second.{k}" for k, _ in model.second.named_parameters()),
                                   *(f"first.{k}" for k, _ in model.first.named_parameters())]
    ]  # fmt: skip
    torch.save({"model": model.state_dict(), "optimizer": saved}, tmp_path / "a.pt")
    assert balance_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt", model, eq).unmoved == ()


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "base_model.model.", "net."]
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_prefixes_are_found_and_said(tmp_path: Path, prefix: str, suffix: str) -> None:
    problem = mlp(scales=(4, 0.5, 1))
    state = {prefix + n: t for n, t in problem.model.state_dict().items()}
    path, out = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state, "ema": dict(state)}, path)
    given = {"prefix": prefix} if prefix == "net." else {}
    if given:
        with pytest.raises(CheckpointError, match=r"--prefix"):
            load_checkpoint_(problem.model, path)
    load_checkpoint_(problem.model, path, **given)
    report = balance_checkpoint(path, out, problem.model, least_norm(problem), unchecked=True, **given)
    assert f"prefix {prefix!r}" in str(report)
    assert (report.averages == ("ema (6 tensors)",)) == (suffix == ".pt")
    plain = tmp_path / "plain.safetensors"
    save_file(problem.model.state_dict(), plain)
    balance_checkpoint(plain, plain, problem.model, least_norm(problem), unchecked=True)
    for name, tensor in read_checkpoint(plain).items():
        assert torch.equal(read_checkpoint(out)[prefix + name], tensor)


def test_other_tensors_under_a_given_prefix_stay_and_are_listed(tmp_path: Path) -> None:
    problem = mlp(scales=(4, 0.5, 1))
    state = {f"net.{n}": t for n, t in problem.model.state_dict().items()} | {"teacher.0.weight": torch.ones(8, 6)}
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    eq = least_norm(problem)
    report = balance_checkpoint(
        tmp_path / "a.ckpt", tmp_path / "b.ckpt", problem.model, eq, unchecked=True, prefix="net."
    )
    assert any("teacher.0.weight" in line for line in report.unmoved)
    assert torch.equal(read_checkpoint(tmp_path / "b.ckpt")["teacher.0.weight"], torch.ones(8, 6))


def test_nested_weights_and_harmless_objects(tmp_path: Path) -> None:
    problem = mlp(scales=(4, 0.5, 1))
    eq, state = least_norm(problem), problem.model.state_dict()
    args = argparse.Namespace(lr=0.1, betas=(0.9, 0.99), path=Path("x"))
    extra = {
        "args": args,
        "loss": np.float64(0.5),
        "curve": np.arange(3.0),
        "rng": np.random.RandomState(0).get_state(),
    }
    torch.save({"trainer": {"nets": {"policy": state, "critic": {"w": torch.ones(2)}}}, **extra}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="no named tensors"):
        read_checkpoint(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"nothing under 'trainer\.actor'"):
        read_checkpoint(tmp_path / "a.pt", key="trainer.actor")
    key = "trainer.nets.policy"
    balance_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt", problem.model, eq, unchecked=True, key=key)
    moved = read_checkpoint(tmp_path / "b.pt", key=key)
    assert not torch.equal(moved["0.weight"], state["0.weight"])
    new = torch.load(tmp_path / "b.pt", weights_only=False)
    assert (new["args"], new["loss"]) == (args, 0.5)
    assert np.array_equal(new["curve"], extra["curve"])
    torch.save({"policy": state, "epoch": 3}, tmp_path / "one.pt")
    assert read_checkpoint(tmp_path / "one.pt").keys() == state.keys(), "the only dictionary of tensors"
    torch.save({"a": state, "b": state}, tmp_path / "two.pt")
    with pytest.raises(CheckpointError, match=r"\['a', 'b'\]: say which by key="):
        read_checkpoint(tmp_path / "two.pt")


class Unsafe:
    """Something that would end the process if it were unpickled."""

    def __reduce__(self) -> Any:
        return os._exit, (3,)


def test_files_that_cannot_be_moved_are_refused_with_the_way_out(tmp_path: Path) -> None:
    problem = mlp(scales=(4, 0.5, 1))
    state, eq = problem.model.state_dict(), least_norm(problem)
    torch.save({"model": state, "what": Unsafe()}, tmp_path / "unsafe.pt")
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(20))
    (tmp_path / "renamed.bin").write_bytes(b"GGUF" + bytes(20))
    sharded(state, tmp_path / "in", 3)
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").write_bytes(b"")
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero" / "zero_to_fp32.py").write_text("")
    (tmp_path / "none").mkdir()
    sharded(state, tmp_path / "twice", 2)
    torch.save(state, tmp_path / "twice" / "pytorch_model.bin")
    sharded(state, tmp_path / "lost", 2)
    (tmp_path / "lost" / "model-00002-of-00002.safetensors").unlink()
    sharded(state, tmp_path / "bare", 2)
    (tmp_path / "bare" / "model.safetensors.index.json").unlink()
    refusals = {
        "unsafe.pt": r"add_safe_globals", "model.gguf": r"GGUF.*convert", "renamed.bin": r"GGUF.*convert",
        "in/model-00001-of-00003.safetensors": r"one of 3 shards.*index\.json", "dcp": r"nothing of it was run",
        "bare/model-00002-of-00002.safetensors": r"one of 2 shards.*index", "bare": r"no index",
        "zero": r"zero_to_fp32", "none": r"looked for model\.safetensors", "twice": r"twice",
        "lost": r"names shards that are not there",
        "lost/model-00001-of-00002.safetensors": r"one of 2 shards",
    }  # fmt: skip
    for name, why in refusals.items():
        with pytest.raises(CheckpointError, match=why):
            balance_checkpoint(tmp_path / name, tmp_path / "out.safetensors", problem.model, eq, unchecked=True)
    assert not (tmp_path / "out.safetensors").exists()
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="must be a new one"):
        balance_checkpoint(tmp_path / "in", tmp_path / "there", problem.model, eq, unchecked=True)


def test_quantised_weights_and_a_full_disk_are_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = mlp(scales=(4, 0.5, 1))
    eq = least_norm(problem)
    path, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(problem.model.state_dict(), path)
    usage = argparse.Namespace(free=10)
    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda _: usage)
        with pytest.raises(CheckpointError, match=r"takes .* GB .* free"):
            balance_checkpoint(path, out, problem.model, eq, unchecked=True)
    whole = {n: (20 * t).round().to(torch.int8) for n, t in problem.model.state_dict().items()}
    save_file(whole, path)
    with torch.no_grad():
        for n, t in problem.model.state_dict().items():
            t.copy_(whole[n])
    with pytest.raises(CheckpointError, match="quantised"):
        balance_checkpoint(path, out, problem.model, least_norm(problem), unchecked=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_folder_with_averages_and_what_stays(tmp_path: Path) -> None:
    """Averages move, schedulers and unknown files are copied, folders inside and foreign tensors are listed."""
    problem = mlp(scales=(4, 0.5, 1))
    state, source, target = problem.model.state_dict(), tmp_path / "in", tmp_path / "out"
    sharded(state, source, 3)
    save_file({n: 0.9 * t for n, t in state.items()}, source / "ema.safetensors")
    save_file({"x": torch.ones(3)}, source / "other.safetensors")
    torch.save({"shadow": {n: 0.8 * t for n, t in state.items()}, "decay": 0.9}, source / "ema.pt")
    torch.save({"last_epoch": 3}, source / "scheduler.pt")
    torch.save({"a": Unsafe()}, source / "training_args.bin")
    torch.save({"a": Unsafe()}, source / "optimizer.pt")
    (source / "inside").mkdir()
    save_file({"x": torch.ones(3)}, source / "inside" / "model.safetensors")
    report = balance_checkpoint(source, target, problem.model, least_norm(problem), unchecked=True)
    assert report.averages == ("ema.pt.shadow (6 tensors)", "ema.safetensors (6 tensors)")
    said = "\n".join(report.unmoved)
    assert all(n in said for n in ("inside/", "optimizer.pt", "other.safetensors"))
    assert "training_args" not in said
    same = {"other.safetensors", "scheduler.pt", "training_args.bin", "optimizer.pt", "config.json"}
    assert all((target / n).read_bytes() == (source / n).read_bytes() for n in same)
    moved, ema = read_checkpoint(target), load_file(target / "ema.safetensors")
    for n in state:
        torch.testing.assert_close(ema[n], 0.9 * moved[n])
    single = tmp_path / "one.safetensors"
    joined = balance_checkpoint(source, single, problem.model, least_norm(problem), unchecked=True)
    assert all(torch.equal(t, moved[n]) for n, t in load_file(single).items())
    assert any("ema.safetensors beside" in line for line in joined.unmoved)
    assert any("optimizer.pt beside" in line for line in joined.unmoved)


def test_tied_names_that_differ_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    state = {n: t.clone() for n, t in model.state_dict().items()}
    model[2].weight = model[0].weight
    for path in (tmp_path / "a.pt", tmp_path / "a.safetensors"):
        save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
        before = model[0].weight.detach().clone()
        with pytest.raises(CheckpointError, match=r"0\.weight and 2\.weight differ.*ties them"):
            load_checkpoint_(model, path)
        assert torch.equal(model[0].weight, before)
    save_file({n: state["0.weight"].clone() for n in state}, tmp_path / "same.safetensors")
    load_checkpoint_(model, tmp_path / "same.safetensors")
    assert torch.equal(model[2].weight, state["0.weight"])
