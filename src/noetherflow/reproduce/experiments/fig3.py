"""Figure 3: norm ratio and sharpness at the equilibrium against the anisotropy of the inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from noetherflow import closed_form as cf
from noetherflow.reproduce import style
from noetherflow.reproduce.experiment import (
    Config,
    Experiment,
    Results,
    Setting,
    Verdict,
    from_ratio,
    from_seeds,
)
from noetherflow.reproduce.experiments.fig3_runs import SCALES, compute, points, replica_steps
from noetherflow.reproduce.generic import agreement
from noetherflow.sgd import SGDConfig


def plot(results: Results) -> Any:
    """Ratio and trace against phi; error against the learning rate."""
    fig, (ratio, trace, error) = style.figure(3)
    c, phis = results.config, np.asarray(results.config["phis"])
    fine = np.linspace(0.02, 1, 80)
    ratio.plot(
        fine, [cf.identity_norm_ratio(p) for p in fine], color=style.THEORY, label=r"$\sqrt{\varphi(2-\varphi)}$"
    )
    decayed = [decayed_ratio(c, p, c["decay"]) for p in fine]
    ratio.plot(fine, decayed, "--", color=style.SDE, lw=1, label=f"theory, decay {c['decay']:g}")
    ratio.axhline(1, color=style.THEORY, ls=":", lw=1)
    trace.plot(
        fine, [cf.identity_hessian_trace(p, c["d"]) for p in fine], color=style.THEORY, label="noise equilibrium"
    )
    trace.axhline(2 * c["d"] ** 2, color=style.THEORY, ls=":", label="norm-balanced")
    named = (
        ("sgd", "SGD", style.SGD, "o"),
        ("sgd decay", f"SGD, decay {c['decay']:g}", style.SDE, "^"),
        ("gd", f"GD, decay {c['gd_decay']:g}", style.GD, "s"),
    )
    for name, label, color, marker in named:
        style.dots(ratio, phis, results.array(name, "ratio"), color, label, marker)
        style.dots(trace, phis, results.array(name, "trace"), color, label, marker)
    fine_labels = [_label_trace(p, c["d"]) for p in fine[fine > 0.1]]
    trace.plot(fine[fine > 0.1], fine_labels, "--", color=style.OTHER, label="equilibrium, anisotropic labels")
    style.dots(trace, c["label_phis"], results.array("labels", "trace"), style.OTHER, "SGD, anisotropic labels", "D")
    ratio.set(xlabel=r"$\varphi$", ylabel=r"$\|U\|^2/\|W\|^2$", title="norm ratio")
    trace.set(xlabel=r"$\varphi$", ylabel=r"Tr $H$ (halved loss)", title="sharpness")
    rates = np.array([run[0] for run in c["lrs"]])
    style.dots(error, rates, np.stack([_deviation(results, i) for i in range(len(rates))]), style.SGD, "SGD")
    first_order = [_predicted_deviation(results, i) for i in range(len(rates))]
    error.plot(rates, first_order, "_", color=style.THEORY, ms=16, mew=2, label=r"theory, first order in $\eta$")
    for rate, (_, batch, _) in zip(rates, c["lrs"], strict=True):
        error.annotate(f"S = {batch}", (rate, 0.002), ha="center", fontsize=8, color=style.MUTED)
    error.set(
        xlabel=r"learning rate $\eta$ (and batch $S$)",
        ylabel=r"1 - measured / $\sqrt{\varphi(2-\varphi)}$",
        title=rf"the error shrinks with $\eta$ ($\varphi={c['phi']}$)",
        ylim=(min(0.0, 1.1 * min(float(_deviation(results, i).mean()) for i in range(len(rates)))), None),
        xlim=(0, 1.12 * rates.max()),
    )
    for ax in (ratio, trace, error):
        ax.legend()
    return fig


def _label_trace(phi: float, d: int) -> float:
    """Tr H (halved loss) at the equilibrium for isotropic inputs and label-noise variances (phi, 2 - phi)."""
    eye = torch.eye(d, dtype=torch.float64)
    u, w = cf.two_layer(eye, *cf.noise_matrices(eye, cf.identity_covariance(phi, d)))
    return float(cf.two_layer_hessian_trace(u, w, eye, 0.5))


def _deviation(results: Results, index: int) -> np.ndarray:
    """`1 - ratio / predicted` per seed at the index-th learning rate."""
    return 1 - results.array(f"lr{index}", "ratio")[0] / cf.identity_norm_ratio(results.config["phi"])


def _predicted_deviation(results: Results, index: int) -> float:
    return 1 - float(results.array(f"lr{index}", "first_order")) / cf.identity_norm_ratio(results.config["phi"])


def decayed_ratio(config: Config, phi: float, decay: float, printed: bool = False) -> float:
    """`||U||^2/||W||^2` with decay: `w S / (2 c^2 eta)`, or the `printed` w, on the diagonal of both noise matrices."""
    lr, batch, _ = config["main"]
    sigma_x, eye = cf.identity_covariance(phi, config["d"]), torch.eye(config["d"], dtype=torch.float64)
    gammas = cf.noise_matrices(sigma_x, eye)
    right = cf.with_decay(gammas, SGDConfig(lr, batch, decay), config["loss_scale"])
    u, w = cf.two_layer(eye, *((g + decay * eye for g in gammas) if printed else right))
    return float(u.square().sum() / w.square().sum())


def _ratio_verdicts(results: Results) -> list[Verdict]:
    """The norm ratio for every phi without and with the given decay, and the print's formula for both."""
    c, out = results.config, []
    plain_ratios, ratios = results.array("sgd", "ratio"), results.array("sgd decay", "ratio")
    formula = np.array([cf.identity_norm_ratio(phi) for phi in c["phis"]])
    for i, phi in enumerate(c["phis"]):
        named = f"||U||^2/||W||^2 under SGD, phi = {phi}"
        out.append(from_seeds(f"{named}, no decay", formula[i], plain_ratios[i], 0.05))
        predicted = decayed_ratio(c, phi, c["decay"])
        out.append(from_seeds(f"{named}, decay {c['decay']:g}: theory with the decay", predicted, ratios[i], 0.05))
    far = np.abs(ratios / formula[:, None] - 1)
    shift = cf.decay_shift(SGDConfig(c["main"][0], c["main"][1], c["decay"]), c["loss_scale"])
    analysis = (
        f"Decay adds w S / (2 c^2 eta) = {shift:.3g} to the diagonals of both noise matrices (theory 8), which are "
        f"{c['d']} for U and {c['d']} phi to {c['d']} (2 - phi) for W without it. With the mean over outputs, c = 1/d, "
        "the given decay outweighs the noise and balances the layers; the print's statement needs the noise to win, "
        "as it does for the un-normalised loss of the quick scale. The claims above hold with the decay in the theory."
    )
    worst = far[far.mean(1).argmax()]
    label = f"decay {c['decay']:g}: largest relative distance from sqrt(phi (2 - phi)) over phi"
    out.append(from_seeds(label, 0, worst, 0.05, relative=False, analysis=analysis))
    return out


