"""Every number that a config can hold says its range, and is refused out of it."""

import collections.abc
import dataclasses
import math
import types
import typing
from typing import Annotated, Literal

import pytest

from configs import finetune, libero, pretrain, vidar, vpp
from data_builders.build import builder_class, builder_names
from data_builders.tabletop import tabletop
from jaxvp.config import ConfigError, Range, build, convert
from jaxvp.data.sources import DataConfig, SourceConfig, clip_spec
from jaxvp.data.spec import ClipSpec
from jaxvp.methods import base
from jaxvp.methods.latent_space import CODECS
from jaxvp.methods.vidar import Vidar
from jaxvp.methods.video_model import VideoMethod, VideoModel
from jaxvp.methods.video_policy import VideoPolicy
from jaxvp.models.action_head import ActionHead
from jaxvp.models.inverse_dynamics import InverseDynamics
from jaxvp.models.text_encoder import ByteTextEncoder
from jaxvp.models.transformer import VideoTransformer
from jaxvp.step import TrainConfig, make_method

# What is built of the fields that are mappings; () of those that are no fields of anything.
MAPPINGS = {
    (TrainConfig, "method"): tuple(map(base.get, base.REGISTRY)),
    (TrainConfig, "embedded"): (tabletop.Builder,),
    (TrainConfig, "init_from"): (),
    (DataConfig, "extra"): (),
    (SourceConfig, "cameras"): (),
    (VideoMethod, "video"): (VideoModel,),
    (VideoPolicy, "head"): (ActionHead,),
    (Vidar, "inverse"): (InverseDynamics,),
    (VideoModel, "transformer"): (VideoTransformer,),
    (VideoModel, "text"): (ByteTextEncoder,),
    (VideoModel, "codec"): tuple(CODECS.values()),
}


def hints_of(cls) -> dict:
    """Name to type of the fields that a config sets: the clips' sizes follow from DataConfig."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)
            if hints[field.name] is not ClipSpec}


def parts(hint):
    """The hint, and those inside of it."""
    yield hint
    if typing.get_origin(hint) not in (Annotated, Literal):
        for argument in typing.get_args(hint):
            yield from parts(argument)


def bare(hint):
    return typing.get_origin(hint) or hint


def reachable(cls) -> dict:
    """The dataclasses that a config of `cls` is made of, in order."""
    found = {cls: None}
    for name, hint in hints_of(cls).items():
        inner = [part for part in parts(hint) if dataclasses.is_dataclass(part)]
        if not inner and collections.abc.Mapping in map(bare, parts(hint)):
            inner = next(MAPPINGS[parent, name] for parent in cls.__mro__
                         if (parent, name) in MAPPINGS)
        for part in inner:
            found |= reachable(part)
    return found


def is_number(hint) -> bool:
    return hint in (int, float) or typing.get_origin(hint) is Annotated


CLASSES = [*reachable(TrainConfig), *(builder_class(name) for name in builder_names())]
NUMBERS = [pytest.param(cls, name, hint, id=f"{cls.__module__}.{cls.__name__}.{name}")
           for cls in dict.fromkeys(CLASSES) for name, hint in hints_of(cls).items()
           if any(map(is_number, parts(hint)))]


def outside(hint):
    """Values for a field of this type, one number of which is out of its range."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in (int, float):
        pytest.fail("says no range: see jaxvp.config.Range")
    if origin is Annotated:
        kind, number = arguments
        yield from (kind(bound) for bound in (number.gt, number.lt) if math.isfinite(bound))
        if math.isfinite(number.ge):
            yield kind(number.ge - 1)
        if math.isfinite(number.le):
            yield kind(number.le + 1)
        if kind is float:
            yield from (math.nan, math.inf, -math.inf)
    elif origin in (typing.Union, types.UnionType):
        for choice in arguments:
            yield from outside(choice)
    elif origin is collections.abc.Mapping:
        yield from ({"x": value} for value in outside(arguments[1]))
    elif origin is tuple:
        items = arguments[:1] if arguments[-1] is Ellipsis else arguments
        for i, item in enumerate(items):
            for value in outside(item):
                yield tuple(value if j == i else inside(other) for j, other in enumerate(items))


