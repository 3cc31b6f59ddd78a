"""How the strict border is drawn: plain mappings into frozen dataclasses, and refusals that help."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal


class UserError(ValueError):
    """Something the user can mend. The commands print it as one line and exit with code 2."""


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """' Did you mean 'x'?' for a near miss, else ' Known: ...' with every name."""
    names = sorted(names)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else f" Known: {', '.join(names)}."


def require(condition: object, message: str) -> None:
    """Raises UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def _convert(value: Any, wanted: Any, path: str) -> Any:
    """`value` as the annotated type, or UserError. Ints become floats; nothing else is bent."""
    origin, args = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _convert(value, next(a for a in args if a is not type(None)), path)
    if dataclasses.is_dataclass(wanted):
        return build(value, wanted, path + ".")
    if origin is Literal:
        require(
            value in args,
            f"{path} must be one of {', '.join(map(repr, args))}, got {value!r}."
            + (did_you_mean(value, args) if isinstance(value, str) and value not in args else ""),
        )
        return value
    if origin is tuple:
        require(isinstance(value, (tuple, list)), f"{path} must be a tuple, got {value!r}.")
        return tuple(_convert(v, args[0], f"{path}[{i}]") for i, v in enumerate(value))
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    right = isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))
    require(right, f"{path} must be of type {wanted.__name__}, got {value!r}.")
    require(wanted is not float or math.isfinite(value), f"{path} must be finite, got {value}.")
    return value


def build(source: Any, kind: type, prefix: str) -> Any:
    """The frozen dataclass `kind` from a mapping with exactly its keys; `prefix` names them in refusals."""
    require(isinstance(source, Mapping), f"{prefix[:-1]} must be a group of keys, got {source!r}.")
    fields = typing.get_type_hints(kind)
    for key in source:
        require(key in fields, f"Unknown config key '{prefix}{key}'.{did_you_mean(str(key), fields)}")
    for key in fields:
        require(key in source, f"The config lacks the key '{prefix}{key}': start from configs/base.py.")
    return kind(**{key: _convert(source[key], wanted, prefix + key) for key, wanted in fields.items()})


def flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def differences(old: Mapping, new: Mapping) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, as key -> (old, new)."""
    old, new = flatten(old), flatten(new)
    return {k: (old.get(k), new.get(k)) for k in sorted({*old, *new}) if old.get(k) != new.get(k)}
