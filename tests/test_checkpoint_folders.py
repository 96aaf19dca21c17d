"""Folders as people hold them: sharded models come back with the same function, a Trainer resumes as a twin would."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import noetherflow as nf
from noetherflow.balance.checkpoint import balance_checkpoint, load_checkpoint_, read_checkpoint
from noetherflow.errors import DataError

tf: Any = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IDS = torch.randint(3, 48, (2, 6), generator=torch.Generator().manual_seed(0))


def llama(tied: bool = False) -> nn.Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, tie_word_embeddings=tied))


def gpt2() -> nn.Module:
    return tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=48, n_positions=32))


def qwen3() -> nn.Module:
    return tf.Qwen3ForCausalLM(tf.Qwen3Config(**SIZES, head_dim=8))


def mixtral() -> nn.Module:
    return tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))


def gemma() -> nn.Module:
    return tf.GemmaForCausalLM(tf.GemmaConfig(**SIZES, head_dim=8))


def resnet() -> nn.Module:
    config = tf.ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return tf.ResNetForImageClassification(config)


MODELS = {
    "gpt2": gpt2, "llama": llama, "llama-tied": lambda: llama(True), "qwen3": qwen3, "mixtral": mixtral,
    "gemma": gemma, "resnet": resnet,
}  # fmt: skip


def made(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model far from balance, and inputs for it."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.config._experts_implementation = "eager"  # type: ignore[union-attr]
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.mul_(2.0 if "q_proj" in n or "up_proj" in n or "0.convolution" in n else 1.0).add_(
                0.02 * torch.randn_like(p)
            )
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)} if name == "resnet" else {"input_ids": IDS, "use_cache": False}
    return model, inputs


def logits(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    model.config._experts_implementation = "eager"  # type: ignore[union-attr]
    with torch.no_grad():
        out = model(**{n: t.to(dtype) if n == "pixel_values" else t for n, t in inputs.items()})
    return out.logits.double()


def least_norm(model: nn.Module, inputs: dict[str, Any]) -> Any:
    syms = nf.find_symmetries(model, inputs)
    return nf.noise_equilibrium(model, syms, None, objective="norm", approximate=False, joint=False)


def in_five(model: nn.Module, folder: Path) -> None:
    """`save_pretrained` in five shards or a few more."""
    total = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    for parts in (5, 6, 8, 10, 14):
        model.save_pretrained(folder, max_shard_size=total // parts)  # type: ignore[operator]
        if len(list(folder.glob("*.safetensors"))) >= 5:
            return
        for file in folder.iterdir():
            file.unlink()
    raise AssertionError("the model cannot be split")


@pytest.mark.parametrize("name", MODELS)
def test_sharded_folder_comes_back_with_the_same_function(tmp_path: Path, name: str) -> None:
    model, inputs = made(name)
    wide = copy.deepcopy(model).double()
    with torch.no_grad():
        for t in wide.state_dict().values():
            t.copy_(t.bfloat16())
    coarse = copy.deepcopy(wide).bfloat16()
    eq = least_norm(wide, {n: t.double() if n == "pixel_values" else t for n, t in inputs.items()})
    for dtype, saved in ((torch.float64, wide), (torch.bfloat16, coarse)):
        source, target = tmp_path / f"in-{dtype}", tmp_path / f"out-{dtype}"
        in_five(saved, source)
        before = {p.name: p.read_bytes() for p in source.iterdir()}
        report = balance_checkpoint(source, target, saved, eq, unchecked=True)
        assert {p.name: p.read_bytes() for p in source.iterdir()} == before, "the source is as it was"
        assert {p.name for p in target.iterdir()} == set(before)
        assert all((target / n).read_bytes() == before[n] for n in before if n.endswith(".json"))
        assert len(list(tmp_path.iterdir())) == (2 if dtype == torch.float64 else 4), "no litter"
        assert max(report.moved.values()) > 0.05
        again = type(model).from_pretrained(target, dtype=dtype).eval()  # type: ignore[attr-defined]
        old, new = logits(wide, inputs), logits(again.double(), inputs)
        change = float((new - old).abs().max() / old.abs().max())
        exact = 1e-6 if name == "gemma" else 1e-12  # Gemma's norms compute in float32 whatever the weights are
        assert change < (exact if dtype == torch.float64 else 0.05)
        assert report.rounding <= (0 if dtype == torch.float64 else 2**-8)
        moved, stored = read_checkpoint(target), read_checkpoint(source)
        assert moved.keys() == stored.keys()
        assert all(moved[n].dtype == stored[n].dtype and moved[n].shape == stored[n].shape for n in stored)


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "gemma", "mixtral"])
def test_the_stored_solve_is_the_solve_in_memory(tmp_path: Path, name: str, joint: bool) -> None:
    model, inputs = made(name)
    model = model.double()
    in_five(model, tmp_path / "in")
    syms = nf.find_symmetries(model, inputs)
    expected = nf.noise_equilibrium(model, syms, None, objective="norm", approximate=False, joint=joint)
    with torch.device("meta"):
        outline = MODELS[name]()
    found = nf.stored_equilibrium(tmp_path / "in", outline, syms, joint=joint)
    assert found.converged
    for s in expected.symmetries:
        a, b = (e.mT @ e if e.ndim == 3 else e for e in (expected[s.name].element, found[s.name].element))
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(expected[s.name].charge, found[s.name].charge, rtol=1e-8, atol=1e-9)
    assert found.norm == pytest.approx(expected.norm, rel=1e-9)
    assert found.norm_now == pytest.approx(expected.norm_now, rel=1e-9)
    balance_checkpoint(tmp_path / "in", tmp_path / "out", outline, found, unchecked=True)
    again = type(model).from_pretrained(tmp_path / "out", dtype=torch.float64).eval()  # type: ignore[attr-defined]
    old, new = logits(model, inputs), logits(again, inputs)
    assert float((new - old).abs().max() / old.abs().max()) < (1e-6 if name == "gemma" else 1e-12)


@pytest.mark.parametrize("piece", [3000, 1 << 20])
@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "gemma", "resnet"])
def test_equal_ranges_of_files_are_those_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, piece: int
) -> None:
    """In pieces of a few channels, whatever axis they lie along (heads, rotary pairs, convolutions)."""
    monkeypatch.setattr("noetherflow.balance.cuts.PIECE", piece)
    model, inputs = made(name)
    model = model.double()
    inputs = {n: t.double() if n == "pixel_values" else t for n, t in inputs.items()}
    in_five(model, tmp_path / "in")
    syms = nf.find_symmetries(model, inputs)
    expected = nf.noise_equilibrium(model, syms, None, objective="range", approximate=False)
    with torch.device("meta"):
        outline = MODELS[name]()
    read: list[str] = []
    found = nf.stored_equilibrium(
        tmp_path / "in", outline, syms, objective="range", max_iterations=500, progress=read.append
    )
    assert (found.objective, found.converged, expected.converged) == ("range", True, True)
    assert set(read) >= set(found.symmetries.parameters)
    for s in expected.symmetries:
        torch.testing.assert_close(expected[s.name].element, found[s.name].element, rtol=1e-8, atol=0)
        torch.testing.assert_close(expected[s.name].charge_now, found[s.name].charge_now, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(expected[s.name].charge, found[s.name].charge, rtol=1e-7, atol=1e-9)
        assert torch.equal(expected[s.name].finite, found[s.name].finite)
    assert any(float(s.element.log().abs().max()) > 0.1 for s in found if s.element.ndim == 1)
    assert found.norm == pytest.approx(expected.norm, rel=1e-8)
    assert found.norm_now == pytest.approx(expected.norm_now, rel=1e-10)
    assert found.imbalance_now == pytest.approx(expected.imbalance_now, rel=1e-9)


def test_objectives_with_gradients_are_not_for_files(tmp_path: Path) -> None:
    model, inputs = made("llama-tied")
    in_five(model, tmp_path / "in")
    syms = nf.find_symmetries(model, inputs)
    with pytest.raises(DataError, match=r"needs gradients.*noise_equilibrium; norm and range need none"):
        nf.stored_equilibrium(tmp_path / "in", model, syms, objective="noise")


def trainer(folder: Path, steps: int, callbacks: list[Any]) -> Any:
    """The Hugging Face Trainer on a tiny Llama, with a checkpoint after three steps."""
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model = llama()
    data = [{"input_ids": row, "labels": row} for row in torch.randint(3, 48, (24, 6))]
    arguments = tf.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-3, weight_decay=0.1,
        save_steps=3, report_to=[], use_cpu=True, disable_tqdm=True, seed=1,
        dataloader_pin_memory=False, lr_scheduler_type="constant",
    )  # fmt: skip
    return tf.Trainer(model, arguments, train_dataset=data, callbacks=callbacks)


class BalanceAt(tf.TrainerCallback):
    """Balances the living model, and its optimiser's state, after three steps."""

    def __init__(self, eq: Any) -> None:
        self.eq = eq

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            nf.balance_(kwargs["model"], self.eq, kwargs["optimizer"], unchecked=True)


