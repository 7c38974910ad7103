"""The tabletop suites: conditions, seeds, baselines."""

import dataclasses

import numpy as np
import pytest

from jaxvp.envs import tabletop as envs
from jaxvp.evaluation import baselines
from jaxvp.evaluation.rollout import rollouts
from jaxvp.evaluation.suites import tabletop


@pytest.fixture(scope="module")
def suite():
    return tabletop.TabletopSuite("tabletop", image_size=16)


def successes(suite, policy, tasks, trials=2, num_envs=4):
    protocol = dataclasses.replace(suite.protocol, tasks=tasks, trials=trials)
    episodes = list(rollouts(suite, protocol, policy, num_envs))
    assert len(episodes) == len(tasks) * trials
    return sum(episode.success for episode in episodes)


@pytest.mark.parametrize("name", tabletop.SUITES)
def test_expert_succeeds(name):
    suite = tabletop.TabletopSuite(name, image_size=16)
    tasks = suite.protocol.tasks
    assert successes(suite, baselines.ExpertPolicy(), tasks, trials=1) == len(tasks)


def test_random_fails(suite):
    policy = baselines.RandomPolicy(suite.protocol)
    assert successes(suite, policy, ("red_on_plate", "lift_tray", "hand_over_green")) == 0


def test_replay_succeeds(suite):
    tasks = ("lift_tray", "stack_red_on_blue")
    found = {task: suite.demonstrations(task, 2) for task in tasks}
    assert successes(suite, baselines.ReplayPolicy(found), tasks) == 4
    assert found["lift_tray"][1].actions.shape[1] == 8


def test_replay_needs_its_own_start(suite):
    demonstrations = suite.demonstrations("red_on_plate", 2)
    swapped = [dataclasses.replace(d, initial=np.array(1 - i))
               for i, d in enumerate(demonstrations)]
    policy = baselines.ReplayPolicy({"red_on_plate": swapped})
    assert successes(suite, policy, ("red_on_plate",)) == 0


def test_trials_are_reproducible_and_different(suite):
    def start(trial):
        observation = suite.make("red_on_plate").reset(trial)
        return {**observation, "images": dict(observation["images"])}

    first, second, again = start(0), start(1), start(0)
    assert not np.array_equal(first["images"]["head"], second["images"]["head"])
    for camera in suite.protocol.cameras:
        np.testing.assert_array_equal(first["images"][camera], again["images"][camera])
    assert first["images"]["head"].shape == (16, 16, 3) and first["state"].shape == (8,)
    assert first["instruction"] == suite.instruction("red_on_plate")


def test_random_is_reproducible_and_in_range(suite):
    def actions(seed, trial):
        policy = baselines.RandomPolicy(suite.protocol, seed)
        policy.reset(0, "lift_tray", trial)
        return policy.act([0])[0]

    np.testing.assert_array_equal(actions(0, 0), actions(0, 0))
    assert not np.array_equal(actions(0, 0), actions(0, 1))
    assert not np.array_equal(actions(0, 0), actions(1, 0))
    low, high = (np.array(x, np.float32) for x in (suite.protocol.action_low,
                                                   suite.protocol.action_high))
    assert (actions(0, 0) >= low).all() and (actions(0, 0) <= high).all()
    assert (np.ptp(actions(0, 0), axis=0) > 0.8 * (high - low)).all()


def test_suites_show_what_they_say():
    protocols = {name: tabletop.TabletopSuite(name).protocol for name in tabletop.SUITES}
    assert set(protocols["tabletop_unseen_tasks"].tasks) == set(envs.UNSEEN_TASKS)
    assert set(protocols["tabletop"].tasks) == set(envs.SEEN_TASKS)
    assert set(protocols["tabletop_core"].tasks) == set(envs.CORE_TASKS)
    assert "disturbance 0.01 m" in protocols["tabletop_disturbed"].init_states
    assert "background unseen" in protocols["tabletop_unseen_backgrounds"].init_states
    assert "distractors unseen" in protocols["tabletop_unseen_distractors"].init_states
    images = {name: tabletop.TabletopSuite(name).make("red_on_plate").reset(0)["images"]["head"]
              for name in protocols if name != "tabletop_unseen_tasks"}
    for name in ("tabletop_unseen_backgrounds", "tabletop_unseen_distractors"):
        assert not np.array_equal(images[name], images["tabletop"])
    np.testing.assert_array_equal(images["tabletop_core"], images["tabletop"])
