"""What a run would meet late, or never notice, looked at when the data is opened: its texts, robots
and lengths."""

import json
import operator
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from jaxvp.data import rates
from jaxvp.data.clips import ClipSpec
from jaxvp.data.rlds import Episodes, cached
from jaxvp.data.statistics import digest
from jaxvp.data.text import ByteTokenizer
from jaxvp.data.text_embeddings import TextEmbeddings, texts_of
from jaxvp.errors import UserError

# Options of builders that an evaluation must share with the making of the data.
PROTOCOL = ("image_size", "rotation")
RATE = "steps per second"


def distinct_texts(episodes: Episodes) -> list[str]:
    """The unified texts of these records, sorted; read once, and kept beside the data."""
    def make(folder: Path):
        (folder / "texts.json").write_text(json.dumps(sorted(texts_of(episodes))))

    name = f"texts-{episodes.split}-{digest([episodes])}-v1"
    return json.loads((cached(episodes.folder, name, make) / "texts.json").read_text())


def check_texts(episodes: Episodes, length: int, embeddings: TextEmbeddings | None):
    """Raises UserError when a text of these records is longer than `length` bytes, or than `length`
    tokens of its embedding, or has no embedding where there are any; of several the longest."""
    check = embeddings.check if embeddings else ByteTokenizer.check
    for text in sorted(distinct_texts(episodes), key=lambda text: -len(text.encode())):
        try:
            check(text, length)
        except UserError as error:
            raise UserError(f"{episodes.folder} {episodes.split}: {error}") from None


def check_robots(sources: Iterable[Episodes]):
    """Raises UserError when records with actions of one robot differ in what its policy has only
    one of: steps per second, and the options in PROTOCOL that their builder was given."""
    known = {}
    for episodes in sources:
        for robot in episodes.robots():
            records = episodes.records_of(robot)
            records = records[episodes.has_action[records]]
            _, first = np.unique(episodes.rows["texts"]["options"][records], return_index=True)
            options = [json.loads(episodes.text("options", record)) for record in records[first]]
            found = [(RATE, float(rate)) for rate in np.unique(episodes.fps[records])]
            found += [(f"--{name}", made.get(name)) for name in PROTOCOL for made in options]
            for name, value in found:
                other, folder = known.setdefault((robot, name), (value, episodes.folder))
                same = rates.same if name == RATE else operator.eq
                if not same(other, value):
                    raise UserError(
                        f"Robot {robot!r} has {name} {other} in {folder} and {value} in "
                        f"{episodes.folder}, and a policy can have one: build the data alike, or "
                        "give the robots different names.")


def check_lengths(spec: ClipSpec, sources: Iterable[Episodes]) -> list[str]:
    """Looks whether any record is as long as a clip, and any with actions as a chunk.

    Returns:
      Notes: no clip has all of its frames; a robot has no whole chunk, though others have.

    Raises:
      UserError: no chunk is whole, so that a policy would do what it was never trained to.
    """
    whole, seconds, steps = False, 0.0, {}
    for episodes in sources:
        fps = episodes.fps.astype(np.float64)
        last = np.floor((spec.num_frames - 1) * fps / spec.fps + 0.5)
        whole |= bool((last < episodes.lengths).any())
        seconds = max(seconds, float((episodes.lengths / fps).max()))
        for robot in episodes.robots():
            records = episodes.records_of(robot)
            if len(records := records[episodes.has_action[records]]):
                longest = int(episodes.lengths[records].max())
                steps[robot] = max(steps.get(robot, 0), longest)
    if steps and (longest := max(steps.values())) < spec.chunk:
        raise UserError(f"data.chunk is {spec.chunk}, but the longest record with actions has "
                        f"{longest} steps: no chunk would be whole.")
    notes = [f"Robot {robot!r} has no record of data.chunk = {spec.chunk} steps, but at most "
             f"{longest}: the last actions of its chunks are not trained."
             for robot, longest in steps.items() if longest < spec.chunk]
    if not whole:
        notes.append(f"The longest record has {seconds:.3g} seconds, so no clip has all of its "
                     f"{spec.num_frames} frames at {spec.fps:g} per second.")
    return notes
