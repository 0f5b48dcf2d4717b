"""Typed configuration: YAML or JSON to dataclasses, where an unknown key is an error.

Values are checked against the annotations: numbers, strings, booleans, paths, tuples, dictionaries,
optional values, nested dataclasses, and unions of dataclasses told apart by their `kind`.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from minwm.errors import ConfigError

T = TypeVar("T")


def load_yaml(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping in a YAML file, with `a.b=value` overrides applied (values are read as YAML).

    Raises ConfigError when the file is missing or is no mapping, or an override has no `=`.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such recipe")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping at the top, found {type(content).__name__}")
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"--set {override!r}: expected key=value, such as run.steps=100")
        target = content
        *parents, last = name.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ConfigError(f"--set {override!r}: {parent!r} is not a mapping")
        try:
            target[last] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {override!r}: the value is not YAML ({error})") from error
    return content


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """An instance of the dataclass `cls` from a mapping.

    Raises ConfigError naming the key: unknown (with the nearest known one), missing, or of another type.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            known = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(sorted(fields))}"
            raise ConfigError(f"{_at(where, str(key))}: unknown key, {known}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f"{_at(where, name)}: is required and missing")
    return cls(**{key: _convert(hints[key], value, _at(where, key)) for key, value in values.items()})


def _at(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _variant(choices: Sequence[Any], value: Any, where: str) -> Any:
    """The dataclass whose `kind` the mapping names."""
    kinds = {choice.kind: choice for choice in choices}
    kind = value.get("kind") if isinstance(value, Mapping) else None
    if kind not in kinds:
        raise ConfigError(f"{_at(where, 'kind')}: {kind!r} is not what was expected: one of {', '.join(sorted(kinds))}")
    return kinds[kind]


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        choices = [arg for arg in args if arg is not type(None)]
        return _convert(_variant(choices, value, where) if len(choices) > 1 else choices[0], value, where)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return build(typing.cast(type[Any], hint), value, where)
    if origin is tuple and isinstance(value, list | tuple):
        items = args[:1] * len(value) if args[1:] == (Ellipsis,) else args
        if len(items) != len(value):
            raise ConfigError(f"{where}: {value!r} has {len(value)} items, expected {len(items)}")
        return tuple(
            _convert(item, part, f"{where}[{i}]") for i, (item, part) in enumerate(zip(items, value, strict=True))
        )
    if origin is dict and isinstance(value, Mapping):
        return {_convert(args[0], k, where): _convert(args[1], v, _at(where, str(k))) for k, v in value.items()}
    if origin is typing.Literal and value in args:
        return value
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML reads 1e-4 as a string
        try:
            return float(value)
        except ValueError:
            pass
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    expected = f"one of {args}" if origin is typing.Literal else getattr(hint, "__name__", str(hint))
    raise ConfigError(f"{where}: {value!r} is not what was expected: {expected}")
