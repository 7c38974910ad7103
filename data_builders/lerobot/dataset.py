"""A LeRobot dataset on disk, format 2.0, 2.1 or 3.0: its metadata, and the columns and images of an
episode.

Layout: huggingface/lerobot, src/lerobot/datasets. Format 2 has a parquet file and a video per
camera for every episode; format 3 keeps many episodes in each file. Keys of info.json that are not
used here are ignored: there are many dialects.
"""

import contextlib
import functools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from data_builders import images, json_file, video
from jaxvp.errors import UserError
from jaxvp.files import find

# Kept, because a file serves many episodes.
_measure = functools.lru_cache(maxsize=64)(video.measure)
_times_of = functools.lru_cache(maxsize=16)(video.times_of)

UNFINISHED = ("LeRobot writes the end of its files when a recording is finalized "
              "(`dataset.finalize()`): this one never was, or its download is not complete.")


class Part(NamedTuple):
    """Dimensions of a vector: where they are and what they are called."""

    feature: str
    indices: list[int]
    names: list[str]


class Span(NamedTuple):
    """Where an episode is in a video of many: its first frame, how many they are, whether the times
    of the table are off by more than half a frame, and why it cannot be told, "" if it can."""

    start: int
    count: int
    drifts: bool
    problem: str = ""


