"""Optimisers of other libraries: which of them decay the weights themselves, and where they keep their averages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from noetherflow.core.codes import BlockCodes

BITS = r"(\d+bit|fp8)?"
ADAM = re.compile(rf"_?(paged)?adamw?{BITS}|fusedadam|(deepspeed)?cpuadam")
"""Classes that are Adam whatever library they come from, in lower case: `PagedAdamW8bit`, `AdamWFp8`."""
LION = re.compile(rf"(paged)?lion{BITS}")
DECOUPLED = re.compile(rf"_?(paged)?(adamw|lion|ademamix){BITS}|mars|muon|soap")
"""Classes whose weight decay is decoupled whatever library they come from."""
BITSANDBYTES_DECOUPLED = frozenset({"adam", "ademamix", "lamb", "lion"})
"""By `optimizer_name`: what its kernels multiply by `1 - lr w` before the step; its Adam is AdamW in this."""
BITSANDBYTES_KEYS = {
    "adam": {"state1": "exp_avg", "state2": "exp_avg_sq"},
    "lion": {"state1": "exp_avg"},
    "momentum": {"state1": "momentum_buffer"},
    "rmsprop": {"state1": "square_avg"},
    "adagrad": {"state1": "sum"},
}
"""By `optimizer_name`: torch's names for what its states of 32 bits are."""

SAVED_BITSANDBYTES = "__bnb_optimizer_quant_state__"
"""The key under which bitsandbytes saves the averages of a parameter."""


def class_name(optimizer: torch.optim.Optimizer) -> str:
    """The name of its class, in lower case."""
    return type(optimizer).__name__.lower()


def decays_weights(optimizer: torch.optim.Optimizer) -> bool | None:
    """Whether weight decay acts on the weights themselves (decoupled), by the class of the optimiser.

    Args:
        optimizer: of any library. The flag `decoupled_weight_decay` in groups of torch's own is not looked at.

    Returns:
        True for AdamW, Lion and their kind, for Adam of bitsandbytes, and for fused Adam with `adam_w_mode`; False for
        the other optimisers of torch and bitsandbytes; None where nothing tells, as for the Adafactor of transformers,
        which decays by a learning rate that is not its group's.

    Example:
        >>> weights = [torch.zeros(2)]
        >>> decays_weights(torch.optim.SGD(weights, lr=0.1)), decays_weights(torch.optim.Adafactor(weights))
        (False, True)
    """
    mode = getattr(optimizer, "adam_w_mode", None)
    if mode is not None:
        return bool(mode)
    if is_bitsandbytes(optimizer):
        return getattr(optimizer, "optimizer_name", "") in BITSANDBYTES_DECOUPLED
    if DECOUPLED.fullmatch(class_name(optimizer)) or isinstance(optimizer, torch.optim.Adafactor):
        return True
    known = type(optimizer).__module__.startswith("torch.optim") or ADAM.fullmatch(class_name(optimizer))
    return False if known else None


def without_parameters(group: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a parameter group."""
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def settings_of(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group without its parameters, with torch's flag for decoupled decay where the class tells it."""
    settings = without_parameters(group)
    decoupled = decays_weights(optimizer)
    if decoupled is not None:
        settings.setdefault("decoupled_weight_decay", decoupled)
    if is_bitsandbytes(optimizer) and getattr(optimizer, "optimizer_name", "") == "adam":
        settings.setdefault("amsgrad", False)
    return settings


def state_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    """The state of one parameter, by torch's names; the tensors are the optimiser's own.

    What bitsandbytes keeps in 8 bits, as codes with their scales, is one `BlockCodes` for each average.
    """
    state: dict[str, Any] = optimizer.state.get(parameter, {})
    if not is_bitsandbytes(optimizer):
        return state
    names = BITSANDBYTES_KEYS.get(getattr(optimizer, "optimizer_name", ""), {})
    out = {}
    for key, value in state.items():
        number = key.removeprefix("state")
        if isinstance(value, Tensor) and value.dtype is torch.uint8 and f"qmap{number}" in state:
            value = BlockCodes(value, state[f"qmap{number}"], state[f"absmax{number}"])
        if value is not None and not key.startswith(("qmap", "absmax")):
            out[names.get(key, key)] = value
    return out


def is_bitsandbytes(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its class is one of bitsandbytes, or made from one."""
    return any(base.__module__.startswith("bitsandbytes.") for base in type(optimizer).__mro__)
