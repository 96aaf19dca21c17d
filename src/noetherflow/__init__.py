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

Names are imported on first use, so that `import noetherflow` costs nothing and even torch comes when it is needed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from noetherflow.core.shown import Drawer

if TYPE_CHECKING:
    from noetherflow import extend
    from noetherflow.analysis import Analysis, analyze, diagnose
    from noetherflow.balance.align import Alignment, align, orbit_distance
    from noetherflow.balance.align_file import AlignedCheckpoint, align_checkpoint
    from noetherflow.balance.checkpoint import balance_checkpoint, load_checkpoint_, read_checkpoint
    from noetherflow.balance.gains import gains_to_one
    from noetherflow.balance.model import BalanceReport, balance_
    from noetherflow.balance.move import move_, move_checkpoint
    from noetherflow.balance.schedule import BalanceSchedule
    from noetherflow.balance.stored_norm import stored_equilibrium
    from noetherflow.core.adaptive import AdamConfig, LionConfig
    from noetherflow.core.function_model import FunctionModel
    from noetherflow.core.losses import per_sample
    from noetherflow.core.optimizers import optimizer_config
    from noetherflow.core.rates import GroupRates
    from noetherflow.core.settings import SGDConfig
    from noetherflow.core.tensors import tensors_of
    from noetherflow.diagnosis.finding import Diagnosis, Finding
    from noetherflow.diagnosis.of_run import diagnose_run
    from noetherflow.discovery.certificate import Certificate
    from noetherflow.discovery.certify import certify
    from noetherflow.discovery.explain import explain
    from noetherflow.discovery.find import find_symmetries
    from noetherflow.discovery.oracle import count_symmetries
    from noetherflow.equilibrium.adaptive_basis import AdaptiveBasis, adaptive_basis
    from noetherflow.equilibrium.curvature import curvature_moments, top_eigenvalue
    from noetherflow.equilibrium.feedback import SquareFeedback, square_feedback
    from noetherflow.equilibrium.flow import Flow, noether_flow
    from noetherflow.equilibrium.joint import noise_equilibrium
    from noetherflow.equilibrium.objective import smoothing
    from noetherflow.equilibrium.result import Equilibrium
    from noetherflow.equilibrium.sharpness import sharpness_forecast
    from noetherflow.equilibrium.state_flow import RunSnapshot
    from noetherflow.equilibrium.state_result import StateFlow
    from noetherflow.equilibrium.step import step_identity
    from noetherflow.equilibrium.validity import SquareMemory, square_memory
    from noetherflow.moments.activation import ActivationMoments, activation_moments
    from noetherflow.moments.engine import Meter, gradient_moments
    from noetherflow.moments.factors import gradient_factors
    from noetherflow.moments.minibatch import minibatch_moments
    from noetherflow.moments.result import GradientMoments, merge_moments
    from noetherflow.moments.statistics import standard_error
    from noetherflow.moments.storage import load_moments, save_moments
    from noetherflow.monitor.ledger import Ledger
    from noetherflow.report.plots import plot
    from noetherflow.symmetry.declare import declare
    from noetherflow.symmetry.leg import Leg
    from noetherflow.symmetry.symmetry import Symmetry, Translation
    from noetherflow.symmetry.symmetry_set import SymmetrySet

__version__ = "0.2.0"

