"""The optimiser settings that the noise equilibrium depends on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch.utils.data import DataLoader

from noetherflow.core.loaders import drawn_by
from noetherflow.core.rates import (
    GroupRates,
    Rates,
    Sampling,
    batches_per_epoch,
    check_batches,
    check_rates,
    covariance_factor,
    rates_by_name,
)
from noetherflow.errors import DataError


@dataclass(frozen=True)
class SGDConfig:
    """What SGD does in a step: `theta <- theta - lr * (g_B + weight_decay * theta)` on minibatches of `batch_size`.

    Args:
        lr: Learning rate.
        batch_size: Samples per minibatch, over all devices.
        weight_decay: PyTorch's `w` (the paper's `gamma ||theta||^2` is `w = 2 gamma`).
        momentum: PyTorch's momentum.
        nesterov: Nesterov momentum.
        dataset_size: None means fresh data: an infinite population, of which the samples measured are a few. A number N
            means that the N samples are all there is.
        replacement: Batches are drawn from the N samples with replacement; else no sample is twice in a batch.
        sampling: `independent`: every batch is drawn anew. `epoch`: every pass over the data is cut into batches, in a
            new order each time, as `DataLoader(shuffle=True)` does; with momentum this weakens the noise drift.
        curvature: Of the loss in the directions of the gradient noise, Hessian eigenvalue or `Tr(H Sigma) / Tr(Sigma)`.
            It enters with momentum and epochs only; 0 is the leading order in lr and a lower bound of the noise drift.
        groups: Parameters whose learning rate or weight decay differs (none on biases and gains, say); scalar and
            diagonal symmetries only.

    Raises:
        DataError: A setting outside its range, a batch larger than the data that it is drawn from without replacement,
            replacement or epochs without a dataset_size, `lr * weight_decay >= 2`, where decay alone makes the weights
            grow, or `lr * curvature` beyond the stability limit.

    Example:
        >>> SGDConfig(lr=0.1, batch_size=50, momentum=0.9, dataset_size=1000, sampling="epoch").batches_per_epoch
        20

    Source: theory.md sections 1 and 4.
    """

    lr: float
    batch_size: int
    weight_decay: float = 0.0
    momentum: float = 0.0
    nesterov: bool = False
    dataset_size: int | None = None
    replacement: bool = False
    sampling: Sampling = "independent"
    curvature: float = 0.0
    groups: tuple[GroupRates, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups))
        rates_by_name(self.groups)
        self._check_step()
        check_batches(self.batch_size, self.dataset_size, self.replacement, self.sampling)

    def _check_step(self) -> None:
        check_rates(self.lr, self.weight_decay)
        if not 0 <= self.momentum < 1:
            raise DataError(f"momentum must lie in [0, 1), got {self.momentum!r}")
        if not 0 <= self.lr * self.curvature < self.stability_limit:
            raise DataError(
                f"curvature must be at least 0 and lr * curvature below the stability limit "
                f"{self.stability_limit:.4g}, got curvature {self.curvature!r} at lr {self.lr:g}"
            )

    @classmethod
    def from_optimizer(
        cls,
        optimizer: torch.optim.Optimizer,
        batch_size: int,
        dataset_size: int | None = None,
        replacement: bool = False,
        loader: DataLoader[Any] | None = None,
    ) -> SGDConfig:
        """Read the settings of a `torch.optim.SGD`, and how batches are drawn from the loader of the training.

        Args:
            optimizer: The optimiser.
            batch_size: Samples per minibatch, over all devices.
            dataset_size: As in SGDConfig.
            replacement: As in SGDConfig.
            loader: The DataLoader of the training: its data set's size and its sampler (shuffled epochs, or with
                replacement) are taken in place of `dataset_size` and `replacement`.

        Raises:
            DataError: The optimiser is not SGD, maximises, uses dampening, or has parameter groups that differ; the
                loader goes through the data in the same order every epoch, or by a sampler whose law is unknown.

        Example:
            >>> model = torch.nn.Linear(3, 1)
            >>> data = torch.utils.data.TensorDataset(torch.zeros(40, 3))
            >>> loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
            >>> SGDConfig.from_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), 8, loader=loader).sampling
            'epoch'
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
                "theory has one lr, momentum and weight decay for all of them; nf.optimizer_config(optimizer, "
                "batch_size, model=model) reads groups with their own lr and weight decay, or build SGDConfig(...) by "
                "hand with what the moved parameters have"
            )
        if settings[0]["dampening"] or settings[0]["maximize"]:
            raise DataError("dampening and maximize are outside the theory; set them to 0 and False")
        s = settings[0]
        step = cls(
            float(s["lr"]),
            batch_size,
            float(s["weight_decay"]),
            float(s["momentum"]),
            bool(s["nesterov"]),
            dataset_size,
            replacement,
        )
        return step if loader is None else replace(step, **vars(drawn_by(loader, batch_size)))

    def rates(self, parameter: str) -> Rates:
        """Learning rate and weight decay of one parameter by its canonical name."""
        return rates_by_name(self.groups).get(parameter, Rates(self.lr, self.weight_decay))

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
        return covariance_factor(self.batch_size, self.dataset_size, self.replacement)

    @property
    def batches_per_epoch(self) -> int | None:
        """Minibatches in one pass over the data, the last one perhaps smaller; None for fresh data."""
        return batches_per_epoch(self.batch_size, self.dataset_size)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
