"""What only a GPU shows; skipped without one. The other tests run there with `pytest --device cuda`."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import noetherflow as nf
from noetherflow.core.torch_internals import CudaGraph
from noetherflow.moments import Meter, batch
from noetherflow_paper.runner import compute_point
from reference import moments_by_loop
from test_moments_paths import test_what_is_no_sample_is_not_split as not_split
from test_moments_rules import CASES, FALLBACK, every_axis, relative_error, squared_output

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.fixture(autouse=True)
def on_gpu() -> Iterator[None]:
    with torch.device("cuda"):
        yield


@pytest.mark.parametrize("case", sorted(CASES.keys() - FALLBACK))
def test_backward_does_not_wait_for_the_gpu(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    build, sample = CASES[case]
    model = build().double()
    meter = Meter(model, squared_output, every_axis(model))
    meter.update(sample())
    engine, runs = batch.run_backward, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        runs.append(case)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # "a prototype feature"
                torch.cuda.set_sync_debug_mode("error")
            return engine(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(batch, "run_backward", watched)
    meter.update(sample())
    assert runs == [case]


def test_a_trial_out_of_bounds_leaves_the_gpu_usable() -> None:
    """The table of class weights has as many rows as the batch; the fallback tries to divide it into samples."""
    not_split((5, 8))
    assert float(torch.ones(3).sum()) == 3


def network() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
    return model, torch.randn(256, 20), torch.randn(256, 5)


def squared(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().sum(1)


def test_autocast_accumulates_in_float32() -> None:
    """Within a few roundings of bfloat16 (2^-9) of the float64 loop."""
    model, x, y = network()
    syms = nf.find_symmetries(model, x[:2])

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            out = model(batch[0])
        return (out.float() - batch[1]).square().sum(1)

    got = nf.gradient_moments(model, loss, [(x, y)], syms)
    expected = moments_by_loop(model.double(), squared, [(x.double(), y.double())], syms)
    for name, legs in expected.second.items():
        for a, b in zip(got.second[name], legs, strict=True):
            assert relative_error(a, b) < 0.02
    assert {g.dtype for g in got.mean.values()} <= {torch.float32, torch.float64}


@pytest.mark.parametrize(("kind", "scale"), [(torch.optim.SGD, 2.0**8), (torch.optim.AdamW, 2.0**28)])
def test_ledger_of_a_fused_optimiser_behind_a_scaler(kind: type[torch.optim.Optimizer], scale: float) -> None:
    """Half-precision autocast, gradients unscaled inside the step; a large first scale overflows, steps are skipped.

    Not with SGD: in torch 2.11 its fused kernel spoils the momentum of a skipped step, and training ends in NaN.
    """
    model, x, y = network()
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=1e-3, weight_decay=1e-2, fused=True, **options)
    scaler = torch.amp.GradScaler("cuda", init_scale=scale)
    with nf.Ledger(model, optimizer, nf.find_symmetries(model, x[:2]), every=1) as ledger:
        for _ in range(40):
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.float16):
                out = model(x)
            scaler.scale((out.float() - y).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        rows = ledger.records()
    skipped = sum(e["event"] == "skipped" for e in ledger.events)
    assert (skipped > 0) == (scale > 2**20)
    assert len(rows) == 40 - skipped
    for row in rows:
        assert abs(row["residual"]) < 2e-6 * row["norm"]
        assert abs(row["change"]) > 0


def test_equilibrium_on_the_gpu_is_that_on_the_cpu() -> None:
    model, x, y = network()
    model, x, y = model.double(), x.double(), y.double()
    sgd = nf.SGDConfig(lr=0.05, batch_size=16, weight_decay=1e-3)
    found = []
    for device in ("cuda", "cpu"):
        model, x, y = model.to(device), x.to(device), y.to(device)
        syms = nf.find_symmetries(model, x[:2])
        mom = nf.gradient_moments(model, squared, [(x, y)], syms, entries=True)
        found.append(nf.noise_equilibrium(model, syms, mom, sgd))
    for s in found[0].symmetries:
        a, b = (eq[s.name].element.cpu() for eq in found)
        assert relative_error(a, b) < 1e-8, s.name


def test_ranks_meet_over_nccl(tmp_path: Path) -> None:
    """One rank, as there is one GPU: DDP and `fully_shard` take the same way through the collectives as many."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    model, x, y = network()
    model, data = model.double(), (x.double(), y.double())
    syms = nf.find_symmetries(model, data[0][:2])
    alone = nf.gradient_moments(model, squared, [data], syms, entries=True)
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("nccl", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            for wrapped in (DistributedDataParallel(model), fully_shard(network()[0].double())):
                many = nf.gradient_moments(wrapped, squared, [data], syms, entries=True)
                for name, legs in alone.second.items():
                    for a, b in zip(many.second[name], legs, strict=True):
                        assert relative_error(a, b) < 1e-10
                optimizer = torch.optim.SGD(wrapped.parameters(), lr=1e-3, momentum=0.9)
                with nf.Ledger(wrapped, optimizer, syms, every=1) as ledger:
                    for _ in range(3):
                        optimizer.zero_grad()
                        squared(wrapped, data).mean().backward()
                        optimizer.step()
                    rows = ledger.records()
                assert len(rows) == 3
                assert all(abs(r["residual"]) < 1e-12 * r["norm"] for r in rows)
        finally:
            dist.destroy_process_group()


def test_an_experiment_runs_on_the_gpu() -> None:
    from noetherflow_paper.experiment import find_experiment

    e = find_experiment("fig2")
    config = e.config("quick", None)
    point = next(p for p in e.points(config) if p["name"] == "sgd")
    assert compute_point("fig2", {**config, "steps": 50, "seeds": 2}, dict(point), "cuda").versions["device"] == "cuda"


def test_captured_passes_are_cuda_graphs_that_see_new_weights_and_draw_anew() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3)).double().eval()
    batches = [torch.randn(4, 5, dtype=torch.float64) for _ in range(7)]
    meter = Meter(model, squared_output, every_axis(model), capture=True)
    for _ in range(2):
        found, expected = (m.measure(batches, groups=1) for m in (meter, Meter(model, squared_output, meter.syms)))
        for name, legs in expected.second.items():
            assert all(relative_error(a, b) <= 1e-12 for a, b in zip(found.second[name], legs, strict=True))
        with torch.no_grad():
            model[0].weight.mul_(0.5)
    assert (meter.captured.traces, meter.captured.replays) == (1, 3 + 6)
    assert [type(held.graph) for held in meter._captures.held.values()] == [CudaGraph]
    model.train()
    meter.measure(batches, groups=1)
    first, second = (meter.measure(batches[:1], groups=1) for _ in range(2))
    assert meter.captured.traces == 2
    assert relative_error(first.mean["3.weight"], second.mean["3.weight"]) > 1e-3
