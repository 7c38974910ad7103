import numpy as np
import pytest

from jaxvp.envs.tabletop import CORE_TASKS, SEEN_TASKS, UNSEEN_TASKS, TabletopEnv
from jaxvp.envs.tabletop_tasks import DISTRACTORS, ZONES, expert_action, is_success, sample_world
from jaxvp.envs.tabletop_world import HOME

TASKS = SEEN_TASKS | UNSEEN_TASKS


def run(name, seed, act, steps=60, disturbance=0.0, before=0):
    """Whether `act(task, world)` succeeds from `seed`, without pictures, after `before` random
    actions."""
    rng = np.random.default_rng(seed)
    env = TabletopEnv(name)
    world = sample_world(TASKS[name], rng, "seen")
    for step in range(before + steps):
        action = env.action_space.low + rng.random(8) * (
            env.action_space.high - env.action_space.low
        )
        if step >= before:
            action = act(TASKS[name], world)
            assert env.action_space.contains(action), action
        world.advance(action.reshape(2, 4), rng.normal(size=(2, 3)) * disturbance)
        if is_success(TASKS[name], world):
            return True
    return False


def test_the_task_lists():
    assert len(CORE_TASKS) == 2 and "lift_tray" in CORE_TASKS
    assert CORE_TASKS.keys() <= SEEN_TASKS.keys() and len(SEEN_TASKS) >= 10
    assert not SEEN_TASKS.keys() & UNSEEN_TASKS.keys() and len(UNSEEN_TASKS) >= 2
    instructions = {task.instruction for task in SEEN_TASKS.values()}
    for name, task in TASKS.items():
        assert task.name == name and len(task.instruction) < 40
        assert name not in UNSEEN_TASKS or task.instruction not in instructions


@pytest.mark.parametrize("disturbance", [0.0, 0.01])
@pytest.mark.parametrize("name", TASKS)
def test_expert_succeeds(name, disturbance):
    wins = [run(name, seed, expert_action, disturbance=disturbance) for seed in range(20)]
    assert np.mean(wins) >= 0.95


@pytest.mark.parametrize("name", TASKS)
def test_expert_recovers_from_anything(name):
    wins = [run(name, seed, expert_action, 90, before=25) for seed in range(10)]
    assert np.mean(wins) >= 0.9


@pytest.mark.parametrize("name", TASKS)
def test_no_task_is_solved_by_chance_or_by_waiting(name):
    assert not run(name, 0, lambda task, world: HOME.astype(np.float32).reshape(-1))
    rng = np.random.default_rng(0)
    space = TabletopEnv(name).action_space
    wins = [
        run(name, seed, lambda *_: rng.uniform(space.low, space.high).astype(np.float32))
        for seed in range(10)
    ]
    assert not any(wins)


@pytest.mark.parametrize("name", ("red_on_plate", "green_on_plate", "blue_in_bowl"))
def test_the_wrong_block_does_not_count(name):
    """What must be read from the instruction: the other block on the target is no success."""
    task = TASKS[name]
    world = sample_world(task, np.random.default_rng(0))
    (block, target), other = task.moves[0], task.scene[2][0]
    for moved in (other, block):
        world.support[world.index[moved]] = world.index[target]
        assert is_success(task, world) == (moved == block)
    world.held[0] = world.index[block]
    assert not is_success(task, world)


@pytest.mark.parametrize("name", TASKS)
def test_scenes_do_not_overlap_and_stay_in_their_zones(name):
    rng = np.random.default_rng(0)
    sides = set()
    for _ in range(20):
        world = sample_world(TASKS[name], rng, "unseen")
        for i, body in enumerate(world.bodies):
            for j in range(i):
                gap = np.linalg.norm(world.positions[i] - world.positions[j])
                assert gap > body.radius + world.bodies[j].radius
        for body, zone in TASKS[name].scene:
            x, y, _ = world.positions[world.index[body]]
            if zone == "side":
                zone = "left" if x < 0 else "right"
                sides.add((body, zone))
            assert ZONES[zone][0][0] <= x <= ZONES[zone][0][1]
            assert ZONES[zone][1][0] <= y <= ZONES[zone][1][1]
        assert 2 <= len(world.bodies) - len(TASKS[name].scene) <= 3
    assert len(sides) == 2 * sum(zone == "side" for _, zone in TASKS[name].scene)
    assert all(body.radius < 0.04 for kind in DISTRACTORS.values() for body in kind)
