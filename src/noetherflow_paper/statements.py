"""The statements of the paper that the experiments test, and those that none tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Statement:
    """One statement of the paper in our convention (docs/theory.md), and where the paper makes it.

    Attributes:
        id: what `Experiment.statement` and `Verdict.statement` refer to.
        place: section, theorem or figure of arXiv 2402.07193, third version.
        says: the statement, in our convention.
    """

    id: str
    place: str
    says: str


STATEMENTS = (
    Statement(
        "drift",
        "equations (5) and (7), figure 1",
        "Gradient noise moves the Noether charge by (eta/S) Tr[Sigma A] per unit time; gradient descent does not.",
    ),
    Statement(
        "scale",
        "appendix A.1, figures 1 and 7",
        "Scale-invariant weights grow for ever under SGD without decay, and do not under gradient descent.",
    ),
    Statement(
        "rate",
        "section 5.1, one input and one output",
        "The imbalance u^2 - w^2 decays at (eta/S) Var[dl/d(uw)] in relative terms.",
    ),
    Statement(
        "fixed-point",
        "theorem 4.3, appendix B.3",
        "On every orbit the drift is strictly monotone, has one zero, and attracts from both sides.",
    ),
    Statement(
        "independence",
        "theorem 4.3, figures 2 and 4",
        "The fixed point does not depend on the initialisation; under gradient descent the end does.",
    ),
    Statement(
        "alignment",
        "theorem 5.2, equation (14), figure 2",
        "At the equilibrium W Gam_W W^T = U^T Gam_U U, approached exponentially; it fixes the norms of the layers.",
    ),
    Statement(
        "norm-ratio",
        "figure 3",
        "For V = Sig_eps = I the ratio of squared norms is sqrt(phi (2 - phi)); with decay alone it is 1.",
    ),
    Statement("decay", "theorem 5.2, appendix C", "What weight decay adds to the noise matrices of the two layers."),
    Statement(
        "sharpness",
        "section 5.2, proposition 5.3, figure 3",
        "Tr H at the noise equilibrium; progressive sharpening or flattening towards it.",
    ),
    Statement(
        "warmup",
        "section 5.2, equation (15), figure 4",
        "The flow lowers the sharpness during warmup, so that a rate that diverges at first becomes stable.",
    ),
    Statement(
        "deep",
        "theorem 5.4, equation (18), figure 5",
        "In deep linear nets the middle layers take one norm, the outer ones others, which the covariances fix.",
    ),
    Statement(
        "representations",
        "section 5.4, figures 6 and 9",
        "In two-layer nets with an activation W Sig_x W^T and U^T Sig_eps U align under SGD, not under GD.",
    ),
    Statement(
        "time",
        "section 4.2, figure 8",
        "The time to the equilibrium as a function of learning rate, width and batch size.",
    ),
    Statement(
        "normalisation",
        "abstract",
        "Normalising the representation moves the equilibrium to balance and frees it of the data's scale.",
    ),
    Statement(
        "approximate",
        "section 5.4",
        "With loss = symmetric + zeta asymmetric the noise wins for small zeta, the asymmetric term for large zeta.",
    ),
    Statement(
        "discrete",
        "equation (1), remark 4.4",
        "SGD is described by a stochastic differential equation with noise covariance eta Sigma / S.",
    ),
    Statement(
        "architectures",
        "section 4.2, examples of exponential symmetry",
        "Which layers of networks have rescaling, scaling and double rotation symmetry.",
    ),
    Statement(
        "large-networks",
        "sections 5.3, 5.4 and 6, networks of practical size",
        "That balance and alignment of noise shape the representations of large trained networks.",
    ),
)
"""In the order of the paper; the text itself, statement by statement: `printed.py`."""

BEYOND = Statement("beyond", "not in the paper", "What follows from the same theory where the paper does not go.")
"""What the experiments that go beyond the paper test."""


def statement(name: str) -> Statement:
    """The statement with this id.

    Raises:
        KeyError: for an unknown id.
    """
    return {s.id: s for s in (*STATEMENTS, BEYOND)}[name]
