"""`noetherflow analyze`: charges, drift, equilibrium and relaxation times of a model at its present point."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from noetherflow.cli import tables
from noetherflow.cli.options import (
    BatchSize,
    Betas,
    Data,
    Debug,
    GivenSettings,
    Json,
    Lr,
    Model,
    Momentum,
    Optimizer,
    OptimizerName,
    WeightDecay,
    announce,
)
from noetherflow.cli.output import check_output, emit
from noetherflow.core.optimizers import described
from noetherflow.core.printing import legend, transposed


def analyze(
    model: Model,
    data: Data = None,
    optimizer: Optimizer = OptimizerName.sgd,
    lr: Lr = None,
    batch_size: BatchSize = 16,
    weight_decay: WeightDecay = 0.0,
    momentum: Momentum = 0.0,
    betas: Betas = None,
    finite_data: Annotated[
        bool, typer.Option(help="Batches are drawn without replacement from exactly this data.")
    ] = False,
    steps: Annotated[int | None, typer.Option(help="Steps of training still to come, for the diagnosis.")] = None,
    warmup: Annotated[
        int | None, typer.Option(help="Steps of learning rate warmup planned; their number is checked.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write a self-contained HTML page here.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure MODEL once; say what gradient noise does along its symmetries, what to watch and what to change.

    \f
    Its parameters are many because each is an option of the command line.
    """
    from noetherflow.analysis import analyze as run
    from noetherflow.equilibrium.flow import EXPLAINED
    from noetherflow.report.analysis import write_analysis
    from noetherflow.workloads import load_workload

    if report is not None:
        check_output(report)
    workload = load_workload(model, data)
    size = workload.samples if finite_data else None
    sgd = GivenSettings(optimizer, lr, batch_size, weight_decay, momentum, dataset_size=size, betas=betas).settings()
    say = announce(f"{model}: seconds for tracing, then a few gradient passes over {workload.samples:,} samples", 6)
    options: dict[str, Any] = {"steps": steps, "warmup": warmup, "progress": say}
    analysis = run(workload.model, workload.loss_fn, workload.batches, sgd, workload.example_inputs, **options)
    if report is not None:
        write_analysis(report, analysis, title=model)
    if as_json:
        emit({"model": model, **analysis.to_dict()})
        return
    printed = tables.out()
    tables.symmetries(printed, analysis.symmetries, title=model)
    printed.print(str(analysis.certificate), markup=False)
    plain = optimizer is OptimizerName.sgd
    title = f"Noether flow at lr {sgd.lr:g}, batch size {batch_size}" if plain else f"Noether flow of {described(sgd)}"
    for part in analysis.unanswered:
        printed.print(f"{part.title} {part.advice}", markup=False)
    if not analysis.unanswered:
        tables.of_rows(printed, transposed(analysis.rows()), title)
        printed.print(legend(*EXPLAINED), markup=False)
        printed.print(str(analysis.equilibrium), markup=False)
    if analysis.curvature is not None:
        printed.print(str(analysis.curvature), markup=False)
    printed.print(f"\n{analysis.diagnosis}", markup=False)
    if report is not None:
        printed.print(f"report: {report.resolve()}", markup=False, soft_wrap=True)
