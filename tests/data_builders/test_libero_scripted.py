"""LIBERO by the scripted expert to RLDS."""

import dataclasses
import importlib.util
import json

import numpy as np
import pytest

from data_builders import builder
from data_builders.libero_scripted import libero_scripted
from data_builders.libero_scripted.libero_scripted import Builder
from jaxvp.envs import libero, libero_expert
from jaxvp.errors import UserError

pytestmark = [pytest.mark.libero, pytest.mark.skipif(
    importlib.util.find_spec("libero") is None, reason=f"needs {libero.INSTALL}")]
SMALL = Builder(suites=("libero_spatial",), tasks=("2",), episodes=2, image_size=32, fps=2,
                noisy=1.0, noise=0.05)


def made(settings, item):
    (found,) = settings.build(item)
    return found


@pytest.fixture(scope="module")
def episodes():
    """Two short episodes, noise and all."""
    return [made(SMALL, item) for item in SMALL.items()]


def test_items():
    task = libero.tasks("libero_spatial")[2]
    assert SMALL.items() == [("libero_spatial", task, 1_000_000 + i) for i in range(2)]
    assert len(Builder(suites=("libero_object", "libero_spatial"), episodes=3).items()) == 60


def test_episodes(episodes):
    first, second = episodes
    for found in episodes:
        (record,) = found.records(SMALL.features())
        steps, metadata = record["steps"], record["episode_metadata"]
        assert steps["is_terminal"][-1] and metadata["fps"] == libero.FPS
        assert 60 < len(steps["action"]) < 400
        assert np.abs(found.action[:, :6]).max() <= 1 and found.action[0, 6] == 1
        options = json.loads(metadata["options"])
        assert {name: options[name] for name in ("rotation", "image_size", "wait_steps")} == {
            "rotation": "180", "image_size": 32, "wait_steps": 5}
        frames = found.images["agentview"]
        assert options["frame_stride"] == 10 and frames.std() > 20
        changes = np.flatnonzero(np.abs(np.diff(frames.astype(int), axis=0)).max((1, 2, 3))) + 1
        assert len(changes) > 5 and not (changes % 10).any(), "an image every 10 steps"
        assert np.linalg.norm(np.diff(found.state[:, :3], axis=0), axis=1).max() < 0.03
    assert not np.array_equal(first.state[0], second.state[0]) or (
        not np.array_equal(first.action[:40], second.action[:40]))
    assert first.instruction == libero.instruction("libero_spatial", SMALL.items()[0][1])


def test_a_seed_gives_the_same_episode_twice(episodes):
    again = made(SMALL, SMALL.items()[0])
    np.testing.assert_array_equal(again.action, episodes[0].action)
    np.testing.assert_array_equal(again.state, episodes[0].state)
    np.testing.assert_array_equal(again.images["wrist"], episodes[0].images["wrist"])


def test_an_episode_that_fails_is_left_out(monkeypatch):
    monkeypatch.setattr(libero_expert, "solved", lambda env: False)
    monkeypatch.setattr(libero_expert, "demonstration",
                        lambda env, observation, seed, **options: [(observation, libero.REST)])
    with pytest.raises(builder.Skip, match="libero_spatial 2: not successful"):
        made(SMALL, SMALL.items()[0])


@pytest.mark.parametrize("options, message", [
    ({"suites": ("libero_objects",)}, "no suite 'libero_objects'. Did you mean 'libero_object'"),
    ({"suites": ()}, "--suites is empty: choose of libero_spatial"),
    ({"tasks": ("10",)}, "--tasks are numbers from 0 to 9, found '10'"),
    ({"fps": 3}, "--fps must divide 20, the steps per second, found 3"),
    ({"permuted": 0.7, "anywhere": 0.7}, "together at most 1, found 0.7 and 0.7"),
])
def test_wrong_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SMALL, **options).items()


def test_no_episodes():
    with pytest.raises(UserError, match="--episodes"):
        Builder(episodes=0)


def test_light_and_camera_are_varied():
    item = SMALL.items()[0]
    env = libero.the_environment(*item[:2], 32, "180")
    shown = []
    for vary in (0.0, 0.2, 0.0):
        libero_scripted.libero_scene.reset(env, 1, vary=vary)
        shown.append(env.render("agentview").astype(int))
    assert np.abs(shown[1] - shown[0]).mean() > 3
    np.testing.assert_array_equal(shown[2], shown[0])
