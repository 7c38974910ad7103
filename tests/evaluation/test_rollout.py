"""Rollouts in a suite that counts, in this process: what policies and simulators are told."""

import dataclasses

import numpy as np
import pytest
from counting_suite import PROTOCOL, Chunks, Suite

from jaxvp.evaluation import baselines
from jaxvp.evaluation.rollout import Episode, rollouts
from jaxvp.evaluation.simulation import InProcess, Unseen


def run(policy, num_envs=1, num_videos=0, num_imagined=0, done=(), **changes):
    suite = Suite()
    episodes = list(rollouts(suite, dataclasses.replace(PROTOCOL, **changes), policy, num_envs,
                             num_videos, num_imagined=num_imagined, done=done))
    assert all(env.closed for env in suite.made)
    return episodes, suite


def test_receding_horizon():
    policy = Chunks(4)
    episodes, _ = run(policy, tasks=("b",), trials=1)
    assert policy.seen == [{0: 0.0}, {0: 4.0}]  # It looks again after 4 of the 6 steps.
    assert episodes == [Episode("b", 0, True, 6, [])] and episodes[0].calls == [0, 4]


def test_every_observation_but_the_last_is_told_with_the_action_before_it():
    policy = Chunks(2)
    run(policy, tasks=("a",), trials=2)
    assert policy.told == [
        (0, "reset"), (0, 0.0, None), (0, 1.0, 1.0), (0, 2.0, 1.0),
        (0, "reset"), (0, -1.0, None), (0, 0.0, 1.0), (0, 1.0, 1.0), (0, 2.0, 1.0)]


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
    episodes, _ = run(Chunks(0), num_videos=None, tasks=("a",), trials=2)
    assert [(e.success, e.steps, len(e.frames)) for e in episodes] == [(False, 0, 1)] * 2


def test_a_policy_may_choose_the_start():
    episodes, _ = run(Chunks(1, initial=np.array(1)), tasks=("a",), trials=2)
    assert [e.steps for e in episodes] == [2, 2]


def test_the_expert_acts_until_the_end():
    episodes, _ = run(baselines.ExpertPolicy(), num_videos=None, tasks=("a",), trials=2)
    assert [(e.success, e.steps, e.calls) for e in episodes] == [(True, 3, [0]), (True, 4, [0])]
    assert episodes[1].actions.tolist() == [[1.0]] * 4


@pytest.mark.parametrize("num_envs", [1, 2, 4, 50])
def test_episodes_do_not_depend_on_num_envs(num_envs):
    episodes, suite = run(Chunks(2), num_envs)
    steps = {(e.task, e.trial): (e.success, e.steps) for e in episodes}
    assert steps == {(t, i): (True, n + i) for t, n in (("a", 3), ("b", 6)) for i in range(3)}
    assert len(suite.made) <= min(num_envs, 6) + 2


def test_finished_episodes_are_left_out():
    episodes, _ = run(Chunks(2), num_envs=2, done={("a", 0), ("b", 1), ("b", 2)})
    assert sorted((e.task, e.trial) for e in episodes) == [("a", 1), ("a", 2), ("b", 0)]
    every = {(task, trial) for task in "ab" for trial in range(3)}
    assert run(Chunks(2), done=every)[0] == []


def test_one_environment_serves_all_trials_of_a_task():
    _, suite = run(Chunks(2), num_envs=1)
    assert [env.goal for env in suite.made] == [3, 6]


def test_environments_share_a_call():
    policy = Chunks(3)
    run(policy, num_envs=3, tasks=("a",))
    assert policy.seen == [{0: 0.0, 1: -1.0, 2: -2.0}, {1: 2.0, 2: 1.0}]


class OneAtATime(InProcess):
    """Some environments are slower than others."""

    def wait(self):
        return [self._simulation.handle(self._requests.pop(0))]


def test_the_policy_acts_when_half_of_the_environments_wait_for_it():
    policy, suite = Chunks(1), Suite()
    with OneAtATime(suite, PROTOCOL) as simulators:
        episodes = list(rollouts(None, PROTOCOL, policy, 4, workers=simulators))
    assert len(episodes) == 6
    assert policy.seen[:2] == [{0: 0.0, 1: -1.0}, {2: -2.0, 3: 0.0}]
    assert [len(slots) for slots in policy.seen[-3:]] == [1, 1, 1]


def test_environments_are_closed_after_an_error():
    suite, policy = Suite(), Chunks(1)
    policy.act = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        list(rollouts(suite, PROTOCOL, policy, num_envs=3))
    assert len(suite.made) == 3 and all(env.closed for env in suite.made)


def test_images_are_read_only_where_the_policy_looks():
    _, suite = run(Chunks(4), tasks=("b",), trials=1)
    assert suite.read == [0, 4]  # Nobody looks at the last observation, of step 6.
    policy = Chunks(4)
    policy.looks = lambda slot, count: [k for k in range(count) if k in (0, 3)]
    assert run(policy, tasks=("b",), trials=1)[1].read == [0, 1, 4, 5]
    policy.cameras = ()
    assert run(policy, tasks=("b",), trials=1)[1].read == []


def test_an_image_that_nobody_asked_for_is_no_missing_camera():
    policy, seen = Chunks(4), []
    policy.observe = lambda slot, observation, action: (
        seen.append(observation["images"]), Chunks.observe(policy, slot, observation, action))
    run(policy, tasks=("b",), trials=1)  # It looks at the start, and after the chunk.
    assert [isinstance(images, Unseen) for images in seen] == [False, True, True, True, False, True]
    assert tuple(seen[1]) == ("agentview",)
    with pytest.raises(RuntimeError, match="agentview was not rendered"):
        seen[1]["agentview"]


def test_frames():
    # 20 control steps and at most 10 frames a second: every second step, and how it ends.
    episodes, _ = run(Chunks(4), tasks=("a",), trials=2, num_videos=1)
    assert [int(frame[0, 0, 0]) for frame in episodes[0].frames] == [0, 2, 3]
    assert episodes[1].frames == []
    episodes, _ = run(Chunks(4), tasks=("a",), trials=2, num_videos=None, fps=5.0)
    assert [len(e.frames) for e in episodes] == [4, 5]


def test_what_the_policy_predicted_for_the_frames_of_the_video():
    asked, policy = [], Chunks(4)
    policy.act = lambda slots, imagine: (asked.append(list(imagine)), Chunks.act(policy, slots))[1]
    policy.imagined = lambda slot, steps: np.array(list(steps)) if asked[-1] else None
    episodes, _ = run(policy, tasks=("a",), num_videos=2, num_imagined=1)
    assert [e.imagined if e.imagined is None else e.imagined.tolist() for e in episodes] == [
        [0, 2, 3], None, None]
    assert asked == [[0], [], [], []]
    assert all(e.imagined is None or len(e.imagined) == len(e.frames) for e in episodes)


def test_what_was_done_in_which_state():
    episode = run(Chunks(2), tasks=("a",), trials=1)[0][0]
    assert episode.actions.tolist() == [[1.0]] * 3
    assert episode.states.tolist() == [[0.0], [1.0], [2.0]]
    assert episode.calls == [0, 2] and len(episode.seconds) == 3 and episode.wall_s > 0


def test_cameras_without_a_layout():
    with pytest.raises(ValueError, match="No layout has the cameras \\('front',\\)"):
        run(Chunks(1), cameras=("front",))
