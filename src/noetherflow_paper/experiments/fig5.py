"""Figure 5: layer norms of a deep linear net on image data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from noetherflow.core.settings import SGDConfig
from noetherflow.errors import DataError
from noetherflow.report import style
from noetherflow.workloads import digits
from noetherflow_paper import closed_form as cf
from noetherflow_paper.experiment import (
    Config,
    Experiment,
    Point,
    Results,
    Setting,
    Verdict,
    from_difference,
    from_ratio,
    from_seeds,
    generator,
    plain,
)
from noetherflow_paper.generic import generic_equilibrium, product_design
from noetherflow_paper.simulate import (
    LinearNet,
    Network,
    Params,
    checkpoints,
    from_data,
    normal,
    simulate,
    squared_distance,
)

BASE = {"components": 3, "depth": 4, "target_scale": 2.0, "data": None, "scales": [2.0, 0.6, 1.2, 0.8]}
SCALES = {
    "quick": {**BASE, "lr": 0.02, "batch": 16, "steps": 16_000, "seeds": 4},
    "paper": {**BASE, "components": 10, "lr": 0.01, "batch": 16, "steps": 100_000, "seeds": 8},
}


NEAR, HALF = ", from section 9", ", half rate"


def points(config: Config) -> list[Point]:
    """Predictions; SGD on the images and on Gaussian data of the same covariances; GD; two rates from section 9.

    At half the rate twice the steps; from section 9, where there is nothing to learn, half as many on the images.
    """
    lr, steps = config["lr"], config["steps"]
    full = {"start": "random", "lr": lr, "steps": steps}

    def near(share: float, length: float) -> Point:
        return {"start": "section 9", "lr": share * lr, "steps": round(length * steps / share)}

    images, surrogate = {"method": "sgd", "gaussian": False}, {"method": "sgd", "gaussian": True}
    return [
        {"name": "theory"},
        {"name": "sgd", **images, **full},
        {"name": "gaussian", **surrogate, **full},
        {"name": "gd", "method": "gd", "gaussian": True, **full},
        {"name": f"sgd{NEAR}", **images, **near(1, 0.5)},
        {"name": f"gaussian{NEAR}", **surrogate, **near(1, 1)},
        {"name": f"sgd{HALF}", **images, **near(0.5, 0.5)},
        {"name": f"gaussian{HALF}", **surrogate, **near(0.5, 1)},
    ]


def images(config: Config) -> Tensor:
    """Flattened images `[N, pixels]`: scikit-learn's digits, or an `.npz`/`.npy` array of MNIST named by `data`."""
    if config["data"] is None:
        return digits()[0]
    path = Path(config["data"])
    if not path.exists():
        raise DataError(f"no image data at {path}; set data to an .npy or .npz file of images, or leave it out")
    loaded = np.load(path)
    array = loaded[loaded.files[0]] if hasattr(loaded, "files") else loaded
    return torch.as_tensor(array.reshape(len(array), -1) / array.max(), dtype=torch.float64)


def halves(config: Config) -> tuple[Tensor, Tensor]:
    """Principal components of the upper half (inputs) and of the lower half (targets), `[N, k]` each."""
    flat = images(config)
    half = flat.shape[1] // 2
    out = []
    for part, scale in ((flat[:, :half], 1.0), (flat[:, half:], config["target_scale"])):
        centred = part - part.mean(0)
        axes = torch.linalg.eigh(centred.mT @ centred).eigenvectors[:, -config["components"] :].flip(-1)
        z = centred @ axes
        out.append(scale * z / z.square().mean().sqrt())
    return out[0], out[1]


