"""EgoDex (arXiv 2505.11709) as RLDS: 338,000 episodes of two tracked human hands at a table.

Source: github.com/apple/ml-egodex, CC BY-NC-ND 4.0: converted copies must stay local. part1 to
part5, extra and test are archives that are unpacked into

    RAW/<part>/<task>/<number>.hdf5      poses of the camera and of 68 joints
    RAW/<part>/<task>/<number>.mp4       1920 x 1080 pixels, frame i belongs to row i, 30 per second

    python -m data_builders.build egodex --out=DIR --raw=RAW

The hands serve as a two-armed robot, as in H-RDT (arXiv 2507.23523): the state is the pose of both
wrists and the positions of ten fingertips, 48 numbers, in the frame of the head camera at that
step; the action is the state of the next step, in that step's frame, which the last step lacks.
Episodes of the part `test` make the split `test`.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from data_builders import builder, episode, hdf5, video
from data_builders.builder import Skip, option
from jaxvp.config import Share
from jaxvp.data.text import clean_instruction
from jaxvp.errors import UserError
from jaxvp.files import find

FPS = 30
TRACKED = 0.1  # Confidences are bimodal: below 0.003, or above 0.2.
FINGERS = ("Thumb", "IndexFinger", "MiddleFinger", "RingFinger", "LittleFinger")
JOINTS = {side: (f"{side}Hand", *(f"{side}{finger}Tip" for finger in FINGERS))
          for side in ("left", "right")}


def _names(side: str) -> list[str]:
    positions = ["wrist", *(finger.removesuffix("Finger").lower() for finger in FINGERS)]
    names = [f"{side}_{joint}_{axis} [m]" for joint in positions for axis in "xyz"]
    # The first two columns of the rotation matrix (arXiv 1812.07035).
    names[3:3] = [f"{side}_wrist_r{row}{column}" for column in (1, 2) for row in (1, 2, 3)]
    return names


NAMES = (*_names("left"), *_names("right"))


def hands(file: h5py.File) -> np.ndarray:
    """float32[L, 48], the wrists and fingertips in the frame of the camera; NAMES says the order.

    Raises:
      UserError: a joint is missing, or they differ in length.
    """
    # Poses are in a world of their own in every session; that of the camera is camera to world.
    to_camera = np.linalg.inv(hdf5.column(file, "transforms/camera"))
    parts = []
    for wrist, *tips in JOINTS.values():
        pose = to_camera @ hdf5.column(file, f"transforms/{wrist}")
        parts += [pose[:, :3, 3], pose[:, :3, 0], pose[:, :3, 1]]
        parts += [(to_camera @ hdf5.column(file, f"transforms/{tip}"))[:, :3, 3] for tip in tips]
    return np.concatenate(parts, axis=1)


def description(file: h5py.File) -> str:
    """What is done in the episode, "" if nobody said.

    A reversible task has two descriptions, of doing and undoing; `which_llm_description` is that of
    this episode.
    """
    def text(name: str) -> str:
        value = file.attrs.get(name)
        return clean_instruction(value if isinstance(value, bytes) else str(value))

    undone = text("llm_type") == "reversible" and text("which_llm_description") != "1"
    return text("llm_description2" if undone else "llm_description")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Builder(builder.RawBuilder):
    """EgoDex: two tracked human hands as a 48-dimensional robot, head camera."""

    name = "egodex"
    version = "1.0.0"

    min_tracked: Share = option(
        0.0, "leave out episodes whose wrists and fingertips are tracked for less than this share "
        "of the time; files without confidences stay")

    def features(self):
        size = (self.image_size, self.image_size)
        return episode.features({name: size for name in self.view_names(("head",))}, NAMES, NAMES)

    def items(self) -> list[str]:
        """<part>/<task>/<number> of every episode, even if it lacks one of its files.

        Raises:
          UserError: there is none.
        """
        root = self.path()
        files = {file.relative_to(root).with_suffix("") for ending in ("hdf5", "mp4")
                 for file in find(root, f"**/*/*/*.{ending}")}
        if not files:
            raise UserError(f"--raw={self.raw} has no <part>/<task>/<number>.hdf5.")
        return [file.as_posix() for file in sorted(
            files, key=lambda file: (file.parent, len(file.name), file.name))]

    def split(self, item: str) -> str:
        return "test" if "test" in Path(item).parts[:-2] else super().split(item)

    def build(self, item: str) -> Iterator[episode.Episode]:
        path = self.path(f"{item}.mp4")
        with hdf5.opened(self.path(f"{item}.hdf5")) as file:
            poses, text, tracked = hands(file), description(file), self._tracked(file)
        length, notes = episode.shortest(poses=len(poses), video=video.measure(path)[0])
        action = poses[1:length]
        self.admit(len(action), FPS, views=1)
        if tracked < self.min_tracked:
            raise Skip(f"tracked for less than {self.min_tracked:g} of the time")
        instruction = self.instruction(text)
        steps = self.kept(len(action), FPS, action)
        yield self.episode(
            item, FPS, steps,
            episode_id=item,
            robot="human hands, poses of wrists and fingertips",
            images={"head": video.jpegs(path, steps, self.image_size)},
            camera_text="one head camera",
            state=poses,
            action=action,
            instruction=instruction,
            source=f"{item}.hdf5",
            notes=notes)

    def _tracked(self, file: h5py.File) -> float:
        """The share of the time for which a joint is tracked; 1 without confidences."""
        if "confidences" not in file:
            return 1.0
        joints = [joint for side in JOINTS.values() for joint in side]
        return float(np.mean([hdf5.column(file, f"confidences/{joint}") > TRACKED
                              for joint in joints]))
