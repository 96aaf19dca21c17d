"""What lies at a path: a file, the shards of one checkpoint, a folder; and why some paths are no checkpoint."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from noetherflow.balance.dcp_file import DcpFolder
from noetherflow.balance.dcp_metadata import METADATA
from noetherflow.balance.safetensors_file import SafetensorsFile
from noetherflow.balance.stored import LoadedTensors, ShardedTensors, StoredTensors
from noetherflow.balance.torch_file import load_torch, tensors_in, weights_in
from noetherflow.errors import CheckpointError

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
"""Names of weights in folders, those looked for first in front."""
STATE_BESIDE = re.compile(r"optim|(^|[_.-])(ema|swa)([_.-]|$)", re.IGNORECASE)
"""Names of files and folders that hold an optimiser's state or averages of weights."""
SHARD = re.compile(r"-(\d+)-of-(\d+)\.\w+$")
INDEX = ".index.json"
TORCH_SUFFIXES = (".pt", ".bin", ".pth", ".ckpt")
SUFFIXES = (".safetensors", ".gguf", *TORCH_SUFFIXES)
Kind = Literal["safetensors", "torch", "dcp"]


@dataclass(frozen=True, eq=False)
class OpenCheckpoint:
    """A checkpoint whose names, shapes and dtypes are known and whose tensors wait on the disk.

    Attributes:
        path: what the user named.
        kind: how its files are written.
        files: the files with weights, one or its shards.
        index: the index of shards or the `.metadata` of parts, None for a single file.
        stored: the tensors in them.
        contents: what each PyTorch file holds, in the order of `files`; empty for safetensors, and one nested state
            dict for the parts of torch.distributed.checkpoint.
        states: the dictionary in each of `contents` that holds the weights.
        folder: the folder that belongs together, None for a file by itself.
        dcp: the folder of torch.distributed.checkpoint that it is, or that lies in it; None for other kinds.
    """

    path: Path
    kind: Kind
    files: tuple[Path, ...]
    index: Path | None
    stored: StoredTensors
    contents: tuple[Any, ...] = ()
    states: tuple[dict[str, Any], ...] = ()
    folder: Path | None = None
    dcp: DcpFolder | None = None

    @property
    def adapter(self) -> bool:
        """Whether it holds a PEFT adapter alone."""
        return self.files[0].name.startswith("adapter_model.") or (
            (self.files[0].parent / "adapter_config.json").is_file() and any(".lora_" in n for n in self.stored.names)
        )


def open_checkpoint(path: str | Path, key: str | None = None) -> OpenCheckpoint:
    """Find out what lies at a path, and read its names and shapes.

    Args:
        path: a `.safetensors` or PyTorch file, the index of a sharded checkpoint, or a folder with one, or of
            torch.distributed.checkpoint.
        key: where the weights lie in a PyTorch file (`weights_in`).

    Raises:
        CheckpointError: there is nothing, it is unreadable, one shard of several, or in a format that cannot be moved.
    """
    path = Path(path)
    if path.is_dir():
        return _open_dcp(path, path, key) if (path / METADATA).is_file() else _open_folder(path, key)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}: give a .safetensors or PyTorch file, an index, or a folder")
    if path.name.endswith(INDEX):
        return _open_index(path, path.parent, key, path)
    _refuse_format(path)
    _refuse_shard(path)
    return _open_files((path,), None, None, key, path)


