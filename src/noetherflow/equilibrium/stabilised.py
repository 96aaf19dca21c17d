"""A stabilised explicit Runge-Kutta-Chebyshev method of order 2, for stiff dissipative flows too large for a Jacobian.

Sommeijer, Shampine and Verwer, "RKC: an explicit solver for parabolic PDEs", J. Comput. Appl. Math. 88 (1998): `s`
stages are stable for `h rho <= 0.65 s^2` on the negative real axis, where a plain explicit method of `s` stages reaches
about `s`. Memory is a few states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


class Unfinished(ArithmeticError):
    """The evaluations allowed are used up; `found`: the states reached by then."""

    def __init__(self, message: str, found: list[np.ndarray]) -> None:
        super().__init__(message)
        self.found = found


Velocity = Callable[[np.ndarray], np.ndarray]
STAGES = 2000
"""Most stages of one step, whose rounding grows as their square; beyond, the step is shortened."""
REFRESH = 25
"""Steps after which the spectral radius is estimated again."""
EVALUATIONS = 100_000


def integrate(
    velocity: Velocity, start: np.ndarray, times: Sequence[float], rtol: float, atol: np.ndarray
) -> list[np.ndarray]:
    """States at the increasing `times` of `dy/dt = velocity(y)`, `y(0) = start`, local error within `atol + rtol |y|`.

    The eigenvalues of the Jacobian should be near the negative real axis, as those of a flow down a convex function.

    Raises ArithmeticError where the velocity at the start is not finite or where no step is short enough, Unfinished
    after EVALUATIONS evaluations.
    """
    found: list[np.ndarray] = []
    counted = _Counted(velocity, found)
    now, y, slope = 0.0, start, counted(start)
    if not np.isfinite(slope).all():
        raise ArithmeticError("orbit ODE: the rate of change at the start is not a finite number")
    radius, direction = _spectral_radius(counted, y, slope, slope)
    h, taken = 0.1 / (radius + _rms(slope, atol + rtol * np.abs(y)) + 1e-300), 0
    for target in times:
        while now < target:
            if taken == REFRESH:
                (radius, direction), taken = _spectral_radius(counted, y, slope, direction), 0
            longest = (STAGES**2 - 1) / (1.54 * radius) if radius > 0 else math.inf
            count = math.ceil((target - now) / min(h, longest))
            step = (target - now) / count
            following = _step(counted, y, slope, step, 1 + math.isqrt(int(1 + 1.54 * step * radius)))
            after = counted(following)
            scale = atol + rtol * np.maximum(np.abs(y), np.abs(following))
            error = _rms(0.8 * (y - following) + 0.4 * step * (slope + after), scale)
            if not math.isfinite(error) or error > 1:
                h = step * (max(0.2, 0.8 / error ** (1 / 3)) if math.isfinite(error) else 0.1)
                taken = REFRESH
                if now + h <= now:
                    raise ArithmeticError(f"orbit ODE: no step is short enough at step {now:.6g}; forecast fewer steps")
                continue
            now = target if count == 1 else now + step
            y, slope, taken = following, after, taken + 1
            h = step * min(5.0, 0.8 / max(error, 1e-9) ** (1 / 3))
        found.append(y)
    return found


class _Counted:
    """The velocity, up to EVALUATIONS times; `found`: the states reached, for the error after that."""

    def __init__(self, velocity: Velocity, found: list[np.ndarray]) -> None:
        self.velocity, self.left, self.found = velocity, EVALUATIONS, found

    def __call__(self, y: np.ndarray) -> np.ndarray:
        self.left -= 1
        if self.left < 0:
            raise Unfinished(f"orbit ODE: not done after {EVALUATIONS:,} evaluations; forecast fewer steps", self.found)
        with np.errstate(all="ignore"):
            return self.velocity(y)


def _rms(error: np.ndarray, scale: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(error / scale)))) if error.size else 0.0


@dataclass(frozen=True)
class _Chebyshev:
    """The Chebyshev polynomial `T_j` and its first and second derivative at one point."""

    value: float
    first: float
    second: float

    def following(self, before: _Chebyshev, at: float) -> _Chebyshev:
        """`T_(j+1) = 2 w T_j - T_(j-1)` and the derivatives of this at `w = at`, from `T_j` (self) and `T_(j-1)`."""
        return _Chebyshev(
            2 * at * self.value - before.value,
            2 * at * self.first - before.first + 2 * self.value,
            2 * at * self.second - before.second + 4 * self.first,
        )


@dataclass(frozen=True)
class _Stage:
    """The coefficients of stage j in the source's symbols: `mu`, `nu`, `mu~` (`fresh`) and `gamma~` (`start`)."""

    mu: float
    nu: float
    fresh: float
    start: float


