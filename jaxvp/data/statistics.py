"""Statistics of actions and states, by robot, from the columns of the episodes."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import rich.markup
import rich.progress

from jaxvp.data.normalize import Normalizer, StatsStream
from jaxvp.data.rlds import BadRecord, Episodes, cached
from jaxvp.errors import UserError

# Quantiles are of at most this many steps of a robot, drawn from all.
MAX_STEPS = 2_000_000


def of_sources(mode: str, sources: Sequence[Episodes]) -> dict[str, Normalizer]:
    """Robot to normalizer of a mode, from the action and state columns of the episodes.

    No image is decoded. The result is stored in the folder of the first dataset, under a hash of
    the content of all datasets. Steps count once, whatever the weights are.

    Raises:
      UserError: a robot has other dimensions in another dataset.
    """
    def make(folder: Path):
        (folder / "statistics.json").write_text(json.dumps(compute(sources)))

    name = f"statistics-{digest(sorted(sources, key=lambda s: digest([s])))}-v3"
    folder = cached(sources[0].folder, name, make)
    return {
        robot: Normalizer.from_dict(columns | {"mode": mode})
        for robot, columns in json.loads((folder / "statistics.json").read_text()).items()
    }


def digest(sources: Sequence[Episodes]) -> str:
    """16 hexadecimal digits of the content of these sources, in this order."""
    digest = hashlib.sha256()
    for episodes in sources:
        part = episodes.digest.encode() + episodes.rows["number"].tobytes()
        if (hidden := episodes.rows["has_action"] & ~episodes.has_action).any():
            part += hidden.tobytes()
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]


def compute(sources: Sequence[Episodes]) -> dict[str, dict]:
    """{robot: {"action": statistics or None, "state": the same}}, as JSON values."""
    result = {}
    for robot in sorted({robot for episodes in sources for robot in episodes.robots()}):
        records = [(e, int(record)) for e in sources for record in e.records_of(robot)]
        streams: dict[str, StatsStream] = {}
        title = f"Statistics of {rich.markup.escape(robot)}, once"
        for episodes, record in rich.progress.track(records, title, disable=len(records) < 1000):
            try:
                steps = episodes.columns(record)
                actions = steps.action if episodes.has_action[record] else None
                columns = ("action", actions), ("state", steps.state)
            except BadRecord:  # Training counts it when it reads it.
                continue
            keys = _keys(episodes, record)
            for column, values in columns:
                if values is None:
                    continue
                found = episodes.names[column], episodes.units[column]
                stream = streams.setdefault(column, StatsStream(*found, MAX_STEPS))
                if (stream.names, stream.units) != found:
                    raise UserError(
                        f"Robot {robot!r} has {column} {stream.names, stream.units} in one dataset "
                        f"and {found} in {episodes.folder}: give them different robot names."
                    )
                stream.add(values, keys)
        result[robot] = {
            column: dataclasses.asdict(streams[column].result()) if column in streams else None
            for column in ("action", "state")
        }
    return result


def _keys(episodes: Episodes, record: int) -> np.ndarray:
    """uint64[L], a random number of each step of a record: always the same for the same step of an
    episode, whatever record and file it is in."""
    name = f"{episodes.text('dataset', record)}/{episodes.text('episode_id', record)}"
    bits = np.random.PCG64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]))
    bits.advance(int(episodes.offsets[record]))
    return bits.random_raw(int(episodes.lengths[record]))


def known(found: Mapping[str, Normalizer], before: Mapping[str, Normalizer]
          ) -> tuple[dict[str, Normalizer], list[str]]:
    """The normalizers of the robots in the data: those that parameters were trained with go with
    the parameters, other robots' statistics come from the data.

    Args:
      found: robot to normalizer, of the data.
      before: robot to normalizer, of the checkpoint.

    Returns:
      Robot to normalizer, for the robots in `found`; and a note for the user for each column whose
      statistics in the data differ from those that are used.

    Raises:
      UserError: a robot has other dimensions than before, or is normalised in another way.
    """
    result, notes = {}, []
    for robot, new in found.items():
        old = before.get(robot)
        if old is None:
            result[robot] = new
            continue
        if old.mode != new.mode:
            raise UserError(f"data.normalization is {new.mode!r}; the checkpoint knows {robot!r} "
                            f"by {old.mode!r}.")
        columns = {}
        for column in ("action", "state"):
            was, now = getattr(old, column), getattr(new, column)
            columns[column] = was or now
            if was and now and (was.names, was.units) != (now.names, now.units):
                raise UserError(f"{column} of {robot!r} has the dimensions {now.names} in "
                                f"{now.units}; the checkpoint knows it with {was.names} in "
                                f"{was.units}. Give the robot another name.")
            if was and now and was != now:
                notes.append(f"{column} of {robot!r} is normalised as in the checkpoint, by its "
                             f"{was.count} steps, not by the {now.count} of this data.")
        result[robot] = Normalizer(**columns, mode=old.mode)
    return result, notes
