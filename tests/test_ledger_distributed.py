"""DDP and FSDP2 with two gloo processes write the same ledger as one process with the whole batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from noetherflow.monitor.log import read_log
from test_ledger import ENTRIES

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs torch with gloo"
)

WORKER = """
    import os, sys, json, torch
    sys.path.insert(0, {tests!r})
    import torch.distributed as dist
    import test_ledger as t
    from noetherflow.monitor.ledger import Ledger

    how, optimizer_name, detail, out = sys.argv[1:5]
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if how != "single":
        dist.init_process_group("gloo")
    model = t.mlp()
    syms = t.mlp_symmetries(model)
    if how == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
    elif how == "fsdp":
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.device_mesh import init_device_mesh
        mesh = init_device_mesh("cpu", (world,))
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    kind, options = t.OPTIMIZERS[optimizer_name]
    optimizer = kind(model.parameters(), **options)
    ledger = Ledger(model, optimizer, syms, detail=detail, run_dir=out, flush_every=3, estimate_every=2).attach()
    for x, y in t.batches(8):
        share = slice(rank * len(x) // world, (rank + 1) * len(x) // world)
        optimizer.zero_grad()
        t.backward(model, (x[share], y[share]))
        optimizer.step()
    rows = ledger.records(detail)
    ledger.close()
    with open(os.path.join(out, f"rows-{{rank}}.json"), "w") as file:
        json.dump(rows, file)
    if how != "single":
        dist.destroy_process_group()
"""


def run(how: str, optimizer: str, detail: str, out: Path) -> list[dict]:
    out.mkdir()
    script = out / "worker.py"
    script.write_text(textwrap.dedent(WORKER.format(tests=str(Path(__file__).parent))))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = 1 if how == "single" else 2
    common = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), how, optimizer, detail, str(out)],
            env={**common, "RANK": str(rank), "WORLD_SIZE": str(world)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors[-3000:]
    every = [json.loads((out / f"rows-{rank}.json").read_text()) for rank in range(world)]
    assert all(rows == every[0] for rows in every[1:]) or how == "ddp"
    return every[0]


@pytest.mark.parametrize(
    ("how", "optimizer", "detail"),
    [
        ("ddp", "momentum", "symmetry"),
        ("fsdp", "momentum", "symmetry"),
        pytest.param("fsdp", "adamw", "symmetry", marks=pytest.mark.slow),
        pytest.param("fsdp", "adamw", "coordinate", marks=pytest.mark.slow),
        pytest.param("fsdp", "rmsprop", "symmetry", marks=pytest.mark.slow),
        pytest.param("ddp", "adamw", "coordinate", marks=pytest.mark.slow),
    ],
)
def test_same_books_as_one_process(how: str, optimizer: str, detail: str, tmp_path: Path) -> None:
    alone = run("single", optimizer, detail, tmp_path / "single")
    together = run(how, optimizer, detail, tmp_path / how)
    assert len(alone) == len(together) > 0
    size = max(r["norm"] for r in alone)
    for a, b in zip(alone, together, strict=True):
        for field in ("charge", "change", "norm", *ENTRIES):
            assert b[field] == pytest.approx(a[field], rel=1e-7, abs=1e-13 * size), (field, a["step"])
        assert abs(b["residual"]) <= 1e-13 * size
    logs = [[r for r in read_log(tmp_path / name) if r["kind"] != "run"] for name in ("single", how)]
    assert [(r["kind"], r["step"]) for r in logs[0]] == [(r["kind"], r["step"]) for r in logs[1]]
    for a, b in zip(*logs, strict=True):
        if a["kind"] == "estimates":
            for field in ("drive", "distance", "steps"):
                if field in a["symmetry"]:
                    assert b["symmetry"][field] == pytest.approx(a["symmetry"][field], rel=1e-6)
