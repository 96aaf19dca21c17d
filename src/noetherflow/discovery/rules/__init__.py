"""Rules by operator family; importing this package fills the registry."""

from noetherflow.discovery.rules import attention, elementwise, linear, norms, shape
from noetherflow.discovery.rules.base import RULES, Context, find_rule, gauges_in, rule

__all__ = [
    "RULES",
    "Context",
    "attention",
    "elementwise",
    "find_rule",
    "gauges_in",
    "linear",
    "norms",
    "rule",
    "shape",
]
