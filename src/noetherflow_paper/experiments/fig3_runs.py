"""The runs behind figure 3: scales, points, simulations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from noetherflow.core.settings import SGDConfig
from noetherflow_paper import closed_form as cf
from noetherflow_paper.experiment import Config, Point, generator, plain
from noetherflow_paper.generic import closed_form_gaps
from noetherflow_paper.simulate import LinearNet, Params, normal, reduced_width, simulate
from noetherflow_paper.theory import first_order_equilibrium

GIVEN = {"d": 100, "width": 2000, "lr": 0.1, "batch": 100}
COMMON = {"width": 2000, "phi": 0.2, "decay": 1e-4, "given": GIVEN}
SCALES = {
    "quick": {
        **COMMON,
        "d": 20,
        "loss_scale": 1.0,
        "phis": [0.15, 0.3, 0.5, 0.7, 1.0],
        "label_phis": [0.15, 0.3, 0.5],
        "strong_decay": 0.01,
        "gd_decay": 0.016,
        "gd": [0.03, 8000],
        "before": {"noise": [], "decay": []},
        "main": [0.04, 100, 11_000],
        "lrs": [[0.08, 200, 4500], [0.04, 100, 9000], [0.02, 50, 18_000]],
        "seeds": 5,
    },
    "paper": {
        **COMMON,
        "d": 100,
        "loss_scale": 0.01,
        "phis": [0.15, 0.2, 0.3, 0.5, 0.7, 1.0],
        "label_phis": [0.15, 0.3, 0.5],
        "strong_decay": 1e-5,
        "gd_decay": 1e-4,
        "gd": [0.5, 50_000],
        "before": {"noise": [[16, 40_000], [8, 60_000], [4, 60_000]], "decay": [[16, 10_000]]},
        "main": [0.1, 100, 40_000],
        "lrs": [[1.6, 200, 40_000], [0.8, 100, 80_000], [0.4, 50, 160_000]],
        "seeds": 3,
    },
}


def points(config: Config) -> list[Point]:
    """Sweeps of the inputs' and the labels' phi, GD with decay, three rates, strong decay, the given rate, Hessians."""
    scale, one = config["loss_scale"], [config["phi"]]
    once = {"method": "sgd", "run": config["main"], "before": [], "decay": 0.0, "scale": scale, "phis": one}
    by_noise, by_decay = ({"before": config["before"][k]} for k in ("noise", "decay"))
    sweep, local = {**once, "start": "balanced", "phis": config["phis"]}, {**once, "start": "equilibrium"}
    given = {**once, "start": "kaiming", "scale": 1.0, "d": config["given"]["d"]}
    gd = {"method": "gd", "run": [config["gd"][0], 1, config["gd"][1]], "decay": config["gd_decay"], "start": "kaiming"}
    return [
        {"name": "sgd", **sweep, **by_noise},
        {"name": "sgd decay", **sweep, **by_decay, "decay": config["decay"]},
        {"name": "labels", **sweep, **by_noise, "phis": config["label_phis"]},
        {"name": "gd", **sweep, **gd},
        *({"name": f"lr{i}", **local, "run": r} for i, r in enumerate(config["lrs"])),
        {"name": "strong decay", **local, **by_decay, "decay": config["strong_decay"]},
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
    """Norm ratio and Hessian trace (halved loss), averaged over the last quarter, `[phis, seeds]`, and predicted.

    The phases of `before`, `[factor, steps]`, go first: learning rate and decay times a factor, which makes the flow
    `factor^2` times faster and leaves its end (for eta -> 0) where it is.
    """
    if point["name"] == "hessian":
        return plain(hessian_traces())
    if point["name"] == "generic":
        return plain(generic_gaps(config))
    d, (lr, batch, steps), decay = point.get("d", config["d"]), point["run"], point["decay"]
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
    now, rng = start(point["start"], sigma_x, width, generator(1)), generator(2)
    for factor, count in point["before"]:
        now = simulate(net, now, count, factor * lr, rng, at=0, weight_decay=factor * decay).params
    run = simulate(net, now, steps, lr, rng, record, at=marks, method=point["method"], weight_decay=decay)
    shaped: dict[str, Any] = {k: v.mean(0).reshape(len(point["phis"]), seeds) for k, v in run.records.items()}
    shaped |= {"diverged": run.diverged.double().reshape(-1, seeds), "predicted_trace": predicted}
    if point["name"].startswith("lr"):
        shaped["first_order"] = first_order_ratio(config, lr, batch)
    return plain(shaped)


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


def replica_steps(point: Point) -> int:
    """Steps of all runs of a point together, without seeds."""
    return len(point["phis"]) * (point["run"][2] + sum(steps for _, steps in point["before"]))
