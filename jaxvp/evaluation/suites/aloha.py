"""ALOHA in simulation, under the protocol of ACT: two tasks, top camera, success at reward 4.

Source: act (github.com/tonyzhaozh/act), imitate_episodes.py and constants.py at 742c753: 50
rollouts of 400 steps at 50 Hz, a success if the reward reached 4 at any of them. (ACT allows human
demonstrations of the insertion 500 steps; gym-aloha registers its environments with 300.) ACT does
not seed its rollouts; here trial i has seed 1000 + i, as in LeRobot.

Reward 4 is reached when the left gripper touches the cube in the air, and when the peg in the
socket touches its pin.
"""


from jaxvp.envs import aloha, rendering
from jaxvp.evaluation.demonstrations import ByNumber, OfExpert
from jaxvp.evaluation.protocol import Observation, Protocol

SUITES = ("aloha",)
# Seeds of the builder's episodes start at 1,000,000.
FIRST_SEED = 1000


class AlohaSuite(OfExpert):
    """The tasks of `aloha.TASKS`; implements `protocol.Suite`.

    Args:
      name: of the suite.
      image_size: None: pictures of 480 x 640 pixels; otherwise squeezed to a square, see
        `aloha.AlohaEnv`; as in the training data.
    """

    def __init__(self, name: str, image_size: int | None = None):
        self._image_size = image_size
        low, high = aloha.limits()
        self.protocol = Protocol(
            name="aloha_act",
            version=1,
            suite=name,
            tasks=tuple(aloha.TASKS),
            trials=50,
            max_steps=400,
            wait_steps=0,
            init_states="arms at rest; poses of objects sampled by gym_aloha.utils from the seed",
            seeds=f"{FIRST_SEED} + trial",
            fps=aloha.FPS,
            cameras=(aloha.CAMERA,),
            camera_size=(image_size, image_size) if image_size else (480, 640),
            rotation="none",
            gripper="as it is, 0 closed to 1 open",
            robot=aloha.ROBOT,
            action=aloha.NAMES,
            state=aloha.NAMES,
            action_low=low,
            action_high=high,
            simulator=rendering.simulator("gym-aloha", "dm_control", "mujoco"),
        )

    def instruction(self, task: str) -> str:
        return aloha.TASKS[task]

    def make(self, task: str) -> "AlohaTask":
        return AlohaTask(task, self._image_size)



class AlohaTask(ByNumber, aloha.AlohaEnv):
    """One task of the suite; implements `protocol.SimEnv`, with an expert.

    The image of an observation is rendered when it is first read, see `rendering.Images`.
    """

    def reset(self, trial: int) -> Observation:
        return super().reset(FIRST_SEED + trial)
