"""Cost of `gradient_moments` against plain forward + backward, beside its peers; scaling with batch, width, length."""

from __future__ import annotations

import json
import os
import platform
import statistics
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
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.peers import PEERS
from benchmarks.tables import provenance, write_moments
from noetherflow import SymmetrySet, declare, find_symmetries
from noetherflow.moments import Meter

OUT = Path(__file__).parent.parent / "docs" / "figures"
# Rounds of (plain, leg sums, entries), then of (plain, entries, peer); slow peers get fewer.
ROUNDS = {"mlp": 151, "gpt-relu": 11, "gpt-swiglu": 11, "llama": 11, "resnet18": 5}
PEER_SECONDS, PEER_ROUNDS = 5.0, (2, 7)
WITHOUT_PEERS = ("llama",)
"""Models whose output is a record with the logits in it, which the peers here do not take."""


@dataclass(frozen=True)
class Case:
    name: str
    model: nn.Module
    batch: tuple[Tensor, Tensor]
    syms: SymmetrySet


def per_sample_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy, averaged over a sequence where there is one."""
    out, y = model(batch[0]), batch[1]
    out = getattr(out, "logits", out)
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


def llama(length: int = 128, batch: int = 16) -> Case:
    """A small Llama (SwiGLU, RMSNorm, rotary positions, grouped queries) with random weights; symmetries as found."""
    import transformers

    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": length}
    config = transformers.LlamaConfig(**sizes, **heads, use_cache=False, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(96, (batch, length))
    name = f"Llama d 256, 4 layers, T {length}, batch {batch}, SwiGLU"
    return Case(name, model, (ids, ids.roll(-1, 1)), find_symmetries(model, ids[:2]))


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
    "llama": llama,
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
    """Leg sums of the case's symmetries; or, with `entries`, what the peers compute: `E[g^2]` of all parameters."""
    if entries:
        names = [n for n, _ in case.model.named_parameters()]
        meter = Meter(case.model, per_sample_loss, SymmetrySet(()), entries=True, parameters=names)
    else:
        meter = Meter(case.model, per_sample_loss, case.syms)
    meter.update(case.batch)
    return lambda: meter.update(case.batch), meter


def device_name() -> str:
    """Where tensors are made."""
    device = torch.get_default_device()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def clock() -> float:
    """Seconds: of the processor, which other programs do not take, except where a GPU does the work."""
    return time.process_time() if torch.get_default_device().type == "cpu" else time.perf_counter()


def settle() -> None:
    """Wait for the device that tensors are made on."""
    if torch.get_default_device().type == "cuda":
        torch.cuda.synchronize()


def rounds(steps: Mapping[str, Callable[[], Any]], count: int) -> dict[str, list[float]]:
    """Seconds of every step in each of `count` rounds, one after the other within a round, after one not counted."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for k in range(count + 1):
        for name, step in steps.items():
            start = clock()
            step()
            settle()
            if k:
                times[name].append(clock() - start)
    return times


def paired(over: list[float], under: list[float]) -> tuple[float, float]:
    """Median of the ratios within rounds, and half the distance between their quartiles."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(over, under, strict=True)], n=4)
    return middle, (high - low) / 2


def peak_memory(prepare: Callable[[], Callable[[], Any]]) -> float:
    """MiB allocated through torch at the highest point of one step, above the level before `prepare`, which makes it.

    Counted allocation by allocation, hence the same in every run. What `prepare` leaves behind counts.
    """
    if torch.get_default_device().type == "cuda":
        before = torch.cuda.memory_allocated()
        step = prepare()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step = prepare()
        with record_function("steady"):
            step()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    start = next(e.start_ns() for e in events if e.name() == "steady")
    level = highest = 0
    for when, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        level += size
        highest = max(highest, level) if when >= start else level
    return highest / 2**20


def accumulating(case: Case) -> Callable[[], None]:
    """Forward and backward onto the `.grad` of the step before, as in gradient accumulation."""
    step = lambda: per_sample_loss(case.model, case.batch).mean().backward()
    step()
    return step


def memory(case: Case) -> dict[str, float]:
    """Peak MiB of plain steps, with and without `.grad` kept, and of leg sums as ratios to those."""
    case.model.zero_grad()
    base = peak_memory(lambda: plain(case))
    case.model.zero_grad()
    kept = peak_memory(lambda: accumulating(case))
    case.model.zero_grad()
    ours = peak_memory(lambda: measured(case, False)[0])
    return {"plain_MiB": base, "memory": ours / base, "memory_to_accumulation": ours / kept}


