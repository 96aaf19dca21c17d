"""Run as a program: move a PyTorch file of a few large tensors, its model on the meta device, and print what it took.

`python torch_file_memory.py FOLDER WIDTH LAYERS` writes a bias-free MLP of LAYERS square
matrices of float32 (with the state of AdamW when `--optimizer` stands behind), moves it to its least norm, and prints
JSON: peak memory of solve and move in MB above what the process took before, anonymous pages and all resident ones
(mapped files too), the size of the largest tensor, and the seconds.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import torch
from torch import nn

import noetherflow as nf


class Sampled:
    """The largest memory of this process within the block, sampled every 2 ms, above the start."""

    def __enter__(self) -> Sampled:
        self.start, self.began = resident(), time.perf_counter()
        self.largest = dict(self.start)
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        self.seconds = time.perf_counter() - self.began

    def _watch(self) -> None:
        while not self.stop.wait(0.002):
            now = resident()
            self.largest = {kind: max(value, now[kind]) for kind, value in self.largest.items()}

    def megabytes(self, kind: str) -> float:
        return round((self.largest[kind] - self.start[kind]) / 1e6, 1)


def resident() -> dict[str, int]:
    """Bytes by kind: of anonymous pages (`RssAnon`), and all resident ones (`VmRSS`)."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if words[0] in ("RssAnon:", "VmRSS:")}


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
    with Sampled() as solving:
        eq = nf.stored_equilibrium(folder / "run.pt", outline, syms, joint=False)
    with Sampled() as moving:
        nf.balance_checkpoint(folder / "run.pt", folder / "moved.pt", outline, eq, unchecked=True)
    print(json.dumps({
        "file_MB": round((folder / "run.pt").stat().st_size / 1e6, 1), "largest_MB": round(width * width * 4 / 1e6, 1),
        "solve_anonymous_MB": solving.megabytes("RssAnon"), "solve_resident_MB": solving.megabytes("VmRSS"),
        "anonymous_MB": moving.megabytes("RssAnon"), "resident_MB": moving.megabytes("VmRSS"),
        "seconds": round(moving.seconds, 1),
    }))  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), "--optimizer" in sys.argv)
