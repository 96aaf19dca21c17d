"""What a model is called with, and what a loss is: one reading of both for every verb."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

LossFn = Callable[[nn.Module, Any], Tensor]
"""`loss_fn(model, batch)`: one loss per sample, shape `[batch]`, not reduced."""


@dataclass(frozen=True, eq=False)
class ModelInputs:
    """Positional and keyword arguments of a model's forward.

    Every verb that takes `example_inputs` reads them with `ModelInputs.of`: a tuple is positional arguments, a mapping
    (a dict, a Hugging Face `BatchEncoding`) is keyword arguments, and anything else, a list included, is one argument.

    Example:
        >>> ModelInputs.of((torch.ones(1, 2),)).call(nn.Linear(2, 3)).shape
        torch.Size([1, 3])
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, example_inputs: Any) -> ModelInputs:
        """Read `example_inputs` as given by the user; `ModelInputs` are returned as they are."""
        if isinstance(example_inputs, ModelInputs):
            return example_inputs
        if hasattr(example_inputs, "keys"):
            return cls((), dict(example_inputs))
        return cls(example_inputs if isinstance(example_inputs, tuple) else (example_inputs,))

    def call(self, model: nn.Module) -> Any:
        """What the model returns."""
        return model(*self.args, **self.kwargs)

    def map(self, change: Callable[[Tensor], Tensor]) -> ModelInputs:
        """The same arguments with every tensor changed, at any depth of lists, tuples and dicts."""
        apply = lambda value: change(value) if isinstance(value, Tensor) else value
        args, kwargs = pytree.tree_map(apply, (self.args, self.kwargs))
        return ModelInputs(args, kwargs)

    def shapes(self) -> str:
        """The arguments with shapes in place of tensors, and arrays named as such, for messages."""
        shape = lambda value: tuple(value.shape) if isinstance(value, Tensor) else _brief(value)
        args, kwargs = pytree.tree_map(shape, (self.args, self.kwargs))
        return ", ".join([*map(str, args), *(f"{name}={value}" for name, value in kwargs.items())])


def _brief(value: Any) -> Any:
    """An array in few words, with what to give in its place; anything else as it is."""
    shape = getattr(value, "shape", None)
    if shape is None or not hasattr(value, "dtype"):
        return value
    return f"{type(value).__name__} of shape {tuple(shape)} (no tensor: torch.as_tensor makes one of it)"
