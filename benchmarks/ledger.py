"""Cost of the ledger: training steps with it against the same steps without it, interleaved in one process.

    python benchmarks/ledger.py [--rounds 15] [--models mlp,gpt,resnet18] [--optimizers momentum,adamw]

Prints, per model and optimiser, the median ratio of step times with its quartiles at every=1 and every=10, and the
growth of the tensors held and of the peak during a step.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import noetherflow as nf

Case = tuple[nn.Module, Any, Callable[[nn.Module], Tensor]]


def mlp() -> Case:
    """784-512-512-10, batch 256."""
    layers = [nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
    x, y = torch.randn(256, 784), torch.randint(10, (256,))
    return nn.Sequential(*layers), x[:2], lambda m: nn.functional.cross_entropy(m(x), y)


def gpt() -> Case:
    """GPT-2 with 4 layers of width 128, 4 heads; 8 sequences of 128 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=256, n_positions=128, n_embd=128, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0
    )
    config.loss_type = "ForCausalLM"
    ids = torch.randint(256, (8, 128))
    example = {"input_ids": ids[:2, :16], "use_cache": False}
    return GPT2LMHeadModel(config), example, lambda m: m(input_ids=ids, labels=ids, use_cache=False).loss


def resnet18() -> Case:
    """ResNet-18 on 32x32 images, batch 16."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], num_labels=10)
    x, y = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
    example = {"pixel_values": x[:2]}
    return ResNetForImageClassification(config), example, lambda m: m(pixel_values=x, labels=y).loss


MODELS = {"mlp": mlp, "gpt": gpt, "resnet18": resnet18}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-5),
}


def measure(model_name: str, optimizer_name: str, rounds: int) -> str:
    """One row of the table."""
    torch.manual_seed(0)
    model, example, loss = MODELS[model_name]()
    syms = nf.find_symmetries(model.eval(), example).trainable(model)
    model.train()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())

    def steps(n: int) -> float:
        start = time.perf_counter()
        for _ in range(n):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
        return (time.perf_counter() - start) / n

    alone = steps(3)
    count = 20 if alone < 0.05 else 10
    cells = []
    for every in (1, 10):
        with tempfile.TemporaryDirectory() as run_dir:
            ledger = nf.Ledger(model, optimizer, syms, every=every, run_dir=run_dir)
            ratios = []
            for k in range(rounds):
                first = k % 2 == 0
                if first:
                    plain = steps(count)
                ledger.attach()
                watched = steps(count)
                ledger.detach()
                if not first:
                    plain = steps(count)
                ratios.append(watched / plain - 1)
            ledger.close()
        low, middle, high = statistics.quantiles(ratios, n=4)
        cells.append(f"{middle:+7.1%} [{low:+.1%}, {high:+.1%}]")
    held, peak = memory(model, optimizer, syms, lambda: steps(1))
    return f"{model_name:<10}{optimizer_name:<10}{alone * 1e3:>9.1f} ms  {'  '.join(cells)}  {held:+6.2%}  {peak:+6.2%}"


def memory(
    model: nn.Module, optimizer: torch.optim.Optimizer, syms: nf.SymmetrySet, step: Callable[[], float]
) -> tuple[float, float]:
    """Growth of what is held between steps (host memory the ledger keeps against weights, gradients and optimiser
    state), and of the largest sum of live tensor memory during a step."""
    step()
    base = sum(p.numel() * p.element_size() * (2 + len(optimizer.state[p])) for p in model.parameters())
    quiet = peak_bytes(step)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    ledger = nf.Ledger(model, optimizer, syms).attach()
    for _ in range(20):
        step()
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    ledger.flush()
    watched = peak_bytes(step)
    ledger.close()
    return held / base, (watched - quiet) / (base + quiet)


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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--optimizers", default=",".join(OPTIMIZERS))
    options = parser.parse_args()
    print(
        f"{'model':<10}{'optimiser':<10}{'step':>12}  {'every=1 [quartiles]':<24}  {'every=10':<24}  {'held':<6} peak"
    )
    for name in options.models.split(","):
        for kind in options.optimizers.split(","):
            print(measure(name, kind, options.rounds), flush=True)
