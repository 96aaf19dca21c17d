"""Workloads: a model, its per-sample loss and data, built in or from `package.module:factory`."""

from __future__ import annotations

import difflib
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from noetherflow.core.inputs import LossFn
from noetherflow.errors import DataError, NoetherflowError, require

CONTRACT = "def factory(): return model, loss_fn, batches  # loss_fn(model, batch) gives one loss per sample"


@dataclass(frozen=True, eq=False)
class Workload:
    """A model together with what it is trained on.

    Attributes:
        name: how it is called on the command line and in titles.
        model: the module, in the dtype in which it is to be measured.
        loss_fn: `loss_fn(model, batch)` gives one loss per sample, shape `[batch]`.
        batches: can be iterated again and again.
        example_inputs: what `find_symmetries` takes: a tensor, a tuple of arguments or a dict of keyword arguments.
    """

    name: str
    model: nn.Module
    loss_fn: LossFn
    batches: Sequence[Any]
    example_inputs: Any

    @property
    def samples(self) -> int:
        """The number of samples in all batches together."""
        return sum(_batch_length(b) for b in self.batches)


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The cross entropy of each sample of a batch `(inputs, labels)`, shape `[batch]`."""
    x, y = batch
    return F.cross_entropy(model(x), y, reduction="none")


def squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The squared distance of output and target for each sample of a batch `(inputs, targets)`, shape `[batch]`.

    It is neither halved nor averaged over the outputs: `||model(x) - y||^2`.

    Example:
        >>> squared_error(nn.Identity(), (torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2)))
        tensor([5.])
    """
    x, y = batch
    return (model(x) - y).square().flatten(1).sum(1)


def digits(images: bool = False) -> tuple[Tensor, Tensor]:
    """The handwritten digits that come with scikit-learn.

    Args:
        images: keep the 8 x 8 shape, for convolutions.

    Returns:
        1,797 images with values in [0, 1], float64 `[1797, 64]` or `[1797, 1, 8, 8]`, and their labels `[1797]`.

    Raises:
        MissingExtraError: without scikit-learn.
    """
    bunch = require("sklearn.datasets", "examples").load_digits()  # type: ignore[attr-defined]
    x = torch.as_tensor(bunch.data / 16.0, dtype=torch.float64)
    return (x.reshape(-1, 1, 8, 8) if images else x), torch.as_tensor(bunch.target)


def digits_mlp(seed: int = 0) -> Workload:
    """A ReLU classifier of the digits with two hidden layers of 32 units."""
    torch.manual_seed(seed)
    layers = [nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)]
    x, y = digits()
    return Workload("digits-mlp", nn.Sequential(*layers).double(), cross_entropy, split(x, y, 256), (x[:4],))


def digits_cnn(seed: int = 0) -> Workload:
    """A small convolutional classifier of the digits, with a group norm behind the first convolution."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.GroupNorm(4, 8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    x, y = digits(images=True)
    return Workload("digits-cnn", model.double(), cross_entropy, split(x, y, 256), (x[:4],))


def linear_factorisation(seed: int = 0, width: int = 6, samples: int = 4096) -> Workload:
    """A linear net of two layers with anisotropic inputs and label noise, whose equilibrium is known in closed form.

    Source: theory.md section 8.
    """
    rng = torch.Generator().manual_seed(seed)
    d = 6
    x = torch.randn(samples, d, generator=rng, dtype=torch.float64) * torch.linspace(0.4, 2.0, d, dtype=torch.float64)
    noise = torch.randn(samples, d, generator=rng, dtype=torch.float64) * torch.linspace(1.0, 0.2, d).double()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(d, width, bias=False), nn.Linear(width, d, bias=False)).double()
    return Workload("linear-factorisation", model, squared_error, split(x, x + noise, 512), (x[:4],))


BUILT_IN: dict[str, Callable[[], Workload]] = {
    "digits-mlp": digits_mlp,
    "digits-cnn": digits_cnn,
    "linear-factorisation": linear_factorisation,
}


def split(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """The samples `x`, `y` in consecutive batches `(x, y)` of `size` samples; the last one may be smaller."""
    return list(zip(x.split(size), y.split(size), strict=True))


def minibatches(x: Tensor, y: Tensor, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless minibatches `(x, y)` of `size` samples, each drawn from all of them, as the theory assumes."""
    rng = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(x), (size,), generator=rng)
        yield x[chosen], y[chosen]


