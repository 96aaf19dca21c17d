"""Batch statistics: which symmetries hold with them only, and what can be measured in which mode.

A weight in front of a batch norm may be scaled freely in training, where the norm divides by the batch's own spread.
In evaluation it divides by running statistics, which the symmetry moves along but no gradient does: gradients there do
not obey the symmetry, and their scatter along it is not that of training.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from noetherflow.errors import MomentError
from noetherflow.symmetry.symmetry_set import SymmetrySet


def running_statistics(syms: SymmetrySet) -> dict[str, tuple[str, ...]]:
    """The symmetries that move running statistics along, each with the names of these buffers.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6)).eval()
        >>> running_statistics(nf.find_symmetries(model, torch.ones(2, 4)))
        {'0 [scale]': ('1.running_mean', '1.running_var')}
    """
    found = {s.name: tuple(dict.fromkeys(leg.parameter for leg in s.legs if leg.buffer)) for s in syms}
    return {name: buffers for name, buffers in found.items() if buffers}


def refuse_running_statistics(syms: SymmetrySet) -> None:
    """Raises MomentError for symmetries along which single samples have no gradients of training."""
    names = list(running_statistics(syms))
    if names:
        raise MomentError(
            f"symmetries {_some(names)} hold with batch statistics only: in evaluation mode gradients do not obey "
            "them, and in training mode samples have no gradients of their own. Measure with minibatch_moments, the "
            "model in training mode; or leave them out: "
            "syms.without({s.name: 'batch statistics' for s in syms if any(leg.buffer for leg in s.legs)})"
        )


def refuse_evaluation(model: nn.Module, syms: SymmetrySet) -> None:
    """Raises MomentError for symmetries that hold with batch statistics only, where the model does not use them."""
    for name, buffers in running_statistics(syms).items():
        for buffer in buffers:
            module = model.get_submodule(buffer.rpartition(".")[0])
            if not module.training:
                raise MomentError(
                    f"symmetry {name!r} holds with batch statistics only, and {buffer.rpartition('.')[0]!r} "
                    f"({type(module).__name__}) is in evaluation mode, where it uses running ones: call model.train() "
                    "before measuring"
                )


def uses_batch_statistics(modules: Iterable[nn.Module]) -> bool:
    """Whether a batch norm among the modules normalises by the batch's own statistics, in the mode it is in."""
    norms = (m for m in modules if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return any(m.training or m.running_mean is None for m in norms)


def refuse_batch_statistics(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Raises MomentError for a batch norm that uses batch statistics, with which samples act on each other."""
    for name, module in modules:
        if uses_batch_statistics([module]):
            raise MomentError(
                f"batch norm {name!r} uses batch statistics, so samples have no gradients of their own; measure with "
                f"minibatch_moments{_or_evaluation(module)}"
            )


def _or_evaluation(module: Any) -> str:
    """The other way out, where there is one."""
    if module.running_mean is None:
        return " (it keeps no running statistics, so that model.eval() would not change this)"
    return ", or call model.eval() for a model that is trained with running statistics frozen, as fine-tuning may do"


def _some(names: list[str]) -> str:
    return f"{names[:4]} and {len(names) - 4} more" if len(names) > 4 else str(names)
