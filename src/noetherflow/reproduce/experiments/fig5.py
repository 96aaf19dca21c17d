"""Figure 5: layer norms of a deep linear net on image data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from noetherflow import closed_form as cf
from noetherflow.errors import DataError
from noetherflow.reproduce import style
from noetherflow.reproduce.experiment import (
    Config,
    Experiment,
    Point,
    Results,
    Setting,
    Verdict,
    from_seeds,
    generator,
    plain,
)
from noetherflow.reproduce.generic import generic_equilibrium, product_design
from noetherflow.reproduce.simulate import (
    LinearNet,
    Network,
    Params,
    checkpoints,
    from_data,
    normal,
    simulate,
    squared_error,
)
from noetherflow.sgd import SGDConfig
from noetherflow.workloads import digits

BASE = {"components": 3, "depth": 4, "target_scale": 2.0, "data": None, "scales": [2.0, 0.6, 1.2, 0.8]}
SCALES = {
    "quick": {**BASE, "lr": 0.02, "batch": 16, "steps": 16_000, "seeds": 4},
    "paper": {**BASE, "components": 10, "lr": 0.01, "batch": 16, "steps": 100_000, "seeds": 8},
}


def points(config: Config) -> list[Point]:
    """Predictions; SGD on the images and on Gaussian data of the same covariances, also at half the rate; GD."""
    full = {"lr": config["lr"], "steps": config["steps"]}
    half = {"lr": config["lr"] / 2, "steps": 2 * config["steps"]}
    return [
        {"name": "theory"},
        {"name": "sgd", "method": "sgd", "gaussian": False, **full},
        {"name": "gaussian", "method": "sgd", "gaussian": True, **full},
        {"name": "gd", "method": "gd", "gaussian": True, **full},
        {"name": "sgd, half rate", "method": "sgd", "gaussian": False, **half},
        {"name": "gaussian, half rate", "method": "sgd", "gaussian": True, **half},
    ]


def images(config: Config) -> Tensor:
    """Flattened images `[N, pixels]`: scikit-learn's digits, or an `.npz`/`.npy` array of MNIST named by `data`."""
    if config["data"] is None:
        return digits()[0]
    path = Path(config["data"])
    if not path.exists():
        raise DataError(f"no image data at {path}; give an .npy or .npz file of images, or leave 'data' empty")
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
    """Layer norms `[T, 2 seeds, D]` (first half: equal start, second half: random), or their predictions `[D]`."""
    x, y = halves(config)
    v, sigma_x, sigma_eps = statistics(x, y)
    closed = cf.deep_linear(v, sigma_x, sigma_eps, config["depth"])
    if point["name"] == "theory":
        return predictions(config, closed, x, y)
    # At half the rate only the place of the equilibrium is asked for: those runs start at section 9.
    many = (2 * config["seeds"], -1, -1)
    start = [w.expand(many) for w in closed] if "half" in point["name"] else starts(config, generator(4))
    network = Network(forward, squared_error, from_data(x, y), (x[None], y[None]), config["batch"])
    surrogate = LinearNet.of(v, sigma_x, sigma_eps, config["batch"])
    record = lambda params: {"norms": torch.stack([w.norm(dim=(1, 2)) for w in params], -1)}
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
    return plain({"steps": marks, "norms": run.records["norms"]})


def starts(config: Config, rng: torch.Generator) -> Params:
    """Gaussian layers `[2 seeds, k, k]`: of equal norms, then with norms in the ratio `scales`."""
    depth, k, seeds = config["depth"], config["components"], config["seeds"]
    sizes = torch.stack([torch.ones(depth), torch.tensor(config["scales"])]).double().repeat_interleave(seeds, 0)
    layers = [normal((2 * seeds, k, k), rng) for _ in range(depth)]
    return [1.7 * sizes[:, i, None, None] * w / w.norm(dim=(1, 2), keepdim=True) for i, w in enumerate(layers)]


