"""Where the paper's print and this software differ (theory.md section 12)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """One difference: what is printed, and what holds. Verdicts that demonstrate it carry its number."""

    number: int
    printed: str
    holds: str


DIFFERENCES = (
    Difference(
        1,
        "Drive of the charge C = theta^T A theta, equation (7): sigma^2 Tr[Sigma A].",
        "2 sigma^2 Tr[Sigma A] = (eta/S) Tr[Sigma A]; the printed factor belongs to C/2.",
    ),
    Difference(
        2,
        "Weight decay adds 2 gamma I to Gam_U and Gam_W.",
        "It adds (gamma S / eta) I for the un-halved loss, equal to w S / (2 eta) with torch's w = 2 gamma.",
    ),
    Difference(
        3,
        "Theorem 5.4 (deep linear nets): S_1 = S_D = (d / Tr S')^((D-2)/(2D)) S'^1/2, no traces of the covariances.",
        "First and last layer carry (Tr Sig_x / Tr Sig_eps)^(1/4) and its inverse, the middle ones their product "
        "(theory.md section 9).",
    ),
    Difference(4, "t_equi is proportional to sigma^2.", "t_equi is proportional to 1/sigma^2, sigma^2 = eta/(2S)."),
    Difference(
        5, "Tr H of the two-layer linear net.", "The printed value is that of the halved loss; the loss doubles it."
    ),
    Difference(
        6,
        "Figure 3, label noise I: for some data SGD ends sharper, for others flatter.",
        "Sharper than norm balance only with anisotropic label noise: with isotropic label noise the equilibrium "
        "minimises Tr H over the orbit.",
    ),
    Difference(
        7,
        "Corollary B.4, on which theorem 4.5 rests: C approaches C* at least at "
        "sigma^2 Tr[Sigma* A+^2] / (theta*^T A+^2 theta*) from below, and with A- from above.",
        "Only at the smaller of the two, and only where A^2 = I; for A = diag(1, -2) the rate falls to 0 far away.",
    ),
    Difference(
        8,
        "Theorems 5.2 and 5.4: SGD converges to the point of the orbit where the drift of every charge is zero.",
        "Only where noise and Hessian commute along the orbit (label noise isotropic, or along the signal's axes). "
        "Elsewhere SGD turns the hidden units steadily, and rests where the drift of the charges balances that turning "
        "(theory.md section 8).",
    ),
)
"""`Verdict.difference` refers to their numbers."""
