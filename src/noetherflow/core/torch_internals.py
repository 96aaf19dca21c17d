"""Everything of torch that is not public and that measuring relies on, each behind one function of our own.

`tests/test_torch_internals.py` has a test per function. When a new torch breaks one of them, its message says what the
function must go on doing; nothing outside this module needs to change.
"""

from __future__ import annotations

import gc
import operator
import types
from collections.abc import Callable, Container, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import _engine_run_backward
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.stateless import _reparametrize_module
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from noetherflow.core.interrupts import uninterrupted

__all__ = ["FakeTensor", "FakeTensorMode", "TorchDispatchMode"]
"""Classes of torch that are documented for extensions and yet live in private modules."""


def run_backward(
    outputs: Tensor, weights: Tensor, inputs: Sequence[Tensor], keep: bool = False
) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad(outputs, inputs, weights, allow_unused=True)` without its checks in Python.

    `autograd.grad` calls public functions on the tensors it is given, and an active `TorchFunctionMode` would intercept
    each of them; that costs more than a small model's backward.

    Args:
        outputs: the tensor that is differentiated.
        weights: the gradient with respect to `outputs`, of the same shape.
        inputs: what to differentiate by.
        keep: keep the graph for another backward; else it is freed.

    Returns:
        One gradient per input, None for an input that `outputs` does not depend on.
    """
    found: tuple[Tensor | None, ...] = _engine_run_backward(
        (outputs,), (weights,), keep, False, tuple(inputs), True, accumulate_grad=False
    )
    return found


class WithinTorch(TorchFunctionMode):
    """Refuses, by RuntimeError, what hands the memory of a tensor to another library."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("numpy", "__array__", "__dlpack__"):
            raise RuntimeError(f"a tensor is handed to another library ({func.__name__})")
        return func(*args, **(kwargs or {}))


def traced(run: Callable[[], Sequence[Tensor]], given: Sequence[Tensor]) -> fx.GraphModule:
    """All operators that `run` performs, those of backwards included, as a graph that computes the same again.

    Where `run` reads a number of a tensor, or the shape of a result depends on values, the graph holds what was found
    this time; `data_dependent` tells whether that may be another for other inputs.

    Args:
        run: what is traced. It is run once, and really, and returns tensors.
        given: the tensors that `run` works on. They become the graph's inputs, in this order; any other tensor, such as
            one that a list of the model holds, becomes part of the graph as it is, by reference.

    Returns:
        A function of as many tensors as `given`, which returns a list of what `run` returns. To be called without
        gradients and autocast: both are written out in the graph.

    Raises:
        RuntimeError: `run` hands a tensor to NumPy or another library, where no operator can be followed.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> graph = traced(lambda: torch.autograd.grad((x**3).sum(), [x]), [x])
        >>> graph(torch.tensor([2.0, 3.0]))
        [tensor([12., 27.])]
    """
    with WithinTorch(), uninterrupted():
        return make_fx(lambda *_: list(run()), _error_on_data_dependent_ops=False)(*given)


def data_dependent(graph: fx.GraphModule) -> str | None:
    """The first operator of a traced graph that gives a number or a shape which depends on the graph's inputs.

    Such a graph computes something else, or nothing, on other inputs. Numbers of what does not depend on them, such as
    `torch.arange(5).max()`, are the same each time.

    Example:
        >>> x = torch.tensor([0.0, 1.0])
        >>> data_dependent(traced(lambda: [x * float(x.sum())], [x]))
        'aten._local_scalar_dense.default'
        >>> data_dependent(traced(lambda: [x.nonzero()], [x])), data_dependent(traced(lambda: [x[[0, 1]]], [x]))
        ('aten.nonzero.default', None)
        >>> data_dependent(traced(lambda: [x * float(torch.arange(5).max())], [x]))
    """
    changing = _changing(graph)
    for node in graph.graph.nodes:
        if _fixes_values(node) and not changing.isdisjoint(node.all_input_nodes):
            return str(node.target)
    return None


def _fixes_values(node: fx.Node) -> bool:
    """Whether an operator gives a number, or a shape that depends on values."""
    tags = getattr(node.target, "tags", ())
    if torch.Tag.dynamic_output_shape in tags and node.target is torch.ops.aten.index.Tensor:  # by numbers or a mask
        chosen = [n.meta["val"].dtype for n in node.all_input_nodes[1:] if isinstance(n.meta.get("val"), Tensor)]
        return bool({torch.bool, torch.uint8} & set(chosen))
    return torch.Tag.dynamic_output_shape in tags or torch.Tag.data_dependent_output in tags


def _changing(graph: fx.GraphModule) -> set[fx.Node]:
    """The nodes whose values depend on inputs, on tensors held by reference or on random numbers.

    What is overwritten with such a value depends on it, and so does whatever it may be a view of.
    """
    found: set[fx.Node] = set()
    grown = True
    while grown:
        before = len(found)
        for node in graph.graph.nodes:
            random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
            if node.op in ("placeholder", "get_attr") or random or not found.isdisjoint(node.all_input_nodes):
                found.add(node)
            if node in found:
                found |= _seen_through(_shared(node, written=True))
        grown = len(found) > before
    return found


def _seen_through(views: set[fx.Node]) -> set[fx.Node]:
    """These nodes, and those that they are views of."""
    found, waiting = set(views), list(views)
    while waiting:
        new = _shared(waiting.pop(), written=False) - found
        found |= new
        waiting += new
    return found


def _shared(node: fx.Node, written: bool) -> set[fx.Node]:
    """The arguments that an operator may return a view of; with `written` those that it writes to."""
    if node.target is operator.getitem:
        return set() if written else set(node.all_input_nodes)
    schema, found = getattr(node.target, "_schema", None), set[fx.Node]()
    for k, argument in enumerate(schema.arguments if schema is not None else ()):
        if argument.alias_info is not None and (argument.alias_info.is_write or not written):
            given = node.args[k] if k < len(node.args) else node.kwargs.get(argument.name)
            found.update(n for n in (given if isinstance(given, list | tuple) else (given,)) if isinstance(n, fx.Node))
    return found


class CudaGraph:
    """A traced graph whose launches are recorded once on a GPU and repeated together.

    Args:
        graph: what `traced` gave.
        fixed: its first inputs, which are read where they lie, whatever they hold by then.
        given: its further inputs. Those of later calls are copied over these.
    """

    def __init__(self, graph: fx.GraphModule, fixed: Sequence[Tensor], given: Sequence[Tensor]) -> None:
        self._fixed, self._given = tuple(fixed), tuple(t.detach().clone() for t in given)
        beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(beside):  # what libraries set up at first use cannot be recorded
            graph(*self._fixed, *self._given)
        torch.cuda.current_stream().wait_stream(beside)
        self._recorded = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(self._recorded):
            self._found: list[Tensor] = graph(*self._fixed, *self._given)

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """Copies of what the graph gives for these inputs."""
        for mine, theirs in zip(self._given, tensors[len(self._fixed) :], strict=True):
            mine.copy_(theirs)
        self._recorded.replay()
        return [t.clone() for t in self._found]


def ready(graph: fx.GraphModule, fixed: Sequence[Tensor], given: Sequence[Tensor]) -> Callable[..., list[Tensor]]:
    """The graph to be called, without operators whose results nobody uses; a `CudaGraph` where all inputs are on a GPU.

    Args:
        graph: what `traced` gave.
        fixed: the first inputs, which later calls give again, with whatever values.
        given: the further inputs, of which later calls give others.
    """
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return CudaGraph(graph, fixed, given) if all(t.is_cuda for t in (*fixed, *given)) else graph


def saved_tensors_are_packed() -> bool:
    """Whether what operators keep for the backward goes through hooks just now: of a checkpoint, which recomputes it,
    or of `torch.autograd.graph.save_on_cpu`.

    Example:
        >>> with torch.autograd.graph.save_on_cpu():
        ...     saved_tensors_are_packed()
        True
        >>> saved_tensors_are_packed()
        False
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def unseen_by_modes() -> AbstractContextManager[None]:
    """A context in which an active `TorchFunctionMode` sees no call: for our own tensor work under our own mode."""
    context: AbstractContextManager[None] = torch._C.DisableTorchFunction()
    return context


def coarsest_epsilon(output: Tensor) -> float:
    """The largest machine epsilon among the results of the operators that `output` was differentiably made by.

    Under autocast that is bfloat16's, while weights and output are float32. Where torch multiplies float32 matrices in
    a shorter type (`torch.set_float32_matmul_precision`, convolutions on a GPU), that type counts.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> coarsest_epsilon(x.sum()) == torch.finfo(torch.float32).eps
        True
        >>> coarsest_epsilon(x.bfloat16().float().sum()) == torch.finfo(torch.bfloat16).eps
        True
    """
    largest, convolved = torch.finfo(output.dtype).eps, False
    for node in _nodes_behind(output):
        convolved = convolved or "Convolution" in node.name()
        for result in getattr(node, "_input_metadata", ()):
            if result.dtype.is_floating_point:
                largest = max(largest, torch.finfo(result.dtype).eps)
    single = largest >= torch.finfo(torch.float32).eps
    return max(largest, _short_products(output.is_cuda and convolved)) if single else largest


def _nodes_behind(output: Tensor) -> set[Any]:
    """The nodes of the graph that a tensor was differentiably made by."""
    waiting, seen = [output.grad_fn], set[Any]()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [parent for parent, _ in node.next_functions]
    return seen


def made_by_torch_alone(output: Tensor, but: Container[type[torch.autograd.Function]] = ()) -> bool:
    """Whether no backward behind `output` was written by somebody else, who may have meant it to run only once.

    Args:
        output: what is differentiated.
        but: functions of our own, which do not count.

    Example:
        >>> class Twice(torch.autograd.Function):
        ...     forward = staticmethod(lambda ctx, x: 2 * x)
        ...     backward = staticmethod(lambda ctx, g: 2 * g)
        >>> x = torch.ones(2, requires_grad=True)
        >>> made_by_torch_alone(x.exp()), made_by_torch_alone(Twice.apply(x).exp())
        (True, False)
        >>> made_by_torch_alone(Twice.apply(x).exp(), but=[Twice])
        True
    """
    for node in _nodes_behind(output):
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            if type(node)._forward_cls not in but:  # type: ignore[attr-defined]
                return False
        elif "CppNode" in node.name():
            return False
    return True


def _short_products(convolutions: bool) -> float:
    """The machine epsilon of the type in which float32 numbers are multiplied, where that is not float32."""
    kept = {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}[torch.get_float32_matmul_precision()]
    return max(kept, 2.0**-10) if convolutions and torch.backends.cudnn.allow_tf32 else kept


def under_functional_transform() -> bool:
    """Whether this code runs inside `torch.func.vmap` or `grad`, where tensors hide an axis or a level."""
    return torch._C._functorch.maybe_current_level() is not None


def view_base(tensor: Tensor) -> Tensor | None:
    """The tensor that a view looks into; None for a tensor that is no view.

    Example:
        >>> whole = torch.zeros(4)
        >>> view_base(whole[1:]) is whole, view_base(whole)
        (True, None)
    """
    return tensor._base if tensor._is_view() else None


def with_parameters(model: nn.Module, parameters: dict[str, Tensor]) -> AbstractContextManager[None]:
    """A context in which the model's named parameters, and all tied to them, are these tensors.

    `torch.func.functional_call` does this for one call of the model; a loss function calls the model itself.
    """
    context: AbstractContextManager[None] = _reparametrize_module(model, parameters, tie_weights=True)
    return context


def has_gradient_hooks(tensor: Tensor) -> bool:
    """Whether `tensor.register_hook` was used: such hooks change the gradient that arrives at the tensor."""
    return bool(tensor._backward_hooks)


def has_accumulation_hooks(tensor: Tensor) -> bool:
    """Whether `tensor.register_post_accumulate_grad_hook` was used: such hooks may change `.grad`."""
    return bool(tensor._post_accumulate_grad_hooks)


@lru_cache(maxsize=256)
def transparent(func: types.FunctionType) -> types.FunctionType:
    """A copy of a Python function of torch that lets an active mode see the calls in its body.

    A function such as `F.multi_head_attention_forward` starts by asking `has_torch_function(...)`, and, under an active
    mode, hands itself over as one call. In the copy that question is always answered no, so that its body runs and the
    mode meets the `linear` and `softmax` calls inside.
    """
    never = {n: lambda *_: False for n in func.__globals__ if n.startswith("has_torch_function")}
    copy = types.FunctionType(
        func.__code__, {**func.__globals__, **never}, func.__name__, func.__defaults__, func.__closure__
    )
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


def is_python_function_of_torch(func: Any) -> bool:
    """Whether `transparent` applies: a function of `torch.nn.functional` that is written in Python."""
    return isinstance(func, types.FunctionType) and func.__module__ == "torch.nn.functional"


def is_attribute_access(func: Any) -> bool:
    """Whether a call that a mode intercepts only reads or sets an attribute, such as `tensor.shape` or `tensor.T`."""
    return type(func) is types.MethodWrapperType


def scalers_alive() -> list[torch.amp.GradScaler]:
    """The gradient scalers of this process that have scaled a loss. Looks through all objects: a tenth of a second."""
    made = [o for o in gc.get_objects() if type(o).__name__ == "GradScaler" and isinstance(o, torch.amp.GradScaler)]
    return [s for s in made if s.is_enabled() and s._scale is not None]


def awaits_unscaling(scaler: torch.amp.GradScaler) -> bool:
    """Whether gradients of a loss that this scaler scaled are still scaled: no `unscale_` since its last `update`.

    Example:
        >>> scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        >>> weight = nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> scaler.scale(weight.sum()).backward()
        >>> awaits_unscaling(scaler)
        True
        >>> scaler.unscale_(optimizer)
        >>> awaits_unscaling(scaler)
        False
    """
    stages = [state["stage"].name for state in scaler._per_optimizer_states.values()]
    return scaler.get_scale() != 1 and not any(stage in ("UNSCALED", "STEPPED") for stage in stages)
