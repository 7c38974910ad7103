"""A policy bundle in closed loop: from what a robot observes to actions in SI units."""

import functools
import hashlib
import time
from collections.abc import Mapping, Sequence

import numpy as np

from jaxvp.data import observation as unified
from jaxvp.data.text import ByteTokenizer
from jaxvp.data.text_embeddings import TextEmbeddings
from jaxvp.errors import UserError
from jaxvp.policy.bundle import Bundle


class PolicyRunner:
    """Receding horizon: looks, plans a chunk of P actions, executes its first part, looks again.

    Several robots or simulators share a call of the policy; each has a number, its slot. What one
    of them does depends on its own observations and on (seed, task, trial, step) alone, never on
    who shares the call.

    Attributes:
      latencies: seconds that each call of the policy took, from arrays to arrays.
    """

    def __init__(self, bundle: Bundle, seed: int = 0):
        self._bundle, self._manifest, self._seed = bundle, bundle.manifest, seed
        self._episodes: dict[int, str] = {}
        self._steps: dict[int, int] = {}
        length = self._manifest.text_length
        if self._manifest.text_width:
            embeddings = TextEmbeddings(bundle.path / "text_embeddings")
            self._text = functools.partial(embeddings.lookup, length=length)
        else:
            self._text = functools.lru_cache(ByteTokenizer(length).encode)
        self.latencies: list[float] = []

    def reset(self, slot: int, task: str = "", trial: int = 0, env=None):
        """Starts an episode. `env` is for policies that need a simulator, and not used."""
        self._episodes[slot] = f"{self._seed}/{task}/{trial}"
        self._steps[slot] = 0

    def plan(self, observations: Mapping[int, dict]) -> dict[int, np.ndarray]:
        """What to do next, float32[execution_horizon, A] in SI units for each slot.

        Args:
          observations: slot to `evaluation.protocol.Observation`, after all the actions of the last
            plan. A camera that is not among the images is masked.

        Raises:
          UserError: an observation is of another robot or shape than the policy was trained for,
            or its text is none of those that were embedded.
        """
        keys = np.stack([self._key(slot) for slot in observations])
        batch = self.batch(list(observations.values()))
        started = time.perf_counter()
        chunks = self._bundle.act(batch, keys)
        self.latencies.append(time.perf_counter() - started)
        manifest = self._manifest
        chunks = chunks[:, : manifest.execution_horizon, : len(manifest.action.names)]
        actions = manifest.normalizer.unnormalize("action", chunks)
        for slot in observations:
            self._steps[slot] += manifest.execution_horizon
        return dict(zip(observations, actions, strict=True))

    def batch(self, observations: Sequence[dict]) -> dict[str, np.ndarray]:
        """Observations as the exported functions take them, see `policy.bundle`."""
        rows = [self._row(observation) for observation in observations]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _row(self, observation: Mapping) -> dict[str, np.ndarray]:
        manifest = self._manifest
        if observation["robot"] != manifest.robot:
            raise UserError(
                f"The policy was trained for the robot {manifest.robot!r}, the observation is of "
                f"{observation['robot']!r}."
            )
        images = observation["images"]
        view_mask = np.array([camera in images for camera in manifest.cameras])
        if not view_mask.any():
            raise UserError(
                f"The policy sees the cameras {manifest.cameras}, found {tuple(images)}."
            )
        video = np.full((len(view_mask), 1, *manifest.image_size, 3), unified.MISSING, np.uint8)
        for view, camera in enumerate(manifest.cameras):
            if view_mask[view]:
                video[view, 0] = unified.resize(images[camera], *manifest.image_size)
        state = np.zeros(manifest.state_size, np.float32)
        state_mask = np.zeros(manifest.state_size, bool)
        if manifest.state:
            size = len(manifest.state.names)
            state[:size] = manifest.normalizer.normalize("state", observation["state"])
            state_mask[:size] = True
        return {
            "video": video,
            "view_mask": view_mask,
            "text": self._text(unified.describe(
                manifest.robot, manifest.camera_text, observation["instruction"])),
            "state": state,
            "state_mask": state_mask,
        }

    def _key(self, slot: int) -> np.ndarray:
        """uint32[2], the data of a PRNG key, from (seed, task, trial, step)."""
        name = f"{self._episodes[slot]}/{self._steps[slot]}"
        return np.frombuffer(hashlib.sha256(name.encode()).digest()[:8], np.uint32)