def verdicts(results: Results) -> list[Verdict]:
    """Ratios, traces, order of the error, divergence of the un-normalised loss at the given rate."""
    c, out = results.config, _ratio_verdicts(results)
    far = np.abs(results.array("gd", "ratio") - 1)
    out.append(
        from_seeds(
            "||U||^2/||W||^2 under GD with decay: largest distance from 1 over phi",
            0,
            far[far.mean(1).argmax()],
            0.03,
            relative=False,
        )
    )
    for i, phi in enumerate(c["phis"]):
        out.append(
            from_seeds(
                f"Tr H under SGD, phi = {phi}",
                cf.identity_hessian_trace(phi, c["d"]),
                results.array("sgd", "trace")[i],
                0.06,
            )
        )
    out += _sharpness_verdicts(results)
    correct, wrong = (decayed_ratio(c, c["phi"], c["strong_decay"], printed) for printed in (False, True))
    strong = results.array("strong decay", "ratio")[0]
    label = f"decay {c['strong_decay']:g}, phi = {c['phi']}"
    out.append(
        from_seeds(
            f"||U||^2/||W||^2 under SGD, {label}: w S / (2 eta) in both noise matrices",
            correct,
            strong,
            0.05,
            difference=2,
        )
    )
    gap = np.abs(strong / wrong - 1)
    out.append(
        from_seeds(
            f"the same: relative distance from the printed form, 2 gamma = w ({wrong:.3g})",
            0.2,
            gap,
            relation="above",
            difference=2,
        )
    )
    coarse, *_, fine = (_deviation(results, i) for i in range(len(c["lrs"])))
    ratio = c["lrs"][0][0] / c["lrs"][-1][0]
    left = [float(np.mean(_deviation(results, i))) - _predicted_deviation(results, i) for i in range(len(c["lrs"]))]
    remainder = (
        f"Measured minus first order is {', '.join(f'{v:+.4f}' for v in left)} at the three rates: alike, as an effect "
        "of eta / S would be, which is the same for all three. Where it is as large as the first order, their sum "
        "does not shrink in proportion to eta. The claims on the first order, below, allow for it."
    )
    out.append(
        from_ratio(
            f"systematic error of the ratio at {ratio:g} times the learning rate / at the smallest",
            2,
            coarse,
            fine,
            relation="above",
            analysis=remainder,
        )
    )
    for i, (lr, batch, _) in enumerate(c["lrs"]):
        label = f"systematic error of the ratio at eta = {lr:g}, S = {batch}, theory at first order in eta"
        out.append(from_seeds(label, _predicted_deviation(results, i), _deviation(results, i), 0.01, relative=False))
    for key, label in (("ratio", "||U||^2/||W||^2"), ("trace", "Tr H")):
        out.append(
            agreement(f"{label} for inputs, labels and the strong decay", np.abs(results.array("generic", key)), 1e-6)
        )
    out.append(
        from_seeds(
            "given rate 0.1 with the un-normalised loss: fraction of runs that diverge",
            1,
            results.array("given", "diverged")[0],
            1e-9,
        )
    )
    return out


