"""TFRecord files and the episodes in them, read without TensorFlow.

A record is `uint64 length, uint32 checksum of it, data, uint32 checksum of the data`, little-endian
(tensorflow/core/lib/io/record_writer.h). TFDS stores an episode as one tf.train.Example, whose keys
are the paths of features.json: `steps/action` is a flat list of L * dimensions numbers,
`steps/observation/image` one of L encoded images.
"""

import dataclasses
import functools
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from google.protobuf.message import DecodeError
from tensorflow_datasets.core import naming
from tensorflow_datasets.proto import tf_example_pb2

from data_builders import json_file
from jaxvp.errors import UserError

_HEADER = struct.Struct("<QI")
_CHECKSUM = struct.Struct("<I")


class Spec(NamedTuple):
    """What features.json says of a tensor; images and texts are scalars of dtype "bytes"."""

    shape: tuple[int, ...]
    dtype: str
    encoding: str


def checksum(data: bytes) -> int:
    """The masked crc32c of a TFRecord."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@functools.lru_cache(maxsize=4)  # Records are read in order, so one pass over a file's headers.
def _offsets(path: str) -> tuple[list[int], str]:
    """Where the records of a file begin, and what ends them if it is not the end of the file."""
    offsets, offset, size = [], 0, os.path.getsize(path)
    with open(path, "rb") as file:
        while offset < size:
            file.seek(offset)
            header = file.read(_HEADER.size)
            if len(header) < _HEADER.size:
                return offsets, f"the file ends in a header at byte {offset}"
            length, expected = _HEADER.unpack(header)
            if checksum(header[:8]) != expected:
                return offsets, f"the length at byte {offset} is damaged"
            end = offset + _HEADER.size + length + _CHECKSUM.size
            if end > size:
                return offsets, f"the record at byte {offset} goes on after the end of the file"
            offsets.append(offset)
            offset = end
    return offsets, "the file ends"


def read(path: str | os.PathLike, number: int) -> bytes:
    """A record of a file, by its number from 0.

    Raises:
      UserError: there is no such file.
      UserError: the record is damaged, or the file is damaged or ends before it.
    """
    offsets, end = _offsets(os.fspath(path))
    if number >= len(offsets):
        raise UserError(f"{path} has no record {number}: after {len(offsets)} records {end}.")
    with open(path, "rb") as file:
        file.seek(offsets[number])
        length, _ = _HEADER.unpack(file.read(_HEADER.size))
        data = file.read(length)
        if checksum(data) != _CHECKSUM.unpack(file.read(_CHECKSUM.size))[0]:
            raise UserError(f"{path}: record {number} at byte {offsets[number]} is damaged, its "
                            "checksum differs.")
    return data


@dataclasses.dataclass(frozen=True)
class Download:
    """A version folder of TFDS.

    Attributes:
      name, version: in dataset_info.json.
      files: name to (split, number of records).
      specs: key in the records to what features.json says of it.
      prepared: a copy that Octo's prepare_open_x.sh has made, with smaller images, in which red and
        blue are put right.
    """

    name: str
    version: str
    files: Mapping[str, tuple[str, int]]
    specs: Mapping[str, Spec]
    prepared: bool


@functools.cache
def download(folder: Path) -> Download:
    """Reads dataset_info.json and features.json.

    Raises:
      UserError: one of them is not there.
      UserError: the files are not TFRecord, or there are none.
    """
    info = json_file.read(folder / "dataset_info.json")
    try:
        files = _files(info, folder)
        prepared = info.get("moduleName", "").startswith("rlds_dataset_mod")
        name, version = info["name"], info["version"]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}/dataset_info.json is not as TFDS writes it: {error}") from error
    features = json_file.read(folder / "features.json")
    try:
        specs = dict(_specs(features))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}/features.json is not as TFDS writes it: {error}") from error
    return Download(name, version, files, specs, prepared)


def _files(info: Mapping, folder: Path) -> dict[str, tuple[str, int]]:
    """Name of every file to (split, number of records)."""
    if info.get("fileFormat", "tfrecord") != "tfrecord":
        raise UserError(f"{folder} holds {info['fileFormat']} files, not tfrecord.")
    files = {}
    for split in info.get("splits", ()):
        counts = [int(count) for count in split.get("shardLengths", ())]
        template = naming.ShardedFileTemplate(
            data_dir=folder, dataset_name=info["name"], split=split["name"],
            filetype_suffix="tfrecord", template=split.get("filepathTemplate") or None)
        for shard, count in enumerate(counts):
            path = template.sharded_filepath(shard_index=shard, num_shards=len(counts))
            files[path.name] = split["name"], count
    if not files:
        raise UserError(f"{folder}/dataset_info.json lists no files.")
    return files


def _specs(feature: Mapping, path: str = "") -> Iterator[tuple[str, Spec]]:
    """(key in the records, spec) of every tensor in features.json."""
    if "featuresDict" in feature:
        for name, inner in feature["featuresDict"]["features"].items():
            yield from _specs(inner, f"{path}/{name}" if path else name)
    elif "sequence" in feature:
        yield from _specs(feature["sequence"]["feature"], path)
    else:
        tensor = feature.get("tensor", {"dtype": "bytes"})
        shape = tuple(int(size) for size in tensor.get("shape", {}).get("dimensions", ()))
        yield path, Spec(shape, tensor["dtype"], tensor.get("encoding", "none").lower())


class Example:
    """One episode. Nothing is decoded before it is asked for."""

    def __init__(self, data: bytes, specs: Mapping[str, Spec]):
        """Parses a record.

        Raises:
          UserError: it is not a tf.train.Example.
        """
        try:
            self._features = tf_example_pb2.Example.FromString(data).features.feature
        except DecodeError as error:
            raise UserError(f"the record is not a tf.train.Example: {error}") from error
        self._specs = specs

    def __contains__(self, key: str) -> bool:
        return key in self._features

    def values(self, key: str) -> Sequence[Any]:
        """The list under a key as it is stored: int, float or bytes.

        Raises:
          UserError: there is none.
        """
        if key not in self._features:
            raise UserError(f"the episode has no {key}")
        feature = self._features[key]
        return getattr(feature, feature.WhichOneof("kind") or "bytes_list").value

    def array(self, key: str) -> np.ndarray:
        """number[L, *shape], a tensor of every step.

        Raises:
          UserError: there is none, or it does not fit features.json.
        """
        values, (shape, dtype, encoding) = self.values(key), self._specs[key]
        try:
            if encoding == "zlib":
                values = [zlib.decompress(value) for value in values]
            if encoding != "none":
                values = np.frombuffer(b"".join(values), dtype)
            return np.array(values).reshape(-1, *shape)
        except (ValueError, TypeError, zlib.error) as error:
            raise UserError(f"{key} does not fit {shape} {dtype}, encoding {encoding}, of "
                            f"features.json: {error}") from error
