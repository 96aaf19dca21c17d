"""A rank that fails, ends or holds something else ends all ranks with one clear error, and none is left waiting.

The processes may take a minute; the collectives would wait half an hour.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from noetherflow.moments import gradient_moments, minibatch_moments
from noetherflow.monitor.ledger import Ledger
from noetherflow.symmetry.symmetry_set import SymmetrySet
from processes import outcomes
from test_ledger import OPTIMIZERS, backward, batches, mlp, mlp_symmetries
from test_ledger_distributed import assert_same_books
from test_moments_engine import data, hidden, net, squared

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs torch with gloo")


def wrapped(how: str, model: nn.Module) -> nn.Module:
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    for layer in model.children():
        if list(layer.parameters()):
            fully_shard(layer)
    return fully_shard(model)


def failing(batches: list[Any]) -> Iterator[Any]:
    yield batches[0]
    raise ConnectionError("no such host")


def reversed_units(syms: SymmetrySet) -> SymmetrySet:
    """As many symmetries of the same names and shapes, on the units in another order."""
    turned = [replace(s, legs=tuple(replace(leg, index=leg.index[::-1].copy()) for leg in s.legs)) for s in syms]
    return SymmetrySet(tuple(turned), shapes=syms.shapes)


def measured(rank: int, fault: str, how: str, world: int = 2) -> int:
    """Measure this rank's share of the data, with a fault on rank 1."""
    model, mine, syms = wrapped(how, net()), data(4)[rank::world], hidden(net())
    if fault == "minibatch":
        good = [mine[0], tuple(t * float("nan") for t in mine[1])] if rank == 1 else mine
        return minibatch_moments(model, squared, good, syms, batch_size=6).samples
    if rank == 1 and fault == "loader":
        return gradient_moments(model, squared, failing(mine), syms).samples
    if rank == 1 and fault == "nan":
        mine = [mine[0], tuple(t * float("nan") for t in mine[-1])]
    if rank == 1 and fault == "symmetries":
        syms = reversed_units(syms)
    if rank == 1 and fault == "ended":
        os._exit(1)
    until = 0.5 if rank == 1 and fault == "settings" else None
    return gradient_moments(model, squared, mine, syms, until=until).samples


def told(call: Callable[[], Any]) -> str:
    try:
        return str(call())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


FAULTS = {
    "loader": ("ConnectionError: no such host", "rank 1 stopped with ConnectionError: no such host"),
    "nan": ("DataError: loss is not finite", "rank 1 stopped with DataError: loss is not finite"),
    "symmetries": ("RankError: ranks 0 and 1 have other symmetries", "they differ in ['hidden', 'linear']"),
    "settings": ("MomentError: until= is for one process", "rank 1 stopped with MomentError: until="),
}
MEASURED = [*((fault, how) for fault in FAULTS for how in ("ddp", "fsdp")), ("minibatch", "ddp"), ("none", "ddp")]


def all_faults(rank: int) -> str:
    """One fault after the other in one process group, which each of them leaves in step."""
    return json.dumps([told(lambda f=fault, h=how: measured(rank, f, h)) for fault, how in MEASURED])


@pytest.fixture(scope="module")
def of_faults() -> dict[tuple[str, str], tuple[str, str]]:
    return dict(zip(MEASURED, zip(*map(json.loads, outcomes(all_faults)), strict=True), strict=True))


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_on_one_rank_ends_the_measurement_on_all(fault: str, how: str, of_faults: Any) -> None:
    there, elsewhere = FAULTS[fault]
    well, faulty = of_faults[fault, how]
    assert faulty.startswith(there)
    assert well.startswith("RankError")
    assert elsewhere in well


def test_minibatch_moments_end_together_and_a_run_without_fault_measures_all(of_faults: Any) -> None:
    well, faulty = of_faults["minibatch", "ddp"]
    assert faulty.startswith("DataError")
    assert "rank 1 stopped with DataError" in well
    assert of_faults["none", "ddp"] == ("24", "24")


