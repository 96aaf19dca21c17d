"""What one minibatch gradient and the momentum buffer tell: noise drive, distance to equilibrium, rotation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from noetherflow.monitor.charge_map import ChargeMap
from noetherflow.monitor.head_rows import HeadMap
from noetherflow.monitor.measure import StepTable
from noetherflow.monitor.rule import AnyRule, StepSettings

HEAD = "head."
"""What the names of columns begin with that have a number per attention head."""
SETTLED = math.exp(-1)
TOLD_APART = 0.8
"""How well noise and mean gradient must be told apart in a momentum buffer, relative to a filled one."""


def orbit_forces(k_plus: np.ndarray, k_minus: np.ndarray, m_plus: np.ndarray, m_minus: np.ndarray) -> tuple[Any, Any]:
    """`(X, Y)` with `x = M_- + K_+`, `y = M_+ + K_-`: the pulls towards smaller and larger lam (theory.md section 5).

    Arguments already carry their factors per step: noise and mean rate on gradient Grams, the decay rate on weights.
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


@dataclass(frozen=True, eq=False)
class LegSquares:
    """Of one step, on the leg values `[n_values]`: products of weight `w`, gradient `g` and momentum buffer `b`.

    The buffer is the one before the step; its products are zero while it is empty, and for optimisers without one.
    """

    weight_square: np.ndarray
    weight_gradient: np.ndarray
    gradient_square: np.ndarray
    weight_memory: np.ndarray
    memory_square: np.ndarray


@dataclass(frozen=True, eq=False)
class LegRoots:
    """Of one step, on the leg values `[n_values]`, by an optimiser that keeps average squares `s^2` of gradients.

    `noise`: sums of `s^2 / d`, `d` the divisor of its step (`s + eps`); `scaled`: of `d theta^2`; `held`: of `m^2 / d`,
    m the average gradient; `entries`: their number, zero while nothing is known.
    """

    noise: np.ndarray
    scaled: np.ndarray
    held: np.ndarray
    entries: np.ndarray


@dataclass
class RunningMean:
    """An exponential average per number, corrected for its start; numbers that are NaN are left out of it."""

    total: np.ndarray | None = None
    weight: np.ndarray | None = None

    def update(self, values: np.ndarray, keep: float) -> np.ndarray:
        """Fold in `[n]` numbers, of the old ones keep that share; the mean so far, NaN where none was known yet."""
        if self.total is None or self.weight is None:
            self.total, self.weight = np.zeros_like(values), np.zeros_like(values)
        known = np.isfinite(values)
        added = (1 - keep) * np.where(known, values, 0.0)
        self.total = np.where(known, keep * self.total + added, self.total)
        self.weight = np.where(known, keep * self.weight + 1 - keep, self.weight)
        return self.mean(values.size)

    def mean(self, n: int) -> np.ndarray:
        """The mean of the `[n]` numbers so far, NaN where none was known yet."""
        if self.total is None or self.weight is None:
            return np.full(n, np.nan)
        return np.divide(self.total, self.weight, out=np.full_like(self.total, np.nan), where=self.weight > 0)