def said(*words: str) -> str:
    """What the command prints when it ends well."""
    from typer.testing import CliRunner

    from noetherflow.cli.app import app

    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_the_command_moves_a_folder(tmp_path: Path) -> None:
    model, inputs = made("llama-tied")
    in_five(model, tmp_path / "in")
    target = tmp_path / "out"
    shown = said("balance", str(tmp_path / "in"), "--objective", "norm", "--dry-run", "--no-certify")
    assert "would move" in shown
    assert "not certified" in shown
    assert "consider: the function stays" in shown
    assert not target.exists()
    said("balance", str(tmp_path / "in"), "--objective", "norm", "--out", str(target), "--no-certify")
    streamed = said("balance", str(tmp_path / "in"), "--objective", "norm", "--out", str(tmp_path / "s"), "--stream")
    assert "moves unchecked" in streamed
    said("balance", str(tmp_path / "in"), "--objective", "range", "--out", str(tmp_path / "r"), "--stream")
    ranged = read_checkpoint(tmp_path / "r")
    up, down = (ranged[f"model.layers.0.mlp.{n}_proj.weight"].abs() for n in ("up", "down"))
    torch.testing.assert_close(up.amax(1), down.amax(0), rtol=1e-4, atol=0)
    old, moved, other = (read_checkpoint(tmp_path / n) for n in ("in", "out", "s"))
    assert not torch.equal(old["model.layers.0.mlp.up_proj.weight"], moved["model.layers.0.mlp.up_proj.weight"])
    for n in moved:
        torch.testing.assert_close(moved[n], other[n], rtol=1e-3, atol=1e-4)
    again = type(model).from_pretrained(target).eval()  # type: ignore[attr-defined]
    assert float((logits(again, inputs) - logits(model, inputs)).abs().max()) < 1e-5


