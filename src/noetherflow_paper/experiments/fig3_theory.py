"""Where theory has figure 3's runs: the Noether flow with the weights' fluctuation around the orbit, from the start."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import NamedTuple

import torch

from noetherflow.core.settings import SGDConfig
from noetherflow_paper.experiments.fig3_runs import Fig3Config, Fig3Point, Phase, covariances
from noetherflow_paper.fluctuations import AlignedNet

STRIDES = 160
"""Of the midpoint rule in each phase."""


class Balance(NamedTuple):
    """`||U||^2 / ||W||^2` and the trace of the Hessian (halved loss)."""

    ratio: float
    trace: float


@functools.cache
def predicted(config: Fig3Config, point: Fig3Point, phi: float) -> Balance:
    """Both in the middle of the steps that are averaged, of a run of SGD that starts on the diagonal.

    All matrices by their diagonals, `V = I`; the phases of `point` go first.
    """
    if point.run is None:
        raise ValueError(f"the point {point.name!r} trains nothing")
    sigma_x, sigma_eps = (m[0].diagonal() for m in covariances(replace(point, phis=(phi,)), config.d))
    one, scale = torch.ones_like(sigma_x), config.loss_scale
    u, w = (one, one) if point.start == "balanced" else (sigma_x**0.25, sigma_x**-0.25)
    charges = w.square() - u.square()
    for factor, steps in (*point.before, Phase(1, point.run.steps * 7 // 8)):
        sgd = SGDConfig(scale * factor * point.run.lr, point.run.batch, factor * point.decay / scale)
        net = AlignedNet(one, sigma_x, sigma_eps, sgd)
        charges, u, w = net.moved(charges, u, w, steps, STRIDES)
    norm_u, norm_w = net.squares(u, w)
    return Balance(float(norm_u / norm_w), float(net.hessian_trace(u, w)))
