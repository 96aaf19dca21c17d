"""Running a float64 model whose code casts to narrower types, without the rounding of those casts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from noetherflow.core.torch_internals import TorchDispatchMode

NARROW = (torch.float32, torch.bfloat16, torch.float16)
CAST = torch.ops.aten._to_copy.default


class WideFloats(TorchDispatchMode):
    """Inside this context a cast to a narrower floating type stays in float64, and casts of integers go there.

    `x.float()` of a float64 tensor, `softmax(x, dim, dtype=torch.float32)` and autocast regions then round nothing, so
    that a symmetry of the written formula holds to the precision of float64. Tensors that are *made* in a narrower type
    (`torch.ones(4)`) are left as they are.

    Attributes:
        widened: how many casts were widened.

    Example:
        >>> with WideFloats() as mode:
        ...     torch.ones(1, dtype=torch.float64).float().dtype, mode.widened
        (torch.float64, 1)
    """

    def __init__(self) -> None:
        super().__init__()
        self.widened = 0

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch for every operator; changes its `dtype` argument where that would lose precision."""
        options = dict(kwargs or {})
        if options.get("dtype") in NARROW and (operator is CAST or any(_is_wide(value) for value in args)):
            options["dtype"] = torch.float64
            self.widened += 1
        return operator(*args, **options)


def _is_wide(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float64
