"""A model as a flat graph of aten operators, traced on a weightless float64 copy."""

from __future__ import annotations

import functools
import io
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from noetherflow.core.copies import attributes_with_graph, copy_of
from noetherflow.core.inputs import ModelInputs
from noetherflow.core.interrupts import uninterrupted
from noetherflow.core.tensors import named_tensors, tensors_of
from noetherflow.core.torch_internals import FakeTensor, FakeTensorMode
from noetherflow.core.unwrap import plain_name, unwrap
from noetherflow.discovery.expand import expanded
from noetherflow.discovery.failures import explain_failure
from noetherflow.discovery.outputs import plain_output
from noetherflow.errors import ExportError, NoetherflowError

REMEDIES: dict[type, str] = {
    WeightNorm: "use torch.nn.utils.parametrizations.weight_norm instead",
    SpectralNorm: "use torch.nn.utils.parametrizations.spectral_norm instead",
    BasePruningMethod: "make the pruning permanent: torch.nn.utils.prune.remove(module, {name!r})",
}
"""What replaces a hook that puts a computed weight in a parameter's place."""
TRACING = threading.RLock()
"""Held while a model is traced: `torch.export` and the switching off of warnings change state of the whole process.

Ctrl-C waits for the end of a trace as well: raised in torch's C++ callbacks it would abort the process, and
in a callback of a weak reference Python would lose it.
"""
LOGGERS = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")


@dataclass(frozen=True, eq=False)
class Graph:
    """An exported model.

    `leaves` maps placeholder names to canonical parameter or buffer names, `parameters` names the trainable kind,
    `shapes` holds the shape of every leaf by canonical name, `constants` the known values of lifted constants.
    """

    module: fx.GraphModule
    leaves: dict[str, str]
    parameters: frozenset[str]
    shapes: dict[str, tuple[int, ...]]
    constants: dict[str, Tensor]

    @property
    def nodes(self) -> list[fx.Node]:
        return list(self.module.graph.nodes)

    def casts(self) -> tuple[str, ...]:
        """Places where the float64 graph lowers its own precision, as `module path (operator)`."""
        found: dict[str, None] = {}
        for node in self.nodes:
            value = node.meta.get("val")
            if node.op != "call_function" or not isinstance(value, Tensor) or not value.is_floating_point():
                continue
            wide = any(
                isinstance(source.meta.get("val"), Tensor) and source.meta["val"].dtype == torch.float64
                for source in node.all_input_nodes
            )
            if wide and value.dtype != torch.float64:
                found[f"{module_path(node)} ({_short(node)} to {str(value.dtype).removeprefix('torch.')})"] = None
        return tuple(found)


def _short(node: fx.Node) -> str:
    return operator_name(node).removeprefix("aten.").split(".")[0].lstrip("_")


def operator_name(node: fx.Node) -> str:
    """`aten.linear.default` and the like."""
    return str(node.target)


def module_path(node: fx.Node) -> str:
    """The innermost module that the node was traced in, `""` for the root."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next((entry[0] for entry in reversed(stack.values())), "") if stack else ""
    return str(path)


def without_caches(model: nn.Module) -> nn.Module:
    """Settings of a transformers model copy that change how, not what, it computes: no caches, experts in one batch."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = "batched_mm"
    return model


def uncopyable(model: nn.Module) -> str | None:
    """Why no copy of the model can take its place, and what to do; None where one can.

    A hook of the older kind (`torch.nn.utils.weight_norm`) puts a computed weight in a parameter's place before every
    forward, and the graph of that weight belongs to the original's parameters.
    """
    for module, name, _ in attributes_with_graph(model):
        for hook in module._forward_pre_hooks.values():
            remedy = next((text for kind, text in REMEDIES.items() if isinstance(hook, kind)), None)
            if remedy is not None:
                return _computed(model, module, name, remedy.format(name=name))
    return None


def _computed(model: nn.Module, module: nn.Module, name: str, remedy: str) -> str:
    path = next(p for p, m in model.named_modules() if m is module)
    return (
        f"{f'{path}.' if path else ''}{name} of {type(module).__name__} is an attribute computed from parameters, and "
        f"a model that holds one cannot be copied: {remedy}"
    )


def stale(model: nn.Module, duplicate: nn.Module, inputs: ModelInputs) -> str | None:
    """What is wrong with an attribute that was computed from parameters once, None where there is no such attribute.

    A feature map that every forward sets anew is harmless. One that the forward leaves alone is a constant in a copy,
    while in the model it depends on the parameters: `self.scale = self.weight.sum()` in `__init__`.

    Args:
        model: the original.
        duplicate: a copy of it by `copy_of`; its forward is run where the original holds such attributes.
        inputs: what the copy is called with.
    """
    copied = dict(duplicate.named_modules())
    paths = {module: path for path, module in model.named_modules()}
    held = [
        (module, name, copied[paths[module]], vars(copied[paths[module]])[name])
        for module, name, tensor in attributes_with_graph(model)
        if vars(module)[name] is tensor
    ]
    if held:
        inputs.call(duplicate)
    for module, name, twin, before in held:
        if vars(twin).get(name) is before:
            return _computed(model, module, name, "compute it in forward, or use torch.nn.utils.parametrize")
    return None


