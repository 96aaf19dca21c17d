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
    from noetherflow.balance import BalanceReport, balance_
    from noetherflow.checkpoint import balance_checkpoint, load_checkpoint_, read_checkpoint
    from noetherflow.discovery.certify import Certificate, certify
    from noetherflow.discovery.explain import explain
    from noetherflow.discovery.find import find_symmetries
    from noetherflow.discovery.oracle import count_symmetries
    from noetherflow.equilibrium import Equilibrium, gradient_factors, noise_equilibrium
    from noetherflow.flow import Flow, noether_flow, step_identity
    from noetherflow.moments import (
        GradientMoments,
        gradient_moments,
        load_moments,
        merge_moments,
        minibatch_moments,
        save_moments,
        standard_error,
    )
    from noetherflow.monitor import BalanceSchedule, Ledger
    from noetherflow.sharpness import curvature_moments, sharpness_forecast, top_eigenvalue

__version__ = "0.1.0"

_LAZY = {
    "Analysis": "analysis",
    "BalanceReport": "balance",
    "BalanceSchedule": "monitor",
    "Certificate": "discovery",
    "Equilibrium": "equilibrium",
    "Flow": "flow",
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
    "gradient_factors": "equilibrium",
    "gradient_moments": "moments",
    "load_checkpoint_": "checkpoint",
    "load_moments": "moments",
    "merge_moments": "moments",
    "minibatch_moments": "moments",
    "noether_flow": "flow",
    "noise_equilibrium": "equilibrium",
    "read_checkpoint": "checkpoint",
    "save_moments": "moments",
    "sharpness_forecast": "sharpness",
    "standard_error": "moments",
    "step_identity": "flow",
    "top_eigenvalue": "sharpness",
}

__all__ = [
    "Analysis",
    "BalanceReport",
    "BalanceSchedule",
    "Certificate",
    "Equilibrium",
    "Flow",
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
    "gradient_factors",
    "gradient_moments",
    "load_checkpoint_",
    "load_moments",
    "merge_moments",
    "minibatch_moments",
    "noether_flow",
    "noise_equilibrium",
    "read_checkpoint",
    "save_moments",
    "sharpness_forecast",
    "standard_error",
    "step_identity",
    "tensors_of",
    "top_eigenvalue",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"noetherflow.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'noetherflow' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
