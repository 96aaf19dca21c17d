"""What one minibatch gradient per recorded step already tells: noise drive, distance to equilibrium, rotation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from noetherflow.monitor.charge_map import ChargeMap
from noetherflow.monitor.rules import AdamRule, LedgerRule, SGDRule

Values = Mapping[str, np.ndarray]
SETTLED = math.exp(-1)


def orbit_forces(k_plus: np.ndarray, k_minus: np.ndarray, m_plus: np.ndarray, m_minus: np.ndarray) -> tuple[Any, Any]:
    """`(X, Y)` with `x = M_- + K_+`, `y = M_+ + K_-`: the pulls towards smaller and larger lam (theory.md section 5).

    Arguments already carry their factors per step: `eta^2` on gradient Grams, `eta (2w - eta w^2)` on weights.
    """
    return m_minus + k_plus, m_plus + k_minus


def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """`lam* = 1/4 log(Y/X)`; NaN where X or Y is not positive: there the equilibrium is at infinity."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((x > 0) & (y > 0), 0.25 * np.log(y / x), np.nan)


def relaxation_steps(
    norm_plus: np.ndarray, norm_minus: np.ndarray, x: np.ndarray, y: np.ndarray, remaining: float = SETTLED
) -> np.ndarray:
    """Steps until `|lam - lam*|` has shrunk to the fraction `remaining` of its present value, in expectation.

    With `q = e^(4 lam)` the expected flow `dC/dk = (Y - X q) / sqrt(q)`, `C = sqrt(q) K_+ - K_-/sqrt(q)`, separates:
    `dk/dq = (q K_+ + K_-) / (2 q (Y - X q))`, hence
    `k = 1/2 [(K_-/Y) log q - (K_+/X + K_-/Y) log|Y - X q|]` between `q = 1` and `(Y/X)^(1 - remaining)`.
    `norm_plus`, `norm_minus`: leg Grams of the weights. At the equilibrium itself: the limit of small distances.
    """
    lam = distance(x, y)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.exp(4 * lam)
        target = ratio ** (1 - remaining)
        left = (ratio - target) / (ratio - 1)
        slow = norm_plus / x + norm_minus / y
        steps = 0.5 * (norm_minus / y * np.log(target) - slow * np.log(left))
        limit = -0.5 * slow * math.log(remaining)
    return np.where(np.abs(lam) < 1e-6, limit, steps)


def angle(theta_theta: np.ndarray, theta_u: np.ndarray, u_u: np.ndarray) -> np.ndarray:
    """Angle between theta and `theta - u`, radians, from `<theta,theta>, <theta,u>, <u,u>`."""
    area = np.sqrt(np.maximum(theta_theta * u_u - theta_u**2, 0.0))
    return np.arctan2(area, theta_theta - theta_u)


def rotation_at_equilibrium(rule: LedgerRule, c: Mapping[str, float]) -> float:
    """Predicted angular update per step of a scale-invariant weight once its norm is stationary, radians.

    Heavy ball with dampening tau: `sqrt(2 lr (1 - tau) w / (1 + mu))`; Nesterov: `sqrt(2 lr w (1 - mu) ((1 + mu)^2 +
    mu^4 / (1 - mu^2)))`; AdamW: `sqrt(2 lr w (1 - beta1) / (1 + beta1))`; NaN for others. With uncorrelated gradients
    of second moment `G`: `|u|^2` of the stationary update over `|W|^2 = lr (1 - tau) G / (2 w (1 - mu))`.
    Source: Kosson, Messmer, Jaggi, *Rotational Equilibrium*, ICML 2024 (arXiv 2305.17212); for SGD also
    Wan et al., *Spherical Motion Dynamics*, 2021 (arXiv 2006.08419).
    """
    if isinstance(rule, SGDRule):
        mu, size = c["memory"], 2 * c["lr"] * c["fresh"] * c["weight_decay"]
        if c["heavy_ball"] or not mu:
            return math.sqrt(size / (1 + mu))
        return math.sqrt(size * (1 - mu) * ((1 + mu) ** 2 + mu**4 / (1 - mu**2)))
    if isinstance(rule, AdamRule) and not c["coupled"]:
        return math.sqrt(2 * c["lr"] * c["decoupled"] * (1 - c["beta1"]) / (1 + c["beta1"]))
    return math.nan