def statistics(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Least-squares map V, `Sig_x`, and the covariance of its residuals."""
    sigma_x = x.mT @ x / len(x)
    v = torch.linalg.solve(sigma_x, x.mT @ y / len(x)).mT
    r = y - x @ v.mT
    return v, sigma_x, r.mT @ r / len(x)


def forward(params: Params, x: Tensor) -> Tensor:
    """`W_D ... W_1 x`."""
    for w in params:
        x = x @ w.mT
    return x


def compute(config: Config, point: Point) -> dict[str, Any]:
    """Layer norms `[T, 2 seeds, D]` (random start: first half equal norms, second half unequal) and singular values of
    the product `[T, 2 seeds, k]`; or the predictions."""
    x, y = halves(config)
    v, sigma_x, sigma_eps = statistics(x, y)
    closed = cf.deep_linear(v, sigma_x, sigma_eps, config["depth"])
    if point["name"] == "theory":
        return predictions(config, closed, x, y)
    many = (2 * config["seeds"], -1, -1)
    start = [w.expand(many) for w in closed] if point["start"] == "section 9" else starts(config, generator(4))
    network = Network(forward, squared_distance, from_data(x, y), (x[None], y[None]), config["batch"])
    surrogate = LinearNet.of(v, sigma_x, sigma_eps, config["batch"])

    def record(params: Params) -> dict[str, Tensor]:
        eye = torch.eye(config["components"], dtype=torch.float64)
        return {
            "norms": torch.stack([w.norm(dim=(1, 2)) for w in params], -1),
            "singular": torch.linalg.svdvals(forward(params, eye)),
        }

    marks = checkpoints(point["steps"], 80)
    run = simulate(
        surrogate if point["gaussian"] else network,
        start,
        point["steps"],
        point["lr"],
        generator(5),
        record,
        at=marks,
        method=point["method"],
    )
    return plain({"steps": marks, **run.records})


def starts(config: Config, rng: torch.Generator) -> Params:
    """Gaussian layers `[2 seeds, k, k]`: of equal norms, then with norms in the ratio `scales`."""
    depth, k, seeds = config["depth"], config["components"], config["seeds"]
    sizes = torch.stack([torch.ones(depth), torch.tensor(config["scales"])]).double().repeat_interleave(seeds, 0)
    layers = [normal((2 * seeds, k, k), rng) for _ in range(depth)]
    return [1.7 * sizes[:, i, None, None] * w / w.norm(dim=(1, 2), keepdim=True) for i, w in enumerate(layers)]


def predictions(config: Config, closed: Params, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Norms by section 9, by the generic machinery on the images, and by it on data with independent residuals; V's
    singular values."""
    v, sigma_x, sigma_eps = statistics(x, y)
    sgd, eye = SGDConfig(config["lr"], config["batch"]), torch.eye(len(v), dtype=torch.float64)
    isotropic = cf.deep_linear(v, eye, eye, config["depth"])
    design = product_design(v, sigma_x, sigma_eps)
    found = {
        "closed": closed,
        "generic": generic_equilibrium(closed, x, y, sgd),
        "generic_independent": generic_equilibrium(isotropic, *design, sgd),
    }
    norms = {name: [float(w.norm()) for w in layers] for name, layers in found.items()}
    return plain({**norms, "singular": torch.linalg.svdvals(v)})


def final(results: Results, name: str, key: str = "norms") -> np.ndarray:
    """Norms (or singular values) averaged over the last quarter (from section 9: the last half), `[2 seeds, D]`."""
    values = results.array(name, key)
    return values[-len(values) // (2 if name.endswith((NEAR, HALF)) else 4) :].mean(0)


def learned(results: Results, name: str) -> float:
    """Mean number of directions whose singular value in the product is above half of V's."""
    return float((final(results, name, "singular") > results.array("theory", "singular") / 2).sum(-1).mean())


def plot(results: Results) -> Any:
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


def _plot_rates(ax: Any, results: Results) -> None:
    """Relative deviation of the last layer's norm against the learning rate, from section 9 and from random starts."""
    lr = results.config["lr"]
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


def verdicts(results: Results) -> list[Verdict]:
    """Agreement of starts, middle layers, predictions; the two theories; GD; the limit of small learning rates."""
    closed, measured = results.array("theory", "closed"), results.array("theory", "generic")
    sgd, gaussian, gd, near = (final(results, n) for n in ("sgd", "gaussian", "gd", f"sgd{NEAR}"))
    last, uneven = len(closed) - 1, slice(len(sgd) // 2, None)
    independent = np.abs(results.array("theory", "generic_independent") / closed - 1).max()
    ends = (0, 1, last)
    middle = range(1, last - 1)
    norm = lambda layer: f"||W_{layer + 1}||"
    ratio = lambda layer: f"{norm(layer)} / {norm(layer + 1)}"
    off = [final(results, f"gaussian{which}")[:, last] - closed[last] for which in (NEAR, HALF)]
    section9, moments = "section 9 with the data's covariances", "from the measured moments"
    why = analysis(results)
    limit = lambda name, i: (2 * final(results, name + HALF)[:, i], final(results, name + NEAR)[:, i])
    return [
        Verdict(
            "generic machinery / section 9 for independent noise: largest deviation",
            0,
            float(independent),
            tolerance=1e-6,
            relative=False,
        ),
        *(
            from_seeds(f"images: {ratio(i)}, random start", 1, sgd[uneven, i] / sgd[uneven, i + 1], 0.06)
            for i in middle
        ),
        _largest(
            "images: start with equal / unequal norms, layer that differs most",
            sgd[: len(sgd) // 2],
            sgd[uneven],
            0.03,
        ),
        _largest("images: random start / start at section 9, layer that differs most", sgd, near, 0.03, analysis=why),
        *(
            from_seeds(f"GD, random start: {ratio(i)}", 0.85, gd[uneven, i] / gd[uneven, i + 1], relation="below")
            for i in middle
        ),
        *(
            from_seeds(f"images: {norm(i)} {moments}", measured[i], sgd[:, i], 0.05, analysis=why)
            for i in range(last + 1)
        ),
        *(
            from_seeds(f"Gaussian data: {norm(i)}, section 9", closed[i], gaussian[:, i], 0.05, analysis=why)
            for i in ends
        ),
        *(
            from_seeds(
                f"images: {norm(i)}, {section9}",
                closed[i],
                sgd[:, i],
                0.05,
                analysis=why,
            )
            for i in ends
        ),
        *(
            from_difference(f"images, eta -> 0: {norm(i)} {moments}", measured[i], *limit("sgd", i), 0.02, analysis=why)
            for i in range(last + 1)
        ),
        *(
            from_difference(
                f"Gaussian data, eta -> 0: {norm(i)}, section 9",
                closed[i],
                *limit("gaussian", i),
                0.02,
                analysis=why,
            )
            for i in ends
        ),
        from_ratio(
            f"Gaussian data: deviation of {norm(last)} at eta / at eta/2",
            2,
            off[0],
            off[1],
            0.3,
            analysis=why,
        ),
    ]


def analysis(results: Results) -> str:
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
