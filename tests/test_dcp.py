"""Folders of torch.distributed.checkpoint: moved in the same form, and never unpickled blindly."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import noetherflow as nf
from dcp_save_sharded import batches, net
from noetherflow.balance.dcp_file import DcpFolder
from noetherflow.balance.run_files import read_run, weights_for
from noetherflow.core.held import held_in
from noetherflow.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def trained() -> tuple[nn.Sequential, torch.optim.AdamW]:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer)
    return model, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for x in batches():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def least_norm(model: nn.Module) -> Any:
    syms = nf.find_symmetries(model, batches()[0][:2])
    return nf.noise_equilibrium(model, syms, None, objective="norm")


def save(content: dict[str, Any], folder: Path) -> Path:
    dcp.save(content, checkpoint_id=folder, no_dist=True)
    return folder


def loaded(template: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What torch's own reader makes of a folder."""
    out = copy.deepcopy(template)
    dcp.load(out, checkpoint_id=folder, no_dist=True)
    return out


def leaves(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from leaves(value, (*path, key))
    elif isinstance(node, Tensor):
        yield path, node


def moved_in_memory(model: nn.Module, optimizer: torch.optim.Optimizer, eq: Any) -> None:
    """The reference: `balance_` of the living model and optimiser."""
    nf.balance_(model, eq, optimizer, example_inputs=batches()[0])


def wrapped(model: nn.Module, optimizer: torch.optim.Optimizer, form: str) -> dict[str, Any]:
    """The content in the forms that people save."""
    weights = get_model_state_dict(model)
    state = get_optimizer_state_dict(model, optimizer)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    return {
        "plain": lambda: {"model": weights, "optim": optimizer.state_dict(), "step": 5},
        "named": lambda: {"model": weights, "optim": state, "run": {"seeds": [1, 2], "name": "a"}},
        "flattened": lambda: {
            "model": weights,
            "optim": get_optimizer_state_dict(model, optimizer, options=options),
        },
        "app": lambda: {"app": {"model": weights, "optim": state}},
        "compiled": lambda: {"model": {f"_orig_mod.{n}": t for n, t in weights.items()}, "optim": state},
        "weights": lambda: dict(weights),
    }[form]()


@pytest.mark.parametrize("form", ["plain", "named", "flattened", "app", "compiled", "weights"])
def test_moved_folder_is_what_balance_makes_of_the_living_model(tmp_path: Path, form: str) -> None:
    model, optimizer = trained()
    eq = least_norm(model)
    content = copy.deepcopy(wrapped(model, optimizer, form))
    source = save(content, tmp_path / "in")
    (source / "notes.txt").write_text("kept")
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    report = nf.balance_checkpoint(source, tmp_path / "out", model, eq, example_inputs=batches()[0])
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before
    assert {p.name for p in (tmp_path / "out").iterdir()} == set(before)
    assert (tmp_path / "out" / "notes.txt").read_text() == "kept"
    assert report.state_entries == (0 if form == "weights" else 6)
    assert not report.unmoved
    moved_in_memory(model, optimizer, eq)
    expected, found = wrapped(model, optimizer, form), loaded(content, tmp_path / "out")
    pairs = list(zip(leaves(expected), leaves(found), strict=True))
    assert len(pairs) == (4 if form == "weights" else 16)
    for (path, a), (other, b) in pairs:
        assert path == other
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-8, msg=str(path))
    original = dict(leaves(content))
    assert not torch.allclose(found_weight(found), found_weight(content)), "or nothing has moved"
    assert all(torch.equal(t, original[p]) for p, t in leaves(found) if p[-1] == "2.bias")


def found_weight(content: dict[str, Any]) -> Tensor:
    return next(t for path, t in leaves(content) if str(path[-1]).endswith("0.weight"))


