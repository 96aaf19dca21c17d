"""How operators pass, absorb or kill the shifts of their inputs: one short function per operator (see `shifts.py`)."""

from noetherflow.discovery.shift_rules import absorbing, moving, products, sums  # noqa: F401  (they register)
from noetherflow.discovery.shift_rules.base import ShiftContext, Shifted, find_shift_rule, shift_rule, shifted_in

__all__ = ["ShiftContext", "Shifted", "find_shift_rule", "shift_rule", "shifted_in"]
