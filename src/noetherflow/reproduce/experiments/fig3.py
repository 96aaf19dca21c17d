"""Figure 3: norm ratio and sharpness at the equilibrium against the anisotropy of the inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from noetherflow import closed_form as cf
from noetherflow.reproduce import style
from noetherflow.reproduce.experiment import (
    Config,
    Experiment,
    Point,
    Results,
    Setting,
    Verdict,
    from_ratio,
    from_seeds,
    generator,
    plain,
)
from noetherflow.reproduce.generic import agreement, closed_form_gaps
from noetherflow.reproduce.simulate import LinearNet, Params, normal, reduced_width, simulate
from noetherflow.reproduce.theory import first_order_equilibrium
from noetherflow.sgd import SGDConfig

GIVEN = {"d": 100, "width": 2000, "lr": 0.1, "batch": 100}
COMMON = {"width": 2000, "phi": 0.2, "decay": 1e-4, "strong_decay": 0.01, "given": GIVEN}
SCALES = {
    "quick": {
        **COMMON,
        "d": 20,
        "loss_scale": 1.0,
        "phis": [0.15, 0.3, 0.5, 0.7, 1.0],
        "label_phis": [0.15, 0.3, 0.5],
        "gd_decay": 0.016,
        "gd": [0.03, 8000],
        "main": [0.04, 100, 11_000],
        "lrs": [[0.08, 200, 4500], [0.04, 100, 9000], [0.02, 50, 18_000]],
        "seeds": 5,
    },
    "paper": {
        **COMMON,
        "d": 100,
        "loss_scale": 0.01,
        "phis": [k / 10 for k in range(1, 11)],
        "label_phis": [k / 10 for k in range(1, 10, 2)],
        "gd_decay": 1e-4,
        "gd": [0.5, 150_000],
        "main": [0.1, 100, 1_000_000],
        "lrs": [[0.2, 200, 250_000], [0.1, 100, 500_000], [0.05, 50, 1_000_000]],
        "seeds": 4,
    },
}


def points(config: Config) -> list[Point]:
    """Sweeps of the inputs' and the labels' phi, GD with decay, three rates, strong decay, the given rate, Hessians."""
    scale, one = config["loss_scale"], [config["phi"]]
    sgd = {"method": "sgd", "run": config["main"], "decay": 0.0, "start": "balanced", "scale": scale}
    sweep, local = {**sgd, "phis": config["phis"]}, {**sgd, "phis": one, "start": "equilibrium"}
    given = {**sgd, "phis": one, "start": "kaiming", "scale": 1.0, "d": config["given"]["d"]}
    gd = {"method": "gd", "run": [config["gd"][0], 1, config["gd"][1]], "decay": config["gd_decay"], "start": "kaiming"}
    return [
        {"name": "sgd", **sweep},
        {"name": "sgd decay", **sweep, "decay": config["decay"]},
        {"name": "labels", **sweep, "phis": config["label_phis"]},
        {"name": "gd", **sweep, **gd},
        *({"name": f"lr{i}", **local, "run": r} for i, r in enumerate(config["lrs"])),
        {"name": "strong decay", **local, "decay": config["strong_decay"]},
        {"name": "given", **given, "run": [config["given"]["lr"], config["given"]["batch"], 40]},
        {"name": "hessian"},
        {"name": "generic"},
    ]


def covariances(point: Point, d: int) -> tuple[Tensor, Tensor]:
    """`(Sig_x, Sig_eps)`, `[phis, d, d]`: the point's variances (phi, 2 - phi) for the inputs, or for the labels."""
    varied = torch.stack([cf.identity_covariance(phi, d) for phi in point["phis"]])
    eye = torch.eye(d, dtype=torch.float64).expand_as(varied)
    return (eye, varied) if point["name"] == "labels" else (varied, eye)


def start(kind: str, sigma_x: Tensor, width: int, rng: torch.Generator) -> Params:
    """Norm- or noise-balanced factors of the identity, or Kaiming rotated into width `2 d`; `[R, ...]`."""
    count, d = sigma_x.shape[:2]
    eye = torch.eye(d, dtype=torch.float64).expand(count, -1, -1)
    if kind == "kaiming":
        w, u = (2 / d) ** 0.5 * normal((count, width, d), rng), (2 / width) ** 0.5 * normal((count, d, width), rng)
        u, w = reduced_width(u, w)
        return [w, u]
    u, w = cf.norm_balanced(eye) if kind == "balanced" else cf.two_layer(eye, *cf.noise_matrices(sigma_x, eye))
    return [w, u]


