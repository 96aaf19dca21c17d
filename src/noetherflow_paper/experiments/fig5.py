"""Figure 5: layer norms of a deep linear net on image data."""

from __future__ import annotations

from typing import Any

import numpy as np

from noetherflow.report import style
from noetherflow_paper.experiment import (
    Experiment,
    Results,
    Setting,
    Verdict,
    from_difference,
    from_ratio,
    from_seeds,
)
from noetherflow_paper.experiments.fig5_runs import HALF, NEAR, SCALES, Fig5Config, Fig5Point, compute, points

Fig5Results = Results[Fig5Config, Fig5Point]


def final(results: Fig5Results, name: str, key: str = "norms") -> np.ndarray:
    """Norms (or singular values) averaged over the last quarter (from section 9: the last half), `[2 seeds, D]`."""
    values = results.array(name, key)
    return values[-len(values) // (2 if name.endswith((NEAR, HALF)) else 4) :].mean(0)


def learned(results: Fig5Results, name: str) -> float:
    """Mean number of directions whose singular value in the product is above half of V's."""
    return float((final(results, name, "singular") > results.array("theory", "singular") / 2).sum(-1).mean())


def plot(results: Fig5Results) -> Any:
    """Norms against steps on images and on Gaussian data, SGD and GD; deviations from the theory against the rate."""
    fig, axes = style.figure(2, 2, width=5.4, height=3.6)
    colors = (style.SGD, style.SDE, style.ACCENT, style.OTHER)
    closed, measured = results.array("theory", "closed"), results.array("theory", "generic")
    titles = {"sgd": "SGD, images", "gaussian": "SGD, Gaussian data", "gd": "GD, Gaussian data"}
    for ax, name in zip(axes, titles, strict=False):
        norms, steps = results.array(name, "norms"), results.array(name, "steps")
        seeds = norms.shape[1] // 2
        for layer in range(norms.shape[-1]):
            color = colors[layer % 4]
            for part, line in ((slice(seeds), ":"), (slice(seeds, None), "-")):
                label = f"$W_{layer + 1}$" if line == "-" else None
                style.band(ax, steps, norms[:, part, layer], color, label, ls=line)
            if name != "gd":
                ax.plot([(1.03 + 0.03 * layer) * steps[-1]], [closed[layer]], "_", color=color, ms=9, mew=2.5)
            if name == "sgd":
                ax.plot([(1.17 + 0.03 * layer) * steps[-1]], [measured[layer]], "*", color=color, ms=9)
        ax.set(xlabel="step", ylabel=r"$\|W_i\|_F$", title=titles[name])
    axes[0].plot([], [], ":", color=style.MUTED, label="equal start")
    axes[0].plot([], [], "-", color=style.MUTED, label="random start")
    axes[0].plot([], [], "_", color=style.MUTED, ms=12, mew=2.5, ls="none", label="theory, section 9")
    axes[0].plot([], [], "*", color=style.MUTED, ls="none", label="measured moments")
    axes[0].legend(ncols=2)
    axes[2].legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, 0.93))
    axes[2].set(title="GD, Gaussian data: keeps the memory of its start")
    _plot_rates(axes[3], results)
    return fig


def _plot_rates(ax: Any, results: Fig5Results) -> None:
    """Relative deviation of the last layer's norm against the learning rate, from section 9 and from random starts."""
    lr = results.config.lr
    rates = np.array([lr / 2, lr])
    cases = (("sgd", "generic", "images, measured moments", "^"), ("gaussian", "closed", "Gaussian, section 9", "o"))
    for (name, theory, label, marker), color in zip(cases, (style.ACCENT, style.SGD), strict=True):
        target = results.array("theory", theory)[-1]
        off = lambda which, target=target: 100 * (final(results, which)[:, -1] / target - 1)
        values = np.stack([off(name + HALF), off(name + NEAR)])
        style.dots(ax, rates, values, color, label, marker)
        style.dots(ax, [1.06 * lr], off(name)[None], color, "the same, random start", marker, mfc="none")
        ax.plot(np.r_[0, rates], 2 * values[0].mean() / lr * np.r_[0, rates], "--", color=color, lw=1)
    ax.axhline(0, color=style.THEORY, lw=0.8)
    ax.plot([], [], "--", color=style.MUTED, lw=1, label=r"$\propto\eta$")
    ax.set(
        xticks=[0, *rates],
        xlabel=r"learning rate $\eta$",
        ylabel=r"$\|W_D\|$: measured - predicted (%)",
        title="last layer: finite rate",
    )
    ax.legend(fontsize=8)