def load_workload(spec: str, data: str | None = None) -> Workload:
    """The workload that MODEL on the command line names.

    A factory returns a Workload, or `(model, loss_fn, batches)` with `loss_fn(model, batch)` per-sample losses and
    `batches` a list of batches (a tensor, or a tuple that starts with the model's input); for any other kind of batch
    it returns `(model, loss_fn, batches, example_inputs)`.

    Args:
        spec: the name of a built-in workload, or `package.module:factory`.
        data: other data in place of the workload's own: a `.npz` or `.safetensors` file with arrays `x` and `y`, or
            `package.module:function`.

    Raises:
        DataError: when the name, the factory, its result or the data file cannot be used.

    Example:
        >>> load_workload("linear-factorisation").samples
        4096
    """
    if spec.startswith("hf:"):
        raise DataError(f"{spec!r} gives a model without data or loss; give package.module:factory with {CONTRACT}")
    workload = as_workload(spec, make(spec))
    if data is None:
        return workload
    batches = _load_batches(data)
    return replace(workload, batches=batches, example_inputs=_inputs_of(batches[0], data))


def make(spec: str) -> Any:
    """What the built-in example or the factory of that name returns."""
    return (BUILT_IN[spec] if spec in BUILT_IN else load_object(spec))()


def load_object(spec: str) -> Callable[..., Any]:
    """The callable at `package.module:attribute`; modules of the current folder are found too.

    Raises:
        DataError: when there is no such module or attribute, or it cannot be called.
    """
    if not spec.partition(":")[2]:
        close = difflib.get_close_matches(spec, BUILT_IN, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise DataError(
            f"{spec!r} is neither a built-in example {sorted(BUILT_IN)} nor of the form package.module:factory{hint}"
        )
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = pkgutil.resolve_name(spec)
    except (ImportError, AttributeError) as cause:
        raise DataError(f"cannot load {spec!r}: {cause}") from cause
    if not callable(found):
        raise DataError(f"{spec!r} is a {type(found).__name__}, not a function that returns (model, loss_fn, batches)")
    return found


def as_workload(spec: str, result: Any) -> Workload:
    """What the factory `spec` returned, as a Workload.

    Raises:
        DataError: when it breaks the contract that `load_workload` describes.
    """
    if isinstance(result, Workload):
        return result
    if not (isinstance(result, tuple) and len(result) in (3, 4) and isinstance(result[0], nn.Module)):
        raise DataError(
            f"{spec!r} returned {_describe(result)}; it must return (model, loss_fn, batches) with a torch.nn.Module "
            f"and a list of batches: {CONTRACT}"
        )
    model, loss_fn, batches, *example = result
    batches = _listed(batches, spec)
    return Workload(spec, model, loss_fn, batches, example[0] if example else _inputs_of(batches[0], spec))


def _load_batches(data: str, size: int = 256) -> list[Any]:
    """The batches that `--data` names, with an error that says what is wrong with a file."""
    path = Path(data)
    if path.suffix not in (".npz", ".safetensors"):
        if ":" in data:
            return _listed(load_object(data)(), data)
        raise DataError(
            f"--data {data!r}: give a .npz or .safetensors file with arrays x and y, or package.module:function"
        )
    if not path.exists():
        raise DataError(f"--data {data!r}: no such file")
    try:
        arrays = _read_arrays(path)
    except NoetherflowError:
        raise
    except Exception as cause:
        raise DataError(f"--data {data!r} cannot be read: {cause}") from cause
    missing = {"x", "y"} - arrays.keys()
    if missing:
        raise DataError(f"--data {data!r} holds {sorted(arrays)}, missing {sorted(missing)}")
    if len(arrays["x"]) != len(arrays["y"]):
        raise DataError(f"--data {data!r}: x has {len(arrays['x'])} samples, y has {len(arrays['y'])}")
    return _listed(split(arrays["x"], arrays["y"], size), data)


def _read_arrays(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)

    with np.load(path, allow_pickle=False) as archive:
        return {name: torch.as_tensor(archive[name]) for name in archive.files}


def _listed(batches: Iterable[Any], source: str) -> list[Any]:
    """The batches as a list; DataError where there are none, or one without samples."""
    try:
        listed = list(batches)
    except TypeError as cause:
        raise DataError(f"{source!r}: batches must be iterable, got {_describe(batches)}") from cause
    if not listed:
        raise DataError(f"{source!r}: there are no batches; give at least one")
    for i, batch in enumerate(listed):
        first = _first(batch)
        if isinstance(first, Tensor) and first.ndim and not len(first):
            raise DataError(f"{source!r}: batch {i} is empty (first tensor has shape {tuple(first.shape)})")
    return listed


def _inputs_of(batch: Any, source: str) -> tuple[Any, ...]:
    """Four samples of the batch's input as example inputs of the model."""
    first = batch if isinstance(batch, Mapping) else _first(batch)
    if not isinstance(first, Tensor):
        raise DataError(
            f"{source!r}: the first item of a batch must be the model's input tensor, got {_describe(first)}"
        )
    return (first[:4],)


def _batch_length(batch: Any) -> int:
    return len(_first(batch))


def _first(batch: Any) -> Any:
    """The first value of a dict or item of a tuple, None where there is none; else the batch itself."""
    items = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else (batch,)
    return next(iter(items), None)


def _describe(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {[type(v).__name__ for v in value]}"
    return f"a {type(value).__name__}"
