"""Cost of the ledger on the models of the moments table: the same training steps with and without it, in one process.

    python -m benchmarks ledger                                        # the table of docs/benchmarks.md
    MODELS=mlp,resnet18 SECONDS=20 python -m benchmarks ledger         # some models, seconds per model and optimiser
    python -m benchmarks.ledger [--models mlp,gpt-relu,gpt-swiglu,llama,resnet18] [--optimizers momentum,adamw]
    python -m benchmarks.ledger --memory

Per model, optimiser and `every` (`default`: the ledger chooses its stride): the time inside the ledger's two calls over
the rest of the steps they sit in (log and estimates included), and as a check on what those calls do to the rest of the
step, the ratio of whole blocks of steps with and without the ledger, in turns: medians over blocks ± half the distance
of the quartiles, in processor time (elapsed time on a GPU). Memory: what the ledger holds on the host, and its growth
of the peak of a step, at every step. The first form keeps its record in `docs/figures/ledger.json`, with `LABEL=laptop`
in `ledger-laptop.json`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import noetherflow as nf
from benchmarks.moments import CASES, OUT, clock, device_name, per_sample_loss, settle
from benchmarks.tables import provenance, write_ledger
from noetherflow.monitor.pace import FIRST

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-5),
}


@dataclass
class Run:
    """A training loop whose steps can be made with or without a ledger."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    syms: nf.SymmetrySet
    loss: Callable[[], torch.Tensor]
    inside: list[float] = field(default_factory=list)

    def steps(self, n: int, ledger: nf.Ledger | None = None) -> float:
        """Seconds for n steps; `inside` gets the share of them spent in the ledger's calls over the rest."""
        settle()
        own, start = 0.0, clock()
        for _ in range(n):
            self.optimizer.zero_grad()
            self.loss().backward()
            if ledger is None:
                self.optimizer.step()
                continue
            began = clock()
            ledger.before_step()
            own -= began - clock()
            self.optimizer.step()
            began = clock()
            ledger.after_step()
            own -= began - clock()
        settle()
        total = clock() - start
        if ledger is not None:
            self.inside.append(own / (total - own))
            ledger.detach()
        return total


def build(model_name: str, optimizer_name: str) -> Run:
    torch.manual_seed(0)
    case = CASES[model_name]()
    syms = nf.find_symmetries(case.model.eval(), case.batch[0][:2])
    model = case.model.train()
    return Run(model, OPTIMIZERS[optimizer_name](model), syms, lambda: per_sample_loss(model, case.batch).mean())


@dataclass(frozen=True)
class Overhead:
    """The ledger's cost over the steps it watches, and the same from whole blocks: median and half the quartiles'
    distance.
    """

    every: str
    inside: float
    inside_spread: float
    blocks: float
    blocks_spread: float
    rounds: int
    block: int

    def __str__(self) -> str:
        inside, blocks = (
            f"{m:+6.2%} ± {d:5.2%}" for m, d in ((self.inside, self.inside_spread), (self.blocks, self.blocks_spread))
        )
        return f"every={self.every:<7} inside {inside}   blocks {blocks}   ({self.rounds} rounds of {self.block} steps)"


STRIDES: dict[str, dict[str, int]] = {"1": {"every": 1}, "10": {"every": 10}, "default": {}}


def overhead(run: Run, every: str, block: int, rounds: int) -> Overhead:
    run.inside.clear()
    ratios = []
    with tempfile.TemporaryDirectory() as run_dir:
        ledger = nf.Ledger(run.model, run.optimizer, run.syms, run_dir=run_dir, **STRIDES[every])
        if every == "default":  # its first steps are all recorded, and are no part of what it costs in the long run
            run.steps(FIRST, ledger)
            run.inside.clear()
        for k in range(rounds):
            order = (None, ledger) if k % 2 else (ledger, None)
            taken = {used: run.steps(block, used) for used in order}
            ratios.append(taken[ledger] / taken[None] - 1)
        ledger.close()
    cells = []
    for values in (run.inside, ratios):
        low, middle, high = statistics.quantiles(values, n=4)
        cells += [middle, (high - low) / 2]
    return Overhead(every, *cells, rounds, block)


