"""The tensors of a model by their canonical names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from noetherflow.core.unwrap import plain_name, unwrap
from noetherflow.errors import DataError, NoetherflowError


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


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which ranks hold parts (a DTensor), each of which must call this; any other as it is.

    Example:
        >>> x = torch.ones(2)
        >>> gathered(x) is x
        True
    """
    if type(tensor) in (Tensor, nn.Parameter) or not hasattr(tensor, "full_tensor"):
        return tensor
    whole: Tensor = tensor.full_tensor()
    return whole


def refuse_inference_tensors(tensors: Mapping[str, Tensor], verb: str) -> None:
    """Refuse tensors made under `torch.inference_mode`, which autograd cannot use and nothing outside can change.

    Args:
        tensors: by name.
        verb: what the caller wants to do, for the message.

    Raises:
        DataError: names one, and the remedy.
    """
    if torch.is_inference_mode_enabled():
        return
    made = [n for n, t in tensors.items() if t.is_inference()]
    if made:
        raise DataError(
            f"{made[0]} ({len(made)} of {len(tensors)} tensors) was made under torch.inference_mode(), which rules out "
            f"gradients and changes: for {verb} make the model outside of it, or take copy.deepcopy(model) (of a batch "
            "tensor.clone())"
        )


def is_narrow(dtype: torch.dtype) -> bool:
    """Whether it is a floating type of eight bits or fewer, which torch stores and does not compute in.

    Example:
        >>> [is_narrow(t) for t in (torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.int8)]
        [True, True, False, False]
    """
    return dtype.is_floating_point and dtype.itemsize == 1


def refuse_narrow(tensors: Mapping[str, Tensor], verb: str, error: type[NoetherflowError] = DataError) -> None:
    """Refuse weights held in eight bits or fewer: a gradient step, a move or a moment would be lost in rounding.

    Args:
        tensors: the weights that the verb would measure or move, by name.
        verb: what the caller wants to do, for the message.
        error: the class of what is raised.

    Raises:
        error: names the weights, their type, and the remedy.

    Example:
        >>> refuse_narrow({"w": torch.zeros(2).to(torch.float8_e4m3fn)}, "certify")
        Traceback (most recent call last):
        noetherflow.errors.DataError: w is held in torch.float8_e4m3fn (1 such tensor): certify needs weights of at \
least 16 bits; take the model in bfloat16 or float32 (values times their scales, where it keeps such), or freeze \
these weights with requires_grad_(False)
    """
    found = [n for n, t in tensors.items() if is_narrow(t.dtype)]
    if found:
        count = f"{len(found)} such tensor{'s' if len(found) > 1 else ''}"
        raise error(
            f"{found[0]} is held in {tensors[found[0]].dtype} ({count}): {verb} needs weights of at least 16 bits; "
            "take the model in bfloat16 or float32 (values times their scales, where it keeps such), or freeze these "
            "weights with requires_grad_(False)"
        )


def check_same_model(
    tensors: Mapping[str, Tensor],
    names: Iterable[str],
    shapes: Mapping[str, tuple[int, ...]],
    subject: str,
    remedy: str,
    error: type[NoetherflowError],
) -> None:
    """Refuse what was found, measured or solved on another model: tensors that are missing or of another shape.

    Args:
        tensors: the tensors of the model at hand (`tensors_of`).
        names: the tensors needed.
        shapes: their shapes as they were; a name without one is checked for being there.
        subject: what belongs to another model, with its verb: "the symmetries belong".
        remedy: what to do, as the end of the sentence.
        error: the class of what is raised.

    Raises:
        error: names the tensors, their shapes, and the remedy.

    Example:
        >>> from noetherflow.errors import DataError
        >>> check_same_model({}, ["w"], {}, "the symmetries belong", "find them again", DataError)
        Traceback (most recent call last):
        noetherflow.errors.DataError: the symmetries belong to another model (w: missing, 1 in all); find them again
    """
    other = [
        f"{n}: {tuple(tensors[n].shape)} instead of {shapes[n]}" if n in tensors else f"{n}: missing"
        for n in names
        if n not in tensors or tuple(tensors[n].shape) != tuple(shapes.get(n, tensors[n].shape))
    ]
    if other:
        raise error(f"{subject} to another model ({'; '.join(other[:3])}, {len(other)} in all); {remedy}")
