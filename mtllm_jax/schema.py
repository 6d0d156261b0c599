"""Nested plain values to frozen dataclasses and back, with one sentence for what does not fit.

Fields may be int, float, bool, str, Literal, tuples, dataclasses, and any of these or None.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union

from ml_collections import config_dict

Config = TypeVar("Config")

_NAMES = {int: "an int", float: "a float", bool: "true or false", str: "a str"}


def resolve(cls: type[Config], mapping: Any, where: str = "config") -> Config:
    """Build the dataclass `cls` from a nested dict or ConfigDict.

    An int is taken for a float, a list for a tuple; nothing else is converted. Fields that are
    not named keep their defaults. `where` is the name of the mapping in errors.

    Raises ValueError for an unknown field (with the nearest ones), a missing one, or a value of
    the wrong type; what the dataclass itself checks is raised as it is.
    """
    values = plain(mapping)
    if not isinstance(values, dict):
        raise ValueError(f"{where} is {_show(values)}; it must be a group of fields.")
    kinds = _kinds(cls)
    for name in values:
        if name not in kinds:
            offer = nearest(f"{where}.{name}", field_kinds(cls, where))
            near = f"the nearest: {', '.join(offer)}" if offer else f"there is {', '.join(kinds)}"
            raise ValueError(f"{where}.{name} is not a field of this config; {near}.")
    for field in dataclasses.fields(typing.cast(Any, cls)):
        no_default = field.default is field.default_factory is dataclasses.MISSING
        if no_default and field.name not in values:
            kind = wanted(kinds[field.name])
            raise ValueError(f"{where}.{field.name} is missing; it must be {kind}.")
    return cls(**{name: _convert(kinds[name], v, f"{where}.{name}") for name, v in values.items()})


def to_dict(config: Any) -> dict[str, Any]:
    """The inverse of `resolve`, ready for JSON: dataclasses as dicts, tuples as lists."""
    return typing.cast(dict[str, Any], _lists(dataclasses.asdict(config)))


def to_config_dict(config: Any) -> config_dict.ConfigDict:
    """A dataclass as a ConfigDict whose fields keep their types, those that hold None too."""
    typed = config_dict.ConfigDict()
    for name, kind in _kinds(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            typed[name] = to_config_dict(value)
        elif value is None:
            typed[name] = config_dict.placeholder(_plain_type(kind))
        elif isinstance(value, tuple):
            typed[name] = tuple(dataclasses.asdict(v) if _is_group(type(v)) else v for v in value)
        else:
            typed[name] = value
    return typed


def plain(values: Any) -> Any:
    """ConfigDicts as dicts, at the top and below."""
    if isinstance(values, config_dict.ConfigDict):
        values = values.to_dict()
    if isinstance(values, Mapping):
        return {name: plain(value) for name, value in values.items()}
    return values


def field_kinds(cls: type, where: str = "config") -> dict[str, Any]:
    """The annotation of every field that holds a value, by dotted name below `where`."""
    found: dict[str, Any] = {}
    for name, kind in _kinds(cls).items():
        group = next((member for member in _members(kind) if _is_group(member)), None)
        found |= field_kinds(group, f"{where}.{name}") if group else {f"{where}.{name}": kind}
    return found


def wanted(kind: Any) -> str:
    """What a value of this annotation must be, as the end of a sentence."""
    origin = typing.get_origin(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(kind)))
    if origin is tuple:
        members = [wanted(member) for member in typing.get_args(kind) if member is not Ellipsis]
        if Ellipsis in typing.get_args(kind):
            return f"a list, each entry {members[0]}"
        return f"a list of {len(members)}: {', '.join(members)}"
    if origin in (Union, types.UnionType):
        return f"{' or '.join(map(wanted, _members(kind)))} or none"
    if _is_group(kind):
        return "a group of fields"
    return _NAMES[kind]


def is_optional(kind: Any) -> bool:
    """Whether a field of this annotation may hold None."""
    return type(None) in typing.get_args(kind)


def nearest(name: str, candidates: Iterable[str], limit: int = 3) -> list[str]:
    """The candidates most like `name`, best first; their last dotted part counts as much."""

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, name, candidate).ratio()
        last_parts = name.rpartition(".")[2], candidate.rpartition(".")[2]
        last = difflib.SequenceMatcher(None, *last_parts).ratio()
        return max(last, whole * whole)

    ranked = sorted(((likeness(c), c) for c in candidates), key=lambda pair: -pair[0])
    return [candidate for score, candidate in ranked[:limit] if score >= 0.6]


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if origin in (Union, types.UnionType):
        (member,) = _members(kind)
        if value is None:
            return None
        if _is_group(member) or typing.get_origin(member) is tuple or _fits(member, value):
            return _convert(member, value, where)
    if _is_group(kind):
        return resolve(kind, value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        return _convert_tuple(kind, value, where)
    if not _fits(kind, value):
        raise ValueError(f"{where} is {_show(value)}; it must be {wanted(kind)}.")
    return float(value) if kind is float else value


def _fits(kind: Any, value: Any) -> bool:
    """Whether a single value is one of an int, float, bool, str or Literal annotation."""
    if typing.get_origin(kind) is Literal:
        return any(value == a and type(value) is type(a) for a in typing.get_args(kind))
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind


def _convert_tuple(kind: Any, value: list[Any] | tuple[Any, ...], where: str) -> tuple[Any, ...]:
    members = typing.get_args(kind)
    if Ellipsis in members:
        members = members[:1] * len(value)
    if len(members) != len(value):
        raise ValueError(f"{where} is {_show(value)}; it must be {wanted(kind)}.")
    pairs = zip(members, value, strict=True)
    return tuple(_convert(m, v, f"{where}[{i}]") for i, (m, v) in enumerate(pairs))


def _kinds(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(typing.cast(Any, cls))}


def _members(kind: Any) -> list[Any]:
    """The alternatives of an annotation, None left out."""
    if typing.get_origin(kind) in (Union, types.UnionType):
        return [member for member in typing.get_args(kind) if member is not type(None)]
    return [kind]


def _plain_type(kind: Any) -> type:
    (member,) = _members(kind)
    if typing.get_origin(member) is Literal:
        return type(typing.get_args(member)[0])
    return typing.get_origin(member) or (dict if _is_group(member) else member)


def _is_group(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _lists(inner) for name, inner in value.items()}
    return [_lists(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
