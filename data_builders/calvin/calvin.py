"""CALVIN (arXiv 2112.03227, MIT) as RLDS: play data of a Panda arm at a table, in simulation.

Source: calvin.cs.uni-freiburg.de/dataset, such as task_ABC_D.zip, which makes

    RAW/{training,validation}/episode_<7 digits>.npz                one file per frame
    RAW/{training,validation}/ep_start_end_ids.npy                  the play episodes
    RAW/{training,validation}/lang_annotations/auto_lang_ann.npy    texts of parts of them

    python -m data_builders.build calvin --out=DIR --raw=RAW/task_ABC_D

An episode is a part with a text, about 64 frames. Parts overlap. With --unlabelled=keep, what no
text covers, most of the data, becomes episodes without a text, too. The split `val` is CALVIN's
`validation`, for ABC_D another table. Actions are `rel_actions`: changes of the end effector,
clipped to -1 .. 1.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_builders import builder, episode, images
from data_builders.builder import option
from jaxvp import unpickle
from jaxvp.config import Share
from jaxvp.data.text import clean_instruction
from jaxvp.errors import UserError

FPS = 30.0
CAMERAS = {"static": "a fixed view", "gripper": "a wrist view"}
STATE_NAMES = (
    *(f"eef_{axis} [m]" for axis in "xyz"), *(f"eef_euler_{axis} [rad]" for axis in "xyz"),
    "gripper_width [m]", *(f"joint_{i} [rad]" for i in range(1, 8)),
    "gripper_command [0 closed .. 1 open]",
)
ACTION_NAMES = (
    *(f"eef_delta_{axis} [0.02 m]" for axis in "xyz"),
    *(f"eef_delta_euler_{axis} [0.05 rad]" for axis in "xyz"), "gripper [0 closed .. 1 open]",
)
RELATIVE = (True,) * 6 + (False,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Builder(builder.RawBuilder):
    """CALVIN play data cut by its texts: Panda arm, static and gripper camera, 30 Hz."""

    name = "calvin"
    version = "1.0.0"

    annotations: str = option("lang_annotations", "folder of the texts")
    val_fraction: Share = option(0.0, "share of the training parts that go to `val`, too")

    def features(self):
        cameras = self.view_names(tuple(CAMERAS))
        return episode.features(dict.fromkeys(cameras, (self.image_size, self.image_size)),
                                STATE_NAMES, ACTION_NAMES)

    def items(self) -> list[tuple[str, int, int, str]]:
        """(folder, first frame, last frame, text), of each folder in the order of its texts.

        Raises:
          UserError: there is no such folder or file.
          UserError: a file holds something else.
        """
        items = []
        for folder in ("training", "validation"):
            path = self.path(folder, self.annotations, "auto_lang_ann.npy")
            windows = read_annotations(path)
            items += [(folder, *window) for window in windows]
            if self.unlabelled == "keep":
                with reading(self.path(folder, "ep_start_end_ids.npy")) as file:
                    items += [(folder, *part, "") for part in uncovered(np.load(file), windows)]
        return items

    def split(self, item) -> str:
        return "val" if item[0] == "validation" else super().split(item)

    def episode_id(self, item) -> str:
        return "{}/{:07d}-{:07d}/{}".format(*item)

    def build(self, item: tuple[str, int, int, str]) -> Iterator[episode.Episode]:
        folder, first, last, text = item
        files = [self.path(folder) / f"episode_{frame:07d}.npz" for frame in range(first, last + 1)]
        views = self.view_names(tuple(CAMERAS))
        self.admit(len(files), FPS, len(views))
        instruction = self.instruction(text)
        state, action = (np.stack(values).astype(np.float64) for values in zip(
            *(read(file, "robot_obs", "rel_actions") for file in files), strict=True))
        for values in (state, action):  # From -1, closed, and 1, open.
            values[:, -1] = (values[:, -1] + 1) / 2
        steps = self.kept(len(files), FPS, action, RELATIVE)
        keys = [f"rgb_{camera}" for camera in views]
        frames = [images.jpegs(read(files[step], *keys), self.image_size) for step in steps]
        yield self.episode(
            item, FPS, steps,
            robot="simulated Panda arm of CALVIN, end-effector deltas",
            images=dict(zip(views, map(list, zip(*frames, strict=True)), strict=True)),
            camera_text=CAMERAS,
            state=state,
            action=action,
            relative=RELATIVE,
            instruction=instruction,
            source=f"{folder}/{files[0].name}")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """The file; a damaged one makes NumPy raise anything, which becomes a ValueError."""
    with path.open("rb") as file:
        try:
            yield file
        except Exception as error:
            raise UserError(f"{path} does not hold what CALVIN's files do: {error}") from error


def read(path: Path, *keys: str) -> list[np.ndarray]:
    """Arrays of an npz file; the others are not decompressed.

    Raises:
      OSError, UserError: it is not there, is damaged, or lacks one.
    """
    with reading(path) as file:
        arrays = np.load(file)
        return [arrays[key] for key in keys]


def read_annotations(path: Path) -> list[tuple[int, int, str]]:
    """(first frame, last frame, text) of every annotated part, of which the file has the first
    frame and the one after the last: CALVIN's annotator writes (start, start + length).

    Raises:
      UserError: the file holds something else, or asks for code that is not allowed.
    """
    with reading(path) as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        table = unpickle.load(file).item()
        return [(int(first), int(end) - 1, clean_instruction(text)) for (first, end), text in zip(
            table["info"]["indx"], table["language"]["ann"], strict=True)]


def uncovered(plays: np.ndarray, windows: list[tuple[int, int, str]]) -> list[tuple[int, int]]:
    """(first frame, last frame) of what no window covers, in parts of the length of a record.

    Args:
      plays: int[n, 2], first and last frame of each play episode.
      windows: as `read_annotations` gives them.
    """
    free, parts = np.ones(plays.max() + 1, bool), []
    for first, last, _ in windows:
        free[first : last + 1] = False
    for start, end in plays:
        frames = start + np.flatnonzero(free[start : end + 1])
        for run in np.split(frames, np.flatnonzero(np.diff(frames) > 1) + 1):
            count = -(-len(run) // episode.MAX_STEPS)
            parts += [(int(part[0]), int(part[-1])) for part in np.array_split(run, count or 1)
                      if len(part)]
    return parts