def index_of(path: Path) -> dict[str, Any]:
    """The content of an index file.

    Raises:
        CheckpointError: it is no index, or a shard that it names is missing.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        weight_map = content["weight_map"]
        shards = sorted(set(weight_map.values()))
    except Exception as cause:
        raise CheckpointError(
            f"{path} is not a readable index of shards ({type(cause).__name__}: {cause}); copy it again, or save the "
            "model again (save_pretrained writes one)"
        ) from cause
    missing = [s for s in shards if not (path.parent / s).is_file()]
    if missing or not shards:
        raise CheckpointError(
            f"{path} names shards that are not there: {missing[:4]} ({len(missing)} of {len(shards)}); "
            "copy them beside it"
        )
    return content


def _open_folder(folder: Path, key: str | None) -> OpenCheckpoint:
    found = [folder / n for n in WEIGHT_FILES if (folder / n).is_file()]
    bare = [p for p in found if not p.name.startswith("adapter")]
    inside = [p.parent for p in folder.glob(f"*/{METADATA}") if not STATE_BESIDE.search(p.parent.name)]
    if not found and len(inside) == 1:
        return _open_dcp(inside[0], folder, key)
    if not found:
        raise CheckpointError(f"{folder} is a folder without weights: {_why_empty(folder)}")
    if len(bare) > 1:
        raise CheckpointError(
            f"{folder} holds its weights twice ({', '.join(p.name for p in bare)}), and readers differ in which they "
            "take: keep one of them, or name the file"
        )
    chosen = found[0]
    if chosen.name.endswith(INDEX):
        return _open_index(chosen, folder, key, folder)
    return _open_files((chosen,), None, folder, key, folder)


def _why_empty(folder: Path) -> str:
    """What is wrong with a folder that has none of the known weight files."""
    if list(folder.glob(f"__*{METADATA}")):
        return (
            "every process described its own part of a torch.distributed.checkpoint in it: save again with one "
            f"description, dcp.save(..., storage_writer=FileSystemWriter(path)), which writes {METADATA}"
        )
    if list(folder.glob("*.distcp")):
        return f"it has parts of a torch.distributed.checkpoint, but no {METADATA}, which is written last: copy it here"
    if (folder / "zero_to_fp32.py").is_file():
        return "it is DeepSpeed's: join its parts first, python zero_to_fp32.py . joined, in that folder"
    shards = sorted(p.name for p in folder.iterdir() if SHARD.search(p.name))
    if shards:
        return f"it has shards ({shards[0]} ...) but no index beside them; save_pretrained writes one"
    nested = sorted(p.parent.name for p in folder.glob(f"*/{METADATA}"))
    if nested:
        return f"name the one of the folders in it ({', '.join(nested[:4])}) that has the weights"
    inside = sorted(
        p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".pt", ".bin", ".pth", ".ckpt", ".gguf")
    )
    if inside:
        return f"name the checkpoint file in it ({', '.join(inside[:4])})"
    return f"looked for {', '.join(WEIGHT_FILES)}"


def _open_dcp(parts: Path, folder: Path, key: str | None) -> OpenCheckpoint:
    """The weights in the folder `parts`, which is `folder` or lies in it, perhaps beside one with optimiser state."""
    found = [n for n in WEIGHT_FILES if (parts / n).is_file()]
    if found:
        raise CheckpointError(
            f"{parts} holds its weights twice, in the parts that {METADATA} names and in {found[0]}: keep one of them"
        )
    dcp = DcpFolder.open(parts)
    content = dcp.content()
    state = weights_in(content, parts, key)
    stored = LoadedTensors(tensors_in(state))
    return OpenCheckpoint(folder, "dcp", dcp.parts, parts / METADATA, stored, (content,), (state,), folder, dcp)


def _open_index(index: Path, folder: Path, key: str | None, path: Path) -> OpenCheckpoint:
    shards = tuple(index.parent / s for s in sorted(set(index_of(index)["weight_map"].values())))
    opened = _open_files(shards, index, folder, key, path)
    listed, there = set(index_of(index)["weight_map"]), set(opened.stored.names)
    if listed != there:
        differing = sorted(listed ^ there)
        raise CheckpointError(
            f"{index} and its shards name different tensors: {differing[:3]} ({len(differing)} in all); copy the "
            "folder again, or save the model again (save_pretrained)"
        )
    return opened


def _open_files(
    files: tuple[Path, ...], index: Path | None, folder: Path | None, key: str | None, path: Path
) -> OpenCheckpoint:
    if files[0].suffix == ".safetensors":
        if key is not None:
            raise CheckpointError(
                f"{path}: key={key!r} goes with PyTorch files; a safetensors file has no nesting: leave it out"
            )
        stored = ShardedTensors(tuple(SafetensorsFile.open(f) for f in files))
        if not stored.names:
            raise CheckpointError(f"{path} holds no named tensors; name the file with the weights")
        return OpenCheckpoint(path, "safetensors", files, index, stored, folder=folder)
    contents = tuple(load_torch(f) for f in files)
    states = tuple(weights_in(c, f, key) for c, f in zip(contents, files, strict=True))
    tensors = LoadedTensors({n: t for state in states for n, t in tensors_in(state).items()})
    return OpenCheckpoint(path, "torch", files, index, tensors, contents, states, folder)


def _refuse_format(path: Path) -> None:
    """Raises CheckpointError for formats whose numbers are not the model's weights."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF" or path.suffix == ".gguf":
        raise CheckpointError(
            f"{path} is a GGUF file, mostly quantised and in another layout: convert it first, "
            f"AutoModelForCausalLM.from_pretrained({str(path.parent)!r}, gguf_file={path.name!r})"
            ".save_pretrained(folder), balance the folder, and convert back with llama.cpp's convert_hf_to_gguf.py"
        )
    if path.suffix == ".distcp" or path.name == METADATA:
        raise CheckpointError(
            f"{path} is one file of a torch.distributed.checkpoint: name the folder, {path.parent}, with its {METADATA}"
        )


def _refuse_shard(path: Path) -> None:
    """Raises CheckpointError for one shard of several, which is not the whole model."""
    indices = [p for p in sorted(path.parent.glob(f"*{INDEX}")) if path.name in _shards_of(p)]
    among = [len(_shards_of(p)) for p in indices]
    numbered = SHARD.search(path.name)
    total = max([*among, int(numbered[2]) if numbered else 1])
    if total > 1:
        whole = str(indices[0]) if indices else f"its index (*{INDEX}), which save_pretrained writes beside the shards"
        raise CheckpointError(f"{path} is one of {total} shards, not the whole checkpoint: name the folder, or {whole}")


def _shards_of(index: Path) -> set[str]:
    """The shards that an index names; none where it is unreadable."""
    try:
        return set(index_of(index)["weight_map"].values())
    except CheckpointError:
        return set()
