"""Random access to the episodes of an RLDS dataset in ArrayRecord, without TensorFlow.

Records are `tf.train.Example` protos and are parsed directly: stacking the actions of an 80-step
episode through `tfds.as_data_source` takes 8 ms, this way the whole record takes 0.1 ms. Images
stay encoded; `decode_image` decodes the ones that a clip needs.
"""

import collections
import dataclasses
import hashlib
import io
import os
import re
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import rich.progress
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from tensorflow_datasets.proto import tf_example_pb2

INDEX_VERSION = 2
_TEXTS = ("dataset", "episode_id", "robot", "camera_layout", "camera_text", "options")


class BadImage(ValueError):
    """An image that cannot be decoded."""


@dataclasses.dataclass(frozen=True)
class Record:
    """The steps of one record: up to L steps of an episode.

    Attributes:
      images: camera to L encoded images.
      action: float32[L, A] in SI units, or None.
      state: float32[L, S] in SI units, or None.
      instruction: L texts.
    """

    images: dict[str, list[bytes]]
    action: np.ndarray | None
    state: np.ndarray | None
    instruction: list[bytes]


def version_folder(path: str | os.PathLike) -> Path:
    """The TFDS version folder: `path` itself, or the only one inside it.

    Raises:
      FileNotFoundError: there is no dataset, or it is not finished.
      ValueError: there are several versions.
    """
    path = Path(path).expanduser()
    if (path / "dataset_info.json").exists():
        return path
    if not path.is_dir():
        raise FileNotFoundError(
            f"No dataset at {path}: the folder does not exist. Build one with "
            "`python -m data_builders.build NAME --out=DIR` or correct the path."
        )
    versions = sorted(file.parent for file in path.glob("*/dataset_info.json"))
    if len(versions) > 1:
        names = ", ".join(folder.name for folder in versions)
        raise ValueError(f"{path} holds several versions ({names}): name one in the path.")
    if not versions:
        unfinished = [folder.name for folder in path.glob("*.incomplete")]
        found = f"an unfinished build ({unfinished[0]}): repeat its command" if unfinished else None
        found = found or f"only {sorted(file.name for file in path.iterdir())[:5]}"
        raise FileNotFoundError(
            f"No dataset at {path}: expected dataset_info.json there or one folder below, "
            f"found {found}."
        )
    return versions[0]


def splits(path: str | os.PathLike) -> tuple[str, ...]:
    """The splits of the dataset, such as ("train", "val"); raises as `version_folder`."""
    return tuple(sorted(tfds.builder_from_directory(version_folder(path)).info.splits))


def cached(folder: Path, name: str, make: Callable[[], bytes]) -> bytes:
    """The file `name` beside the data, made when it is not there.

    Where `folder` is read-only the file is in $JAXVP_CACHE, by default ~/.cache/jaxvp.
    """
    fallback = Path(os.environ.get("JAXVP_CACHE", Path.home() / ".cache" / "jaxvp"))
    places = (folder / ".jaxvp", fallback)
    for place in places:
        if (place / name).exists():
            return (place / name).read_bytes()
    data = make()
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
            partial = place / f"{name}.{uuid.uuid4().hex}"
            partial.write_bytes(data)
            os.replace(partial, place / name)  # Several processes may write the same file.
            break
        except OSError:
            if place is fallback:
                raise
    return data


def decode_image(data: bytes) -> np.ndarray:
    """An encoded image as uint8[H, W, 3] RGB.

    Raises:
      BadImage: the data is truncated or is no image.
    """
    image = None
    # OpenCV fills what a truncated JPEG lacks with grey instead of failing.
    if data and (data[:2] != b"\xff\xd8" or data.rstrip(b"\0")[-2:] == b"\xff\xd9"):
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if image is None:
        raise BadImage(f"{len(data)} bytes that are not a whole image")
    return image


