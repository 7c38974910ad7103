"""The LIBERO and LIBERO-PRO suites, under the protocols that papers use.

Sources of the protocols: `libero-openvla`, openvla/experiments/robot/libero/run_libero_eval.py at
c8f03f4; `libero-official`, libero/lifelong/metric.py at 4f0dd18, whose wait steps leave the gripper
as it is; `libero-uva`, the libero_image_runner.py of UVA (arXiv 2503.00200), whose numbers Video
Policy compares with: its table has 500 trials; `libero-pro`, the README of LIBERO-PRO (arXiv
2510.03827) at 2b910b5, which takes over OpenVLA's rules. Only OpenVLA and those after it say how
images are turned. One rule is stricter here: the simulator is seeded before every reset, not once
per task, so that a trial does not depend on those before it.
"""

import dataclasses
import functools
import os
from pathlib import Path

import h5py
import numpy as np

from jaxvp.envs import libero, libero_expert, rendering
from jaxvp.errors import UserError, did_you_mean
from jaxvp.evaluation.protocol import Demonstration, Observation, Protocol

OPENVLA_STEPS = dict(zip(libero.BASE_SUITES, (220, 280, 300, 520, 400), strict=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """What the protocols of LIBERO differ in, see `Protocol`.

    Attributes:
      rotation: a key of `libero.ROTATIONS`; None: as in the training data.
      wait_gripper: what the gripper is told in the wait steps, 0.5: nothing.
      fixed: whether trial i starts from the task's official initial state i; if not, objects are
        where a seed puts them that no demonstrations of this project have.
    """

    version: int = 1
    suites: tuple[str, ...] = libero.BASE_SUITES
    trials: int = 50
    max_steps: int | None = None  # None: those of OpenVLA for the suite.
    wait_steps: int = 10  # Objects of the initial states fall into place.
    wait_gripper: float = 1.0
    image_size: int = 256
    rotation: str | None = "180"
    cameras: tuple[str, ...] = tuple(libero.CAMERAS)
    policy_seed: int = 0
    fixed: bool = True


PROTOCOLS = {
    "libero-openvla": Rules(policy_seed=7),
    "libero-official": Rules(trials=20, max_steps=600, wait_steps=5, wait_gripper=0.5,
                             image_size=128, rotation=None),
    "libero-uva": Rules(max_steps=500, wait_steps=0, image_size=128, rotation=None,
                        cameras=("agentview",), fixed=False),
    "libero-pro": Rules(suites=libero.PRO_SUITES, policy_seed=7),
}
# What `jaxvp.evaluate --check` asks before it makes a suite: names, and what raises a UserError.
CHECKS = {"packages": libero.package, "meshes and textures": libero.check_assets,
          "OpenGL": functools.partial(rendering.setup, libero.PACKAGES),
          "OpenCV": libero.check_opencv}
FIRST_SEED = 100_000  # Of random placements; those of demonstrations are larger.


class LiberoSuite:
    """One of `libero.SUITES`; implements `protocol.Suite`.

    Args:
      name: of the suite.
      protocol: a key of PROTOCOLS; by default `libero-openvla`, of LIBERO-PRO `libero-pro`.
      libero_demos: folder of <suite>/<task>_demo.hdf5, collected or published; for
        `demonstrations`.
      image_size: of observations, in pixels, as in the training data; default: the protocol's.
      rotation: how images were turned in the training data, a key of `libero.ROTATIONS`.
      wait_steps: steps at rest at the start of the demonstrations that the training data lacks.

    Raises:
      UserError: no such suite or protocol, or the training data was made by other rules than the
        protocol's; see `libero.setup`.
    """

    has_expert = True
    heavy = True

    def __init__(
        self,
        name: str,
        protocol: str | None = None,
        libero_demos: str | Path | None = None,
        image_size: int | None = None,
        rotation: str = "180",
        wait_steps: int = 0,
    ):
        libero.setup()
        self._demonstrations = libero_demos
        protocol = protocol or ("libero-pro" if name in libero.PRO_SUITES else "libero-openvla")
        if protocol not in PROTOCOLS:
            raise UserError(f"--protocol: there is no {protocol!r}."
                            f"{did_you_mean(protocol, PROTOCOLS)} There are: "
                            f"{', '.join(PROTOCOLS)}.")
        rules = PROTOCOLS[protocol]
        if name not in rules.suites:
            raise UserError(f"--protocol={protocol} is for {', '.join(rules.suites)}, not for "
                            f"--suite={name}.")
        if rules.rotation not in (None, rotation):
            raise UserError(f"The bundle was trained on images with rotation {rotation!r}, "
                            f"--protocol={protocol} shows them with {rules.rotation!r}: build the "
                            f"training data with --rotation={rules.rotation}.")
        if wait_steps > rules.wait_steps:
            raise UserError(f"The bundle was trained on episodes that begin after {wait_steps} "
                            f"steps at rest, --protocol={protocol} waits {rules.wait_steps}: "
                            "choose a protocol that waits as long.")
        size = image_size or rules.image_size
        base = next(suite for suite in libero.BASE_SUITES if name.startswith(suite))
        self.protocol = Protocol(
            name=protocol,
            version=rules.version,
            suite=name,
            tasks=libero.tasks(name),
            trials=rules.trials,
            max_trials=50 if rules.fixed else None,
            max_steps=rules.max_steps or OPENVLA_STEPS[base],
            wait_steps=rules.wait_steps,
            init_states="trial i starts from the task's official initial state i" if rules.fixed
            else "placed at random by the seed",
            seeds=f"NumPy's global seed {libero.SEED} before every reset" if rules.fixed
            else f"NumPy's global seed {FIRST_SEED} + i before the reset of trial i",
            fps=libero.FPS,
            cameras=rules.cameras,
            camera_size=(size, size),
            rotation=rotation,
            gripper="1 - 2 * gripper: -1 open, 1 closed",
            robot=libero.ROBOT,
            action=libero.ACTION_NAMES,
            state=libero.STATE_NAMES,
            action_low=(-1.0,) * 6 + (0.0,),
            action_high=(1.0,) * 7,
            simulator=simulator(),
            policy_seed=rules.policy_seed,
        )

    def instruction(self, task: str) -> str:
        return libero.instruction(self.protocol.suite, task)

    def make(self, task: str) -> "LiberoTask":
        """The simulator of one task.

        Raises:
          UserError: the suite has no such task.
        """
        return LiberoTask(self.protocol, task)

    def demonstrations(self, task: str, count: int) -> list[Demonstration]:
        """The first `count` demonstrations of a task.

        Raises:
          UserError: the folder or the file is missing, or the file has fewer.
        """
        flag = "--libero_demos=DIR"
        if not self._demonstrations:
            raise UserError(f"{flag} is missing: a folder of <suite>/<task>_demo.hdf5.")
        path = Path(self._demonstrations, self.protocol.suite, f"{task}_demo.hdf5")
        if not path.exists():
            raise UserError(
                f"{path} does not exist; {flag} holds <suite>/<task>_demo.hdf5."
            )
        found = []
        with h5py.File(path) as file:
            names = libero.demonstration_names(file)
            if len(names) < count:
                raise UserError(f"{path} has {len(names)} demonstrations, not {count}.")
            for name in names[:count]:
                states, actions = libero.demonstration(file["data"][name])
                found.append(Demonstration(f"{path.name}:data/{name}", states[0], actions))
        return found


class LiberoTask:
    """One task under a protocol; implements `protocol.SimEnv`.

    The images of an observation are rendered when they are first read, see `rendering.Images`.
    """

    def __init__(self, protocol: Protocol, task: str):
        self._protocol = protocol
        self._states = None
        if protocol.max_trials is not None:
            self._states = libero.init_states(protocol.suite, task)
        self._env = libero.LiberoEnv(
            protocol.suite, task, protocol.camera_size[0], protocol.rotation, protocol.cameras
        )
        self._expert = None

    def reset(self, trial: int) -> Observation:
        """Starts from the official initial state `trial`, or from the placement of its seed, and
        waits until the objects are at rest.

        Raises:
          UserError: there is no such initial state.
        """
        self._expert = None
        if self._states is None:
            observation = self._env.reset(None, FIRST_SEED + trial)
        elif 0 <= trial < len(self._states):
            observation = self._env.reset(self._states[trial])
        else:
            raise UserError(f"LIBERO has trials 0 to {len(self._states) - 1}, asked for {trial}.")
        rest = libero.REST.copy()
        rest[-1] = PROTOCOLS[self._protocol.name].wait_gripper
        for _ in range(self._protocol.wait_steps):
            observation, _ = self._env.step(rest)
        return observation

    def reset_to(self, initial: np.ndarray) -> Observation:
        """Starts from a demonstration's state, float64[1 + nq + nv], without waiting."""
        self._expert = None
        return self._env.reset(initial)

    def step(self, action: np.ndarray) -> tuple[Observation, bool]:
        return self._env.step(action)

    def expert_action(self) -> np.ndarray:
        """float32[7], what the scripted expert does now.

        Raises:
          UserError: it does not know the task's predicate.
        """
        self._expert = self._expert or libero_expert.Expert(self._env)
        return self._expert.action()

    def close(self):
        self._env.close()


def simulator() -> str:
    """Versions of everything that changes what a policy sees."""
    packages = [f"{name} {libero.version(name)}" for name in libero.VERSIONS]
    return ", ".join([*packages, os.environ.get("MUJOCO_GL", "glfw")])
