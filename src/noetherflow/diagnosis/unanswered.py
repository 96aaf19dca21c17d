"""Parts of a measurement that could not be had: kept with the reason, so that they do not end what can be said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from noetherflow.diagnosis.finding import Finding, Topic
from noetherflow.errors import MomentError, NoetherflowError, SampleNumberError

T = TypeVar("T")


@dataclass(frozen=True)
class Unanswered:
    """What stands in place of a result that the measurement does not determine.

    Attributes:
        cause: the error that its computation ended with.

    Example:
        >>> Unanswered(MomentError("one sample has no covariance; measure at least two")).title
        'Not known: one sample has no covariance.'
    """

    cause: NoetherflowError

    @property
    def title(self) -> str:
        """The reason as a sentence, without the remedy."""
        return f"Not known: {str(self.cause).partition('; ')[0]}."

    @property
    def advice(self) -> str:
        """What to do to get the result; where samples were too few, how many it takes and how they are given."""
        cause = self.cause
        if isinstance(cause, SampleNumberError) and cause.unit == "samples":
            return (
                f"measure at least {cause.needed:,} samples: nf.analyze(..., samples={cause.needed}) takes them from a "
                "loader; a list of batches must hold that many"
            )
        if isinstance(cause, SampleNumberError):
            return f"give at least {cause.needed:,} minibatches of that size, as a list of batches"
        return str(cause).partition("; ")[2]


def attempted(compute: Callable[[], T]) -> T | Unanswered:
    """What `compute` returns; where the moments do not determine it, the reason.

    Example:
        >>> attempted(lambda: 2 + 2)
        4
    """
    try:
        return compute()
    except MomentError as cause:
        return Unanswered(cause)


def known(part: T | Unanswered) -> T:
    """The part itself.

    Raises:
        MomentError: it is not known; the reason and the remedy.
    """
    if isinstance(part, Unanswered):
        raise part.cause
    return part


def answered(topic: Topic, rule: str, compute: Callable[[], list[Finding]]) -> list[Finding]:
    """The findings of some rules; one open question in their place where the moments do not determine them."""
    found = attempted(compute)
    if isinstance(found, Unanswered):
        return [Finding(rule, topic, "open", found.title, "", found.advice, "open")]
    return found
