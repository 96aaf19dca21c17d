"""Errors that say what was wrong, with names and shapes, and what to do."""

from __future__ import annotations

import pkgutil


class NoetherflowError(Exception):
    """Base class of every error noetherflow raises on purpose."""


class DeclarationError(NoetherflowError, ValueError):
    """A declared symmetry does not fit the model."""


class ExportError(NoetherflowError, RuntimeError):
    """The model could not be traced into a graph."""


class CertificateError(NoetherflowError, RuntimeError):
    """A symmetry that must leave the function unchanged does not."""


class MomentError(NoetherflowError, RuntimeError):
    """Gradient moments could not be measured, or a parameter's gradient was not fully accounted for."""


class SampleNumberError(MomentError):
    """The samples that moments were measured on are too few for what is asked of them.

    Attributes:
        needed: how many it takes.
        unit: `samples`, or `minibatches` where each of these is one replicate.
    """

    def __init__(self, message: str, needed: int, unit: str) -> None:
        super().__init__(message)
        self.needed = needed
        self.unit = unit


class DataError(NoetherflowError, ValueError):
    """A batch, loss or setting is unusable (NaN, wrong shape, batch larger than the data)."""


class CheckpointError(NoetherflowError, ValueError):
    """A checkpoint is unreadable or does not match the model."""


class RankError(NoetherflowError, RuntimeError):
    """Another process of a distributed run failed, ended or holds something else, so that none has a result."""


class MissingExtraError(NoetherflowError, ImportError):
    """An optional dependency is not installed."""


def require(module: str, extra: str) -> object:
    """Import `module` or raise MissingExtraError naming the extra that brings it."""
    try:
        return pkgutil.resolve_name(module)
    except (ImportError, AttributeError) as cause:
        raise MissingExtraError(
            f"{module!r} is needed here but not installed; install it with: pip install 'noetherflow[{extra}]' "
            f"(from a checkout: pip install '.[{extra}]' in its folder)"
        ) from cause