def weightless(model: nn.Module, mode: FakeTensorMode, dtype: torch.dtype | None) -> nn.Module:
    """A copy of `model` with fake tensors for weights (floating ones in `dtype`), on the CPU, holding no memory.

    The hooks of accelerate that fetch offloaded weights are left out: there is nothing to fetch.
    """
    memo: dict[int, Any] = {}
    for tensor in tensors_of(model).values():
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        with mode:
            blank = torch.empty(tensor.shape, dtype=kind, device="cpu")
        memo[id(tensor)] = (
            nn.Parameter(blank, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else blank
        )
    hooks = [hook for module in model.modules() if (hook := vars(module).get("_hf_hook")) is not None]
    duplicate = copy_of(model, memo | {id(hook): None for hook in hooks})
    for module in duplicate.modules() if hooks else ():
        if (forward := vars(module).get("_old_forward")) is not None:
            module.forward = forward
    return duplicate


@dataclass(frozen=True)
class Tracing:
    """How a model is traced.

    Attributes:
        dtype: of weights and floating inputs, None for their own.
        plain: outputs are turned into plain containers first, for classes that `torch.export` does not know.
    """

    dtype: torch.dtype | None
    plain: bool


TRACINGS = (Tracing(torch.float64, False), Tracing(torch.float64, True), Tracing(None, False), Tracing(None, True))
UNKNOWN_CLASS = ("not a known type", "register a pytree", "pytree_node")
"""Words of torch about outputs of a class that it does not know; only then outputs are made plain."""


def export(model: nn.Module, example_inputs: Any) -> Graph:
    """Trace `model` with `torch.export` into functional aten operators.

    The traced copy has fake float64 weights, so models on the meta device cost no memory and casts to a lower precision
    show in the graph.

    Args:
        model: any module, wrapped or not.
        example_inputs: a tensor, a tuple of arguments or a mapping of keyword arguments; only shapes matter.

    Raises:
        ExportError: with the reason when tracing fails (data-dependent control flow, a model that cannot be copied).
    """
    if not isinstance(model, nn.Module):
        raise ExportError(f"expected a torch.nn.Module, got {model!r:.80}")
    inner = unwrap(model)
    if (why := untraceable(inner) or uncopyable(inner)) is not None:
        raise ExportError(why)
    failure: Exception | None = None
    for tracing in TRACINGS:
        if tracing.plain and not any(words in str(failure) for words in UNKNOWN_CLASS):
            continue
        try:
            with TRACING, uninterrupted():
                return _graph(model, _trace(inner, example_inputs, tracing))
        except NoetherflowError as error:
            raise ExportError(str(error)) from error
        except Exception as error:
            failure = failure or error
    raise ExportError(explain_failure(inner, example_inputs, failure)) from failure


def untraceable(model: nn.Module) -> str | None:
    """Why a model has no graph of operators, None for one that may have."""
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            return (
                f"{path or 'the model'} is a torch.jit module ({type(module).__name__}), whose code and weights "
                "cannot be read: pass the nn.Module that it was scripted or traced from"
            )
    return None


def _trace(model: nn.Module, example_inputs: Any, tracing: Tracing) -> torch.export.ExportedProgram:
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(value: Tensor) -> Tensor:
        kind = tracing.dtype if tracing.dtype is not None and value.is_floating_point() else value.dtype
        with mode:
            return torch.empty(value.shape, dtype=kind, device="cpu")

    inputs = ModelInputs.of(example_inputs).map(fake)
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        blank = without_caches(weightless(model, mode, tracing.dtype))
        if (why := stale(model, blank, inputs)) is not None:
            raise ExportError(why)
        if tracing.plain:
            blank.forward = _with_plain_output(blank.forward)
        program = torch.export.export(blank, inputs.args, inputs.kwargs, strict=False)
        return expanded(program.run_decompositions({}))


def _with_plain_output(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def plain(*args: Any, **kwargs: Any) -> Any:
        return plain_output(forward(*args, **kwargs))

    return plain


def _graph(model: nn.Module, program: torch.export.ExportedProgram) -> Graph:
    canonical = {id(tensor): name for name, tensor in tensors_of(model).items()}
    by_alias = {name: canonical[id(tensor)] for name, tensor in named_tensors(model)}
    signature = program.graph_signature
    leaves = {
        spec.arg.name: by_alias[plain_name(str(spec.target))]
        for spec in signature.input_specs
        if spec.target is not None and plain_name(str(spec.target)) in by_alias
    }
    constants = {
        spec.arg.name: program.constants[str(spec.target)]
        for spec in signature.input_specs
        if spec.target is not None
        and isinstance(program.constants.get(str(spec.target)), Tensor)
        and not isinstance(program.constants[str(spec.target)], FakeTensor)
    }
    tensors = tensors_of(model)
    return Graph(
        program.graph_module,
        leaves,
        frozenset(n for n, t in tensors.items() if isinstance(t, nn.Parameter)),
        {n: tuple(t.shape) for n, t in tensors.items()},
        constants,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """What torch logs and prints about a failed trace is in its exception as well."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def sizes_known(graph: Graph) -> Iterator[None]:
    """Raises ExportError in place of torch's error where the block asks for a size that depends on data."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ != "GuardOnDataDependentSymNode":
            raise
        raise ExportError(_open_size(graph)) from error


def _open_size(graph: Graph) -> str:
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and not all(isinstance(size, int) for size in value.shape):
            where = f" ({_short(node)}{f' in {module_path(node)}' if module_path(node) else ''})"
            break
    else:
        where = ""
    return (
        f"a size in this model depends on data{where}, or a number is read with .item() or .tolist(), so that its "
        "graph is not fixed: write a selection with torch.where or a product with the mask, or name the symmetries "
        "yourself: nf.declare(model, kind, plus=[(parameter, axis)], minus=[...])"
    )
