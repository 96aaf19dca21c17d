"""Cost of `gradient_moments` against plain forward + backward, beside its peers; scaling with batch, width, length."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import platform
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers import PEERS
from noetherflow import SymmetrySet, declare
from noetherflow.moments import Meter

OUT = Path(__file__).parent.parent / "docs" / "figures"
PAIRS = {"mlp": 41, "gpt-relu": 7, "gpt-swiglu": 7, "resnet18": 5}


@dataclass(frozen=True)
class Case:
    name: str
    model: nn.Module
    batch: tuple[Tensor, Tensor]
    syms: SymmetrySet


def per_sample_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy, averaged over a sequence where there is one."""
    out, y = model(batch[0]), batch[1]
    if y.ndim == 1:
        return F.cross_entropy(out, y, reduction="none")
    return F.cross_entropy(out.flatten(0, 1), y.flatten(), reduction="none").view(y.shape).mean(1)


def mlp(width: int = 512, batch: int = 256) -> Case:
    model = nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    found = [
        declare(model, "diagonal", [(f"{i}.weight", 0), (f"{i}.bias", 0)], [(f"{i + 2}.weight", 1)]) for i in (0, 2)
    ]
    syms = SymmetrySet(tuple(s for f in found for s in f.symmetries))
    return Case(f"MLP 784-{width}-{width}-10, batch {batch}", model, _labelled(torch.randn(batch, 784), 10), syms)


class Block(nn.Module):
    def __init__(self, d: int, heads: int, gated: bool) -> None:
        super().__init__()
        self.heads, self.gated = heads, gated
        self.ln1, self.ln2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.gate = nn.Linear(d, 4 * d) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        h = self.ln1(x)
        q, k, v = (f(h).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d))
        h = self.ln2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h) if self.gate is not None else F.relu(self.up(h)))


class GPT(nn.Module):
    def __init__(self, d: int = 256, layers: int = 4, length: int = 128, vocabulary: int = 96, gated: bool = False):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, d), nn.Embedding(length, d)
        self.blocks = nn.ModuleList(Block(d, 4, gated) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def gpt(gated: bool, length: int = 128, batch: int = 16) -> Case:
    model = GPT(length=length, gated=gated)
    found = []
    for i in range(4):
        p = f"blocks.{i}."
        found.append(declare(model, "diagonal", [(p + "up.weight", 0), (p + "up.bias", 0)], [(p + "down.weight", 1)]))
        queries = [(p + "q.weight", 0), (p + "q.bias", 0)]
        keys = [(p + "k.weight", 0), (p + "k.bias", 0)]
        values = [(p + "v.weight", 0), (p + "v.bias", 0)]
        found.append(declare(model, "general_linear", queries, keys, blocks=4))
        found.append(declare(model, "general_linear", values, [(p + "o.weight", 1)], blocks=4))
        into = [(p + f"{n}.weight", 1) for n in "qkv"]
        found.append(declare(model, "diagonal", [(p + "ln1.weight", 0), (p + "ln1.bias", 0)], into))
        up = [(p + f"{n}.weight", 1) for n in (("up", "gate") if gated else ("up",))]
        found.append(declare(model, "diagonal", [(p + "ln2.weight", 0), (p + "ln2.bias", 0)], up))
    found.append(declare(model, "diagonal", [("norm.weight", 0), ("norm.bias", 0)], [("head.weight", 1)]))
    ids = torch.randint(96, (batch, length))
    syms = SymmetrySet(tuple(s for f in found for s in f.symmetries))
    name = f"GPT d 256, 4 layers, T {length}, batch {batch}, {'SwiGLU' if gated else 'ReLU'}"
    return Case(name, model, (ids, ids.roll(-1, 1)), syms)


class Residual(nn.Module):
    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b)
        self.conv2, self.bn2 = nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b)
        self.skip = None
        if stride > 1 or a != b:
            self.skip = nn.Sequential(nn.Conv2d(a, b, 1, stride, bias=False), nn.BatchNorm2d(b))

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(h + (x if self.skip is None else self.skip(x)))


def resnet18(batch: int = 64) -> Case:
    sizes = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2)]
    body = [Residual(*s) for s in (*sizes, (512, 512, 1))]
    stem = (nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    model = nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)).eval()
    found = [
        declare(model, "diagonal", [(f"{i}.bn1.weight", 0), (f"{i}.bn1.bias", 0)], [(f"{i}.conv2.weight", 1)])
        for i in range(3, 11)
    ]
    found += [declare(model, "scalar", [(f"{i}.conv1.weight", 0)]) for i in range(3, 11)]
    syms = SymmetrySet(tuple(s for f in found for s in f.symmetries))
    return Case(f"ResNet-18, 32x32, batch {batch}", model, _labelled(torch.randn(batch, 3, 32, 32), 10), syms)


CASES: dict[str, Callable[[], Case]] = {
    "mlp": mlp,
    "gpt-relu": partial(gpt, False),
    "gpt-swiglu": partial(gpt, True),
    "resnet18": resnet18,
}