def test_optimizer_resumed_from_the_moved_folder_is_a_twin(tmp_path: Path) -> None:
    """Scales exact in binary: the resumed run and the one that was moved in memory take the same steps."""
    model, optimizer = trained()
    syms = nf.find_symmetries(model, batches()[0][:2])
    elements = {s.name: 2.0 ** torch.arange(s.blocks).remainder(5).sub(2) for s in syms}
    source = save(wrapped(model, optimizer, "named"), tmp_path / "in")
    nf.move_checkpoint(source, tmp_path / "out", model, syms, elements, example_inputs=batches()[0])
    nf.move_(model, syms, elements, optimizer, example_inputs=batches()[0])
    resumed = net()
    twin = torch.optim.AdamW(resumed.parameters(), lr=1e-2)
    found = loaded(wrapped(model, optimizer, "named"), tmp_path / "out")
    resumed.load_state_dict(found["model"])
    set_optimizer_state_dict(resumed, twin, found["optim"])
    train(model, optimizer)
    train(resumed, twin)
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    fresh = net()
    fresh.load_state_dict(found["model"])
    train(fresh, torch.optim.AdamW(fresh.parameters(), lr=1e-2))
    assert not torch.allclose(fresh[0].weight, resumed[0].weight, rtol=1e-3), "without its state it goes elsewhere"


def test_sharded_by_two_processes(tmp_path: Path) -> None:
    """FSDP2 under gloo: the same parts with the same pieces, at the moved values of the whole tensors."""
    script = Path(__file__).with_name("dcp_save_sharded.py")
    running = [
        subprocess.Popen([sys.executable, script, tmp_path], env={**os.environ, "RANK": str(rank)}) for rank in (0, 1)
    ]
    assert [process.wait(60) for process in running] == [0, 0]
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    nf.load_checkpoint_(model, tmp_path / "dcp")
    assert all(torch.equal(t, whole["model"][n]) for n, t in model.state_dict().items())
    set_optimizer_state_dict(model, optimizer, whole["optim"])
    eq = least_norm(model)
    report = nf.balance_checkpoint(tmp_path / "dcp", tmp_path / "out", model, eq, example_inputs=batches()[0])
    assert report.state_entries == 6
    assert not report.unmoved
    old, new = DcpFolder.open(tmp_path / "dcp"), DcpFolder.open(tmp_path / "out")
    pieces = [
        {n: [(c.part.name, c.offsets, c.sizes) for c in e.chunks] for n, e in f.entries.items()} for f in (old, new)
    ]
    assert pieces[0] == pieces[1]
    assert [p.name for p in new.parts] == ["__0_0.distcp", "__1_0.distcp"]
    assert len(new.entries["model.0.weight"].chunks) == 2, "or nothing is sharded"
    moved_in_memory(model, optimizer, eq)
    expected = wrapped(model, optimizer, "named")
    found = loaded({k: expected[k] for k in ("model", "optim")}, tmp_path / "out")
    for (path, a), (_, b) in zip(leaves({k: expected[k] for k in found}), leaves(found), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-8, msg=str(path))


