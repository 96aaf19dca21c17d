"""Whose state is whose: the parameters behind the numbers in a saved optimiser, proven or refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from noetherflow.balance.motion import Motion
from noetherflow.balance.optimizer_state import SHAPED
from noetherflow.balance.state_order import exchanged
from noetherflow.core.held import Held, held_by, held_in, names_in
from noetherflow.core.tensors import tensors_of
from noetherflow.errors import CheckpointError

StateOrder = Literal["checked", "parameters"]


@dataclass(frozen=True, eq=False)
class StateNaming:
    """How the parameters of saved optimisers are to be known.

    Attributes:
        optimizers: the living ones, whose `state_dict()` was saved; they know their parameters.
        order: `parameters`: the caller says that they were built from `model.parameters()`, group by group in its
            order; `checked`: only what the file itself proves.
    """

    optimizers: tuple[torch.optim.Optimizer, ...] = ()
    order: StateOrder = "checked"

    def held(
        self, saved: Mapping[str, Any], model: nn.Module, motion: Motion, weights: Mapping[str, Tensor]
    ) -> list[Held]:
        """The saved state under the model's names.

        Args:
            saved: what `optimizer.state_dict()` gave.
            model: the model that it trained.
            motion: what is going to move; the state of other parameters may stay nameless.
            weights: the stored weights by canonical name.

        Raises:
            CheckpointError: nothing proves whose state it is.
        """
        if names_in(saved, model) is not None:
            held = held_in(saved, model, SHAPED)
        elif self.optimizers:
            held = held_in(saved, model, SHAPED, self._names(saved, model))
        else:
            held = held_in(saved, model, SHAPED)
            if self.order == "checked":
                _refuse_unproven(held, model, motion)
            _refuse_contradicted(held, motion, weights)
        return [replace(h, parameter=weights[h.name]) if h.parameter.is_meta else h for h in held]

    def _names(self, saved: Mapping[str, Any], model: nn.Module) -> list[str]:
        """The names that the living optimisers of the same groups and shapes give; all such must agree."""
        sizes = [len(g["params"]) for g in saved["param_groups"]]
        found = {
            tuple(h.name for h in held_by(o, tensors_of(model)))
            for o in self.optimizers
            if [len(g["params"]) for g in o.param_groups] == sizes
        }
        if len(found) != 1:
            raise CheckpointError(
                f"{'none' if not found else 'several'} of the optimisers given have its groups of {sizes} parameters: "
                "give those whose state it is, with the groups that they had when it was saved"
            )
        return list(next(iter(found)))


def _refuse_unproven(held: Sequence[Held], model: nn.Module, motion: Motion) -> None:
    """Raises CheckpointError where parameters that move, and have state, share their shape with others."""
    shapes = Counter(t.shape for t in tensors_of(model).values() if isinstance(t, nn.Parameter))
    moving = {h.parameter.shape for h in held if h.state and h.name in motion.by_parameter}
    doubtful = [
        (h.name, h.parameter.shape) for h in held if h.parameter.shape in moving and shapes[h.parameter.shape] > 1
    ]
    if doubtful:
        name, shape = doubtful[0]
        raise CheckpointError(
            f"the file keeps it by position alone, and {shapes[shape]} parameters have the shape {tuple(shape)} of "
            f"{name}, so that nothing proves the order. If the optimizer was built from model.parameters(), say "
            "state_order='parameters' (--state-order parameters); or give it: optimizer=; or save it with names: build "
            "it from model.named_parameters()"
        )


def _refuse_contradicted(held: Sequence[Held], motion: Motion, weights: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError where the momenta themselves say that the order is another one."""
    pair = exchanged(held, motion.symmetries, weights)
    if pair is not None:
        raise CheckpointError(
            f"the order of the optimizer's parameters is not that of the model: the momenta of {pair[0]} and {pair[1]} "
            "obey the symmetries only when they are exchanged. Give the optimizer: optimizer=; or save it with names: "
            "build it from model.named_parameters()"
        )
