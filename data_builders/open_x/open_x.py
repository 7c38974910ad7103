"""Open X-Embodiment (arXiv 2310.08864) and other RLDS datasets in TFRecord, made alike.

Source: a version folder as TFDS writes it, such as a copy of gs://gresearch/robotics/NAME/VERSION:

    RAW/dataset_info.json, features.json, NAME-SPLIT.tfrecord-00000-of-00512, ...

    python -m data_builders.build open_x --raw=DIR/bridge_dataset/1.0.0 --out=data/bridge_dataset

The dataset is the one that dataset_info.json names, else the folder's, or `--dataset`; datasets.py
says how it is read. Its split `train` stays; what it calls `val` or `test` becomes `val`. If it has
only `train`, that is divided by `--val_fraction`. Each dataset has its own licence, see
https://github.com/google-deepmind/open_x_embodiment.
"""

import dataclasses
import difflib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_builders import builder, episode, images
from data_builders.builder import option
from data_builders.open_x import tfrecord
from data_builders.open_x.datasets import DATASETS, VIEWS, Dataset, Part
from data_builders.open_x.rules import RULES
from jaxvp.data.text import clean_instruction
from jaxvp.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Builder(builder.RawBuilder):
    """Any dataset of Open X-Embodiment, Bridge V2, DROID and others as RLDS in TFRecord."""

    version = "1.0.0"

    dataset: str = option("", "name in the table of datasets.py; empty: as the download says")
    partial: bool = option(False, "go on although files of the download are missing")

    @property
    def name(self) -> str:
        """The dataset, as the table calls it.

        Raises:
          UserError: there is no download at `--raw`.
          UserError: the table has no such dataset; the message suggests names.
        """
        names = {alias: name for name, dataset in DATASETS.items()
                 for alias in (name, *dataset.aliases)}
        if self.dataset:
            given = [self.dataset]
        else:
            folder = Path(self.raw).expanduser().resolve()
            given = [self._download().name, folder.name, folder.parent.name]
        if found := [names[name] for name in given if name in names]:
            return found[0]
        near = difflib.get_close_matches(given[0], names, 3, cutoff=0.4) or list(names)[:3]
        raise UserError(
            f"--raw={self.raw}: data_builders/open_x/datasets.py has no dataset {given[0]!r}; near "
            f"names are {', '.join(near)}. Say --dataset=NAME if it has the layout of one that is "
            "there, or add an entry: robot, steps per second, and what cameras, action, state and "
            "language are called in features.json.")

    @property
    def items_per_shard(self) -> int:
        """Episodes per file, so that the largest datasets get about a thousand files."""
        total = sum(count for _, count in self._download().files.values())
        return max(64, -(-total // 1024))

    @property
    def _entry(self) -> Dataset:
        return DATASETS[self.name]

    def features(self):
        cameras = dict.fromkeys(self.view_names(self._entry.cameras), (self.image_size,) * 2)
        return episode.features(cameras, names(self._entry.state), names(self._entry.action))

    def items(self) -> list[tuple[str, int]]:
        """(file, number in it) of every record, in order.

        Raises:
          UserError: files of the download are missing, and `--no-partial`.
          UserError: the table has no such dataset, its version cannot be used, or features.json
            lacks what the table says.
        """
        download, entry = self._download(), self._entry
        if entry.versions and download.version not in entry.versions:
            raise UserError(f"--raw={self.raw} is version {download.version} of {self.name}, and "
                            f"only {', '.join(entry.versions)} is known to be sound: download it.")
        sizes = {key: math.prod(spec.shape) for key, spec in download.specs.items()}
        needed = [(f"steps/{part.key}", part.start + part.size)
                  for part in (*entry.action, *entry.state)]
        needed += [(f"steps/{key}", 1) for key in entry.language]
        needed += [(f"steps/observation/{entry.cameras[camera]}", 1)
                   for camera in self.view_names(entry.cameras)]
        if wrong := [f"{key}[{size}]" for key, size in needed if sizes.get(key, 0) < size]:
            found = ", ".join(f"{key}[{size}]" for key, size in sizes.items() if "steps/" in key)
            raise UserError(f"--raw={self.raw} is not {self.name} as datasets.py describes it: "
                            f"features.json lacks {', '.join(wrong)}; it has {found}.")
        folder = self.path()
        missing = [file for file in download.files if not (folder / file).exists()]
        if missing and not self.partial:
            raise UserError(
                f"--raw={self.raw} lacks {len(missing)} of {len(download.files)} files, such as "
                f"{missing[0]}: download them, or convert those that are there with --partial.")
        return [(file, number) for file, (_, count) in download.files.items()
                if file not in missing for number in range(count)]

    def split(self, item: tuple[str, int]) -> str:
        """The split of the dataset: `train`, and `val` for every other; see above for datasets
        without others."""
        files = self._download().files
        if {split for split, _ in files.values()} == {"train"}:
            return super().split(item)
        return "train" if files[item[0]][0] == "train" else "val"

    def build(self, item: tuple[str, int]) -> Iterator[episode.Episode]:
        file, number = item
        data = tfrecord.read(self.path(file), number)
        try:
            made = self._episode(tfrecord.Example(data, self._download().specs), item)
        except ValueError as error:
            raise UserError(f"{file}, record {number}: {error}") from error
        yield made

    def episode_id(self, item: tuple[str, int]) -> str:
        return f"{item[0]}:{item[1]}"

    def _episode(self, record: tfrecord.Example, item: tuple[str, int]) -> episode.Episode:
        if not record.values("steps/is_first"):
            raise UserError("the episode has no steps")
        entry = self._entry
        state, action = columns(record, entry.state), columns(record, entry.action)
        relative = [part.relative for part in entry.action for _ in part.names]
        late = 0  # The first step that is kept.
        if entry.relabel:
            late = int(not action[0, relative].any())
            action, change = action[late:-1], differences(state[late:], names(entry.state))
            action[:, relative] = change[:, :sum(relative)]
            state = state[late:-1]
        frames = self._frames(record)
        success = not entry.success or succeeded(record.values(entry.success)[0])
        self.admit(len(action), entry.fps, len(frames), success)
        texts = self._texts(record)[late:]
        steps = self.kept(len(action), entry.fps, action, relative)
        swapped = () if self._download().prepared else entry.swapped
        pictures = {
            camera: [images.recode(encoded[late + step], self.image_size, camera in swapped)
                     for step in steps]
            for camera, encoded in frames.items()}
        return self.episode(
            item, entry.fps, steps,
            robot=entry.robot,
            images=pictures,
            camera_text=VIEWS,
            state=state if entry.state else None,
            action=action,
            relative=relative,
            instruction=texts,
            source=self.episode_id(item),
            success=success)

    def _frames(self, record: tfrecord.Example) -> dict[str, Sequence[bytes]]:
        """Camera to the encoded images of all steps, without cameras that are missing."""
        entry = self._entry
        keys = {camera: f"steps/observation/{entry.cameras[camera]}"
                for camera in self.view_names(entry.cameras)}
        frames = {camera: record.values(key) for camera, key in keys.items() if key in record}
        return {camera: encoded for camera, encoded in frames.items()
                if not entry.black or images.decode(encoded[-1]).any()}

    def _texts(self, record: tfrecord.Example) -> list[str]:
        """The instruction of every step, of several the first that is not empty."""
        length = len(record.values("steps/is_first"))
        if not self._entry.language:
            return [""] * length
        texts = []
        for key in self._entry.language:
            texts.append(record.values(f"steps/{key}"))
            if len(texts[-1]) > length:
                codes = record.array(f"steps/{key}")
                texts[-1] = [bytes(row[row != 0].tolist()) for row in codes]
        steps = list(zip(*texts, strict=True))
        said = {choices: next(filter(None, map(clean_instruction, choices)), "")
                for choices in dict.fromkeys(steps)}
        return self.instructions([said[choices] for choices in steps])

    def _download(self) -> tfrecord.Download:
        return tfrecord.download(self.path("dataset_info.json").parent)


def names(parts: Sequence[Part]) -> tuple[str, ...]:
    """Names of all dimensions."""
    return tuple(name for part in parts for name in part.names)


def columns(record: tfrecord.Example, parts: Sequence[Part]) -> np.ndarray:
    """float[L, dimensions] of an episode, in SI units."""
    found = [np.zeros((len(record.values("steps/is_first")), 0))]
    for part in parts:
        values = record.array(f"steps/{part.key}").astype(float)
        values = values.reshape(len(values), -1)[:, part.start:part.start + part.size]
        if not np.isfinite(values).all():
            raise UserError(f"{part.key} has numbers that are not finite")
        values = values * part.scale
        for rule in part.rule.split():
            values = RULES[rule](values)
        found.append(values)
    return np.concatenate(found, 1)


def differences(state: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """float[L - 1, S], changes of the state from step to step; angles go the short way round."""
    change = np.diff(state, axis=0)
    turns = ["[rad]" in name for name in names]
    change[:, turns] = (change[:, turns] + np.pi) % (2 * np.pi) - np.pi
    return change


def succeeded(value: bool | bytes) -> bool:
    """A truth value, or what DROID's paths say."""
    return b"/success/" in value if isinstance(value, bytes) else bool(value)
