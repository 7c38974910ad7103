import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from jaxvp.envs import tabletop
from jaxvp.envs.tabletop import CAMERAS, TabletopEnv
from jaxvp.envs.tabletop_world import BODIES, HIGH, HOME, LEFT, LOW, RIGHT, World


def state(left, right=HOME[RIGHT]):
    return np.array([left, right])


def drive(world, target, steps):
    for _ in range(steps):
        world.advance(target, np.zeros((2, 3)))


def test_gymnasium_accepts_it():
    check_env(gymnasium.make("jaxvp/Tabletop-v0", task="lift_tray").unwrapped)


def test_seed_determines_the_episode():
    def episode(seed):
        env = TabletopEnv("red_on_plate", image_size=32, distractors="seen", disturbance=0.01)
        frames = [env.reset(seed=seed)[0]]
        frames += [env.step(env.expert_action())[0] for _ in range(5)]
        return [np.concatenate([frame[key].ravel() for key in frame]) for frame in frames]

    np.testing.assert_array_equal(episode(3), episode(3))
    assert not np.array_equal(episode(3), episode(4))


def test_observation_info_and_truncation():
    env = TabletopEnv("red_on_plate", image_size=32, max_steps=2)
    observation, info = env.reset(seed=0)
    assert observation["head"].shape == (32, 32, 3) and observation["head"].dtype == np.uint8
    np.testing.assert_allclose(observation["state"], HOME.reshape(-1), rtol=1e-6)
    assert info == {
        "success": False,
        "instruction": "put the red block on the plate",
        "task": "red_on_plate",
    }
    assert env.step(observation["state"])[1:4] == (0.0, False, False)
    assert env.step(observation["state"])[1:4] == (0.0, False, True)
    assert env.render().shape == (32, 96, 3)
    assert len(tabletop.ACTION_NAMES) == 8


def test_success_ends_the_episode_with_reward():
    env = TabletopEnv("lift_tray", image_size=16)
    env.reset(seed=0)
    rewards, done = [], False
    while not done:
        _, reward, done, truncated, info = env.step(env.expert_action())
        rewards.append(reward)
        assert not truncated
    assert info["success"] and rewards == [0.0] * (len(rewards) - 1) + [1.0]


@pytest.mark.parametrize("arm", [LEFT, RIGHT])
def test_speed_limit_and_workspace(arm):
    world = World([], [])
    target = np.full((2, 4), 9.0)
    target[:, 3] = 0
    world.advance(target, np.zeros((2, 3)))
    assert np.linalg.norm(world.arms[arm, :3] - HOME[arm, :3]) == pytest.approx(0.05)
    assert world.arms[arm, 3] == 0.5
    drive(world, target, 30)
    np.testing.assert_allclose(world.arms[arm, :3], HIGH[arm, :3])
    drive(world, -target, 40)
    np.testing.assert_allclose(world.arms[arm, :3], LOW[arm, :3])


def test_an_arm_at_its_target_does_not_tremble():
    world = World([], [])
    world.advance(HOME, np.full((2, 3), 0.02))
    np.testing.assert_array_equal(world.arms, HOME)


def block_world(distance):
    """The left hand open at 0.04 m above the table, a block `distance` to its right."""
    world = World([BODIES["red"]], [(-0.2 + distance, 0, 0)])
    world.arms[LEFT] = (-0.2, 0, 0.04, 1)
    return world


def test_grasp_carry_and_drop():
    world = block_world(0.03)
    drive(world, state((-0.2, 0, 0.04, 0)), 1)
    assert world.held == [None, None]  # 0.5 is not yet closed
    drive(world, state((-0.2, 0, 0.04, 0)), 1)
    assert world.held == [0, None]
    drive(world, state((-0.3, 0.1, 0.2, 0)), 10)
    np.testing.assert_allclose(world.positions[0], (-0.27, 0.1, 0.16))
    assert world.arms[LEFT, 3] == 0.4  # the block is in between
    drive(world, state((-0.3, 0.1, 0.2, 1)), 1)
    assert world.held == [None, None]
    np.testing.assert_allclose(world.positions[0], (-0.27, 0.1, 0.0))


def test_no_grasp_from_afar_or_by_a_closed_gripper():
    world = block_world(0.07)
    drive(world, state((-0.2, 0, 0.04, 0)), 3)
    assert world.held == [None, None]
    drive(world, state((-0.15, 0, 0.04, 0)), 3)
    assert world.held == [None, None]


def test_a_block_falls_on_what_is_below():
    world = World([BODIES["plate"], BODIES["red"], BODIES["blue"]], np.zeros((3, 3)))
    world.positions[1:] = ((0, 0, 0.2), (0.02, 0, 0.3))
    for block in (1, 2):
        world.held[LEFT] = block
        world.arms[LEFT] = (*world.positions[block], 0.4)
        world.offset[LEFT] = 0
        drive(world, state((*world.positions[block], 1)), 1)
    np.testing.assert_allclose(world.positions[:, 2], (0, 0.01, 0.09))
    assert world.support == [None, 0, 1]
    assert world.rests_on(2, 0) and world.rests_on(2, 1) and not world.rests_on(1, 2)


def test_one_hand_cannot_lift_the_tray_and_slips():
    world = World([BODIES["tray"]], [(0, 0, 0)])
    world.arms[LEFT] = (-0.14, 0, 0.03, 1)
    drive(world, state((-0.14, 0, 0.03, 0)), 2)
    assert world.held == [0, None]
    drive(world, state((-0.14, 0, 0.2, 0)), 4)
    assert world.held == [None, None]
    np.testing.assert_array_equal(world.positions[0], (0, 0, 0))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"task": "red_on_plat"}, "Did you mean 'red_on_plate'"),
        ({"task": "lift_tray", "background": "sen"}, "Did you mean 'seen'"),
        ({"task": "lift_tray", "distractors": "many"}, "Choose from none, seen, unseen"),
        ({"task": "lift_tray", "render_mode": "human"}, "render mode 'human'"),
        ({"task": "lift_tray", "image_size": 4}, "at least 16"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TabletopEnv(**arguments)


@pytest.mark.parametrize("action", [np.zeros(7), np.full(8, np.nan)])
def test_bad_action(action):
    env = TabletopEnv("lift_tray", image_size=16)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="8 finite numbers"):
        env.step(action)
    with pytest.raises(ValueError, match="camera 'hed' does not exist. Did you mean 'head'"):
        env.flow("hed")


def test_unseen_variants_differ():
    seen, unseen = (tabletop.BACKGROUNDS[name] for name in ("seen", "unseen"))
    assert not {b[1:] for b in seen} & {b[1:] for b in unseen}
    seen, unseen = (tabletop.DISTRACTORS[name] for name in ("seen", "unseen"))
    assert not {(b.kind) for b in seen} & {(b.kind) for b in unseen}
    pictures = [
        TabletopEnv("lift_tray", image_size=32, background=background, distractors=distractors)
        .reset(seed=0)[0]["head"]
        .astype(float)
        for background, distractors in (("seen", "none"), ("unseen", "none"), ("seen", "unseen"))
    ]
    assert np.abs(pictures[0] - pictures[1]).mean() > 5
    assert (np.abs(pictures[0] - pictures[2]).max(-1) > 30).sum() >= 4
    assert CAMERAS == ("head", "left_wrist", "right_wrist")
