"""A stabilised explicit Runge-Kutta-Chebyshev method of order 2, for stiff dissipative flows too large for a Jacobian.

Sommeijer, Shampine and Verwer, "RKC: an explicit solver for parabolic PDEs", J. Comput. Appl. Math. 88 (1998): `s`
stages are stable for `h rho <= 0.65 s^2` on the negative real axis, where a plain explicit method of `s` stages reaches
about `s`. Memory is a few states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

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

    Raises ArithmeticError where the velocity at the start is not finite, where no step is short enough, or after
    EVALUATIONS evaluations.
    """
    counted = _Counted(velocity)
    now, y, slope = 0.0, start, counted(start)
    if not np.isfinite(slope).all():
        raise ArithmeticError("orbit ODE: the rate of change at the start is not a finite number")
    radius, direction = _spectral_radius(counted, y, slope, slope)
    h, taken, found = 0.1 / (radius + _rms(slope, atol + rtol * np.abs(y)) + 1e-300), 0, []
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
    """The velocity, up to EVALUATIONS times."""

    def __init__(self, velocity: Velocity) -> None:
        self.velocity, self.left = velocity, EVALUATIONS

    def __call__(self, y: np.ndarray) -> np.ndarray:
        self.left -= 1
        if self.left < 0:
            raise ArithmeticError(f"orbit ODE: not done after {EVALUATIONS:,} evaluations; forecast fewer steps")
        with np.errstate(all="ignore"):
            return self.velocity(y)


def _rms(error: np.ndarray, scale: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(error / scale)))) if error.size else 0.0


def _step(velocity: Velocity, y: np.ndarray, slope: np.ndarray, h: float, stages: int) -> np.ndarray:
    """One step of length h with the Chebyshev recursion `T_j = 2 w T_(j-1) - T_(j-2)` and its two derivatives."""
    s = max(2, stages)
    w0 = 1 + 2 / (13 * s**2)
    root = math.sqrt(w0**2 - 1)
    angle = s * math.log(w0 + root)
    w1 = math.sinh(angle) * root**2 / (math.cosh(angle) * s * root - w0 * math.sinh(angle))
    b_before = b = 1 / (2 * w0) ** 2
    before, current = y, y + h * w1 * b * slope
    (t_before, t), (d_before, d), (c_before, c) = (1.0, w0), (0.0, 1.0), (0.0, 0.0)
    for _ in range(2, s + 1):
        a = 1 - t * b
        t_before, t, d_before, d, c_before, c = (
            t,
            2 * w0 * t - t_before,
            d,
            2 * w0 * d - d_before + 2 * t,
            c,
            2 * w0 * c - c_before + 4 * d,
        )
        b_before, b, b_last = b, c / d**2, b_before
        mu, nu, gain = 2 * w0 * b / b_before, -b / b_last, 2 * w1 * b / b_before
        before, current = (
            current,
            (mu * current + nu * before + (1 - mu - nu) * y + h * gain * (velocity(current) - a * slope)),
        )
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
