"""`noetherflow balance`: move a checkpoint to the noise equilibrium without changing the function it computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from noetherflow.cli import tables
from noetherflow.cli.options import (
    BatchSize,
    Betas,
    Data,
    DatasetSize,
    Debug,
    GivenSettings,
    Json,
    Lr,
    ModelOf,
    Momentum,
    Nesterov,
    Optimizer,
    OptimizerName,
    WeightDecay,
    announce,
)

if TYPE_CHECKING:
    from noetherflow.balance.model import BalanceReport
    from noetherflow.equilibrium import Equilibrium


OBJECTIVE = (
    "Where to: noise+decay or noise (the noise equilibrium with or without weight decay), norm (least norm), fisher "
    "(least trace of the Fisher matrix), or one that is registered with noetherflow.extend.objective."
)


def _check(objective: str) -> None:
    """Refuse an unknown objective, or one that gradients do not determine, before anything is measured."""
    from noetherflow.equilibrium.objective import objective_of

    if objective_of(objective).moments == "curvature":
        raise typer.BadParameter(f"{objective} needs curvature moments; use nf.balance_checkpoint in Python")


def balance(
    source: Annotated[Path, typer.Argument(help="Checkpoint to read (.safetensors or a PyTorch state dict).")],
    model: ModelOf,
    out: Annotated[Path | None, typer.Option(help="Where to write the balanced checkpoint.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Show what would move; write nothing.")] = False,
    data: Data = None,
    optimizer: Optimizer = OptimizerName.sgd,
    lr: Lr = None,
    batch_size: BatchSize = 16,
    weight_decay: WeightDecay = 0.0,
    momentum: Momentum = 0.0,
    nesterov: Nesterov = False,
    betas: Betas = None,
    dataset_size: DatasetSize = None,
    objective: Annotated[str, typer.Option(help=OBJECTIVE)] = "noise+decay",
    tolerance: Annotated[
        float | None, typer.Option(help="Largest relative change of outputs; default: by the dtypes.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write SOURCE, moved to the noise equilibrium, to OUT; symmetries that an eps makes approximate stay in place.

    The file is replaced whole or not at all.

    \f
    Its parameters are many because each is an option of the command line.
    """
    from noetherflow.analysis import measure
    from noetherflow.balance.checkpoint import balance_checkpoint, check_target, load_checkpoint_
    from noetherflow.workloads import load_workload

    _check(objective)
    if not dry_run:
        if out is None:
            raise typer.BadParameter("give --out FILE, or --dry-run to write nothing")
        check_target(out)
    given = GivenSettings(optimizer, lr, batch_size, weight_decay, momentum, nesterov, dataset_size, betas)
    sgd = given.settings()
    workload = load_workload(model, data)
    load_checkpoint_(workload.model, source)
    say = announce(f"{source}: seconds for tracing, then a few gradient passes over {workload.samples:,} samples", 5)
    measured = measure(workload.model, workload.loss_fn, workload.batches, workload.example_inputs, progress=say)
    say("solving for the equilibrium")
    eq = measured.equilibrium(workload.model, sgd, objective=objective, approximate=False)
    say("moving the checkpoint")
    report = balance_checkpoint(
        source,
        out or source,
        workload.model,
        eq,
        example_inputs=workload.example_inputs,
        certificate=measured.certificate,
        tolerance=tolerance,
        dry_run=dry_run,
    )
    if as_json:
        print(json.dumps({"balance": report.to_dict(), "equilibrium": eq.to_dict()}))
        return
    _print(report, eq, "would move" if dry_run else f"written to {out}")


def _print(report: BalanceReport, eq: Equilibrium, title: str) -> None:
    """The equilibrium, what moved, and how the outputs changed."""
    printed = tables.out()
    printed.print(str(eq), markup=False)
    tables.of_rows(printed, report.rows(), title)
    printed.print(str(report), markup=False)
