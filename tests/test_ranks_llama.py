"""A small Llama on four gloo processes is measured and watched as one process does it."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import noetherflow as nf
from noetherflow.moments import load_moments, save_moments
from processes import run_ranks
from test_ledger_distributed import assert_same_books
from test_moments_engine import assert_same

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs torch with gloo"),
]
WORLD = 4
SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "use_cache": False,
}


def llama() -> nn.Module:
    tf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)).double().eval()


def texts(batches: int, size: int) -> list[Tensor]:
    rng = torch.Generator().manual_seed(1)
    return [torch.randint(50, (size, 12), generator=rng) for _ in range(batches)]


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    """The mean loss of each text."""
    logits = model(input_ids=ids).logits[:, :-1]
    return nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def wrapped(how: str, model: nn.Module, checkpointed: bool) -> nn.Module:
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if how == "fsdp":
        for layer in model.model.layers:
            fully_shard(layer)
        return fully_shard(model)
    return model


def measure(rank: int, how: str, checkpointed: bool, out: Path, world: int = WORLD) -> None:
    plain = llama()
    syms = nf.find_symmetries(plain, {"input_ids": texts(1, 2)[0]})
    model = wrapped(how, plain, checkpointed)
    moments = nf.gradient_moments(model, loss, texts(8, 2)[rank::world], syms, entries=True)
    save_moments(moments, out / f"{how}{rank}")


def train(rank: int, how: str, out: Path, world: int = WORLD) -> None:
    """Four steps of AdamW, each of two microbatches of which the first does not synchronise."""
    plain = llama()
    syms = nf.find_symmetries(plain, {"input_ids": texts(1, 2)[0]})
    model = wrapped(how, plain, checkpointed=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with nf.Ledger(model, optimizer, syms, every=1, detail="symmetry", run_dir=out / how) as ledger:
        for k in range(4):
            optimizer.zero_grad()
            for micro, ids in enumerate(texts(2, 4 * WORLD)):
                mine = (ids + k) % 50
                with held_back(model, how, micro == 0):
                    (loss(model, mine[rank::world]).mean() / 2).backward()
            optimizer.step()
    if rank == 0:
        (out / f"{how}.json").write_text(json.dumps(ledger.records("symmetry")))


def held_back(model: Any, how: str, first: bool) -> Any:
    """Gradients stay on their ranks until the last microbatch."""
    if how == "fsdp":
        model.set_requires_gradient_sync(not first)
    return model.no_sync() if how == "ddp" and first else nullcontext()


@pytest.mark.parametrize(("how", "checkpointed"), [("ddp", False), ("fsdp", False), ("fsdp", True)])
def test_moments_of_four_ranks_are_those_of_one_process(how: str, checkpointed: bool, tmp_path: Path) -> None:
    measure(0, "alone", False, tmp_path, world=1)
    run_ranks(measure, how, checkpointed, tmp_path, world=WORLD)
    expected = load_moments(tmp_path / "alone0")
    for rank in range(WORLD):
        assert_same(load_moments(tmp_path / f"{how}{rank}"), expected, 1e-9)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_ledger_with_accumulation_is_that_of_one_process(how: str, tmp_path: Path) -> None:
    train(0, "alone", tmp_path, world=1)
    run_ranks(train, how, tmp_path, world=WORLD)
    alone, together = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("alone", how))
    assert_same_books(alone, together, rounding=1e-8, rel=1e-5)
