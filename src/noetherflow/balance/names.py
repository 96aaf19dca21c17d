"""Which tensor of a checkpoint is which of the model: prefixes, tied names, adapters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from noetherflow.balance.parts import Part, parts_of
from noetherflow.balance.stored import StoredTensors
from noetherflow.core.prefix import Prefix, prefix_of
from noetherflow.core.tensors import tensors_of
from noetherflow.core.unwrap import plain_name, unwrap
from noetherflow.errors import CheckpointError


@dataclass(frozen=True, eq=False)
class NameMap:
    """The tensors of a file by the model's names.

    Attributes:
        canonical: the model's canonical name of each stored tensor that belongs to it.
        aliases: the model's canonical name by every name it has for a tensor.
        prefix: what was done to the stored names.
        parts: of stored tensors that are parts of one of the model's.
        others: stored tensors that a prefix given by the user leaves aside.
        notes: what was found out on the way, a line each.
    """

    canonical: Mapping[str, str]
    aliases: Mapping[str, str]
    prefix: Prefix
    parts: Mapping[str, Part] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def canonical_name(self, stored: str) -> str | None:
        """The canonical name that a stored name, here or in another file of the same run, stands for."""
        return self.canonical.get(stored) or self.aliases.get(self.prefix.name(stored) or "")

    @property
    def stored_names(self) -> dict[str, tuple[str, ...]]:
        """By canonical name the first stored name, or the names of all its parts."""
        out: dict[str, tuple[str, ...]] = {}
        for stored, name in self.canonical.items():
            if name not in out:
                out[name] = (stored,)
            elif stored in self.parts:
                out[name] += (stored,)
        return out


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer under every plain name, tied ones included."""
    found = unwrap(model).state_dict(keep_vars=True)
    return {plain_name(n): t for n, t in found.items() if isinstance(t, Tensor)}


def match_names(
    model: nn.Module, stored: StoredTensors, where: Path, prefix: str | None = None, adapter: bool = False
) -> NameMap:
    """Find out which stored tensor is which of the model.

    Args:
        model: the model, maybe on the meta device.
        stored: the tensors of the checkpoint; their values are read only where several lie under names of one tensor.
        where: the path, for messages.
        prefix: what the stored names have in front of the model's; found where it is not given.
        adapter: the file holds a PEFT adapter alone.

    Raises:
        CheckpointError: names or shapes that are not the model's, or different values for one tied tensor.
    """
    named = all_tensors(model)
    wanted = _adapter_names(model, named, where) if adapter else {n: n for n in named}
    found = prefix_of(stored.names, wanted) if prefix is None else Prefix(stored=prefix, given=True)
    every = {} if adapter else parts_of(model)
    parts = {n: every[own] for n in stored.names if (own := found.name(n) or "") in every}
    names = {n: _own_name(found.name(n), wanted, parts.get(n)) for n in stored.names}
    mine = {n: own for n, own in names.items() if own is not None}
    _refuse_mismatch(mine, {n: named[n] for n in wanted.values()}, parts, stored, where, found)
    canonical_of = {id(t): n for n, t in tensors_of(model).items()}
    aliases = {n: canonical_of[id(t)] for n, t in named.items()}
    canonical = {n: aliases[own] for n, own in mine.items()}
    _refuse_contradictions({n: own for n, own in canonical.items() if n not in parts}, stored, where)
    others = tuple(n for n, own in names.items() if own is None)
    said = str(found) if found.stored or found.model else ""
    return NameMap(canonical, aliases, found, parts, others, (said,) if said else ())


def _adapter_names(model: nn.Module, named: Mapping[str, Tensor], where: Path) -> dict[str, str]:
    """The model's names of an adapter's tensors by those that PEFT writes: without the adapter's name in them."""
    configs = getattr(unwrap(model), "peft_config", None)
    if not configs:
        raise CheckpointError(
            f"{where} holds a PEFT adapter alone, and the model has none: wrap the base model first, model = "
            f"peft.PeftModel.from_pretrained(base, {str(where.parent)!r})"
        )
    active = getattr(unwrap(model), "active_adapter", None)
    adapter = active if isinstance(active, str) and active in configs else next(iter(configs))
    out = {}
    for name in named:
        parts = name.split(".")
        if adapter in parts:
            out[".".join(p for p in parts if p not in (adapter, "modules_to_save"))] = name
    return out


def _own_name(name: str | None, wanted: Mapping[str, str], part: Part | None) -> str | None:
    """The model's name of a stored tensor whose own name, without the prefix, is `name`."""
    return part.whole if part is not None else wanted.get(name or "", name)


def _refuse_mismatch(
    names: Mapping[str, str],
    named: Mapping[str, Tensor],
    parts: Mapping[str, Part],
    stored: StoredTensors,
    where: Path,
    prefix: Prefix,
) -> None:
    present = {id(named[own]) for own in names.values() if own in named}
    entries = Counter[str]()
    for n, part in parts.items():
        entries[part.whole] += torch.Size(stored.shape(n)).numel()
    missing = [n for n, t in named.items() if id(t) not in present or entries.get(n, t.numel()) != t.numel()]
    unexpected = [n for n, own in names.items() if own not in named]
    shapes = [
        f"{n}: file {stored.shape(n)}, model {shape}"
        for n, own in names.items()
        if own in named and stored.shape(n) != (shape := parts[n].shape if n in parts else tuple(named[own].shape))
    ]
    problems = {"missing in the file": missing, "unknown to the model": unexpected, "of another shape": shapes}
    found = [f"{what}: {lines[:3]} ({len(lines)} in all)" for what, lines in problems.items() if lines]
    if found:
        raise CheckpointError(
            f"{where} does not match the model; {'; '.join(found)}{_advice(unexpected, names, prefix)}"
        )


def _advice(unexpected: Collection[str], names: Mapping[str, str], prefix: Prefix) -> str:
    """What may be the matter, as the end of a sentence."""
    if len(unexpected) == len(names) and not prefix.given:
        first = next(iter(names), "")
        return (
            f"; where all names in the file have a prefix that the model's lack, say so: prefix= (--prefix), {first!r}"
        )
    return "; build the model as that of the file was (its configuration), or name the checkpoint of this model"


def _refuse_contradictions(canonical: Mapping[str, str], stored: StoredTensors, where: Path) -> None:
    """Raises CheckpointError where a file holds two different values for one tensor of the model."""
    first: dict[str, str] = {}
    for name, own in canonical.items():
        other = first.setdefault(own, name)
        if other != name and not _same(stored.view(other), stored.view(name)):
            raise CheckpointError(
                f"{where}: {other} and {name} differ, but the model ties them, they are one tensor in it: the file is "
                "of an untied model, another function. Build the model without tying (tie_word_embeddings=False in "
                "its configuration), or save the file from the tied model"
            )


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal, in the coarser of the two dtypes."""
    dtype = min(a.dtype, b.dtype, key=lambda d: d.itemsize)
    if a.data_ptr() == b.data_ptr() and a.dtype == b.dtype:
        return True
    pieces = zip(torch.split(a.reshape(-1), 1 << 22), torch.split(b.reshape(-1), 1 << 22), strict=True)
    return all(torch.equal(x.to(dtype), y.to(dtype)) for x, y in pieces)
