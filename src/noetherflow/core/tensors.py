"""The tensors of a model by their canonical names."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from noetherflow.core.unwrap import plain_name, unwrap


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every name of every parameter, then of every buffer, as `unwrap(model)` has them; tied ones repeat."""
    inner = unwrap(model)
    for found in (inner.named_parameters(remove_duplicate=False), inner.named_buffers(remove_duplicate=False)):
        for name, tensor in found:
            yield plain_name(name), tensor


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by canonical name: a tied tensor appears once, under its first name.

    Args:
        model: a module, wrapped or not (`unwrap`); the names are those of the module inside.

    Returns:
        The tensors themselves, not copies.

    Example:
        >>> list(tensors_of(torch.compile(nn.Linear(2, 2))))
        ['weight', 'bias']
    """
    seen: set[int] = set()
    out: dict[str, Tensor] = {}
    for name, tensor in named_tensors(model):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            out[name] = tensor
    return out
