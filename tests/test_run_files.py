"""`noetherflow flow`: a run on disk says the same as the living model and optimiser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import noetherflow as nf
from noetherflow.balance.run_files import read_run, weights_for
from noetherflow.cli import main
from noetherflow.equilibrium.state_flow import state_flow
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
