"""DDP and FSDP2 with two gloo processes write the same ledger as one process with the whole batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from noetherflow.monitor.ledger import Ledger
from noetherflow.monitor.log import read_log
from processes import run_ranks
from test_ledger import ENTRIES, OPTIMIZERS, backward, batches, mlp, mlp_symmetries

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs torch with gloo")


def _wrapped(model: nn.Sequential, how: str, world: int) -> nn.Module:
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if how == "fsdp":
        mesh = init_device_mesh("cpu", (world,))
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def train(rank: int, how: str, optimizer_name: str, detail: str, out: Path, world: int = 2) -> None:
    """Eight steps on this rank's share of every batch; the ledger's rows go to `rows-RANK.json`."""
    model = mlp()
    syms = mlp_symmetries(model)
    model = _wrapped(model, how, world)
    kind, options = OPTIMIZERS[optimizer_name]
    optimizer = kind(model.parameters(), **options)
    ledger = Ledger(model, optimizer, syms, detail=detail, run_dir=out, flush_every=3, estimate_every=2).attach()
    for x, y in batches(8):
        share = slice(rank * len(x) // world, (rank + 1) * len(x) // world)
        optimizer.zero_grad()
        backward(model, (x[share], y[share]))
        optimizer.step()
    ledger.close()
    rows = ledger.records(detail)
    (out / f"rows-{rank}.json").write_text(json.dumps(rows))


def assert_same_books(alone: list[dict], together: list[dict], rounding: float = 1e-13, rel: float = 1e-7) -> None:
    """The same rows; `rounding` in units of the largest norm, what sums in another order leave open."""
    assert len(alone) == len(together) > 0
    size = max(r["norm"] for r in alone)
    for a, b in zip(alone, together, strict=True):
        for field in ("charge", "change", "norm", *ENTRIES):
            assert b[field] == pytest.approx(a[field], rel=rel, abs=rounding * size), (field, a["step"])
        assert abs(b["residual"]) <= max(1e-13, 1e-4 * rounding) * size


def _rows(out: Path, rank: int = 0) -> list[dict]:
    return json.loads((out / f"rows-{rank}.json").read_text())


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
    train(0, "single", optimizer, detail, tmp_path / "single", world=1)
    run_ranks(train, how, optimizer, detail, tmp_path / how)
    alone, together = _rows(tmp_path / "single"), _rows(tmp_path / how)
    assert how == "ddp" or _rows(tmp_path / how, rank=1) == together
    assert_same_books(alone, together)
    logs = [[r for r in read_log(tmp_path / name) if r["kind"] != "run"] for name in ("single", how)]
    assert [(r["kind"], r["step"]) for r in logs[0]] == [(r["kind"], r["step"]) for r in logs[1]]
    for a, b in zip(*logs, strict=True):
        if a["kind"] == "estimates":
            for field in ("drive", "distance", "steps"):
                if field in a["symmetry"]:
                    assert b["symmetry"][field] == pytest.approx(a["symmetry"][field], rel=1e-6)


def restart(rank: int, out: Path) -> None:
    """Two runs into one directory; only the first process can read where the first one ended."""
    for part in range(2):
        (out / f"part{part}").mkdir(exist_ok=True)
        model = _wrapped(mlp(), "fsdp", 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ledger = Ledger(model, optimizer, mlp_symmetries(mlp()), run_dir=out, estimate_every=2, resume=True).attach()
        for x, y in batches(3):
            optimizer.zero_grad()
            backward(model, (x[rank::2], y[rank::2]))
            optimizer.step()
        ledger.close()
        (out / f"part{part}" / str(rank)).write_text(json.dumps([r["step"] for r in ledger.estimates()]))


def test_sharded_processes_number_a_second_run_alike(tmp_path: Path) -> None:
    run_ranks(restart, tmp_path)
    assert [r["step"] for r in read_log(tmp_path) if r["kind"] == "step"] == list(range(6))
    for part, steps in enumerate(([0, 0, 0, 2, 2, 2], [4, 4, 4, 6, 6, 6])):
        for rank in range(2):
            assert json.loads((tmp_path / f"part{part}" / str(rank)).read_text()) == steps
