import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Literal

import pytest
from ml_collections import ConfigDict

from jaxvp import config
from jaxvp.config import ConfigError, build, check_workdir


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    path: str
    weight: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    width: int
    rate: float = 0.1
    clip: float | None = 1.0
    kind: Literal["small", "large"] = "small"
    names: tuple[str, ...] = ()
    size: int | tuple[int, int] = 8
    rules: tuple[tuple[str, float | None], ...] = ()
    main: Source | None = None
    sources: Sequence[Source | Mapping] = ()
    options: Mapping = dataclasses.field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    flag: bool = False


def function(width: int, *, name: str = "x"):
    return width, name


class Plain:
    def __init__(self, width: int):
        self.width = width


def test_builds_nested_values_with_the_declared_types():
    mapping = ConfigDict({
        "width": 4, "rate": 1, "clip": None, "names": ["a", "b"], "size": [2, 3],
        "rules": [["a/.*", None], [".*", 2]], "main": {"path": "p", "weight": 2},
        "sources": ({"path": "q"},), "options": {"deep": {"x": 1}}, "shapes": {"a": [1, 2]},
    })
    assert build(Model, mapping) == Model(
        width=4, rate=1.0, clip=None, names=("a", "b"), size=(2, 3),
        rules=(("a/.*", None), (".*", 2.0)), main=Source(path="p", weight=2.0),
        sources=(Source(path="q"),), options={"deep": {"x": 1}}, shapes={"a": (1, 2)})
    built = build(Model, mapping)
    assert type(built.rate) is float and type(built.options) is dict
    assert type(build(Model, {"width": 4, "size": 3}).size) is int


def test_builds_functions_and_plain_classes():
    assert build(function, {"width": 2, "name": "y"}) == (2, "y")
    assert build(Plain, {"width": 2}).width == 2


@pytest.mark.parametrize("mapping, message", [
    ({"widht": 4}, "config.m.widht does not exist. Did you mean config.m.width?.*Valid keys: "
                   "clip, flag, kind, main, names, options, rate, rules, shapes, size, sources, w"),
    ({"zzzz": 4}, r"config.m.zzzz does not exist. Valid keys"),
    ({}, "config.m.width is missing: Model needs it"),
    ({"width": "4"}, r"config.m.width: expected int, found '4' \(str\)"),
    ({"width": True}, r"config.m.width: expected int, found True \(bool\)"),
    ({"width": 4.0}, r"config.m.width: expected int, found 4.0 \(float\)"),
    ({"width": 4, "flag": 1}, "config.m.flag: expected bool, found 1"),
    ({"width": 4, "clip": "x"}, r"config.m.clip: expected float \| None, found 'x'"),
    ({"width": 4, "kind": "huge"}, r"config.m.kind: expected one of \['small', 'large'\], found"),
    ({"width": 4, "names": ["a", 1]}, r"config.m.names\[1\]: expected str, found 1"),
    ({"width": 4, "names": "ab"}, r"config.m.names: expected tuple\[str, ...\], found 'ab'"),
    ({"width": 4, "size": [1, 2, 3]}, r"config.m.size: expected int \| tuple\[int, int\], found"),
    ({"width": 4, "main": {"pth": "p"}}, "config.m.main.pth does not exist.*config.m.main.path"),
    ({"width": 4, "sources": [{"path": 3}]}, r"config.m.sources\[0\].path: expected str, found 3"),
    ({"width": 4, "options": 3}, "config.m.options: expected Mapping, found 3"),
    ({"width": 4, "shapes": {"a": ["x"]}}, r"config.m.shapes.a\[0\]: expected int, found 'x'"),
])
def test_a_wrong_config_is_one_clear_error(mapping, message):
    with pytest.raises(ConfigError, match=message):
        build(Model, mapping, "config.m")


def test_something_else_than_a_mapping():
    with pytest.raises(ConfigError, match="config.data: expected the fields of Source, found 3"):
        build(Source, 3, "config.data")


@pytest.mark.parametrize("value", [object(), float("nan"), float("inf"), b"x"])
def test_to_json_takes_nothing_that_json_has_not(value):
    with pytest.raises(ConfigError, match=r"config.a.b\[1\]: expected a finite JSON value"):
        config.to_json({"a": {"b": [1, value]}})


def test_a_workdir_keeps_its_config(tmp_path):
    first = ConfigDict({"steps": 10, "model": {"width": 4, "old": 1}, "log": {"every": 2}})
    check_workdir(tmp_path / "run", first)
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored == first.to_dict()
    check_workdir(tmp_path / "run", first)
    second = {"steps": 20, "model": {"width": 8, "new": None}, "log": {"every": 5}}
    with pytest.raises(ConfigError) as error:
        check_workdir(tmp_path / "run", second, ("steps", "log"))
    lines = str(error.value).split("\n")
    assert lines[1:4] == ["  config.model.new: absent -> null", "  config.model.old: 1 -> absent",
                          "  config.model.width: 4 -> 8"]
    assert "another --workdir" in lines[4] and "steps" not in str(error.value)
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == stored


def test_what_may_differ_is_updated(tmp_path):
    check_workdir(tmp_path, {"steps": 10, "stepsize": 1})
    check_workdir(tmp_path, {"steps": 20, "stepsize": 1}, ("steps",), write=False)
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 10
    check_workdir(tmp_path, {"steps": 20, "stepsize": 1}, ("steps",))
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 20
    with pytest.raises(ConfigError, match="config.stepsize: 1 -> 2"):
        check_workdir(tmp_path, {"steps": 20, "stepsize": 2}, ("steps",))


def test_a_workdir_with_a_damaged_config(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="config.json is not JSON"):
        check_workdir(tmp_path, {"steps": 1})