@dataclass
class Estimator:
    """Running noise drive (an exponential average of the minibatch gradients' leg Grams) and what follows from it.

    `layout` has detail `block`: one value per coordinate of a torus and per block of a general_linear symmetry (there
    the estimate is for the scalar subgroup). The average forgets as `memory^n` and is corrected for its start.
    """

    layout: ChargeMap
    rule: LedgerRule
    memory: float = 0.9
    mean: np.ndarray | None = None
    weight: float = 0.0

    def update(self, gradient_squares: np.ndarray) -> np.ndarray:
        """Fold in `<g, g>` `[n_values]`; the running mean."""
        old = np.zeros_like(gradient_squares) if self.mean is None else self.mean
        self.mean = self.memory * old + (1 - self.memory) * gradient_squares
        self.weight = self.memory * self.weight + (1 - self.memory)
        return self.mean / self.weight

    def rows(self, values: Values, c: Values, step_size: np.ndarray) -> dict[str, np.ndarray]:
        """Columns `[n_symmetries]` from one step's `tt`, `tg`, `gg` `[n_values]` and coefficients.

        `drive`: `sum_legs sign M` (running); `check`: largest `|theta^T A g| / (|theta| |g|)`, zero for an exact
        symmetry; `distance`, `distance_max`: median and largest `|lam*|` over coordinates; `steps`: median relaxation
        steps; `at_infinity`: share of coordinates without a finite equilibrium. `step_size` `[n_symmetries]` is
        `u^T A u`, for one-sided symmetries the growth of the squared norm per step.
        """
        layout = self.layout
        m = self.update(values["gg"])
        tt = values["tt"]
        out = {
            "charge": layout.totals_matrix @ (layout.matrix @ tt),
            "norm": layout.totals_matrix @ (layout.absolute @ tt),
            "drive": layout.totals_matrix @ (layout.matrix @ m),
            "check": self._largest(self._violation(values)),
        }
        growth = np.divide(step_size, out["norm"], out=np.full_like(step_size, np.nan), where=out["norm"] > 0)
        out["growth"] = growth
        if self.rule.has_equilibrium:
            out |= self._equilibrium(tt, m, c)
        return out

    def _violation(self, values: Values) -> np.ndarray:
        broken = np.abs(self.layout.matrix @ values["tg"])
        size = np.sqrt((self.layout.absolute @ values["tt"]) * (self.layout.absolute @ values["gg"]))
        return np.divide(broken, size, out=np.zeros_like(size), where=size > 0)

    def _equilibrium(self, tt: np.ndarray, m: np.ndarray, c: Values) -> dict[str, np.ndarray]:
        layout = self.layout
        eta = c["lr"] * c["fresh"] / (1 - c["memory"])
        decay = eta * c["weight_decay"] * (2 - c["lr"] * c["weight_decay"])
        k_plus, k_minus = (side @ tt for side in (layout.plus, layout.minus))
        pull = [side @ (decay * tt) for side in (layout.plus, layout.minus)]
        push = [side @ (eta**2 * m) for side in (layout.plus, layout.minus)]
        x, y = orbit_forces(*pull, *push)
        lam = np.abs(distance(x, y))
        steps = relaxation_steps(k_plus, k_minus, x, y)
        return {
            "distance": self._median(lam),
            "distance_max": self._largest(lam),
            "steps": self._median(steps),
            "at_infinity": self._over(np.isnan(lam).astype(float), np.mean),
        }

    def _over(self, outputs: np.ndarray, summary: Any) -> np.ndarray:
        return np.array([summary(outputs[start:stop]) for start, stop in self.layout.spans])

    def _finite(self, outputs: np.ndarray, summary: Any) -> np.ndarray:
        return self._over(outputs, lambda x: summary(x[np.isfinite(x)]) if np.isfinite(x).any() else np.nan)

    def _median(self, outputs: np.ndarray) -> np.ndarray:
        return self._finite(outputs, np.median)

    def _largest(self, outputs: np.ndarray) -> np.ndarray:
        return self._finite(outputs, np.max)


def rotation_rows(
    layout: ChargeMap, rule: LedgerRule, row: Mapping[str, np.ndarray], settings: list[dict[str, float]]
) -> dict[str, np.ndarray]:
    """`angular`, `angular_predicted` (radians), `effective_lr = lr / |W|^LedgerRule.lr_power`; NaN unless one-sided."""
    place = {name: i for i, name in enumerate(layout.parameters)}
    columns = ("angular", "angular_predicted", "effective_lr")
    out = {name: np.full(len(layout.symmetries), np.nan) for name in columns}
    theta_u = -0.5 * (row["change"] - row["residual"] - row["second_order"])
    for i, s in enumerate(layout.symmetries):
        if not s.one_sided or row["norm"][i] <= 0:
            continue
        c = settings[place[s.parameters[0]]]
        sign = s.weight_legs[0].sign
        out["angular"][i] = angle(row["norm"][i], sign * theta_u[i], sign * row["second_order"][i])
        out["angular_predicted"][i] = rotation_at_equilibrium(rule, c) if c["lr"] else np.nan
        out["effective_lr"][i] = c["lr"] / row["norm"][i] ** (rule.lr_power / 2)
    return out