@dataclass
class Estimator:
    """Running averages of the minibatch gradients' leg Grams, and what follows from them.

    `layout` has detail `block`: one value per coordinate of a torus and per block of a general_linear symmetry (there
    the estimate is for the scalar subgroup). `memory` is what the averages keep from one estimate to the next.

    One minibatch gradient is noise and mean gradient together. Without momentum both move a charge alike. Momentum
    counts the mean gradient more, since it is the same from step to step; how much of it there is shows in the momentum
    buffer, in which noise adds up in squares and the mean gradient as it is. Until the buffer tells them apart nearly
    as well as a filled one (`TOLD_APART`, about `2 / (1 - m)` steps), and for optimisers without one, `mean_share` is
    NaN and all is taken as noise.
    """

    layout: ChargeMap
    rule: AnyRule
    memory: float = 0.9
    gradient: RunningMean = field(default_factory=RunningMean)
    persistent: RunningMean = field(default_factory=RunningMean)
    begun: np.ndarray = field(init=False)
    heads: HeadMap = field(init=False)

    def __post_init__(self) -> None:
        self.heads = HeadMap.of(self.layout)
        self.begun = np.full(self.layout.n_values, -np.inf)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averages as tensors, for a checkpoint."""
        arrays = {"begun": self.begun}
        for name, mean in (("gradient", self.gradient), ("persistent", self.persistent)):
            if mean.total is not None and mean.weight is not None:
                arrays |= {f"{name}_total": mean.total, f"{name}_weight": mean.weight}
        return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on with saved averages; without them they begin anew, and a momentum buffer is taken as filled."""
        arrays = {name: tensor.numpy().copy() for name, tensor in state.items()}
        self.begun = arrays.get("begun", np.full(self.layout.n_values, -np.inf))
        self.gradient = RunningMean(arrays.get("gradient_total"), arrays.get("gradient_weight"))
        self.persistent = RunningMean(arrays.get("persistent_total"), arrays.get("persistent_weight"))

    def rows(
        self, step: int, q: LegSquares, c: StepSettings, step_size: np.ndarray, matrix_charges: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Columns `[n_symmetries]` from one step's products and settings `[n_values]`.

        `charge`: the norm of the charges over coordinates, as in `Flow`; `charge_sum`: their signed sum. `drive`:
        `sum_legs sign M` (running); `check`: largest `|theta^T A g| / (|theta| |g|)`, zero for an exact symmetry;
        `distance`, `distance_max`: median and largest `|lam*|` over coordinates; `steps`: median relaxation steps;
        `at_infinity`: share of coordinates without a finite equilibrium; `mean_share`: share of the mean gradient in
        `E[g^2]`. `step_size` `[n_symmetries]` is `u^T A u`, for one-sided symmetries the growth of the squared norm per
        step; `matrix_charges` `[n_symmetries]` the Frobenius norm of charges that are matrices, else NaN.

        Beside these, names that begin with `head.` are columns `[heads]` (`head_rows.COLUMNS`).
        """
        self.gradient.update(q.gradient_square, self.memory)
        self.persistent.update(self._mean_square(step, q, c), self.memory)
        out = self.weight_rows(q.weight_square, c, matrix_charges)
        norm = out["norm"]
        out["check"] = self._largest(self._violation(q))
        out["growth"] = np.divide(step_size, norm, out=np.full_like(step_size, np.nan), where=norm > 0)
        return out

    def weight_rows(
        self, weight_square: np.ndarray, c: StepSettings, matrix_charges: np.ndarray
    ) -> dict[str, np.ndarray]:
        """The same columns from the weights `[n_values]` and the averages so far, at the end of a run.

        `check` and `growth` need the gradient of a step that is under way, and are NaN.
        """
        layout, n = self.layout, self.layout.n_values
        second, mean = self.gradient.mean(n), self.persistent.mean(n)
        charges = layout.matrix @ weight_square
        out = {
            "charge": np.where(np.isnan(matrix_charges), self._over(charges, np.linalg.norm), matrix_charges),
            "charge_sum": layout.totals_matrix @ charges,
            "norm": layout.totals_matrix @ (layout.absolute @ weight_square),
            "drive": layout.totals_matrix @ (layout.matrix @ second),
            f"{HEAD}charge": self.heads.sums(charges),
            f"{HEAD}norm": self.heads.sums(layout.absolute @ weight_square),
            "check": np.full(len(layout.symmetries), np.nan),
            "growth": np.full(len(layout.symmetries), np.nan),
        }
        if self.rule.has_equilibrium:
            out |= self._equilibrium(weight_square, second, mean, c)
        return out

    def _violation(self, q: LegSquares) -> np.ndarray:
        broken = np.abs(self.layout.matrix @ q.weight_gradient)
        size = np.sqrt((self.layout.absolute @ q.weight_square) * (self.layout.absolute @ q.gradient_square))
        return np.divide(broken, size, out=np.zeros_like(size), where=size > 0)

    def _mean_square(self, step: int, q: LegSquares, c: StepSettings) -> np.ndarray:
        """The mean gradient's square: what the buffer holds beyond the noise, NaN where the two cannot be told apart.

        A buffer that holds past gradients with weights of sum `s1` and sum of squares `s2` has the square
        `s2 (noise) + s1^2 (mean)`, and one gradient has `noise + mean`. Weight decay's part `s1 w theta` is taken off.
        """
        self.begun = np.where(q.memory_square == 0, step, self.begun)
        sums = self.rule.memory_sums(c, step - self.begun)
        if sums is None:
            return np.full_like(q.weight_square, np.nan)
        decay = sums.total * sums.decay
        own = q.memory_square - 2 * decay * q.weight_memory + decay**2 * q.weight_square
        filled = self.rule.memory_sums(c, np.full_like(q.weight_square, np.inf)) or sums
        gap, whole = sums.total**2 - sums.squares, filled.total**2 - filled.squares
        known = (gap > 0) & (gap * filled.squares >= TOLD_APART * whole * sums.squares)
        return np.divide(own - sums.squares * q.gradient_square, gap, out=np.full_like(own, np.nan), where=known)

    def _equilibrium(
        self, weight_square: np.ndarray, second: np.ndarray, mean: np.ndarray, c: StepSettings
    ) -> dict[str, np.ndarray]:
        layout, rates = self.layout, self.rule.drift(c)
        assert rates is not None
        k_plus, k_minus = (side @ weight_square for side in (layout.plus, layout.minus))
        drive = np.maximum(rates.noise * second + (rates.mean - rates.noise) * np.nan_to_num(mean), 0.0)
        pull = [side @ (rates.decay * weight_square) for side in (layout.plus, layout.minus)]
        push = [side @ drive for side in (layout.plus, layout.minus)]
        x, y = orbit_forces(pull[0], pull[1], push[0], push[1])
        signed = distance(x, y)
        lam = np.abs(signed)
        total, shared = (layout.totals_matrix @ (layout.absolute @ v) for v in (second, mean))
        return {
            "distance": self._median(lam),
            "distance_max": self._largest(lam),
            f"{HEAD}distance": self.heads.means(signed),
            "steps": self._median(relaxation_steps(k_plus, k_minus, x, y)),
            "at_infinity": self._over(np.isnan(lam).astype(float), np.mean),
            "mean_share": np.divide(shared, total, out=np.full_like(total, np.nan), where=total > 0),
        }

    def root_rows(self, q: LegRoots, c: StepSettings) -> dict[str, np.ndarray]:
        """The same columns where the charge is the preconditioned one, with `persistence` in place of `mean_share`.

        Along the orbit `s` goes as `e^-lam` and `s theta^2` as `e^lam` on + legs, half the exponents of SGD's squares,
        so that `lam* = 1/2 log(Y/X)` and `dlam/dk = lr/2 (Y - X q) / (q B_+ + B_-)`, `q = e^(2 lam)`. `persistence` is
        the growth of the charge by the average gradient over that by uncorrelated gradients: 1 for pure noise. What eps
        does not scale along the orbit, and that the squares lag behind it, is left out (theory.md section 13).
        """
        layout, rates = self.layout, self.rule.root_rates(c)
        assert rates is not None
        unknown = layout.absolute @ (q.entries == 0) > 0
        speed = np.divide(q.scaled, rates.lr, out=np.zeros_like(q.scaled), where=rates.lr > 0)
        pull = rates.weight_decay * (2 - rates.lr * rates.weight_decay) * q.scaled
        k_plus, k_minus = (side @ speed for side in (layout.plus, layout.minus))
        pulls = [side @ pull for side in (layout.plus, layout.minus)]
        pushes = [side @ (rates.lr * q.noise) for side in (layout.plus, layout.minus)]
        x, y = orbit_forces(pulls[0], pulls[1], pushes[0], pushes[1])
        x, y = np.where(unknown, np.nan, x), np.where(unknown, np.nan, y)
        signed = 2 * distance(x, y)
        lam = np.abs(signed)
        held, white = (layout.totals_matrix @ (layout.absolute @ v) for v in (rates.persistence * q.held, q.noise))
        return {
            "distance": self._median(lam),
            "distance_max": self._largest(lam),
            f"{HEAD}distance": self.heads.means(signed),
            "steps": self._median(relaxation_steps(k_plus, k_minus, x / 2, y / 2)),
            "at_infinity": self._over(np.where(np.isnan(x + y), np.nan, np.isnan(lam)), np.mean),
            "persistence": np.divide(held, white, out=np.full_like(white, np.nan), where=white > 0),
        }

    def spread(self, q: LegRoots, weight_square: np.ndarray) -> np.ndarray:
        """What noise that is not the same in all entries does to the predicted rotation, a factor `[n_symmetries]`.

        At the equilibrium `sum s theta^2 / sum s = lr / (2 w)`: then `|W|^2` is `n lr / (2 w)` over the square of this.
        """
        sums = [self.layout.totals_matrix @ (self.layout.absolute @ v) for v in (q.entries, q.scaled, q.noise)]
        own = sums[2] * (self.layout.totals_matrix @ (self.layout.absolute @ weight_square))
        return np.sqrt(np.divide(sums[0] * sums[1], own, out=np.full_like(own, np.nan), where=own > 0))

    def _over(self, outputs: np.ndarray, summary: Callable[[np.ndarray], Any]) -> np.ndarray:
        return np.array([summary(outputs[start:stop]) for start, stop in self.layout.spans])

    def _finite(self, outputs: np.ndarray, summary: Callable[[np.ndarray], Any]) -> np.ndarray:
        return self._over(outputs, lambda x: summary(x[np.isfinite(x)]) if np.isfinite(x).any() else np.nan)

    def _median(self, outputs: np.ndarray) -> np.ndarray:
        return self._finite(outputs, np.median)

    def _largest(self, outputs: np.ndarray) -> np.ndarray:
        return self._finite(outputs, np.max)


def rotation_rows(
    layout: ChargeMap, rule: AnyRule, row: Mapping[str, np.ndarray], settings: StepTable
) -> dict[str, np.ndarray]:
    """`angular`, `angular_predicted` (radians), `effective_lr = lr / |W|^lr_power`; NaN unless one-sided."""
    place = {name: i for i, name in enumerate(layout.parameters)}
    columns = ("angular", "angular_predicted", "effective_lr")
    out = {name: np.full(len(layout.symmetries), np.nan) for name in columns}
    theta_u = -0.5 * (row["change"] - row["residual"] - row["second_order"])
    for i, s in enumerate(layout.symmetries):
        if not s.one_sided or row["norm"][i] <= 0:
            continue
        c = settings.of(place[s.parameters[0]])
        sign = s.weight_legs[0].sign
        out["angular"][i] = angle(row["norm"][i], sign * theta_u[i], sign * row["second_order"][i])
        out["angular_predicted"][i] = rule.rotation(c) if c.lr else np.nan
        out["effective_lr"][i] = c.lr / row["norm"][i] ** (rule.lr_power / 2)
    return out
