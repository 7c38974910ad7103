"""The ALOHA suite: seeds, conventions, the bimanual expert and its inverse kinematics."""

import dataclasses

import numpy as np
import pytest

from jaxvp.envs import aloha as envs
from jaxvp.envs import aloha_expert
from jaxvp.errors import UserError
from jaxvp.evaluation import baselines
from jaxvp.evaluation.rollout import rollouts, video_layout
from jaxvp.evaluation.suites import aloha


@pytest.fixture(scope="module")
def suite():
    return aloha.AlohaSuite("aloha", image_size=64)


@pytest.fixture(scope="module")
def env(suite):
    env = suite.make("transfer_cube")
    yield env
    env.close()


def successes(suite, policy, tasks, trials):
    protocol = dataclasses.replace(suite.protocol, tasks=tasks, trials=trials)
    return sum(episode.success for episode in rollouts(suite, protocol, policy, num_envs=2))


def test_the_protocol_is_that_of_act(suite):
    protocol = aloha.AlohaSuite("aloha").protocol
    assert protocol.camera_size == (480, 640) and protocol.max_steps == 400
    assert protocol.fps == 50 and protocol.trials == 50 and len(protocol.action) == 14
    assert suite.protocol.camera_size == (64, 64)
    assert video_layout(protocol).cameras == ("top",)


def test_a_trial_is_the_same_whatever_came_before(suite, env):
    first = env.reset(3)
    state, image = first["state"], first["images"]["top"]
    for _ in range(5):
        env.step(np.array(suite.protocol.action_high, np.float32))
    assert not np.array_equal(env.reset(4)["images"]["top"], image)
    other = suite.make("transfer_cube")
    for again in (env.reset(3), other.reset(3)):
        np.testing.assert_array_equal(again["state"], state)
        np.testing.assert_array_equal(again["images"]["top"], image)
    assert first["instruction"] == envs.TASKS["transfer_cube"]
    other.close()


def test_pictures_are_upright(env):
    """The camera looks down: x to the right, y up; wider than high, then squeezed."""
    seen = []
    for trial in range(3):
        image = env.reset(trial)["images"]["top"].astype(int)
        cube = np.argwhere(image[..., 0] > image[..., 1] + 80)
        assert image.shape == (64, 64, 3) and len(cube)
        seen.append((*cube.mean(0), *env._physics.data.body("box").xpos[:2]))
    rows, columns, x, y = np.array(seen).T
    # The camera is 0.8 m above (0, 0.6), and sees 78 degrees of the height.
    scale = 32 / (0.75 * np.tan(np.radians(39)))
    np.testing.assert_allclose(columns, 31.5 + scale * x * 3 / 4, atol=1.2)
    np.testing.assert_allclose(rows, 31.5 - scale * (y - 0.6), atol=1.2)


def test_actions_are_positions_in_the_order_of_their_names(env):
    state = env.reset(0)["state"]
    names = envs.NAMES
    target = state.copy()
    target[names.index("left_gripper [0 closed .. 1 open]")] = 1
    target[names.index("right_gripper [0 closed .. 1 open]")] = 0.5
    target[names.index("right_waist [rad]")] = 0.2
    for _ in range(60):
        observation, _ = env.step(target)
    np.testing.assert_allclose(observation["state"], target, atol=0.08)
    target[[6, 13]] = 0
    for _ in range(60):
        observation, _ = env.step(target)
    assert (observation["state"][[6, 13]] < 0.15).all(), "closed"


def test_inverse_kinematics(env):
    model = env._physics.model.ptr
    for side in (aloha_expert.LEFT, aloha_expert.RIGHT):
        arm, start = aloha_expert.Arm(model, side), np.array([0, -0.96, 1.16, 0, -0.3, 0])
        wanted = arm.pose(start + np.array([0.3, 0.2, -0.1, 0.2, 0.3, -0.4]))
        found = arm.angles(*wanted, start)
        position, rotation = arm.pose(found)
        np.testing.assert_allclose(position, wanted[0], atol=1e-3)
        assert (rotation * wanted[1].inv()).magnitude() < 1e-3
        out_of_reach = arm.angles(np.array([0.0, 0, 5]), wanted[1], start)
        assert np.isfinite(out_of_reach).all()


@pytest.mark.parametrize("task", envs.TASKS)
def test_expert_succeeds(suite, task):
    assert successes(suite, baselines.ExpertPolicy(), (task,), 2) == 2


def test_the_cube_ends_in_the_left_hand(env):
    env.reset(5)
    done = False
    while not env.expert_is_done:
        done |= env.step(env.expert_action())[1]
    data = env._physics.data
    cube, left, right = (data.body(name).xpos for name in (
        "box", "vx300s_left/left_finger_link", "vx300s_right/left_finger_link"))
    assert done and not env.table_is_touched
    assert np.linalg.norm(cube - left) < 0.1 < np.linalg.norm(cube - right)
    env.reset(6)
    env.step(env.expert_action())
    for _ in range(20):
        env.step(env.expert_action())
    assert env.table_is_touched and not env.expert_is_done


def test_replays_succeed_and_random_does_not(suite):
    found = {"transfer_cube": suite.demonstrations("transfer_cube", 1)}
    assert successes(suite, baselines.ReplayPolicy(found), ("transfer_cube",), 1) == 1
    random = baselines.RandomPolicy(suite.protocol)
    assert successes(suite, random, ("transfer_cube",), 1) == 0


def test_an_unstable_simulation_fails_and_stays(env, suite):
    low, high = (np.array(x, np.float32) for x in (suite.protocol.action_low,
                                                   suite.protocol.action_high))
    env.reset(0)
    for step in range(100):
        before = env.step(high if step % 2 else low)[0]["state"]
        if env._unstable:
            break
    assert env._unstable, "these actions no longer upset the simulation"
    observation, success = env.step(low)
    np.testing.assert_array_equal(observation["state"], before)
    assert np.isfinite(before).all() and not success and np.abs(before).max() < 10
    assert observation["images"]["top"].std() > 5
    env.reset(0)
    assert not env._unstable


def test_bad_input(suite, env):
    with pytest.raises(UserError, match="ALOHA has no task 'fold'; it has transfer_cube, insert"):
        suite.make("fold")
    env.reset(0)
    with pytest.raises(UserError, match="An action is 14 finite numbers"):
        env.step(np.full(14, np.inf))
