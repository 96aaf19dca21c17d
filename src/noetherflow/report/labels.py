"""Names of symmetries and modules as labels: without what they all share, and never cut at a place that matters."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def without_shared_prefix(names: Sequence[str]) -> list[str]:
    """The names without the dotted prefix that all their paths share.

    Example:
        >>> without_shared_prefix(["m.layers.0.q -> m.layers.0.k (+2)", "m.layers.1.v [scale]"])
        ['0.q -> 0.k (+2)', '1.v [scale]']
    """
    paths = [word.split(".")[:-1] for name in names for word in name.split() if word[0].isalnum()]
    shared = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*paths, strict=False))
    prefix = ".".join([*(level[0] for level in shared), ""])
    return [" ".join(word.removeprefix(prefix) for word in name.split()) for name in names]


def short(name: str, limit: int = 48) -> str:
    """A long name without the middle parts of its paths: beginnings (the layer) and ends (what it is) stay whole.

    Example:
        >>> short("layers.0.self_attn.q_proj -> layers.0.self_attn.k_proj (+2)", 40)
        'layers.0…q_proj -> layers.0…k_proj (+2)'
    """
    if len(name) <= limit:
        return name
    words = [_without_middle(word) for word in name.split()]
    text = " ".join(words)
    return text if len(text) <= limit else f"{text[: limit // 2 - 1]}…{text[-limit // 2 :]}"


def _without_middle(path: str) -> str:
    parts = path.split(".")
    head = next((i + 1 for i, part in enumerate(parts) if part.isdigit()), 1)
    return path if len(parts) - head < 2 else f"{'.'.join(parts[:head])}…{parts[-1]}"


def labels_of(names: Sequence[str]) -> list[str]:
    """Short labels without the shared prefix; those that would look alike keep their full names."""
    full = [name.replace(" -> ", " → ") for name in without_shared_prefix(names)]
    cut = [short(name) for name in full]
    return [c if cut.count(c) == 1 else f for c, f in zip(cut, full, strict=True)]


def chart_labels(names: Sequence[str]) -> list[str]:
    """Labels for the lines of a chart: what a symmetry within one block shares is said once, as the block's number.

    Labels that would look alike, and those of symmetries that are in no block, are those of `labels_of`.

    Example:
        >>> chart_labels(["model.layers.1.mlp.up_proj -> model.layers.1.mlp.down_proj", "model.norm -> lm_head"])
        ['L1 up_proj → down_proj', 'model.norm → lm_head']
    """
    blocks = [_in_block(name) for name in names]
    return [b if b and blocks.count(b) == 1 else long for b, long in zip(blocks, labels_of(names), strict=True)]


def _in_block(name: str) -> str:
    """The label of a symmetry all of whose paths lie in one numbered block; "" for others."""
    paths = [word.split(".") for word in name.split() if word[0].isalnum()]
    heads = {tuple(_head(path)) for path in paths}
    if len(heads) != 1 or not (head := heads.pop()) or any(path[-1].isdigit() for path in paths):
        return ""
    words = [word.split(".")[-1] if word[0].isalnum() else word for word in name.split()]
    return f"L{head[-1]} {' '.join(words)}".replace("->", "→")


def _head(path: Sequence[str]) -> list[str]:
    """The beginning of a path up to its first number; nothing where no module follows the number."""
    ends = [i + 1 for i, part in enumerate(path) if part.isdigit()]
    return list(path[: ends[0]]) if ends and ends[0] < len(path) else []


def more_legs(names: Sequence[str]) -> str:
    """What `(+2)` in names means, where a name has it; else nothing."""
    return "(+n): with n more weights of that side" if any("(+" in name for name in names) else ""