def predictions(config: Config, closed: Params, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Norms by section 9, by the generic machinery on the images, and by it on data with independent residuals."""
    v, sigma_x, sigma_eps = statistics(x, y)
    sgd, eye = SGDConfig(config["lr"], config["batch"]), torch.eye(len(v), dtype=torch.float64)
    isotropic = cf.deep_linear(v, eye, eye, config["depth"])
    design = product_design(v, sigma_x, sigma_eps)
    found = {
        "closed": closed,
        "generic": generic_equilibrium(closed, x, y, sgd),
        "generic_independent": generic_equilibrium(isotropic, *design, sgd),
    }
    return plain({name: [float(w.norm()) for w in layers] for name, layers in found.items()})


def final(results: Results, name: str) -> np.ndarray:
    """Norms averaged over the last quarter, `[2 seeds, D]`."""
    norms = results.array(name, "norms")
    return norms[-len(norms) // 4 :].mean(0)


def limit(results: Results, name: str) -> np.ndarray:
    """Norms extrapolated to eta = 0 from both rates, `[2 seeds, D]`."""
    return 2 * final(results, f"{name}, half rate") - final(results, name)


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
                ax.plot([1.03 * steps[-1]], [closed[layer]], "_", color=color, ms=16, mew=2.5)
            if name == "sgd":
                ax.plot([1.1 * steps[-1]], [measured[layer]], "*", color=color, ms=10)
        ax.set(xlabel="step", ylabel=r"$\|W_i\|_F$", title=titles[name])
    axes[0].plot([], [], ":", color=style.MUTED, label="equal start")
    axes[0].plot([], [], "-", color=style.MUTED, label="random start")
    axes[0].plot([], [], "_", color=style.MUTED, ms=12, mew=2.5, ls="none", label="theory, section 9")
    axes[0].plot([], [], "*", color=style.MUTED, ls="none", label="measured moments")
    axes[0].legend(ncols=2)
    _plot_rates(axes[3], results)
    return fig


def _plot_rates(ax: Any, results: Results) -> None:
    """Relative deviation of the last layer's norm against the learning rate."""
    lr = results.config["lr"]
    rates = np.array([lr / 2, lr])
    cases = (("sgd", "generic", "images, measured moments", "*"), ("gaussian", "closed", "Gaussian, section 9", "o"))
    for (name, theory, label, marker), color in zip(cases, (style.ACCENT, style.SGD), strict=True):
        target = results.array("theory", theory)[-1]
        values = np.stack([final(results, n)[:, -1] / target - 1 for n in (f"{name}, half rate", name)])
        style.dots(ax, rates, 100 * values, color, label, marker)
        line = 200 * values[0].mean() / lr * np.r_[0, rates]
        ax.plot(np.r_[0, rates], line, "--", color=color, lw=1)
    ax.axhline(0, color=style.THEORY, lw=0.8)
    ax.plot([], [], "--", color=style.MUTED, lw=1, label=r"$\propto\eta$")
    ax.set(
        xticks=[0, *rates],
        xlabel=r"learning rate $\eta$",
        ylabel=r"$\|W_D\|$: measured - predicted (%)",
        title="last layer: finite rate",
    )
    ax.legend(fontsize=8)


def verdicts(results: Results) -> list[Verdict]:
    """Agreement of starts, middle layers, predictions; the two theories; GD; the limit of small learning rates."""
    closed, measured = results.array("theory", "closed"), results.array("theory", "generic")
    sgd, gaussian, gd = (final(results, n) for n in ("sgd", "gaussian", "gd"))
    last, uneven = len(closed) - 1, slice(len(sgd) // 2, None)
    independent = np.abs(results.array("theory", "generic_independent") / closed - 1).max()
    ends = (0, 1, last)
    middle = range(1, last - 1)
    norm = lambda layer: f"||W_{layer + 1}||"
    ratio = lambda layer: f"{norm(layer)} / {norm(layer + 1)}"
    far, near = (final(results, f"gaussian{n}")[:, last] - closed[last] for n in ("", ", half rate"))
    section9, moments = "section 9 with the data's covariances", "from the measured moments"
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
        from_seeds(
            "images: largest |equal / random start - 1| over the layers' norms",
            0.03,
            np.abs(sgd[: len(sgd) // 2] / sgd[uneven].mean(0) - 1).max(1),
            relation="below",
        ),
        *(
            from_seeds(f"GD, random start: {ratio(i)}", 0.85, gd[uneven, i] / gd[uneven, i + 1], relation="below")
            for i in middle
        ),
        *(from_seeds(f"images: {norm(i)} {moments}", measured[i], sgd[:, i], 0.05) for i in range(last + 1)),
        *(from_seeds(f"Gaussian data: {norm(i)}, section 9", closed[i], gaussian[:, i], 0.05) for i in ends),
        *(
            from_seeds(f"images: {norm(i)}, {section9}", closed[i], sgd[:, i], 0.05, analysis=analysis(results, i))
            for i in ends
        ),
        *(
            from_seeds(
                f"images, eta -> 0: {norm(i)} {moments}",
                measured[i],
                limit(results, "sgd")[:, i],
                0.02,
                analysis=curvature(results, "sgd", i, measured[i]),
            )
            for i in range(last + 1)
        ),
        *(
            from_seeds(
                f"Gaussian data, eta -> 0: {norm(i)}, section 9",
                closed[i],
                limit(results, "gaussian")[:, i],
                0.02,
                analysis=curvature(results, "gaussian", i, closed[i]),
            )
            for i in ends
        ),
        from_seeds(f"Gaussian data: deviation of {norm(last)} at eta / at eta/2", 2, far / near.mean(), 0.3),
    ]


def curvature(results: Results, name: str, layer: int, predicted: float) -> str:
    """How far from linear in eta the deviation is, from which the limit is extrapolated."""
    off = [final(results, n)[:, layer].mean() / predicted - 1 for n in (name, f"{name}, half rate")]
    return (
        f"The limit is a straight line through eta ({off[0]:+.1%} from the prediction) and eta/2 ({off[1]:+.1%}); it "
        "misses where the deviation is not proportional to eta at these rates."
    )


def analysis(results: Results, layer: int) -> str:
    """What the deviation from section 9 consists of, in numbers."""
    closed, measured = (results.array("theory", k)[layer] for k in ("closed", "generic"))
    found, half = (final(results, n)[:, layer].mean() for n in ("sgd", "sgd, half rate"))
    norms = results.array("sgd", "norms")[..., layer].mean(1)
    quarter = len(norms) // 4
    late = norms[-quarter:].mean() / norms[-2 * quarter : -quarter].mean() - 1
    percent = lambda value: f"{100 * value:+.1f} %"
    return (
        f"Two causes, measured apart. Section 9 assumes residuals independent of the inputs; those of the digits are "
        f"not, which moves the equilibrium by {percent(measured / closed - 1)} (measured moments against section 9). "
        f"The rest is the finite learning rate: {percent(found / measured - 1)} from the moments' prediction at eta, "
        f"{percent(half / measured - 1)} at eta/2. Not the run length: the norm changes by {percent(late)} from the "
        f"third "
        "to the last quarter."
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
            "scikit-learn's digits; the paper's MNIST when `data` names a local copy",
            "only the covariances and the dependence of the residuals on the inputs enter",
        ),
        Setting(
            "components",
            "3 (quick), 10 (paper)",
            "the slowest direction sets the length of the run; four in a variation",
        ),
        Setting(
            "learning rate and batch", "0.02 and 16", "terms of order eta shift the last layer by 3 % (last panel)"
        ),
        Setting("targets", "the image's other half, scaled by 2", "the scale sets the size of the norms"),
    ),
    exploratory=(
        "Three components were taken after runs with four had not learned the slowest direction within 8,000 steps. "
        "Tolerances (5 %, 6 %) and the target scale were set after first runs. In the first full run the last layer "
        "failed against section 9 by 5.1 %. Halving the rate and comparing the quarters of the run showed why: with "
        "8,000 steps the random starts had not settled (the norm still moved by 2.2 % from the third to the last "
        "quarter). The run was then doubled, by the rule that the two starts must agree, and a claim added that they "
        "do; no tolerance was changed. The 2 % on the limits and 30 % on the factor 2 were written down before they "
        "were measured; four of these claims failed with 8,000 steps as well."
    ),
    variations={
        "four components, twice the steps": {"components": 4, "steps": 32_000},
        "depth 3": {"depth": 3, "scales": [2.0, 0.6, 1.2]},
        "batch 8, half the steps": {"batch": 8, "steps": 8000},
    },
)
