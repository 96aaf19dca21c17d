"""`noetherflow find`: the symmetries of a model, and why a parameter has or lacks one."""

from __future__ import annotations

from typing import Annotated

import typer

from noetherflow.cli import tables
from noetherflow.cli.options import Debug, Json, ModelOnly, console
from noetherflow.cli.output import emit


def find(
    model: ModelOnly,
    explain: Annotated[
        str | None, typer.Option(help="Say which operators carry or kill the gauge of this parameter.")
    ] = None,
    certify: Annotated[
        bool, typer.Option(help="Check every symmetry numerically in float64 (needs the weights in memory).")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the continuous parameter symmetries of MODEL."""
    from noetherflow import discovery
    from noetherflow.cli.models import load_model

    loaded = load_model(model, materialise=certify)
    if explain is not None:
        print(discovery.explain(loaded.model, loaded.example_inputs, explain))
        return
    with console.status(f"tracing {model}"):
        syms = discovery.find_symmetries(loaded.model, loaded.example_inputs)
    certificate = None
    if certify:
        with console.status("certifying"):
            certificate = discovery.certify(loaded.model, syms, loaded.example_inputs)
    if as_json:
        payload = {"model": model, **syms.to_dict()}
        emit(payload | ({"certificate": certificate.to_dict()} if certificate else {}))
        return
    printed = tables.out()
    tables.symmetries(printed, syms, title=model)
    if certificate is not None:
        printed.print(str(certificate), markup=False, soft_wrap=True)
