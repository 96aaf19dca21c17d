"""Optimiser state that moves with the weights: in a living optimiser, or in its saved `state_dict()`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from noetherflow.balance.motion import Motion
from noetherflow.core.held import Held

GRADIENT_LIKE = ("momentum_buffer", "exp_avg", "grad_avg")
SQUARE_LIKE = ("exp_avg_sq", "square_avg", "max_exp_avg_sq", "sum")
WEIGHT_LIKE = ("ax",)
RULES = {
    **dict.fromkeys(GRADIENT_LIKE, Motion.gradient),
    **dict.fromkeys(SQUARE_LIKE, Motion.squares),
    **dict.fromkeys(WEIGHT_LIKE, Motion.weight),
}


@dataclass
class MoveTally:
    """How many entries moved, which of them only approximately, and what should have moved but did not."""

    entries: int = 0
    approximate: list[str] = field(default_factory=list)
    unmoved: list[str] = field(default_factory=list)


def moved_state(held: Sequence[Held], motion: Motion, tally: MoveTally) -> Iterator[tuple[Held, str, Tensor]]:
    """`(held, key, new value in its own dtype)` for every entry of one optimiser that has a rule.

    What moved and what should have is told to `tally`: tensors under a moved parameter, and flat ones that span all
    parameters (L-BFGS).
    """
    if not any(h.name in motion.by_parameter for h in held):
        return
    span = sum(h.parameter.numel() for h in held)
    for h in held:
        concerned = 2 if h.name in motion.by_parameter else span
        for key, value in list(h.state.items()):
            if not _has_rule(h, key, motion):
                if any(t.numel() >= concerned for t in tree_leaves(value) if isinstance(t, Tensor)):
                    tally.unmoved.append(f"{h.name}: {key} left as it was (no rule for this optimiser state)")
                continue
            tally.entries += 1
            if h.coupled and key not in WEIGHT_LIKE:
                tally.approximate.append(
                    f"{h.name}: {key} moved like a gradient; its weight-decay part moves like a weight"
                )
            if key in SQUARE_LIKE and not motion.is_torus(h.name):
                tally.approximate.append(f"{h.name}: {key} moved as if gradient entries were uncorrelated")
            yield h, key, RULES[key](motion, h.name, value).to(value.dtype)


def without_optimizer(held: Sequence[Held], tensors: Mapping[str, Tensor], motion: Motion) -> list[str]:
    """A line for every moved parameter that none of the optimisers holds."""
    known = {h.name for h in held}
    moved = [n for n in motion.by_parameter if isinstance(tensors[n], nn.Parameter)]
    return [f"{n}: optimiser state, if there is any (in no optimiser given)" for n in moved if n not in known]


def _has_rule(held: Held, key: str, motion: Motion) -> bool:
    value = held.state[key]
    preconditioned = key == "momentum_buffer" and "square_avg" in held.state
    return (
        held.name in motion.by_parameter
        and key in RULES
        and not preconditioned
        and isinstance(value, Tensor)
        and value.is_floating_point()
        and value.shape == held.parameter.shape
    )
