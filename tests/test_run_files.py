"""`noetherflow flow`: a run on disk says the same as the living model and optimiser."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import pytest
import torch

import noetherflow as nf
from noetherflow.balance.run_files import read_run, weights_for
from noetherflow.cli import main
from noetherflow.equilibrium.state_flow import RunSnapshot, state_flow
from noetherflow.errors import CheckpointError

transformers = pytest.importorskip("transformers")


def trained_llama() -> tuple[Any, torch.optim.Optimizer]:
    """A small Llama after five steps of AdamW with the groups of the Hugging Face Trainer."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_cache=False, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    kept = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}], lr=1e-3
    )
    for _ in range(5):
        tokens = torch.randint(50, (4, 8))
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    return model.eval(), optimizer


@pytest.mark.parametrize("shard", ["1MB", "4KB"])
def test_a_trainer_folder_without_its_weights_in_memory(tmp_path: Path, capsys: Any, shard: str) -> None:
    model, optimizer = trained_llama()
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "4KB")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    syms = nf.find_symmetries(model, {"input_ids": torch.zeros(2, 5, dtype=torch.long)})
    expected = state_flow(model, syms, optimizer)
    capsys.readouterr()
    found = {s["symmetry"]: s for s in json.loads(printed(capsys, "flow", str(tmp_path), "--json"))["symmetries"]}
    assert {d.family for d in expected.details} >= {"gated", "norm-gain", "rotary-qk"}
    for detail in expected.details:
        torch.testing.assert_close(torch.tensor(found[detail.name]["charge"], dtype=torch.float64), detail.charge)
        element = torch.tensor(found[detail.name]["from_momentum"]["element"], dtype=torch.float64)
        torch.testing.assert_close(element, detail.best.element)
    text = printed(capsys, "flow", str(tmp_path), "--layers")
    assert "5 steps" in text
    assert "uncorrelated" in text


def printed(capsys: Any, *words: str) -> str:
    """What the command prints when it ends well."""
    with pytest.raises(SystemExit) as end:
        main(list(words))
    assert not end.value.code
    return str(capsys.readouterr().out)


