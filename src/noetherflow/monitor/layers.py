"""Per layer, at each estimate: the norm of its weights, and the gradient noise scale from the optimiser's momentum."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from noetherflow.core.foreign import decays_weights
from noetherflow.core.members import modules_of
from noetherflow.core.tensors import tensors_of
from noetherflow.core.unwrap import unwrap
from noetherflow.monitor import sharding
from noetherflow.monitor.estimates import RunningMean
from noetherflow.monitor.sums import LayerSums
from noetherflow.symmetry.leg import accumulation_dtype

AVERAGED = ("Adam", "AdamW", "NAdam", "RAdam", "Adamax")
"""Optimisers of torch whose `exp_avg` is `b1` times itself plus `1 - b1` times the gradient."""
MEMORY = 0.9
"""What the averages of squares and products keep from one estimate to the next."""


@dataclass(frozen=True, eq=False)
class LayerRow:
    """What is told of the layers at one estimate, `[layers]`, and of all together.

    Attributes:
        step: the step.
        norm: `|W|`.
        mean_share: the lasting mean gradient's share of `|g|^2`; it scatters around 0, below it too, where it is very
            small; NaN where it is not known.
        total: the same of all layers together.
    """

    step: int
    norm: np.ndarray
    mean_share: np.ndarray
    total: float

    def line(self) -> dict[str, Any]:
        """What the log and the sinks get: columns by layer, and of all layers together."""
        columns = {"norm": self.norm, "mean_share": self.mean_share, "noise_batches": noise_batches(self.mean_share)}
        return {"layer": columns, "mean_share": self.total, "noise_batches": float(noise_batches(self.total))}


class LayerProbe:
    """Reads the layers of a model before a step: all modules with trainable weights, in a symmetry or not.

    A minibatch gradient `g` is independent of the average `h` of the gradients before it. So `<g, h>` estimates the
    square of the mean gradient that lasts over the buffer's memory, and `|g|^2` that plus the noise of one batch. No
    second batch size, no copy and no further pass are needed. Under `fully_shard` and for several optimisers in one
    ledger the probe is idle. `empty_at` is the last step at which there was no momentum buffer, None for none seen.
    """

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        named = {n: t for n, t in tensors_of(unwrap(model)).items() if isinstance(t, nn.Parameter) and t.requires_grad}
        idle = not isinstance(optimizer, torch.optim.Optimizer) or any(sharding.is_sharded(p) for p in named.values())
        owners = {} if idle else {name: modules_of([name])[0] for name in named}
        self.layers = tuple(dict.fromkeys(owners.values()))
        self._parameters = [(named[n], self.layers.index(owner)) for n, owner in owners.items()]
        self._optimizer = optimizer
        self.empty_at: int | None = None

    def read(self, step: int) -> LayerSums:
        """The sums at the weights, gradients and buffers before this step. Nothing waits for the device."""
        device = self._parameters[0][0].device if self._parameters else torch.device("cpu")
        sums = [[torch.zeros((), device=device) for _ in self.layers] for _ in range(3)]
        groups = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
        if not any("momentum_buffer" in s for s in self._optimizer.state.values()):
            self.empty_at = step
        scale = getattr(self._optimizer, "grad_scale", None)
        with torch.no_grad():
            for p, layer in self._parameters:
                weight = accumulation_dtype(p.detach()).flatten()
                found = [torch.dot(weight, weight), *self._products(p, weight, groups.get(id(p)), step, scale)]
                for row, value in zip(sums, found, strict=True):
                    row[layer] = row[layer] + value.to(device)
        return LayerSums(*(torch.stack(row) if row else torch.zeros(0) for row in sums))

    def weights(self) -> np.ndarray:
        """The squared norm of each layer's weights as they are now, `[layers]`."""
        squares = np.zeros(len(self.layers))
        with torch.no_grad():
            for p, layer in self._parameters:
                squares[layer] += float(accumulation_dtype(p.detach()).square().sum())
        return squares

    def _products(
        self, p: nn.Parameter, weight: Tensor, group: Mapping[str, Any] | None, step: int, scale: Any
    ) -> tuple[Tensor, Tensor]:
        """`|g|^2` and `<g, h>` of one parameter."""
        nothing = torch.zeros((), device=p.device)
        if p.grad is None or group is None:
            return nothing, nothing
        g = accumulation_dtype(p.grad.to_dense() if p.grad.layout is not torch.strided else p.grad).flatten()
        g = g if scale is None else g / scale
        average = self._average(p, weight, group, step)
        return torch.dot(g, g), nothing + math.nan if average is None else torch.dot(g, average)

    def _average(self, p: nn.Parameter, weight: Tensor, group: Mapping[str, Any], step: int) -> Tensor | None:
        """The average of earlier gradients in the momentum buffer, without weight decay; None without one."""
        state, kinds = self._optimizer.state.get(p, {}), [c.__name__ for c in type(self._optimizer).__mro__]
        if "SGD" in kinds and state.get("momentum_buffer") is not None:
            m, kept = float(group["momentum"]), 1 - float(group["dampening"])
            made = math.inf if self.empty_at is None else step - self.empty_at
            first = m ** (made - 1)
            total, buffer, coupled = first + kept * (1 - first) / (1 - m), state["momentum_buffer"], True
        elif any(k in AVERAGED for k in kinds) and "exp_avg" in state:
            b1 = float(group["betas"][0])
            total, buffer = 1 - b1 ** float(state["step"]), state["exp_avg"]
            coupled = not (group.get("decoupled_weight_decay", False) or decays_weights(self._optimizer))
        else:
            return None
        average = accumulation_dtype(buffer).flatten() / total
        decay = float(group.get("weight_decay", 0.0)) if coupled else 0.0
        average = average - decay * weight if decay else average
        return -average if group.get("maximize", False) else average


