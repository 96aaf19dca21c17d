"""Records of an experiment: its settings and its points, as frozen dataclasses that come from and go to JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from noetherflow.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings of an experiment at one scale; each experiment has a subclass with one field per setting.

    Fields are numbers, texts, None, frozen dataclasses, and (named) tuples or dictionaries of these, so that a
    configuration can be written to JSON and a setting replaced with `noetherflow reproduce ID --set KEY=VALUE`.

    Example:
        >>> @dataclass(frozen=True, kw_only=True)
        ... class CoinConfig(Config):
        ...     tosses: int
        ...     bias: float = 0.5
        >>> changed(CoinConfig(tosses=10), {"bias": 0.6})
        CoinConfig(tosses=10, bias=0.6)
    """


@dataclass(frozen=True, kw_only=True)
class ExperimentPoint:
    """One independent piece of an experiment's work; `name` is unique within the experiment."""

    name: str


R = TypeVar("R")


def as_json(record: Config | ExperimentPoint) -> dict[str, Any]:
    """The record as JSON keeps it: dictionaries, lists, numbers, texts and None."""
    return dict(json.loads(json.dumps(asdict(record))))


def setting_names(config: Config) -> tuple[str, ...]:
    """The names of all settings, in the order of their declaration."""
    return tuple(f.name for f in fields(config))


def changed(config: R, changes: Mapping[str, Any]) -> R:
    """A copy of `config` with other values of some settings, given as JSON has them (lists for tuples).

    Raises:
        DataError: for a setting that the configuration does not have, or a value of another type.
    """
    return replace(config, **_fields_of(type(config), changes))  # type: ignore[type-var]


def from_json(kind: type[R], stored: Mapping[str, Any]) -> R:
    """The inverse of `as_json`: a record of class `kind`.

    Raises:
        DataError: as `changed`.
    """
    return kind(**_fields_of(kind, stored))


def _fields_of(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the fields `given`, each of the type that the dataclass declares."""
    types = get_type_hints(kind)
    for name in given:
        if name not in types:
            raise DataError(f"no setting {name!r} in {kind.__name__}; settings: {', '.join(types)}")
    return {name: _value(types[name], value, name) for name, value in given.items()}


def _value(kind: Any, value: Any, where: str) -> Any:
    """`value`, out of JSON, as the type `kind` of the setting `where`."""
    inner = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        if value is None and NoneType in inner:
            return None
        kind, inner = next((k, get_args(k)) for k in inner if k is not NoneType)
    if is_dataclass(kind) and isinstance(kind, type):
        if isinstance(value, kind):
            return value
        if isinstance(value, Mapping):
            return from_json(kind, value)
    if isinstance(kind, type) and hasattr(kind, "_fields") and isinstance(value, list | tuple):
        inner = tuple(get_type_hints(kind).values())
        return kind(*_value(tuple[inner], value, where))  # type: ignore[valid-type]
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
        each = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        if len(each) == len(value):
            return tuple(_value(k, v, where) for k, v in zip(each, value, strict=True))
    if get_origin(kind) is dict and isinstance(value, Mapping):
        return {name: _value(inner[1], v, where) for name, v in value.items()}
    plain = {float: (int, float), int: (int,), bool: (bool,), str: (str,)}.get(kind, ())
    if isinstance(value, plain) and isinstance(value, bool) == (kind is bool):
        return value
    named = kind.__name__ if isinstance(kind, type) and not inner else str(kind)
    raise DataError(f"setting {where!r} takes {named}, got {value!r}")
