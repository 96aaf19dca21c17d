"""`noetherflow balance`: move a checkpoint to the noise equilibrium without changing the function it computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from noetherflow.cli import tables
from noetherflow.cli.options import BatchSize, Data, Debug, Json, Lr, Momentum, WeightDecay, console
from noetherflow.sgd import SGDConfig


def balance(
    source: Annotated[Path, typer.Argument(help="Checkpoint to read (.safetensors or a PyTorch state dict).")],
    model: Annotated[str, typer.Option(help="The model it belongs to: a built-in example or package.module:factory.")],
    out: Annotated[Path | None, typer.Option(help="Where to write the balanced checkpoint.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Show what would move; write nothing.")] = False,
    data: Data = None,
    lr: Lr = 0.05,
    batch_size: BatchSize = 16,
    weight_decay: WeightDecay = 0.0,
    momentum: Momentum = 0.0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write SOURCE, moved to the noise equilibrium, to OUT; symmetries that an eps makes approximate stay in place.

    The file is replaced whole or not at all.
    """
    from noetherflow.analysis import analyze
    from noetherflow.checkpoint import balance_checkpoint, load_checkpoint_
    from noetherflow.workloads import load_workload

    if out is None and not dry_run:
        raise typer.BadParameter("give --out FILE, or --dry-run to write nothing")
    workload = load_workload(model, data)
    load_checkpoint_(workload.model, source)
    sgd = SGDConfig(lr, batch_size, weight_decay, momentum)
    inputs = workload.example_inputs
    with console.status("starting") as status:
        analysis = analyze(
            workload.model,
            workload.loss_fn,
            workload.batches,
            sgd,
            inputs,
            approximate=False,
            progress=status.update,
        )
    report = balance_checkpoint(
        source,
        out or source,
        workload.model,
        analysis.equilibrium,
        example_inputs=inputs,
        certificate=analysis.certificate,
        dry_run=dry_run,
    )
    if as_json:
        print(json.dumps({"balance": report.to_dict(), "equilibrium": analysis.equilibrium.to_dict()}))
        return
    printed = tables.out()
    printed.print(str(analysis.equilibrium), markup=False)
    tables.of_rows(printed, report.rows(), "would move" if dry_run else f"written to {out}")
    printed.print(str(report), markup=False)
