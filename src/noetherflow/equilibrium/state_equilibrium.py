"""The joint noise equilibrium from an optimiser's state alone: where Adam's or SGD's own averages say it settles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from noetherflow.core.adaptive import AdamConfig
from noetherflow.core.rates import GroupRates
from noetherflow.core.settings import SGDConfig
from noetherflow.equilibrium.adaptive import adaptive_equilibrium
from noetherflow.equilibrium.averages import Averages, OptimizerAverages, read_averages
from noetherflow.equilibrium.result import Equilibrium
from noetherflow.equilibrium.state_invariance import refuse_broken, state_invariance
from noetherflow.equilibrium.task import SolveOptions
from noetherflow.moments.result import GradientMoments, Replicates
from noetherflow.symmetry.symmetry_set import SymmetrySet

MANY = 10**9
"""A number of minibatches so large that what is known of the noise counts as exact."""


def state_equilibrium(
    model: nn.Module, syms: SymmetrySet, optimizer: Any, options: SolveOptions, lr: float | None = None
) -> Equilibrium:
    """The noise equilibrium of all scalar and diagonal symmetries together, without data.

    Adam's average of squares is the second moment of the minibatch gradient, all that its potential needs. SGD's
    momentum buffer gives it too: `(1 + m) / (1 - m)` of its square, entry by entry, which scatters but is summed.

    Args:
        model: the model that the state belongs to; only read.
        syms: its trainable symmetries.
        optimizer: as in `state_flow`.
        options: as in `noise_equilibrium`; standard errors are not known.
        lr: learning rate to use in place of stored ones.

    Returns:
        The equilibrium; symmetries of which the state says nothing are excluded.

    Raises:
        DataError: another optimiser, no state, or one that is not of a loss with these symmetries.

    Source: theory.md section 13.
    """
    read = read_averages(model, optimizer, lr)
    lacking = {
        s.name: f"{name}: {read.left_out.get(name, 'not in the optimiser')}"
        for s in syms
        for name in s.parameters
        if name not in read.by_name
    }
    syms = syms.without(lacking)
    refuse_broken({s.name: state_invariance(s, (read,)) for s in syms}, read.law)
    found = adaptive_equilibrium(model, syms, _moments(read.by_name), _settings(read), replace(options, errors=False))
    source = "v" if read.law.kind != "sgd" else "one snapshot of the momentum buffer, which scatters"
    said = f"noise is read off {source}, the mean gradient's own persistence is not told from it"
    return replace(found, regime=None, assumptions=(*found.assumptions, said))


def _settings(read: OptimizerAverages) -> AdamConfig | SGDConfig:
    """Settings under which the moments below are those of the minibatch gradient; every parameter is a group."""
    law = read.law
    factor = 1 / (1 - law.memory) if law.kind == "sgd" else 1.0
    groups = tuple(GroupRates((n,), a.rates.lr, factor * a.rates.weight_decay) for n, a in read.by_name.items())
    lr = max(g.lr for g in groups)
    if law.kind == "sgd":
        return SGDConfig(lr, 1, groups=groups)
    betas = (law.memory, law.square_memory or 0.0)
    return AdamConfig(lr, 1, betas, eps=law.eps or 0.0, decoupled=law.decoupled, groups=groups)


def _moments(averages: Mapping[str, Averages]) -> GradientMoments:
    """Moments of minibatch gradients without a mean: their squares are the averages of squares."""
    squares = {n: _square(a) for n, a in averages.items()}
    zero = {n: torch.zeros_like(t) for n, t in squares.items()}
    return GradientMoments(MANY, 0.0, {}, zero, squares, replicates=Replicates(1, None, "independent"))


def _square(averages: Averages) -> Tensor:
    """The second moment of one parameter's minibatch gradient, float64."""
    if averages.square is not None:
        return averages.square.detach().double().cpu() / averages.square_total
    assert averages.mean is not None
    return averages.mean.detach().double().cpu().square() * averages.persistence
