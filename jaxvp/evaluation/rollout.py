"""Rollouts: episodes of a policy in a suite, several environments at a time."""

import collections
import dataclasses
import typing
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from jaxvp.data.observation import LAYOUTS, Layout, canvas
from jaxvp.errors import UserError
from jaxvp.evaluation.protocol import Observation, Protocol, SimEnv, Suite

# Frames per second of recorded videos, at most: enough to see why an episode failed.
VIDEO_FPS = 10.0


class Policy(typing.Protocol):
    """What is evaluated: `PolicyRunner`, or a baseline.

    Attributes:
      latencies: seconds that each call of a model took.
    """

    latencies: Sequence[float]

    def reset(self, slot: int, task: str, trial: int, env: SimEnv) -> np.ndarray | None:
        """Announces an episode in environment `slot`.

        Returns:
          Where it should start, as `SimEnv.reset_to` takes it; None for the trial's own start.
        """

    def observe(self, slot: int, observation: Observation, action: np.ndarray | None):
        """Tells what is seen in environment `slot`: after its reset, and after every step, with the
        action of that step. Its images can be read until the next step."""

    def act(self, slots: Iterable[int]) -> dict[int, np.ndarray]:
        """For each slot the actions until it is asked again, float32[n, A]; none gives up."""


@dataclasses.dataclass(frozen=True)
class Episode:
    """How one trial went.

    Attributes:
      steps: control steps until success, or until the end.
      frames: uint8[H, W, 3] pictures of all cameras, first to last; empty if not recorded.
    """

    task: str
    trial: int
    success: bool
    steps: int
    frames: list[np.ndarray] = dataclasses.field(repr=False, compare=False)


@dataclasses.dataclass
class _Slot:
    """An environment and the episode that it is in."""

    env: SimEnv
    task: str
    trial: int = 0
    observation: Observation | None = None
    steps: int = 0
    frames: list[np.ndarray] = dataclasses.field(default_factory=list)


def video_stride(protocol: Protocol) -> int:
    """Control steps per recorded frame."""
    return max(1, round(protocol.fps / VIDEO_FPS))


def video_layout(protocol: Protocol) -> Layout:
    """The layout that shows all cameras of a protocol.

    Raises:
      UserError: there is none.
    """
    for layout in LAYOUTS.values():
        if layout.cameras == protocol.cameras:
            return layout
    raise UserError(
        f"No layout has the cameras {protocol.cameras} of {protocol.suite}: add it to "
        "jaxvp.data.observation.LAYOUTS."
    )


def rollouts(suite: Suite, protocol: Protocol, policy: Policy, num_envs: int = 1,
             num_videos: int | None = 0) -> Iterator[Episode]:
    """Runs the trials of all tasks of `protocol`, and yields them in the order in which they end.

    All environments execute their part of a chunk before the policy is called again, once for all
    of them. How an episode goes does not depend on `num_envs`.

    Args:
      suite: makes the environments.
      protocol: that of the suite, with the tasks and trials to run.
      policy: what is evaluated.
      num_envs: environments that share a call of the policy.
      num_videos: the first so many trials of each task are recorded; None: all.
    """
    todo = collections.deque((t, i) for t in protocol.tasks for i in range(protocol.trials))
    layout, stride = video_layout(protocol), video_stride(protocol)
    slots: dict[int, _Slot] = {}
    try:
        for number in range(min(num_envs, len(todo))):
            _start(slots, number, suite, policy, *todo.popleft())
        while slots:
            for number, actions in policy.act(list(slots)).items():
                slot = slots[number]
                record = num_videos is None or slot.trial < num_videos
                if record and not slot.frames:
                    slot.frames.append(_picture(slot.observation, layout))
                success = False
                for action in actions[: protocol.max_steps - slot.steps]:
                    slot.observation, success = slot.env.step(action)
                    slot.steps += 1
                    policy.observe(number, slot.observation, action)
                    over = success or slot.steps == protocol.max_steps
                    if record and (over or slot.steps % stride == 0):
                        slot.frames.append(_picture(slot.observation, layout))
                    if over:
                        break
                if not len(actions) or success or slot.steps == protocol.max_steps:
                    yield Episode(slot.task, slot.trial, success, slot.steps, slot.frames)
                    if todo:
                        _start(slots, number, suite, policy, *todo.popleft())
                    else:
                        slots.pop(number).env.close()
    finally:
        for slot in slots.values():
            slot.env.close()


def _start(slots: dict[int, _Slot], number: int, suite: Suite, policy: Policy, task: str,
           trial: int):
    """Starts an episode; an environment serves as long as its task stays the same."""
    old = slots.get(number)
    if old and old.task != task:
        del slots[number]
        old.env.close()
    env = old.env if old and old.task == task else suite.make(task)
    slots[number] = slot = _Slot(env, task, trial)
    initial = policy.reset(number, task, trial, env)
    slot.observation = env.reset(trial) if initial is None else env.reset_to(initial)
    policy.observe(number, slot.observation, None)


def _picture(observation: Observation, layout: Layout) -> np.ndarray:
    views = np.stack([observation["images"][camera] for camera in layout.cameras])
    return canvas(views[None, :, None], np.ones((1, len(views)), bool), layout)[0, 0]
