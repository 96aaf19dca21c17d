"""GPT-2 from end to end: find, measure, flow and equilibrium, with the time and the memory of each.

    .venv/bin/python -m benchmarks gpt2                                # 124M parameters, 4 batches of 2 x 128 tokens
    LAYERS=1 VOCABULARY=10000 TOKENS=32 .venv/bin/python -m benchmarks gpt2   # in a minute

It keeps its record in `docs/figures/gpt2-LAYERS.json`, and writes the table of `docs/benchmarks.md` from all of them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

import noetherflow as nf
from benchmarks.equilibrium import Peak, next_token
from benchmarks.moments import OUT
from benchmarks.tables import provenance, write_gpt2

T = TypeVar("T")
BATCHES, TEXTS = 4, 2


class Stages:
    """Runs stages one after the other, and keeps a row for each."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def run(self, name: str, work: Callable[[], T]) -> T:
        """The result of a stage, whose seconds, processor seconds and memory above its start are kept and printed."""
        began, used = time.perf_counter(), time.process_time()
        with Peak() as peak:
            found = work()
        row = {"stage": name, "seconds": time.perf_counter() - began, "cpu": time.process_time() - used}
        self.rows.append({**row, "mib": peak.extra, "load": os.getloadavg()[0]})
        return found


def run() -> list[dict[str, Any]]:
    """One row a stage."""
    import transformers as tf

    layers, tokens = int(os.environ.get("LAYERS", "12")), int(os.environ.get("TOKENS", "128"))
    vocabulary = int(os.environ.get("VOCABULARY", "50257"))
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = tf.GPT2Config(use_cache=False, n_layer=layers, vocab_size=vocabulary, **ends)
    model = tf.GPT2LMHeadModel(config).eval()
    batches = list(torch.randint(vocabulary, (BATCHES * TEXTS, tokens)).split(TEXTS))
    sgd = nf.SGDConfig(0.05, 4, weight_decay=1e-4)
    stages = Stages()

    def plain() -> None:
        for ids in batches:
            next_token(model, ids).mean().backward()
            model.zero_grad()

    def measure() -> nf.GradientMoments:
        return nf.gradient_moments(model, next_token, batches, syms, for_="equilibrium")

    def find() -> nf.SymmetrySet:
        return _exact(nf.find_symmetries(model, _inputs(batches)).trainable(model))

    syms = stages.run("find", find)
    plain()
    stages.run(f"{BATCHES} plain steps", plain)
    moments = stages.run("measure for the equilibrium", measure)
    stages.run("flow", lambda: nf.noether_flow(model, syms, moments, sgd))
    stages.run("equilibrium", lambda: nf.noise_equilibrium(model, syms, moments, sgd))
    size = sum(p.numel() for p in model.parameters())
    about = {"parameters": size, "layers": layers, "tokens": tokens, "threads": torch.get_num_threads()}
    record = {**about, **provenance("cpu"), "rows": stages.rows}
    (OUT / f"gpt2-{layers}.json").write_text(json.dumps(record, indent=1) + "\n")
    write_gpt2(OUT)
    return stages.rows


def _exact(syms: nf.SymmetrySet) -> nf.SymmetrySet:
    return syms.without({s.name: "approximate" for s in syms if s.eps is not None})


def _inputs(batches: list[Tensor]) -> dict[str, Tensor]:
    return {"input_ids": batches[0][:1]}