def compare(case: Case, count: int, peers: bool = True) -> list[dict[str, Any]]:
    base = plain(case)
    sums, (entries, meter) = measured(case, False)[0], measured(case, True)
    squares, n = meter.result().squares, len(case.batch[0])
    times = rounds({"plain": base, "leg sums": sums, "entries": entries}, count)
    rows: list[dict[str, Any]] = []
    for method in ("leg sums", "entries"):
        middle, spread = paired(times[method], times["plain"])
        rows.append({"model": case.name, "method": method, "ratio": middle, "spread": spread})
    rows[0] |= {"plain_ms": 1e3 * statistics.median(times["plain"])} | memory(case)
    for name, make in PEERS.items() if peers else ():
        row: dict[str, Any] = {"model": case.name, "method": name}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                step_of = make(case.model, per_sample_loss)
                start = time.perf_counter()
                theirs = step_of(case.batch)
                seconds = time.perf_counter() - start
                row |= disagreement({k: t.double() / n for k, t in theirs.items()}, squares)
                del theirs
                enough = min(max(int(PEER_SECONDS / seconds), PEER_ROUNDS[0]), PEER_ROUNDS[1])
                times = rounds({"plain": base, "entries": entries, name: partial(step_of, case.batch)}, enough)
                row["ratio"], row["spread"] = paired(times[name], times["plain"])
                row["to_ours"], row["to_ours_spread"] = paired(times[name], times["entries"])
                peak = peak_memory(lambda f=step_of: partial(f, case.batch))
                row["memory"] = peak / rows[0]["plain_MiB"]
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
        line = row.get("refused") or f"{row['ratio']:7.2f} +- {row['spread']:.2f}"
        if "to_ours" in row:
            line += f", to entries {row['to_ours']:.2f} +- {row['to_ours_spread']:.2f}"
        if "memory" in row:
            line += f", peak memory {row['memory']:.2f}"
        if "plain_MiB" in row:
            line += f" of {row['plain_MiB']:.1f} MiB ({row['memory_to_accumulation']:.2f} with .grad kept)"
        if "error" in row:
            line += f", differs by {row['error']:.0e} ({row['worst']})"
        print(f"{row['model']:<46}{row['method']:<12}{line}", flush=True)


def scaling() -> dict[str, list[tuple[int, float]]]:
    """Seconds per step of leg sums against batch, width and sequence length."""

    def seconds(case: Case) -> float:
        step, _ = measured(case, False)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            step()
            settle()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    return {
        "batch": [(b, seconds(mlp(batch=b))) for b in (64, 128, 256, 512, 1024)],
        "parameters": [(w * w + 794 * w, seconds(mlp(width=w))) for w in (128, 256, 512, 1024)],
        "sequence length": [(t, seconds(gpt(False, length=t, batch=4))) for t in (32, 64, 128, 256)],
    }


def plot(curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(11, 3.2), layout="constrained")
    for axis, (name, points) in zip(axes, curves.items(), strict=True):
        x, y = zip(*points, strict=True)
        axis.loglog(x, [1e3 * v for v in y], "o-", label="leg sums")
        axis.loglog(x, [1e3 * y[-1] * v / x[-1] for v in x], ":", color="gray", label="linear")
        axis.set(xlabel=name, ylabel="ms per step")
        axis.set_xticks(x, [f"{v:,}" for v in x], rotation=20)
        axis.set_yticks(
            ticks := [v for v in (1, 2, 5, 10, 20, 50, 100, 200) if 0.5e3 * min(y) < v < 2e3 * max(y)], ticks
        )
        axis.minorticks_off()
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def run() -> list[dict[str, Any]]:
    """One row per model and method; also writes docs/figures/moments.json and the scaling plot.

    `MODELS=mlp,scaling` in the environment measures those alone and leaves the rest of the file as it was.
    `LABEL=laptop` keeps the record of a machine apart, so that its rows stand beside those of others in
    docs/benchmarks.md, which is written anew.
    `DEVICE=cuda` measures on a GPU, into `moments_cuda.json` and `moments_scaling_cuda.svg`.
    """
    device = os.environ.get("DEVICE", "cpu")
    torch.set_default_device(device)
    suffix = "" if device == "cpu" else f"_{device}"
    torch.manual_seed(0)
    wanted = os.environ.get("MODELS", ",".join((*CASES, "scaling"))).split(",")
    label = os.environ.get("LABEL", "")
    path = OUT / f"moments{suffix}{f'-{label}' if label else ''}.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() and "MODELS" in os.environ else {"rows": []}
    record |= provenance(device_name())
    record["device"] = device_name()
    record["threads"] = threads = torch.get_num_threads()
    machine = f"{platform.machine()}, {device_name()}, load {os.getloadavg()[0]:.1f}"
    print(f"torch {torch.__version__}, {threads} threads, {machine}")
    rows = []
    for name in wanted:
        if name == "scaling":
            record["scaling"] = curves = scaling()
            for axis, points in curves.items():
                print(f"{axis}: " + ", ".join(f"{x} -> {1e3 * y:.1f} ms" for x, y in points))
            plot(curves, OUT / f"moments_scaling{suffix}.svg")
        else:
            case = CASES[name]()
            count = ROUNDS[name] if device == "cpu" else max(51, ROUNDS[name])
            found = compare(case, count, peers=name not in WITHOUT_PEERS)
            show(found)
            rows += found
            record["rows"] = [row for row in record["rows"] if row["model"] != case.name] + found
    path.write_text(json.dumps(record, indent=1))
    write_moments(OUT)
    return rows
