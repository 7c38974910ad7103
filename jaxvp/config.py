"""Building objects from ml_collections configs, and the config that a workdir belongs to.

A key that does not exist is an error that says which one was meant, whether it comes from a flag or
from a config file. A field of a config says its range once, in its type:
`Annotated[float, Range(ge=0, lt=1)]`, or one of the names below; `build` refuses what is outside.
"""

import collections.abc
import dataclasses
import inspect
import json
import math
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated

from etils import epath

from jaxvp.errors import UserError, did_you_mean

UNIONS = (typing.Union, types.UnionType)


class ConfigError(UserError):
    """A config that cannot work: the message names the key, what was expected, what was found."""


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a field may have; no range contains NaN or an infinity.

    Attributes:
      ge, gt, le, lt: it is at least, more than, at most, less than this.
    """

    ge: float = -math.inf
    gt: float = -math.inf
    le: float = math.inf
    lt: float = math.inf

    def __contains__(self, number: float) -> bool:
        return self.ge <= number <= self.le and self.gt < number < self.lt

    def __str__(self) -> str:
        bounds = (">=", self.ge), (">", self.gt), ("<=", self.le), ("<", self.lt)
        return " and ".join(f"{sign} {bound}" for sign, bound in bounds if math.isfinite(bound))


PositiveInt = Annotated[int, Range(ge=1)]
NonNegativeInt = Annotated[int, Range(ge=0)]
PositiveFloat = Annotated[float, Range(gt=0)]
NonNegativeFloat = Annotated[float, Range(ge=0)]
Share = Annotated[float, Range(ge=0, le=1)]
# Of random numbers: what NumPy and JAX both take, and tell apart.
Seed = Annotated[int, Range(ge=0, lt=2**32)]


def check_keys(mapping: Mapping, valid: Collection[str], where: str = "config"):
    """Raises ConfigError for the first key of `mapping` that is not in `valid`."""
    for key in mapping:
        if key not in valid:
            hint = did_you_mean(key, valid, lambda near: f"{where}.{near}")
            known = ", ".join(sorted(valid)) or "none"
            raise ConfigError(f"{where}.{key} does not exist.{hint} Valid keys: {known}.")


def build(cls: Callable, mapping: Mapping, where: str = "config"):
    """`cls(**mapping)`, where `cls` is a dataclass or any callable with annotated parameters.

    Fields that are dataclasses, or sequences or mappings of them, are built from nested mappings.
    Lists become tuples where a tuple is declared, ints become floats, ConfigDicts become dicts.

    Args:
      cls: what to build.
      mapping: its arguments, a ConfigDict or dict.
      where: dotted path of `mapping`, for messages.

    Raises:
      ConfigError: a key is unknown or missing, or a value has another type than declared, or is
        out of its range.
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
    hints = typing.get_type_hints(declared, include_extras=True)
    return cls(**{key: convert(value, hints.get(key, typing.Any), f"{where}.{key}")
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


def check_workdir(workdir: epath.PathLike, config: Mapping, may_differ: Sequence[str] = (),
                  write: bool = True):
    """Makes sure that `workdir` belongs to `config`, of which it holds a copy, config.json.

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


def convert(value, hint, where: str):
    """`value` as the type that `hint` declares.

    Raises:
      ConfigError: it is not one, or is out of the hint's `Range`; the message begins with `where`.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        converted = convert(value, arguments[0], where)
        if all(converted in note for note in arguments[1:]):
            return converted
        raise _wrong_value(value, hint, where)
    if origin in UNIONS:
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
        raise _wrong_value(value, hint, where)
    if kind is Mapping and arguments:
        return {key: convert(item, arguments[1], f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, tuple | list) and arguments and kind is not collections.abc.Callable:
        if kind is tuple and arguments[-1] is not Ellipsis:
            if len(value) != len(arguments):
                raise _wrong_value(value, hint, where)
            items = arguments
        else:
            items = arguments[:1] * len(value)
        return type(value)(convert(item, item_hint, f"{where}[{i}]")
                           for i, (item, item_hint) in enumerate(zip(value, items, strict=True)))
    return value


def _convert_union(value, choices, hint, where: str):
    if _is_mapping(value):  # A mapping is the fields of the one dataclass.
        for choice in choices:
            if dataclasses.is_dataclass(choice):
                return build(choice, value, where)
    # What needs no conversion comes first: an int stays one in `float | int`.
    for choice in sorted(choices, key=lambda choice: _bare(choice) is not type(value)):
        try:
            return convert(value, choice, where)
        except ConfigError:
            continue
    raise _wrong_value(value, hint, where)


def _bare(hint):
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def _wrong_value(value, hint, where: str) -> ConfigError:
    return ConfigError(f"{where}: expected {_name(hint)}, found {value!r} "
                       f"({type(value).__name__}).")


def _name(hint) -> str:
    """How messages call a type: "float >= 0 and < 1 | None"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return " ".join([_name(arguments[0]), *map(str, arguments[1:])])
    if origin in UNIONS:
        return " | ".join(map(_name, arguments))
    if origin is typing.Literal:
        return " | ".join(map(repr, arguments))
    if arguments:
        return f"{origin.__name__}[{', '.join(map(_name, arguments))}]"
    if hint in (Ellipsis, types.NoneType):
        return {Ellipsis: "...", types.NoneType: "None"}[hint]
    return getattr(hint, "__name__", str(hint))


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
