"""ALOHA in simulation (ACT, Zhao et al. 2023, arXiv 2304.13705), from the package gym-aloha: two
ViperX arms hand over a cube, or put a peg into a socket.

The package's own environment renders three pictures of 480 x 640 pixels at every step; this one
takes its scenes and tasks, and renders what is read.
"""

import functools
import threading

import numpy as np

from jaxvp.data.observation import resize
from jaxvp.envs import rendering
from jaxvp.envs.aloha_expert import Expert
from jaxvp.errors import UserError

rendering.setup()
from dm_control import mujoco as dm_mujoco  # noqa: E402
from dm_control.rl.control import Environment, PhysicsError  # noqa: E402
from gym_aloha import constants, utils  # noqa: E402
from gym_aloha.tasks import sim  # noqa: E402

FPS = 50
ROBOT = "simulated ALOHA with two ViperX arms"  # As data_builders/aloha calls it.
CAMERA = "top"
CAMERA_TEXT = "cameras top"
JOINTS = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate")
# Positions, and targets of positions.
NAMES = tuple(f"{side}_{name}" for side in ("left", "right")
              for name in (*(f"{joint} [rad]" for joint in JOINTS),
                           "gripper [0 closed .. 1 open]"))
TASKS = {
    "transfer_cube": "Pick up the cube with the right arm and transfer it to the left arm.",
    "insertion": "Insert the peg into the socket.",
}
SUCCESS_REWARD = 4
_SCENES = {"transfer_cube": "bimanual_viperx_transfer_cube.xml",
           "insertion": "bimanual_viperx_insertion.xml"}
# The package hands objects' poses to its tasks through a global variable.
_reset_lock = threading.Lock()


class _TransferCube(sim.TransferCubeTask):
    def get_observation(self, physics):
        return {}


class _Insertion(sim.InsertionTask):
    def get_observation(self, physics):
        return {}


class AlohaEnv:
    """One task of TASKS, 50 steps per second.

    Observations are {'images': rendering.Images, 'state': float32[14], 'instruction', 'robot'};
    state and actions are joint positions, named by NAMES, which actions set as targets.

    Args:
      task: a key of TASKS.
      image_size: None: 480 x 640 pixels; otherwise the same picture squeezed to a square of so many
        pixels, as the builder `aloha` stores recorded ones.

    Raises:
      UserError: there is no such task.
    """

    def __init__(self, task: str, image_size: int | None = None):
        if task not in TASKS:
            raise UserError(f"ALOHA has no task {task!r}; it has {', '.join(TASKS)}.")
        self.task, self.instruction = task, TASKS[task]
        self._physics = dm_mujoco.Physics.from_xml_path(str(constants.ASSETS_DIR / _SCENES[task]))
        rules = {"transfer_cube": _TransferCube, "insertion": _Insertion}[task]()
        self._env = Environment(
            self._physics, rules, float("inf"), control_timestep=constants.DT)
        self._rules, self._image_size = rules, image_size
        height = image_size or 480
        self._renderer = rendering.Renderer(
            self._physics.model.ptr, height, round(height * 4 / 3))
        self._moment = 0  # Counts changes of the simulator's state.

    def reset(self, seed: int) -> dict:
        """Starts the episode with the poses of objects that the package samples from `seed`."""
        with _reset_lock:
            if self.task == "transfer_cube":
                sim.BOX_POSE[0] = utils.sample_box_pose(seed)
            else:
                sim.BOX_POSE[0] = np.concatenate(utils.sample_insertion_pose(seed))
            self._env.reset()
        self._unstable = False
        self._expert = None
        return self._observation()

    def step(self, action: np.ndarray) -> tuple[dict, bool]:
        """Acts for 1 / FPS seconds. Targets far away may make the simulation unstable: then the
        scene stays as it was before, to the end of the episode.

        Returns:
          The observation and whether the reward is SUCCESS_REWARD.

        Raises:
          UserError: `action` is not float[14] or not finite.
        """
        action = np.asarray(action, np.float64)
        if action.shape != (14,) or not np.isfinite(action).all():
            raise UserError(f"An action is 14 finite numbers, found {action}.")
        success, before = False, self._physics.data.qpos.copy()
        if not self._unstable:
            try:
                success = self._env.step(action).reward == SUCCESS_REWARD
            except PhysicsError:
                self._unstable = True
        if self._unstable:
            with self._physics.reset_context():
                self._physics.data.qpos[:] = before
        return self._observation(), success

    def expert_action(self) -> np.ndarray:
        """float32[14]: what the scripted expert does now; once per step, see `Expert`."""
        if self._expert is None:
            self._expert = Expert(self.task, self._physics.model.ptr, self._physics.data.ptr)
        return self._expert.action()

    @property
    def expert_is_done(self) -> bool:
        """Whether the expert has nothing left to do."""
        return self._expert is not None and self._expert.done

    @property
    def table_is_touched(self) -> bool:
        """Whether anything touches the table, such as an object that is not lifted."""
        table = self._physics.model.ptr.geom("table").id
        return any(table in pair for pair in self._physics.data.contact.geom)

    def close(self):
        self._renderer.close()

    def _render(self, camera: str) -> np.ndarray:
        image = self._renderer(self._physics.data.ptr, camera)
        return resize(image, self._image_size, self._image_size) if self._image_size else image

    def _observation(self) -> dict:
        self._moment += 1
        return {
            "images": rendering.Images((CAMERA,), self._render, lambda: self._moment),
            "state": self._rules.get_qpos(self._physics).astype(np.float32),
            "instruction": self.instruction,
            "robot": ROBOT,
        }


@functools.cache
def limits() -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(lowest, highest) action; the simulator clips what is beyond."""
    path = constants.ASSETS_DIR / _SCENES["transfer_cube"]
    ranges = dm_mujoco.Physics.from_xml_path(str(path)).model.actuator_ctrlrange
    arms = np.concatenate([ranges[start : start + 6] for start in (0, 8)])
    low, high = np.insert(arms, (6, 12), (0, 1), axis=0).T
    return tuple(low.tolist()), tuple(high.tolist())
