"""Random access to the episodes of an RLDS dataset in ArrayRecord, without TensorFlow.

An index has the position of every image in its file, so a clip costs one small read for each of its
frames. Where records are compressed, whole ones are read, and kept in memory. Images stay encoded;
`decode_image` decodes the ones that a clip needs.
"""

import collections
import contextlib
import copy
import functools
import hashlib
import json
import os
import re
import shutil
import threading
import uuid
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from google.protobuf import json_format

from jaxvp.data import array_record, record_index, tf_example
from jaxvp.data.record_index import SPAN, BadRecord, Index, Layout
from jaxvp.data.text import one_line
from jaxvp.errors import UserError
from jaxvp.files import find, some


class BadImage(BadRecord):
    """An image that cannot be decoded."""


class NoDataset(UserError):
    """A path without a dataset, or with an unfinished one."""


class Encoded(Sequence):
    """The bytes that a record has for each of its L steps, read when they are asked for."""

    def __init__(self, read: Callable[[np.void], bytes], spans: np.ndarray):
        self._read, self._spans = read, spans

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, step: int) -> bytes:
        """Raises BadRecord when the file is damaged there."""
        return self._read(self._spans[step])


class Record:
    """The steps of one record: up to L steps of an episode. Only what is used is read; every
    attribute raises BadRecord where the file is damaged.

    Attributes:
      images: camera to L encoded images, and extra array to L serialised float16 arrays (b"" at
        steps that no array is stored for).
      action: float32[L, A] in SI units, or None.
      state: float32[L, S] in SI units, or None.
      instruction: L texts.
    """

    def __init__(self, name: str, row: np.void, layout: Layout, spans: Path,
                 read: Callable[[int, int], bytes]):
        """Prepares what is read later.

        Args:
          name: for messages.
          row: a record_index.ROW.
          layout: what the record holds.
          spans: the file that `row` refers to.
          read: gives some bytes of the record, from where they start and their number.
        """
        self._name, self._row, self._layout = name, row, layout
        self._spans, self._bytes = spans, read

    @functools.cached_property
    def images(self) -> dict[str, Encoded]:
        names, length = self._layout.lists, int(self._row["length"])
        spans = np.fromfile(self._spans, SPAN, len(names) * length,
                            offset=int(self._row["spans"]) * SPAN.itemsize)
        return {name: Encoded(self._read, spans[i * length :][:length])
                for i, name in enumerate(names)}

    @functools.cached_property
    def action(self) -> np.ndarray | None:
        return self._column("action")

    @functools.cached_property
    def state(self) -> np.ndarray | None:
        return self._column("state")

    @functools.cached_property
    def instruction(self) -> list[bytes]:
        data = self._read(self._row["columns"]["instruction"])
        return [data[start:end] for start, end in tf_example.elements(data, 0, len(data))]

    def _column(self, name: str) -> np.ndarray | None:
        if name not in self._layout.widths:
            return None
        values = np.frombuffer(self._read(self._row["columns"][name]), "<f4")
        return values.reshape(-1, self._layout.widths[name])

    def _read(self, span: np.void) -> bytes:
        start, size, crc = span.item()
        try:
            data = self._bytes(start, size)
        except OSError as error:
            raise BadRecord(f"{self._name} cannot be read ({error})") from error
        if zlib.crc32(data) != crc:
            raise BadRecord(f"bytes {start} to {start + size} of {self._name} are damaged")
        return data


def version_folder(path: str | os.PathLike) -> Path:
    """The TFDS version folder: `path` itself, or the only one inside it.

    Raises:
      NoDataset: the path has no dataset, or an unfinished one.
      UserError: the path has several versions.
    """
    path = Path(path).expanduser()
    if _unfinished(path.resolve()):
        raise NoDataset(f"No dataset at {path}: it is an unfinished build: repeat its command.")
    if (path / "dataset_info.json").exists():
        return path
    if not path.is_dir():
        raise NoDataset(
            f"No dataset at {path}: the folder does not exist. Build one with "
            "`python -m data_builders.build NAME --out=DIR` or correct the path."
        )
    versions = [file.parent for file in find(path, "*/dataset_info.json")
                if not _unfinished(file.parent.resolve())]
    if len(versions) > 1:
        names = ", ".join(folder.name for folder in versions)
        raise UserError(f"{path} holds several versions ({names}): name one in the path.")
    if not versions:
        unfinished = [folder.name for folder in find(path, "*") if _unfinished(folder)]
        found = (f"an unfinished build ({unfinished[0]}): repeat its command" if unfinished
                 else f"only {some(path)}")
        raise NoDataset(
            f"No dataset at {path}: expected dataset_info.json there or one folder below, "
            f"found {found}."
        )
    return versions[0]