class Episodes:
    """The records of one split, by number; safe to use from several threads.

    The first use reads every record once and stores an index of lengths and metadata beside the
    data, named by a hash of file sizes, beginnings and ends.

    Attributes:
      folder, split, digest: where the data is, and the hash of its content.
      cameras: names of the image features.
      names, units: of "action" and "state" dimensions, () for a column the features lack.
      lengths, offsets: int32[records], steps and the number of the first step in its episode.
      fps: float32[records].
      has_action: bool[records].
    """

    def __init__(self, path: str | os.PathLike, split: str, cache_bytes: int = 1 << 28):
        """Opens the dataset at `path`; keeps up to `cache_bytes` of parsed records in memory.

        Raises:
          FileNotFoundError: the dataset or one of its files is absent.
          ValueError: the split is absent, the format is not ArrayRecord in jaxvp's RLDS layout,
            or a file is damaged.
        """
        self.folder, self.split = version_folder(path), split
        info = tfds.builder_from_directory(self.folder).info
        if split not in info.splits:
            raise ValueError(f"{self.folder} has no split {split!r}, but {sorted(info.splits)}.")
        if info.file_format.value != "array_record":
            raise ValueError(
                f"{self.folder} is {info.file_format.value}: random access needs array_record. "
                "Convert it: copy its records into ArrayRecord files, they need no re-encoding."
            )
        self._read_features(info.features)
        self._files = [Path(file) for file in info.splits[split].filepaths]
        if missing := [file.name for file in self._files if not file.exists()]:
            raise FileNotFoundError(f"{self.folder} lacks {len(missing)} files: {missing[0]}, ...")
        self.digest = self._hash()
        self._open(info.splits[split].shard_lengths)
        self._cache_bytes, self._cached_bytes = cache_bytes, 0
        self._cache: collections.OrderedDict[int, tuple[Record, int]] = collections.OrderedDict()
        self._lock = threading.Lock()
        name = f"index-{split}-{self.digest}-v{INDEX_VERSION}.npz"
        with np.load(io.BytesIO(cached(self.folder, name, self._make_index))) as index:
            self._index = dict(index)
        self.lengths, self.offsets = self._index["length"], self._index["offset"]
        self.fps, self.has_action = self._index["fps"], self._index["has_action"]

    def __len__(self) -> int:
        return len(self._source)

    def text(self, name: str, record: int) -> str:
        """Metadata `name` of a record: one of _TEXTS."""
        return str(self._index[name][self._index[f"{name}_of"][record]])

    def robots(self) -> tuple[str, ...]:
        """The robots in this split, sorted."""
        return tuple(self._index["robot"].tolist())

    def records_of(self, robot: str) -> np.ndarray:
        """int[n], the numbers of the records of a robot."""
        return np.flatnonzero(self._index["robot"][self._index["robot_of"]] == robot)

    def name(self, record: int) -> str:
        """How messages name a record."""
        first = self.offsets[record]
        episode = self.text("episode_id", record)
        return f"{self.folder} {self.split}[{record}], episode {episode} from step {first}"

    def __getitem__(self, record: int) -> Record:
        """Reads a record, or takes it from the cache."""
        with self._lock:
            if record in self._cache:
                self._cache.move_to_end(record)
                return self._cache[record][0]
        data = self._read(record)
        parsed = self._parse(record, data)[0]
        with self._lock:
            if record not in self._cache:
                self._cache[record] = parsed, len(data)
                self._cached_bytes += len(data)
            while self._cached_bytes > self._cache_bytes:
                self._cached_bytes -= self._cache.popitem(last=False)[1][1]
        return parsed

    def columns(self, record: int) -> Record:
        """As `[]`, past the cache: for a scan of the actions and states of the whole split."""
        return self._parse(record, self._read(record))[0]

    def _read_features(self, features):
        """Camera and dimension names out of the TFDS features."""
        try:
            steps = dict(features["steps"].feature)
            observation = dict(steps["observation"])
            for name in ("language_instruction", "is_first"):
                steps[name]
            for name in (*_TEXTS, "offset", "fps", "has_action"):
                features["episode_metadata"][name]
        except KeyError as error:
            raise ValueError(
                f"{self.folder}/features.json lacks {error}: it is not RLDS as jaxvp writes it. "
                "Convert the raw data with `python -m data_builders.build`."
            ) from error
        image = tfds.features.Image
        self.cameras = tuple(sorted(k for k, v in observation.items() if isinstance(v, image)))
        self.names, self.units = {}, {}
        for column, feature in ("action", steps.get("action")), ("state", observation.get("state")):
            size = feature.shape[0] if feature else 0
            words = [word.strip() for word in (feature.doc.desc or "").split(",")] if size else []
            if len(words) != size:  # A dataset without a description of its dimensions.
                words = [f"{column}_{i}" for i in range(size)]
            parts = [re.fullmatch(r"(.*?)\s*(?:\[(.*)\])?", word).groups("") for word in words]
            self.names[column] = tuple(name for name, _ in parts)
            self.units[column] = tuple(unit for _, unit in parts)

    def _hash(self) -> str:
        digest = hashlib.sha256((self.folder / "features.json").read_bytes())
        for path in self._files:
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                digest.update(f"{path.name} {size}".encode())
                for start in (0, max(0, size - 65536)):
                    file.seek(start)
                    digest.update(file.read(65536))
        return digest.hexdigest()[:16]

    def _open(self, shard_lengths):
        for file, expected in zip(self._files, shard_lengths, strict=True):
            try:
                found = len(ArrayRecordDataSource([file]))
            except RuntimeError as error:
                raise ValueError(
                    f"{file} is truncated or damaged ({error}): copy or build it again."
                ) from error
            if found != expected:
                raise ValueError(
                    f"{file} has {found} records, dataset_info.json says {expected}: "
                    "the files are of different builds."
                )
        self._source = ArrayRecordDataSource(self._files)

    def _read(self, record: int) -> bytes:
        try:
            return self._source[record]
        except RuntimeError as error:
            raise ValueError(
                f"{self.folder} {self.split}[{record}] is damaged ({error}): copy or build the "
                "dataset again."
            ) from error

    def _parse(self, record: int, data: bytes) -> tuple[Record, dict]:
        """(steps, feature map of the proto) of one record."""
        feature = tf_example_pb2.Example.FromString(data).features.feature
        instruction = list(feature["steps/language_instruction"].bytes_list.value)
        length = len(instruction)
        images = {
            camera: list(feature[f"steps/observation/{camera}"].bytes_list.value)
            for camera in self.cameras
        }
        columns = {}
        for column, key in ("action", "steps/action"), ("state", "steps/observation/state"):
            values = np.array(feature[key].float_list.value, np.float32)
            size = len(self.names[column])
            if len(values) != length * size:
                raise ValueError(
                    f"{self.folder} {self.split}[{record}]: {column} has {len(values)} numbers "
                    f"for {length} steps of {size}."
                )
            columns[column] = values.reshape(length, size) if size else None
        if wrong := {c: len(frames) for c, frames in images.items() if len(frames) != length}:
            raise ValueError(
                f"{self.folder} {self.split}[{record}]: {length} steps but images {wrong}."
            )
        return Record(images=images, instruction=instruction, **columns), feature

    def _make_index(self) -> bytes:
        numbers = {name: [] for name in ("length", "offset", "fps", "has_action")}
        texts = {name: [] for name in _TEXTS}
        title, small = f"Indexing {self.folder} {self.split}, once", len(self) < 1000
        for record in rich.progress.track(range(len(self)), title, disable=small):
            parsed, feature = self._parse(record, self._read(record))
            meta = {name: feature[f"episode_metadata/{name}"] for name in (*numbers, *texts)}
            numbers["length"].append(len(parsed.instruction))
            numbers["offset"].append(meta["offset"].int64_list.value[0])
            numbers["fps"].append(meta["fps"].float_list.value[0])
            numbers["has_action"].append(meta["has_action"].int64_list.value[0])
            for name, values in texts.items():
                values.append(meta[name].bytes_list.value[0].decode())
        dtypes = {"length": np.int32, "offset": np.int32, "fps": np.float32, "has_action": bool}
        arrays = {name: np.array(values, dtypes[name]) for name, values in numbers.items()}
        for name, values in texts.items():
            arrays[name], arrays[f"{name}_of"] = np.unique(values, return_inverse=True)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        return buffer.getvalue()
