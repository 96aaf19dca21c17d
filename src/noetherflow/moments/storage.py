"""Gradient moments on disk: one safetensors file, written atomically."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from noetherflow.core.arguments import MOMENTS, expect
from noetherflow.core.files import replacing
from noetherflow.errors import CheckpointError
from noetherflow.moments.conditions import Conditions
from noetherflow.moments.packed import Held, PackedTensor, PackedTensors, ProductTensor
from noetherflow.moments.products import Factors
from noetherflow.moments.result import GradientMoments, Replicates

FORMAT = 3
"""1 kept the groups' mean gradients and squares in float64, 2 knew no products of factors; all are read."""


UNRECORDED = Conditions(rounding=torch.finfo(torch.bfloat16).eps)
"""Of files written before conditions were: any arithmetic."""


def save_moments(moments: GradientMoments, path: str | Path) -> None:
    """Write moments and their groups to one safetensors file; a reader never sees half a file.

    Args:
        moments: what to write.
        path: where; an existing file is replaced.
    """
    from safetensors.torch import save

    expect("save_moments(moments, path)", "moments", moments, GradientMoments, MOMENTS)
    tensors = _tensors(moments, "")
    for k, group in enumerate(moments.groups):
        tensors |= _tensors(group, f"{k}/")
    header = {"format": FORMAT, **_header(moments), "groups": [_header(g) for g in moments.groups]}
    data = save(_apart(tensors), metadata={"noetherflow": json.dumps(header)})
    with replacing(path, durable=True) as scratch:
        scratch.write_bytes(data)


def load_moments(path: str | Path) -> GradientMoments:
    """Read what `save_moments` wrote.

    Raises:
        CheckpointError: another or a damaged file.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "moments.safetensors"
        >>> model = nn.Linear(3, 2)
        >>> syms = nf.declare(model, "diagonal", [("weight", 0)])
        >>> moments = nf.gradient_moments(model, lambda m, b: m(b).square().sum(1), [torch.ones(4, 3)], syms)
        >>> nf.save_moments(moments, path)
        >>> nf.load_moments(path).samples
        4
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("noetherflow", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as cause:
        raise CheckpointError(f"{path} holds no gradient moments: {cause}") from cause
    if header.get("format") not in range(1, FORMAT + 1):
        raise CheckpointError(f"{path} has moments format {header.get('format')!r}, this version reads {FORMAT}")
    groups = tuple(_unpack(g, f"{k}/", tensors) for k, g in enumerate(header["groups"]))
    return _unpack(header, "", tensors, groups)


def _tensors(moments: GradientMoments, prefix: str) -> dict[str, Tensor]:
    """All tensors of moments, without those of their groups, under names that begin with `prefix`."""
    named = [(f"{prefix}second/{k}/{name}", leg) for name, legs in moments.second.items() for k, leg in enumerate(legs)]
    found = {name: leg.contiguous() for name, leg in named}
    for name, factors in moments.factors.items():
        found |= {
            f"{prefix}left/{name}": factors.left.contiguous(),
            f"{prefix}right/{name}": factors.right.contiguous(),
        }
    return found | _flat(f"{prefix}mean", moments.mean) | _flat(f"{prefix}squares", moments.squares)


def _header(moments: GradientMoments) -> dict[str, Any]:
    """All but the tensors, for JSON."""
    return {
        "kind": moments.kind,
        "samples": moments.samples,
        "loss": moments.loss,
        "second": {name: len(legs) for name, legs in moments.second.items()},
        "mean": list(moments.mean),
        "squares": list(moments.squares),
        "factors": list(moments.factors),
        "packed": _dtypes(moments.mean) | _dtypes(moments.squares),
        "products": _products(moments.mean),
        "fallback": list(moments.fallback),
        "unresolved": list(moments.unresolved),
        "replicates": moments.to_dict()["replicates"],
        "legs": moments.legs,
        "conditions": asdict(moments.conditions),
    }


def _flat(prefix: str, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under their names in the file; beside the codes of a packed one their scales, beside the left factor
    of a product the right one.
    """
    out: dict[str, Tensor] = {}
    for name, t in (named.held if isinstance(named, PackedTensors) else named).items():
        if isinstance(t, PackedTensor):
            out |= {f"{prefix}/{name}": t.codes, f"{prefix}-scales/{name}": t.scales}
        elif isinstance(t, ProductTensor):
            out |= {f"{prefix}/{name}": t.left.contiguous(), f"{prefix}-right/{name}": t.right.contiguous()}
        else:
            assert isinstance(t, Tensor)
            out[f"{prefix}/{name}"] = t.contiguous()
    return out


def _dtypes(named: Mapping[str, Tensor]) -> dict[str, str]:
    """The names that are packed, and the dtype that each unpacks to."""
    held = named.held if isinstance(named, PackedTensors) else {}
    return {n: str(t.dtype).removeprefix("torch.") for n, t in held.items() if isinstance(t, PackedTensor)}


def _products(named: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """The names that are products of factors, with the number they are multiplied by and their shape."""
    held = named.held if isinstance(named, PackedTensors) else {}
    return {n: [t.factor, *t.shape] for n, t in held.items() if isinstance(t, ProductTensor)}


def _named(header: Mapping[str, Any], prefix: str, kind: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """What `_flat` wrote."""
    dtypes, products = header.get("packed", {}), header.get("products", {}) if kind == "mean" else {}
    held: dict[str, Held] = {}
    for name in header[kind]:
        kept = tensors[f"{prefix}{kind}/{name}"]
        scales = tensors.get(f"{prefix}{kind}-scales/{name}")
        if name in products:
            factor, *shape = products[name]
            held[name] = ProductTensor(kept, tensors[f"{prefix}{kind}-right/{name}"], torch.Size(shape), factor)
        else:
            held[name] = kept if scales is None else PackedTensor(kept, scales, getattr(torch, dtypes[name]))
    return PackedTensors(held) if prefix else {n: t for n, t in held.items() if isinstance(t, Tensor)}


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, copied where they share memory with an earlier one, which the format has no room for."""
    held: dict[int, str] = {}
    owners = {name: held.setdefault(t.untyped_storage().data_ptr(), name) for name, t in tensors.items()}
    return {name: t if owners[name] == name else t.clone() for name, t in tensors.items()}


def _conditions(header: Mapping[str, Any]) -> Conditions:
    """How the model ran."""
    held = header.get("conditions")
    return UNRECORDED if held is None else Conditions(**(held | {"running": tuple(held["running"])}))


def _unpack(
    header: Mapping[str, Any],
    prefix: str,
    tensors: Mapping[str, Tensor],
    groups: tuple[GradientMoments, ...] = (),
) -> GradientMoments:
    """What `_tensors` and `_header` wrote."""
    return GradientMoments(
        samples=int(header["samples"]),
        loss=float(header["loss"]),
        second={
            name: tuple(tensors[f"{prefix}second/{k}/{name}"] for k in range(count))
            for name, count in header["second"].items()
        },
        mean=_named(header, prefix, "mean", tensors),
        squares=_named(header, prefix, "squares", tensors),
        groups=groups,
        fallback=tuple(header["fallback"]),
        replicates=None if header["replicates"] is None else Replicates(**header["replicates"]),
        legs={name: tuple(legs) for name, legs in header.get("legs", {}).items()},
        kind=header.get("kind", "gradient"),
        unresolved=tuple(header.get("unresolved", ())),
        conditions=_conditions(header),
        factors={
            n: Factors(tensors[f"{prefix}left/{n}"], tensors[f"{prefix}right/{n}"]) for n in header.get("factors", ())
        },
    )
