"""Two gloo processes measure their halves and agree with one process on the union."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from noetherflow.moments import gradient_moments, load_moments, minibatch_moments, save_moments
from test_moments_engine import assert_same, data, hidden, net, squared


def _port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _wrap(kind: str) -> Any:
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    model = net()
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "fsdp":
        for layer in (model[0], model[2]):
            fully_shard(layer)
        fully_shard(model)
    return model


def _worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        mine = data(4)[rank::2]
        for kind in ("ddp", "fsdp"):
            model = _wrap(kind)
            moments = gradient_moments(model, squared, mine, hidden(net()), entries=True, groups=2)
            save_moments(moments, Path(folder) / f"{kind}{rank}")
        model = _wrap("ddp")
        save_moments(minibatch_moments(model, squared, mine, hidden(net()), batch_size=6), Path(folder) / f"mini{rank}")
        plain = gradient_moments(net(), squared, mine, hidden(net()), process_group=dist.group.WORLD, entries=True)
        save_moments(plain, Path(folder) / f"plain{rank}")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder() -> Any:
    with tempfile.TemporaryDirectory() as name:
        processes = mp.start_processes(_worker, (_port(), name), nprocs=2, join=False, start_method="spawn")
        assert processes is not None
        done = processes.join(60) or processes.join(1)
        for p in processes.processes:
            p.kill()
        assert done, "the two processes did not finish"
        yield Path(name)


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "plain"])
def test_ranks_agree_with_one_process(folder: Path, kind: str) -> None:
    model = net()
    expected = gradient_moments(model, squared, data(4), hidden(model), entries=True)
    for rank in (0, 1):
        got = load_moments(folder / f"{kind}{rank}")
        assert len(got.groups) >= 2
        assert_same(got, expected, 1e-10)


def test_ranks_are_replicates(folder: Path) -> None:
    model = net()
    expected = minibatch_moments(model, squared, data(4), hidden(model), batch_size=6)
    for rank in (0, 1):
        assert_same(load_moments(folder / f"mini{rank}"), expected, 1e-10)
