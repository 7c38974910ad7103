"""Listing folders that came from elsewhere: one rule for all readers of data and weights.

Links to folders are followed, as users gather datasets with `ln -s`. Names that begin with a dot
are never data: `._x` and `.DS_Store` of a Mac, `.cache` of a download.
"""

import fnmatch
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxvp.errors import UserError

NEVER = ("lost+found",)  # At the root of a disk; nobody may read it.


def find(folder: str | os.PathLike, pattern: str,
         enter: Callable[[Path], bool] = lambda folder: True) -> list[Path]:
    """The paths below `folder` that fit `pattern`, sorted; none where there is no folder.

    A folder that links reach in several ways, or in a circle, counts once: under the shortest of
    its paths, of equally short ones under that without links. Links to files count as files.

    Args:
      folder: where to look; its path is the beginning of the results.
      pattern: as of `Path.glob`; `**` stands for any number of folders, not for files.
      enter: whether `**` goes on into a folder.

    Raises:
      OSError: a folder cannot be read.
      UserError: a link leads nowhere, where a folder is looked for.
    """
    if not os.path.isdir(folder):
        return []
    *parts, last = pattern.split("/")
    places = {os.path.realpath(folder): Path(folder)}
    for part in parts:
        if part == "**":
            level = places
            while level:
                inside = {real: path for real, path in level.items() if enter(path)}
                level = {real: path for real, path in _children(inside, "*", True).items()
                         if real not in places}
                places = places | level
        else:
            places = _children(places, part, True)
    return sorted(_children(places, last, False).values())


def some(folder: str | os.PathLike) -> str:
    """The names of up to five things in a folder, which may hold a million; for messages."""
    return ", ".join(sorted(entry.name for entry in itertools.islice(_entries(folder), 5))
                     ) or "nothing"


def _entries(folder: str | os.PathLike) -> Iterator[os.DirEntry]:
    with os.scandir(folder) as entries:
        yield from (entry for entry in entries
                    if not entry.name.startswith(".") and entry.name not in NEVER)


def _children(places: dict[str, Path], pattern: str, folders: bool) -> dict[str, Path]:
    """What fits in `places`: {real path: path}, of a file that of its folder and its name.

    In a cache of Hugging Face links of several names lead to one file: they are different files.
    """
    found, links = {}, {}
    for real, path in places.items():
        for entry in sorted(_entries(real), key=lambda entry: entry.name):
            if not fnmatch.fnmatchcase(entry.name, pattern):
                continue
            inside = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
            if folders and entry.is_symlink() and not os.path.exists(entry.path):
                raise UserError(f"{path / entry.name} is a link to {os.readlink(entry.path)}, "
                                "which is not there: mount it, or remove the link.")
            if inside and entry.is_symlink():
                links.setdefault(os.path.realpath(entry.path), path / entry.name)
            elif inside or not folders:
                found[entry.path] = path / entry.name
    return links | found
