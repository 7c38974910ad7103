"""LIBERO's demonstrations (arXiv 2306.03310, CC BY 4.0) as RLDS.

Source: RAW/<suite>/<task>_demo.hdf5, either published (with 128-pixel images) or as LIBERO's
collection script leaves them (states and actions, no images), which needs the simulator:

    python -m data_builders.build libero --out=DIR --raw=RAW
    python -m data_builders.build libero --out=DIR --raw=RAW \
        --replay=states --image_size=128

The instruction is that of the benchmark (from the file's name), so that training and evaluation
agree. Rendering is slow whatever the size of the images: benchmarks/results/libero_replay.json.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import cv2
import h5py
import numpy as np

from data_builders import builder, episode, hdf5
from data_builders.builder import option
from jaxvp.config import NonNegativeInt, PositiveInt
from jaxvp.envs import libero
from jaxvp.errors import UserError
from jaxvp.files import find


@dataclasses.dataclass(frozen=True, kw_only=True)
class Builder(builder.Builder):
    """LIBERO demonstrations of a Panda arm, cameras agentview and wrist, 20 steps per second."""

    name = "libero"
    version = "1.0.0"
    items_per_shard = 16  # A rendered episode takes 15 s; a stopped build loses less of them.

    raw: str = dataclasses.field(metadata={"help": "folder of <suite>/<task>_demo.hdf5"})
    suites: tuple[str, ...] = option((), "suites to convert, such as libero_object; empty: all")
    replay: str = option(
        "none",
        "where images and state come from: `none`: the file; `states`: the simulator, set to each "
        "recorded state; `actions`: the simulator, started at the first state and moved by the "
        "actions, kept if the task's predicate holds at the end",
        ("none", "states", "actions"),
    )
    alignment: str = option(
        "pre",
        "with replay=none: `pre` pairs action j with the observation j-1, because the published "
        "observation j was made after action j; `as_is` pairs equal indices",
        ("pre", "as_is"),
    )
    noops: str = option(
        "keep",
        "`drop` leaves out steps without motion, and a replay of actions skips them (OpenVLA): for "
        "human demonstrations; an expert that waits for its gripper would lose that",
        ("keep", "drop"),
    )
    wait_steps: NonNegativeInt = option(
        0, "with replay=actions: still steps before it starts (OpenVLA: 10)")
    rotation: str = option("180", "`180` as published policies use it, mirrored; `flip`; `none`",
                           tuple(libero.ROTATIONS))
    image_size: PositiveInt = option(128, "height and width of images in pixels")

    def features(self):
        size = (self.image_size, self.image_size)
        return episode.features(
            dict.fromkeys(libero.CAMERAS, size), libero.STATE_NAMES, libero.ACTION_NAMES
        )

    def items(self) -> list[tuple[str, str, str]]:
        """(suite, task, key in the file), demonstrations in the order of their numbers; the key is
        empty for a file that cannot be read.

        Raises:
          UserError: there are no files.
          UserError: a file has no images although they are to come from it.
        """
        if self.replay != "none":
            libero.setup()
        items = []
        for path in self._files():
            try:
                with hdf5.opened(path) as file:
                    names = libero.demonstration_names(file)
                    images = "obs" in file["data"][names[0]]
            except (OSError, ValueError):  # Counted when `build` raises it, too.
                names, images = [""], True
            if self.replay == "none" and not images:
                raise UserError(f"{path}: data/{names[0]}/obs is missing, so it holds no images: "
                                "render them with --replay=states.")
            task = path.name.removesuffix("_demo.hdf5")
            items += [(path.parent.name, task, name) for name in names]
        return items

    def _files(self) -> list[Path]:
        if unknown := set(self.suites) - set(libero.SUITES):
            raise UserError(f"--suites={','.join(unknown)}: choose of {', '.join(libero.SUITES)}.")
        files = []
        for suite in self.suites or libero.SUITES:
            found = find(Path(self.raw, suite), "*_demo.hdf5")
            if not found and self.suites:
                raise UserError(f"--raw={self.raw} has no {suite}/*_demo.hdf5.")
            files += found
        if not files:
            raise UserError(f"--raw={self.raw} has no <suite>/<task>_demo.hdf5.")
        return files

    def build(self, item: tuple[str, str, str]) -> Iterator[episode.Episode]:
        suite, task, name = item
        path = Path(self.raw, suite, f"{task}_demo.hdf5")
        with hdf5.opened(path) as file:
            if not name:
                libero.demonstration_names(file)  # Raises what stopped `items`.
            group = file["data"][name]
            states, action = libero.demonstration(group)
            if self.replay == "none":
                images, state, action = self._stored(group, states, action)
        if self.replay != "none":
            images, state, action = self._replayed(suite, task, states, action)
        yield episode.Episode(
            dataset=suite,
            episode_id=f"{suite}/{task}/{name}",
            robot=libero.ROBOT,
            images=images,
            camera_text=libero.CAMERA_TEXT,
            state=state,
            action=action,
            instruction=libero.instruction(suite, task),
            fps=libero.FPS,
            source=f"{suite}/{path.name}:data/{name}",
            options=self.options(),
        )

    def _stored(self, group: h5py.Group, states: np.ndarray, action: np.ndarray):
        """(images, state, action) as the file has them."""
        late = int(self.alignment == "pre")
        if late:
            check_late(group, states)
        steps = self._kept(action)
        steps = steps[steps >= late]
        size, rotation = (self.image_size, self.image_size), libero.ROTATIONS[self.rotation]
        images = {
            camera: np.stack(
                [
                    cv2.resize(image[rotation], size, interpolation=cv2.INTER_AREA)
                    for image in hdf5.column(group, f"obs/{key}")[steps - late]
                ]
            )
            for camera, key in (("agentview", "agentview_rgb"), ("wrist", "eye_in_hand_rgb"))
        }
        state = [hdf5.column(group, f"obs/{key}") for key in ("ee_states", "gripper_states")]
        return images, np.concatenate(state, 1)[steps - late], action[steps]

    def _replayed(self, suite: str, task: str, states: np.ndarray, action: np.ndarray):
        """(images, state, action) as the simulator shows them."""
        env = libero.the_environment(suite, task, self.image_size, self.rotation)
        observation, success = env.reset(states[0]), False
        steps = self._kept(action)
        seen = []
        if self.replay == "actions":
            for _ in range(self.wait_steps):
                observation, _ = env.step(libero.REST)
        for step in steps:
            if self.replay == "states":
                observation = env.set_state(states[step])
            seen.append((dict(observation["images"]), observation["state"]))
            if self.replay == "actions":
                observation, success = env.step(action[step])
        if self.replay == "actions" and not success:
            raise builder.Skip("the replay of the actions does not solve the task")
        images = {
            camera: np.stack([shown[camera] for shown, _ in seen]) for camera in libero.CAMERAS
        }
        return images, np.stack([state for _, state in seen]), action[steps]

    def _kept(self, action: np.ndarray) -> np.ndarray:
        """Indices of the steps that are not left out."""
        if self.noops == "keep":
            return np.arange(len(action))
        return np.flatnonzero(episode.moving(action, [True] * 6 + [False]))


def check_late(group: h5py.Group, states: np.ndarray):
    """Compares the arm's joints in observations and states, which precede the actions.

    Raises:
      UserError: the observations precede the actions, too, as OpenVLA's script writes them.
    """
    joints, recorded = hdf5.column(group, "obs/joint_states"), states[:, 1:8]
    if np.abs(joints - recorded).sum() < np.abs(joints[:-1] - recorded[1:]).sum():
        raise UserError(
            f"{group.file.filename}: {group.name}/obs shows the arm before each action, not after "
            "it as in LIBERO's published files: use --alignment=as_is."
        )
