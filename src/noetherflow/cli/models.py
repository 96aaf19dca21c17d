"""Turn the MODEL argument into a model and example inputs."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from noetherflow.workloads import load_workload


class LoadedModel(NamedTuple):
    model: nn.Module
    example_inputs: Any


def load_model(spec: str, materialise: bool = False) -> LoadedModel:
    """A model to trace: from a Hugging Face configuration (on the meta device unless `materialise`) or a workload.

    Raises DataError for a spec that cannot be loaded.
    """
    if spec.startswith("hf:"):
        from noetherflow.discovery.hf import load_hf

        return LoadedModel(*load_hf(spec.removeprefix("hf:"), device="cpu" if materialise else "meta"))
    workload = load_workload(spec)
    return LoadedModel(workload.model, workload.example_inputs)
