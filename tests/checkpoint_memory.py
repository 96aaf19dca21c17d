"""Run as a program: balance a synthetic bf16 Llama on disk, its model on the meta device, and print what it took.

`python checkpoint_memory.py FOLDER LAYERS HIDDEN INTERMEDIATE VOCABULARY` writes random weights in shards of one layer,
solves for the least norm (`--range`: equal ranges; `--kept`: answers stay in memory instead of on the disk) and moves;
the line printed is JSON: seconds and peak memory (anonymous pages, MB, above what the libraries take) of both parts,
and the size of the largest tensor.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

import noetherflow as nf
from noetherflow.balance import stored_parts
from noetherflow.balance.checkpoint import balance_checkpoint
from noetherflow.balance.safetensors_file import header_of, write_tensor
from noetherflow.balance.stored_norm import stored_equilibrium


class Peak:
    """The largest anonymous memory of this process within the block, sampled every 2 ms, in MB above the start."""

    def __enter__(self) -> Peak:
        self.start = self.largest = anonymous()
        self.began = time.perf_counter()
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
            self.largest = max(self.largest, anonymous())

    @property
    def megabytes(self) -> float:
        return round((self.largest - self.start) / 1e6, 1)


def anonymous() -> int:
    """Bytes of memory that no file stands behind."""
    line = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def written(model: Any, folder: Path) -> None:
    """Random weights of the model in bf16, a shard for each layer and one for the rest."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(model.config.to_json_string())
    shards: dict[str, list[str]] = {}
    for name in model.state_dict():
        parts = name.split(".")
        shards.setdefault(parts[2] if parts[1] == "layers" else "rest", []).append(name)
    weight_map, shapes = {}, {n: tuple(t.shape) for n, t in model.state_dict().items()}
    for number, names in enumerate(shards.values(), 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update(dict.fromkeys(names, file))
        with (folder / file).open("wb") as out:
            out.write(header_of([(n, torch.bfloat16, shapes[n]) for n in names], {"format": "pt"}))
            for n in names:
                scale = 0.04 if "up_proj" in n or "q_proj" in n else 0.02
                write_tensor(
                    out,
                    (torch.randn(shapes[n]) * scale).bfloat16()
                    if len(shapes[n]) > 1
                    else torch.ones(shapes[n]).bfloat16(),
                )
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def main(folder: Path, layers: int, hidden: int, intermediate: int, vocabulary: int) -> None:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, vocab_size=vocabulary,
        num_attention_heads=hidden // 128, num_key_value_heads=hidden // 128, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).eval()
    if not folder.exists():
        written(model, folder)
    syms = nf.find_symmetries(model, {"input_ids": torch.zeros(1, 4, dtype=torch.long), "use_cache": False})
    if "--kept" in sys.argv:
        stored_parts.spilled = list  # type: ignore[assignment]
    with Peak() as solving:
        objective = "range" if "--range" in sys.argv else "norm"
        eq = stored_equilibrium(folder, model, syms, objective=objective, joint="--alone" not in sys.argv)
    target = folder.parent / f"{folder.name}-out"
    with Peak() as moving:
        report = balance_checkpoint(folder, target, model, eq, unchecked=True)
    largest = max(t.numel() for t in model.state_dict().values()) * 2 / 1e6
    elements = sum(e.numel() * 8 for e in eq.elements.values()) / 1e6
    print(json.dumps({
        "layers": layers, "solve_s": round(solving.seconds, 1), "solve_MB": solving.megabytes,
        "sweeps": eq.evaluations, "converged": eq.converged, "norm": eq.norm / eq.norm_now,
        "move_s": round(moving.seconds, 1), "move_MB": moving.megabytes,
        "largest_MB": round(largest, 1), "elements_MB": round(elements, 1), "moved": len(report.moved),
    }))  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(int(word) for word in sys.argv[2:6]))