def _unfinished(folder: Path) -> bool:
    """Whether a folder is named as one that is being built: "1.0.0.incomplete", and TFDS's
    "incomplete.A1B2C3_1.0.0"."""
    return "incomplete" in folder.name.split(".")


def splits(path: str | os.PathLike) -> tuple[str, ...]:
    """The splits of the dataset, such as ("train", "val"); raises as `version_folder`."""
    return tuple(sorted(read_info(version_folder(path)).splits))


def read_info(folder: Path) -> tfds.core.DatasetInfo:
    """What dataset_info.json and features.json of a version folder say.

    Raises:
      UserError: one of them is damaged, or describes what TFDS cannot read without TensorFlow.
    """
    name = "features.json"
    try:
        tfds.features.FeatureConnector.from_config(folder)
        name = "dataset_info.json"
        info = tfds.builder_from_directory(folder).info
        for split in info.splits.values():
            _ = split.filepaths
    except (json_format.ParseError, ValueError, TypeError, KeyError, ImportError) as error:
        raise UserError(f"{folder / name} is not as TFDS writes it: "
                        f"{one_line(str(error))[:200]}") from error
    return info


def cached(folder: Path, name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` in `folder`/.jaxvp; when it does not exist, `make` writes its files.

    Where `folder` is read-only, it is in $JAXVP_CACHE, by default ~/.cache/jaxvp.
    """
    fallback = Path(os.environ.get("JAXVP_CACHE", Path.home() / ".cache" / "jaxvp"))
    places = [place / name for place in (folder / ".jaxvp", fallback)]
    for place in places:
        if place.exists():
            return place
    for place in places:
        partial = place.with_name(f"{name}.{uuid.uuid4().hex}")
        try:
            partial.mkdir(parents=True)
            break
        except OSError:
            if place is places[-1]:
                raise
    try:
        make(partial)
        partial.rename(place)
    except BaseException as error:
        shutil.rmtree(partial)
        if not (isinstance(error, OSError) and place.exists()):  # Another process was faster.
            raise
    return place


def decode_image(data: bytes, out: np.ndarray | None = None) -> np.ndarray:
    """An encoded image as uint8[H, W, 3] RGB; a JPEG of the size of `out` is decoded into that.

    Raises:
      BadImage: the data is truncated or is no image.
    """
    image = None
    if data[:2] == b"\xff\xd8":
        # What a truncated file lacks would be grey.
        if data.rstrip(b"\0")[-2:] == b"\xff\xd9":
            with contextlib.suppress(ValueError):
                fits = out is not None and simplejpeg.decode_jpeg_header(data)[:2] == out.shape[:2]
                image = simplejpeg.decode_jpeg(data, "RGB", buffer=out if fits else None,
                                               strict=False)
    elif data:
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if image is None:
        raise BadImage(f"{len(data)} bytes that are not a whole image")
    return image


class Cache:
    """Bytes by number, the last used ones up to a limit; safe to use from several threads."""

    def __init__(self, limit: int):
        """`limit`: in bytes, all together."""
        self.limit, self.bytes = limit, 0
        self._entries: collections.OrderedDict[int, bytes] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, number: int, make: Callable[[], bytes]) -> bytes:
        with self._lock:
            if number in self._entries:
                self._entries.move_to_end(number)
                return self._entries[number]
        data = make()
        with self._lock:
            if number not in self._entries:
                self._entries[number] = data
                self.bytes += len(data)
            while self.bytes > self.limit:
                self.bytes -= len(self._entries.popitem(last=False)[1])
        return data


class Episodes:
    """The records of one split, by number; safe to use from several threads.

    The first use reads every record once and stores an index with the data, named by a hash of
    file sizes, beginnings and ends.

    Attributes:
      folder, split, digest: where the data is, and the hash of its content.
      cameras: names of the image features.
      extra: name of every array that is stored for clips, to the settings that it was computed
        with, see jaxvp.tools.precompute.
      names, units: of "action" and "state" dimensions, () for a column the features lack.
      rows: the index, a record_index.ROW for every record.
      lengths, offsets: int32[records], steps and the number of the first step in its episode.
      fps: float32[records].
      has_action: bool[records]; a reader may set some to False, to do without their actions.
      damaged: number in the split to message, of records that cannot be read and are left out.
    """

    def __init__(self, path: str | os.PathLike, split: str, cache_bytes: int = 1 << 28):
        """Opens the dataset at `path`; keeps up to `cache_bytes` of compressed records in memory.

        Raises:
          UserError: the dataset or one of its files is absent.
          UserError: the split is absent or has no readable records, the format is not ArrayRecord
            in jaxvp's RLDS layout, a file is damaged as a whole, or an action or state is not
            finite.
        """
        self.folder, self.split = version_folder(path), split
        info = read_info(self.folder)
        if split not in info.splits:
            raise UserError(f"{self.folder} has no split {split!r}, but {sorted(info.splits)}.")
        if info.file_format.value != "array_record":
            raise UserError(
                f"{self.folder} is {info.file_format.value}: random access needs array_record. "
                "Convert it: copy its records into ArrayRecord files, they need no re-encoding."
            )
        self._read_features(info.features)
        self._files = [Path(file) for file in info.splits[split].filepaths]
        counts = info.splits[split].shard_lengths
        self._ends = np.cumsum(counts)
        self.digest = self._digest()
        layout = Layout({key: len(names) for key, names in self.names.items() if names},
                        (*self.cameras, *self._extra))
        self._index = Index.load(cached(
            self.folder, f"index-{split}-{self.digest}-v{record_index.VERSION}",
            lambda folder: record_index.make(folder, self._files, counts, layout,
                                             f"{self.folder} {split}")))
        self._layout, self.damaged = layout, self._index.damaged
        self._cache = Cache(cache_bytes)
        self._take(self._index.rows)
        stored = json.loads(self.text("options", 0)).get("extra", {})
        if missing := set(self._extra) - set(stored):
            raise UserError(f"{self.folder} stores {sorted(missing)} without a word on how they "
                            "were computed: write it again with jaxvp.tools.precompute.")
        self.extra = {name: stored[name] for name in self._extra}

    def _take(self, rows: np.ndarray):
        self.rows = rows
        self.lengths, self.offsets = rows["length"].copy(), rows["offset"].copy()
        self.fps, self.has_action = rows["fps"].copy(), rows["has_action"].copy()

    def only(self, records: np.ndarray) -> "Episodes":
        """The same with these records alone: their numbers, or bool[records]."""
        part = copy.copy(self)
        part._take(self.rows[records])
        part.has_action = self.has_action[records]
        return part

    def __len__(self) -> int:
        return len(self.rows)

    def text(self, name: str, record: int) -> str:
        """Metadata `name` of a record: one of record_index.TEXTS."""
        return self._index.texts[name][int(self.rows["texts"][name][record])]

    def where(self, name: str, test: Callable[[str], bool]) -> np.ndarray:
        """bool[records]: whether the metadata `name` passes a test, which is asked once a text."""
        passed = np.array([test(text) for text in self._index.texts[name]], bool)
        return passed[self.rows["texts"][name]]

    def seconds(self) -> np.ndarray:
        """float64[records], the duration of the whole episode that each is a part of."""
        episode = self.rows["texts"]["episode_id"]
        return np.bincount(episode, self.lengths)[episode] / self.fps

    def robots(self) -> tuple[str, ...]:
        """The robots of these records, sorted."""
        numbers = np.unique(self.rows["texts"]["robot"])
        return tuple(sorted(self._index.texts["robot"][int(number)] for number in numbers))

    def records_of(self, robot: str) -> np.ndarray:
        """int[n], the numbers of the records of a robot."""
        return np.flatnonzero(self.where("robot", lambda text: text == robot))

    def name(self, record: int) -> str:
        """How messages name a record."""
        number, first = self.rows["number"][record], self.offsets[record]
        episode = self.text("episode_id", record)
        return f"{self.folder} {self.split}[{number}], episode {episode} from step {first}"

    def __getitem__(self, record: int) -> Record:
        """A record; one that is compressed is taken from the cache, or read as a whole.

        Raises:
          BadRecord: it is damaged; one that is not compressed raises where it is used.
        """
        row = self.rows[record]
        if row["position"] >= 0:
            return self._record(row)
        number = int(row["number"])
        return self._record(row, self._cache.get(number, lambda: self.raw(record)))

    def columns(self, record: int) -> Record:
        """As `[]`, past the cache: for a scan of the actions and states of the whole split."""
        row = self.rows[record]
        return self._record(row, None if row["position"] >= 0 else self.raw(record))

    def raw(self, record: int) -> bytes:
        """The whole record, a serialised tf.train.Example; raises BadRecord when it is damaged."""
        try:
            return self._source[int(self.rows["number"][record])]
        except RuntimeError as error:
            raise BadRecord(f"{self.name(record)} is damaged ({error})") from error

    @functools.cached_property
    def _source(self) -> ArrayRecordDataSource:
        return ArrayRecordDataSource(self._files)

    def _record(self, row: np.void, data: bytes | None = None) -> Record:
        if data is None:
            file = self._files[np.searchsorted(self._ends, row["number"], side="right")]
            read = array_record.Value(file, int(row["position"])).read
        else:
            def read(start, size):
                return data[start : start + size]
        name = f"{self.folder} {self.split}[{row['number']}]"
        return Record(name, row, self._layout, self._index.spans, read)

    def _read_features(self, features):
        """Camera and dimension names out of the TFDS features."""
        try:
            steps = dict(features["steps"].feature)
            observation = dict(steps["observation"])
            for name in ("language_instruction", "is_first"):
                steps[name]
            for name in (*record_index.TEXTS, "offset", "fps", "has_action"):
                features["episode_metadata"][name]
        except KeyError as error:
            raise UserError(
                f"{self.folder}/features.json lacks {error}: it is not RLDS as jaxvp writes it. "
                "Convert the raw data with `python -m data_builders.build`."
            ) from error
        image = tfds.features.Image
        self.cameras = tuple(sorted(k for k, v in observation.items() if isinstance(v, image)))
        self._extra = tuple(sorted(k for k, v in observation.items()
                                   if isinstance(v, tfds.features.Tensor)
                                   and v.np_dtype == np.float16))
        self.names, self.units = {}, {}
        for column, feature in ("action", steps.get("action")), ("state", observation.get("state")):
            if feature and len(feature.shape) != 1:
                raise UserError(f"{self.folder}/features.json: {column} must be a vector, found "
                                f"the shape {feature.shape}.")
            size = feature.shape[0] if feature else 0
            words = [word.strip() for word in (feature.doc.desc or "").split(",")] if size else []
            if len(words) != size:  # A dataset without a description of its dimensions.
                words = [f"{column}_{i}" for i in range(size)]
            parts = [re.fullmatch(r"(.*?)\s*(?:\[(.*)\])?", word).groups("") for word in words]
            self.names[column] = tuple(name for name, _ in parts)
            self.units[column] = tuple(unit for _, unit in parts)

    def _digest(self) -> str:
        """The hash of the content, which is not read again while the files look the same."""
        seen = hashlib.sha256((self.folder / "features.json").read_bytes())
        absent = []
        for path in self._files:
            try:
                stat = path.stat()
            except FileNotFoundError:
                absent.append(path.name)
                continue
            seen.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
        if absent:
            raise UserError(f"{self.folder} lacks {len(absent)} files: {absent[0]}, ...")
        name = f"digest-{self.split}-{seen.hexdigest()[:16]}"
        folder = cached(self.folder, name,
                        lambda folder: (folder / "digest").write_text(self._hash()))
        return (folder / "digest").read_text()

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
