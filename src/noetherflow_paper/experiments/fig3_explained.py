"""What figure 3's runs are by a theory that its claims were not judged by: with the weights' fluctuation throughout."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from noetherflow.core.settings import SGDConfig
from noetherflow_paper import closed_form as cf
from noetherflow_paper.experiments.fig3_runs import Fig3Config, Schedule
from noetherflow_paper.fluctuations import AlignedNet

STRIDES = 160
"""Of the midpoint rule in each phase."""
IN_THE_PHASES = (
    "The weights' fluctuation around the orbit counts in the phases at larger rates, too, and relaxes no faster than "
    "the flow; the theory of this claim has it at the last rate alone. Integrated with it throughout "
    "(fluctuations.py; looked at after the run) theory is {theory:.6g} at this rate, "
    "measured {found:.6g}."
)
DECAYED = (
    "With decay the phase at larger rates leaves a part of first order in eta, its fluctuation around the orbit, which "
    "no theory here has together with decay and which a limit in eta^2 does not take out."
)


def told(theory: float, measured: np.ndarray) -> str:
    """The sentence on one claim."""
    return IN_THE_PHASES.format(theory=theory, found=float(measured.mean()))


def _squares(
    sigma_x: Tensor, sigma_eps: Tensor, u: Tensor, w: Tensor, phases: Sequence[tuple[SGDConfig, int]]
) -> Tensor:
    """Means of `||U||^2` and `||W||^2` after the phases; all matrices by their diagonals, `V = I`."""
    charges, one = w.square() - u.square(), torch.ones_like(sigma_x)
    for sgd, steps in phases:
        net = AlignedNet(one, sigma_x, sigma_eps, sgd)
        charges, u, w = net.moved(charges, u, w, steps, STRIDES)
    return torch.stack(net.squares(u, w))


def _sgd(config: Fig3Config, run: Schedule, factor: float = 1.0) -> SGDConfig:
    return SGDConfig(config.loss_scale * factor * run.lr, run.batch)


def swept(config: Fig3Config, phi: float, labels: bool) -> tuple[float, float]:
    """`(||U||^2/||W||^2, Tr H)` of the sweep over the inputs' or the `labels`' phi without decay, from norm balance, in
    the middle of the steps that are averaged. Tr H is that of isotropic inputs.
    """
    varied = cf.identity_covariance(phi, config.d).diagonal()
    one = torch.ones_like(varied)
    phases = [(_sgd(config, config.main, p.factor), p.steps) for p in config.before_noise]
    phases.append((_sgd(config, config.main), config.main.steps * 7 // 8))
    squares = _squares(*((one, varied) if labels else (varied, one)), one, one, phases)
    return float(squares[0] / squares[1]), float(config.d * squares.sum())


def from_equilibrium(config: Fig3Config, run: Schedule) -> float:
    """`1 - ratio / sqrt(phi (2 - phi))` of a run that starts at the equilibrium of eta -> 0."""
    x = cf.identity_covariance(config.phi, config.d).diagonal()
    squares = _squares(x, torch.ones_like(x), x**0.25, x**-0.25, [(_sgd(config, run), run.steps * 7 // 8)])
    return 1 - float(squares[0] / squares[1]) / cf.identity_norm_ratio(config.phi)