class Trap:
    """Its pickle makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_hostile_metadata_is_refused_and_nothing_is_run(tmp_path: Path) -> None:
    model, optimizer = trained()
    source, sprung = save(wrapped(model, optimizer, "named"), tmp_path / "in"), tmp_path / "sprung"
    good = pickle.loads((source / ".metadata").read_bytes())
    inside, planner = copy.deepcopy(good), copy.deepcopy(good)
    inside.storage_meta = Trap(sprung)
    planner.planner_data["step"] = Trap(sprung)
    names = {
        "os.mkdir, bare": pickle.dumps(Trap(sprung)), "inside": pickle.dumps(inside), "planner": pickle.dumps(planner),
        "getattr": b"cbuiltins\ngetattr\n.", "dotted": b"\x80\x04\x8c\x05torch\x8c\x0eserialization.os\x93.",
        "by way of torch": b"ctorch.serialization\nos\n.", "load": b"ctorch\nload\n.",
        "attribute": b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x11Metadata.__init__\x93.",
        "no pickle": b"", "a dictionary": pickle.dumps({"a": 1}),
    }  # fmt: skip
    for what, data in names.items():
        (source / ".metadata").write_bytes(data)
        with pytest.raises(CheckpointError, match=r"nothing of it was run|describes no state dict"):
            nf.read_checkpoint(source)
        assert not sprung.exists(), what
    pickle.loads(names["inside"])
    assert sprung.exists(), "or the trap is none"


def test_hostile_parts_are_refused_and_nothing_is_run(tmp_path: Path) -> None:
    """A part with another pickle in the place of a tensor is refused; in that of another object it is copied."""
    model, optimizer = trained()
    eq = least_norm(model)
    for place, refused in (("model.0.weight", True), ("run.name", False)):
        sprung = tmp_path / f"sprung-{place}"
        source = save(wrapped(model, optimizer, "named"), tmp_path / f"in-{place}")
        metadata = pickle.loads((source / ".metadata").read_bytes())
        key = next(k for k in metadata.storage_data if k.fqn == place)
        info = metadata.storage_data[key]
        part = source / info.relative_path
        with part.open("ab") as file:
            info.offset = file.tell()
            torch.save(Trap(sprung), file)
            info.length = file.tell() - info.offset
        (source / ".metadata").write_bytes(pickle.dumps(metadata))
        target = tmp_path / f"out-{place}"
        if refused:
            with pytest.raises(CheckpointError, match=r"model.0.weight.*could run code|model.0.weight.*cut off|mkdir"):
                nf.balance_checkpoint(source, target, model, eq)
            assert not target.exists()
        else:
            report = nf.balance_checkpoint(source, target, model, eq)
            assert any("run.name" in line and "not looked into" in line for line in report.unmoved)
            joined = nf.balance_checkpoint(source, tmp_path / "joined.pt", model, eq)
            assert any("run.name" in line and "not written" in line for line in joined.unmoved)
            assert set(torch.load(tmp_path / "joined.pt", weights_only=True)["run"]) == {"seeds"}
        assert not sprung.exists()


def test_what_is_missing_or_cut_off_is_named(tmp_path: Path) -> None:
    model, optimizer = trained()
    source = save(wrapped(model, optimizer, "named"), tmp_path / "in")
    part, data = source / "__0_0.distcp", (source / "__0_0.distcp").read_bytes()
    part.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is cut off: .* lies at bytes"):
        nf.read_checkpoint(source)
    part.unlink()
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is missing"):
        nf.read_checkpoint(source)
    part.write_bytes(data)
    metadata = (source / ".metadata").read_bytes()
    (source / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"parts .* but no \.metadata"):
        nf.read_checkpoint(source)
    with pytest.raises(CheckpointError, match=r"one file of .* name the folder"):
        nf.read_checkpoint(part)
    (source / "__0.metadata").write_bytes(metadata)
    with pytest.raises(CheckpointError, match="save again with one"):
        nf.read_checkpoint(source)
    (source / ".metadata").write_bytes(metadata)
    with pytest.raises(CheckpointError, match=r"one file of .* name the folder"):
        nf.read_checkpoint(source / ".metadata")
    save({"model": dict(model.state_dict())}, tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"name the one of the folders in it \(in, other\)"):
        nf.read_checkpoint(tmp_path)


@pytest.mark.parametrize("where", ["../out.distcp", "/etc/passwd", "sub/part.distcp", "link.distcp"])
def test_parts_outside_the_folder_are_refused(tmp_path: Path, where: str) -> None:
    source = save(dict(trained()[0].state_dict()), tmp_path / "in")
    (tmp_path / "out.distcp").write_bytes((source / "__0_0.distcp").read_bytes())
    (source / "link.distcp").symlink_to(tmp_path / "out.distcp")
    metadata = pickle.loads((source / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = where
    (source / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="no file of that folder"):
        nf.read_checkpoint(source)


def test_pieces_that_do_not_make_up_a_tensor_are_refused(tmp_path: Path) -> None:
    source = save(dict(trained()[0].state_dict()), tmp_path / "in")
    metadata = pickle.loads((source / ".metadata").read_bytes())
    metadata.state_dict_metadata["0.weight"].size = torch.Size([32, 6])
    (source / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"pieces of 0\.weight do not make up its shape \(32, 6\)"):
        nf.read_checkpoint(source)
    metadata.state_dict_metadata["0.weight"].size = torch.Size([16, 6])
    metadata.state_dict_metadata["0.weight"].properties = None
    (source / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="is damaged"):
        nf.read_checkpoint(source)


@pytest.mark.parametrize("options", [{"single_file_per_rank": False}, {"thread_count": 3}])
def test_every_layout_of_the_writer_is_kept(tmp_path: Path, options: dict[str, Any]) -> None:
    model, optimizer = trained()
    eq = least_norm(model)
    content = copy.deepcopy(wrapped(model, optimizer, "named"))
    dcp.save(content, storage_writer=dcp.FileSystemWriter(tmp_path / "in", **options), no_dist=True)
    assert len(list((tmp_path / "in").glob("*.distcp"))) > 2
    nf.balance_checkpoint(tmp_path / "in", tmp_path / "out", model, eq, example_inputs=batches()[0])
    assert sorted(p.name for p in (tmp_path / "in").iterdir()) == sorted(p.name for p in (tmp_path / "out").iterdir())
    moved_in_memory(model, optimizer, eq)
    for (path, a), (_, b) in zip(
        leaves(wrapped(model, optimizer, "named")), leaves(loaded(content, tmp_path / "out")), strict=True
    ):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-8, msg=str(path))


@pytest.mark.parametrize("after", [1, 3])
def test_an_interrupted_write_leaves_nothing(tmp_path: Path, after: int) -> None:
    model, optimizer = trained()
    source = save(wrapped(model, optimizer, "named"), tmp_path / "in")
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    seen: list[str] = []

    def stop(name: str) -> None:
        seen.append(name)
        if len(seen) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nf.balance_checkpoint(source, tmp_path / "out", model, least_norm(model), progress=stop)
    assert {p.name for p in tmp_path.iterdir()} == {"in"}
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before


def test_a_dry_run_writes_nothing_and_says_the_same(tmp_path: Path) -> None:
    model, optimizer = trained()
    source, eq = save(wrapped(model, optimizer, "named"), tmp_path / "in"), least_norm(model)
    dry = nf.balance_checkpoint(source, tmp_path / "out", model, eq, example_inputs=batches()[0], dry_run=True)
    assert not (tmp_path / "out").exists()
    real = nf.balance_checkpoint(source, tmp_path / "out", model, eq, example_inputs=batches()[0])
    assert dry.moved == real.moved
    assert dry.state_entries == real.state_entries == 6


def test_state_that_nothing_assigns_stays_and_is_listed(tmp_path: Path) -> None:
    """Two layers of one shape, and state by position alone; with the optimiser it moves."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer)
    eq = least_norm(model)
    source = save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "in")
    report = nf.balance_checkpoint(source, tmp_path / "out", model, eq)
    assert report.state_entries == 0
    assert any("by position alone" in line for line in report.unmoved)
    before, after = (loaded({"optimizer": optimizer.state_dict()}, tmp_path / n) for n in ("in", "out"))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(leaves(before), leaves(after), strict=True))
    report = nf.balance_checkpoint(source, tmp_path / "again", model, eq, optimizer=optimizer)
    assert report.state_entries == 5
    assert not report.unmoved


