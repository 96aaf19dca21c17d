"""The text of the paper, statement by statement, beside what holds here and what tests it."""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = (
    "the text of the NeurIPS version as it was read by machine, `content/posters/uhki1rE2NZ/content_list.json` of "
    "github.com/deep-diver/neurips2024 at commit fc4678e"
)
"""Where the paper was read; of arXiv's third version the beginning, which agrees, was at hand."""


@dataclass(frozen=True)
class Printed:
    """One statement of the paper.

    Attributes:
        place: equation, theorem, section or figure of the paper.
        says: what stands there, in the paper's notation: `sigma^2 = eta / (2 S)`, decay `gamma ||theta||^2`.
        here: what holds, or what is tested, in the convention of docs/theory.md.
        agrees: it holds as it is printed, as far as it is tested.
        statement: id of the statement whose claims test it (`statements.py`); empty where a unit test does, or none.
    """

    place: str
    says: str
    here: str
    agrees: bool = True
    statement: str = ""


PRINTED = (
    Printed(
        "equation (1)",
        "d theta = -grad L dt + sqrt(2 sigma^2 Sigma) dW.",
        "The discrete step is taken exactly. The equation agrees with it at first order in eta.",
        statement="discrete",
    ),
    Printed(
        "equation (4)",
        "The charge does not change under GD.",
        "Under the gradient flow. A step of GD moves it by eta^2 gbar^T A gbar, as appendix D says too.",
        statement="drift",
    ),
    Printed(
        "equations (5), (7), appendix B.1",
        "dC/dt = sigma^2 Tr[Sigma grad^2 C] in (5); with C = theta^T A theta, -4 gamma C + sigma^2 Tr[Sigma A] in (7).",
        "(5) follows from (1), and gives 2 sigma^2 Tr[Sigma A] = (eta / S) Tr[Sigma A]. B.1 puts sqrt(sigma^2 Sigma) "
        "for the noise of (1) and so finds half of it, which went into (7) and proposition 5.1. The decay in (7) is "
        "right, -2 w C with w = 2 gamma. Difference 1.",
        agrees=False,
        statement="drift",
    ),
    Printed(
        "section 4.3 and appendix A.1",
        "The same flow with -gamma C + eta Tr[Sigma A] (4.3) and with -gamma ||theta||^2 (A.1).",
        "-4 gamma, as (7) has it: the gradient of gamma ||theta||^2 is 2 gamma theta.",
        agrees=False,
    ),
    Printed(
        "section 4.2, time scales",
        "t_equi is proportional to sigma^2; large sigma^2: near the equilibrium from early on.",
        "Proportional to 1 / sigma^2, which the sentence after it needs. Difference 4.",
        agrees=False,
        statement="time",
    ),
    Printed(
        "theorem 4.3",
        "For gamma >= 0: G(theta_lam) and -C(theta_lam) fall with lam; a zero exists in R or at infinity; it is unique "
        "where G is not 0 throughout; it is differentiable in theta.",
        "Tested on random networks and generators of every family, with and without decay.",
        statement="fixed-point",
    ),
    Printed(
        "theorem 4.5, lemma B.3, corollary B.4, theorem B.6",
        "|dC/dt| / |C - C*| >= sigma^2 Tr[Sigma* A+^2] / (theta*^T A+^2 theta*) where C < C*, with A- where C > C*; "
        "from it convergence in mean square.",
        "B.3 drops theta*^T A- (exp(-2 lam A-) - I) theta* as positive, and it is negative. Where A^2 = I the smaller "
        "of the two ratios is a bound; otherwise there is none: for A = diag(1, -2) the rate falls to 0 far from C*. "
        "Difference 7.",
        agrees=False,
        statement="fixed-point",
    ),
    Printed(
        "equation (9)",
        "4 gamma C* = sigma^2 Tr[Sigma(theta*) A].",
        "With 2 sigma^2, as in (5).",
        agrees=False,
        statement="drift",
    ),
    Printed(
        "proposition 5.1",
        "dC_B/dt = sigma^2 (sum_i Tr[Sigma_ui B] - sum_j Tr[Sigma_wj B]).",
        "With 2 sigma^2; otherwise the leg form of docs/theory.md section 2.",
        agrees=False,
        statement="alignment",
    ),
    Printed(
        "section 5.1, one output and one input",
        "W_k W_l -> U_k U_l for all k, l, exponentially at Var[r]; all neurons output one sign, sgn U_i = sgn U_j.",
        "The decay is tested at width 1. W = U^T or W = -U^T, so that the products U_j W_j have one sign; the U_j "
        "themselves keep both, as a rotation of the hidden units is free.",
        agrees=False,
        statement="rate",
    ),
    Printed(
        "theorem 5.2, appendix C",
        "W Gam_W W^T = U^T Gam_U U, Gam_W = E[|r|^2 x x^T] + 2 gamma I (theorem), eta E[..] + gamma I (proof).",
        "E[|r|^2 x x^T] + (gamma S / eta) I for the un-halved loss of (12); neither has the batch size. Difference 2.",
        agrees=False,
        statement="decay",
    ),
    Printed(
        "equation (14)",
        "At the minimum W Sig_x W^T / Tr Sig_x = U^T Sig_eps U / Tr Sig_eps; isotropic: W W^T / d_x = U^T U / d_y.",
        "The same is where the drift of the charges is zero. SGD comes to rest there where noise and Hessian commute, "
        "as they do in the isotropic case; elsewhere it turns the hidden units. Difference 8.",
        agrees=False,
        statement="alignment",
    ),
    Printed(
        "proposition 5.3",
        "Tr H = d_y ||W Sig_x^1/2||^2 + ||U||^2 Tr Sig_x for the loss (12).",
        "For half that loss, which B.5 differentiates. Difference 5.",
        agrees=False,
        statement="sharpness",
    ),
    Printed(
        "equation (15), initialisations",
        "S_init = d_x d (s_U^2 + s_W^2) Tr Sig_x, S_end = 2 min(d, d_x) Tr Sig_x; Xavier: S_init slightly below S_end; "
        "Kaiming with s_U^2 = 1, s_W^2 = 1 / d_x: flattening but for d = d_x = d_y.",
        "Both formulas. The last sentence holds for s_U^2 = 1 / d, which is 1 in figure 4 alone, where d = 1. "
        "Xavier's S_init is half of S_end at d = d_x and near it only where one of the two is much larger.",
        agrees=False,
        statement="warmup",
    ),
    Printed(
        "section 5.2 and figure 4",
        "Rank one: 0.008 from Kaiming's start diverges, 0.001 for 5000 steps and then 0.008 does not; both starts end "
        "at one sharpness under SGD; GD hardly changes it.",
        "Tested with these rates and times. Size, target, noise and batch are not in the paper.",
        statement="warmup",
    ),
    Printed(
        "section 5.2, figure 3",
        "y = x in R^100 with variances phi and 2 - phi, label noise I, eta 0.1, S 100, d 2000, decay 1e-4: norms "
        "balance at phi = 1 alone; SGD is sharper for some data and flatter for others.",
        "The ratio sqrt(phi (2 - phi)). At these settings the decay outweighs the noise. With label noise I the "
        "equilibrium is the flattest point of its orbit for every phi; sharper than norm balance needs anisotropic "
        "label noise. Difference 6.",
        agrees=False,
        statement="norm-ratio",
    ),
    Printed(
        "figure 2, appendix A.2",
        "d_0 = d_2 = 30, d = 40, y = x + eps, unit noise: entries of U^T Gam_U U - W Gam_W W^T go to 0 almost "
        "exponentially; the ends for several Sig_eps are those of theorem 5.2, GD's an order of magnitude away.",
        "Tested with these sizes.",
        statement="alignment",
    ),
    Printed(
        "theorem 5.4, appendix E",
        "With V' = Sig_eps^1/2 V Sig_x^1/2 = L S' R of rank d: S_1 = S_D = (d / Tr S')^((D-2)/(2D)) S'^1/2, middle "
        "layers (Tr S' / d)^(1/D) times rotations.",
        "Right only for Tr Sig_x = Tr Sig_eps = d: from (122) to (127) and (128) the denominators of the outermost "
        "pairs, Tr Sig_x and Tr Sig_eps, have become d. Difference 3. As for two layers, difference 8.",
        agrees=False,
        statement="deep",
    ),
    Printed(
        "equation (18), figure 5",
        "Middle layers take one norm, whatever the initial norms; the first and the last another.",
        "Tested on images and on Gaussian data, from equal and from random norms.",
        statement="deep",
    ),
    Printed(
        "section 5.4, equations (19) to (21)",
        "zeta (grad l_2)^T A theta = sigma^2 Tr[Sigma A]; small zeta: the equilibrium of theorem 4.3; large zeta: a "
        "distance of order sigma^2 from the minimum of l_2.",
        "(19) is the balance of the right flow, as its factor 2 is on both sides. Tested from zeta 1e-6 to 1e-1.",
        statement="approximate",
    ),
    Printed(
        "section 5.4, equation (22)",
        "C - C* = 2 sigma^2 Tr[Sigma A] / (zeta h*), where theta - theta* is an eigenvector of the Hessian of l_2.",
        "theta moves along the orbit, by a multiple of A theta*, which is no eigenvector as a rule: h* is then "
        "(A theta*)^T H A theta* / |A theta*|^2. The charge itself is not measured in approx.",
        agrees=False,
    ),
    Printed(
        "section 5.4, figures 6 and 9, appendix A.4",
        "tanh, ReLU, leaky ReLU, swish: 40 inputs, y = x + eps, Var eps_1 = 5, others 1, 10^4 steps: W Sig_x W^T and "
        "U^T Sig_eps U alike under SGD, not under GD.",
        "Tested with these settings, which cannot decide: norm balance alone correlates 0.87. Decided with noise that "
        "differs in all directions.",
        statement="representations",
    ),
    Printed(
        "figure 7, appendix A.1",
        "Net-A and Net-B: the norm grows under SGD and stays under GD; each layer of Net-B grows, of Net-A either way.",
        "Tested with these nets.",
        statement="scale",
    ),
    Printed(
        "figure 8",
        "The equilibrium of figure 3 is reached at several eta, d_x = d_y and S.",
        "Tested, with the time that it takes.",
        statement="time",
    ),
    Printed(
        "remark 4.4, theorem D.1",
        "The same for discrete steps of SGD and GD, in expectation, with Sigma_d = E[g g^T]; for any real gamma.",
        "The form used here (docs/theory.md sections 3 to 5). For gamma < 0 the drift is not monotone: gamma >= 0 is "
        "needed as in theorem 4.3.",
        agrees=False,
        statement="fixed-point",
    ),
    Printed(
        "abstract",
        "Implications for representation normalisation.",
        "No section of the text speaks of it. What follows for two-layer nets is tested.",
        statement="normalisation",
    ),
)
"""In the order of the paper, but for what belongs together."""
