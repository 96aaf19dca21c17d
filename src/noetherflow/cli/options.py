"""Options shared by the commands."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console

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
Lr = Annotated[float, typer.Option(help="SGD learning rate.")]
BatchSize = Annotated[int, typer.Option(help="SGD batch size.")]
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