def test_state_in_a_folder_beside_is_listed(tmp_path: Path) -> None:
    model, optimizer = trained()
    source = save({"model": model.state_dict()}, tmp_path / "pytorch_model_fsdp_0")
    save({"optimizer": get_optimizer_state_dict(model, optimizer)}, tmp_path / "optimizer_0")
    report = nf.balance_checkpoint(source, tmp_path / "out", model, least_norm(model))
    assert any("optimizer_0/ beside" in line for line in report.unmoved)


@pytest.mark.parametrize("weights", ["parts", "file"])
def test_a_folder_with_parts_for_weights_and_state_moves_as_one(tmp_path: Path, weights: str) -> None:
    """As accelerate saves FSDP models with sharded state dicts; or with weights in one file beside the state."""
    model, optimizer = trained()
    eq = least_norm(model)
    run = tmp_path / "checkpoint-10"
    run.mkdir()
    template = copy.deepcopy({"optimizer": get_optimizer_state_dict(model, optimizer)})
    if weights == "parts":
        save({"model": dict(model.state_dict())}, run / "pytorch_model_fsdp_0")
        (run / "pytorch_model_fsdp_0" / "extra.json").write_text("{}")
    else:
        torch.save(model.state_dict(), run / "pytorch_model.bin")
    save(template, run / "optimizer_0")
    (run / "scheduler.pt").write_bytes(b"kept")
    (run / "trainer_state.json").write_text("{}")
    report = nf.balance_checkpoint(run, tmp_path / "out", model, eq, example_inputs=batches()[0])
    assert report.state_entries == 6
    assert not report.unmoved
    old, new = (sorted(str(p.relative_to(f)) for p in f.rglob("*")) for f in (run, tmp_path / "out"))
    assert old == new
    assert (tmp_path / "out" / "scheduler.pt").read_bytes() == b"kept"
    moved_in_memory(model, optimizer, eq)
    found = nf.read_checkpoint(tmp_path / "out")
    for n, t in model.state_dict().items():
        torch.testing.assert_close(found[n], t, rtol=1e-6, atol=1e-8)
    state = loaded(template, tmp_path / "out" / "optimizer_0")
    expected = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    for (path, a), (_, b) in zip(leaves(expected), leaves(state), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-8, msg=str(path))


