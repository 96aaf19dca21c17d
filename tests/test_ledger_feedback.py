"""The books of Adam's charge in a stationary state: the mean transport of the preconditioner is the feedback of `v`."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf
from test_adaptive_feedback_flow import flow_of, product_case

RATIO, COPIES, SPEED = 5.871, 512, 5.0
"""`|w| / |u|` where the flow with feedback stops at `(1 - b2) / lr` = 5 (b2 = 0.95 at lr 0.01)."""


class Products(nn.Module):
    """Independent copies of `y = u (w . x)`: Adam steps entry by entry, so that one run is as many runs."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.eye(4)[:1].repeat(COPIES, 1) * math.sqrt(RATIO))
        self.u = nn.Parameter(torch.full((COPIES,), 1 / math.sqrt(RATIO)))

    def forward(self, x: Tensor) -> Tensor:
        return self.u * (self.w * x).sum(-1)


def books(lr: float, steps: int) -> dict[str, tuple[float, float]]:
    """Mean of every entry per step, over `lr^2` and the norm of the charge, with its error from 20 parts of the run."""
    torch.manual_seed(0)
    net = Products()
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, betas=(0.0, 1 - SPEED * lr), eps=1e-30)
    syms = nf.declare(net, "diagonal", [("w", 0)], [("u", 0)])

    def step() -> None:
        x = torch.randn(8, COPIES, 4)
        optimizer.zero_grad()
        (net(x) - x[..., 0] - torch.randn(8, COPIES)).square().mean(0).sum().backward()
        optimizer.step()

    for _ in range(round(4 / lr)):
        step()
    with nf.Ledger(net, optimizer, syms, every=1, capacity=steps) as ledger:
        for _ in range(steps):
            step()
    rows = ledger.preconditioned()
    scale, found = np.mean([r["norm"] for r in rows]) * lr**2, {}
    for entry in ("noise", "transport", "change", "residual"):
        parts = np.array([r[entry] for r in rows][: len(rows) // 20 * 20]).reshape(20, -1).mean(1) / scale
        found[entry] = (float(parts.mean()), float(parts.std(ddof=1)) / math.sqrt(20))
    return found


@pytest.mark.slow
def test_the_mean_transport_of_a_stationary_state_is_the_feedback() -> None:
    """Books in which every square has the `d` of its own step hold no feedback: `theta^T A g` is 0. What stops the
    charge there, against noise that goes on, is the transport; it equals what the Hessian says of the feedback.
    """
    _, case = product_case(RATIO, 1e-5, samples=4_000)
    flow = flow_of(case)
    row, at = flow.details[0], [case[1][0].identity()]
    norm = sum(float(term.parts(at).weight.sum()) for term in flow.orbit.terms)  # type: ignore[attr-defined]
    assert row.feedback is not None
    predicted, noise = (float(part) / norm / 1e-10 for part in (row.feedback, row.noise))
    found = books(0.01, 8_000)
    mean, unsure = found["transport"]
    print(f"feedback {predicted:.4f}, noise {noise:.4f}; transport {mean:.3f} +- {unsure:.3f}, noise {found['noise']}")
    assert abs(mean - predicted) < 3 * unsure
    assert mean > 3 * unsure
    assert abs(found["change"][0]) < 3 * found["change"][1]
    assert abs(mean + found["noise"][0] - found["change"][0]) < 1e-4
    assert found["noise"][0] == pytest.approx(noise, rel=0.05)  # of order lr
