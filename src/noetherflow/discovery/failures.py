"""Why a model cannot be traced or run, in words that name the cause."""

from __future__ import annotations

import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from noetherflow.core.inputs import ModelInputs

FOREIGN = (Path(torch.__file__).parent, Path(__file__).parent)
"""Folders whose files are not the user's code."""
STANDARD_LIBRARY = Path(traceback.__file__).parent


@dataclass(frozen=True)
class Cause:
    """A reason why tracing fails: words of torch's message, or a function that was running, and what to do."""

    words: str
    remedy: str
    function: str = ""


DECLARE = "name the symmetries yourself: nf.declare(model, kind, plus=[(parameter, axis)], minus=[...])"
CAUSES = (
    Cause(
        "",
        "The model looks for padding tokens because it was given no mask: add attention_mask to the example inputs",
        function="warn_if_padding_and_no_attention_mask",
    ),
    Cause("Couldn't swap", "The forward casts or moves its own weights: do that once, outside forward"),
    Cause("incompatible tensor type", "The forward casts or moves its own weights: do that once, outside forward"),
    Cause(".numpy() is not supported", f"The forward leaves torch (.numpy()): keep to torch operators, or {DECLARE}"),
    Cause("past_key_values", "Pass use_cache=False: caches are no part of the function"),
)
OTHERWISE = (
    "torch.export needs control flow that does not depend on tensor values. Rewrite that branch (torch.where, "
    f"torch.cond), or {DECLARE}."
)


def explain_failure(model: nn.Module, example_inputs: Any, failure: Exception | None) -> str:
    """What to tell the user when tracing has failed.

    Args:
        model: the model itself; it is run once, without gradients.
        example_inputs: as given by the user.
        failure: what torch raised.

    Returns:
        The model's own error on these inputs if it has one; else torch's message with the place in the user's code and
        what to do about it.
    """
    if (own := own_failure(model, example_inputs)) is not None:
        return own
    return f"{type(model).__name__} could not be exported: {first_line(failure)}{place(failure)}\n{_remedy(failure)}"


def _remedy(failure: Exception | None) -> str:
    frames = traceback.extract_tb(None if failure is None else failure.__traceback__)
    running = {frame.name for frame in frames}
    for cause in CAUSES:
        if cause.function in running if cause.function else cause.words in str(failure):
            return cause.remedy
    return OTHERWISE


def place(failure: Exception | None) -> str:
    """` (file:line: code)` of the innermost line outside torch, this library and Python's own."""
    frames = traceback.extract_tb(None if failure is None else failure.__traceback__)
    user = [f for f in frames if f.line and not _foreign(Path(f.filename))]
    return f" ({user[-1].filename}:{user[-1].lineno}: {user[-1].line})" if user else ""


def _foreign(file: Path) -> bool:
    return file.parent == STANDARD_LIBRARY or any(folder in file.parents for folder in FOREIGN)


def own_failure(model: nn.Module, example_inputs: Any) -> str | None:
    """What to tell the user where a plain forward raises, None if it runs."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    inputs = ModelInputs.of(example_inputs).map(lambda x: x.to(dtype) if x.is_floating_point() else x)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            buffers = {n: b.clone() for n, b in model.named_buffers()}
            torch.func.functional_call(model, buffers, inputs.args, inputs.kwargs)
    except Exception as error:
        failed = f"{type(error).__name__}: {first_line(error)}"
        return (
            f"{type(model).__name__} itself fails on these example inputs, {failed}\n"
            f"Their shapes: {inputs.shapes()}. Pass a tensor, a tuple of arguments or a dict of keyword arguments."
        )
    return None


def first_line(error: Exception | None) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
