"""Run as a program: move a PyTorch file of a few large tensors, its model on the meta device, and print what it took.

`python torch_file_memory.py FOLDER WIDTH LAYERS` writes a bias-free MLP of LAYERS square matrices of float32 (with the
state of AdamW when `--optimizer` stands behind), moves it to its least norm, and prints JSON: peak resident memory of
solve and move, pages of mapped files included, in MB above what the process had before (Linux counts it exactly), the
size of the largest tensor, and the seconds.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from torch import nn

import noetherflow as nf


class ExactPeak:
    """The largest resident memory of this process within the block, above that at its start, counted by the kernel."""

    def __enter__(self) -> ExactPeak:
        Path("/proc/self/clear_refs").write_text("5")
        self.start, self.began = status("VmRSS"), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = round(time.perf_counter() - self.began, 1)
        self.megabytes = round((status("VmHWM") - self.start) / 1e6, 1)


def status(kind: str) -> int:
    """Bytes of this process: resident now (`VmRSS`), or at most since the count began (`VmHWM`)."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return next(int(words[1]) * 1024 for words in lines if words[0] == f"{kind}:")


def net(width: int, layers: int) -> nn.Sequential:
    parts = [part for _ in range(layers) for part in (nn.Linear(width, width, bias=False), nn.ReLU())]
    return nn.Sequential(*parts[:-1])


def main(folder: Path, width: int, layers: int, optimizer: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model = net(width, layers)
    content = {"model": model.state_dict(), "epoch": 3}
    if optimizer:
        adam = torch.optim.AdamW(model.named_parameters())
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        adam.step()
        content["optimizer"] = adam.state_dict()
        del adam
    torch.save(content, folder / "run.pt")
    del content, model
    with torch.device("meta"):
        outline = net(width, layers)
    syms = nf.find_symmetries(outline, torch.zeros(1, width))
    with ExactPeak() as solving:
        eq = nf.stored_equilibrium(folder / "run.pt", outline, syms, joint=False)
    with ExactPeak() as moving:
        nf.balance_checkpoint(folder / "run.pt", folder / "moved.pt", outline, eq, unchecked=True)
    print(json.dumps({
        "file_MB": round((folder / "run.pt").stat().st_size / 1e6, 1), "largest_MB": round(width * width * 4 / 1e6, 1),
        "solve_MB": solving.megabytes, "solve_s": solving.seconds, "move_MB": moving.megabytes,
        "move_s": moving.seconds,
    }))  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), "--optimizer" in sys.argv)
