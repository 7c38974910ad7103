"""A policy bundle in closed loop: from what a robot observes to actions in SI units."""

import dataclasses
import hashlib
import time
from collections.abc import Collection, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxvp.data import observation as unified
from jaxvp.errors import UserError
from jaxvp.policy.bundle import Bundle, imagines, text_reader


@dataclasses.dataclass
class _Episode:
    """An episode of a slot, as far back as the window of the policy reaches.

    Attributes:
      name: of seed, task and trial.
      carry: what the policy remembers, arrays [1, ...].
      now: control step of the last observation, -1 before the first.
      due: control step at which the policy is asked next.
      observations: by control step.
      frames: uint8[V, H, W, 3], the views of those observations whose images were read.
      actions: by the control step in which they were executed, float[A] in SI units.
      predictions: by the control step of the call, uint8[T, H', W', 3], predicted video.
    """

    name: str
    carry: dict
    now: int = -1
    due: int = 0
    observations: dict[int, Mapping] = dataclasses.field(default_factory=dict)
    frames: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    actions: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    predictions: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)


class PolicyRunner:
    """Receding horizon: is told every observation, predicts a chunk of P actions, of which the
    first part is executed, predicts again.

    Several robots or simulators share a call of the policy; each has a number, its slot. What one
    of them does depends on its own observations and on (seed, task, trial, step) alone, never on
    who shares the call.

    The window of the policy reaches back in time on the control clock: to the step nearest to each
    frame, the first observation where there is none so early, masked; as in `data.clips`. Images
    are read only where a frame is wanted, when the policy is asked after every `execution_horizon`
    steps. One that is asked at another time reads images of earlier observations then, which a
    simulator that renders upon reading refuses.

    Attributes:
      cameras: those whose images it reads.
      encode: from an instruction to the array "text" of an observation; see `bundle.text_reader`.
      latencies: stage to the seconds that each call took: "preprocess", from observations to
        arrays; "act", from these to actions.
    """

    def __init__(self, bundle: Bundle, seed: int = 0):
        self._bundle, self._manifest, self._seed = bundle, bundle.manifest, seed
        self._spec, window = self._manifest.spec, self._manifest.spec.window
        self._episodes: dict[int, _Episode] = {}
        self._frame_steps = window.steps(self._manifest.fps)  # Of its frames, from now.
        self._steps = self._frame_steps[:window.past]  # Of those observed, ascending to 0.
        self._reach = max(-int(self._steps[0]), window.past_actions)
        self.encode = text_reader(bundle.path, self._manifest)
        self.cameras = tuple(camera for camera in self._manifest.cameras if camera is not None)
        self.latencies: dict[str, list[float]] = {"preprocess": [], "act": []}

    def reset(self, slot: int, task: str = "", trial: int = 0):
        """Starts an episode."""
        name = f"{self._seed}/{task}/{trial}"
        self._episodes[slot] = _Episode(name, self._bundle.initial_carry(1))

    def forget(self, slot: int):
        """Drops the episode of a robot that is gone, with what it saw."""
        self._episodes.pop(slot, None)

    def observe(self, slot: int, observation: Mapping, action: np.ndarray | None = None):
        """Tells what is seen: after `reset`, and after every control step.

        Args:
          slot: the robot.
          observation: `evaluation.protocol.Observation`. A camera that is not among the images is
            masked.
          action: float[A] in SI units, executed since the observation before; None: unknown.
        """
        episode = self._episodes[slot]
        if action is not None and episode.now >= 0:
            episode.actions[episode.now] = action
        episode.now += 1
        episode.observations[episode.now] = observation
        if self._wanted(episode, episode.now, later=True):
            self._frame(episode, episode.now)
        for kept in (episode.observations, episode.frames, episode.actions):
            for step in [step for step in kept if step < episode.now - self._reach]:
                del kept[step]

    def looks(self, slot: int, count: int) -> list[int]:
        """Which of the next `count` observations, counted from 0, it reads the images of, when it
        is asked after every `execution_horizon` steps."""
        episode = self._episodes[slot]
        return [k for k in range(count) if self._wanted(episode, episode.now + 1 + k)]

    def act(self, slots: Iterable[int], imagine: Collection[int] = (), steps: int | None = None
            ) -> dict[int, np.ndarray]:
        """What to do next, float32[execution_horizon, A] in SI units for each slot, which were
        observed now.

        Args:
          slots: the robots.
          imagine: those of them for which video is predicted, too, where the policy can: a further
            call, of the same draw, so that actions and latencies are the same with and without.
          steps: how many of the P actions of a chunk; None: execution_horizon.

        Raises:
          UserError: an observation is of another robot or shape than the policy was trained for,
            or its text is none of those that were embedded.
        """
        manifest, slots = self._manifest, list(slots)
        episodes = [self._episodes[slot] for slot in slots]
        keys = np.stack([_key(episode) for episode in episodes])
        started = time.perf_counter()
        given = self.given(slots)
        self.latencies["preprocess"].append(time.perf_counter() - started)
        carry = jax.tree.map(lambda *rows: jnp.concatenate(rows), *[e.carry for e in episodes])
        self._imagine([slots.index(slot) for slot in imagine], episodes, given, keys, carry)
        started = time.perf_counter()
        outputs, carry = self._bundle.predict(given, keys, manifest.acting[1], carry)
        self.latencies["act"].append(time.perf_counter() - started)
        steps = steps or manifest.execution_horizon
        chunks = outputs["action"][:, :steps, : len(manifest.action.names)]
        for row, episode in enumerate(episodes):
            episode.carry = _row(carry, np.int32(row))
            episode.due = episode.now + manifest.execution_horizon
        actions = manifest.normalizer.unnormalize("action", chunks)
        return dict(zip(slots, actions, strict=True))

    def imagined(self, slot: int, steps: Sequence[int]) -> np.ndarray | None:
        """What it predicted in the present episode of a slot for some control steps.

        Returns:
          uint8[len(steps), H', W', 3], the canvas: for each step the nearest frame of the call
          before it; of step 0, the observed one. None if it was not asked to.
        """
        predictions, frames = self._episodes[slot].predictions, []
        if not predictions:
            return None
        for step in steps:
            call = max((call for call in predictions if call < step), default=0)
            video = predictions[call]
            offsets = self._frame_steps[: len(video)]
            frames.append(video[np.abs(offsets - (step - call)).argmin()])
        return np.stack(frames)

    def _imagine(self, rows: Sequence[int], episodes: Sequence[_Episode], given: Mapping,
                 keys: np.ndarray, carry: dict):
        """Predicts and keeps the video of some of the rows."""
        modes = [mode[1] for mode in self._manifest.modes if imagines(mode)]
        if not (rows and modes):
            return
        wanted, index = max(modes, key=len), np.asarray(rows)  # Best with the action that it shows.
        given, carry = jax.tree.map(lambda x: x[index], (dict(given), carry))
        outputs, _ = self._bundle.predict(given, keys[index], wanted, carry)
        for row, video in zip(rows, outputs["video"], strict=True):
            episodes[row].predictions[episodes[row].now] = video

    def given(self, slots: Sequence[int]) -> dict[str, np.ndarray]:
        """What these slots see now, as the exported functions take it: see `policy.bundle`."""
        rows = [self._row(self._episodes[slot]) for slot in slots]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _row(self, episode: _Episode) -> dict[str, np.ndarray]:
        manifest, observation = self._manifest, episode.observations[episode.now]
        if observation["robot"] != manifest.robot:
            raise UserError(
                f"The policy was trained for the robot {manifest.robot!r}, the observation is of "
                f"{observation['robot']!r}."
            )
        images = observation["images"]
        view_mask = [camera in images for camera in manifest.cameras]
        if not any(view_mask):
            raise UserError(
                f"The policy sees the cameras {manifest.cameras}, found {tuple(images)}."
            )
        row = {name: np.zeros(shape, dtype)
               for name, (shape, dtype) in self._spec.observation.items()}
        row["view_mask"][:] = view_mask
        row["text"][:] = self.encode(observation["instruction"])
        for k, step in enumerate(episode.now + self._steps):
            nearest, there = max(int(step), 0), step >= 0
            row["video"][:, k] = self._frame(episode, nearest)
            row["frame_mask"][k] = there
            if manifest.state:
                self._put(row, "state", k, episode.observations[nearest]["state"], there)
        past_actions = self._spec.window.past_actions
        for k, step in enumerate(range(episode.now - past_actions, episode.now)):
            if step in episode.actions:
                self._put(row, "action", k, episode.actions[step], True)
        return row

    def _put(self, row: dict[str, np.ndarray], column: str, k: int, values, there: bool):
        """Writes the k-th vector of a column, normalised and padded, and its mask."""
        values = self._manifest.normalizer.normalize(column, values)
        row[column][k, : len(values)] = values
        row[f"{column}_mask"][k, : len(values)] = there

    def _wanted(self, episode: _Episode, step: int, later: bool = False) -> bool:
        """Whether a call at `step` or after it, in the rhythm of the execution horizon, wants a
        frame of it; `later`: a call after it."""
        calls = range(episode.due, step - int(self._steps[0]) + 1,
                      self._manifest.execution_horizon)
        return any(call >= step + later and step in np.maximum(call + self._steps, 0)
                   for call in calls)

    def _frame(self, episode: _Episode, step: int) -> np.ndarray:
        """The views at a step, uint8[V, H, W, 3]; reads the images when it is first asked."""
        if step not in episode.frames:
            images = episode.observations[step]["images"]
            views, _, *size = self._spec.observation["video"][0]
            frame = np.full((views, *size), unified.MISSING, np.uint8)
            for view, camera in enumerate(self._manifest.cameras):
                if camera in images:
                    frame[view] = unified.resize(images[camera], *size[:2])
            episode.frames[step] = frame
        return episode.frames[step]


@jax.jit
def _row(carry: dict, row: jax.Array) -> dict:
    """One row of all; a slice `[row : row + 1]` would be another program for every row."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1), carry)


def _key(episode: _Episode) -> np.ndarray:
    """uint32[2], the data of a PRNG key, from (seed, task, trial, step)."""
    name = f"{episode.name}/{episode.now}"
    return np.frombuffer(hashlib.sha256(name.encode()).digest()[:8], np.uint32)
