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
