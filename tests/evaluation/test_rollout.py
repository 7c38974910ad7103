"""Rollouts in a suite that counts: an episode succeeds when its actions sum up to its goal."""

import dataclasses

import numpy as np
import pytest

from jaxvp.evaluation.protocol import Protocol
from jaxvp.evaluation.rollout import Episode, rollouts

PROTOCOL = Protocol(
    name="count", version=1, suite="count", tasks=("a", "b"), trials=3, max_steps=10,
    wait_steps=0, init_states="none", seeds="none", fps=20.0, cameras=("agentview",),
    camera_size=(4, 4), rotation="none", gripper="none", robot="counter", action=("step",),
    state=("count",), action_low=(0.0,), action_high=(1.0,), simulator="none",
)


class Env:
    def __init__(self, task):
        self.goal, self.closed = {"a": 3, "b": 6}[task], False

    def reset(self, trial):
        self.count = -trial  # so that trials take different numbers of steps
        return self.observation()

    def reset_to(self, initial):
        self.count = int(initial)
        return self.observation()

    def step(self, action):
        assert not self.closed
        self.count += float(action[0])
        return self.observation(), self.count >= self.goal

    def observation(self):
        image = np.full((4, 4, 3), int(self.count) % 256, np.uint8)
        return {"images": {"agentview": image}, "state": np.array([self.count], np.float32),
                "instruction": "count", "robot": "counter"}

    def close(self):
        self.closed = True


class Suite:
    def __init__(self):
        self.protocol, self.made = PROTOCOL, []

    def make(self, task):
        self.made.append(Env(task))
        return self.made[-1]


class Chunks:
    """Gives `size` actions of 1, and notes what it is told, and what was seen when it acts."""

    latencies = ()

    def __init__(self, size, initial=None):
        self.size, self.initial, self.seen, self.told, self.now = size, initial, [], [], {}

    def reset(self, slot, task, trial, env):
        self.told.append((slot, "reset"))
        return self.initial

    def observe(self, slot, observation, action):
        self.now[slot] = float(observation["state"][0])
        self.told.append((slot, self.now[slot], None if action is None else float(action[0])))

    def act(self, slots):
        self.seen.append({slot: self.now[slot] for slot in slots})
        return {slot: np.ones((self.size, 1), np.float32) for slot in slots}


def run(policy, num_envs=1, num_videos=0, **changes):
    suite = Suite()
    episodes = list(rollouts(suite, dataclasses.replace(PROTOCOL, **changes), policy, num_envs,
                             num_videos))
    assert all(env.closed for env in suite.made)
    return episodes, suite


def test_receding_horizon():
    policy = Chunks(4)
    episodes, _ = run(policy, tasks=("b",), trials=1)
    assert policy.seen == [{0: 0.0}, {0: 4.0}]  # It looks again after 4 of the 6 steps.
    assert episodes == [Episode("b", 0, True, 6, [])]


def test_every_observation_is_told_with_the_action_before_it():
    policy = Chunks(2)
    run(policy, tasks=("a",), trials=2)
    assert policy.told == [
        (0, "reset"), (0, 0.0, None), (0, 1.0, 1.0), (0, 2.0, 1.0), (0, 3.0, 1.0),
        (0, "reset"), (0, -1.0, None), (0, 0.0, 1.0), (0, 1.0, 1.0), (0, 2.0, 1.0), (0, 3.0, 1.0)]


def test_success_ends_a_chunk_early():
    episodes, _ = run(Chunks(100), tasks=("a",), trials=2)
    assert [e.steps for e in episodes] == [3, 4]


def test_max_steps_end_an_episode_inside_a_chunk():
    episodes, _ = run(Chunks(3), tasks=("b",), trials=1, max_steps=5)
    assert episodes == [Episode("b", 0, False, 5, [])]


def test_success_at_the_last_step_counts():
    episodes, _ = run(Chunks(2), tasks=("b",), trials=1, max_steps=6)
    assert episodes == [Episode("b", 0, True, 6, [])]


def test_a_policy_may_give_up():
    episodes, _ = run(Chunks(0), tasks=("a",), trials=1)
    assert episodes == [Episode("a", 0, False, 0, [])]


def test_a_policy_may_choose_the_start():
    episodes, _ = run(Chunks(1, initial=np.array(1)), tasks=("a",), trials=2)
    assert [e.steps for e in episodes] == [2, 2]


@pytest.mark.parametrize("num_envs", [1, 2, 4, 50])
def test_episodes_do_not_depend_on_num_envs(num_envs):
    episodes, suite = run(Chunks(2), num_envs)
    steps = {(e.task, e.trial): (e.success, e.steps) for e in episodes}
    assert steps == {(t, i): (True, n + i) for t, n in (("a", 3), ("b", 6)) for i in range(3)}
    assert len(suite.made) <= min(num_envs, 6) + 2


def test_one_environment_serves_all_trials_of_a_task():
    _, suite = run(Chunks(2), num_envs=1)
    assert [env.goal for env in suite.made] == [3, 6]


def test_environments_share_a_call():
    policy = Chunks(3)
    run(policy, num_envs=3, tasks=("a",))
    assert policy.seen == [{0: 0.0, 1: -1.0, 2: -2.0}, {1: 2.0, 2: 1.0}]


def test_environments_are_closed_after_an_error():
    suite, policy = Suite(), Chunks(1)
    policy.act = lambda slots: 1 / 0
    with pytest.raises(ZeroDivisionError):
        list(rollouts(suite, PROTOCOL, policy, num_envs=3))
    assert len(suite.made) == 3 and all(env.closed for env in suite.made)


def test_frames():
    # 20 control steps and at most 10 frames a second: every second step, and how it ends.
    episodes, _ = run(Chunks(4), tasks=("a",), trials=2, num_videos=1)
    assert [int(frame[0, 0, 0]) for frame in episodes[0].frames] == [0, 2, 3]
    assert episodes[1].frames == []
    episodes, _ = run(Chunks(4), tasks=("a",), trials=2, num_videos=None, fps=5.0)
    assert [len(e.frames) for e in episodes] == [4, 5]


def test_cameras_without_a_layout():
    with pytest.raises(ValueError, match="No layout has the cameras \\('front',\\)"):
        run(Chunks(1), cameras=("front",))