@pytest.mark.parametrize("how", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_rank_that_dies_is_told_by_the_others(how: str) -> None:
    well, faulty = outcomes(measured, "ended", how)
    assert faulty == "died"
    assert well.startswith("RankError: another rank ended")


@pytest.mark.slow
@pytest.mark.parametrize("fault", [*FAULTS, "ended"])
def test_four_ranks_end_together(fault: str) -> None:
    there, elsewhere = {**FAULTS, "ended": ("died", "another rank ended")}[fault]
    for rank, outcome in enumerate(outcomes(measured, fault, "ddp", 4, world=4, seconds=120)):
        assert outcome.startswith(there) if rank == 1 else elsewhere in outcome, (rank, outcome)


# -- ledger -----------------------------------------------------------------------------------------------------------


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    optimizer.zero_grad()
    backward(model, batch)
    optimizer.step()


def read_alone(rank: int) -> list[str]:
    """Only rank 0 reads, before and after a flush on both."""
    model = wrapped("fsdp", mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ledger = Ledger(model, optimizer, mlp_symmetries(mlp()), every=1, estimate_every=2).attach()
    for batch in batches(3):
        step(model, optimizer, batch)
    calls = [ledger.records, ledger.estimates, ledger.layers, ledger.preconditioned, ledger.run_data, ledger.diagnose]
    told_early = [told(call) for call in (*calls, ledger.state_dict, lambda: repr(ledger))] if rank == 0 else []
    ledger.flush()
    rows = [str(len(ledger.records())), str(ledger.state_dict()["step"])] if rank == 0 else []
    ledger.close()
    return told_early + rows


def edited_alone(rank: int) -> list[str]:
    """Somebody writes to the shard of one rank: an event there, and none of the others waits for it."""
    model = wrapped("fsdp", mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Ledger(model, optimizer, mlp_symmetries(mlp()), every=1, estimate_every=0) as ledger:
        for k, batch in enumerate(batches(4)):
            step(model, optimizer, batch)
            if k == 1 and rank == 1:
                with torch.no_grad():
                    next(model.parameters()).to_local().mul_(1.5)
    return [str(len(ledger.records())), str([e["event"] for e in ledger.events])]


def other_ledgers(rank: int) -> list[str]:
    model = wrapped("fsdp", mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    syms = mlp_symmetries(mlp())
    found = [told(lambda: Ledger(model, optimizer, reversed_units(syms) if rank else syms))]
    return [*found, told(lambda: Ledger(model, optimizer, syms, flush_every=5 + rank))]


def locked(rank: int, folder: str) -> list[str]:
    """The log is held by another ledger, which only the first rank can know."""
    model = wrapped("fsdp", mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    syms = mlp_symmetries(mlp())
    first = Ledger(model, optimizer, syms, run_dir=folder)
    found = told(lambda: Ledger(model, optimizer, syms, run_dir=folder))
    first.close()
    return [found]


def crashed(rank: int) -> list[str]:
    """A bad sample on one rank, which leaves the ledger by that error and ends; the other comes to close its books."""
    model = wrapped("fsdp", mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train() -> None:
        with Ledger(model, optimizer, mlp_symmetries(mlp()), every=1):
            step(model, optimizer, batches(1)[0])
            if rank == 1:
                raise ValueError("bad sample")

    return [told(train)]


def all_ledgers(rank: int, folder: str) -> str:
    return json.dumps([read_alone(rank), edited_alone(rank), other_ledgers(rank), locked(rank, folder), crashed(rank)])


def test_no_rank_waits_for_another_to_read_a_ledger(tmp_path: Path) -> None:
    """Reading, events, other settings and a locked log, on ranks that hold shards."""
    first, second = map(json.loads, outcomes(all_ledgers, str(tmp_path)))
    *refused, shown, rows, steps = first[0]
    for text in refused:
        assert text.startswith("DataError: 3 recorded steps wait for the other ranks")
        assert "call flush() on every rank" in text
    assert len(refused) == 7
    assert "ledger of 3 steps" in shown
    assert (rows, steps) == ("6", "3")
    assert second[0] == []
    assert first[1] == ["8", "[]"]
    assert second[1] == ["8", "['edited']"]
    for text in (*first[2], *second[2]):
        assert text.startswith("RankError: ranks 0 and 1 have other symmetries or settings")
    assert "differ in ['settings']" in first[2][1]
    assert first[3][0].startswith("DataError")
    assert "rank 0 stopped with DataError" in second[3][0]
    assert second[4] == ["ValueError: bad sample"]
    assert first[4][0].startswith("RankError: another rank ended")


# -- tensor parallelism -----------------------------------------------------------------------------------------------


def trained(rank: int, shape: tuple[int, ...], kind: str) -> str:
    """Rows of a ledger over eight steps: one process, tensor parallel, or that under fully_shard by `shape`."""
    model = mlp()
    syms = mlp_symmetries(model)
    shares = 1
    if shape:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor")[-len(shape) :])
        parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        if len(shape) == 2:
            model, shares = fully_shard(model, mesh=mesh["data"]), shape[0]
    maker, options = OPTIMIZERS[kind]
    optimizer = maker(model.parameters(), **options)
    with Ledger(model, optimizer, syms, detail="symmetry", every=1, estimate_every=2) as ledger:
        for x, y in batches(8):
            mine = mesh["data"].get_local_rank() if shares > 1 else 0
            part = slice(mine * len(x) // shares, (mine + 1) * len(x) // shares)
            step(model, optimizer, (x[part], y[part]))
    loss = lambda m, b: m(b[0]).square().sum(1)
    if shares > 1:
        measured = told(lambda: gradient_moments(model, loss, batches(1), syms))
    else:
        measured = [
            float(leg.sum()) for legs in gradient_moments(model, loss, batches(1), syms).second.values() for leg in legs
        ]
    return json.dumps([ledger.records("symmetry"), measured])


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((2,), "momentum"),
        *(pytest.param(s, k, marks=pytest.mark.slow) for s, k in [((2,), "adamw"), ((2, 2), "adamw")]),
    ],
)
def test_tensor_parallel_books_and_moments_are_those_of_one_process(shape: tuple[int, ...], kind: str) -> None:
    alone, moments = json.loads(trained(0, (), kind))
    for outcome in outcomes(trained, shape, kind, world=int(torch.tensor(shape).prod()), seconds=120):
        together, measured = json.loads(outcome)
        if len(shape) == 1:
            assert measured == pytest.approx(moments, rel=1e-5)
        else:  # over all ranks, of which two each share their samples
            assert measured.startswith("MomentError")
            assert "mesh['data'].get_group()" in measured
        assert_same_books(alone, together)


@pytest.mark.slow
def test_the_example_prints_the_same_on_two_processes(tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "examples" / "several_processes.py"
    printed = []
    for launcher in (["-m", "torch.distributed.run", "--nproc-per-node", "2"], []):
        command = [sys.executable, *launcher, script, tmp_path / str(len(launcher))]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200)
        printed.append(done.stdout)
    assert printed[0].replace("of 2 processes", "of 1 processes") == printed[1]
    assert len(printed[0].splitlines()) == 4