def _largest(claim: str, first: np.ndarray, second: np.ndarray, tolerance: float, **judged: Any) -> Verdict:
    """The ratio of norms, `[seeds, D]` each, in the layer where it is farthest from 1."""
    worst = np.abs(first.mean(0) / second.mean(0) - 1).argmax()
    return from_ratio(claim, 1, first[:, worst], second[:, worst], tolerance, **judged)


def verdicts(results: Fig5Results) -> list[Verdict]:
    """Agreement of starts, middle layers, predictions; the two theories; GD; the limit of small learning rates."""
    why = analysis(results)
    return [
        *_start_verdicts(results, why),
        *_full_rate_verdicts(results, why),
        *_limit_verdicts(results, why),
    ]


def _norm(layer: int) -> str:
    return f"||W_{layer + 1}||"


def _ends(results: Fig5Results) -> tuple[int, int, int]:
    """The layers whose norms differ by section 9: the first, one of the equal middle ones, the last."""
    return 0, 1, len(results.array("theory", "closed")) - 1


def _start_verdicts(results: Fig5Results, why: str) -> list[Verdict]:
    """The two theories agree, middle layers are equal, starts do not matter for SGD; for GD they do."""
    sgd, gd, near = (final(results, n) for n in ("sgd", "gd", f"sgd{NEAR}"))
    uneven, equal = slice(len(sgd) // 2, None), sgd[: len(sgd) // 2]
    middle = range(1, _ends(results)[-1] - 1)
    ratio = lambda layer: f"{_norm(layer)} / {_norm(layer + 1)}"
    independent = results.array("theory", "generic_independent") / results.array("theory", "closed")
    claim = "generic machinery / section 9 for independent noise: largest deviation"
    starts = "images: start with equal / unequal norms, layer that differs most"
    far = "images: random start / start at section 9, layer that differs most"
    return [
        Verdict(claim, 0, float(np.abs(independent - 1).max()), tolerance=1e-6, relative=False),
        *(
            from_seeds(f"images: {ratio(i)}, random start", 1, sgd[uneven, i] / sgd[uneven, i + 1], 0.06)
            for i in middle
        ),
        _largest(starts, equal, sgd[uneven], 0.03),
        _largest(far, sgd, near, 0.03, analysis=why),
        *(
            from_seeds(f"GD, random start: {ratio(i)}", 0.85, gd[uneven, i] / gd[uneven, i + 1], relation="below")
            for i in middle
        ),
    ]


SECTION9, MOMENTS = "section 9 with the data's covariances", "from the measured moments"


def _full_rate_verdicts(results: Fig5Results, why: str) -> list[Verdict]:
    """Norms from random starts against the measured moments' equilibrium, and against section 9."""
    closed, measured = results.array("theory", "closed"), results.array("theory", "generic")
    sgd, gaussian = final(results, "sgd"), final(results, "gaussian")
    judged = lambda claim, target, norms: from_seeds(claim, target, norms, 0.05, analysis=why)
    return [
        *(judged(f"images: {_norm(i)} {MOMENTS}", measured[i], sgd[:, i]) for i in range(len(closed))),
        *(judged(f"Gaussian data: {_norm(i)}, section 9", closed[i], gaussian[:, i]) for i in _ends(results)),
        *(judged(f"images: {_norm(i)}, {SECTION9}", closed[i], sgd[:, i]) for i in _ends(results)),
    ]


def _limit_verdicts(results: Fig5Results, why: str) -> list[Verdict]:
    """The same as eta -> 0, from the two rates that start at section 9, and the order of the deviation."""
    closed, measured = results.array("theory", "closed"), results.array("theory", "generic")
    last = len(closed) - 1

    def judged(claim: str, target: float, name: str, i: int) -> Verdict:
        half, full = final(results, name + HALF)[:, i], final(results, name + NEAR)[:, i]
        return from_difference(claim, target, 2 * half, full, 0.02, analysis=why)

    off = [final(results, f"gaussian{which}")[:, last] - closed[last] for which in (NEAR, HALF)]
    claim = f"Gaussian data: deviation of {_norm(last)} at eta / at eta/2"
    return [
        *(judged(f"images, eta -> 0: {_norm(i)} {MOMENTS}", measured[i], "sgd", i) for i in range(last + 1)),
        *(judged(f"Gaussian data, eta -> 0: {_norm(i)}, section 9", closed[i], "gaussian", i) for i in _ends(results)),
        from_ratio(claim, 2, off[0], off[1], 0.3, analysis=why),
    ]


def analysis(results: Fig5Results) -> str:
    """Deviations of all layers by start and learning rate, directions learned, and what still moves."""
    listed = lambda values: ", ".join(f"{v:+.1%}" for v in values)
    singular, closed = results.array("theory", "singular"), results.array("theory", "closed")

    def told(name: str, target: np.ndarray) -> str:
        off = {which: final(results, name + which).mean(0) / target - 1 for which in ("", NEAR, HALF)}
        found = [f"{learned(results, name + which):.3g}" for which in off]
        norms = results.array(name, "norms").mean(1)
        quarter = len(norms) // 4
        late = norms[-quarter:].mean(0) / norms[-2 * quarter : -quarter].mean(0) - 1
        return (
            f"norms of the layers off by {listed(off[''])} from random starts (moving by {listed(late)} in a quarter "
            f"of the run), {listed(off[NEAR])} from section 9, {listed(off[HALF])} at eta/2, "
            f"{listed(2 * off[HALF] - off[NEAR])} extrapolated to eta = 0; directions learned: {', '.join(found)}"
        )

    return (
        f"Images: {told('sgd', results.array('theory', 'generic'))}. Gaussian data: {told('gaussian', closed)}. A "
        f"direction of V's {len(singular)} counts as learned when the product's singular value is above half of V's "
        f"(smallest: {singular[-1]:.2g}); those missing, for which zero is a plateau with depth, are missing from the "
        "norms. What extrapolation leaves where none is missing is of higher order in eta. Section 9 leaves out that "
        "the images' residuals depend on the inputs, which moves the norms by "
        f"{listed(results.array('theory', 'generic') / closed - 1)}."
    )


EXPERIMENT = Experiment(
    id="fig5",
    title="Deep linear net on images: layer norms converge to predicted values",
    setup=(
        "Depth 4, no decay. Inputs: leading principal components of the upper half of scikit-learn's digits; targets: "
        "those of the lower half, scaled by 2 (a regression with genuine residuals). Layers start with equal norms or "
        "with norms in the ratio 2 : 0.6 : 1.2 : 0.8."
    ),
    scales=SCALES,
    points=points,
    compute=compute,
    plot=plot,
    verdicts=verdicts,
    settings=(
        Setting(
            "images",
            "scikit-learn's digits; the paper's MNIST with `--set data=FILE` (.npy or .npz)",
            "only the covariances and the dependence of the residuals on the inputs enter",
        ),
        Setting(
            "components",
            "3 (quick), 10 (paper)",
            "the slowest direction sets the length of the run; four in a variation",
        ),
        Setting(
            "learning rate and batch", "0.02 and 16", "terms of order eta shift the last layer by 2 % (last panel)"
        ),
        Setting("targets", "the image's other half, scaled by 2", "the scale sets the size of the norms"),
    ),
    exploratory=(
        "Three components were taken after runs with four had not learned the slowest direction within 8,000 steps. "
        "Tolerances (5 %, 6 %) and the target scale were set after first runs. In the first full run the last layer "
        "failed against section 9 by 5.1 %, its norm still moving by 2.2 % from the third to the last quarter; the "
        "run was then doubled, by the rule that the two starts must agree, and a claim added that they do; no "
        "tolerance was changed. The 2 % on the limits and 30 % on the factor 2 were written down before they were "
        "measured; four of these claims failed with 8,000 steps as well. The limits compared random starts at eta "
        "with starts at section 9 at eta/2 at first; at the paper's sizes, where random starts leave directions "
        "unlearned, that was taken for an effect of the rate. Both rates start at section 9 since, and a claim "
        "compares the starts (with the 3 % of the other pair of starts). The error of the factor 2 now counts its "
        "denominator (2.24 +- 0.31 with the first lengths); the Gaussian runs from section 9 were doubled and "
        "averaged over their last half for that."
    ),
    variations={
        "four components, twice the steps": {"components": 4, "steps": 32_000},
        "depth 3": {"depth": 3, "scales": [2.0, 0.6, 1.2]},
        "batch 8, half the steps": {"batch": 8, "steps": 8000},
    },
)
