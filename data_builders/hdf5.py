"""Episodes in HDF5 files: which there are, their data sets, encoded frames."""

import contextlib
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import h5py
import numpy as np

from data_builders import images
from jaxvp.errors import UserError
from jaxvp.files import find, some


def files(raw: Path, *patterns: str) -> list[str]:
    """The files below `raw` that fit one of the patterns, relative to it, sorted.

    Raises:
      UserError: there are none; the message says what is there.
    """
    found = {path.relative_to(raw).as_posix() for pattern in patterns
             for path in find(raw, pattern)}
    if not found:
        raise UserError(
            f"--raw={raw} has no {' or '.join(patterns)}, found {some(raw)}.")
    return sorted(found)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file, to read.

    Raises:
      OSError: it is not there, or is damaged, of which h5py also makes a RuntimeError.
    """
    try:
        with h5py.File(path) as file:
            yield file
    except RuntimeError as error:
        raise OSError(f"{path} is damaged: {error}") from error


def column(group: h5py.Group, key: str) -> np.ndarray:
    """The data set `key`, whole.

    Raises:
      UserError: it is not there; the message says what is.
    """
    if not isinstance(group.get(key), h5py.Dataset):
        parent = group.get(posixpath.dirname(key), group)
        found = ", ".join(map(str, parent)) if isinstance(parent, h5py.Group) else "a data set"
        raise UserError(f"{group.file.filename}: {posixpath.join(group.name, key)} is missing, "
                        f"found {found or 'nothing'}")
    return group[key][()]


def views(file: h5py.File, keys: Mapping[str, str]) -> dict[str, h5py.Dataset]:
    """Camera to its frames, of those cameras whose key is there and has frames."""
    found = ((camera, file.get(key)) for camera, key in keys.items())
    return {camera: frames for camera, frames in found
            if isinstance(frames, h5py.Dataset) and len(frames)}


def recoded(frames: h5py.Dataset, steps: Iterable[int], size: int, swapped: bool = False,
            recode: Callable[..., bytes] = images.recode) -> list[bytes]:
    """Encoded frames as JPEGs of size x size pixels, read one at a time.

    Args:
      frames: one file a row: fixed-size strings, arrays of bytes padded with zeros, or objects.
      steps: rows, ascending.
      size, swapped: see `images.recode`.
      recode: another function for that.

    Raises:
      UserError: a frame is not a whole image; the message names file, data set and row.
    """
    encoded = []
    for step in steps:
        try:
            encoded.append(recode(np.asarray(frames[step]).tobytes(), size, swapped))
        except ValueError as error:
            place = f"{frames.file.filename}: {frames.name}[{step}]"
            raise UserError(f"{place}: {error}") from error
    return encoded