def _stages(s: int) -> tuple[float, list[_Stage]]:
    """`mu~_1` and the coefficients of stages `2..s`.

    With `w0 = 1 + 2 / (13 s^2)` (the damping), `w1 = T'_s(w0) / T''_s(w0)`, `b_j = T''_j(w0) / T'_j(w0)^2` and
    `b_0 = b_1 = b_2`: `mu~_1 = b_1 w1`, `mu_j = 2 b_j w0 / b_(j-1)`, `nu_j = -b_j / b_(j-2)`, `mu~_j = 2 b_j w1 /
    b_(j-1)`, `gamma~_j = -(1 - b_(j-1) T_(j-1)(w0)) mu~_j`.
    """
    w0 = 1 + 2 / (13 * s**2)
    root = math.sqrt(w0**2 - 1)
    angle = s * math.log(w0 + root)
    w1 = math.sinh(angle) * root**2 / (math.cosh(angle) * s * root - w0 * math.sinh(angle))
    earlier, now = _Chebyshev(1.0, 0.0, 0.0), _Chebyshev(w0, 1.0, 0.0)
    b = [1 / (2 * w0) ** 2] * 2
    stages = []
    for _ in range(2, s + 1):
        damped = 1 - now.value * b[-1]
        earlier, now = now, now.following(earlier, w0)
        b.append(now.second / now.first**2)
        fresh = 2 * w1 * b[-1] / b[-2]
        stages.append(_Stage(2 * w0 * b[-1] / b[-2], -b[-1] / b[-3], fresh, -damped * fresh))
    return b[0] * w1, stages


def _step(velocity: Velocity, y: np.ndarray, slope: np.ndarray, h: float, stages: int) -> np.ndarray:
    """One step of length h with at least two stages, from `y` and its rate of change `slope`.

    `W_0 = y`, `W_1 = W_0 + mu~_1 h F_0` and `W_j = (1 - mu_j - nu_j) W_0 + mu_j W_(j-1) + nu_j W_(j-2) + mu~_j h
    F_(j-1) + gamma~_j h F_0` with `F_j` the velocity at `W_j`; the result is the last `W`.

    Source: Sommeijer, Shampine and Verwer (1998), section 2, the recursion of the integration formula.
    """
    first, rest = _stages(max(2, stages))
    before, current = y, y + h * first * slope
    for stage in rest:
        moved = h * (stage.fresh * velocity(current) + stage.start * slope)
        kept = stage.mu * current + stage.nu * before + (1 - stage.mu - stage.nu) * y
        before, current = current, kept + moved
    return current


def _spectral_radius(
    velocity: Velocity, y: np.ndarray, slope: np.ndarray, direction: np.ndarray
) -> tuple[float, np.ndarray]:
    """A bound on the Jacobian's largest eigenvalue by the power method on differences of the velocity, and where to
    go on next time.
    """
    length = float(np.linalg.norm(direction))
    if length == 0:
        direction, length = np.ones_like(y), math.sqrt(max(1, y.size))
    size = math.sqrt(np.finfo(float).eps) * max(1.0, float(np.linalg.norm(y)))
    radius = 0.0
    for _ in range(50):
        change = velocity(y + direction * (size / length)) - slope
        if not np.isfinite(change).all():
            break
        direction, length = change, float(np.linalg.norm(change))
        radius, last = length / size, radius
        if length == 0 or abs(radius - last) <= 0.01 * radius:
            break
    return 1.2 * radius, direction