@pytest.mark.slow
def test_the_trainer_resumes_as_a_twin_that_lived_there(tmp_path: Path) -> None:
    trainer(tmp_path / "run", 3, []).train()
    source, target = tmp_path / "run" / "checkpoint-3", tmp_path / "balanced" / "checkpoint-3"
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    model = llama()
    load_checkpoint_(model, source)
    eq = least_norm(model, {"input_ids": IDS, "use_cache": False})
    report = balance_checkpoint(source, target, model, eq, unchecked=True)
    assert report.state_entries > 20
    assert not [line for line in report.unmoved if "optimizer" in line]
    assert "Trainer's own groups" in str(report)
    after = {p.name: p.read_bytes() for p in target.iterdir()}
    assert after.keys() == before.keys() == {p.name for p in source.iterdir()}
    assert {n for n in after if after[n] != before[n]} == {"model.safetensors", "optimizer.pt"}
    resumed = trainer(tmp_path / "balanced", 6, [])
    resumed.train(resume_from_checkpoint=str(target))
    twin = trainer(tmp_path / "twin", 6, [BalanceAt(eq)])
    twin.train()
    stale = trainer(tmp_path / "stale", 6, [])
    (target / "optimizer.pt").write_bytes(before["optimizer.pt"])
    stale.train(resume_from_checkpoint=str(target))

    def apart(other: Any) -> float:
        pairs = zip(other.model.state_dict().values(), twin.model.state_dict().values(), strict=True)
        return max(float((a - b).norm() / b.norm()) for a, b in pairs)

    assert apart(resumed) < 1e-6
    assert apart(stale) > 1e-4, "the state of the old weights gives another run"
