"""How a torch DataLoader draws its batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, RandomSampler, Sampler
from torch.utils.data.distributed import DistributedSampler

from noetherflow.core.rates import Sampling
from noetherflow.errors import DataError


@dataclass(frozen=True)
class Drawn:
    """From how many samples batches come (None: fresh data), whether one may come twice in a batch, and in what order;
    as in `SGDConfig`.
    """

    dataset_size: int | None
    replacement: bool
    sampling: Sampling


FRESH = Drawn(None, False, "independent")
"""Every batch is new data."""


def drawn_by(loader: Any, batch_size: int) -> Drawn:
    """Read from a DataLoader how it draws its batches.

    Args:
        loader: a torch `DataLoader`, also one that accelerate has prepared.
        batch_size: samples per optimiser step, over all devices.

    Returns:
        Size of the data set and way of sampling; a stream counts as fresh data.

    Raises:
        DataError: it is no DataLoader, or goes through the data in one order, or by a sampler whose law is unknown.

    Example:
        >>> drawn_by(DataLoader(list(range(10)), batch_size=2, shuffle=True), batch_size=2)
        Drawn(dataset_size=10, replacement=False, sampling='epoch')
    """
    if not isinstance(loader, DataLoader):
        raise DataError(
            f"loader must be a torch DataLoader, got {type(loader).__name__}; give dataset_size, replacement and "
            "sampling by hand"
        )
    if isinstance(loader.dataset, IterableDataset):
        return FRESH
    sampler, size = _sampler_of(loader), len(loader.dataset)  # type: ignore[arg-type]
    if isinstance(sampler, RandomSampler) and sampler.replacement:
        return Drawn(size, True, "independent")
    shuffled = isinstance(sampler, RandomSampler) or (isinstance(sampler, DistributedSampler) and sampler.shuffle)
    if not shuffled and batch_size < size:
        raise DataError(
            f"the loader draws by {type(sampler).__name__}: batches in one order, or by a law that is not known here, "
            "repeat or weigh samples in a way the theory does not cover; use DataLoader(..., shuffle=True), or give "
            "dataset_size=, replacement= and sampling= by hand"
        )
    return Drawn(size, False, "epoch")


def _sampler_of(loader: DataLoader[Any]) -> Sampler[Any] | Any:
    """What chooses the samples: it is inside the batch sampler, which accelerate may have wrapped."""
    batches: Any = loader.batch_sampler
    while hasattr(batches, "batch_sampler"):
        batches = batches.batch_sampler
    return getattr(batches, "sampler", loader.sampler)
