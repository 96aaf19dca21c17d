"""The rank-one factorisation of figure 4 and of the warmup, with minibatches drawn exactly at a small cost."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from noetherflow_paper.simulate import LinearNet, Params, normal


@dataclass(frozen=True, eq=False)
class RankOneNet:
    """`l = ||u w x - size a b^T x - eps||^2`, `x ~ N(0, I_d)`, `eps ~ N(0, noise^2 I_d)`; `params` is `[w, u]`.

    `w` `[R, 1, d]`, `u` `[R, d, 1]`, unit vectors `a`, `b` `[d]`. A minibatch enters the gradient only through the
    projections of its S inputs on w and b, of its S noises on u, and two sums that are normal given these: `2 d + 3 S`
    random numbers per step instead of `2 d S`.
    """

    a: Tensor
    b: Tensor
    size: float
    noise: float
    batch_size: int

    @cached_property
    def population(self) -> LinearNet:
        """The same loss as a linear net."""
        eye = torch.eye(len(self.a), dtype=self.a.dtype, device=self.a.device)
        return LinearNet.of(self.size * torch.outer(self.a, self.b), eye, self.noise**2 * eye, self.batch_size)

    def minibatch_gradient(self, params: Params, rng: torch.Generator) -> Params:
        w, u = params[0][:, 0], params[1][..., 0]
        replicas, s = len(w), self.batch_size
        basis = _span(w, self.b)
        along = normal((replicas, 2, s), rng)
        h, k = ((basis.mT @ v.unsqueeze(-1)).mT @ along for v in (w, self.b.expand_as(w)))
        length = u.norm(dim=-1, keepdim=True)
        noise_u = self.noise * normal((replicas, s), rng)
        h, k = h[:, 0], k[:, 0]
        residual_u = length.square() * h - self.size * (u @ self.a)[:, None] * k - length * noise_u
        across = (
            self.noise * h.norm(dim=-1, keepdim=True) * _orthogonal(normal(u.shape, rng), (u / length).unsqueeze(-1))
        )
        noise_h = u / length * (noise_u * h).sum(-1, keepdim=True) + across
        products = [(m * h).sum(-1, keepdim=True) for m in (h, k)]
        grad_u = u * products[0] - self.size * self.a * products[1] - noise_h
        seen = (basis @ (along @ residual_u.unsqueeze(-1))).squeeze(-1)
        grad_w = seen + residual_u.norm(dim=-1, keepdim=True) * _orthogonal(normal(w.shape, rng), basis)
        return [2 / s * grad_w.unsqueeze(1), 2 / s * grad_u.unsqueeze(-1)]

    def mean_gradient(self, params: Params) -> Params:
        w, u = params[0][:, 0], params[1][..., 0]
        a, b = ((v * unit).sum(-1, keepdim=True) for v, unit in ((u, self.a), (w, self.b)))
        grad_u = 2 * (w.square().sum(-1, keepdim=True) * u - self.size * b * self.a)
        grad_w = 2 * (u.square().sum(-1, keepdim=True) * w - self.size * a * self.b)
        return [grad_w.unsqueeze(1), grad_u.unsqueeze(-1)]

    def error(self, params: Params) -> Tensor:
        """`||u w - size a b^T||_F^2`, `[R]`, without forming the matrices."""
        w, u = params[0][:, 0], params[1][..., 0]
        sizes = w.square().sum(-1) * u.square().sum(-1)
        return sizes - 2 * self.size * (u @ self.a) * (w @ self.b) + self.size**2

    def gaussian_noise(self, params: Params, rng: torch.Generator) -> Params:
        return self.population.gaussian_noise(params, rng)


def _span(w: Tensor, b: Tensor) -> Tensor:
    """Orthonormal columns `[R, d, 2]` for the span of every w and the unit vector b.

    The second one is short where w is along b. Gram-Schmidt in two passes; a batched QR takes most of a step's time.
    """
    rest = w
    for _ in range(2):
        rest = rest - (rest @ b)[:, None] * b
    rounding = (1e-10 * w.norm(dim=-1, keepdim=True)).clamp_min(torch.finfo(w.dtype).tiny)
    return torch.stack([b.expand_as(w), rest / rest.norm(dim=-1, keepdim=True).maximum(rounding)], -1)


def _orthogonal(z: Tensor, basis: Tensor) -> Tensor:
    """`z` without its part in the span of the orthonormal columns of `basis` `[R, d, k]`."""
    return z - (basis @ (basis.mT @ z.unsqueeze(-1))).squeeze(-1)