def _labelled(x: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    return x, torch.randint(classes, (len(x),))


def plain(case: Case) -> Callable[[], None]:
    def step() -> None:
        case.model.zero_grad()
        per_sample_loss(case.model, case.batch).mean().backward()

    return step


def measured(case: Case, entries: bool) -> tuple[Callable[[], None], Meter]:
    parameters = [n for n, _ in case.model.named_parameters()] if entries else ()
    meter = Meter(case.model, per_sample_loss, case.syms, entries=entries, parameters=parameters)
    meter.update(case.batch)
    return lambda: meter.update(case.batch), meter


def ratio(base: Callable[[], Any], other: Callable[[], Any], pairs: int) -> tuple[float, float, float]:
    """Median of paired time ratios `other / base`, its quartile half-range, and the median base time in seconds."""
    base(), other()
    ratios, times = [], []
    for _ in range(pairs):
        marks = [time.perf_counter()]
        for step in (base, other):
            step()
            marks.append(time.perf_counter())
        ratios.append((marks[2] - marks[1]) / (marks[1] - marks[0]))
        times.append(marks[1] - marks[0])
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, (high - low) / 2, statistics.median(times)


def _peak(name: str, ours: bool) -> float:
    """Resident MiB at the highest point of three steady steps, above the level with model and data alone."""
    import ctypes

    torch.manual_seed(0)
    case = CASES[name]()
    page = os.sysconf("SC_PAGE_SIZE") / 2**20
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * page
    plain(case)()
    case.model.zero_grad()
    gc.collect()
    trim = ctypes.CDLL(None).malloc_trim
    trim(0)
    before, seen, done = resident(), [0.0], threading.Event()
    step = measured(case, False)[0] if ours else plain(case)
    trim(0)

    def watch() -> None:
        while not done.is_set():
            seen.append(resident())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(3):
        step()
    done.set()
    watcher.join()
    return max(seen) - before


def peak_memory(name: str, ours: bool) -> float:
    """`_peak` in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (name, ours))


def compare(case: Case, pairs: int, peers: bool = True) -> list[dict[str, Any]]:
    base = plain(case)
    rows: list[dict[str, Any]] = []
    for entries in (False, True):
        step, meter = measured(case, entries)
        r, spread, seconds = ratio(base, step, pairs)
        rows.append({"model": case.name, "method": "entries" if entries else "leg sums", "ratio": r, "spread": spread})
        rows[-1]["plain_ms"] = 1e3 * seconds
    squares = meter.result().squares
    n = len(case.batch[0])
    for name, make in PEERS.items() if peers else ():
        row: dict[str, Any] = {"model": case.name, "method": name}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                step_of = make(case.model, per_sample_loss)
                theirs = step_of(case.batch)
                row |= disagreement({k: t.double() / n for k, t in theirs.items()}, squares)
                row["ratio"], row["spread"], _ = ratio(base, partial(step_of, case.batch), 3)
        except Exception as refused:
            row["refused"] = f"{type(refused).__name__}: {refused}".splitlines()[0][:90]
        rows.append(row)
    return rows


def disagreement(theirs: dict[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, Any]:
    """Largest relative difference of a parameter's `E[g^2]`, and whose; without key biases, whose gradient is zero."""
    largest = max(float(t.norm()) for t in ours.values())
    real = [k for k, t in ours.items() if float(t.norm()) > 1e-9 * largest]
    error, worst = max((float((theirs[k] - ours[k]).norm() / ours[k].norm()), k) for k in real)
    return {"error": error, "worst": worst}


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        value = row.get("refused") or f"{row['ratio']:7.2f} +- {row['spread']:.2f}"
        error = f"  differs by {row['error']:.0e} ({row['worst']})" if "error" in row else ""
        print(f"{row['model']:<52}{row['method']:<12}{value}{error}", flush=True)


def scaling() -> dict[str, list[tuple[int, float]]]:
    """Seconds per step of leg sums against batch, width and sequence length."""

    def seconds(case: Case) -> float:
        step, _ = measured(case, False)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    return {
        "batch": [(b, seconds(mlp(batch=b))) for b in (64, 128, 256, 512, 1024)],
        "parameters": [(w * w + 794 * w, seconds(mlp(width=w))) for w in (128, 256, 512, 1024)],
        "sequence length": [(t, seconds(gpt(False, length=t, batch=4))) for t in (32, 64, 128, 256)],
    }


def plot(curves: dict[str, list[tuple[int, float]]]) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(11, 3.2), layout="constrained")
    for axis, (name, points) in zip(axes, curves.items(), strict=True):
        x, y = zip(*points, strict=True)
        axis.loglog(x, [1e3 * v for v in y], "o-", label="leg sums")
        axis.loglog(x, [1e3 * y[-1] * v / x[-1] for v in x], ":", color="gray", label="linear")
        axis.set(xlabel=name, ylabel="ms per step")
    axes[0].legend()
    OUT.mkdir(parents=True, exist_ok=True)
    figure.savefig(OUT / "moments_scaling.svg")


def run() -> list[dict[str, Any]]:
    """One row per model and method; also writes docs/figures/moments.json and the scaling plot."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {threads} threads, {platform.machine()}, load {os.getloadavg()[0]:.1f}")
    rows = []
    for name, build in CASES.items():
        case = build()
        found = compare(case, PAIRS[name])
        memory = [peak_memory(name, ours) for ours in (False, True)]
        found[0] |= {"memory_ratio": memory[1] / memory[0], "plain_MiB": memory[0]}
        show(found)
        print(f"{case.name:<52}{'peak memory':<12}{memory[1] / memory[0]:7.2f} ({memory[0]:.0f} MiB plain)")
        rows += found
    curves = scaling()
    for name, points in curves.items():
        print(f"{name}: " + ", ".join(f"{x} -> {1e3 * y:.1f} ms" for x, y in points))
    plot(curves)
    (OUT / "moments.json").write_text(json.dumps({"threads": threads, "rows": rows, "scaling": curves}, indent=1))
    return rows