def compute(config: Config, point: Point) -> dict[str, Any]:
    """Norm ratio and Hessian trace (halved loss), averaged over the last quarter, `[phis, seeds]`, and predicted."""
    if point["name"] == "hessian":
        return plain(hessian_traces())
    if point["name"] == "generic":
        return plain(generic_gaps(config))
    d, (lr, batch, steps) = point.get("d", config["d"]), point["run"]
    seeds = config["seeds"] if point["method"] == "sgd" else 2
    sigma_x, sigma_eps = covariances(point, d)
    eye = torch.eye(d, dtype=torch.float64)
    best_u, best_w = cf.two_layer(eye.expand_as(sigma_x), *cf.noise_matrices(sigma_x, sigma_eps))
    predicted = cf.two_layer_hessian_trace(best_u, best_w, sigma_x, 0.5)
    sigma_x, sigma_eps = (m.repeat_interleave(seeds, 0) for m in (sigma_x, sigma_eps))
    net = LinearNet.of(eye, sigma_x, sigma_eps, batch, point["scale"])

    def record(params: Params) -> dict[str, Tensor]:
        w, u = params
        ratio = u.square().sum((1, 2)) / w.square().sum((1, 2))
        return {"ratio": ratio, "trace": cf.two_layer_hessian_trace(u, w, sigma_x, 0.5)}

    marks = range(3 * steps // 4, steps + 1, max(1, steps // 80))
    width = config["width"] if point["name"] == "given" else 2 * d
    first = start(point["start"], sigma_x, width, generator(1))
    run = simulate(
        net, first, steps, lr, generator(2), record, at=marks, method=point["method"], weight_decay=point["decay"]
    )
    shaped = {k: v.mean(0).reshape(len(point["phis"]), seeds) for k, v in run.records.items()}
    return plain({**shaped, "diverged": run.diverged.double().reshape(-1, seeds), "predicted_trace": predicted})


def generic_gaps(config: Config) -> dict[str, Any]:
    """How far the generic machinery's norm ratios and Hessian traces are from the closed forms, relative.

    With d at most 20: every second phi of the inputs, the first of the labels, and inputs with the strong decay.
    """
    d, scale, (lr, batch, _) = min(config["d"], 20), config["loss_scale"], config["main"]
    of, eye = (lambda phi: cf.identity_covariance(phi, d)), torch.eye(d, dtype=torch.float64)
    cases = [*((of(phi), eye, 0.0) for phi in config["phis"][::2]), (eye, of(config["label_phis"][0]), 0.0)]
    cases.append((of(config["phi"]), eye, config["strong_decay"]))
    gaps = [closed_form_gaps(eye, sx, se, SGDConfig(lr, batch, decay), scale) for sx, se, decay in cases]
    return dict(zip(("ratio", "trace"), zip(*gaps, strict=True), strict=True))


def first_order_ratio(config: Config, lr: float, batch: int) -> float:
    """`||U||^2/||W||^2` at `phi` where the Noether flow with R_B at first order in eta ends."""
    sigma_x, eye = cf.identity_covariance(config["phi"], config["d"]), torch.eye(config["d"], dtype=torch.float64)
    scale = config["loss_scale"]
    long = int(10 * batch / (4 * (scale * lr) ** 2 * config["d"] * config["phi"]))
    u, w = first_order_equilibrium(eye, sigma_x, eye, SGDConfig(lr, batch), long, scale)
    return float(u.square().sum() / w.square().sum())


def hessian_traces() -> dict[str, float]:
    """Tr H of the population loss by autograd at a random point, un-halved and halved, over the printed formula."""
    rng = generator(9)
    u, w, v = normal((3, 4), rng), normal((4, 5), rng), normal((3, 5), rng)
    root = normal((5, 5), rng)
    sigma_x = root @ root.mT

    def loss(flat: Tensor) -> Tensor:
        error = flat[:12].reshape(3, 4) @ flat[12:].reshape(4, 5) - v
        return (error @ sigma_x * error).sum()

    hessian: Any = torch.func.hessian(loss)(torch.cat([u.flatten(), w.flatten()]))
    printed = 3 * (w @ sigma_x @ w.mT).trace() + u.square().sum() * sigma_x.trace()
    return {"whole": float(hessian.trace() / printed), "halved": float(hessian.trace() / 2 / printed)}


def plot(results: Results) -> Any:
    """Ratio and trace against phi; error against the learning rate."""
    fig, (ratio, trace, error) = style.figure(3)
    c, phis = results.config, np.asarray(results.config["phis"])
    fine = np.linspace(0.02, 1, 80)
    ratio.plot(
        fine, [cf.identity_norm_ratio(p) for p in fine], color=style.THEORY, label=r"$\sqrt{\varphi(2-\varphi)}$"
    )
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
    first_order = [_predicted_deviation(c, i) for i in range(len(rates))]
    error.plot(rates, first_order, "_", color=style.THEORY, ms=16, mew=2, label=r"theory, first order in $\eta$")
    for rate, (_, batch, _) in zip(rates, c["lrs"], strict=True):
        error.annotate(f"S = {batch}", (rate, 0.002), ha="center", fontsize=8, color=style.MUTED)
    error.set(
        xlabel=r"learning rate $\eta$ (and batch $S$)",
        ylabel=r"1 - measured / $\sqrt{\varphi(2-\varphi)}$",
        title=rf"the error shrinks with $\eta$ ($\varphi={c['phi']}$)",
        ylim=(0, None),
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


def _predicted_deviation(config: Config, index: int) -> float:
    lr, batch, _ = config["lrs"][index]
    return 1 - first_order_ratio(config, lr, batch) / cf.identity_norm_ratio(config["phi"])


def decayed_ratios(results: Results) -> tuple[float, float]:
    """`||U||^2/||W||^2` at `phi` with strong decay: with `w S / (2 eta)` on the diagonal, and the printed `2 gamma`."""
    c = results.config
    lr, batch, _ = c["main"]
    sigma_x, eye = cf.identity_covariance(c["phi"], c["d"]), torch.eye(c["d"], dtype=torch.float64)
    plain_gammas = cf.noise_matrices(sigma_x, eye)
    right = cf.with_decay(plain_gammas, SGDConfig(lr, batch, c["strong_decay"]), c["loss_scale"])
    printed = tuple(g + c["strong_decay"] * eye for g in plain_gammas)
    pairs = (cf.two_layer(eye, *g) for g in (right, printed))
    correct, wrong = (float(u.square().sum() / w.square().sum()) for u, w in pairs)
    return correct, wrong


def verdicts(results: Results) -> list[Verdict]:
    """Ratios, traces, order of the error, divergence of the un-normalised loss at the given rate."""
    c, out = results.config, []
    for i, phi in enumerate(c["phis"]):
        for name, label in (("sgd", "no decay"), ("sgd decay", f"decay {c['decay']:g}")):
            out.append(
                from_seeds(
                    f"||U||^2/||W||^2 under SGD, phi = {phi}, {label}",
                    cf.identity_norm_ratio(phi),
                    results.array(name, "ratio")[i],
                    0.05,
                )
            )
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
    correct, wrong = decayed_ratios(results)
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
    out.append(
        from_ratio(
            f"systematic error of the ratio at {ratio:g} times the learning rate / at the smallest",
            2,
            coarse,
            fine,
            relation="above",
        )
    )
    for i, (lr, batch, _) in enumerate(c["lrs"]):
        label = f"systematic error of the ratio at eta = {lr:g}, S = {batch}, theory at first order in eta"
        out.append(from_seeds(label, _predicted_deviation(c, i), _deviation(results, i), 0.01, relative=False))
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
        "rate 0.1, batch 100, mean over outputs. Right: three learning rates, with batches S in proportion, started at "
        "the predicted equilibrium of eta -> 0."
    ),
    scales=SCALES,
    work=lambda c: c["seeds"] * c["d"] ** 2 * sum(len(p["phis"]) * p["run"][2] for p in points(c) if "run" in p),
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
            "claim); the equilibrium is the same",
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
            "decay for GD", "0.016 in quick, 1e-4 in paper", "GD needs decay to leave its orbit; more takes fewer steps"
        ),
        Setting(
            "start and batch of the three rates and of the strong decay",
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
