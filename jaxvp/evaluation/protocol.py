"""What a benchmark is to the evaluator: a protocol, a suite of tasks, simulated environments."""

import dataclasses
import typing
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """Everything that a success rate depends on but the policy; written into every result.

    Success rates are comparable only when name, version and all other fields are equal.

    Attributes:
      name, version: of the rules; the version rises when a rule changes.
      suite: the set of tasks, such as "libero_object".
      tasks: names, in order.
      trials: episodes per task; max_trials: so many have a start of their own, None: any number.
      max_steps: control steps after which an episode has failed, wait steps not counted.
      wait_steps: steps at rest after a reset, before the policy sees anything.
      init_states: where the initial state of trial i comes from.
      seeds: how the simulator is seeded in trial i.
      fps: control steps per second.
      cameras: of an observation.
      camera_size: (height, width) of its images, in pixels.
      rotation: how the simulator's images are turned: "180", "flip" or "none".
      gripper: how the simulator's gripper command follows from jaxvp's, 0 closed to 1 open.
      robot: short description, as in the data that policies for it are trained on.
      action, state: their dimensions with units, such as "left_x [m]".
      action_low, action_high: what an action may be, in these units.
      simulator: name and version of what runs the episodes.
      policy_seed: of the policy's noise, where the user names none.
    """

    name: str
    version: int
    suite: str
    tasks: tuple[str, ...]
    trials: int
    max_steps: int
    wait_steps: int
    init_states: str
    seeds: str
    fps: float
    cameras: tuple[str, ...]
    camera_size: tuple[int, int]
    rotation: str
    gripper: str
    robot: str
    action: tuple[str, ...]
    state: tuple[str, ...]
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    simulator: str
    max_trials: int | None = None
    policy_seed: int = 0

    def to_dict(self) -> dict:
        """The protocol as JSON values."""
        return dataclasses.asdict(self)


class Observation(typing.TypedDict):
    """What a policy sees at one step.

    images: camera to uint8[H, W, 3] RGB, upright; state: float32[S] in SI units; instruction: the
    task in words; robot: as in the protocol.
    """

    images: dict[str, np.ndarray]
    state: np.ndarray
    instruction: str
    robot: str


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """Recorded actions that solve a task from a given start.

    Attributes:
      name: where it comes from, such as a file and a key.
      initial: the start, as `SimEnv.reset_to` takes it.
      actions: float32[L, A] in SI units.
    """

    name: str
    initial: np.ndarray
    actions: np.ndarray


class SimEnv(typing.Protocol):
    """One simulated environment of one task. An environment whose task has a scripted expert also
    has `expert_action() -> float32[A]`, the expert's action in the current state."""

    def reset(self, trial: int) -> Observation:
        """Starts trial `trial` of the protocol, its wait steps included; the same every time."""

    def reset_to(self, initial: np.ndarray) -> Observation:
        """Starts where a demonstration started, without wait steps."""

    def step(self, action: np.ndarray) -> tuple[Observation, bool]:
        """One control step with float32[A] in SI units; (observation, whether the task is done)."""

    def close(self) -> None:
        """Frees the simulator."""


class Suite(typing.Protocol):
    """The tasks of a benchmark.

    Its constructor takes the name of the suite; every other parameter is a flag of
    `suites.REGISTRY`, or an option that the training data of a bundle may ask for (image_size).

    Attributes:
      protocol: its rules; `protocol.tasks` are the tasks, with the protocol's own `trials`.
      has_expert: whether its environments have an `expert_action`.
      heavy: whether an environment takes a large part of a gigabyte; then there are two a worker.
    """

    protocol: Protocol
    has_expert: bool
    heavy: bool

    def instruction(self, task: str) -> str:
        """The task in words."""

    def make(self, task: str) -> SimEnv:
        """A new environment; one thread uses it at a time, several may exist."""

    def demonstrations(self, task: str, count: int) -> Sequence[Demonstration]:
        """The first `count` demonstrations, for `--policy=replay`.

        Raises:
          UserError: there are none or fewer; the message says what to pass.
        """
