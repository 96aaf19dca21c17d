"""`noetherflow flow`: the Noether flow of a run from its checkpoint and optimiser state, without data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from noetherflow.cli import tables
from noetherflow.cli.options import MODEL, Debug, Json, console
from noetherflow.cli.output import emit


def flow(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(
            metavar="CHECKPOINT...",
            help="Folder with weights and optimizer.pt (or .safetensors), as the Hugging Face Trainer writes it, or "
            "one file with both. Several of one run are averaged, with errors from their scatter.",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", help=f"{MODEL} Or hf:PATH of a config.json; by default the folder's own config.json."),
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate, where a schedule has taken the stored one to 0.")
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="One row per symmetry below the table of families.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="What the numbers rest on in full sentences.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Where the charges of a run drift and settle, read off the averages that its optimiser keeps.

    For SGD with momentum, Adam, AdamW and RMSprop; needs no data, no loss and no backward pass.
    """
    from noetherflow import discovery
    from noetherflow.balance.run_files import read_run, weights_for
    from noetherflow.cli.models import load_model
    from noetherflow.equilibrium.state_flow import RunSnapshot, state_flow

    if model is None and checkpoints[-1].is_file():
        raise typer.BadParameter(
            f"{checkpoints[-1]} is one file, which does not say what the model is: pass --model package.module:factory "
            "or --model hf:PATH of its config.json"
        )
    loaded = load_model(f"hf:{checkpoints[-1]}" if model is None else model)
    with console.status("tracing the model"):
        syms = discovery.find_symmetries(loaded.model, loaded.example_inputs)
    with console.status(f"reading {', '.join(map(str, checkpoints))}"):
        runs = [read_run(path) for path in checkpoints]
        snapshots = [RunSnapshot(r.optimizer, weights_for(loaded.model, r.weights), lr) for r in runs]
        found = state_flow(loaded.model, syms, snapshots)
    if as_json:
        emit({"checkpoint": ", ".join(map(str, checkpoints)), **found.to_dict()})
        return
    printed = tables.out()
    printed.print(found.describe(verbose=verbose), markup=False, soft_wrap=True)
    if layers:
        tables.of_rows(printed, found.rows(), "by symmetry: norms over its coordinates, medians and largest values")
