"""One rule per family of operators that consume parameters: from activations and output gradient to a `Form`."""

from noetherflow.moments.rules import convolutions, lookups, norms, products
from noetherflow.moments.rules.broadcasts import SPREADING, spread
from noetherflow.moments.rules.registry import RULES, Call, Site, match

__all__ = ["RULES", "SPREADING", "Call", "Site", "convolutions", "lookups", "match", "norms", "products", "spread"]
