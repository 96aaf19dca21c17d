"""What a model returns, as plain containers of tensors."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from noetherflow.errors import DataError

Plain = Tensor | dict[str, Any] | list[Any] | None
CACHES = ("past_key_values", "cache_params", "mems")
"""Names of outputs that hand intermediate results to the next call; they are no part of the function."""


def plain_output(output: Any) -> Plain:
    """Output objects as lists and dictionaries, without key/value caches and without what is no tensor.

    Args:
        output: a tensor, containers of tensors at any depth, mappings (`ModelOutput`), dataclasses, or classes
            registered with `torch.utils._pytree`.

    Raises:
        DataError: an object of another class that holds tensors as attributes.

    Example:
        >>> import torch
        >>> plain_output({"logits": torch.ones(1), "past_key_values": object(), "names": ("a", torch.ones(1))})
        {'logits': tensor([1.]), 'names': [None, tensor([1.])]}
    """
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "items"):
        return {str(k): plain_output(v) for k, v in output.items() if k not in CACHES}
    if isinstance(output, (list, tuple)):
        return [plain_output(v) for v in output]
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        fields = {f.name: getattr(output, f.name) for f in dataclasses.fields(output)}
        return {name: plain_output(v) for name, v in fields.items() if name not in CACHES}
    name = type(output).__name__
    if "Cache" in name:
        return None
    leaves = pytree.tree_leaves(output)
    if not (len(leaves) == 1 and leaves[0] is output):
        return [plain_output(leaf) for leaf in leaves]
    if any(isinstance(v, Tensor) for v in getattr(output, "__dict__", {}).values()):
        raise DataError(
            f"the model returns a {name}, whose tensors cannot be read: make {name} a dataclass (and register it with "
            "torch.utils._pytree.register_dataclass), or return a tensor, tuple or dict"
        )
    return None


def floating_tensors(output: Any) -> list[Tensor]:
    """Every floating tensor in what a model returned, in order.

    Args:
        output: see `plain_output`.

    Raises:
        DataError: there is none.
    """
    leaves = pytree.tree_leaves(plain_output(output))
    found = [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]
    if not found:
        raise DataError(f"the model returns no floating tensor (got {type(output).__name__}); nothing to certify")
    return found
