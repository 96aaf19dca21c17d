"""Measure and watch a small language model on several processes: `torchrun --nproc-per-node 2 several_processes.py`.

Every process reads its own part of the data; `gradient_moments` gives all of them the moments of the whole, and the
first process writes the ledger. Also runs alone, with plain `python`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import noetherflow as nf


class Model(nn.Module):
    """Two layers with a norm between them, on token embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(64, 32)
        self.up, self.norm, self.down = nn.Linear(32, 64), nn.LayerNorm(64), nn.Linear(64, 64)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.log_softmax(self.down(self.norm(torch.relu(self.up(self.tokens(ids))))), -1)


def losses(model: nn.Module, ids: Tensor) -> Tensor:
    """The mean loss of each text, `[batch]`."""
    return nn.functional.nll_loss(model(ids[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def main(run_dir: Path) -> None:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    torch.manual_seed(0)
    model = Model()
    batches = list(torch.randint(64, (8, 16, 12)))
    syms = nf.find_symmetries(model, batches[0])  # before sharding; the same on every rank
    if world > 1:
        for layer in (model.tokens, model.up, model.down):
            fully_shard(layer)
        fully_shard(model)

    moments = nf.gradient_moments(model, losses, batches[rank::world], syms)
    if rank == 0:
        print(f"{moments.samples} samples of {world} processes, mean loss {moments.loss:.6f}")

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with nf.Ledger(model, optimizer, syms, every=1, run_dir=run_dir) as ledger:
        for ids in batches:
            optimizer.zero_grad()
            losses(model, ids[rank::world]).mean().backward()
            optimizer.step()
    if rank == 0:
        for row in ledger.records():
            if row["step"] == ledger.step - 1:
                print(f"{row['family']}: charge {row['charge']:.3f}, change in the last step {row['change']:.1e}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "run"))
