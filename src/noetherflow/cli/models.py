"""Turn the MODEL argument into a model and example inputs."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from noetherflow.workloads import as_workload, make


class LoadedModel(NamedTuple):
    model: nn.Module
    example_inputs: Any


def load_model(spec: str, materialise: bool = False) -> LoadedModel:
    """A model to trace: from a Hugging Face configuration (on the meta device unless `materialise`), a factory that
    returns `(model, example_inputs)`, or a workload.

    Raises DataError for a spec that cannot be loaded.
    """
    if spec.startswith("hf:"):
        from noetherflow.discovery.hf import load_hf

        return LoadedModel(*load_hf(spec.removeprefix("hf:"), device="cpu" if materialise else "meta"))
    made = make(spec)
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module):
        return LoadedModel(*made)
    workload = as_workload(spec, made)
    return LoadedModel(workload.model, workload.example_inputs)
