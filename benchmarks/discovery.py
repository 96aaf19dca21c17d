"""Time and memory of finding symmetries: real configurations on the meta device, and cost against depth 1..64."""

from __future__ import annotations

import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

DEPTHS = (1, 2, 4, 8, 16, 32, 64)


def _build(name: str, depth: int | None) -> tuple[Any, Any]:
    import torch
    import transformers as tf

    from noetherflow.discovery.hf import example_inputs

    small = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 100}
    kind, config = {
        "gpt2-124m": (tf.GPT2LMHeadModel, tf.GPT2Config()),
        "resnet-50": (tf.ResNetForImageClassification, tf.ResNetConfig()),
        "llama-7b": (tf.LlamaForCausalLM, tf.LlamaConfig()),
        "llama-depth": (tf.LlamaForCausalLM, tf.LlamaConfig(num_hidden_layers=depth or 1, **small)),
    }[name]
    with torch.device("meta"):
        model = kind(config).eval()
    return model, example_inputs(model)


def measure(name: str, depth: int | None = None) -> dict[str, Any]:
    """Seconds to trace, to infer and solve, and in all; peak resident memory of this process."""
    from noetherflow.discovery.export import export
    from noetherflow.discovery.find import find_in_graph

    model, inputs = _build(name, depth)
    start = time.perf_counter()
    graph = export(model, inputs)
    traced = time.perf_counter()
    syms = find_in_graph(graph)
    end = time.perf_counter()
    return {
        "model": name if depth is None else f"{name}-{depth}",
        "nodes": len(graph.nodes),
        "symmetries": len(syms),
        "trace_s": traced - start,
        "infer_s": end - traced,
        "total_s": end - start,
        "ms_per_node": 1e3 * (end - start) / len(graph.nodes),
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def run() -> list[dict[str, Any]]:
    """One fresh process per row, so that peaks and warm caches do not mix."""
    jobs = [("gpt2-124m", None), ("resnet-50", None), ("llama-7b", None), *(("llama-depth", d) for d in DEPTHS)]
    rows = []
    for job in jobs:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            rows.append(pool.submit(measure, *job).result())
    return rows
