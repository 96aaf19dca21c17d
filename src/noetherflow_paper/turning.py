"""The slow flow of SGD along the orbits of a deep linear net, hidden rotations included.

The charge of a rotation is zero, so that no drift of a charge says whether SGD turns the hidden units' frame. It does
where the noise and the Hessian do not commute. The charges keep their frame while the units turn, so that the point
where every charge's drift is zero is not at rest there: SGD ends where drift and turning balance.

Source: theory.md section 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from noetherflow_paper import closed_form as cf
from noetherflow_paper.simulate import Params


def independent_noise(sigma_x: Tensor, sigma_eps: Tensor) -> Tensor:
    """`E[vec(eps x^T) vec(eps x^T)^T]` for noise that does not depend on the inputs, `[d_y d_x, d_y d_x]`."""
    return torch.kron(sigma_eps, sigma_x)


def residual_noise(x: Tensor, y: Tensor) -> Tensor:
    """The same for the least-squares residuals of data, `[N, d]` each."""
    v = torch.linalg.lstsq(x, y).solution
    products = torch.einsum("ni,nj->nij", y - x @ v, x).flatten(1)
    return products.mT @ products / len(x)


def velocity(layers: Params, sigma_x: Tensor, noise: Tensor) -> list[Tensor]:
    """Generators `A_i` of SGD's mean motion at a minimum, `dW_i = A_i W_i - W_i A_{i-1}`, in units of `eta^2 / S`.

    For a generator A, whose tangent is `t`, the motion has `<t, dtheta> = Tr(A^T H P)`, P the stationary covariance of
    the weights, `H P + P H = Sigma`: half the noise's drift of the charge for symmetric A, and for antisymmetric ones
    a part of the commutator `[H, P]`.

    Args:
        layers: `[W_1, ..., W_D]` of full rank, every `[h_i, h_{i-1}]`.
        sigma_x: covariance of the inputs.
        noise: `independent_noise` or `residual_noise`.

    Returns:
        `D - 1` matrices `[h_i, h_i]`.
    """
    blocks = _moved_covariance(layers, sigma_x, noise)
    targets = [torch.einsum("acbc->ab", one) - torch.einsum("ebea->ab", other) for one, other in pairwise(blocks)]
    sizes = [len(w) for w in layers[:-1]]
    found = torch.linalg.solve(_gram(layers), torch.cat([t.flatten() for t in targets]))
    return [a.reshape(n, n) for a, n in zip(found.split([n * n for n in sizes]), sizes, strict=True)]


def _moved_covariance(layers: Params, sigma_x: Tensor, noise: Tensor) -> list[Tensor]:
    """The diagonal blocks of `H P`, `[h_i, h_{i-1}, h_i, h_{i-1}]`."""
    before, after = cf.prefix_products(layers)
    jacobian = torch.cat([torch.kron(a.mT.contiguous(), b) for a, b in zip(after, before, strict=True)])
    outputs = torch.eye(len(layers[-1]), dtype=sigma_x.dtype)
    stiffness, q = torch.linalg.eigh(2 * jacobian @ torch.kron(outputs, sigma_x) @ jacobian.mT)
    stiff = stiffness > 1e-9 * stiffness[-1]
    stiffness, q = stiffness[stiff], q[:, stiff]
    sigma = 4 * q.mT @ jacobian @ noise @ jacobian.mT @ q
    whole = q @ (stiffness[:, None] * sigma / (stiffness[:, None] + stiffness)) @ q.mT
    parts, at = [], 0
    for w in layers:
        rows = slice(at, at + w.numel())
        parts.append(whole[rows, rows].reshape(*w.shape, *w.shape))
        at += w.numel()
    return parts


def _gram(layers: Params) -> Tensor:
    """Inner products of the tangents of all generators."""
    last = len(layers) - 2
    rows = []
    for i in range(last + 1):
        one, other, eye = layers[i], layers[i + 1], torch.eye(len(layers[i]), dtype=layers[i].dtype)
        row = [torch.zeros(len(one) ** 2, len(w) ** 2, dtype=one.dtype) for w in layers[:-1]]
        row[i] = torch.kron(eye, one @ one.mT) + torch.kron(other.mT @ other, eye)
        if i > 0:
            row[i - 1] = -torch.kron(one, one)
        if i < last:
            row[i + 1] = -torch.kron(other.mT.contiguous(), other.mT.contiguous())
        rows.append(torch.cat(row, 1))
    return torch.cat(rows)


def turning_flow(layers: Params, sigma_x: Tensor, noise: Tensor, at: Sequence[float]) -> list[Params]:
    """The layers along the flow of `velocity`, which keeps their product up to the tolerance of the integration.

    Args:
        layers: where it starts, at a minimum of the loss; `[h_i, h_{i-1}]` each, float64.
        sigma_x: covariance of the inputs.
        noise: `independent_noise` or `residual_noise`.
        at: times in units of `S / eta^2` steps, the first of which is 0.

    Returns:
        The layers at each time.

    Raises:
        ArithmeticError: the flow cannot be integrated.

    Example:
        >>> eye, tilted = torch.eye(2, dtype=torch.float64), torch.tensor([[1.0, 0.9], [0.9, 1.0]]).double()
        >>> product = torch.diag(torch.tensor([2.0, 1.0])).double()
        >>> start = list(reversed(cf.two_layer(product, *cf.noise_matrices(eye, tilted))))
        >>> [round(float(u.square().sum()), 3) for _, u in turning_flow(start, eye, torch.kron(tilted, eye), [0, 1, 9])]
        [5.459, 5.151, 5.066]
    """
    from scipy.integrate import solve_ivp

    def layered(flat: Tensor) -> Params:
        parts = flat.split([w.numel() for w in layers])
        return [part.reshape(w.shape) for part, w in zip(parts, layers, strict=True)]

    def field(_: float, flat: np.ndarray) -> np.ndarray:
        now = layered(torch.as_tensor(flat))
        generators = velocity(now, sigma_x, noise)
        steps = [torch.zeros_like(w) for w in now]
        for i, a in enumerate(generators):
            steps[i] += a @ now[i]
            steps[i + 1] -= now[i + 1] @ a
        return torch.cat([step.flatten() for step in steps]).numpy()

    start = torch.cat([w.flatten() for w in layers]).numpy()
    run = solve_ivp(field, (at[0], at[-1]), start, "DOP853", t_eval=at, rtol=1e-7, atol=1e-9)
    if not run.success:
        raise ArithmeticError(f"the flow could not be integrated: {run.message}")
    return [layered(torch.as_tensor(np.ascontiguousarray(column))) for column in run.y.T]
