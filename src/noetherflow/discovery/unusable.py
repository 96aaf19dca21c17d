"""Models that cannot be run on a copy, refused before anything is tried."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from noetherflow.core.arguments import A_MODEL, expect
from noetherflow.core.tensors import refuse_narrow, tensors_of
from noetherflow.core.unwrap import unwrap
from noetherflow.errors import DataError

LARGEST = 1e30
"""Weights beyond this overflow when they are squared in float32 or multiplied a few times in float64."""


def refuse_unusable(model: nn.Module, verb: str) -> None:
    """Refuse a model whose weights are not there or are no usable numbers.

    Args:
        model: the model, wrapped or not.
        verb: what the caller wants to do, for the message.

    Raises:
        DataError: no model; weights on the meta device, offloaded, NaN, infinite or beyond 1e30, named with the remedy.
    """
    expect(f"{verb}(model, ...)", "model", model, nn.Module, A_MODEL)
    tensors = tensors_of(model)
    meta = [n for n, t in tensors.items() if t.device.type == "meta"]
    if meta and any(getattr(getattr(m, "_hf_hook", None), "offload", False) for m in unwrap(model).modules()):
        raise DataError(
            f"{verb} needs all weights in memory, and those of this model are offloaded ({meta[0]} is on the meta "
            "device between calls): load it without device_map and offloading, or take the hooks off with "
            "accelerate.hooks.remove_hook_from_submodules(model)"
        )
    if meta:
        raise DataError(
            f"{verb} runs the model, and {meta[0]} ({len(meta)} of {len(tensors)} tensors) is on the meta device, "
            "without values: load a checkpoint, or materialise it with model.to_empty(device='cpu') and initialise it"
        )
    refuse_bad_numbers({n: t for n, t in tensors.items() if isinstance(t, nn.Parameter)}, verb)


def refuse_without_values(tensors: Mapping[str, Tensor], verb: str) -> None:
    """Refuse weights on the meta device where their values are needed.

    Args:
        tensors: the weights by name.
        verb: what the caller wants to do, for the message.

    Raises:
        DataError: names one, with both ways out: weights, or the functions that work on files.

    Example:
        >>> refuse_without_values({"w": torch.tensor([1.0, -2.0])}, "balance_")
    """
    meta = [n for n, t in tensors.items() if t.is_meta]
    if meta:
        raise DataError(
            f"{verb} needs the values of the weights, and {meta[0]} ({len(meta)} of {len(tensors)} tensors) is on the "
            "meta device: make memory, model.to_empty(device='cpu'), and load a checkpoint into it "
            "(nf.load_checkpoint_); or leave the weights on the disk, nf.stored_equilibrium, nf.balance_checkpoint and "
            "nf.move_checkpoint work on the files"
        )


def refuse_bad_numbers(tensors: Mapping[str, Tensor], verb: str) -> None:
    """Refuse weights that are no usable numbers.

    Args:
        tensors: the weights by name; those without values or floating numbers are passed over.
        verb: what the caller wants to do, for the message.

    Raises:
        DataError: NaN, infinite or beyond 1e30, trainable in a type of eight bits, or of four bits; named.

    Example:
        >>> refuse_bad_numbers({"w": torch.tensor([1.0, -2.0])}, "certify")
    """
    unread = getattr(torch, "float4_e2m1fn_x2", None)
    refuse_narrow({n: t for n, t in tensors.items() if t.requires_grad or t.dtype is unread}, verb)
    for name, tensor in tensors.items():
        if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
            continue
        low, high = (float(extreme) for extreme in wide_float(tensor.detach()).aminmax())
        largest = max(-low, high)
        if not largest < LARGEST:  # NaN compares false
            what = "holds NaN" if largest != largest else f"has an entry of size {largest:.3g}"
            raise DataError(
                f"{name!r} {what}; {verb} needs finite weights below {LARGEST:.0e}. Load an earlier "
                "checkpoint, or set these entries right"
            )


def wide_float(tensor: Tensor) -> Tensor:
    """The tensor, types of eight bits in float32: torch has no arithmetic for them."""
    return tensor.float() if tensor.dtype.itemsize == 1 else tensor