def test_joined_into_one_file_and_solved_from_the_disk(tmp_path: Path) -> None:
    model, optimizer = trained()
    source = save(wrapped(model, optimizer, "named"), tmp_path / "in")
    with torch.device("meta"):
        outline = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    eq = nf.stored_equilibrium(source, outline, nf.find_symmetries(model, batches()[0][:2]))
    for name in ("joined.pt", "joined.safetensors"):
        nf.balance_checkpoint(source, tmp_path / name, outline, eq, unchecked=True)
    nf.balance_checkpoint(source, tmp_path / "out", outline, eq, unchecked=True)
    expected = nf.read_checkpoint(tmp_path / "out")
    for name in ("joined.pt", "joined.safetensors"):
        found = nf.read_checkpoint(tmp_path / name)
        assert all(torch.equal(found[n], t) for n, t in expected.items())
    content = torch.load(tmp_path / "joined.pt", weights_only=True)
    assert content["run"] == {"seeds": [1, 2], "name": "a"}
    assert content["optim"]["param_groups"][0]["params"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    norm = sum(float(t.square().sum()) for t in expected.values())
    assert norm < sum(float(p.detach().square().sum()) for p in model.parameters())


@pytest.mark.parametrize("form", ["plain", "named", "flattened", "app"])
def test_weights_and_state_of_a_run_are_those_of_the_living_optimizer(tmp_path: Path, form: str) -> None:
    model, optimizer = trained()
    run = read_run(save(wrapped(model, optimizer, form), tmp_path / "in"))
    assert all(torch.equal(weights_for(model, run.weights)[n], p) for n, p in model.named_parameters())
    for held, p in zip(held_in(run.optimizer, model, ("exp_avg", "exp_avg_sq")), model.parameters(), strict=True):
        assert all(torch.equal(held.state[key], value) for key, value in optimizer.state[p].items())
        assert held.settings["lr"] == 1e-2
    with pytest.raises(CheckpointError, match=r"holds no optimizer\.state_dict"):
        read_run(save({"model": dict(model.state_dict())}, tmp_path / "weights"))
