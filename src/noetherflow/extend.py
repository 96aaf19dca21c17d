"""The open ends of the library: what can be added from outside without an edit of it; tutorials in `docs/extend/`.

Each function here registers one thing for the running process; call it before the verb that needs it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from noetherflow.balance.state_rules import LIKE_GRADIENT, LIKE_SQUARES, LIKE_WEIGHT, StateMove, left, state_rule
from noetherflow.discovery.gauges import Field, Gauge
from noetherflow.discovery.rules.base import RULES as GAUGE_RULES
from noetherflow.discovery.rules.base import Context, GaugeRule, on_ids
from noetherflow.discovery.rules.base import rule as register_gauge_rule
from noetherflow.discovery.rules.linear import contracted
from noetherflow.discovery.rules.shape import agree
from noetherflow.discovery.shift_rules.base import SHIFT_RULES, ShiftContext, Shifted, ShiftRule
from noetherflow.discovery.shift_rules.base import shift_rule as register_shift_rule
from noetherflow.discovery.shift_rules.products import product as shifted_product
from noetherflow.discovery.shift_store import ShiftTerm
from noetherflow.equilibrium.objective import level_objective, objective
from noetherflow.equilibrium.potential import Drift, Potential
from noetherflow.errors import DeclarationError, MomentError
from noetherflow.moments.forms import Dense, Form, OneToken, Outer
from noetherflow.moments.rules import registry
from noetherflow.moments.rules.registry import Call, MomentRule, Site
from noetherflow.moments.rules.sites import channel_axis, features_last, first_axis, last_axes, outer, summed
from noetherflow.monitor.rule import LedgerRule, Parts, Products, StepSettings, ledger_rule

__all__ = [
    "LIKE_GRADIENT",
    "LIKE_SQUARES",
    "LIKE_WEIGHT",
    "Call",
    "Context",
    "Dense",
    "Drift",
    "Field",
    "Form",
    "Gauge",
    "LedgerRule",
    "OneToken",
    "Outer",
    "Parts",
    "Potential",
    "Products",
    "ShiftContext",
    "ShiftTerm",
    "Shifted",
    "Site",
    "StateMove",
    "StepSettings",
    "agree",
    "channel_axis",
    "contracted",
    "features_last",
    "first_axis",
    "gauge_rule",
    "last_axes",
    "ledger_rule",
    "left",
    "level_objective",
    "moment_rule",
    "objective",
    "on_ids",
    "outer",
    "shift_rule",
    "shifted_product",
    "state_rule",
    "summed",
]


def gauge_rule(*operators: str, replace: bool = False) -> Callable[[GaugeRule], GaugeRule]:
    """Register a rule by which `find_symmetries` lets scales pass through an operator.

    The rule decorated is called as `rule(context, *arguments)` with the operator's arguments, a `Gauge` in the place of
    every tensor, and answers with the gauge of the output (a list of them for several outputs). What it needs of its
    inputs it demands of `context.store`. An operator without a rule demands that nothing that goes in is scaled.

    Args:
        operators: names as `find_symmetries(...).unknown` lists them, without the overload: `aten.add`, `mylib.scale`.
        replace: take the place of a rule that is there already.

    Returns:
        A decorator that returns the rule as it is.

    Raises:
        DeclarationError: no name, one without a namespace, or one that has a rule already.

    Example:
        >>> @nf.extend.gauge_rule("mylib.twice")
        ... def twice(context, x):
        ...     return context.out(x.fields)

    Source: docs/extend/gauge_rule.md.
    """
    return register_gauge_rule(*_operator_names("gauge_rule", operators, GAUGE_RULES, replace))


def shift_rule(*operators: str, replace: bool = False) -> Callable[[ShiftRule], ShiftRule]:
    """Register a rule by which `find_symmetries` lets shifts (translations of a parameter) pass through an operator.

    The rule decorated is called as `rule(context, *arguments)` with a `Shifted` in the place of every tensor. It
    answers with the output and the shifts it carries, takes out with `context.absorb` what the operator does not see,
    and ends with `context.kill` what the operator does see. An operator without a rule kills every shift that meets it.

    Args:
        operators: names as in the graph, without the overload: `aten.add`, `mylib.centre`.
        replace: take the place of a rule that is there already.

    Returns:
        A decorator that returns the rule as it is.

    Raises:
        DeclarationError: no name, one without a namespace, or one that has a rule already.

    Example:
        >>> @nf.extend.shift_rule("mylib.twice")
        ... def twice_shift(context, x):
        ...     return context.out(replace(term, scale=2 * term.scale) for term in x.terms)

    Source: docs/extend/gauge_rule.md.
    """
    return register_shift_rule(*_operator_names("shift_rule", operators, SHIFT_RULES, replace))


def _operator_names(verb: str, operators: tuple[str, ...], taken: dict[str, Any], replace: bool) -> list[str]:
    """The names as the graph writes them (`mylib::scale` is `mylib.scale` there), checked."""
    names = [operator.replace("::", ".") for operator in operators]
    bare = [name for name in names if "." not in name]
    known = [name for name in names if name in taken and not replace]
    if not names or bare:
        given = f"{bare} without a namespace" if bare else "no operator given"
        raise DeclarationError(f"{verb}: {given}; name operators as in the graph, such as 'aten.add' or 'mylib.scale'")
    if known:
        raise DeclarationError(f"{verb}: {known} have a rule already; pass replace=True to take its place")
    return names


def moment_rule(
    *functions: Callable[..., Any], signature: Callable[..., Any] | None = None, replace: bool = False
) -> Callable[[MomentRule], MomentRule]:
    """Register a rule by which `gradient_moments` reads per-sample gradients off a call of one of these functions.

    The rule decorated is called as `rule(owned, function, arguments)` whenever a model calls such a function with a
    trainable parameter among its arguments. `owned(value)` tells the arguments that are parameters (or made from
    parameters alone); `arguments` are the call's, by name, defaults included. It answers with a `Call`, or None for a
    use that it does not cover; what no rule covers is measured by `vmap(grad)`. On the first batch each rule's summed
    gradient is compared with autograd's, so that a wrong rule ends in an error and not in wrong moments.

    Args:
        functions: as torch passes them to a `torch.overrides.TorchFunctionMode`: functions of `torch`, methods of
            `Tensor`, custom operators, or functions of your own that hand themselves over with
            `torch.overrides.handle_torch_function`.
        signature: any function with their parameters and defaults, where theirs cannot be inspected (built-in ones).
        replace: take the place of a rule that is there already.

    Returns:
        A decorator that returns the rule as it is.

    Raises:
        MomentError: no function, one that has a rule already, or one whose signature cannot be inspected.

    Example:
        >>> @nf.extend.moment_rule(torch.addcmul, signature=lambda input, tensor1, tensor2, value=1: None)
        ... def shift_of_addcmul(owned, function, a):
        ...     if not owned(a["input"]) or owned(a["tensor1"]) or owned(a["tensor2"]):
        ...         return None
        ...     site = nf.extend.summed(a["input"], nf.extend.last_axes(a["input"]))
        ...     return nf.extend.Call((), nf.extend.features_last, (site,))

    Source: docs/extend/moment_rule.md.
    """
    taken = [getattr(f, "__name__", str(f)) for f in functions if f in registry.RULES and not replace]
    if taken or not functions:
        why = f"{taken} have a rule already; pass replace=True to take its place" if taken else "no function given"
        raise MomentError(f"moment_rule: {why}")
    return registry.rule(signature or _inspectable(functions[0]), *functions)


def _inspectable(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose own signature is that of its calls. Raises MomentError if Python does not know it."""
    try:
        kinds = {p.kind for p in inspect.signature(function).parameters.values()}
    except (TypeError, ValueError):
        kinds = {inspect.Parameter.VAR_KEYWORD}
    if inspect.Parameter.VAR_KEYWORD in kinds:
        name = getattr(function, "__name__", str(function))
        raise MomentError(
            f"the signature of {name} cannot be inspected; pass one: "
            f"moment_rule({name}, signature=lambda input, weight: None)"
        )
    return function
