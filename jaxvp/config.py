"""Building objects from ml_collections configs, and the config that a workdir belongs to.

A key that does not exist is an error that says which one was meant, whether it came by a flag or
stands in a config file.
"""

import collections.abc
import dataclasses
import difflib
import hashlib
import inspect
import json
import math
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence

from etils import epath

from jaxvp.errors import UserError


class ConfigError(UserError):
    """A config that cannot work: the message names the key, what was expected, what was found."""


def check_keys(mapping: Mapping, valid: Collection[str], where: str = "config"):
    """Raises ConfigError for the first key of `mapping` that is not in `valid`."""
    for key in mapping:
        if key not in valid:
            near = difflib.get_close_matches(str(key), valid, 1)
            hint = f" Did you mean {where}.{near[0]}?" if near else ""
            known = ", ".join(sorted(valid)) or "none"
            raise ConfigError(f"{where}.{key} does not exist.{hint} Valid keys: {known}.")


def build(cls: Callable, mapping: Mapping, where: str = "config"):
    """`cls(**mapping)`, where `cls` is a dataclass or any callable with annotated parameters.

    Fields that are dataclasses, or sequences of them, are built from nested mappings. Lists become
    tuples where a tuple is declared, ints become floats, ConfigDicts become dicts.

    Args:
      cls: what to build.
      mapping: its arguments, a ConfigDict or dict.
      where: dotted path of `mapping`, for messages.

    Raises:
      ConfigError: a key is unknown or missing, or a value has another type than declared.
    """
    if not _is_mapping(mapping):
        raise ConfigError(f"{where}: expected the fields of {cls.__name__}, found {mapping!r}.")
    parameters = inspect.signature(cls).parameters
    check_keys(mapping, parameters, where)
    missing = [name for name, parameter in parameters.items()
               if parameter.default is parameter.empty and name not in mapping]
    if missing:
        raise ConfigError(f"{where}.{missing[0]} is missing: {cls.__name__} needs it.")
    declared = cls if dataclasses.is_dataclass(cls) or not isinstance(cls, type) else cls.__init__
    hints = typing.get_type_hints(declared)
    return cls(**{key: _convert(value, hints.get(key, typing.Any), f"{where}.{key}")
                  for key, value in mapping.items()})


def complete(cls: type, mapping: Mapping) -> dict:
    """`mapping` with the defaults of the dataclass `cls` for what it leaves out, in nested
    dataclasses too: a flag can change only what a config names."""
    hints, result = typing.get_type_hints(cls), dict(mapping)
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            result.setdefault(field.name, field.default)
        elif field.default_factory is not dataclasses.MISSING:
            result.setdefault(field.name, field.default_factory())
        if dataclasses.is_dataclass(hints[field.name]) and field.name in result:
            value = result[field.name]
            nested = value if _is_mapping(value) else dataclasses.asdict(value)
            result[field.name] = complete(hints[field.name], nested)
    return result


def to_json(config: Mapping) -> str:
    """The config as indented JSON with sorted keys.

    Raises:
      ConfigError: a value is not a finite number, string, boolean, None, mapping or sequence.
    """
    return json.dumps(plain(config), indent=2, sort_keys=True) + "\n"


def digest(config: Mapping) -> str:
    """16 hexadecimal digits that differ for any other config."""
    return hashlib.sha256(to_json(config).encode()).hexdigest()[:16]


def check_workdir(workdir: epath.PathLike, config: Mapping, may_differ: Sequence[str] = (),
                  write: bool = True):
    """Makes sure that `workdir` belongs to `config`, whose copy lies there as config.json.

    Args:
      workdir: the folder of the run; it is made when it does not exist.
      config: the config of the run.
      may_differ: dotted keys, or subtrees, that may have changed since the workdir was started.
      write: whether this process writes config.json (one process of a run does).

    Raises:
      ConfigError: the workdir was started with another config; the message lists what differs.
    """
    path = epath.Path(workdir) / "config.json"
    text = to_json(config)
    if path.exists():
        try:
            old = _flat(json.loads(path.read_text()))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} is not JSON ({error}): use another --workdir.") from error
        new = _flat(json.loads(text))
        allowed = tuple(f"config.{key}" for key in may_differ)
        changed = [
            f"  {key}: {json.dumps(old[key]) if key in old else 'absent'} -> "
            f"{json.dumps(new[key]) if key in new else 'absent'}"
            for key in sorted(old | new)
            if (key in old, old.get(key)) != (key in new, new.get(key))
            and not f"{key}.".startswith(tuple(f"{prefix}." for prefix in allowed))
        ]
        if changed:
            raise ConfigError(
                f"{path.parent} belongs to a run with another config:\n" + "\n".join(changed)
                + "\nUse another --workdir, set these keys back, or remove the folder."
            )
    if write:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name("config.json.tmp")
        temporary.write_text(text)
        temporary.replace(path)  # A reader never sees half a file.


def _is_mapping(value) -> bool:
    """Of a ConfigDict too, which is no Mapping; to import its class would cost the evaluator."""
    return isinstance(value, Mapping) or hasattr(value, "keys")


def _convert(value, hint, where: str):
    """`value` as the type that `hint` declares; ConfigError when it is not one."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, arguments, hint, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise ConfigError(f"{where}: expected one of {list(arguments)}, found {value!r}.")
        return value
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, where)
    if _is_mapping(value) and not isinstance(value, Mapping):
        value = value.to_dict()
    kind = origin or hint
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is tuple and isinstance(value, list):
        value = tuple(value)
    wrong_bool = isinstance(value, bool) and kind in (int, float)
    if isinstance(kind, type) and (wrong_bool or not isinstance(value, kind)):
        raise _wrong_type(value, hint, where)
    if isinstance(value, tuple | list) and arguments and kind is not collections.abc.Callable:
        if kind is tuple and arguments[-1] is not Ellipsis:
            if len(value) != len(arguments):
                raise _wrong_type(value, hint, where)
            items = arguments
        else:
            items = arguments[:1] * len(value)
        return type(value)(_convert(item, item_hint, f"{where}[{i}]")
                           for i, (item, item_hint) in enumerate(zip(value, items, strict=True)))
    return value


def _convert_union(value, choices, hint, where: str):
    if _is_mapping(value):  # A mapping is the fields of the one dataclass.
        for choice in choices:
            if dataclasses.is_dataclass(choice):
                return build(choice, value, where)
    if type(value) in choices:  # Before conversions: an int stays one in `float | int`.
        return value
    for choice in choices:
        try:
            return _convert(value, choice, where)
        except ConfigError:
            continue
    raise _wrong_type(value, hint, where)


def _wrong_type(value, hint, where: str) -> ConfigError:
    name = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
    name = name.replace("collections.abc.", "").replace("typing.", "")
    return ConfigError(f"{where}: expected {name}, found {value!r} ({type(value).__name__}).")


def plain(value, where: str = "config"):
    """JSON values: mappings become dicts, sequences lists; errors as for `to_json`."""
    if _is_mapping(value):
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    finite = not isinstance(value, float) or math.isfinite(value)
    if isinstance(value, str | int | float | None) and finite:
        return value
    raise ConfigError(f"{where}: expected a finite JSON value, found {value!r}.")


def _flat(value, where: str = "config") -> dict:
    """{dotted key: leaf}; lists are leaves."""
    if not isinstance(value, dict) or not value:
        return {where: value}
    return {name: leaf for key, item in value.items()
            for name, leaf in _flat(item, f"{where}.{key}").items()}
