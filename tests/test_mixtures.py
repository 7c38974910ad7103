"""The mixtures fit the builders, without any data."""

import importlib
import shlex

import pytest
import tensorflow_datasets as tfds

from configs import mixtures
from data_builders import build
from data_builders.open_x.datasets import DATASETS
from jaxvp import config
from jaxvp.data.observation import LAYOUTS
from jaxvp.data.sources import DataConfig

MIXTURES = {name: config.build(DataConfig, mixtures.get_config(name).data)
            for name in mixtures.MIXTURES}
SOURCES = {f"{name}: {source.path}": (data, source)
           for name, data in MIXTURES.items() for source in data.sources}


def builder_of(source):
    """The builder that makes a source's dataset."""
    command = shlex.split(mixtures.BUILD[source.path])
    return build.parse([*command, f"--out={source.path}"])[1]


@pytest.mark.parametrize("data, source", SOURCES.values(), ids=SOURCES)
def test_a_source_has_what_its_builder_makes(data, source):
    observation = builder_of(source).features()["steps"].feature["observation"]
    cameras = {name for name, feature in observation.items()
               if isinstance(feature, tfds.features.Image)}
    views = LAYOUTS[data.layout].cameras
    assert set(source.cameras) <= set(views)
    shown = [source.cameras.get(view, view) for view in views]
    assert set(shown) - {None} <= cameras
    assert any(shown) and len(cameras) >= source.min_views
    # A view is masked only where the dataset has no camera of that name.
    assert not cameras & {view for view in views if source.cameras.get(view, view) is None}


@pytest.mark.parametrize("data, source", SOURCES.values(), ids=SOURCES)
def test_a_clip_is_not_faster_than_its_source(data, source):
    builder = builder_of(source)
    module = importlib.import_module(type(builder).__module__)
    if builder.name in DATASETS:
        fps = DATASETS[builder.name].fps
    elif builder.name == "something_something":
        fps = 12  # Its files say it.
    else:
        fps = module.FPS if hasattr(module, "FPS") else builder.source_fps
    assert data.window.fps <= builder.rate(fps)


def test_every_dataset_is_built_once():
    paths = [builder_of(source).options() for path, source in
             {source.path: source for _, source in SOURCES.values()}.items()]
    assert len({repr(options) for options in paths}) == len(paths) == len(mixtures.BUILD)


def test_vidar_leaves_out_few_views_and_short_episodes():
    sources = MIXTURES["vidar"].sources
    assert {source.weight for source in sources} == {None}
    assert {source.min_seconds for source in sources} == {4.0}
    *robots, people = sources
    assert {source.min_views for source in robots} == {3} and people.path == "data/egodex"
    assert people.min_views == 0


def test_the_magic_soup_is_octos():
    shares = {source.path.removeprefix("data/"): source.weight
              for source in MIXTURES["magic_soup"].sources}
    assert len(shares) == 25 and shares.keys() <= DATASETS.keys()
    assert sum(shares.values()) == pytest.approx(100, abs=0.5)
    # Octo's factors make the three largest alike.
    assert [shares[name] for name in ("fractal20220817_data", "kuka", "bridge_dataset")] == [17] * 3


def test_the_talk_has_a_third_of_each():
    weights = {source.path: source.weight for source in MIXTURES["talk"].sources}
    assert weights["data/agibot"] + weights["data/agibot_dexhand"] == 1
    assert weights["data/fractal20220817_data"] == weights["data/bridge_dataset"] == 1


def test_an_unknown_mixture_is_an_error():
    with pytest.raises(ValueError, match="No mixture 'vida' .* there are .'vidar', 'talk'"):
        mixtures.get_config("vida")
