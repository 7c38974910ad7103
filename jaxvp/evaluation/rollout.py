"""Rollouts: episodes of a policy in a suite, many environments at a time."""

import collections
import contextlib
import dataclasses
import time
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from jaxvp.errors import UserError
from jaxvp.evaluation.protocol import Observation, Protocol, Suite
from jaxvp.evaluation.simulation import Chunk, InProcess, Reply, Start, video_layout, video_stride
from jaxvp.evaluation.workers import Lost, SimulatorError, Workers

TRIES = 3  # Of an episode over which the simulator's process ends.


class Policy(typing.Protocol):
    """What is evaluated: `PolicyRunner`, or a baseline.

    Attributes:
      cameras: those whose images it reads.
      latencies: stage to the seconds that each call took: "preprocess", from observations to
        arrays; "act", from these to actions.
    """

    cameras: Sequence[str]
    latencies: Mapping[str, Sequence[float]]

    def reset(self, slot: int, task: str, trial: int) -> np.ndarray | None:
        """Announces an episode in environment `slot`.

        Returns:
          Where it should start, as `SimEnv.reset_to` takes it; None for the trial's own start.
        """

    def looks(self, slot: int, count: int) -> Collection[int]:
        """Which of the next `count` observations, counted from 0, it reads the images of."""

    def observe(self, slot: int, observation: Observation, action: np.ndarray | None):
        """Tells what is seen in environment `slot`: after its reset, and after every step but the
        last, with the action of that step."""

    def act(self, slots: Collection[int], imagine: Collection[int]
            ) -> dict[int, np.ndarray | None]:
        """For each slot the actions until it is asked again, float32[n, A]; none gives up; None:
        the environment's scripted expert acts until the end.

        Args:
          slots: the environments; imagine: those of them whose predicted video is wanted, too.
        """

    def imagined(self, slot: int, steps: Sequence[int]) -> np.ndarray | None:
        """uint8[len(steps), H, W, 3], what it predicted in the present episode for these steps;
        None if it predicts no video, or was not asked to."""


@dataclasses.dataclass(frozen=True)
class Episode:
    """How one trial went.

    Attributes:
      steps: control steps until success, or until the end.
      frames: uint8[H, W, 3] pictures of all cameras, first to last; empty if not recorded.
      imagined: uint8[len(frames), H', W', 3], what the policy predicted for the same steps.
      actions: float32[steps, A]; states: float32[steps, S], each before its action.
      calls: the steps at which the policy was asked.
      seconds: that each step took the simulator.
      wall_s: seconds from the reset to the end, waiting included.
      restarts: how often it was begun again, because the simulator's process had ended.
    """

    task: str
    trial: int
    success: bool
    steps: int
    frames: list[np.ndarray] = dataclasses.field(repr=False, compare=False)
    imagined: np.ndarray | None = dataclasses.field(default=None, repr=False, compare=False)
    actions: np.ndarray | None = dataclasses.field(default=None, repr=False, compare=False)
    states: np.ndarray | None = dataclasses.field(default=None, repr=False, compare=False)
    calls: list[int] = dataclasses.field(default_factory=list, repr=False, compare=False)
    seconds: list[float] = dataclasses.field(default_factory=list, repr=False, compare=False)
    wall_s: float = dataclasses.field(default=0.0, compare=False)
    restarts: int = dataclasses.field(default=0, compare=False)


@dataclasses.dataclass
class _Slot:
    """An episode that runs. `guilty` is how often the simulator's process ended over it."""

    task: str
    trial: int
    began: float = dataclasses.field(default_factory=time.perf_counter)
    restarts: int = 0
    guilty: int = 0
    states: list[np.ndarray] = dataclasses.field(default_factory=list)
    actions: list[np.ndarray] = dataclasses.field(default_factory=list)
    frames: list[np.ndarray] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    calls: list[int] = dataclasses.field(default_factory=list)

    @property
    def steps(self) -> int:
        return len(self.actions)

    def take(self, reply: Reply):
        self.states += [observation["state"] for observation in reply.observations]
        self.actions += reply.actions
        self.frames += reply.frames
        if reply.actions:
            self.seconds += reply.seconds

    def episode(self, success: bool, imagined: np.ndarray | None) -> Episode:
        actions, states = (np.array(rows, np.float32) for rows in (self.actions, self.states[:-1]))
        return Episode(self.task, self.trial, success, self.steps, self.frames, imagined, actions,
                       states, self.calls, self.seconds, time.perf_counter() - self.began,
                       self.restarts)


