"""How a model ran while its gradients were measured: the coarsest arithmetic met, and batch norms out of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from noetherflow.core.torch_internals import coarsest_epsilon


@dataclass(frozen=True)
class Conditions:
    """What a reader of moments must know of the passes that gave them.

    Attributes:
        rounding: the largest machine epsilon among the results of the forward's operators, 0 where it is not known. It
            is that of bfloat16 under autocast, whatever type the weights have.
        running: names of the norms that divided by running statistics.
        random: the forward drew random numbers of torch (dropout), so that a data set measured whole still scatters.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).double().eval()
        >>> before = random_states()
        >>> Conditions.of(model, model(torch.ones(3, 2, dtype=torch.float64)).sum(1), before)
        Conditions(rounding=2.220446049250313e-16, running=('1',), random=False)
    """

    rounding: float = 0.0
    running: tuple[str, ...] = ()
    random: bool = False

    @classmethod
    def of(cls, model: nn.Module, losses: Tensor, before: Sequence[Tensor]) -> Conditions:
        """Those of a forward of the model that gave `losses`, whose graph is still there.

        Args:
            model: the model.
            losses: what the forward gave.
            before: the `random_states()` before it.
        """
        drew = not all(torch.equal(a, b) for a, b in zip(before, random_states(), strict=False))
        return cls(coarsest_epsilon(losses), frozen_norms(model), drew)

    def joined(self, other: Conditions) -> Conditions:
        """Those of two measurements together."""
        names = dict.fromkeys((*self.running, *other.running))
        return Conditions(max(self.rounding, other.rounding), tuple(names), self.random or other.random)

    @property
    def caution(self) -> list[str]:
        """A line where the model was measured in evaluation mode and will be trained in another."""
        if not self.running:
            return []
        more = f" and {len(self.running) - 3} more" if len(self.running) > 3 else ""
        return [
            f"measured in evaluation mode: drift in training differs, where the norms {list(self.running[:3])}{more} "
            "divide by the statistics of each batch and not by running ones; measure with nf.minibatch_moments, the "
            "model in training mode, unless these norms stay in evaluation mode in training too"
        ]


def random_states() -> tuple[Tensor, ...]:
    """The states of torch's random generators: the CPU's, and those of the CUDA devices in use."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return (torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices))


def frozen_norms(model: nn.Module) -> tuple[str, ...]:
    """Names of the norms with running statistics that are in evaluation mode and so use them.

    Example:
        >>> frozen_norms(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
        ()
    """
    return tuple(name or type(m).__name__ for name, m in model.named_modules() if _uses_running(m))


def _uses_running(module: Any) -> bool:
    norm = isinstance(module, nn.modules.batchnorm._NormBase)
    return norm and not module.training and module.running_mean is not None
