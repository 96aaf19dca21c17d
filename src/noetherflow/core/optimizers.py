"""`optimizer_config`: the settings that the theory needs, read from an optimiser."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from noetherflow.core.adaptive import AdamConfig, LionConfig
from noetherflow.core.foreign import ADAM, class_name, decays_weights
from noetherflow.core.held import held_by
from noetherflow.core.loaders import FRESH, Drawn, drawn_by
from noetherflow.core.rates import GroupRates
from noetherflow.core.settings import SGDConfig
from noetherflow.core.tensors import tensors_of
from noetherflow.core.unwrap import unwrap_optimizer
from noetherflow.errors import DataError

Settings = SGDConfig | AdamConfig | LionConfig

INSTEAD = "the Ledger measures its drift: nf.Ledger(model, optimizer, syms)"
REASONS = {
    "signsgd": "theta^T A D^-1 sign(g) is not 0 for each batch: the position along an orbit diffuses at first order, "
    "so there is a broad law and no equilibrium point",
    "signum": "its sign is that of a short average, for which no equilibrium along symmetries has been derived",
    "muon": "it orthogonalises whole matrices, and no equilibrium along symmetries has been derived for that",
    "shampoo": "it preconditions with whole matrices, and no equilibrium along symmetries has been derived for that",
    "soap": "it preconditions in a rotated basis, and no equilibrium along symmetries has been derived for that",
}
"""Why there is no prediction, by a word in the name of the optimiser's class."""


def optimizer_config(optimizer: Any, batch_size: int, loader: Any = None, model: nn.Module | None = None) -> Settings:
    """The settings of an optimiser as the theory of the noise equilibrium needs them.

    Args:
        optimizer: torch's SGD, Adam, AdamW or RMSprop, Lion, or what accelerate and transformers put around one.
        batch_size: samples per optimiser step, over all ranks and accumulated micro-batches.
        loader: the DataLoader that batches come from, read for the size of the data set and the way of sampling;
            without one the data counts as fresh.
        model: the model, for the names of parameters whose group has another learning rate or weight decay.

    Returns:
        `SGDConfig`, `AdamConfig` (RMSprop is `betas=(0, alpha)`) or `LionConfig`.

    Raises:
        DataError: no theory covers the optimiser or one of its options; the message says why, and what to use instead.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> optimizer_config(torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.1), batch_size=32).weight_decay
        0.1

    Source: theory.md sections 4 and 13.
    """
    inner = unwrap_optimizer(optimizer)
    drawn = FRESH if loader is None else drawn_by(loader, batch_size)
    kind = kind_of(inner)
    shared = _shared_settings(inner, model)
    if kind == "sgd":
        return _sgd(shared, batch_size, drawn)
    if kind == "lion":
        return _lion(shared, batch_size, drawn)
    return _adam(shared, kind, batch_size, drawn)


def described(settings: Settings) -> str:
    """The settings in a few words, for titles.

    Example:
        >>> described(AdamConfig(lr=1e-3, batch_size=32, weight_decay=0.1))
        'AdamW with lr 0.001, batch size 32, weight decay 0.1, betas (0.9, 0.999)'
    """
    common = f"lr {settings.lr:g}, batch size {settings.batch_size}, weight decay {settings.weight_decay:g}"
    if isinstance(settings, SGDConfig):
        return f"SGD with {common}, momentum {settings.momentum:g}"
    name = "Lion" if isinstance(settings, LionConfig) else "AdamW" if settings.decoupled else "Adam"
    return f"{name} with {common}, betas {settings.betas}"


def check_settings(settings: object) -> None:
    """Refuse what is not the settings of an optimiser.

    Raises:
        DataError: it is none of SGDConfig, AdamConfig and LionConfig.
    """
    if not isinstance(settings, SGDConfig | AdamConfig | LionConfig):
        raise DataError(
            f"sgd must be nf.SGDConfig(lr=..., batch_size=...), nf.AdamConfig(...) or nf.LionConfig(...), got "
            f"{reprlib.repr(settings)}; nf.optimizer_config(optimizer, batch_size) reads an optimiser"
        )


def kind_of(optimizer: torch.optim.Optimizer) -> str:
    """`sgd`, `adam`, `rmsprop` or `lion`.

    Raises:
        DataError: another optimiser, with the reason why nothing is predicted for it.
    """
    name = type(optimizer).__name__
    for word, why in REASONS.items():
        if word in name.lower():
            raise DataError(f"no prediction for {name}: {why}; {INSTEAD}")
    origin = type(optimizer).__module__.partition(".")[0]
    if isinstance(optimizer, torch.optim.SGD):
        return "sgd"
    if isinstance(optimizer, torch.optim.RMSprop):
        return "rmsprop"
    if ADAM.fullmatch(class_name(optimizer)) or (
        isinstance(optimizer, torch.optim.Adam) and type(optimizer).step is torch.optim.Adam.step
    ):
        return "adam"
    if "lion" in name.lower() and _is_lion(optimizer):
        return "lion"
    raise DataError(
        f"no prediction for {name} of {origin}: the theory covers torch's SGD, Adam, AdamW, RMSprop and Lion; "
        f"{INSTEAD}, or build nf.SGDConfig(...) or nf.AdamConfig(...) by hand for one to compare with"
    )


