"""LeRobot datasets of format 2.0, 2.1 and 3.0 as RLDS (huggingface.co/docs/lerobot).

Every dataset has its own licence. RAW is a dataset (a folder with meta, data and usually videos) or
a folder of datasets of the same robot:

    python -m data_builders.build lerobot --out=DIR --raw=RAW

Names, cameras, fps and the robot come from meta/info.json. Units are whatever the dataset has:
LeRobot does not standardise them, nor the direction of grippers. So say which dimensions are
grippers and which values mean closed and open, and which action dimensions are changes:

    --gripper=gripper.pos=0:100 --relative=x,y,z,roll,pitch,yaw

`--dry_run` prints the names. Depth cameras are left out.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_builders import builder, episode
from data_builders.builder import option
from data_builders.lerobot.dataset import Dataset, Part, whole
from jaxvp.errors import UserError
from jaxvp.files import find


@dataclasses.dataclass(frozen=True, kw_only=True)
class Builder(builder.RawBuilder):
    """Any LeRobot dataset, format 2.0, 2.1 or 3.0: robot, cameras and names from its info.json."""

    version = "1.0.0"
    units = {}  # Of the dimensions of a part, by its name; info.json has none.

    state: tuple[str, ...] = option(
        ("observation.state",), "features that make the state, or parts of features that "
        "`field_descriptions` or modality.json name; empty: no state")
    action: tuple[str, ...] = option(("action",), "the same of the action; empty: no actions")
    relative: tuple[str, ...] = option((), "action dimensions that are changes, by name")
    gripper: tuple[str, ...] = option(
        (), "NAME=CLOSED:OPEN, the values that mean closed and open of a gripper dimension of "
        "state and action, such as gripper.pos=0:100; it is stored as 0 to 1")
    task_column: str = option("task_index", "column of the instruction: numbers of tasks, or texts")
    robot: str = option("", "what to call the robot; empty: `robot_type`")

    @property
    def name(self) -> str:
        return "lerobot_" + re.sub(r"\W+", "_", Path(self.raw).expanduser().resolve().name)

    def features(self):
        datasets = list(self.datasets().values())
        cameras = self.view_names(
            list(dict.fromkeys(camera for dataset in datasets for camera in dataset.cameras)))
        state, action = ([self._with_unit(name) for name in _names(parts)]
                         for parts in self._parts(datasets[0]))
        size = (self.image_size, self.image_size)
        return episode.features(dict.fromkeys(cameras, size), state, action or None)

    def items(self) -> list[tuple[str, int]]:
        """(folder of the dataset below --raw, episode), in order.

        Raises:
          UserError: there is no dataset, or one that cannot be read.
          UserError: the datasets do not have the same dimensions, an option names what they do not
            have, or no episode has a camera.
        """
        datasets = self.datasets()
        parts = {folder: self._parts(dataset) for folder, dataset in datasets.items()}
        first = next(iter(parts))
        state, action = map(_names, parts[first])
        for folder in parts:
            if (names := list(map(_names, parts[folder]))) != [state, action]:
                raise UserError(f"--raw={self.raw}: state and action of {folder} are {names}, of "
                                f"{first} {[state, action]}: convert them separately.")
        for flag, wanted, names in (("gripper", self.ranges(), state + action),
                                    ("relative", self.relative, action)):
            if unknown := set(wanted) - set(names):
                raise UserError(f"--{flag}: there is no dimension {', '.join(sorted(unknown))}; "
                                f"there are {', '.join(names)}.")
        for camera in episode.cameras(self.features()):
            having = [dataset for dataset in datasets.values() if camera in dataset.cameras]
            if all(dataset.absent(camera) for dataset in having):
                raise UserError(f"--raw={self.raw}: no episode has a video of the camera {camera}: "
                                "complete the download, or leave it out by --cameras.")
        return [(folder, index) for folder, dataset in datasets.items()
                for index in dataset.episodes]

    def episode_id(self, item) -> str:
        folder, index = item
        return f"{folder}/{index}".removeprefix("./")

    def build(self, item: tuple[str, int]) -> Iterator[episode.Episode]:
        folder, index = item
        dataset = self.datasets()[folder]
        state, action = self._parts(dataset)
        columns = {self.task_column} | {part.feature for part in state + action}
        table = dataset.table(index, sorted(columns))
        rows = len(table)
        frames = {camera: dataset.frames(index, camera, rows)
                  for camera in self.cameras or dataset.cameras if camera in dataset.cameras}
        frames = {camera: count for camera, count in frames.items() if count}
        length, notes = episode.shortest(states=rows, **frames)
        if any(dataset.drifts(index, camera) for camera in frames):
            notes = (*notes, "times of videos drift: frames are counted instead")
        self.admit(length, dataset.fps, len(frames))
        texts = self._instructions(dataset, index, table)
        table = table.slice(0, length)
        states = self._values(dataset, table, state) if state else None
        actions = self._values(dataset, table, action) if action else None
        relative = [name in self.relative for name in _names(action)]
        steps = self.kept(length, dataset.fps, actions, relative)
        path = dataset.data_path(index).relative_to(self.path())
        yield self.episode(
            item, dataset.fps, steps,
            robot=self.robot or self._robot_type(dataset),
            images={camera: dataset.jpegs(index, camera, steps, self.image_size)
                    for camera in frames},
            camera_text="cameras " + ", ".join(name.replace("_", " ") for name in frames),
            state=states,
            action=actions,
            relative=relative,
            instruction=texts,
            source=f"{path}:episode_index {index}",
            notes=notes)

    def datasets(self) -> dict[str, Dataset]:
        """Folder below --raw to the dataset in it, in order.

        Raises:
          UserError: there is none, or its info.json cannot be used.
        """
        return _datasets(self.path())

    def ranges(self) -> dict[str, tuple[float, float]]:
        """Gripper dimension to what it is when closed and when open.

        Raises:
          UserError: `--gripper` is not of this form.
        """
        ranges = {}
        for text in self.gripper:
            try:
                name, closed, opened = re.fullmatch("(.+)=(.+):(.+)", text).groups()
                ranges[name] = float(closed), float(opened)
                if ranges[name][0] == ranges[name][1]:
                    raise UserError("closed and open are the same")
            except (AttributeError, ValueError) as error:
                raise UserError(f"--gripper must be NAME=CLOSED:OPEN, found {text!r}.") from error
        return ranges

    def _robot_type(self, dataset: Dataset) -> str:
        robot = dataset.info.get("robot_type") or "unknown"
        # Statistics are kept by this name, so that robots without one must not share it.
        return f"robot of {self.name}" if robot == "unknown" else robot

    def _parts(self, dataset: Dataset) -> tuple[list[Part], list[Part]]:
        """Of state and action."""
        return tuple([dataset.part(name) for name in names] for names in (self.state, self.action))

    def _with_unit(self, name: str) -> str:
        unit = self.units.get(re.sub(r"_\d+$", "", name))
        unit = "0 closed .. 1 open" if name in self.ranges() else unit
        return f"{name} [{unit}]" if unit else name

    def _values(self, dataset: Dataset, table, parts: list[Part]) -> np.ndarray:
        """float64[L, D], grippers from 0, closed, to 1, open."""
        values, ranges = dataset.vectors(table, parts), self.ranges()
        for column, name in enumerate(_names(parts)):
            if name in ranges:
                closed, opened = ranges[name]
                values[:, column] = np.clip((values[:, column] - closed) / (opened - closed), 0, 1)
        return values

    def _instructions(self, dataset: Dataset, index: int, table) -> list[str]:
        """One per step: its task, or what AgiBot's `instruction_segments` say instead."""
        texts = dataset.texts(table[self.task_column])
        segments = dataset.info.get("instruction_segments") or {}
        for segment in segments.get(str(index), ()):
            if segment.get("track", "default") == "default":  # The others overlap it.
                cut = slice(*(whole(segment[f"{side}_frame_index"], f"{side}_frame_index")
                              for side in ("start", "end")))
                texts[cut] = [segment["instruction"]] * len(texts[cut])
        return self.instructions(texts)


def _names(parts: list[Part]) -> list[str]:
    """Of all dimensions."""
    return [name for part in parts for name in part.names]


@functools.lru_cache(maxsize=1)
def _datasets(raw: Path) -> dict[str, Dataset]:
    roots = [path.parent.parent for path in find(
        raw, "**/meta/info.json", lambda folder: not (folder / "meta/info.json").exists())]
    found = {str(root.relative_to(raw)): Dataset(root) for root in roots}
    if not found:
        packed = find(raw, "**/*.tar.gz")
        hint = f", only archives such as {packed[0]}: unpack them" if packed else ""
        raise UserError(f"--raw={raw}: no folder there or below has meta/info.json{hint}.")
    return found
