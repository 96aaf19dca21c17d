"""A plain function of a dictionary of parameters as a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from noetherflow.errors import DataError


class FunctionModel(nn.Module):
    """The module whose parameters are the entries of a dictionary and whose forward is the function.

    Args:
        function: `function(parameters, *inputs)`; a closed-form loss takes no inputs.
        parameters: tensors (or numbers) by name; dots in a name make submodules, as in a state dict. They are copied.

    Raises:
        DataError: no function, no parameters, or an entry that is not a number or a tensor of floating point numbers.

    Example:
        >>> model = FunctionModel(lambda p: (p["a"] * p["b"] - 1) ** 2, {"a": 2.0, "b": torch.tensor(0.25)})
        >>> model().item(), [name for name, _ in model.named_parameters()]
        (0.25, ['a', 'b'])
    """

    def __init__(self, function: Callable[..., Any], parameters: Mapping[str, Tensor | float]) -> None:
        super().__init__()
        if not callable(function) or not parameters:
            raise DataError(
                "FunctionModel(function, parameters) takes a function of a dict of tensors and that dict, got "
                f"{type(function).__name__} and {type(parameters).__name__} of {len(parameters)} entries"
            )
        self.function = function
        for name, value in parameters.items():
            *path, last = name.split(".")
            home: nn.Module = self
            for step in path:
                if not hasattr(home, step):
                    home.add_module(step, nn.Module())
                home = getattr(home, step)
            home.register_parameter(last, nn.Parameter(_floating(name, value)))

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """What the function returns for the parameters as they are."""
        return self.function(dict(self.named_parameters()), *inputs, **named)


def _floating(name: str, value: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(value).detach().clone()
    except (TypeError, ValueError, RuntimeError) as cause:
        raise DataError(f"parameter {name!r} must be a tensor or a number, got {type(value).__name__}") from cause
    if not tensor.is_floating_point():
        raise DataError(f"parameter {name!r} must hold floating point numbers, got {tensor.dtype}; write 2.0, not 2")
    return tensor
