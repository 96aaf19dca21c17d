"""Run a function in several gloo processes on this machine, as torchrun would on several."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(function: Callable[..., None], *args: Any, world: int = 2, seconds: float = 300) -> None:
    """`function(rank, *args)` in `world` processes of one group; raises what one of them raised, leaves none behind.

    `function` must be importable by name. The group meets in a file, so that no port has to be free.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        context = mp.start_processes(
            _rank, (world, str(store), function, args), nprocs=world, join=False, start_method="spawn"
        )
        assert context is not None
        deadline = time.monotonic() + seconds
        try:
            while not context.join(1):
                assert time.monotonic() < deadline, f"{function.__name__} has not finished after {seconds} s"
        finally:
            for process in context.processes:
                process.kill()
                process.join()


def outcomes(function: Callable[..., Any], *args: Any, world: int = 2, seconds: float = 60) -> list[str]:
    """What came of `function(rank, *args)` in each of `world` processes: what it returned, or the error it raised.

    `waited` where a process had to be killed; the collectives themselves time out long after `seconds`. A process that
    died without an error of Python gives `died`.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            _told, (world, folder, function, args), nprocs=world, join=False, start_method="spawn"
        )
        assert context is not None
        deadline = time.monotonic() + seconds
        for process in context.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        waiting = [process.is_alive() for process in context.processes]
        for process in context.processes:
            process.kill()
            process.join()
        told = [Path(folder) / f"outcome{rank}" for rank in range(world)]
        return ["waited" if w else t.read_text() if t.exists() else "died" for w, t in zip(waiting, told, strict=True)]


def _told(rank: int, world: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        outcome = str(function(rank, *args))
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    scratch = Path(folder) / f"scratch{rank}"
    scratch.write_text(outcome)
    scratch.rename(Path(folder) / f"outcome{rank}")
    os._exit(0)


def _rank(rank: int, world: int, store: str, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    function(rank, *args)
    dist.barrier()
    dist.destroy_process_group()
    # gloo's threads may outlive the group and abort the interpreter while it shuts down (pytorch/pytorch#179291).
    os._exit(0)
