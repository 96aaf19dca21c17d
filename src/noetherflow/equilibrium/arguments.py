"""Arguments of the verbs that are another thing than they should be, or weights that are no numbers."""

from __future__ import annotations

from typing import Any

from noetherflow.core.arguments import MOMENTS, expect
from noetherflow.core.tensors import tensors_of
from noetherflow.discovery.unusable import refuse_bad_numbers, refuse_without_values
from noetherflow.moments.result import GradientMoments
from noetherflow.symmetry.arguments import expect_model_and_symmetries


def refuse_strangers(verb: str, model: Any, syms: Any, mom: Any) -> None:
    """Refuse arguments in another order, and weights that are NaN, infinite or without values.

    Args:
        verb: the function that was called, as `verb(model, syms, mom, sgd)`.
        model: what it was given as model.
        syms: as symmetries.
        mom: as moments; None where there are none.

    Raises:
        DataError: names the argument, what came, and the order of all.
    """
    call = f"{verb}(model, syms, mom, sgd)"
    expect_model_and_symmetries(call, model, syms)
    expect(call, "mom", mom, GradientMoments | None, MOMENTS)
    weights = tensors_of(model)
    own = {n: weights[n] for n in syms.parameters if n in weights}
    refuse_without_values(own, verb)
    refuse_bad_numbers(own, verb)
