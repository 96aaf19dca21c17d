"""What a symmetry is called: its family from what its atoms met, its name from the modules it joins."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from noetherflow.symmetry.leg import Leg
from noetherflow.symmetry.symmetry import Kind, Symmetry


def family_of(kind: Kind, legs: Sequence[Leg], tags: set[str]) -> str:
    """The family, from the group, the legs and the tags (`Store.TAGS`) of what it moves."""
    weight_legs = [leg for leg in legs if not leg.buffer]
    if len({leg.sign for leg in weight_legs}) == 1:
        return "one-sided"
    if "score" in tags and "gain" not in tags:
        paired = kind == "diagonal" and legs[0].blocks > 1 and any(leg.replicas > 1 for leg in weight_legs)
        return "rotary-qk" if paired else "attention-qk"
    if "value" in tags:
        return "attention-vo"
    for tag, family in (("gain", "norm-gain"), ("relu", "rescaling"), ("gate", "gated")):
        if tag in tags:
            return family
    if kind == "general_linear":
        return "linear-linear"
    return "stream" if sum(leg.sign > 0 for leg in weight_legs) > 2 else "rescaling"


def name_of(legs: Sequence[Leg]) -> str:
    """`producer -> consumer` by module, with the number of further legs: `0 -> 2`, `embed -> head (+3)`."""
    sides = []
    for sign in (1, -1):
        names = list(dict.fromkeys(_module(leg.parameter) for leg in legs if leg.sign == sign and not leg.buffer))
        if names:
            sides.append(names[0] + (f" (+{len(names) - 1})" if len(names) > 1 else ""))
    return " -> ".join(sides)


def unique_names(symmetries: list[Symmetry]) -> list[Symmetry]:
    """The same symmetries; the second one of a name gets ` #2`, one-sided ones are marked ` [scale]`."""
    seen: dict[str, int] = defaultdict(int)
    out = []
    for s in symmetries:
        label = f"{s.name} [scale]" if s.family == "one-sided" else s.name
        seen[label] += 1
        out.append(replace(s, name=label if seen[label] == 1 else f"{label} #{seen[label]}"))
    return out


def _module(parameter: str) -> str:
    owner, _, name = parameter.rpartition(".")
    return owner if owner and name in ("weight", "bias") else parameter
