"""The optimiser settings that the noise equilibrium depends on."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from noetherflow.errors import DataError


@dataclass(frozen=True)
class SGDConfig:
    """`theta <- theta - lr * (g_B + weight_decay * theta)`, batches of `batch_size` (theory.md section 1).

    `weight_decay` is PyTorch's `w` (the paper's `gamma ||theta||^2` is `w = 2 gamma`). `dataset_size=None` means
    fresh data: an infinite population, of which the samples measured are a few. A number N means that the N samples are
    all there is, and batches are drawn from them without replacement, or with it (`replacement=True`).

    Raises DataError for a non-positive lr or batch size, momentum outside [0, 1), a batch larger than the data that it
    is drawn from without replacement, replacement without a dataset_size, or `lr * weight_decay >= 2`, where decay
    alone makes the weights grow.
    """

    lr: float
    batch_size: int
    weight_decay: float = 0.0
    momentum: float = 0.0
    nesterov: bool = False
    dataset_size: int | None = None
    replacement: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise DataError(f"lr must be a positive finite number, got {self.lr!r}")
        if self.batch_size < 1:
            raise DataError(f"batch_size must be at least 1, got {self.batch_size!r}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise DataError(f"weight_decay must be finite and >= 0, got {self.weight_decay!r}")
        if self.lr * self.weight_decay >= 2:
            raise DataError(
                f"lr * weight_decay is {self.lr * self.weight_decay:g}: from 2 on decay alone makes the weights grow; "
                "lower one of them"
            )
        if not 0 <= self.momentum < 1:
            raise DataError(f"momentum must lie in [0, 1), got {self.momentum!r}")
        if self.replacement and self.dataset_size is None:
            raise DataError("replacement=True needs the dataset_size that batches are drawn from; None is fresh data")
        if self.dataset_size is not None and self.batch_size > self.dataset_size and not self.replacement:
            raise DataError(
                f"batch_size {self.batch_size} is larger than dataset_size {self.dataset_size}; "
                "use at most the whole data set as one batch"
            )

    @classmethod
    def from_optimizer(
        cls,
        optimizer: torch.optim.Optimizer,
        batch_size: int,
        dataset_size: int | None = None,
        replacement: bool = False,
    ) -> SGDConfig:
        """Read lr, weight decay, momentum and Nesterov from a `torch.optim.SGD`.

        Raises DataError if the optimiser is not SGD, maximises, uses dampening, or has parameter groups that differ.
        """
        if not isinstance(optimizer, torch.optim.SGD):
            raise DataError(
                f"noise-equilibrium theory covers torch.optim.SGD, got {type(optimizer).__name__}; "
                "build SGDConfig(...) by hand for the SGD you want to compare with"
            )
        keys = ("lr", "weight_decay", "momentum", "nesterov", "dampening", "maximize")
        settings = [{k: group[k] for k in keys} for group in optimizer.param_groups]
        differing = {k: [s[k] for s in settings] for k in keys if any(s[k] != settings[0][k] for s in settings)}
        if differing:
            raise DataError(
                f"parameter groups differ in {differing}: a symmetry joins parameters of several groups, but the "
                "theory has one lr, momentum and weight decay for all of them; give the groups the same, or build "
                "SGDConfig(...) by hand with what the moved parameters have"
            )
        if settings[0]["dampening"] or settings[0]["maximize"]:
            raise DataError("dampening and maximize are outside the theory; set them to 0 and False")
        s = settings[0]
        return cls(
            float(s["lr"]),
            batch_size,
            float(s["weight_decay"]),
            float(s["momentum"]),
            bool(s["nesterov"]),
            dataset_size,
            replacement,
        )

    @property
    def effective_lr(self) -> float:
        """`lr / (1 - momentum)`: the learning rate of the slow dynamics (theory.md section 4)."""
        return self.lr / (1 - self.momentum)

    @property
    def stability_limit(self) -> float:
        """`lr * curvature` at which full-batch steps start to grow: `2 (1 + m)`, Nesterov `2 (1 + m) / (1 + 2 m)`."""
        m = self.momentum
        return 2 * (1 + m) / (1 + 2 * m if self.nesterov else 1)

    @property
    def covariance_factor(self) -> float:
        """`f` in `Cov[g_B] = f * Sigma`: `1/S`, times `(N-S)/(N-1)` without replacement (theory.md section 1)."""
        s, n = self.batch_size, self.dataset_size
        if n is None or self.replacement:
            return 1.0 / s
        return 0.0 if n == 1 else (n - s) / (n - 1) / s

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