def _sharpness_verdicts(results: Results) -> list[Verdict]:
    """Anisotropic labels against theory; which noise sharpens; the printed formula against autograd."""
    c, hessian, out = results.config, results["hessian"], []
    balanced = 2 * c["d"] ** 2
    labels, predicted = results.array("labels", "trace"), results.array("labels", "predicted_trace")
    for phi, trace, theory in zip(c["label_phis"], labels, predicted, strict=True):
        out.append(from_seeds(f"Tr H under SGD, label-noise phi = {phi}, isotropic inputs", theory, trace, 0.06))
    isotropic = results.array("sgd", "trace")[np.asarray(c["phis"]) < 1].max(0) / balanced
    sharpened = "largest Tr H over phi < 1 / norm-balanced", "smallest Tr H over phi / norm-balanced"
    out += [
        from_seeds(f"isotropic label noise: {sharpened[0]}", 1, isotropic, relation="below", difference=6),
        from_seeds(
            f"anisotropic label noise: {sharpened[1]}", 1, labels.min(0) / balanced, relation="above", difference=6
        ),
        Verdict("Tr H of the un-halved loss by autograd / printed", 2, hessian["whole"], tolerance=1e-6, difference=5),
        Verdict("Tr H of the halved loss by autograd / printed", 1, hessian["halved"], tolerance=1e-6, difference=5),
    ]
    return out


EXPERIMENT = Experiment(
    id="fig3",
    title="Anisotropic inputs unbalance the layers and lower the sharpness",
    setup=(
        "y = x + eps, unit label noise, input variances phi (first half) and 2 - phi. Quick: d = 20, un-normalised "
        "loss, learning rate 0.04, batch 100, SGD started at the norm-balanced solution. Paper: d = 100, learning "
        "rate 0.1, batch 100, mean over outputs, after phases with larger rates. Right: three learning rates, with "
        "batches S in proportion, started at the predicted equilibrium of eta -> 0."
    ),
    scales=SCALES,
    work=lambda c: c["seeds"] * c["d"] ** 2 * sum(replica_steps(p) for p in points(c) if "run" in p),
    points=points,
    compute=compute,
    plot=plot,
    verdicts=verdicts,
    settings=(
        Setting(
            "loss",
            "un-normalised with eta 0.04 and d = 20 (quick); mean over outputs with the given eta 0.1 and d = 100 "
            "(paper)",
            "at eta 0.1 the un-normalised loss diverges from Kaiming's initialisation of the given width 2000 (last "
            "claim). Without decay the equilibrium is the same; with it the mean over outputs makes the decay weigh "
            "d^2 times more",
        ),
        Setting(
            "width",
            "2 d in place of the given 2000",
            "none: any width beyond d_x + d_y has the same dynamics (`simulate.reduced_width`)",
        ),
        Setting(
            "start of SGD",
            "the norm-balanced solution",
            "Kaiming starts reach the same point (see hero), low-variance inputs slowly, by 1/phi",
        ),
        Setting(
            "phases before the given rate (paper)",
            "learning rate times 16, 8 and 4, for 40,000, 60,000 and 60,000 steps, then 40,000 steps; with decay, both "
            "times 16 for 10,000 steps first",
            "the flow is eta^2 / S: at the given rate alone its time constant is 250,000 / phi steps. What the phases "
            "leave of their larger error of order eta is part of the measurement: below 4 % by the theory of first "
            "order",
        ),
        Setting(
            "three rates (paper)",
            "16, 8 and 4 times the given one",
            "at the given rate the effect is below 1 %, and settling takes millions of steps",
        ),
        Setting(
            "decay for GD", "0.016 in quick, 1e-4 in paper", "GD needs decay to leave its orbit; more takes fewer steps"
        ),
        Setting(
            "start and batch of the three rates and of the strong decay (0.01; paper 1e-5)",
            "the equilibrium predicted for eta -> 0 (without decay); S in proportion to eta",
            "the runs measure how far SGD settles from there; eta / S is the same for the three",
        ),
        Setting("anisotropic label noise", "variances (phi, 2 - phi), isotropic inputs", "ours, for difference 6"),
    ),
    exploratory=(
        "Learning rate and run length (quick) were chosen so that the systematic error of order eta stays below the 5 "
        "% and 6 % tolerances, which were set with it in view; the third panel shows how it shrinks with eta. That "
        "error is predicted at first order since a review; its tolerance, 0.01, was set before the comparison, which "
        "failed at two of three rates: those runs lasted two relaxation times of the slowest direction, now four. A "
        "remainder near -0.006 stays at all three rates, as for an effect of eta / S: theory leaves out what the noise "
        "of the weights adds to their norms."
    ),
    variations={
        "batch 50": {"main": [0.04, 50, 11_000]},
        "learning rate 0.06": {"main": [0.06, 100, 6000]},
    },
)