def inside(hint):
    return "x" if hint is str else 1


@pytest.mark.parametrize("cls, name, hint", NUMBERS)
def test_every_number_has_a_range(cls, name, hint):
    wrong = list(outside(hint))
    assert wrong
    needed = {field.name: None for field in dataclasses.fields(cls)
              if field.default is field.default_factory}  # MISSING, both.
    for value in wrong:
        with pytest.raises(ConfigError, match=rf"^config\.x\.{name}\b.*: expected .* found "):
            build(cls, {name: value} | {key: value for key, value in needed.items() if key != name},
                  "config.x")
    for field in dataclasses.fields(cls):
        if field.name == name and field.default is not dataclasses.MISSING:
            assert convert(field.default, hint, name) == field.default


@pytest.mark.parametrize("cls", list(map(builder_class, builder_names())),
                         ids=builder_names())
def test_a_builder_refuses_by_itself(cls):
    """Its options come from flags, not through `build`."""
    for value in (-0.1, 1.1, math.nan):
        with pytest.raises(ConfigError, match="^--val_fraction: expected float >= 0 and <= 1, "):
            cls(val_fraction=value, **{
                field.name: "x" for field in dataclasses.fields(cls)
                if field.default is field.default_factory})


def test_the_walk_finds_what_a_config_is_made_of():
    names = {cls.__name__ for cls in reachable(TrainConfig)}
    assert names >= {"TrainConfig", "DataConfig", "SourceConfig", "OptimizerConfig", "MeshConfig",
                     "Window", "VideoPolicy", "VPP", "VideoModel", "VideoTransformer", "ActionHead",
                     "ByteTextEncoder", "PixelCodec", "WanVAE", "Builder"}
    assert len(NUMBERS) > 80


def test_ranges():
    share = Range(ge=0, lt=1)
    assert 0 in share and 0.999 in share and str(share) == ">= 0 and < 1"
    assert not any(value in share for value in (-1e-9, 1, math.nan))
    assert str(Range(gt=0)) == "> 0"
    assert not any(value in Range() for value in (math.nan, math.inf, -math.inf))


@pytest.mark.parametrize("key, value, message", [
    ("optimizer.b1", 5, r"config.optimizer.b1: expected float >= 0 and < 1, found 5 \(int\)"),
    ("optimizer.clip_norm", -1.0, r"config.optimizer.clip_norm: expected float > 0 \| None, found"),
    ("optimizer.rules", ((".*", 0.0),), r"config.optimizer.rules\[0\]\[1\]: expected float > 0"),
    ("optimizer.learning_rate", math.nan, "config.optimizer.learning_rate: expected float > 0, f"),
    ("mesh.fsdp", 0, r"config.mesh.fsdp: expected int >= 1 \| -1, found 0"),
    ("batch_size", -8, "config.batch_size: expected int >= 1, found -8"),
    ("data.image_size", (0, 16), "config.data.image_size: expected int >= 1 | tuple"),
    ("data.sources", ({"path": "x", "weight": 0.0},), r"data.sources\[0\].weight: expected float"),
    ("execution_horizon", 100, r"config.execution_horizon is 100: .*data.window.chunk = 12"),
])
def test_messages(key, value, message):
    config = vpp.get_config().to_dict()
    *path, last = key.split(".")
    inner = config
    for part in path:
        inner = inner[part]
    inner[last] = value
    with pytest.raises(ConfigError, match=message):
        build(TrainConfig, config)


@pytest.mark.parametrize("config", [
    *map(pretrain.get_config, ("", "all", *pretrain.WAN, *pretrain.STORED)),
    *map(vpp.get_config, vpp.VARIANTS), finetune.get_config(),
    *map(libero.get_config, libero.VARIANTS), *map(vidar.get_config, vidar.VARIANTS)])
def test_the_methods_of_the_configs_are_in_range(config):
    """TrainConfig alone does not look into its mappings."""
    built = build(TrainConfig, config)
    spec = clip_spec(built.data)
    make_method(built, dataclasses.replace(
        spec, action_size=spec.action_size or 1, state_size=spec.state_size or 1))
