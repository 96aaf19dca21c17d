"""Small matrices live on the CPU, wherever the model is."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import FunctionType
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def on_host(function: Callable[P, R]) -> Callable[P, R]:
    """`function` with its new tensors on the CPU, whatever `torch.set_default_device` says.

    Functions it is given by keyword (`remeasure=`) see the caller's default device.
    """

    @wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        outside = torch.get_default_device()
        if outside.type == "cpu":
            return function(*args, **kwargs)
        kwargs.update({k: _under(outside, v) for k, v in kwargs.items() if isinstance(v, FunctionType)})
        return _under(torch.device("cpu"), function)(*args, **kwargs)

    return inside


def _under(device: torch.device, function: Callable[P, R]) -> Callable[P, R]:
    """`function` with new tensors on `device`."""

    @wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        with device:
            return function(*args, **kwargs)

    return inside
