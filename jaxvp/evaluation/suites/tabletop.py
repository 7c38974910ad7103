"""The embedded tabletop as suites: tasks, backgrounds and distractors, seen in training or not."""

import dataclasses

import numpy as np

from jaxvp.envs import tabletop
from jaxvp.envs.rendering import Images
from jaxvp.envs.tabletop_world import HIGH, LOW
from jaxvp.evaluation.demonstrations import ByNumber, OfExpert
from jaxvp.evaluation.protocol import Observation, Protocol

# Trial i is the episode of seed FIRST_SEED + i. Training data has seeds from 1,000,000 on.
FIRST_SEED = 100_000


@dataclasses.dataclass(frozen=True)
class Conditions:
    """What a suite shows: tasks, table tops, small things that do not matter, and noise on the
    motion in metres."""

    tasks: tuple[str, ...]
    background: str = "seen"
    distractors: str = "none"
    disturbance: float = 0.0


# The tasks of configs/pretrain.py, and what differs from its data in one way; and two of them.
SEEN = tuple(tabletop.SEEN_TASKS)
SUITES = {
    "tabletop": Conditions(SEEN),
    "tabletop_core": Conditions(tuple(tabletop.CORE_TASKS)),
    "tabletop_unseen_backgrounds": Conditions(SEEN, background="unseen"),
    "tabletop_unseen_distractors": Conditions(SEEN, distractors="unseen"),
    "tabletop_unseen_tasks": Conditions(tuple(tabletop.UNSEEN_TASKS)),
    "tabletop_disturbed": Conditions(SEEN, disturbance=0.01),
}


class TabletopSuite(OfExpert):
    """One of SUITES; implements `protocol.Suite`.

    Args:
      name: of the suite.
      image_size: height and width of every camera, in pixels; best as in the training data.
    """

    def __init__(self, name: str, image_size: int = 64):
        self._conditions = SUITES[name]
        env = self._env(self._conditions.tasks[0], image_size)
        self.protocol = Protocol(
            name="tabletop",
            version=2,
            suite=name,
            tasks=self._conditions.tasks,
            trials=20,
            max_steps=env.max_steps,
            wait_steps=0,
            init_states=f"sampled by the seed; background {self._conditions.background}, "
            f"distractors {self._conditions.distractors}, "
            f"disturbance {self._conditions.disturbance:g} m",
            seeds=f"{FIRST_SEED} + trial; no training data has these",
            fps=tabletop.FPS,
            cameras=tabletop.CAMERAS,
            camera_size=(image_size, image_size),
            rotation="none",
            gripper="as it is, 0 closed to 1 open",
            robot=tabletop.ROBOT,
            action=tabletop.ACTION_NAMES,
            state=tabletop.ACTION_NAMES,
            action_low=tuple(LOW.ravel().tolist()),
            action_high=tuple(HIGH.ravel().tolist()),
            simulator="jaxvp/Tabletop-v0",
        )

    def instruction(self, task: str) -> str:
        return (tabletop.SEEN_TASKS | tabletop.UNSEEN_TASKS)[task].instruction

    def make(self, task: str) -> "TabletopTask":
        return TabletopTask(self._env(task, self.protocol.camera_size[0]))


    def _env(self, task: str, image_size: int) -> tabletop.TabletopEnv:
        return tabletop.TabletopEnv(
            task,
            image_size=image_size,
            background=self._conditions.background,
            distractors=self._conditions.distractors,
            disturbance=self._conditions.disturbance,
        )


class TabletopTask(ByNumber):
    """One task of a suite; implements `protocol.SimEnv`, with an expert.

    The images of an observation are rendered when they are first read, see `rendering.Images`.
    """

    def __init__(self, env: tabletop.TabletopEnv):
        self._env, self._moment = env, 0

    def reset(self, trial: int) -> Observation:
        self._env.reset(seed=FIRST_SEED + trial)
        return self._observation()

    def step(self, action: np.ndarray) -> tuple[Observation, bool]:
        success = self._env.advance(action)
        return self._observation(), success

    def expert_action(self) -> np.ndarray:
        return self._env.expert_action()

    def close(self):
        self._env.close()

    def _observation(self) -> Observation:
        env, self._moment = self._env, self._moment + 1
        return {
            "images": Images(tabletop.CAMERAS, env.image, lambda: self._moment),
            "state": env.world.arms.reshape(-1).astype(np.float32),
            "instruction": env.task.instruction,
            "robot": tabletop.ROBOT,
        }