_LAZY = {
    "analysis": ("Analysis", "analyze", "diagnose"),
    "balance.align": ("Alignment", "align", "orbit_distance"),
    "balance.align_file": ("AlignedCheckpoint", "align_checkpoint"),
    "balance.checkpoint": ("balance_checkpoint", "load_checkpoint_", "read_checkpoint"),
    "balance.stored_norm": ("stored_equilibrium",),
    "balance.gains": ("gains_to_one",),
    "balance.model": ("BalanceReport", "balance_"),
    "balance.move": ("move_", "move_checkpoint"),
    "balance.schedule": ("BalanceSchedule",),
    "core.function_model": ("FunctionModel",),
    "core.adaptive": ("AdamConfig", "LionConfig"),
    "core.losses": ("per_sample",),
    "core.optimizers": ("optimizer_config",),
    "core.rates": ("GroupRates",),
    "core.settings": ("SGDConfig",),
    "core.tensors": ("tensors_of",),
    "diagnosis.finding": ("Diagnosis", "Finding"),
    "diagnosis.of_run": ("diagnose_run",),
    "discovery.certificate": ("Certificate",),
    "discovery.certify": ("certify",),
    "discovery.explain": ("explain",),
    "discovery.find": ("find_symmetries",),
    "discovery.oracle": ("count_symmetries",),
    "equilibrium.adaptive_basis": ("AdaptiveBasis", "adaptive_basis"),
    "equilibrium.feedback": ("SquareFeedback", "square_feedback"),
    "equilibrium.flow": ("Flow", "noether_flow"),
    "equilibrium.step": ("step_identity",),
    "equilibrium.joint": ("noise_equilibrium",),
    "equilibrium.objective": ("smoothing",),
    "equilibrium.result": ("Equilibrium",),
    "equilibrium.curvature": ("curvature_moments", "top_eigenvalue"),
    "equilibrium.sharpness": ("sharpness_forecast",),
    "equilibrium.state_flow": ("RunSnapshot",),
    "equilibrium.state_result": ("StateFlow",),
    "equilibrium.validity": ("SquareMemory", "square_memory"),
    "moments.activation": ("ActivationMoments", "activation_moments"),
    "moments.engine": ("Meter", "gradient_moments"),
    "moments.factors": ("gradient_factors",),
    "moments.minibatch": ("minibatch_moments",),
    "moments.result": ("GradientMoments", "merge_moments"),
    "moments.statistics": ("standard_error",),
    "moments.storage": ("load_moments", "save_moments"),
    "monitor.ledger": ("Ledger",),
    "report.plots": ("plot",),
    "symmetry.declare": ("declare",),
    "symmetry.leg": ("Leg",),
    "symmetry.symmetry": ("Symmetry", "Translation"),
    "symmetry.symmetry_set": ("SymmetrySet",),
}
_HOME = {name: module for module, names in _LAZY.items() for name in names}

__all__ = [
    "ActivationMoments",
    "AdamConfig",
    "AdaptiveBasis",
    "AlignedCheckpoint",
    "Alignment",
    "Analysis",
    "BalanceReport",
    "BalanceSchedule",
    "Certificate",
    "Diagnosis",
    "Equilibrium",
    "Finding",
    "Flow",
    "FunctionModel",
    "GradientMoments",
    "GroupRates",
    "Ledger",
    "Leg",
    "LionConfig",
    "Meter",
    "RunSnapshot",
    "SGDConfig",
    "SquareFeedback",
    "SquareMemory",
    "StateFlow",
    "Symmetry",
    "SymmetrySet",
    "Translation",
    "activation_moments",
    "adaptive_basis",
    "align",
    "align_checkpoint",
    "analyze",
    "balance_",
    "balance_checkpoint",
    "certify",
    "count_symmetries",
    "curvature_moments",
    "declare",
    "diagnose",
    "diagnose_run",
    "explain",
    "extend",
    "find_symmetries",
    "gains_to_one",
    "gradient_factors",
    "gradient_moments",
    "load_checkpoint_",
    "load_moments",
    "merge_moments",
    "minibatch_moments",
    "move_",
    "move_checkpoint",
    "noether_flow",
    "noise_equilibrium",
    "optimizer_config",
    "orbit_distance",
    "per_sample",
    "plot",
    "read_checkpoint",
    "save_moments",
    "sharpness_forecast",
    "smoothing",
    "square_feedback",
    "square_memory",
    "standard_error",
    "step_identity",
    "stored_equilibrium",
    "tensors_of",
    "top_eigenvalue",
]


def __getattr__(name: str) -> Any:
    if name == "extend":
        return import_module("noetherflow.extend")
    if name in _HOME:
        return getattr(import_module(f"noetherflow.{_HOME[name]}"), name)
    raise AttributeError(f"module 'noetherflow' has no attribute {name!r}")


Drawer.load = lambda: __getattr__("plot")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
