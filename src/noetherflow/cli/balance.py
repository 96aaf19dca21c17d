"""`noetherflow balance`: move a checkpoint along its orbit without changing the function it computes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from torch import nn

from noetherflow.cli import tables
from noetherflow.cli.options import (
    MODEL,
    BatchSize,
    Betas,
    Data,
    DatasetSize,
    Debug,
    GivenSettings,
    Json,
    Momentum,
    Nesterov,
    Optimizer,
    OptimizerName,
    StateOrderName,
    WeightDecay,
    announce,
    console,
)
from noetherflow.cli.output import emit

if TYPE_CHECKING:
    from noetherflow.balance.model import BalanceReport
    from noetherflow.discovery import Certificate
    from noetherflow.equilibrium import Equilibrium


OBJECTIVE = (
    "Where to: norm (least norm) and range (equal ranges, for quantisation) need no data; noise+decay or noise (the "
    "noise equilibrium with or without weight decay) and fisher need a model with loss and data. Or one that is "
    "registered with noetherflow.extend.objective."
)
SOURCE = (
    "Checkpoint to read: a .safetensors or PyTorch file, an index of shards, or a folder (save_pretrained, a Trainer's "
    "checkpoint-1000/)."
)
OF_MODEL = f"The model of the checkpoint. {MODEL} Or hf:PATH; by default the config.json in the folder."


@dataclass(frozen=True)
class FileChoice:
    """The options that say which files are read and written."""

    source: Path
    target: Path
    key: str | None
    prefix: str | None
    state_order: StateOrderName
    tolerance: float | None
    dry_run: bool

    def move(
        self, model: nn.Module, eq: Equilibrium, example_inputs: Any, certificate: Certificate | None, unchecked: bool
    ) -> BalanceReport:
        """Write the moved checkpoint, or say what would move."""
        from noetherflow.balance.checkpoint import balance_checkpoint

        with console.status("moving the checkpoint") as status:
            return balance_checkpoint(
                self.source,
                self.target,
                model,
                eq,
                example_inputs=example_inputs,
                certificate=certificate,
                tolerance=self.tolerance,
                unchecked=unchecked,
                dry_run=self.dry_run,
                state_order=self.state_order.value,
                key=self.key,
                prefix=self.prefix,
                progress=lambda name: status.update(f"moving the checkpoint: {name}"),
            )

    def load(self, model: nn.Module) -> None:
        """Load the checkpoint into the model."""
        from noetherflow.balance.checkpoint import load_checkpoint_

        load_checkpoint_(model, self.source, key=self.key, prefix=self.prefix)


def balance(
    source: Annotated[Path, typer.Argument(help=SOURCE)],
    objective: Annotated[str, typer.Option(help=OBJECTIVE)],
    model: Annotated[str | None, typer.Option("--model", help=OF_MODEL)] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write: a file, or a new folder for a folder.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Show what would move; write nothing.")] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Never load the model (norm, range): for models larger than memory.")
    ] = False,
    certify: Annotated[
        bool, typer.Option(help="Certify every symmetry before it moves; without it outputs alone are compared.")
    ] = True,
    data: Data = None,
    optimizer: Optimizer = OptimizerName.sgd,
    lr: Annotated[float | None, typer.Option(help="Learning rate; asked for where the answer depends on it.")] = None,
    batch_size: BatchSize = 16,
    weight_decay: WeightDecay = 0.0,
    momentum: Momentum = 0.0,
    nesterov: Nesterov = False,
    betas: Betas = None,
    dataset_size: DatasetSize = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest relative change of outputs; default: by the dtypes.")
    ] = None,
    state_order: Annotated[
        StateOrderName,
        typer.Option(help="Optimiser state without names: checked (where shapes prove it), or parameters (you vouch)."),
    ] = StateOrderName.checked,
    key: Annotated[str | None, typer.Option(help="Where the weights lie in a PyTorch file, as ema.model.")] = None,
    prefix: Annotated[
        str | None, typer.Option(help="What the names in the file have in front; found if left out.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write SOURCE, moved to another point of its orbit, to OUT; symmetries that an eps makes approximate stay.

    The function stays. Files and folders are written beside the target and renamed, whole or not at all.

    \f
    Its parameters are many because each is an option of the command line.
    """
    from noetherflow.balance.checkpoint import check_target

    chosen = _moments_needed(objective)
    if not dry_run:
        if out is None:
            raise typer.BadParameter("give --out PATH, or --dry-run to write nothing")
        check_target(out, folder=source.is_dir() or source.name.endswith(".index.json"))
    files = FileChoice(source, out or source, key, prefix, state_order, tolerance, dry_run)
    spec = model_of(source, model)
    if chosen == "none":
        if stream:
            eq, report = _streamed(files, spec, objective)
        else:
            eq, report = _without_data(files, spec, objective, certify)
    else:
        if stream:
            raise typer.BadParameter(f"--stream goes with --objective norm or range; {objective} needs gradients")
        given = GivenSettings(optimizer, lr, batch_size, weight_decay, momentum, nesterov, dataset_size, betas)
        eq, report = _with_data(files, spec, objective, _explicit(given), data, certify)
    if as_json:
        emit({"balance": report.to_dict(), "equilibrium": eq.to_dict()})
        return
    _print(report, eq, "would move" if dry_run else f"written to {out}")


