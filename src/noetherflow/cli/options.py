"""Options shared by the commands."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.console import Console

from noetherflow.core.adaptive import AdamConfig, LionConfig
from noetherflow.core.optimizers import Settings
from noetherflow.core.settings import SGDConfig
from noetherflow.workloads import BUILT_IN, CONTRACT

console = Console(stderr=True, highlight=False, emoji=False)


def announce(what: str, stages: int) -> Callable[[str], None]:
    """Say on standard error what comes; the function returned says each of its `stages` on a numbered line."""
    console.print(what, markup=False, soft_wrap=True)
    numbers = itertools.count(1)
    return lambda stage: console.print(f"[{next(numbers)}/{stages}] {stage}", markup=False, soft_wrap=True)


MODEL = (
    f"A built-in example ({', '.join(BUILT_IN)}), or package.module:factory with `{CONTRACT}`; "
    "the module is found from the current directory or PYTHONPATH."
)

Model = Annotated[str, typer.Argument(help=MODEL)]
ModelOnly = Annotated[
    str,
    typer.Argument(
        help=f"{MODEL} Here the factory may also return model, example_inputs. "
        "Or hf:PATH of a config.json or model folder."
    ),
]
ModelOf = Annotated[str, typer.Option("--model", help=f"The model of the checkpoint. {MODEL}")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


class OptimizerName(StrEnum):
    """The optimisers whose noise equilibrium is known."""

    sgd = "sgd"
    adam = "adam"
    adamw = "adamw"
    rmsprop = "rmsprop"
    lion = "lion"


class StateOrderName(StrEnum):
    """How optimiser state without names is assigned (`balance_checkpoint`)."""

    checked = "checked"
    parameters = "parameters"


LEARNING_RATES = {"sgd": 0.05, "adam": 1e-3, "adamw": 1e-3, "rmsprop": 1e-3, "lion": 1e-4}
"""Learning rates where none is given."""
Optimizer = Annotated[OptimizerName, typer.Option(help="The optimiser whose gradient noise is asked about.")]
Lr = Annotated[
    float | None, typer.Option(help="Learning rate; default: 0.05 for SGD, 0.001 for Adam, 0.0001 for Lion.")
]
BatchSize = Annotated[int, typer.Option(help="Samples per minibatch.")]
Betas = Annotated[
    tuple[float, float] | None,
    typer.Option(help="Adam's or Lion's two averaging rates; RMSprop's smoothing is the second."),
]
WeightDecay = Annotated[float, typer.Option(help="PyTorch weight_decay.")]
Momentum = Annotated[float, typer.Option(help="Heavy-ball momentum.")]
Nesterov = Annotated[bool, typer.Option("--nesterov", help="Nesterov's momentum instead of heavy-ball.")]
DatasetSize = Annotated[
    int | None,
    typer.Option(help="Batches are drawn without replacement from this many samples; default: fresh data."),
]
Data = Annotated[
    str | None,
    typer.Option(
        help="Data instead of the model's own: a .npz or .safetensors file with x and y, or package.module:function."
    ),
]


@dataclass(frozen=True)
class GivenSettings:
    """The options of a command that say how the optimiser steps."""

    optimizer: OptimizerName
    lr: float | None
    batch_size: int
    weight_decay: float
    momentum: float = 0.0
    nesterov: bool = False
    dataset_size: int | None = None
    betas: tuple[float, float] | None = None

    def settings(self) -> Settings:
        """The settings that they make.

        Raises:
            BadParameter: momentum for an optimiser that has betas, or betas for SGD.
            DataError: a value out of its range.
        """
        name = self.optimizer.value
        lr = LEARNING_RATES[name] if self.lr is None else self.lr
        if name == "sgd":
            if self.betas is not None:
                raise typer.BadParameter("--betas goes with adam, adamw, rmsprop and lion; SGD has --momentum")
            return SGDConfig(lr, self.batch_size, self.weight_decay, self.momentum, self.nesterov, self.dataset_size)
        if self.momentum or self.nesterov:
            raise typer.BadParameter("--momentum and --nesterov go with --optimizer sgd; use --betas")
        rates: dict[str, Any] = {} if self.betas is None else {"betas": self.betas}
        if name == "rmsprop":
            rates = {"betas": (0.0, 0.99 if self.betas is None else self.betas[1])}
        if name == "lion":
            return LionConfig(
                lr, self.batch_size, weight_decay=self.weight_decay, dataset_size=self.dataset_size, **rates
            )
        return AdamConfig(
            lr,
            self.batch_size,
            weight_decay=self.weight_decay,
            decoupled=name == "adamw",
            dataset_size=self.dataset_size,
            **rates,
        )