def rollouts(suite: Suite | None, protocol: Protocol, policy: Policy, num_envs: int = 1,
             num_videos: int | None = 0, *, num_imagined: int = 0, workers: Workers | None = None,
             done: Collection[tuple[str, int]] = ()) -> Iterator[Episode]:
    """Runs the trials of all tasks of `protocol`, and yields them in the order in which they end.

    The policy is called for the environments that are ready, while the others simulate. How an
    episode goes depends neither on `num_envs` nor on the workers.

    Args:
      suite: makes the environments, when they are in this process.
      protocol: that of the suite, with the tasks and trials to run.
      policy: what is evaluated.
      num_envs: environments.
      num_videos: the first so many trials of each task are recorded; None: all.
      num_imagined: of the first so many of these, what the policy predicts is kept, too.
      workers: the processes that simulate; None: this one does.
      done: the (task, trial) that need not run.

    Raises:
      UserError: no layout shows the cameras; or a time limit ended each of TRIES tries of an
        episode.
      SimulatorError: an exception in a simulator, or its process ended in each of TRIES tries.
    """
    video_layout(protocol)
    trials = [(t, i) for t in protocol.tasks for i in range(protocol.trials) if (t, i) not in done]
    with contextlib.nullcontext(workers) if workers else InProcess(suite, protocol) as simulators:
        running = _Rollouts(simulators, protocol, policy, num_videos, num_imagined, trials)
        yield from running.run(num_envs)


class _Rollouts:
    """The episodes of a number of environments; see `rollouts`.

    The policy acts when half of the environments wait for it. Then a call has many rows, which
    costs little more than one (a bundle's function always computes all of its rows), and the
    simulators work on the other half meanwhile.
    """

    def __init__(self, simulators: Workers | InProcess, protocol: Protocol, policy: Policy,
                 num_videos: int | None, num_imagined: int, trials: Sequence[tuple[str, int]]):
        self._simulators, self._protocol, self._policy = simulators, protocol, policy
        self._num_videos, self._num_imagined = num_videos, num_imagined
        self._stride, self._todo = video_stride(protocol), collections.deque(trials)
        self._slots: dict[int, _Slot] = {}
        self._finished: list[Episode] = []

    def run(self, num_envs: int) -> Iterator[Episode]:
        for number in range(min(num_envs, len(self._todo))):
            self._next(number)
        ready: set[int] = set()
        while self._slots:
            for event in self._simulators.wait():
                if isinstance(event, Lost):
                    ready.discard(event.slot)
                    self._again(event)
                elif self._take(event):
                    ready.add(event.slot)
            if 2 * len(ready) >= len(self._slots) > 0:
                self._act(sorted(ready))
                ready.clear()
            # Last, because what is done with them takes time: the simulators have work by now.
            finished, self._finished = self._finished, []
            yield from finished

    def _next(self, number: int):
        """Begins the next episode in an environment, if there is one."""
        if self._todo:
            self._slots[number] = _Slot(*self._todo.popleft())
            self._start(number)
        else:
            self._slots.pop(number, None)

    def _start(self, number: int):
        slot, policy = self._slots[number], self._policy
        initial = policy.reset(number, slot.task, slot.trial)
        self._simulators.send(Start(number, slot.task, slot.trial, initial, tuple(policy.cameras),
                                    policy.looks(number, 1), self._recorded(slot)))

    def _again(self, lost: Lost):
        """Begins an episode again."""
        if lost.slot not in self._slots:  # The policy had given it up, and it was the last.
            return
        old = self._slots[lost.slot]
        guilty = old.guilty + lost.guilty
        if guilty == TRIES:
            where = f"{old.task}, trial {old.trial}: {lost.reason}, in each of {TRIES} tries"
            if lost.timed_out:
                raise UserError(f"{where}: find out why, or raise --{lost.timed_out}. Finished "
                                "episodes are kept.")
            raise SimulatorError(f"{where}. It printed:\n{lost.log}")
        self._slots[lost.slot] = _Slot(old.task, old.trial, restarts=old.restarts + 1,
                                       guilty=guilty)
        self._start(lost.slot)

    def _take(self, reply: Reply) -> bool:
        """What was seen becomes part of the episode; whether it is the policy's turn."""
        slot = self._slots[reply.slot]
        slot.take(reply)
        told = list(zip(reply.observations, reply.actions or [None], strict=True))
        if reply.over:
            told.pop()  # How it ended was not rendered, and nobody acts on it.
        for observation, action in told:
            self._policy.observe(reply.slot, observation, action)
        if reply.over:
            self._finish(reply.slot, reply.success)
        return not reply.over

    def _act(self, ready: Sequence[int]):
        imagine = [number for number in ready if self._recorded(self._slots[number])
                   and self._slots[number].trial < self._num_imagined]
        for number, actions in self._policy.act(ready, imagine).items():
            slot = self._slots[number]
            slot.calls.append(slot.steps)
            if actions is not None:
                actions = actions[: self._protocol.max_steps - slot.steps]
                if not len(actions):
                    self._finish(number, success=False)
                    continue
            looks = () if actions is None else self._policy.looks(number, len(actions))
            self._simulators.send(Chunk(number, actions, looks))

    def _finish(self, number: int, success: bool):
        slot, imagined = self._slots[number], None
        if slot.frames:
            shown = range(0, slot.steps + self._stride, self._stride)
            shown = [min(step, slot.steps) for step in shown][: len(slot.frames)]
            imagined = self._policy.imagined(number, shown)
        self._finished.append(slot.episode(success, imagined))
        self._next(number)

    def _recorded(self, slot: _Slot) -> bool:
        return self._num_videos is None or slot.trial < self._num_videos
