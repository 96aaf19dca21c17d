"""Rules by operator family; importing this package fills the registry."""

from noetherflow.discovery.rules import attention, contraction, elementwise, indexing, linear, norms, shape, spectral
from noetherflow.discovery.rules.base import RULES, Context, find_rule, gauges_in, rule

__all__ = [
    "RULES",
    "Context",
    "attention",
    "contraction",
    "elementwise",
    "find_rule",
    "gauges_in",
    "indexing",
    "linear",
    "norms",
    "rule",
    "shape",
    "spectral",
]