def _moments_needed(objective: str) -> str:
    """Which moments an objective needs. Refuses an unknown one, or one that gradients do not determine, before anything
    is measured.
    """
    from noetherflow.equilibrium.objective import objective_of

    needed: str = objective_of(objective).moments
    if needed == "curvature":
        raise typer.BadParameter(f"{objective} needs curvature moments; use nf.balance_checkpoint in Python")
    return needed


def model_of(source: Path, model: str | None) -> str:
    """The model asked for, or the one whose configuration lies in the folder."""
    if model is not None:
        return model
    folder = source if source.is_dir() else source.parent
    if (folder / "config.json").is_file():
        return f"hf:{folder}"
    raise typer.BadParameter(f"give --model: {folder} has no config.json that says which model this is")


def _explicit(given: GivenSettings) -> GivenSettings:
    """The settings, where none that matters is left to a default."""
    matters = given.optimizer is not OptimizerName.sgd or given.weight_decay or given.momentum
    if given.lr is None and matters:
        raise typer.BadParameter(
            "give --lr, the learning rate of your training: the equilibrium depends on it (for plain SGD without decay "
            "it does not)"
        )
    return given


def _streamed(files: FileChoice, spec: str, objective: str) -> tuple[Equilibrium, BalanceReport]:
    """Tensor by tensor, the model on the meta device."""
    from noetherflow.balance.stored_norm import stored_equilibrium
    from noetherflow.cli.models import load_model
    from noetherflow.discovery import find_symmetries

    console.print(
        "warning: --stream moves unchecked: symmetries are neither certified nor are outputs compared. Certify them "
        "on a small model of the same architecture (noetherflow find hf:CONFIG --certify)"
    )
    loaded = load_model(spec)
    with console.status("tracing the model"):
        syms = find_symmetries(loaded.model, loaded.example_inputs)
    with console.status("solving") as status:
        progress = lambda name: status.update(f"solving: {name}")
        eq = stored_equilibrium(
            files.source,
            loaded.model,
            syms,
            objective=objective,
            key=files.key,
            prefix=files.prefix,
            progress=progress,
        )
    return eq, files.move(loaded.model, eq, None, None, unchecked=True)


def _without_data(files: FileChoice, spec: str, objective: str, certified: bool) -> tuple[Equilibrium, BalanceReport]:
    """With the model in memory, for objectives that need no gradients."""
    from noetherflow.cli.models import load_model
    from noetherflow.discovery import certify, find_symmetries
    from noetherflow.equilibrium import noise_equilibrium

    loaded = load_model(spec, materialise=True)
    model = wide(loaded.model).eval()
    files.load(model)
    say = announce(f"{files.source}: seconds for tracing and checking", 4)
    say("tracing the model")
    syms = find_symmetries(model, loaded.example_inputs).trainable(model)
    certificate = None
    if certified:
        say("certifying the symmetries (--no-certify leaves that out)")
        certificate = certify(model, syms, loaded.example_inputs)
        syms = syms.without(certificate.refused)
    else:
        say(NOT_CERTIFIED)
    say("solving")
    eq = noise_equilibrium(model, syms, None, objective=objective, approximate=False)
    say("moving the checkpoint")
    return eq, files.move(model, eq, loaded.example_inputs, certificate, unchecked=False)


def wide(model: nn.Module) -> nn.Module:
    """The model in float32 where it was loaded in half precision, so that outputs can be compared."""
    return model.float() if any(p.element_size() < 4 for p in model.parameters()) else model


NOT_CERTIFIED = "warning: not certified; outputs on the example inputs are compared, nothing else"


def _with_data(
    files: FileChoice, spec: str, objective: str, given: GivenSettings, data: str | None, certified: bool
) -> tuple[Equilibrium, BalanceReport]:
    """With gradients, from a model with its loss and data."""
    from noetherflow.measured import measure
    from noetherflow.workloads import load_workload

    sgd = given.settings()
    if spec.startswith("hf:"):
        raise typer.BadParameter(
            f"{objective} needs gradients: give --model package.module:factory with loss and data, or --objective norm"
        )
    workload = load_workload(spec, data)
    files.load(workload.model)
    say = announce(
        f"{files.source}: seconds for tracing, then a few gradient passes over {workload.samples:,} samples", 5
    )
    if not certified:
        console.print(NOT_CERTIFIED, markup=False, soft_wrap=True)
    measured = measure(
        workload.model,
        workload.loss_fn,
        workload.batches,
        workload.example_inputs,
        certified=certified,
        progress=say,
    )
    say("solving for the equilibrium")
    eq = measured.equilibrium(workload.model, sgd, objective=objective, approximate=False)
    say("moving the checkpoint")
    return eq, files.move(workload.model, eq, workload.example_inputs, measured.certificate, unchecked=False)


def _print(report: BalanceReport, eq: Equilibrium, title: str) -> None:
    """The equilibrium, what moved, how the outputs changed, and what speaks against it."""
    from noetherflow.balance.advice import against, by_layer

    printed = tables.out()
    printed.print(str(eq), markup=False)
    tables.of_rows(printed, by_layer(report.moved), title)
    printed.print(str(report), markup=False)
    for line in against(eq, report):
        printed.print(f"consider: {line}", markup=False)
