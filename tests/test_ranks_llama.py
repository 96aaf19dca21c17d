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
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import noetherflow as nf
from noetherflow.errors import MomentError
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
        return sharded(model)
    return model


def sharded(model: nn.Module, mesh: DeviceMesh | None = None) -> nn.Module:
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def split(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Tensor parallel: attention by heads, the gated layer by hidden units, embedding and head by words."""
    plan: dict[str, ParallelStyle] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    for i in range(len(model.model.layers)):
        into = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
        plan |= {f"model.layers.{i}.{name}": ColwiseParallel() for name in into}
        plan |= {f"model.layers.{i}.{name}": RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
    return parallelize_module(model, mesh, plan)


def measure_split(rank: int, fully: bool, out: Path) -> None:
    """On two ranks with samples of their own, times two that share them, under `fully_shard` or not."""
    plain = llama()
    syms = nf.find_symmetries(plain, {"input_ids": texts(1, 2)[0]})
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = split(plain, mesh["tensor"])
    model = sharded(model, mesh["data"]) if fully else model
    mine, group = texts(8, 2)[mesh["data"].get_local_rank() :: 2], mesh["data"].get_group()
    with pytest.raises(MomentError, match="would count each sample several times"):
        nf.gradient_moments(model, loss, mine, syms, process_group=dist.group.WORLD)
    moments = nf.gradient_moments(model, loss, mine, syms, entries=True, process_group=group)
    save_moments(moments, out / f"split{rank}")


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


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module.*returned a view tensor:UserWarning")
@pytest.mark.parametrize("fully", [False, True])
def test_moments_of_layers_split_by_tensor_parallelism_are_those_of_one_process(fully: bool, tmp_path: Path) -> None:
    measure(0, "alone", False, tmp_path, world=1)
    run_ranks(measure_split, fully, tmp_path, world=WORLD)
    expected = load_moments(tmp_path / "alone0")
    for rank in range(WORLD):
        assert_same(load_moments(tmp_path / f"split{rank}"), expected, 1e-9)


def measure_normed(rank: int, out: Path, world: int = 2) -> None:
    """A norm between split layers, which sees a part of every sequence where there are two ranks."""
    torch.manual_seed(0)
    layers = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 4)
    model = nn.Sequential(*layers).double()
    batches = [torch.randn(3, 4, 6, dtype=torch.float64) for _ in range(2)]
    syms = nf.find_symmetries(model, batches[0])
    if world > 1:
        into = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1), use_local_output=False)
        plan = {"0": into, "1": SequenceParallel(use_local_output=True), "2": ColwiseParallel(input_layouts=Shard(1))}
        parallelize_module(model, init_device_mesh("cpu", (world,)), {**plan, "4": RowwiseParallel()})
    moments = nf.gradient_moments(model, lambda m, b: m(b).square().flatten(1).sum(1), batches, syms, entries=True)
    save_moments(moments, out / f"normed{world}{rank}")


def test_moments_of_norms_on_parts_of_sequences_are_those_of_one_process(tmp_path: Path) -> None:
    measure_normed(0, tmp_path, world=1)
    run_ranks(measure_normed, tmp_path, world=2)
    for rank in range(2):
        assert_same(load_moments(tmp_path / f"normed2{rank}"), load_moments(tmp_path / "normed10"), 1e-9)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_ledger_with_accumulation_is_that_of_one_process(how: str, tmp_path: Path) -> None:
    train(0, "alone", tmp_path, world=1)
    run_ranks(train, how, tmp_path, world=WORLD)
    alone, together = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("alone", how))
    assert_same_books(alone, together, rounding=1e-8, rel=1e-5)
