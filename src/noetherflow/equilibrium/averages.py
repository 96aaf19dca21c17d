"""What an optimiser's state says about the gradients: running means of them and of their squares, by parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from noetherflow.core.codes import is_coded, is_packed, numbers_in, plain
from noetherflow.core.foreign import SAVED_BITSANDBYTES
from noetherflow.core.held import Held, held_by, held_in, is_saved_optimizer
from noetherflow.core.optimizers import kind_of
from noetherflow.core.rates import Rates
from noetherflow.core.tensors import tensors_of
from noetherflow.core.unwrap import unwrap_optimizer
from noetherflow.errors import DataError
from noetherflow.symmetry.leg import accumulation_dtype

Kind = Literal["sgd", "adam", "rmsprop"]
SHAPED = ("momentum_buffer", "exp_avg", "exp_avg_sq", "square_avg", "max_exp_avg_sq")
"""Keys of the state with one number per entry of the parameter."""
STATE_KEYS: Mapping[Kind, frozenset[str]] = {
    "sgd": frozenset({"momentum_buffer"}),
    "adam": frozenset({"step", "exp_avg", "exp_avg_sq"}),
    "rmsprop": frozenset({"step", "square_avg", "momentum_buffer"}),
}
"""The keys that each kind of optimiser keeps; other ones mean another optimiser."""
INSTEAD = "the Ledger measures its drift while it trains: nf.Ledger(model, optimizer, syms)"


@dataclass(frozen=True)
class AveragingLaw:
    """How one optimiser turns its averages into steps; the same for all its parameters.

    Attributes:
        kind: torch's SGD with momentum, Adam and AdamW, or RMSprop.
        memory: the rate `b1` of the average of gradients (SGD: momentum).
        square_memory: the rate `b2` of the average of squares, None for SGD.
        eps: what is added to the root of that average; None for SGD, which divides by nothing.
        decoupled: decay acts on the weights and not on the gradients.
        nesterov: SGD with Nesterov's momentum.
    """

    kind: Kind
    memory: float
    square_memory: float | None
    eps: float | None
    decoupled: bool
    nesterov: bool

    @property
    def persistence(self) -> float:
        """`(1 + b1) / (1 - b1)`: what the squared average must be multiplied by to give the drift of a charge.

        Summed over a run that is exact, however the gradients are correlated (theory.md section 13).
        """
        return (1 + self.memory) / (1 - self.memory)

    def decay_per_step(self, rates: Rates) -> float:
        """The share of a squared weight that decay takes per step, in units of the learning rate `rates.lr`."""
        if self.kind == "sgd":
            return 2 * rates.weight_decay / (1 - self.memory)
        return rates.weight_decay * (2 - rates.lr * rates.weight_decay if self.decoupled else 2.0)


@dataclass(frozen=True, eq=False)
class Averages:
    """One parameter with what its optimiser remembers of its gradients, as stored: `read` scales them.

    Attributes:
        name: canonical name.
        theta: the parameter, after the step that wrote the state.
        square: running mean of squared minibatch gradients, None for SGD.
        mean: running mean of minibatch gradients; None where the optimiser keeps none.
        square_total: total weight of `square`, `1 - b2^t`.
        mean_total: total weight of `mean`, `1 - b1^t` (SGD: 1, the buffer is used as it is).
        rates: learning rate and weight decay.
        steps: optimiser steps made; None where the state does not say.
        persistence: `(1 + b1) / (1 - b1)` of its law.
        initial_lr: the learning rate that a schedule began with; None without a schedule.
    """

    name: str
    theta: Tensor
    square: Tensor | None
    mean: Tensor | None
    square_total: float
    mean_total: float
    rates: Rates
    steps: int | None
    persistence: float = 1.0
    initial_lr: float | None = None


@dataclass(frozen=True, eq=False)
class OptimizerAverages:
    """The averages of every parameter that one optimiser steps, and the law that it steps by."""

    law: AveragingLaw
    by_name: Mapping[str, Averages]
    left_out: Mapping[str, str]
    coded: bool = False
    """Some averages are stored in 8 bits."""

    @property
    def steps(self) -> int | None:
        """The largest number of steps of any parameter."""
        return max((a.steps for a in self.by_name.values() if a.steps is not None), default=None)

    @property
    def reference_lr(self) -> float:
        """The largest learning rate of any parameter, by which charges are scaled."""
        return max(a.rates.lr for a in self.by_name.values())

    def of(self, parameters: Sequence[str]) -> dict[str, Averages]:
        """The averages of some parameters."""
        return {n: self.by_name[n] for n in parameters}

    def with_weights(self, weights: Mapping[str, Tensor]) -> OptimizerAverages:
        """The same averages with other tensors as the parameters."""
        return replace(self, by_name={n: replace(a, theta=weights[n]) for n, a in self.by_name.items()})


def read_averages(model: nn.Module, optimizer: Any, lr: float | None = None) -> OptimizerAverages:
    """Read an optimiser, or its `state_dict()`, as averages of gradients.

    Args:
        model: the model that it trains.
        optimizer: SGD with momentum, Adam, AdamW or RMSprop of torch, maybe wrapped by accelerate; or what its
            `state_dict()` gave; or a list of such, with optimisers beside them whose parameters are left out.
        lr: learning rate to use in place of the stored ones, which a schedule may have taken to 0.

    Returns:
        The averages by canonical parameter name; parameters without state are in `left_out`, with the reason.

    Raises:
        DataError: another optimiser, options outside the theory, no state yet, or a learning rate of 0.
        CheckpointError: a saved state whose parameters cannot be identified.
    """
    if is_saved_optimizer(optimizer):
        held = held_in(optimizer, model, SHAPED)
    elif isinstance(optimizer, Mapping):
        raise DataError(
            f"expected an optimiser's state_dict() with 'state' and 'param_groups', got keys {list(optimizer)[:6]}"
        )
    elif isinstance(optimizer, list | tuple):
        return _united([read_averages(model, part, lr) for part in _readable(optimizer)], _unreadable(model, optimizer))
    else:
        inner = unwrap_optimizer(optimizer)
        kind_of(inner)
        held = held_by(inner, tensors_of(model))
    return averages_of(held, lr)


def _readable(optimizers: Sequence[Any]) -> list[Any]:
    """Those of several optimisers that have a theory; all saved states.

    Raises:
        DataError: none has.
    """
    out = [o for o in optimizers if is_saved_optimizer(o) or _refusal(o) is None]
    if not out:
        raise DataError("; ".join(dict.fromkeys(str(_refusal(o)) for o in optimizers)) or "no optimiser given")
    return out


def _refusal(optimizer: Any) -> str | None:
    """Why nothing is predicted for a living optimiser."""
    try:
        kind_of(unwrap_optimizer(optimizer))
    except DataError as why:
        return str(why)
    return None


def _unreadable(model: nn.Module, optimizers: Sequence[Any]) -> dict[str, str]:
    """The parameters of optimisers without a theory (Muon for the matrices, say), with the reason."""
    tensors = tensors_of(model)
    out: dict[str, str] = {}
    for optimizer in optimizers:
        why = None if is_saved_optimizer(optimizer) else _refusal(optimizer)
        if why is not None:
            out |= {h.name: why for h in held_by(unwrap_optimizer(optimizer), tensors)}
    return out


def _united(parts: Sequence[OptimizerAverages], left_out: Mapping[str, str]) -> OptimizerAverages:
    """The averages of several optimisers that step by one law.

    Raises:
        DataError: their laws differ.
    """
    laws = {p.law for p in parts}
    if len(laws) > 1:
        raise DataError(f"the optimisers step by different laws, read one at a time: {sorted(map(str, laws))[:3]}")
    by_name = {n: a for p in parts for n, a in p.by_name.items()}
    lacking = {n: why for p in parts for n, why in p.left_out.items()} | dict(left_out)
    return OptimizerAverages(parts[0].law, by_name, lacking, any(p.coded for p in parts))


def averages_of(held: list[Held], lr: float | None = None) -> OptimizerAverages:
    """`read_averages` of parameters that are identified already."""
    if any(SAVED_BITSANDBYTES in h.state for h in held):
        raise DataError(
            "the state was saved by bitsandbytes, which does not write down whether it is of Adam, LAMB or another: "
            "load it into its optimiser and pass that, nf.noether_flow(model, syms, optimizer=optimizer)"
        )
    with_state = [h for h in held if numbers_in(h.state) > 1]
    left_out = {h.name: "no optimiser state: it has not been stepped" for h in held if h not in with_state}
    if not with_state:
        raise DataError(
            "the optimiser holds no averages of gradients: it has made no step yet, or it is SGD without momentum; "
            "measure with nf.gradient_moments(...), or watch with nf.Ledger(...)"
        )
    laws = {_law_of(h) for h in with_state}
    if len(laws) > 1:
        raise DataError(f"parameter groups differ in more than lr and weight_decay: {sorted(map(str, laws))[:3]}")
    (law,) = laws
    found = {}
    for h in with_state:
        averages = _averages(h, law, lr)
        if averages.rates.lr == 0:
            left_out[h.name] = "learning rate 0 in its parameter group"
        else:
            initial_lr = h.settings.get("initial_lr")
            found[h.name] = replace(averages, initial_lr=None if initial_lr is None else float(initial_lr))
    if not found:
        initial = [h.settings["initial_lr"] for h in with_state if "initial_lr" in h.settings]
        hint = f" (the schedule began at {float(initial[0]):g})" if initial else ""
        if lr == 0:
            raise DataError("lr=0: without steps nothing drifts; pass the learning rate that the run had")
        raise DataError(f"every learning rate in the optimiser is 0: its schedule has ended{hint}; pass lr=... (--lr)")
    return OptimizerAverages(law, found, left_out, any(is_coded(v) for h in with_state for v in h.state.values()))


def _law_of(held: Held) -> AveragingLaw:
    """The law of one parameter's state and group.

    Raises:
        DataError: a state or an option that no supported optimiser has.
    """
    s, keys = held.settings, {k for k, v in held.state.items() if v is not None}
    for option in ("amsgrad", "maximize", "dampening", "centered"):
        if s.get(option):
            raise DataError(f"{option}={s[option]!r} is outside the theory of averages; {INSTEAD}")
    if keys <= STATE_KEYS["sgd"] and {"momentum", "dampening"} <= s.keys():
        return AveragingLaw("sgd", float(s["momentum"]), None, None, False, bool(s.get("nesterov")))
    if keys <= STATE_KEYS["rmsprop"] and "alpha" in s:
        return AveragingLaw("rmsprop", float(s.get("momentum", 0.0)), float(s["alpha"]), float(s["eps"]), False, False)
    if keys == STATE_KEYS["adam"] and "betas" in s and "amsgrad" in s:
        b1, b2 = s["betas"]
        return AveragingLaw("adam", float(b1), float(b2), float(s["eps"]), _decoupled(s), False)
    raise DataError(
        f"the state of {held.name} ({', '.join(sorted(keys))}) is not that of torch's SGD, Adam, AdamW or RMSprop: no "
        f"flow is derived for its optimiser; {INSTEAD}"
    )


def _decoupled(settings: Mapping[str, Any]) -> bool:
    """Whether decay acts on the weights; states of old torch do not say, which matters where there is decay.

    Raises:
        DataError: it matters and is not known.
    """
    if "decoupled_weight_decay" in settings:
        return bool(settings["decoupled_weight_decay"])
    if not settings.get("weight_decay"):
        return True
    raise DataError(
        "the saved state does not say whether it is Adam or AdamW, whose weight decay differs; set "
        "group['decoupled_weight_decay'] = True for AdamW (False for Adam) in its param_groups"
    )


def _averages(held: Held, law: AveragingLaw, lr: float | None) -> Averages:
    """The averages of one parameter; RMSprop's momentum of preconditioned gradients is brought to Adam's form."""
    coarse = [key for key, value in held.state.items() if is_packed(value)]
    if coarse:
        raise DataError(
            f"{coarse[0]} of {held.name} is stored in fewer than 8 bits, which is too coarse for the identity that the "
            f"flow is read from; {INSTEAD}"
        )
    state = {key: plain(value) if is_coded(value) else value for key, value in held.state.items()}
    settings = held.settings
    for key in SHAPED:
        if isinstance(state.get(key), Tensor) and state[key].shape != held.parameter.shape:
            raise DataError(
                f"{key} of {held.name} has shape {tuple(state[key].shape)}, the parameter "
                f"{tuple(held.parameter.shape)}: not the state of Adam or SGD as torch has it; {INSTEAD}"
            )
    rates = Rates(float(settings["lr"]) if lr is None else lr, float(settings.get("weight_decay", 0.0)))
    steps = int(state["step"]) if "step" in state else None
    if law.kind == "sgd":
        return Averages(
            held.name, held.parameter, None, state["momentum_buffer"], 1.0, 1.0, rates, steps, law.persistence
        )
    t, b1, b2 = steps or 0, law.memory, law.square_memory or 0.0
    if law.kind == "adam":
        square, mean = state["exp_avg_sq"], state["exp_avg"]
        return Averages(held.name, held.parameter, square, mean, 1 - b2**t, 1 - b1**t, rates, steps)
    square, mean = state["square_avg"], None
    slower = Rates(rates.lr / (1 - b1), rates.weight_decay)
    if b1:
        mean = accumulation_dtype(state["momentum_buffer"]) * (accumulation_dtype(square).sqrt() + (law.eps or 0.0))
        return Averages(held.name, held.parameter, square, mean, 1.0, 1 / (1 - b1), slower, steps)
    return Averages(held.name, held.parameter, square, None, 1.0, 1.0, slower, steps)
