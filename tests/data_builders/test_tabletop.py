"""The tabletop builder: its episodes are what the environment showed and the expert did."""

import json

import numpy as np
import pytest
from raw import convert

from data_builders.builder import Skip
from data_builders.tabletop.tabletop import Builder
from jaxvp.data import rlds
from jaxvp.envs import tabletop


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(builder, folder of its dataset); the arms do what the recorded actions say."""
    builder = Builder(episodes=8, image_size=16, val_fraction=0.3, wander=0.0)
    return builder, convert(builder, tmp_path_factory.mktemp("tabletop"))[0]


def test_every_episode_replays_in_the_environment(built):
    builder, folder = built
    seen = set()
    for split in rlds.splits(folder):
        episodes = rlds.Episodes(folder, split)
        for number in range(len(episodes)):
            record = episodes[number]
            task, seed = episodes.text("episode_id", number).rsplit("-", 1)
            seen.add((task, int(seed)))
            env = tabletop.TabletopEnv(task, image_size=16, disturbance=builder.disturbance)
            observation, info = env.reset(seed=int(seed))
            assert set(record.instruction) == {info["instruction"].encode()}
            for step, action in enumerate(record.action):
                np.testing.assert_array_equal(record.state[step], observation["state"])
                for camera in tabletop.CAMERAS:
                    image = rlds.decode_image(record.images[camera][step]).astype(int)
                    assert np.abs(image - observation[camera]).mean() < 6
                observation, _, success, _, info = env.step(action)
                assert success == (step == len(record.action) - 1)
    assert seen == set(builder.items())


def test_metadata(built):
    builder, folder = built
    episodes = rlds.Episodes(folder, "train")
    assert episodes.robots() == (tabletop.ROBOT,) and episodes.has_action.all()
    assert set(episodes.fps) == {10.0}
    assert episodes.names["action"][:2] == ("left_x", "left_y")
    assert episodes.units["action"][3] == "0 closed .. 1 open" and episodes.units["state"][0] == "m"
    assert episodes.text("camera_layout", 0) == "head,left_wrist,right_wrist"
    report = json.loads((folder / "build_report.json").read_text())
    assert report["kept"] == 8 and report["options"]["image_size"] == 16


def test_actions_are_in_the_workspace(built):
    space = tabletop.TabletopEnv("lift_tray").action_space
    episodes = rlds.Episodes(built[1], "train")
    actions = np.concatenate([episodes[i].action for i in range(len(episodes))])
    assert (actions >= space.low).all() and (actions <= space.high).all()


def test_an_episode_is_a_function_of_its_item():
    builder = Builder(image_size=16)
    item = builder.items()[1]
    first, second = (next(builder.build(item)) for _ in range(2))
    np.testing.assert_array_equal(first.action, second.action)
    np.testing.assert_array_equal(first.images["head"], second.images["head"])
    other = next(builder.build((item[0], item[1] + 1)))
    assert not np.array_equal(first.state, other.state)


def test_arms_wander_and_the_recorded_actions_do_not():
    item = ("red_on_plate", 7)
    straight, wandering = (next(Builder(image_size=16, wander=wander).build(item))
                           for wander in (0.0, 0.01))
    np.testing.assert_array_equal(straight.state[0], wandering.state[0])
    np.testing.assert_array_equal(straight.action[0], wandering.action[0])
    assert 1e-4 < np.abs(straight.state[1] - wandering.state[1]).max() < 0.05


def test_failed_episodes_are_left_out():
    with pytest.raises(Skip, match="lift_tray: not successful"):
        next(Builder(image_size=16, disturbance=0.5).build(("lift_tray", 0)))


def test_tasks():
    assert set(Builder().task_names()) == set(tabletop.CORE_TASKS)
    assert Builder(tasks=("seen",)).task_names() == tuple(tabletop.SEEN_TASKS)
    assert Builder(tasks=("lift_tray", "core")).task_names()[0] == "lift_tray"
    items = Builder(tasks=("lift_tray", "red_on_plate"), episodes=5, seed=7).items()
    assert [seed for _, seed in items] == [7, 8, 9, 10, 11]
    assert [task for task, _ in items].count("lift_tray") == 3
    with pytest.raises(ValueError, match="no task 'lift_trey'. Did you mean 'lift_tray'?"):
        Builder(tasks=("lift_trey",)).items()
    with pytest.raises(ValueError, match="--tasks is empty"):
        Builder(tasks=()).items()
    with pytest.raises(ValueError, match="background 'sene' does not exist. Did you mean 'seen'"):
        Builder(background="sene").items()