def overheads(run: Run, seconds: float) -> tuple[float, list[Overhead]]:
    """Milliseconds of a step without the ledger, and its cost at every stride."""
    run.steps(3)
    alone, found = run.steps(5) / 5, []
    for every, share in (("1", 0.4), ("10", 0.3), ("default", 0.3)):
        length = 1.5 if every == "default" else 0.25  # seconds: the stride has to settle, and to come round
        block = max(4 if every == "1" else 10, round(length / alone / 10) * 10)
        rounds = max(3, round(seconds * share / (2 * block * alone)))
        found.append(overhead(run, every, block, rounds))
    return alone * 1e3, found


def run() -> list[dict[str, Any]]:
    """One row per model, optimiser and stride; keeps the record and writes the table of docs/benchmarks.md."""
    names = os.environ.get("MODELS", ",".join(CASES)).split(",")
    label = os.environ.get("LABEL", "")
    path = OUT / f"ledger{f'-{label}' if label else ''}.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() and "MODELS" in os.environ else {"rows": []}
    record |= {**provenance(device_name()), "threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    rows: list[dict[str, Any]] = []
    kept = [row for row in record["rows"] if row["model"] not in names]
    for name in names:
        for kind in OPTIMIZERS:
            step_ms, found = overheads(build(name, kind), float(os.environ.get("SECONDS", "60")))
            rows += [{"model": name, "optimizer": kind, "step_ms": step_ms, **asdict(cost)} for cost in found]
            print(f"{name}, {kind}: {step_ms:.1f} ms a step", *found, sep="\n    ", flush=True)
        path.write_text(json.dumps({**record, "rows": kept + rows}, indent=1) + "\n")
        write_ledger(OUT)
    return rows


def memory(run: Run) -> str:
    """Held on the host with a full ring, and growth of the peak, over weights, gradients, state (and activations)."""
    run.steps(60, nf.Ledger(run.model, run.optimizer, run.syms, every=1))
    state = [t for s in run.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor) and t.ndim]
    base = sum(t.numel() * t.element_size() for t in [*run.model.parameters(), *run.model.parameters(), *state])
    alone = peak_bytes(lambda: run.steps(1))
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    ledger = nf.Ledger(run.model, run.optimizer, run.syms, every=1)
    held = []
    for _ in range(2):
        run.steps(40, ledger)
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0] - before)
    tracemalloc.stop()
    full = held[1] + (500 - 80) * (held[1] - held[0]) / 40
    run.steps(20, ledger)
    watched = peak_bytes(lambda: run.steps(1, ledger))
    return (
        f"held {held[1] / 2**20:.2f} MiB after 80 steps ({held[1] / base:.1%} of {base / 2**20:.0f}), "
        f"{full / 2**20:.2f} with 500 rows, the full ring ({full / base:.1%}); "
        f"peak {(watched - alone) / (base + alone):+.2%}"
    )


def peak_bytes(step: Callable[[], float]) -> int:
    """Largest net tensor memory allocated during one step."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    level = top = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            top = max(top, level)
    return top


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(CASES))
    parser.add_argument("--optimizers", default=",".join(OPTIMIZERS))
    parser.add_argument("--seconds", type=float, default=60, help="per model and optimiser")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; on cuda the blocks count, steps run ahead")
    parser.add_argument("--memory", action="store_true", help="memory instead of time")
    options = parser.parse_args()
    torch.set_default_device(options.device)
    print(f"torch {torch.__version__}, {device_name()}", flush=True)
    for name in options.models.split(","):
        for kind in options.optimizers.split(","):
            watched = build(name, kind)
            if options.memory:
                watched.steps(3)
                print(f"{name}, {kind}: {memory(watched)}", flush=True)
                continue
            alone, found = overheads(watched, options.seconds)
            print(f"{name}, {kind}: {alone:.1f} ms a step", *found, sep="\n    ", flush=True)
