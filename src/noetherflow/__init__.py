"""Parameter symmetries of neural networks, the Noether flow along them, and the noise equilibrium.

```
syms = nf.find_symmetries(model, example_inputs)
cert = nf.certify(model, syms, example_inputs)
mom = nf.gradient_moments(model, loss_fn, batches, syms, entries=True)
flow = nf.noether_flow(model, syms, mom, sgd)
eq = nf.noise_equilibrium(model, syms, mom, sgd)
report = nf.balance_(model, eq, optimizer)
ledger = nf.Ledger(model, optimizer, syms)
```

Verbs are imported on first use, so that `import noetherflow` costs little beyond torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from noetherflow.legs import Leg
from noetherflow.sgd import SGDConfig
from noetherflow.symmetry import Symmetry, Translation
from noetherflow.symmetry_set import SymmetrySet, declare, tensors_of

if TYPE_CHECKING:
    from noetherflow.analysis import Analysis, analyze
    from noetherflow.balance import balance_
    from noetherflow.checkpoint import balance_checkpoint
    from noetherflow.discovery.certify import certify
    from noetherflow.discovery.explain import explain
    from noetherflow.discovery.find import find_symmetries
    from noetherflow.discovery.oracle import count_symmetries
    from noetherflow.equilibrium import noise_equilibrium
    from noetherflow.flow import noether_flow
    from noetherflow.moments import (
        GradientMoments,
        gradient_moments,
        load_moments,
        merge_moments,
        minibatch_moments,
        save_moments,
        standard_error,
    )
    from noetherflow.monitor import Ledger
    from noetherflow.sharpness import curvature_moments, sharpness_forecast

__version__ = "0.1.0"

_LAZY = {
    "Analysis": "analysis",
    "GradientMoments": "moments",
    "Ledger": "monitor",
    "analyze": "analysis",
    "balance_": "balance",
    "balance_checkpoint": "checkpoint",
    "certify": "discovery",
    "count_symmetries": "discovery",
    "curvature_moments": "sharpness",
    "explain": "discovery",
    "find_symmetries": "discovery",
    "gradient_moments": "moments",
    "load_moments": "moments",
    "merge_moments": "moments",
    "minibatch_moments": "moments",
    "noether_flow": "flow",
    "noise_equilibrium": "equilibrium",
    "save_moments": "moments",
    "sharpness_forecast": "sharpness",
    "standard_error": "moments",
}

__all__ = [
    "Analysis",
    "GradientMoments",
    "Ledger",
    "Leg",
    "SGDConfig",
    "Symmetry",
    "SymmetrySet",
    "Translation",
    "analyze",
    "balance_",
    "balance_checkpoint",
    "certify",
    "count_symmetries",
    "curvature_moments",
    "declare",
    "explain",
    "find_symmetries",
    "gradient_moments",
    "load_moments",
    "merge_moments",
    "minibatch_moments",
    "noether_flow",
    "noise_equilibrium",
    "save_moments",
    "sharpness_forecast",
    "standard_error",
    "tensors_of",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"noetherflow.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'noetherflow' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