def test_one_file_with_both(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}, tmp_path / "run.pt")
    run = read_run(tmp_path / "run.pt")
    weights = weights_for(net, run.weights)
    assert all(torch.equal(weights[n], p) for n, p in net.named_parameters())
    assert run.optimizer["state"][0]["exp_avg"].shape == (4, 3)
    both = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(both, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert read_run(tmp_path / "old.pt").optimizer["state"][0]["exp_avg"].shape == (4, 3)
    other = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
    with pytest.raises(CheckpointError, match="instead of"):
        weights_for(other, run.weights)


def test_a_file_larger_than_memory_is_mapped_as_it_is_and_left_alone(tmp_path: Path, monkeypatch: Any) -> None:
    """The system refuses pages of one's own of such a file; pages of the file itself give the same flow."""
    model, optimizer, syms, _ = small_run()
    path = tmp_path / "run.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    before, load, shared = path.read_bytes(), torch.load, []

    def refused(*args: Any, **kwargs: Any) -> Any:
        shared.append(torch.serialization.get_default_mmap_options() == mmap.MAP_SHARED)
        if not shared[-1]:
            raise RuntimeError("unable to mmap 26953908759 bytes from file: Cannot allocate memory (12)")
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", refused)
    run = read_run(path)
    found = state_flow(model, syms, [RunSnapshot(run.optimizer, weights_for(model, run.weights))])
    assert any(shared), "the file was mapped in pages of its own"
    assert torch.serialization.get_default_mmap_options() == mmap.MAP_PRIVATE
    for detail, expected in zip(found.details, state_flow(model, syms, optimizer).details, strict=True):
        torch.testing.assert_close(detail.from_momentum.drift, expected.from_momentum.drift)
    del run, found
    assert path.read_bytes() == before


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights"):
        read_run(tmp_path)
    net = torch.nn.Linear(2, 2)
    torch.save(net.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no optimiser state"):
        read_run(tmp_path)
    torch.save({"step": 3}, tmp_path / "optimizer.pt")
    with pytest.raises(CheckpointError, match="param_groups"):
        read_run(tmp_path)
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="holds no weights"):
        read_run(tmp_path / "other.pt")


def stored_state(optimizer: torch.optim.Optimizer, model: torch.nn.Module, style: str) -> dict[str, Any]:
    """Flat tensors of an optimiser's state as three projects name them, contiguous for safetensors."""
    names = {i: n for i, (n, _) in enumerate(model.named_parameters())}
    out = {}
    for i, entries in optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            name = {"number": f"state/{i}/{key}", "named": f"optimizer.state.{names[i]}.{key}",
                    "turned": f"{key}.{names[i]}"}[style]  # fmt: skip
            out[name] = value.contiguous().clone()
    return out


def small_run(steps: int = 5) -> tuple[torch.nn.Module, torch.optim.Optimizer, nf.SymmetrySet, Any]:
    """A small net, AdamW on it, its symmetries, and a function that makes a step."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    x, y = torch.randn(64, 6), torch.randn(64, 2)

    def step() -> None:
        chosen = torch.randint(64, (8,))
        optimizer.zero_grad()
        (net(x[chosen]) - y[chosen]).square().mean().backward()
        optimizer.step()

    for _ in range(steps):
        step()
    return net, optimizer, nf.find_symmetries(net, (x[:2],)), step


@pytest.mark.parametrize("style", ["number", "named", "turned"])
@pytest.mark.parametrize("groups", ["metadata", "beside"])
def test_a_state_in_safetensors(tmp_path: Path, style: str, groups: str) -> None:
    from safetensors.torch import save_file

    net, optimizer, syms, _ = small_run()
    save_file({n: p.detach().clone() for n, p in net.named_parameters()}, tmp_path / "model.safetensors")
    said = optimizer.state_dict()["param_groups"]
    if style != "number":
        said = [{k: v for k, v in g.items() if k != "params"} for g in said]
    text = json.dumps(said)
    metadata = {"param_groups": text} if groups == "metadata" else None
    save_file(stored_state(optimizer, net, style), tmp_path / "optimizer.safetensors", metadata)
    if groups == "beside":
        with pytest.raises(CheckpointError, match="no parameter groups"):
            read_run(tmp_path)
        (tmp_path / "optimizer_param_groups.json").write_text(text)
    run = read_run(tmp_path)
    found = state_flow(net, syms, run.optimizer, weights=weights_for(net, run.weights))
    assert found.to_dict() == state_flow(net, syms, optimizer).to_dict()


def test_a_tensor_that_is_no_state_is_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    save_file({"0.secret": torch.zeros(2)}, tmp_path / "optimizer.safetensors", {"param_groups": '[{"lr": 0.1}]'})
    with pytest.raises(CheckpointError, match=r"0\.secret"):
        read_run(tmp_path)


def test_several_checkpoints_are_averaged(tmp_path: Path, capsys: Any) -> None:
    """Mean and standard error over three folders, against the three flows one by one."""
    net, optimizer, syms, step = small_run(300)
    singles = []
    for k in range(3):
        for _ in range(40):
            step()
        torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / f"{k}.pt")
        singles.append(state_flow(net, syms, optimizer).details[0])
    model_file = tmp_path / "small_factory.py"
    model_file.write_text(
        "import torch\n"
        "def make():\n"
        "    net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))\n"
        "    return net, (torch.randn(2, 6),)\n"
    )
    import sys

    sys.path.insert(0, str(tmp_path))
    try:
        files = [str(tmp_path / f"{k}.pt") for k in (2, 0, 1)]
        text = printed(capsys, "flow", *files, "--model", "small_factory:make", "--json")
        found = json.loads(text)
        assert "mean of 3 snapshots" in printed(capsys, "flow", *files, "--model", "small_factory:make")
    finally:
        sys.path.remove(str(tmp_path))
    (row,) = [s for s in found["symmetries"] if s["symmetry"] == singles[0].name]
    assert (found["snapshots"], found["steps"]) == (3, 420)
    noises = torch.stack([d.from_momentum.noise for d in singles])
    as_tensor = lambda values: torch.tensor(values, dtype=torch.float64)
    torch.testing.assert_close(as_tensor(row["from_momentum"]["noise"]), noises.mean(0))
    torch.testing.assert_close(as_tensor(row["charge"]), torch.stack([d.charge for d in singles]).mean(0))
    first, second = single_leg_noises(tmp_path, net, syms)
    expected = ((first.var(0) + second.var(0)) / 3).sqrt()
    torch.testing.assert_close(as_tensor(row["from_momentum"]["error"]), expected, rtol=1e-6, atol=0.0)


def single_leg_noises(folder: Path, net: torch.nn.Module, syms: nf.SymmetrySet) -> tuple[torch.Tensor, torch.Tensor]:
    """The noise of the rows with their biases and of the columns, `[snapshots, units]`, written out."""
    rows, columns = [], []
    for k in range(3):
        saved = torch.load(folder / f"{k}.pt")["optimizer"]["state"]

        def noise(i: int, saved: Any = saved) -> torch.Tensor:
            t = int(saved[i]["step"])
            mean = saved[i]["exp_avg"].double() / (1 - 0.9**t)
            over = (saved[i]["exp_avg_sq"].double() / (1 - 0.999**t)).sqrt() + 1e-8
            return 1e-6 * 19 * mean.square() / over

        rows.append(torch.stack([noise(0).sum(1), noise(1)]))
        columns.append(noise(2).sum(0))
    apart = torch.stack(rows)  # [snapshots, weight or bias, units]: legs err independently of each other
    return combined(apart), torch.stack(columns)


def combined(apart: torch.Tensor) -> torch.Tensor:
    """Numbers whose variance over snapshots is the sum of the legs' variances."""
    spread = apart.var(0).sum(0).sqrt()
    return torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)[:, None] * spread
