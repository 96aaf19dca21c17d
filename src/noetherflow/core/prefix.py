"""Names in a file against names in a model: what wrappers and frameworks put in front of all of them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from noetherflow.core.unwrap import plain_name

PREFIXES = (
    "module.",
    "_orig_mod.",
    "_forward_module.",
    "_original_module.",
    "_fsdp_wrapped_module.",
    "base_model.model.",
    "model.",
)
"""What DistributedDataParallel, `torch.compile`, Lightning (Fabric), FSDP, PEFT and training scripts put in front."""


@dataclass(frozen=True)
class Prefix:
    """How a name in a file becomes a name in the model: `stored` is taken off in front, `model` is put there.

    Attributes:
        stored: what all the names in the file have in front.
        model: what all the names in the model have in front and those in the file lack.
        given: the user said so; then names in the file that lack it belong to something else.
    """

    stored: str = ""
    model: str = ""
    given: bool = False

    def name(self, stored: str) -> str | None:
        """The model's name, None where the user's prefix is missing.

        Example:
            >>> Prefix(stored="_orig_mod.").name("_orig_mod.0.weight")
            '0.weight'
        """
        if stored.startswith(self.stored):
            return plain_name(self.model + stored.removeprefix(self.stored))
        return None if self.given else plain_name(stored)

    def __str__(self) -> str:
        """One line on what was done to the names; "" for nothing."""
        off = f"the prefix {self.stored!r} of its names was taken off" if self.stored else ""
        put = f"the model's prefix {self.model!r} was put in front of its names" if self.model else ""
        return " and ".join(part for part in (off, put) if part)


def prefix_of(stored: Collection[str], known: Collection[str]) -> Prefix:
    """The prefix under which most names of a file are names of the model; none where that helps nothing.

    Args:
        stored: the names in the file.
        known: the plain names in the model.

    Example:
        >>> prefix_of(["module.model.a", "module.model.b"], ["a", "b"])
        Prefix(stored='module.model.', model='', given=False)
    """
    names = set(known)

    def matches(prefix: Prefix) -> tuple[int, int]:
        exact = sum(prefix.model + n.removeprefix(prefix.stored) in names for n in stored)
        return sum(prefix.name(n) in names for n in stored), exact

    candidates = [Prefix(s, m) for s in _common(stored) for m in _common(known)]
    return max(candidates, key=matches)


def _common(names: Collection[str]) -> list[str]:
    """What can be taken off in front of all names: nothing first, then more and more of the known prefixes."""
    found = [""]
    while True:
        longer = next(
            (found[-1] + p for p in PREFIXES if names and all(n.startswith(found[-1] + p) for n in names)), ""
        )
        if not longer:
            return found
        found.append(longer)
