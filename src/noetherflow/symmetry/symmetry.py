"""Exponential symmetries as group elements acting on legs, and the translations beside them (theory.md section 2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from noetherflow.core import spd
from noetherflow.symmetry.leg import Leg, accumulation_dtype

Kind = Literal["scalar", "diagonal", "general_linear"]
Params = Mapping[str, Tensor]
PARTS = {
    "attention-qk": "head",
    "attention-vo": "head",
    "rotary-qk": "pair",
    "norm-gain": "channel",
    "one-sided": "channel",
}
"""What a block of a family is; of the others it is a unit."""


@dataclass(frozen=True, eq=False)
class Symmetry:
    """`l(G . theta, z) = l(theta, z)` for every sample z and every positive G of the group.

    `kind` is `scalar` (one positive number), `diagonal` (`blocks` positive numbers) or `general_linear` (`blocks`
    invertible `dim x dim` matrices). Group elements, Lie-algebra elements and charges share one layout: `[blocks]` for
    scalar and diagonal groups, `[blocks, dim, dim]` for general_linear.

    `eps` names the normalisation constant that makes the symmetry only approximate, where there is one.
    """

    name: str
    family: str
    kind: Kind
    legs: tuple[Leg, ...]
    eps: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if not self.weight_legs:
            raise ValueError(f"symmetry {self.name!r} has no leg on a parameter")
        shapes = {(leg.blocks, leg.dim) for leg in self.legs}
        if len(shapes) > 1:
            raise ValueError(f"legs of {self.name!r} disagree on (blocks, dim): {sorted(shapes)}")
        if self.kind != "general_linear" and self.dim != 1:
            raise ValueError(f"{self.kind} symmetry {self.name!r} must have dim 1, got {self.dim}")
        if self.kind == "general_linear" and any(leg.power != 1 for leg in self.legs):
            raise ValueError(f"general_linear symmetry {self.name!r} cannot have powers other than 1")
        offsets = {(leg.parameter, leg.offset) for leg in self.legs}
        if len(offsets) > len({leg.parameter for leg in self.legs}):
            raise ValueError(f"legs of {self.name!r} on one parameter disagree on its offset: {sorted(offsets)}")

    @property
    def blocks(self) -> int:
        return self.legs[0].blocks

    @property
    def dim(self) -> int:
        return self.legs[0].dim

    @property
    def is_torus(self) -> bool:
        """True when group elements are vectors of positive numbers (scalar and diagonal kinds)."""
        return self.kind != "general_linear"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.blocks,) if self.is_torus else (self.blocks, self.dim, self.dim)

    @cached_property
    def weight_legs(self) -> tuple[Leg, ...]:
        """The legs that carry charge: all but the buffers."""
        return tuple(leg for leg in self.legs if not leg.buffer)

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that carry charge, each once."""
        return tuple(dict.fromkeys(leg.parameter for leg in self.weight_legs))

    @cached_property
    def offsets(self) -> dict[str, float]:
        """What is added to a parameter before the group acts on it, by parameter; those with 0 are left out."""
        return {leg.parameter: leg.offset for leg in self.legs if leg.offset}

    def pulled(self, decays: Callable[[str], bool]) -> str | None:
        """Why weight decay leaves this symmetry without a noise equilibrium, None where it does not.

        Args:
            decays: whether the optimiser decays a parameter, by name. Decay pulls the stored number of an offset leg to
                0, and so the position to the offset: then no flow of the charge alone describes it.
        """
        name = next((n for n in self.offsets if decays(n)), None)
        return (
            None if name is None else f"{name}: weight decay pulls the stored number to 0, not the sum that is scaled"
        )

    def positions(self, params: Params) -> Params:
        """The given weights as the group sees them: with the offsets of their legs added.

        Args:
            params: tensors by name, those of the legs among them.

        Returns:
            The same mapping where no leg has an offset; else a copy in which those parameters, in float64, have theirs.
        """
        if not self.offsets:
            return params
        return {n: t.double() + self.offsets[n] if n in self.offsets else t for n, t in params.items()}

    @property
    def layer(self) -> str:
        """The module of the first parameter that the symmetry moves, by its dotted name."""
        return self.parameters[0].rpartition(".")[0]

    @property
    def part(self) -> str:
        """What one block of the symmetry is in the network, in a word: `head`, `pair` (of frequencies), `channel`,
        `unit`, or `matrix` between two linear maps.
        """
        if not self.is_torus and self.family not in PARTS:
            return "matrix"
        return PARTS.get(self.family, "unit")

    @property
    def one_sided(self) -> bool:
        """True when every charge-carrying leg scales the same way: the norm has no counterweight."""
        return len({leg.sign for leg in self.weight_legs}) == 1

    @cached_property
    def self_coupled(self) -> bool:
        """True when one parameter carries two legs, so that legs may move the same entries (a tied or shared layer)."""
        return len(self.parameters) < len(self.weight_legs)

    def identity(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return self._shaped(torch.eye(self.dim, dtype=dtype, device="cpu").expand(self.blocks, -1, -1))

    def exp(self, generator: Tensor) -> Tensor:
        """`exp(A)` for a symmetric generator in the layout `shape`."""
        return generator.exp() if self.is_torus else spd.expm(generator)

    def inverse(self, element: Tensor) -> Tensor:
        """`G^-1`."""
        return element.reciprocal() if self.is_torus else torch.linalg.inv(element)

    def compose(self, second: Tensor, first: Tensor) -> Tensor:
        """`second @ first`: act with `first`, then with `second`."""
        return second * first if self.is_torus else second @ first

    def random_element(self, spread: float = 0.3, rng: torch.Generator | None = None) -> Tensor:
        """`exp` of a random symmetric generator with entries of standard deviation `spread`, float64."""
        noise = spread * torch.randn(self.shape, dtype=torch.float64, generator=rng, device="cpu")
        return self.exp(noise if self.is_torus else spd.symmetric(noise))

    def act(self, params: Params, element: Tensor) -> dict[str, Tensor]:
        """The moved tensors `G . theta` by name (only those with a leg); inputs are untouched.

        `+` legs go `X -> G X`, `-` legs `X -> G^-T X`, `X` the parameter plus the leg's offset. Raises KeyError for a
        missing parameter.
        """
        moved = self._move(self.positions(params), element, self.legs)
        return {n: (t - self.offsets[n]).to(params[n].dtype) if n in self.offsets else t for n, t in moved.items()}

    def act_on_gradients(self, gradients: Params, element: Tensor) -> dict[str, Tensor]:
        """What gradients become at the moved point: `dX -> G^-T dX` on `+` legs, `G dX` on `-` legs."""
        dual = self.inverse(element) if self.is_torus else self.inverse(element).mT
        return self._move(gradients, dual, self.weight_legs)

    def act_(self, params: Params, element: Tensor) -> None:
        """`act`, written into the given tensors."""
        moved = self.act(params, element)
        with torch.no_grad():
            for name, value in moved.items():
                params[name].copy_(value)

    def _move(self, tensors: Params, element: Tensor, legs: tuple[Leg, ...]) -> dict[str, Tensor]:
        dual = None if self.is_torus else self.inverse(element).mT
        moved: dict[str, Tensor] = {}
        for leg in legs:
            current = moved.get(leg.parameter, tensors[leg.parameter])
            here = element.to(current.device)
            if dual is None:
                moved[leg.parameter] = leg.scale(current, here)
            else:
                moved[leg.parameter] = leg.multiply(current, here if leg.sign > 0 else dual.to(current.device))
        return moved

    def move(self, parameter: str, tensor: Tensor, element: Tensor) -> Tensor:
        """`tensor`, of the shape of a parameter, multiplied as the legs on that parameter say (itself where there is
        none): a position (`positions`) moves by `element`, a gradient by its dual.
        """
        legs = tuple(leg for leg in self.legs if leg.parameter == parameter)
        return self._move({parameter: tensor}, element, legs).get(parameter, tensor)

    def move_weight(self, parameter: str, tensor: Tensor, element: Tensor) -> Tensor:
        """One parameter of `act`: the weight itself, its offset taken into account."""
        offset = self.offsets.get(parameter, 0.0)
        if not offset:
            return self.move(parameter, tensor, element)
        return (self.move(parameter, tensor.double() + offset, element) - offset).to(tensor.dtype)

    def tangent(self, params: Params, generator: Tensor) -> dict[str, Tensor]:
        """`d/dlam exp(lam A) . theta` at 0, by parameter name (charge-carrying legs), `A` in the layout `shape`."""
        here = self.positions(params)
        return {n: self.tangent_of(n, here[n], generator) for n in self.parameters}

    def tangent_of(self, parameter: str, tensor: Tensor, generator: Tensor) -> Tensor:
        """One parameter of `tangent` at the position `tensor`, zero where no charge-carrying leg lies on it."""
        out = torch.zeros_like(tensor)
        blocks = generator.to(tensor).reshape(self.blocks, self.dim, -1)
        for leg in self.weight_legs:
            if leg.parameter == parameter:
                moved = leg.exponent * (blocks @ leg.unfold(tensor))
                out = out + leg.fold(torch.zeros_like(tensor), moved)
        return out

    def charge(self, params: Params) -> Tensor:
        """The Noether charge `C = sum_legs exponent * X X^T` of weights, layout `shape` (theory.md section 2)."""
        return self.form(self.positions(params))

    def form(self, tensors: Params) -> Tensor:
        """`sum_legs exponent * X X^T` of tensors taken as they are, layout `shape`: of positions (`positions`) the
        charge, of one gradient what a step along it adds.
        """
        return self.combine(self.grams(tensors))

    def grams(self, tensors: Params) -> tuple[Tensor, ...]:
        """Leg Grams `X X^T` of the given tensors, one per charge-carrying leg, layout `shape`.

        With positions (`positions`) in `tensors` these are `K_leg`; with one gradient they are `dX dX^T`.
        """
        return tuple(self.leg_gram(leg, tensors[leg.parameter]) for leg in self.weight_legs)

    def leg_gram(self, leg: Leg, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """`X X^T` of one leg, layout `shape`, in `dtype`: by default the tensor's, but at least float32."""
        if not self.is_torus:
            return leg.gram(tensor if dtype is None else tensor.to(dtype))
        return leg.square_sums(tensor, dtype or torch.promote_types(tensor.dtype, torch.float32))

    def combine(self, leg_values: tuple[Tensor, ...]) -> Tensor:
        """`sum_legs exponent * value`: charges from `K_leg`, noise drive `D` from `M_leg`."""
        total = torch.zeros_like(leg_values[0])
        for leg, value in zip(self.weight_legs, leg_values, strict=True):
            total = total + leg.exponent * value
        return total

    def n_charges(self, widths: Mapping[str, tuple[int, ...]] | None = None) -> int:
        """Independent charges: one per coordinate of a torus; `k (2 dim + 1 - k) / 2` per GL block (theory.md 11).

        `k = min(dim, total number of columns of the legs)`; without the parameter shapes in `widths`, `k = dim`.
        """
        if self.is_torus:
            return self.blocks
        k = self.dim
        if widths is not None:
            columns = sum(
                int(np.prod(widths[leg.parameter])) // self._rows_of(leg, widths[leg.parameter]) * leg.replicas
                for leg in self.weight_legs
            )
            k = min(k, columns)
        return self.blocks * k * (2 * self.dim + 1 - k) // 2

    @staticmethod
    def _rows_of(leg: Leg, shape: tuple[int, ...]) -> int:
        view = shape if leg.view is None else leg.view
        return int(np.prod([view[a] for a in leg.axes]))

    def _shaped(self, blocks: Tensor) -> Tensor:
        return blocks.reshape(self.shape).clone()

    def __str__(self) -> str:
        group = {"scalar": "scalar", "diagonal": f"diagonal({self.blocks})"}.get(
            self.kind, f"{self.blocks} x GL({self.dim})" if self.blocks > 1 else f"GL({self.dim})"
        )
        legs = ", ".join(leg.label for leg in self.legs)
        return f"{self.name} [{self.family}] {group}: {legs}"

    __repr__ = __str__

    def fingerprint(self) -> str:
        """How the symmetry acts, in short: what two processes compare before they add numbers."""
        return " ".join([self.kind, str(self.eps), *(leg.fingerprint() for leg in self.legs)])

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "family": self.family,
            "kind": self.kind,
            "legs": [leg.to_dict() for leg in self.legs],
            "eps": self.eps,
            "note": self.note,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Symmetry:
        legs = tuple(Leg.from_dict(leg) for leg in data["legs"])
        return cls(data["name"], data["family"], data["kind"], legs, data.get("eps"), data.get("note", ""))


@dataclass(frozen=True, eq=False)
class Translation:
    """`X -> X + u c^T` for every `c`: a direction `u` of a parameter's rows that the function ignores.

    Family `translation`: softmax logit shift, key bias; the charge `u^T X` is linear and conserved even under gradient
    noise. Family `null`: the mean over a LayerNorm's axis in a producer. `direction` is `u`, `[dim]` (None: ones).
    The gradient satisfies `u^T dX = 0` exactly, so only weight decay moves the charge.
    """

    name: str
    family: Literal["translation", "null"]
    leg: Leg
    direction: np.ndarray | None = None
    note: str = ""

    @property
    def parameters(self) -> tuple[str, ...]:
        return (self.leg.parameter,)

    def _direction(self, like: Tensor) -> Tensor:
        if self.direction is None:
            return torch.ones(self.leg.dim, dtype=like.dtype, device=like.device)
        return torch.as_tensor(self.direction, dtype=like.dtype, device=like.device)

    def act(self, params: Params, shift: Tensor) -> dict[str, Tensor]:
        """The shifted parameter; `shift` is `c`, shape `[blocks, m]` (broadcast)."""
        theta = params[self.leg.parameter]
        x = self.leg.unfold(theta)
        moved = x + self._direction(theta)[:, None] * shift.to(theta).unsqueeze(-2)
        return {self.leg.parameter: self.leg.fold(theta, moved)}

    def charge(self, params: Params) -> Tensor:
        """`u^T X`, shape `[blocks, m]`, linear in the weights."""
        x = self.leg.unfold(accumulation_dtype(params[self.leg.parameter]))
        return torch.einsum("i,bim->bm", self._direction(x), x)

    def n_charges(self, shape: tuple[int, ...]) -> int:
        """Number of independent linear charges for a parameter of this shape: `blocks * m`."""
        view = shape if self.leg.view is None else self.leg.view
        rows = int(np.prod([view[a] for a in self.leg.axes]))
        return self.leg.blocks * self.leg.replicas * (int(np.prod(shape)) // rows)

    def to_dict(self) -> dict[str, Any]:
        direction = None if self.direction is None else self.direction.tolist()
        return {
            "name": self.name,
            "family": self.family,
            "leg": self.leg.to_dict(),
            "direction": direction,
            "note": self.note,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Translation:
        direction = None if data["direction"] is None else np.asarray(data["direction"], dtype=np.float64)
        return cls(data["name"], data["family"], Leg.from_dict(data["leg"]), direction, data.get("note", ""))
