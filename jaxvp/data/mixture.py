"""Weighted mixtures of datasets as batches of clips, the same order on any number of processes.

The order of the examples is a function of the seed alone: every source is shuffled by a
permutation, anew in every epoch, and the sources are interleaved by weight. Batch n is the next
`batch_size` examples, process p takes the p-th part of it, and the state of the iterator is the
number of batches. Grain makes this order, of numbers of clips; the clips of a batch are then read
by several threads, straight into its arrays.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import grain
import numpy as np
import rich.markup
import rich.progress

from jaxvp.config import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Range, build
from jaxvp.data import checks, normalize, rates, rlds
from jaxvp.data.clips import BatchReader, Clips, ClipSpec
from jaxvp.data.normalize import Normalizer, StatsStream
from jaxvp.data.observation import LAYOUTS
from jaxvp.data.rlds import BadRecord, Episodes, cached
from jaxvp.data.text_embeddings import TextEmbeddings
from jaxvp.errors import UserError

# Quantiles are of at most this many steps of a robot, drawn from all.
MAX_STATISTICS_STEPS = 2_000_000
# Examples of a run; with sys.maxsize, Grain's own infinity, the length of batches of one overflows.
ENDLESS = 1 << 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One dataset of the mixture.

    Attributes:
      path: a TFDS version folder, or a folder that holds exactly one.
      weight: its share of the examples, relative to the other sources, in steps of 1 % of the
        smallest; None: the number of its clips.
      split: what is trained on; validation_split: what is held out, "" for nothing.
      validation_fraction: share of the episodes of `split` that is held out when there is no
        validation_split; which ones, their ids decide.
      cameras: view to the dataset's name of it, None for a view it lacks; default: same names.
      robots: the only ones whose episodes are kept; (): all.
      min_views: views of the clip that an episode must have.
      min_seconds: shorter episodes are left out.
    """

    path: str
    weight: PositiveFloat | None = 1.0
    split: str = "train"
    validation_split: str = "val"
    validation_fraction: Annotated[float, Range(ge=0, lt=1)] = 0.0
    cameras: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    robots: tuple[str, ...] = ()
    min_views: NonNegativeInt = 0
    min_seconds: NonNegativeFloat = 0.0

    def __post_init__(self):
        if self.validation_fraction and self.validation_split:
            raise UserError(f"{self.path} has a validation_split and a validation_fraction: set "
                            "the split to \"\" or the fraction to 0.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What clips are made of and from.

    Attributes:
      sources: the datasets, `SourceConfig`s or their fields.
      num_frames: T; fps: frames per second of a clip's video.
      chunk: P, number of actions, at the rate of the dataset.
      image_size: H = W, or (H, W), of every view.
      source_size: the same as they are loaded, to be resized on the device; 0: image_size.
      crop: side of the part that is shown of each view, in shares: in training one that is drawn
        anew for every clip, elsewhere (validation, samples, bundles) the middle; 1.0: all of it.
      latents: (t, h, w, c) when the sources hold latents, see jaxvp.data.precompute.
      cameras: the V views; default: those of the layout.
      layout: a name in `observation.LAYOUTS`.
      text_length: M, the longest text in bytes, or in tokens of the embeddings (Wan: 512).
      text_embeddings: a folder that `jaxvp.data.text_embeddings` made; "": text is bytes.
      text_width: D of the embeddings.
      normalization: "min_max" or "quantile".
      action_size, state_size: A and S; 0: the largest of the sources. Set them when the data lacks
        a column that a later stage trains.
      num_threads: threads that read and decode clips; 0: the caller's, and nothing is made ahead.
      prefetch: batches made ahead.
      cache_bytes: memory for records of compressed files, all sources together.
      max_bad_records: records that cannot be read which a source may have.
    """

    sources: Sequence[SourceConfig | Mapping]
    num_frames: PositiveInt
    fps: PositiveFloat
    chunk: PositiveInt
    image_size: PositiveInt | tuple[PositiveInt, PositiveInt]
    source_size: NonNegativeInt | tuple[PositiveInt, PositiveInt] = 0
    crop: Annotated[float, Range(gt=0, le=1)] = 1.0
    latents: tuple[PositiveInt, ...] = ()
    cameras: tuple[str, ...] = ()
    layout: Literal[*LAYOUTS] = "bimanual"
    text_length: PositiveInt = 256
    text_embeddings: str = ""
    text_width: PositiveInt = 4096
    normalization: Literal[*normalize.MODES] = "min_max"
    action_size: NonNegativeInt = 0
    state_size: NonNegativeInt = 0
    num_threads: NonNegativeInt = 2
    prefetch: NonNegativeInt = 2
    cache_bytes: NonNegativeInt = 1 << 29
    max_bad_records: NonNegativeInt = 10

    def __post_init__(self):
        if not self.sources:
            raise UserError("data.sources is empty: name at least one dataset.")
        if self.crop < 1 and self.latents:
            raise UserError(f"data.crop is {self.crop}, but data.latents are of whole pictures, of "
                            "which no part can be shown: set data.crop=1.0 or data.latents=().")
        sources = list(self.sources)
        for i, source in enumerate(sources):
            if not isinstance(source, SourceConfig):
                sources[i] = build(SourceConfig, source, f"data.sources[{i}]")
        if 0 < sum(source.weight is None for source in sources) < len(sources):
            raise UserError("data.sources has weights of None, the number of clips, and others: "
                            "give all sources one kind.")
        object.__setattr__(self, "sources", tuple(sources))
        object.__setattr__(self, "cameras", tuple(self.cameras) or LAYOUTS[self.layout].cameras)


class BatchIterator:
    """Batches of clips of one process, without end; dicts of NumPy arrays with B = its share.

    Attributes:
      normalizers: robot to the normalizer that the clips went through.
      spec: the shapes of a clip.
      notes: what a user should know of the data.
    """

    def __init__(self, batches: grain.MapDataset, sources: Sequence[Clips], batch_size: int, read,
                 notes: Sequence[str] = ()):
        self._batches, self._sources, self._batch_size = batches, sources, batch_size
        self._read, self._iterator, self.notes = read, None, notes
        self.spec, self.normalizers = sources[0].spec, sources[0].normalizers
        self._digest = _digest([source.episodes for source in sources])
        self._seek(0)

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._iterator)
        self._step += 1
        return batch

    def get_state(self) -> dict[str, int | str]:
        """Where the iterator is, and in which data, as JSON values; the same on every process."""
        return {"step": self._step, "batch_size": self._batch_size, "digest": self._digest}

    def set_state(self, state: Mapping[str, int | str]):
        """Continues at a state, which may come from another number of processes.

        Raises:
          UserError: the data is not what it was, or the state is not at a multiple of this
            iterator's batch size.
        """
        if state.get("digest") != self._digest:
            raise UserError(
                f"The datasets ({', '.join(str(s.episodes.folder) for s in self._sources)}) are "
                "not those of the checkpoint: their records, or those that the sources keep, or "
                "the sources have changed, so its place in the order of the clips means nothing. "
                "Restore the data, or start a new run on it, with config.init_from.")
        examples = state["step"] * state["batch_size"]
        if examples % self._batch_size:
            raise UserError(
                f"The data position, {examples} examples, is not a multiple of batch_size "
                f"{self._batch_size}: continue with batch_size {state['batch_size']}."
            )
        self._seek(examples // self._batch_size)

    @property
    def bad_records(self) -> int:
        """Records that this process could not read so far."""
        return sum(len(source.bad_records) for source in self._sources)

    def embodiments(self) -> dict[str, dict]:
        """Robot to what a policy for it must know of its data, as JSON values.

        camera_text; fps of control; cameras, the dataset's name of every view, None for one that it
        lacks; options, which the builder was given. Of the robot's first record.
        """
        found = {}
        for clips in self._sources:
            for robot in clips.episodes.robots():
                record = int(clips.episodes.records_of(robot)[0])
                found.setdefault(robot, {
                    "camera_text": clips.episodes.text("camera_text", record),
                    "fps": float(clips.episodes.fps[record]),
                    "cameras": list(clips.cameras),
                    "options": json.loads(clips.episodes.text("options", record)),
                })
        return found

    def _seek(self, step: int):
        if self._iterator is not None:
            self._iterator.close()  # Or it goes on to make the batches that it has begun.
        self._step = step
        self._iterator = iter(self._batches[step:].to_iter_dataset(self._read))


def train_iterator(
    config: DataConfig,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    normalizers: Mapping[str, Normalizer] | None = None,
) -> BatchIterator:
    """Training batches.

    Args:
      config: the data.
      batch_size: examples per step of all processes together.
      seed: of the order.
      process_index, process_count: which part of every batch this process makes.
      normalizers: robot to normalizer, those of a checkpoint; of the other robots: `statistics`.

    Raises:
      UserError: a dataset is absent, damaged or does not fit the config, or a text is too long, a
        robot's records differ, no record is as long as a clip or a chunk, or a batch is larger
        than the data.
    """
    opened = dict(enumerate(open_source(config, source) for source in config.sources))
    checks.check_robots(opened.values())
    normalizers, notes = _known(_statistics(config, list(opened.values())), normalizers or {})
    clips = _clips(config, opened, normalizers)
    notes += checks.check_lengths(clip_spec(config, normalizers), opened.values())
    if (total := sum(map(len, clips.values()))) < batch_size:
        raise UserError(f"batch_size is {batch_size}, but the data has only {total} clips.")
    # A thread of Grain waits for a batch; the threads that make it are `BatchReader`'s.
    ahead = config.prefetch if config.num_threads else 0
    batches = _batches(config, clips, batch_size, seed, process_index, process_count, ahead + 2)
    read = grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)
    return BatchIterator(batches, list(clips.values()), batch_size, read, notes)


def _known(found: Mapping[str, Normalizer], before: Mapping[str, Normalizer]
           ) -> tuple[dict[str, Normalizer], list[str]]:
    """The normalizers of the robots in the data, from `before` where it has them: what parameters
    were trained with goes with them. And notes on those that the data would have changed.

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
            if was and now and (was.names, was.units) != (now.names, now.units):
                raise UserError(f"{column} of {robot!r} has the dimensions {now.names} in "
                                f"{now.units}; the checkpoint knows it with {was.names} in "
                                f"{was.units}. Give the robot another name.")
            columns[column] = was or now
            if was and now and was != now:
                notes.append(f"{column} of {robot!r} is normalised as in the checkpoint, by its "
                             f"{was.count} steps, not by the {now.count} of this data.")
        result[robot] = Normalizer(**columns, mode=old.mode)
    return result, notes


def validation_batches(
    config: DataConfig,
    batch_size: int,
    num_batches: int,
    process_index: int = 0,
    process_count: int = 1,
    normalizers: Mapping[str, Normalizer] | None = None,
) -> grain.MapDataset:
    """`num_batches` held-out batches, always the same: index it or iterate over it.

    Arguments and errors as for `train_iterator`, and those of `held_out`.
    """
    normalizers = statistics(config) if normalizers is None else normalizers
    clips = _clips(config, held_out(config, normalizers)[0], normalizers)
    batches = _batches(config, clips, batch_size, 0, process_index, process_count)
    return batches[:num_batches]


def held_out(config: DataConfig, robots: Collection[str]) -> tuple[dict[int, Episodes], list[str]]:
    """The held-out episodes of `robots`, those that are trained, by the number of their source; and
    a note for every source that has others.

    Raises:
      UserError: a source has no such split, or nothing is held out.
    """
    opened, notes = {}, []
    for number, source in enumerate(config.sources):
        if not (source.validation_split or source.validation_fraction):
            continue
        splits = rlds.splits(source.path)
        if source.validation_split and source.validation_split not in splits:
            raise UserError(
                f"{source.path} has no split {source.validation_split!r} to validate on, but "
                f"{list(splits)}: set its validation_split to one, or to \"\" (with a "
                "validation_fraction some of its episodes are held out), or set "
                "config.validate_every and config.sample_every to 0.")
        episodes = open_source(config, source, held_out=True)
        if unknown := sorted(set(episodes.robots()) - set(robots)):
            known = episodes.where("robot", lambda robot: robot in robots)
            notes.append(f"{episodes.folder} {episodes.split}: {(~known).sum()} of {len(known)} "
                         f"records are of {unknown}, which nothing is trained on, and are left out "
                         "of validation.")
            if not known.any():
                continue
            episodes = episodes.only(known)
        opened[number] = episodes
    if not opened:
        reasons = notes or ["No source has a validation_split or a validation_fraction."]
        raise UserError(f"There is nothing to validate on. {' '.join(reasons)}")
    return opened, notes


def open_source(config: DataConfig, source: SourceConfig, held_out: bool = False) -> Episodes:
    """The episodes of a source that it keeps for training, or that are held out of it.

    Raises:
      UserError: the dataset is absent or damaged, has no such robot, or no
        episode is left.
    """
    split = source.validation_split if held_out and source.validation_split else source.split
    episodes = Episodes(source.path, split, config.cache_bytes // len(config.sources))
    cameras = [source.cameras.get(camera, camera) for camera in config.cameras]
    unknown = set(source.robots) - set(episodes.robots())
    if unknown and not held_out:
        raise UserError(f"{episodes.folder} has no robot {min(unknown)!r}, but "
                        f"{list(episodes.robots())}.")
    kept = {
        "robots": episodes.where("robot", lambda robot: robot in (source.robots or (robot,))),
        "min_views": source.min_views <= sum(
            episodes.where("camera_layout", lambda names, camera=camera: camera in names.split(","))
            for camera in cameras),
        "min_seconds": rates.at_least(episodes.seconds(), source.min_seconds),
    }
    if source.validation_fraction:
        drawn = episodes.where("episode_id", lambda name: _draw(name) < source.validation_fraction)
        if not np.logical_and.reduce([drawn, *kept.values()]).any():
            raise UserError(f"The validation_fraction {source.validation_fraction} of "
                            f"{episodes.folder}, {len(episodes)} records, holds no episode out: "
                            "raise it.")
        kept["validation_fraction"] = drawn if held_out else ~drawn
    mask = np.logical_and.reduce(list(kept.values()))
    if not mask.any():
        counts = ", ".join(f"{name} keeps {passed.sum()}" for name, passed in kept.items())
        raise UserError(f"No episode of {episodes.folder} {split} is left: of {len(episodes)} "
                        f"records {counts}.")
    return episodes.only(mask)


def _draw(name: str) -> float:
    """A number from 0 to 1, always the same for a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64


def statistics(config: DataConfig) -> dict[str, Normalizer]:
    """Robot to normalizer, from the action and state columns of the episodes that are trained on.

    No image is decoded. The result is stored beside the first dataset under a hash of the content
    of all datasets. Steps count once, whatever the weights are.

    Raises:
      UserError: as `open_source`, or a robot has other dimensions in another
        dataset.
    """
    return _statistics(config, [open_source(config, source) for source in config.sources])


def _statistics(config: DataConfig, sources: Sequence[Episodes]) -> dict[str, Normalizer]:
    def make(folder: Path):
        (folder / "statistics.json").write_text(json.dumps(_compute_statistics(sources)))

    name = f"statistics-{_digest(sorted(sources, key=lambda s: _digest([s])))}-v3"
    folder = cached(sources[0].folder, name, make)
    return {
        robot: Normalizer.from_dict(columns | {"mode": config.normalization})
        for robot, columns in json.loads((folder / "statistics.json").read_text()).items()
    }


def _digest(sources: Sequence[Episodes]) -> str:
    """16 hexadecimal digits of the content of these sources, in this order."""
    digest = hashlib.sha256()
    for episodes in sources:
        part = episodes.digest.encode() + episodes.rows["number"].tobytes()
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]


def _compute_statistics(sources: Sequence[Episodes]) -> dict[str, dict]:
    """{robot: {"action": statistics or None, "state": the same}}, as JSON values."""
    result = {}
    for robot in sorted({robot for episodes in sources for robot in episodes.robots()}):
        records = [(e, int(record)) for e in sources for record in e.records_of(robot)]
        streams: dict[str, StatsStream] = {}
        title = f"Statistics of {robot}, once"
        for episodes, record in rich.progress.track(
                records, rich.markup.escape(title), disable=len(records) < 1000):
            try:
                steps = episodes.columns(record)
                actions = steps.action if episodes.has_action[record] else None
                columns = ("action", actions), ("state", steps.state)
            except BadRecord:  # Training counts it when it meets it.
                continue
            keys = _keys(episodes, record)
            for column, values in columns:
                if values is None:
                    continue
                found = episodes.names[column], episodes.units[column]
                stream = streams.setdefault(column, StatsStream(*found, MAX_STATISTICS_STEPS))
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


def clip_spec(
    config: DataConfig, normalizers: Mapping[str, Normalizer] | None = None
) -> ClipSpec:
    """The shape of the clips; reads no data: A and S are the config's when there is no normalizer.

    Raises:
      UserError: the config's A or S is smaller than a robot's.
    """
    normalizers = normalizers or {}
    height, width = _sides(config.image_size)
    return ClipSpec(
        cameras=config.cameras,
        num_frames=config.num_frames,
        fps=config.fps,
        chunk=config.chunk,
        height=height,
        width=width,
        text_length=config.text_length,
        text_width=config.text_width if config.text_embeddings else 0,
        source_size=_sides(config.source_size) if config.source_size else (),
        latents=tuple(config.latents),
        action_size=_size(config.action_size, "action", normalizers),
        state_size=_size(config.state_size, "state", normalizers),
    )


def _clips(
    config: DataConfig, opened: Mapping[int, Episodes], normalizers: Mapping[str, Normalizer]
) -> dict[int, Clips]:
    """The clips of sources, by their numbers."""
    spec = clip_spec(config, normalizers)
    for episodes in opened.values():
        stored = episodes.stored_latents
        if bool(stored) != bool(config.latents):
            found = (f"latents, so data.latents must be {tuple(stored['latents'])}" if stored
                     else "images, so data.latents must be ()")
            raise UserError(f"{episodes.folder} holds {found}; it is {tuple(config.latents)}.")
        if stored and stored["layout"] != config.layout:
            raise UserError(f"{episodes.folder} holds latents of the layout {stored['layout']!r}, "
                            f"data.layout is {config.layout!r}.")
    embeddings = TextEmbeddings(config.text_embeddings) if config.text_embeddings else None
    clips = {
        number: Clips(
            episodes,
            spec,
            source=number,
            normalizers=normalizers,
            cameras=config.sources[number].cameras,
            embeddings=embeddings,
            max_bad_records=config.max_bad_records,
        )
        for number, episodes in opened.items()
    }
    for episodes in opened.values():
        checks.check_texts(episodes, spec.text_length, embeddings)
    return clips


def _sides(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _size(wanted: int, column: str, normalizers: Mapping[str, Normalizer]) -> int:
    """A or S: the largest of the robots, or `wanted`."""
    stats = [getattr(normalizer, column) for normalizer in normalizers.values()]
    largest = max((len(s.names) for s in stats if s is not None), default=0)
    if 0 < wanted < largest:
        raise UserError(f"data.{column}_size is {wanted}, but a robot has {largest} dimensions.")
    return wanted or largest


def _batches(
    config: DataConfig,
    clips: Mapping[int, Clips],
    batch_size: int,
    seed: int,
    process_index: int,
    process_count: int,
    kept: int = 0,
) -> grain.MapDataset:
    """Endless batches of one process, of batch_size / process_count examples each; `kept` as for
    `BatchReader`."""
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch_size {batch_size} must be a positive multiple of the {process_count} processes."
        )
    seeds = np.random.SeedSequence(seed).generate_state(len(clips))
    examples = [
        grain.MapDataset.range(len(source)).seed(int(source_seed)).shuffle().repeat().map(
            functools.partial(_address, number))
        for (number, source), source_seed in zip(clips.items(), seeds, strict=True)
    ]
    weights = [config.sources[number].weight for number in clips]
    if None in weights:
        weights = [len(source) for source in clips.values()]
    mixed = grain.MapDataset.mix(examples, weights)
    # Parts of one batch follow each other: part p of batch n is number n * process_count + p.
    parts = mixed[:ENDLESS].batch(batch_size // process_count, batch_fn=list)
    return parts[process_index::process_count].map(
        BatchReader(clips, config.num_threads, kept))


def _address(number: int, clip: int) -> tuple[int, int]:
    return number, clip
