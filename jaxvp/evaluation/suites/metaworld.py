"""Meta-World as suites: all fifty tasks of MT50, and the eleven of AVDC under its protocol.

`metaworld` is seen as published policies see it (LeRobot, src/lerobot/envs/metaworld.py at
7427f31): one picture of 480 pixels from corner2, moved nearer and turned upright; the state is the
hand's position and the gripper; success at any of 500 steps. An episode's start is sampled as the
package does it, from the trial's seed.

`metaworld_avdc` follows AVDC (arXiv 2310.08576; AVDC_experiments, experiment/benchmark_mw.py and
metaworld_exp/utils.py at e9b5b00): three cameras in turn, 25 seeds each, 320 x 240 pixels, rows
reversed as mujoco-py left them (upright and mirrored), and the task's name as text. Its limit of
500 steps includes ten after success, so success must come by step 490. It ran the second version of
the tasks on mujoco-py, which the third on MuJoCo re-implements: published numbers are near, not
equal.
"""

import dataclasses

import numpy as np

from jaxvp.envs import metaworld, rendering
from jaxvp.evaluation.demonstrations import ByNumber, OfExpert
from jaxvp.evaluation.protocol import Observation, Protocol

# Seeds of the builder's episodes start at 1,000,000.
FIRST_SEED = 1000
AVDC_TASKS = tuple(f"{name}-v3" for name in (
    "door-open", "door-close", "basketball", "shelf-place", "button-press", "button-press-topdown",
    "faucet-close", "faucet-open", "handle-press", "hammer", "assembly"))


@dataclasses.dataclass(frozen=True)
class Rules:
    """What differs between the suites; trial i has seed `first_seed` + i // number of views."""

    protocol: str
    tasks: tuple[str, ...]
    trials: int
    max_steps: int
    first_seed: int
    views: tuple[str, ...]
    camera_size: tuple[int, int]
    rotation: str
    robot: str = metaworld.ROBOT
    names_as_texts: bool = False

    def instruction(self, task: str) -> str:
        """The task in words."""
        if self.names_as_texts:
            return task.removesuffix("-v3").replace("-", " ")
        return metaworld.TASKS[task]


SUITES = {
    "metaworld": Rules("metaworld_mt50", tuple(metaworld.TASKS), 50, 500, FIRST_SEED,
                       ("corner2_near",), (480, 480), "180"),
    "metaworld_avdc": Rules("metaworld_avdc", AVDC_TASKS, 75, 490, 0,
                            ("corner", "corner2", "corner3"), (240, 320), "flip",
                            # Mirrored pictures: no policy for the other suite is scored here.
                            f"{metaworld.ROBOT}_avdc", names_as_texts=True),
}


def view_text(view: str) -> str:
    """The camera of a view, such as "corner2 at (0.75, 0.075, 0.7)"."""
    camera, place = metaworld.VIEWS[view]
    return camera if place is None else f"{camera} at {place}"


class MetaWorldSuite(OfExpert):
    """One of SUITES; implements `protocol.Suite`.

    Args:
      name: of the suite.
      image_size: height and width of images in pixels, as in the training data; None: the
        protocol's own size. A square shows the middle of AVDC's wider picture.
    """

    def __init__(self, name: str, image_size: int | None = None):
        self._rules = rules = SUITES[name]
        views = len(rules.views)
        self.protocol = Protocol(
            name=rules.protocol,
            version=1,
            suite=name,
            tasks=rules.tasks,
            trials=rules.trials,
            max_steps=rules.max_steps,
            wait_steps=0,
            init_states="sampled by the package, objects and goal, from the seed",
            seeds=f"{rules.first_seed} + trial" if views == 1 else
            f"{rules.first_seed} + trial // {views}, seen from each camera in turn",
            fps=metaworld.FPS,
            cameras=(metaworld.CAMERA,),
            camera_size=(image_size, image_size) if image_size else rules.camera_size,
            rotation=rules.rotation,
            gripper="1 - 2 * gripper: -1 opening, 1 closing",
            robot=rules.robot,
            action=metaworld.ACTION_NAMES,
            state=metaworld.STATE_NAMES,
            action_low=(-1.0,) * 3 + (0.0,),
            action_high=(1.0,) * 4,
            simulator=f"{rendering.simulator('metaworld', 'mujoco')}, seen from "
            + " or ".join(map(view_text, rules.views)),
        )

    def instruction(self, task: str) -> str:
        return self._rules.instruction(task)

    def make(self, task: str) -> "MetaWorldTask":
        return MetaWorldTask(self.protocol, self._rules, task)



class MetaWorldTask(ByNumber):
    """One task of a suite; implements `protocol.SimEnv`, with an expert.

    The image of an observation is rendered when it is first read, see `rendering.Images`.
    """

    def __init__(self, protocol: Protocol, rules: Rules, task: str):
        self._env = metaworld.MetaWorldEnv(task, protocol.camera_size, protocol.rotation)
        self._rules = rules
        self._texts = {"instruction": rules.instruction(task), "robot": rules.robot}

    def reset(self, trial: int) -> Observation:
        number, view = divmod(trial, len(self._rules.views))
        seed = self._rules.first_seed + number
        return self._env.reset(seed, self._rules.views[view]) | self._texts

    def step(self, action: np.ndarray) -> tuple[Observation, bool]:
        observation, success = self._env.step(action)
        return observation | self._texts, success

    def expert_action(self) -> np.ndarray:
        return self._env.expert_action()

    def close(self):
        self._env.close()
