"""ALOHA and mobile ALOHA recordings (github.com/tonyzhaozh/act and MarkFzp/mobile-aloha) as RLDS.

Published under MIT with the code, for simulated and real two-armed robots. RAW holds
episode_<n>.hdf5, or folders of them, one per task:

    python -m data_builders.build aloha --out=DIR --raw=RAW
    python -m data_builders.build aloha --out=DIR --raw=RAW --task="transfer the cube" --fps=10

The files have no instruction: it is --task, or the name of the file's folder. A dataset has the
cameras of its first file that can be read, and the motion of the base if that file has it.
`mirror_episode_<n>`, mirrored copies, are left out.
"""

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from data_builders import builder, episode, hdf5, images
from data_builders.builder import option
from jaxvp.errors import UserError
from jaxvp.files import find

FPS = 50
JOINTS = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate")
ARMS = [name for side in ("left", "right")
        for name in (*(f"{side}_{joint} [rad]" for joint in JOINTS),
                     f"{side}_gripper [0 closed .. 1 open]")]
ROBOT = "ALOHA with two ViperX arms"
BASE = ["base_velocity [m/s]", "base_yaw_rate [rad/s]"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Builder(builder.RawBuilder):
    """ALOHA and mobile ALOHA: two ViperX arms, joint positions; the cameras of the first file."""

    name = "aloha"
    version = "1.0.0"
    items_per_shard = 16

    task: str = option("", "instruction of every episode; empty: the name of its folder")
    alignment: str = option(
        "act", "`act` pairs observation t of a real robot with action t-1, as the loader of ACT "
        "does because recorded observations lag; `as_is` pairs equal indices", ("act", "as_is"))
    swapped: bool = option(True, "red and blue are exchanged in compressed images, as the script "
                           "of mobile ALOHA leaves them")

    def features(self):
        for path in self._files():
            try:
                with hdf5.opened(path) as file:
                    cameras, base = list(_images(file)), BASE if "base_action" in file else []
                break
            except (OSError, ValueError, KeyError) as error:
                broken = ValueError(f"{path}: {error}")
        else:
            raise broken
        size = (self.image_size, self.image_size)
        return episode.features(dict.fromkeys(self.view_names(cameras), size), ARMS, ARMS + base)

    def items(self) -> list[str]:
        """Files below --raw, by folder and number.

        Raises:
          UserError: there is none.
          UserError: none can be read.
        """
        files = self._files()
        self.features()
        return [str(path.relative_to(self.path())) for path in files]

    def _files(self) -> list[Path]:
        files = [path for path in find(self.path(), "**/episode_*.hdf5")
                 if re.fullmatch(r"episode_\d+", path.stem)]
        if not files:
            raise UserError(f"--raw={self.raw} has no episode_<n>.hdf5, nor has a folder "
                            "below.")
        return sorted(files, key=lambda path: (str(path.parent), int(path.stem[8:])))

    def build(self, item: str) -> Iterator[episode.Episode]:
        path = self.path(item)
        with hdf5.opened(path) as file:
            state = hdf5.column(file, "observations/qpos")
            action = hdf5.column(file, "action")
            base = "base_action" in file
            if base:
                action = np.concatenate([action, hdf5.column(file, "base_action")], 1)
            group = _images(file)
            found = hdf5.views(group, {name: name for name in self.cameras or group})
            length, notes = episode.shortest(
                states=len(state), actions=len(action),
                **{name: len(frames) for name, frames in found.items()})
            self.admit(length, FPS, len(found))
            folder = os.path.basename(os.path.dirname(os.path.abspath(path)))
            text = self.instruction(self.task or folder.replace("_", " "))
            # Old files have no `sim` and are real (act-plus-plus, utils.py).
            real = not file.attrs.get("sim", False)
            if real and self.alignment == "act":
                action = np.concatenate([action[:1], action[:-1]])
            action = action[:length]
            speeds = np.arange(action.shape[1]) >= len(ARMS)
            steps = self.kept(length, FPS, action, speeds)
            encoded = {name: self._jpegs(frames, steps) for name, frames in found.items()}
        yield self.episode(
            item, FPS, steps,
            episode_id=item.removesuffix(".hdf5"),
            robot=("" if real else "simulated ") + ("mobile " if base else "") + ROBOT,
            images=encoded,
            camera_text="cameras " + ", ".join(
                name.removeprefix("cam_").replace("_", " ") for name in encoded),
            state=state,
            action=action,
            instruction=text,
            notes=notes)

    def _jpegs(self, frames: h5py.Dataset, steps: np.ndarray) -> list[bytes]:
        if frames.ndim < 4:  # JPEGs padded with zeros; else RGB.
            return hdf5.recoded(frames, steps, self.image_size, self.swapped)
        return images.jpegs((frames[step] for step in steps), self.image_size)


def _images(file: h5py.File) -> h5py.Group:
    """Camera to its frames.

    Raises:
      UserError: there are none.
    """
    if "observations/images" not in file:
        raise UserError("there is no observations/images")
    return file["observations/images"]
