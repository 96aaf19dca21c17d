"""What a user pays for one call: `gradient_moments` and a `Meter` used again, in plain steps, with the defaults.

    OMP_NUM_THREADS=1 python -m benchmarks one_call               # the table of docs/benchmarks.md, about 10 minutes
    MODELS=mlp,llama OMP_NUM_THREADS=1 python -m benchmarks one_call     # some models, the rest of the record is kept

Every round makes some plain steps (forward and backward) and each call once, one after the other, in processor time.
The table shows the median over rounds of a call's time over that of as many plain steps as it has batches, and half the
distance between the quartiles. The record is kept in `docs/figures/one_call.json`, with `LABEL=laptop` in
`one_call-laptop.json`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

import noetherflow as nf
from benchmarks.moments import CASES, OUT, Case, clock, device_name, paired, per_sample_loss, plain, settle
from benchmarks.tables import provenance, write_one_call

ROUNDS = {"mlp": 9, "gpt-relu": 3, "gpt-swiglu": 3, "llama": 3, "resnet18": 3}
PLAIN_SECONDS = 1.0
"""Of plain steps in each round."""


@dataclass(frozen=True)
class Call:
    """A measurement of so many batches."""

    batches: int
    run: Callable[[], Any]


@dataclass
class Times:
    """Seconds of a plain step, and of every call by batch, one entry a round."""

    plain: list[float] = field(default_factory=list)
    calls: dict[str, list[float]] = field(default_factory=dict)


def calls(case: Case) -> dict[str, Call]:
    """The calls measured, with their defaults; meters have measured before, and captured what they replay."""

    def once(batches: int) -> Call:
        given = [case.batch] * batches
        return Call(batches, lambda: nf.gradient_moments(case.model, per_sample_loss, given, case.syms))

    def again(capture: bool) -> Call:
        meter, given = nf.Meter(case.model, per_sample_loss, case.syms, capture=capture), [case.batch] * 4
        for _ in range(2):
            meter.measure(given)
        return Call(4, lambda: meter.measure(given))

    return {
        "16 batches": once(16),
        "4 batches": once(4),
        "1 batch": once(1),
        "`Meter` again, 4 batches": again(False),
        "the same, `capture=True`": again(True),
    }


def seconds(run: Callable[[], Any]) -> float:
    """What one run takes."""
    settle()
    start = clock()
    run()
    settle()
    return clock() - start


def timed(case: Case, made: Mapping[str, Call], count: int) -> Times:
    """The times of `count` rounds, after one not counted."""
    step, found = plain(case), Times(calls={name: [] for name in made})
    step()
    steps = max(4, round(PLAIN_SECONDS / seconds(step)))
    for k in range(count + 1):
        alone = seconds(lambda: [step() for _ in range(steps)]) / steps
        taken = {name: seconds(call.run) / call.batches for name, call in made.items()}
        if k:
            found.plain.append(alone)
            for name, value in taken.items():
                found.calls[name].append(value)
    return found


def run() -> list[dict[str, Any]]:
    """One row per model and call; keeps the record and writes the table."""
    names = os.environ.get("MODELS", ",".join(CASES)).split(",")
    label = os.environ.get("LABEL", "")
    path = OUT / f"one_call{f'-{label}' if label else ''}.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() and "MODELS" in os.environ else {"rows": []}
    rows = []
    for name in names:
        torch.manual_seed(0)
        case = CASES[name]()
        times = timed(case, calls(case), ROUNDS[name])
        load = round(os.getloadavg()[0], 1)
        for call, values in times.calls.items():
            ratio, spread = paired(values, times.plain)
            about = {"model": case.name, "plain_ms": 1e3 * min(times.plain), "load": load}
            rows.append({**about, "call": call, "ratio": ratio, "spread": spread})
        print(
            f"{case.name}: " + ", ".join(f"{r['call']} {r['ratio']:.2f}" for r in rows[-len(times.calls) :]), flush=True
        )
    kept = [row for row in record["rows"] if row["model"] not in {r["model"] for r in rows}]
    record |= {**provenance(device_name()), "threads": torch.get_num_threads(), "rows": kept + rows}
    path.write_text(json.dumps(record, indent=1) + "\n")
    write_one_call(OUT)
    return rows
