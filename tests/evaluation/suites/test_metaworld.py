"""The Meta-World suites: seeds, views, conventions, experts."""

import dataclasses
import sys

import numpy as np
import pytest
from metaworld.env_dict import MT50_V3

from jaxvp.envs import metaworld as envs
from jaxvp.errors import UserError
from jaxvp.evaluation import baselines, suites
from jaxvp.evaluation.rollout import rollouts
from jaxvp.evaluation.suites import metaworld

TASK = "drawer-open-v3"


@pytest.fixture(scope="module")
def suite():
    return metaworld.MetaWorldSuite("metaworld", image_size=64)


def successes(suite, policy, tasks, trials=2):
    protocol = dataclasses.replace(suite.protocol, tasks=tasks, trials=trials)
    return sum(episode.success for episode in rollouts(suite, protocol, policy, num_envs=2))


def test_the_tasks_are_those_of_mt50(suite):
    assert suite.protocol.tasks == tuple(MT50_V3)
    assert all(suite.instruction(task) for task in suite.protocol.tasks)
    assert suite.protocol.camera_size == (64, 64)
    assert metaworld.MetaWorldSuite("metaworld").protocol.camera_size == (480, 480)


def test_a_trial_is_the_same_whatever_came_before(suite):
    env, other = suite.make(TASK), suite.make(TASK)
    first = env.reset(3)
    state, image = first["state"], first["images"][envs.CAMERA]
    for _ in range(5):
        env.step(np.array([1, -1, 1, 0], np.float32))
    different = env.reset(4)["images"][envs.CAMERA]
    for again in (env.reset(3), other.reset(3)):
        np.testing.assert_array_equal(again["state"], state)
        np.testing.assert_array_equal(again["images"][envs.CAMERA], image)
    assert not np.array_equal(different, image)
    assert first["instruction"] == "Open a drawer" and first["robot"] == suite.protocol.robot
    env.close(), other.close()


def test_starts_are_no_accident_of_numpys_generator(suite):
    env = suite.make("reach-v3")
    np.random.seed(1)
    env.reset(0)
    first, before = env.expert_action(), np.random.get_state()[1].copy()
    env.reset(0)
    np.testing.assert_array_equal(env.expert_action(), first)
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    env.reset(1)
    assert not np.array_equal(env.expert_action(), first)
    env.close()


def wood(image):
    """bool[H, W]: the table, brown where the robot is red and the floor is grey."""
    red, _, blue = np.moveaxis(image.astype(int), -1, 0)
    return (red - blue > 15) & (red - blue < 70)


def arm(image):
    """bool[H, W]: the robot."""
    red, green, _ = np.moveaxis(image.astype(int), -1, 0)
    return red - green > 70


def test_pictures_are_upright(suite):
    env = suite.make(TASK)
    image = env.reset(0)["images"][envs.CAMERA]
    env.close()
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    assert wood(image)[32:].mean() > 3 * wood(image)[:32].mean()
    assert np.argwhere(arm(image))[:, 1].mean() < 32, "mirrored: the robot stands on the left"


def test_avdc_shows_three_cameras_in_turn_mirrored():
    suite = metaworld.MetaWorldSuite("metaworld_avdc")
    protocol = suite.protocol
    assert len(protocol.tasks) == 11 and set(protocol.tasks) < set(envs.TASKS)
    assert protocol.trials == 75 and protocol.max_steps == 490
    assert suite.instruction("door-open-v3") == "door open"
    env = suite.make("door-open-v3")
    observations = []
    for trial in range(4):
        observation = env.reset(trial)
        observations.append((observation["images"][envs.CAMERA], env._env._seen))
        assert observation["robot"] == protocol.robot != envs.ROBOT
        assert observation["instruction"] == "door open"
    env.close()
    (a, first), (b, second), (c, third), (_, other) = observations
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, third)
    assert not np.array_equal(first, other)
    assert a.shape == (240, 320, 3) and (a != b).any() and (b != c).any()
    assert wood(b)[120:].sum() > wood(b)[:120].sum()
    assert np.argwhere(arm(b))[:, 1].mean() > 160, "the robot stands on the left, seen from corner2"


def test_the_gripper_is_0_closed_to_1_open(suite):
    env = suite.make(TASK)
    opening = [env.reset(0)["state"][3]]
    for gripper in (0, 1):
        for _ in range(25):
            observation, _ = env.step(np.array([0, 0, 0, gripper], np.float32))
        opening.append(observation["state"][3])
    env.close()
    assert opening[1] < 0.5 < min(opening[0], opening[2]) and max(opening) <= 1
    action = np.array([[2.0, -3, 0.5, 1], [0, 0, 0, -1], [0, 0, 0, 0.5]])
    np.testing.assert_array_equal(envs.from_metaworld(action),
                                  [[1, -1, 0.5, 0], [0, 0, 0, 1], [0, 0, 0, 0.25]])
    np.testing.assert_array_equal(envs.to_metaworld(envs.from_metaworld(action)),
                                  action.clip(-1, 1))


def test_an_action_moves_the_hand_by_centimetres(suite):
    env = suite.make("reach-v3")
    start = env.reset(0)["state"]
    for _ in range(20):
        observation, _ = env.step(np.array([0.5, 0, 0, 1], np.float32))
    env.close()
    moved = observation["state"] - start
    assert abs(moved[0] - 0.1) < 0.03 and np.abs(moved[1:3]).max() < 0.02


def test_experts_succeed_and_random_does_not(suite):
    tasks = (TASK, "pick-place-v3", "peg-insert-side-v3", "button-press-topdown-v3")
    assert successes(suite, baselines.ExpertPolicy(), tasks) == 2 * len(tasks)
    random = baselines.RandomPolicy(suite.protocol)
    assert successes(suite, random, ("pick-place-v3",), trials=1) == 0


def test_every_task_has_an_expert(suite):
    for task in suite.protocol.tasks:
        assert callable(envs.ENV_POLICY_MAP[task]().get_action)


def test_replays_succeed_from_their_own_starts(suite):
    found = {TASK: suite.demonstrations(TASK, 2)}
    assert successes(suite, baselines.ReplayPolicy(found), (TASK,)) == 2
    assert found[TASK][0].actions.shape[1] == 4 and found[TASK][0].actions.dtype == np.float32


def test_bad_input(suite):
    with pytest.raises(UserError, match="no task 'draw-open-v3'. Did you mean 'drawer-open-v3'"):
        suite.make("draw-open-v3")
    env = suite.make(TASK)
    env.reset(0)
    for action in (np.zeros(3), np.full(4, np.nan)):
        with pytest.raises(UserError, match="An action is 4 finite numbers"):
            env.step(action)
    env.close()


def test_without_the_simulator_the_remedy_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("metaworld")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "metaworld", None)
    for name in ("jaxvp.envs.metaworld", "jaxvp.evaluation.suites.metaworld"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("jaxvp.envs.metaworld")
    monkeypatch.delattr("jaxvp.evaluation.suites.metaworld")
    with pytest.raises(UserError, match=r"needs metaworld, .*pip install 'jaxvp\[metaworld\]'"):
        suites.make("metaworld", {}, {})