def _is_lion(optimizer: torch.optim.Optimizer) -> bool:
    """Two betas, and under each parameter no second moment."""
    return "betas" in optimizer.defaults and not any("exp_avg_sq" in s for s in optimizer.state.values())


@dataclass(frozen=True)
class _Shared:
    """Settings of the first group, and the rates of the others where they differ."""

    lr: float
    weight_decay: float
    decoupled: bool
    options: Mapping[str, Any]
    groups: tuple[GroupRates, ...]


RATE_KEYS = frozenset({"lr", "weight_decay", "initial_lr"})
NEUTRAL_KEYS = frozenset({"params", "param_names", "foreach", "fused", "capturable", "differentiable", "name"})
REFUSED = {
    "maximize": "it maximises the loss",
    "amsgrad": "the largest v ever seen does not move along an orbit",
    "dampening": "dampening is outside the theory",
    "centered": "a centred v measures the variance, not the second moment",
}


def _shared_settings(optimizer: torch.optim.Optimizer, model: nn.Module | None) -> _Shared:
    """One set of options for all groups, and rates by group.

    Raises:
        DataError: an option outside the theory, groups that differ in more than rates, or rates that differ where the
            names of the parameters are not known.
    """
    groups = [g for g in optimizer.param_groups if g["params"]]
    if not groups:
        raise DataError(f"{type(optimizer).__name__} holds no parameters")
    for key, why in REFUSED.items():
        if any(g.get(key) for g in groups):
            raise DataError(f"{type(optimizer).__name__} with {key}={groups[0].get(key)!r}: {why}; {INSTEAD}")
    first = groups[0]
    known = set(optimizer.defaults) - RATE_KEYS - NEUTRAL_KEYS
    differing = [k for k in sorted(known) if any(g.get(k) != first.get(k) for g in groups)]
    if differing:
        raise DataError(
            f"parameter groups differ in {differing}: groups may have their own lr and weight_decay, all else must be "
            "one; give the groups the same"
        )
    rates = [(float(g["lr"]), float(g.get("weight_decay", 0.0))) for g in groups]
    others = [] if len(set(rates)) == 1 else _named_groups(optimizer, model)
    decoupled = bool(first.get("decoupled_weight_decay", decays_weights(optimizer)))
    return _Shared(*rates[0], decoupled, first, tuple(others))


def _named_groups(optimizer: torch.optim.Optimizer, model: nn.Module | None) -> list[GroupRates]:
    """The rates of every group under the names of its parameters.

    Raises:
        DataError: the names are not known.
    """
    if model is None:
        raise DataError(
            "parameter groups differ in lr or weight_decay; pass model=model, so that it is known which parameters "
            "have which"
        )
    out: dict[tuple[float, float], list[str]] = {}
    for held in held_by(optimizer, tensors_of(model)):
        rates = (float(held.settings["lr"]), float(held.settings.get("weight_decay", 0.0)))
        out.setdefault(rates, []).append(held.name)
    return [GroupRates(tuple(dict.fromkeys(names)), *rates) for rates, names in out.items()]


def _sgd(shared: _Shared, batch_size: int, drawn: Drawn) -> SGDConfig:
    """SGD's settings."""
    return SGDConfig(
        shared.lr,
        batch_size,
        shared.weight_decay,
        float(shared.options["momentum"]),
        bool(shared.options["nesterov"]),
        drawn.dataset_size,
        drawn.replacement,
        drawn.sampling,
        groups=shared.groups,
    )


def _adam(shared: _Shared, kind: str, batch_size: int, drawn: Drawn) -> AdamConfig:
    """Adam's and RMSprop's settings; RMSprop's momentum `mu` adds up preconditioned gradients: `lr / (1 - mu)` of
    their mean.
    """
    options = shared.options
    memory = float(options.get("momentum", 0.0)) if kind == "rmsprop" else float(options["betas"][0])
    slow = 1 - memory if kind == "rmsprop" else 1.0
    return AdamConfig(
        shared.lr / slow,
        batch_size,
        betas=(memory, float(options["alpha"] if kind == "rmsprop" else options["betas"][1])),
        eps=float(options["eps"]),
        weight_decay=shared.weight_decay,
        decoupled=shared.decoupled,
        dataset_size=drawn.dataset_size,
        sampling=drawn.sampling,
        replacement=drawn.replacement,
        groups=tuple(GroupRates(g.parameters, g.lr / slow, g.weight_decay) for g in shared.groups),
    )


def _lion(shared: _Shared, batch_size: int, drawn: Drawn) -> LionConfig:
    """Lion's settings."""
    b1, b2 = shared.options["betas"]
    return LionConfig(
        shared.lr,
        batch_size,
        betas=(float(b1), float(b2)),
        weight_decay=shared.weight_decay,
        dataset_size=drawn.dataset_size,
        sampling=drawn.sampling,
        replacement=drawn.replacement,
        groups=shared.groups,
    )
