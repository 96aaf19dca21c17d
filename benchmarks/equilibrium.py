"""Time and memory of the joint solve on full-size models: GPT-2 (124M) by gradient factors, ResNet-18 by entries."""

from __future__ import annotations

import copy
import multiprocessing
import os
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import noetherflow as nf

TEXTS, TOKENS = 8, 64
IMAGES = 16


class Peak:
    """The highest resident memory inside a `with` block, above that at its start, in MiB (sampled every 5 ms)."""

    def __enter__(self) -> Peak:
        self.start = self.highest = _resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.highest = max(self.highest, _resident())

    @property
    def extra(self) -> float:
        return self.highest - self.start


def _resident() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def next_token(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean cross entropy of the next token, per text."""
    logits = model(input_ids=ids).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1).mean(1)


def gpt2(layers: int = 12) -> dict[str, Any]:
    """GPT-2 124M, float32, random weights: seconds to find, to measure, and to solve; memory of the solve."""
    import transformers as tf

    from noetherflow.moments import gradient_factors

    torch.manual_seed(0)
    model = tf.GPT2LMHeadModel(tf.GPT2Config(use_cache=False, n_layer=layers)).eval()
    ids = torch.randint(model.config.vocab_size, (TEXTS, TOKENS))
    found, find_s = _timed(lambda: nf.find_symmetries(model, {"input_ids": ids}))
    syms = _exact(found)
    moments, moments_s = _timed(lambda: nf.gradient_moments(model, next_token, [ids], syms, groups=1))
    factors, factors_s = _timed(lambda: gradient_factors(model, next_token, [ids], syms))
    sgd = nf.SGDConfig(0.05, 2, weight_decay=1e-3)
    with Peak() as peak:
        eq, solve_s = _timed(lambda: nf.noise_equilibrium(model, syms, moments, sgd, samples=factors))
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    return {
        "model": f"GPT-2, {sum(p.numel() for p in model.parameters()) / 1e6:.0f}M",
        "charges": syms.n_charges(),
        "find_s": find_s,
        "moments_s": moments_s,
        "factors_s": factors_s,
        "factors_mib": sum(t.numel() * t.element_size() for f in factors.values() for t in (f.left, f.right)) / 2**20,
        "solve_s": solve_s,
        "solve_mib": peak.extra,
        "of_model": peak.extra / size,
        "sweeps": eq.iterations,
        "flow_now": eq.imbalance_now,
        "flow": eq.imbalance,
        "output_change": nf.balance_(model, eq, example_inputs={"input_ids": ids}).output_change,
    }


def resnet18(eps: float = 1e-5) -> dict[str, Any]:
    """ResNet-18, 224 x 224, float64: all channel symmetries, those that BatchNorm's eps makes approximate included."""
    import transformers as tf

    torch.manual_seed(0)
    config = tf.ResNetConfig(depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], layer_type="basic", num_labels=1000)
    config.embedding_size = 64
    model = tf.ResNetForImageClassification(config).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = eps
    images, labels = torch.randn(IMAGES, 3, 224, 224, dtype=torch.float64), torch.randint(1000, (IMAGES,))
    with torch.no_grad():
        for _ in range(3):
            model(images)  # running statistics
    model.eval()

    def loss(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(m(batch[0]).logits, batch[1], reduction="none")

    return {"model": f"ResNet-18, 224 x 224, eps {eps:g}", **_channels(model, loss, (images, labels))}


def _channels(model: nn.Module, loss: Any, data: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Two solves: the exact symmetries alone, and with those that BatchNorm's eps makes approximate."""
    found, find_s = _timed(lambda: nf.find_symmetries(model, data[0][:2]))
    batches = [tuple(t.split(4)[k] for t in data) for k in range(len(data[0]) // 4)]
    sgd = nf.SGDConfig(0.1, 2, weight_decay=1e-4, dataset_size=len(data[0]))
    row: dict[str, Any] = {"find_s": find_s}
    for name, syms in (("exact", _exact(found)), ("all", found)):
        # without the legs on running statistics: this is about the solver, and measures in evaluation mode
        weights = nf.SymmetrySet(tuple(replace(s, legs=s.weight_legs) for s in syms), shapes=syms.shapes)
        measure = partial(nf.gradient_moments, loss_fn=loss, batches=batches, syms=weights, entries=True, groups=1)
        moments, row[f"{name}_moments_s"] = _timed(partial(measure, model))
        with Peak() as peak:
            eq, row[f"{name}_solve_s"] = _timed(partial(nf.noise_equilibrium, model, syms, moments, sgd))
        moved = copy.deepcopy(model)
        report = nf.balance_(moved, eq, example_inputs=data[0][:4], tolerance=1.0)
        again = nf.noise_equilibrium(moved, syms, measure(moved), sgd, max_iterations=0)
        row |= {
            f"{name}_symmetries": f"{len(syms)} ({sum(s.blocks for s in syms)} coordinates)",
            f"{name}_classes": dict(Counter(s.classification for s in eq)),
            f"{name}_solve_mib": peak.extra,
            f"{name}_sweeps": eq.iterations,
            f"{name}_flow": f"{eq.imbalance_now:.2e} -> {eq.imbalance:.1e}, measured again {again.imbalance_now:.1e}",
            f"{name}_output_change": report.output_change,
        }
    return row


def _exact(syms: nf.SymmetrySet) -> nf.SymmetrySet:
    return syms.without({s.name: "approximate" for s in syms if s.eps is not None})


def _timed(call: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    return call(), time.perf_counter() - start


def run() -> list[dict[str, Any]]:
    """One fresh process per row, so that peaks do not mix."""
    rows = []
    for job in (gpt2, resnet18, partial(resnet18, eps=1e-8)):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            rows.append(pool.submit(job).result())
    return rows
