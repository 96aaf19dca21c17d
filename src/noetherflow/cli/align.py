"""`noetherflow align`: bring one checkpoint closest to another without changing the function it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from noetherflow.cli import tables
from noetherflow.cli.balance import OF_MODEL, model_of, wide
from noetherflow.cli.options import Debug, Json, announce
from noetherflow.cli.output import emit


def align(
    approached: Annotated[Path, typer.Argument(help="The checkpoint to come close to; only read.")],
    source: Annotated[Path, typer.Argument(help="The checkpoint to move: a file or folder, as for balance.")],
    model: Annotated[str | None, typer.Option("--model", help=OF_MODEL)] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write: a file, or a new folder for a folder.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Print the distances; write nothing.")] = False,
    permutations: Annotated[bool, typer.Option(help="Units may change places, not only be scaled and mixed.")] = True,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest relative change of outputs; default: by the dtypes.")
    ] = None,
    key: Annotated[str | None, typer.Option(help="Where the weights lie in PyTorch files, as ema.model.")] = None,
    prefix: Annotated[str | None, typer.Option(help="What the names have in front; found if left out.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write SOURCE, moved on its orbit as close as it gets to APPROACHED, to OUT: the step before weights are averaged.

    The function stays, which is tried on example inputs. Both models are held in memory.

    \f
    Its parameters are many because each is an option of the command line.
    """
    from noetherflow.balance.align_file import align_checkpoint
    from noetherflow.cli.models import load_model
    from noetherflow.discovery import find_symmetries

    if out is None and not dry_run:
        raise typer.BadParameter("give --out PATH, or --dry-run to write nothing")
    loaded = load_model(model_of(source, model), materialise=True)
    say = announce(f"{source}: seconds for tracing, more for the alignment", 2)
    say("tracing the model")
    own = wide(loaded.model).eval()
    syms = find_symmetries(own, loaded.example_inputs).trainable(own)
    say(f"bringing it closest to {approached}")
    found = align_checkpoint(
        approached,
        source,
        out or source,
        own,
        syms,
        permutations=permutations,
        tolerance=tolerance,
        dry_run=dry_run,
        key=key,
        prefix=prefix,
    )
    if as_json:
        emit(found.to_dict())
        return
    printed = tables.out()
    printed.print(str(found), markup=False, soft_wrap=True)
    printed.print("nothing written" if dry_run else f"written to {out}", markup=False, soft_wrap=True)