class Dataset:
    """A folder with meta/info.json.

    Attributes:
      root: the folder.
      info: its info.json; features: the part of it that describes the columns.
      fps: steps per second.
      cameras: name to feature, without depth.
    """

    def __init__(self, root: Path):
        """Reads info.json.

        Raises:
          UserError: it is not there, is no JSON, or of another format.
        """
        self.root = root
        self.info = json_file.read(root / "meta" / "info.json")
        if not isinstance(self.info, dict) or not {"features", "fps"} <= set(self.info):
            raise UserError(f"{root}/meta/info.json must have features and fps.")
        version = str(self.info.get("codebase_version")).removeprefix("v")
        if version not in ("2.0", "2.1", "3.0"):
            raise UserError(f"{root}: the format of a LeRobot dataset must be 2.0, 2.1 or 3.0, "
                            f"found {version}; LeRobot has scripts that convert.")
        self.packed = version == "3.0"
        self.features = self.info["features"]
        self.fps = float(self.info["fps"])
        self.cameras = {
            re.sub(r"\W+", "_", re.sub(r"^observation\.(images\.)?", "", key)): key
            for key, feature in self.features.items()
            if feature["dtype"] in ("video", "image") and not _is_depth(key, feature)
        }

    @functools.cached_property
    def episodes(self) -> dict[int, dict]:
        """Number of an episode to its row of the metadata, in order.

        Raises:
          UserError: there is none, or the table cannot be read.
        """
        if self.packed:
            rows = []
            for path in find(self.root / "meta" / "episodes", "*/*.parquet"):
                with _reading(path):
                    names = parquet.read_schema(path).names
                    columns = [name for name in names if not name.startswith("stats/")]
                    table = parquet.read_table(path, columns=columns, partitioning=None)
                rows += table.to_pylist()
        else:
            rows = _json_lines(self.root / "meta" / "episodes.jsonl")
        rows = [{name: whole(value, f"{self.root}/meta: {name} of an episode")
                 if name.endswith(("_index", "length")) else value for name, value in row.items()}
                for row in rows]
        numbers = [row.get("episode_index") for row in rows]
        if not rows:
            hint = UNFINISHED if self.packed else "Is the download complete?"
            raise UserError(f"{self.root}: meta has no episodes. {hint}")
        if None in numbers:
            raise UserError(f"{self.root}: an episode in meta has no episode_index.")
        return dict(sorted(zip(numbers, rows, strict=True), key=lambda pair: pair[0]))

    @functools.cached_property
    def tasks(self) -> dict[int, str]:
        """`task_index` to the text."""
        path = self._tasks_path
        if self.packed:
            with _reading(path):
                table = parquet.read_table(path, partitioning=None)
            # pandas wrote the texts as its index, whose name some versions do not set.
            texts = "task" if "task" in table.column_names else "__index_level_0__"
            rows = table.rename_columns({texts: "task"}).to_pylist()
        else:
            rows = _json_lines(path)
        tasks = {whole(row["task_index"], f"{path}: task_index"): row["task"] for row in rows}
        return {number: text for number, text in tasks.items() if number is not None}

    @property
    def _tasks_path(self) -> Path:
        return self.root / "meta" / ("tasks.parquet" if self.packed else "tasks.jsonl")

    def texts(self, column: pa.ChunkedArray) -> list[str | None]:
        """The instruction of every step, from a column of texts or of numbers of tasks; None where
        there is none.

        Raises:
          UserError: the table of tasks lacks a number.
        """
        found = {}
        for value in (values := column.to_pylist()):
            number = None if isinstance(value, str) else whole(value, f"{self.root}: a task")
            if number is not None and number not in self.tasks:
                raise UserError(f"{self._tasks_path} has no task {number}, only "
                                f"{', '.join(map(str, self.tasks))[:100]}.")
            found[value] = value if isinstance(value, str) else self.tasks.get(number)
        return [found[value] for value in values]

    @functools.cached_property
    def fields(self) -> dict[str, Part]:
        """Named parts of vectors: AgiBot's `field_descriptions` of a feature, such as
        "state/joint/position", and those of GR00T's modality.json, such as "state.left_arm"."""
        found = [(name, key, list(field["indices"])) for key, feature in self.features.items()
                 for name, field in (feature.get("field_descriptions") or {}).items()]
        path = self.root / "meta" / "modality.json"
        modality = json_file.read(path) if path.exists() else {}
        for kind, default in ("state", "observation.state"), ("action", "action"):
            found += [(f"{kind}.{name}", field.get("original_key") or default,
                       list(range(field["start"], field["end"])))
                      for name, field in modality.get(kind, {}).items()]
        return {
            name: Part(key, indices, [name] if len(indices) == 1 else
                       [f"{name}_{i}" for i in range(len(indices))])
            for name, key, indices in found
        }

    def part(self, name: str) -> Part:
        """A whole vector feature, or a named part of one.

        Raises:
          UserError: there is neither.
        """
        if name in self.fields:
            return self.fields[name]
        vectors = [key for key, feature in self.features.items()
                   if feature["dtype"] not in ("video", "image", "string")]
        if name not in vectors:
            raise UserError(f"{self.root} has no vector {name!r}; there are "
                            f"{', '.join([*vectors, *self.fields])}.")
        size = math.prod(self.features[name]["shape"])
        names = _flat(self.features[name].get("names"))
        if len(names) != size:
            names = [name.rsplit(".", 1)[-1]] * size
        if len(set(names)) < size:
            names = [f"{name}_{i}" for i, name in enumerate(names)]
        return Part(name, list(range(size)), [name.replace(",", " ") for name in names])

    def table(self, episode: int, columns: Sequence[str]) -> pa.Table:
        """Columns of an episode, one row per step.

        Raises:
          UserError, OSError: the file or a column is not there, or is damaged.
        """
        path = self.data_path(episode)
        with _reading(path):
            return parquet.read_table(
                path, columns=list(columns), use_threads=False, partitioning=None,
                filters=[("episode_index", "=", episode)] if self.packed else None)

    def vectors(self, table: pa.Table, parts: Sequence[Part]) -> np.ndarray:
        """float64[L, D], the parts of a table side by side.

        Raises:
          UserError: a vector has other dimensions than info.json says.
        """
        found = {}
        for feature in {part.feature for part in parts}:
            size = math.prod(self.features[feature]["shape"])
            rows = [np.full(size, np.nan) if row is None else np.ravel(np.array(row, np.float64))
                    for row in table[feature].to_pylist()]
            if wrong := {len(row) for row in rows} - {size}:
                raise UserError(f"{self.root}: {feature} has {wrong.pop()} dimensions, "
                                f"info.json says {self.features[feature]['shape']}")
            found[feature] = np.array(rows).reshape(-1, size)
        return np.concatenate([found[part.feature][:, part.indices] for part in parts], 1)

    def frames(self, episode: int, camera: str, rows: int) -> int:
        """How many images there are for the episode's `rows` steps; 0 where there is no video.

        Raises:
          VideoError: it is damaged.
          UserError: it has another rate than the dataset, so that frame i is not that of row i; or
            the table does not say which frames of a file are the episode's.
        """
        key = self.cameras[camera]
        if self.features[key]["dtype"] == "image":
            return rows
        if not self._has_video(episode, key):
            return 0
        path = self.video_path(episode, key)
        count, fps = (_times_of if self.packed else _measure)(path)
        if abs(fps - self.fps) > 0.05 * self.fps:
            raise UserError(f"{path} has {fps:g} frames per second, info.json says {self.fps:g}")
        if not self.packed:
            return count
        span = self._span(episode, key)
        if span.problem:
            raise UserError(f"{path}: {span.problem}")
        return span.count

    def drifts(self, episode: int, camera: str) -> bool:
        """Whether the times of the episode in a video of many, which `frames` has found, are off by
        more than half a frame: then frames are counted instead."""
        key = self.cameras[camera]
        return (self.packed and self.features[key]["dtype"] == "video"
                and self._span(episode, key).drifts)

    def absent(self, camera: str) -> bool:
        """Whether no episode has images of a camera."""
        key = self.cameras[camera]
        return self.features[key]["dtype"] == "video" and not any(
            self._has_video(episode, key) for episode in self.episodes)

    def _has_video(self, episode: int, key: str) -> bool:
        listed = not self.packed or None not in self._place(episode, key)
        return listed and self.video_path(episode, key).exists()

    def _place(self, episode: int, key: str) -> tuple:
        """(chunk, file, first second, last second) of a video of many, None where the table has
        null or NaN."""
        row = self.episodes[episode]
        values = [row.get(f"videos/{key}/{name}") for name in (
            "chunk_index", "file_index", "from_timestamp", "to_timestamp")]
        return tuple(None if value is None or value != value else value for value in values)

    def _span(self, episode: int, key: str) -> Span:
        return _spans(self, key, *self._place(episode, key)[:2])[episode]

    def jpegs(self, episode: int, camera: str, steps: np.ndarray, size: int) -> list[bytes]:
        """Images of an episode as JPEGs of size x size pixels.

        Args:
          episode: its number.
          camera: one of `cameras`.
          steps: int[n], ascending rows, of which row i shows frame i.
          size: height and width in pixels.

        Raises:
          UserError, VideoError: there are no such images.
        """
        key = self.cameras[camera]
        if self.features[key]["dtype"] == "image":
            rows = self.table(episode, [key])[key].take(pa.array(steps)).to_pylist()
            try:
                return [images.recode(row["bytes"] or (self.root / row["path"]).read_bytes(), size)
                        for row in rows]
            except ValueError as error:
                raise UserError(f"{self.data_path(episode)}: {key}: {error}") from error
        path = self.video_path(episode, key)
        if not self.packed:
            return video.jpegs(path, steps, size)
        times, _ = _times_of(path)
        return video.jpegs_at(path, times[self._span(episode, key).start + steps], size)

    def data_path(self, episode: int) -> Path:
        """The parquet file."""
        return self._path("data_path", episode, "data")

    def video_path(self, episode: int, key: str) -> Path:
        """The video file of a feature."""
        return self._path("video_path", episode, f"videos/{key}", video_key=key)

    def _path(self, template: str, episode: int, group: str, **names) -> Path:
        place = {name: self.episodes[episode].get(f"{group}/{name}")
                 for name in ("chunk_index", "file_index")}
        if self.packed and None in place.values():
            raise UserError(f"{self.root}/meta/episodes does not say in which file of {group} "
                            f"episode {episode} is.")
        return self.root / self.info[template].format(
            episode_index=episode, **place, **names,
            episode_chunk=episode // int(self.info.get("chunks_size") or 1000))


@functools.lru_cache(maxsize=16)
def _spans(dataset: Dataset, key: str, chunk: int, file: int) -> dict[int, Span]:
    """Episode to its frames in a video of many.

    The table says in seconds where episodes begin and end, and its times may drift. But when the
    episodes, as long as the table says in rows or else in seconds, fill the file exactly, they
    follow each other. Only when they do not, what the table says of each must fit its rows and the
    frames.

    Raises:
      VideoError: the frames have no times.
    """
    places = {number: dataset._place(number, key) for number in dataset.episodes}
    numbers = sorted((number for number, place in places.items()
                      if place[:2] == (chunk, file) and None not in place),
                     key=lambda number: places[number][2])
    begin, end = np.array([places[number][2:] for number in numbers], np.float64).T
    lengths = np.array([dataset.episodes[number].get("length") or 0 for number in numbers])
    path = dataset.video_path(numbers[0], key)
    times, fps = _times_of(path)
    if not len(times) or np.isnan(times).any():
        raise video.VideoError(f"{path}: its frames have no times.")
    durations = np.rint((end - begin) * dataset.fps).astype(int)
    edges = np.append(times, times[-1] + 1 / fps)

    def off(counts: np.ndarray) -> np.ndarray:
        """By how many frames the table differs from episodes of so many that follow each other."""
        return np.abs(edges[np.cumsum(counts) - counts] - begin) * dataset.fps

    filling = [counts for counts in (lengths, durations)
               if counts.min() >= 0 and counts.sum() == len(times)]
    if filling:
        counts = min(filling, key=lambda counts: off(counts).max())
        starts, drifts = np.cumsum(counts) - counts, off(counts) > 0.5
        problems = [""] * len(counts)
    else:
        starts = np.searchsorted((edges[1:] + edges[:-1]) / 2, begin)  # The nearest frame.
        counts = np.minimum(durations, len(times) - starts)
        drifts = np.zeros(len(counts), bool)
        wrong = (np.abs(edges[starts] - begin) * dataset.fps > 0.25) | (
            (lengths > 0) & (durations != lengths))
        problems = [bad and (
            f"the table has episode {number} from {a:g} to {b:g} s, which does not fit its "
            f"{length} rows, nor do the {len(counts)} episodes of this file fill its {len(times)} "
            "frames")
            for number, a, b, length, bad in zip(
                numbers, begin, end, lengths, wrong.tolist(), strict=True)]
    return {number: Span(int(start), int(count), bool(drift), problem or "")
            for number, start, count, drift, problem in zip(
                numbers, starts, counts, drifts, problems, strict=True)}


def whole(value, what: str) -> int | None:
    """A number of a table, which has floats where pandas found a value absent; None for NaN, too.

    Raises:
      UserError: it is not a whole number; the message begins with `what`.
    """
    if value is None or value != value:
        return None
    if not isinstance(value, int | float) or value % 1:
        raise UserError(f"{what} must be a whole number, found {value!r}")
    return int(value)


def _is_depth(key: str, feature: dict) -> bool:
    details = feature.get("info") or feature.get("video_info") or {}
    marked = any(name.endswith("is_depth_map") and value for name, value in details.items())
    return marked or "depth" in key.lower()  # Many are not marked.


def _flat(names) -> list[str]:
    """The dimension names of info.json as a list: they are a list, {"motors": list},
    {name: index}, or null."""
    if isinstance(names, dict):
        if all(isinstance(value, int) for value in names.values()):
            return sorted(names, key=names.get)
        names = list(names.values())
    flat = []
    for name in names or ():
        flat += map(str, name) if isinstance(name, list) else [str(name)]
    return flat


@contextlib.contextmanager
def _reading(path: Path):
    """Gives the errors of PyArrow the name of the file."""
    try:
        yield
    except FileNotFoundError:  # It has the name.
        raise
    except (pa.ArrowException, OSError) as error:
        content = path.read_bytes() if path.is_file() else b""
        cut = path.is_file() and content[8:][-4:] != b"PAR1"  # Which is at both ends.
        raise UserError(f"{path}: {error}{f' {UNFINISHED}' if cut else ''}") from error


def _json_lines(path: Path) -> list[dict]:
    try:
        rows = [json.loads(line) for line in path.read_bytes().splitlines() if line.strip()]
    except ValueError as error:
        raise UserError(f"{path} is not JSON lines: {error}") from error
    if wrong := [row for row in rows if not isinstance(row, dict)]:
        raise UserError(f"{path} must have an object in each line, found {wrong[0]!r:.60}")
    return rows