@dataclass
class LayerBook:
    """Running averages of the layers' sums, and the rows that follow from them."""

    gradient: RunningMean = field(default_factory=RunningMean)
    lasting: RunningMean = field(default_factory=RunningMean)

    def row(self, step: int, sums: LayerSums) -> LayerRow:
        """The row of one step, from the averages so far."""
        weight, square, product = (t.double().cpu().numpy() for t in (sums.weight, sums.gradient, sums.lasting))
        square = np.where(np.isfinite(product), square, np.nan)
        self.gradient.update(square, MEMORY)
        self.lasting.update(product, MEMORY)
        return self.so_far(step, weight)

    def so_far(self, step: int, weight: np.ndarray) -> LayerRow:
        """The row of weights of these squared norms `[layers]`, with the averages as they are."""
        square, product = self.gradient.mean(weight.size), self.lasting.mean(weight.size)
        known = np.isfinite(square) & np.isfinite(product)
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(square > 0, product / square, np.nan)
        all_squares = float(square[known].sum())
        total = float(product[known].sum()) / all_squares if all_squares > 0 else math.nan
        return LayerRow(step, np.sqrt(weight), share, total)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages as tensors, for a checkpoint."""
        means = {"gradient": self.gradient, "lasting": self.lasting}
        known = {n: m for n, m in means.items() if m.total is not None and m.weight is not None}
        return {f"{n}_{part}": torch.tensor(getattr(m, part)) for n, m in known.items() for part in ("total", "weight")}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on with saved averages; without them they begin anew."""
        arrays = {name: tensor.numpy().copy() for name, tensor in state.items()}
        self.gradient = RunningMean(arrays.get("gradient_total"), arrays.get("gradient_weight"))
        self.lasting = RunningMean(arrays.get("lasting_total"), arrays.get("lasting_weight"))


def noise_batches(mean_share: np.ndarray | float) -> np.ndarray:
    """The gradient noise scale in minibatches, `1 / share - 1`; infinite for a share that is not positive.

    Example:
        >>> noise_batches(np.array([0.2, 1.5, -0.1, float("nan")])).tolist()
        [4.0, 0.0, inf, nan]
    """
    share = np.asarray(mean_share, dtype=float)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(share > 0, np.maximum(1 / share - 1, 0.0), np.where(np.isnan(share), np.nan, np.inf))


def named_rows(layers: Sequence[str], rows: Sequence[LayerRow]) -> list[dict[str, Any]]:
    """One row per estimate and layer, and one for `all` of them."""
    return [
        {
            "step": row.step,
            "layer": name,
            "norm": norm,
            "mean_share": share,
            "noise_batches": float(noise_batches(share)),
        }
        for row in rows
        for name, norm, share in [
            ("all", float(np.sqrt(np.square(row.norm).sum())), row.total),
            *zip(layers, row.norm.tolist(), row.mean_share.tolist(), strict=True),
        ]
    ]
