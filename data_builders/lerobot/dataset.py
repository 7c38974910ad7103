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

_measure = functools.lru_cache(maxsize=64)(video.measure)  # A file serves many episodes.


class Part(NamedTuple):
    """Dimensions of a vector: where they are and what they are called."""

    feature: str
    indices: list[int]
    names: list[str]


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
        """Number of an episode to its row of the metadata, in order."""
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
        return {row["episode_index"]: row for row in sorted(rows, key=lambda r: r["episode_index"])}

    @functools.cached_property
    def tasks(self) -> dict[int, str]:
        """`task_index` to the text."""
        if not self.packed:
            rows = _json_lines(self.root / "meta" / "tasks.jsonl")
            return {row["task_index"]: row["task"] for row in rows}
        path = self.root / "meta" / "tasks.parquet"
        with _reading(path):
            table = parquet.read_table(path, partitioning=None)
        # pandas wrote the texts as its index, whose name some versions do not set.
        texts = "task" if "task" in table.column_names else "__index_level_0__"
        return dict(zip(table["task_index"].to_pylist(), table[texts].to_pylist(), strict=True))

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
            values = np.array(table[feature].to_pylist(), np.float64).reshape(len(table), -1)
            if values.shape[1] != math.prod(self.features[feature]["shape"]):
                raise UserError(f"{self.root}: {feature} has {values.shape[1]} dimensions, "
                                f"info.json says {self.features[feature]['shape']}")
            found[feature] = values
        return np.concatenate([found[part.feature][:, part.indices] for part in parts], 1)

    def frames(self, episode: int, camera: str, rows: int) -> int:
        """How many images there are for the episode's `rows` steps; 0 where there is no video.

        Raises:
          VideoError: it is damaged.
          UserError: it has another rate than the dataset, so that frame i is not that of row i.
        """
        key = self.cameras[camera]
        if self.features[key]["dtype"] == "image":
            return rows
        row = self.episodes[episode]
        if self.packed and row.get(f"videos/{key}/file_index") is None:
            return 0
        path = self.video_path(episode, key)
        if not path.exists():
            return 0
        count, fps = _measure(path)
        if self.packed:  # The next episode follows in the same file.
            start, end = (row[f"videos/{key}/{side}_timestamp"] for side in ("from", "to"))
            return min(count, round(end * self.fps)) - round(start * self.fps)
        if abs(fps - self.fps) > 0.05 * self.fps:
            raise UserError(f"{path} has {fps:g} frames per second, info.json says {self.fps:g}")
        return count

    def jpegs(self, episode: int, camera: str, steps: np.ndarray, seconds: np.ndarray,
              size: int) -> list[bytes]:
        """Images of an episode as JPEGs of size x size pixels.

        Args:
          episode: its number.
          camera: one of `cameras`.
          steps: int[n], ascending rows.
          seconds: float[n], the time of these rows in the episode.
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
        start = self.episodes[episode][f"videos/{key}/from_timestamp"]
        # The middle of a frame, because times are rounded.
        return video.jpegs_at(path, start + seconds + 0.5 / self.fps, size)

    def data_path(self, episode: int) -> Path:
        """The parquet file."""
        return self._path("data_path", episode, "data")

    def video_path(self, episode: int, key: str) -> Path:
        """The video file of a feature."""
        return self._path("video_path", episode, f"videos/{key}", video_key=key)

    def _path(self, template: str, episode: int, group: str, **names) -> Path:
        row = self.episodes[episode]
        return self.root / self.info[template].format(
            episode_index=episode, episode_chunk=episode // self.info.get("chunks_size", 1000),
            chunk_index=row.get(f"{group}/chunk_index"), file_index=row.get(f"{group}/file_index"),
            **names)


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
        raise UserError(f"{path}: {error}") from error


def _json_lines(path: Path) -> list[dict]:
    try:
        return [json.loads(line) for line in path.read_bytes().splitlines() if line.strip()]
    except ValueError as error:
        raise UserError(f"{path} is not JSON lines: {error}") from error
