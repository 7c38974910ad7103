"""Weighted mixtures of datasets as batches of clips, the same order on any number of processes.

The order of the examples is a function of the seed alone: every source is shuffled by a
permutation, anew in every epoch, and the sources are interleaved by weight. Batch n is the next
`batch_size` examples, process p takes the p-th part of it, and the state of the iterator is the
number of batches.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence

import grain
import numpy as np
import rich.progress

from jaxvp.config import build
from jaxvp.data import normalize
from jaxvp.data.clips import Clips, ClipSpec
from jaxvp.data.normalize import Normalizer, Stats
from jaxvp.data.observation import LAYOUTS
from jaxvp.data.rlds import Episodes, cached
from jaxvp.data.text_embeddings import TextEmbeddings

# Quantiles come from at most about this many steps of a robot, evenly spaced.
MAX_STATISTICS_STEPS = 2_000_000
# Examples of a run; with sys.maxsize, Grain's own infinity, the length of batches of one overflows.
ENDLESS = 1 << 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One dataset of the mixture.

    Attributes:
      path: a TFDS version folder, or a folder that holds exactly one.
      weight: its share of the examples, relative to the other sources, in steps of 1 %.
      split: what is trained on; validation_split: what is held out, "" for nothing.
      cameras: view to the dataset's name of it, None for a view it lacks; default: same names.
    """

    path: str
    weight: float = 1.0
    split: str = "train"
    validation_split: str = "val"
    cameras: Mapping[str, str | None] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if not self.weight > 0:
            raise ValueError(f"The weight of {self.path} must be positive, found {self.weight}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What clips are made of and from.

    Attributes:
      sources: the datasets, `SourceConfig`s or their fields.
      num_frames: T; fps: frames per second of a clip's video.
      chunk: P, number of actions, at the rate of the dataset.
      image_size: H = W, or (H, W), of every view.
      cameras: the V views; default: those of the layout.
      layout: a name in `observation.LAYOUTS`.
      text_length: M, the longest text in bytes, or in tokens of the embeddings (Wan: 512).
      text_embeddings: a folder that `jaxvp.data.text_embeddings` made; "": text is bytes.
      text_width: D of the embeddings.
      normalization: "min_max" or "quantile".
      action_size, state_size: A and S; 0: the largest of the sources. Set them when the data lacks
        a column that a later stage trains.
      num_threads: threads that make batches; 0: the caller's.
      prefetch: batches made ahead.
      cache_bytes: memory for parsed records, all sources together.
      max_bad_records: records with unreadable images that a source may have.
    """

    sources: Sequence[SourceConfig | Mapping]
    num_frames: int
    fps: float
    chunk: int
    image_size: int | tuple[int, int]
    cameras: tuple[str, ...] = ()
    layout: str = "bimanual"
    text_length: int = 256
    text_embeddings: str = ""
    text_width: int = 4096
    normalization: str = "min_max"
    action_size: int = 0
    state_size: int = 0
    num_threads: int = 2
    prefetch: int = 4
    cache_bytes: int = 1 << 29
    max_bad_records: int = 10

    def __post_init__(self):
        if not self.sources:
            raise ValueError("data.sources is empty: name at least one dataset.")
        if self.layout not in LAYOUTS:
            raise ValueError(f"data.layout is {self.layout!r}; there are {', '.join(LAYOUTS)}.")
        if self.normalization not in normalize.MODES:
            raise ValueError(
                f"data.normalization is {self.normalization!r}; there are {normalize.MODES}."
            )
        for name in ("num_frames", "chunk", "fps", "text_length", "text_width"):
            if not getattr(self, name) > 0:
                raise ValueError(f"data.{name} must be positive, found {getattr(self, name)}.")
        sources = list(self.sources)
        for i, source in enumerate(sources):
            if not isinstance(source, SourceConfig):
                sources[i] = build(SourceConfig, source, f"data.sources[{i}]")
        object.__setattr__(self, "sources", tuple(sources))
        object.__setattr__(self, "cameras", tuple(self.cameras) or LAYOUTS[self.layout].cameras)


class BatchIterator:
    """Batches of clips of one process, without end; dicts of NumPy arrays with B = its share.

    Attributes:
      normalizers: robot to the normalizer that the clips went through.
      spec: the shapes of a clip.
    """

    def __init__(self, batches: grain.MapDataset, sources: Sequence[Clips], batch_size: int, read):
        self._batches, self._sources, self._batch_size = batches, sources, batch_size
        self._read = read
        self.spec, self.normalizers = sources[0].spec, sources[0].normalizers
        self._seek(0)

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._iterator)
        self._step += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """Where the iterator is, as JSON values; the same on every process."""
        return {"step": self._step, "batch_size": self._batch_size}

    def set_state(self, state: Mapping[str, int]):
        """Continues at a state, which may come from another number of processes.

        Raises:
          ValueError: the state is not at a multiple of this iterator's batch size.
        """
        examples = state["step"] * state["batch_size"]
        if examples % self._batch_size:
            raise ValueError(
                f"The data position, {examples} examples, is not a multiple of batch_size "
                f"{self._batch_size}: continue with batch_size {state['batch_size']}."
            )
        self._seek(examples // self._batch_size)

    @property
    def bad_records(self) -> int:
        """Records with unreadable images that this process has met."""
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
      normalizers: robot to normalizer, such as those of a checkpoint; default: `statistics`.

    Raises:
      FileNotFoundError, ValueError: a dataset is absent, damaged or does not fit the config.
    """
    splits = {number: source.split for number, source in enumerate(config.sources)}
    clips = _clips(config, splits, normalizers)
    batches = _batches(config, clips, batch_size, seed, process_index, process_count)
    read = grain.ReadOptions(num_threads=config.num_threads, prefetch_buffer_size=config.prefetch)
    return BatchIterator(batches, list(clips.values()), batch_size, read)


def validation_batches(
    config: DataConfig,
    batch_size: int,
    num_batches: int,
    process_index: int = 0,
    process_count: int = 1,
    normalizers: Mapping[str, Normalizer] | None = None,
) -> grain.MapDataset:
    """`num_batches` held-out batches, always the same: index it or iterate over it.

    Arguments and errors as for `train_iterator`.

    Raises:
      ValueError: no source has a validation split.
    """
    splits = {
        number: source.validation_split
        for number, source in enumerate(config.sources)
        if source.validation_split
    }
    if not splits:
        raise ValueError("No source has a validation_split, so there is nothing to validate on.")
    clips = _clips(config, splits, normalizers)
    batches = _batches(config, clips, batch_size, 0, process_index, process_count)
    return batches[:num_batches]


def statistics(config: DataConfig) -> dict[str, Normalizer]:
    """Robot to normalizer, from the action and state columns of the training splits.

    No image is decoded. The result is stored beside the first dataset under a hash of the content
    of all datasets. Steps count once, whatever the weights are.

    Raises:
      FileNotFoundError, ValueError: a dataset is absent or damaged, or a robot has other dimensions
        in another dataset.
    """
    sources = [Episodes(source.path, source.split) for source in config.sources]
    digests = " ".join(sorted(episodes.digest for episodes in sources))
    name = f"statistics-{hashlib.sha256(digests.encode()).hexdigest()[:16]}-v1.json"
    data = cached(
        sources[0].folder, name, lambda: json.dumps(_compute_statistics(sources)).encode()
    )
    return {
        robot: Normalizer.from_dict(columns | {"mode": config.normalization})
        for robot, columns in json.loads(data).items()
    }


def _compute_statistics(sources: Sequence[Episodes]) -> dict[str, dict]:
    """{robot: {"action": statistics or None, "state": the same}}, as JSON values."""
    result = {}
    for robot in sorted({robot for episodes in sources for robot in episodes.robots()}):
        records = [(e, int(record)) for e in sources for record in e.records_of(robot)]
        stride = 1 + sum(int(e.lengths[record]) for e, record in records) // MAX_STATISTICS_STEPS
        rows, names = {"action": [], "state": []}, {}
        title = f"Statistics of {robot}, once"
        for episodes, record in rich.progress.track(records, title, disable=len(records) < 1000):
            steps = episodes.columns(record)
            actions = steps.action if episodes.has_action[record] else None
            for column, values in ("action", actions), ("state", steps.state):
                if values is None:
                    continue
                found = episodes.names[column], episodes.units[column]
                if names.setdefault(column, found) != found:
                    raise ValueError(
                        f"Robot {robot!r} has {column} {names[column]} in one dataset and {found} "
                        f"in {episodes.folder}: give them different robot names."
                    )
                rows[column].append(values[::stride])
        result[robot] = {
            column: dataclasses.asdict(Stats.of(np.concatenate(parts), *names[column]))
            if parts
            else None
            for column, parts in rows.items()
        }
    return result


def clip_spec(
    config: DataConfig, normalizers: Mapping[str, Normalizer] | None = None
) -> ClipSpec:
    """The shape of the clips; reads no data: A and S are the config's when there is no normalizer.

    Raises:
      ValueError: the config's A or S is smaller than a robot's.
    """
    normalizers = normalizers or {}
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return ClipSpec(
        cameras=config.cameras,
        num_frames=config.num_frames,
        fps=config.fps,
        chunk=config.chunk,
        height=height,
        width=width,
        text_length=config.text_length,
        text_width=config.text_width if config.text_embeddings else 0,
        action_size=_size(config.action_size, "action", normalizers),
        state_size=_size(config.state_size, "state", normalizers),
    )


def _clips(
    config: DataConfig,
    splits: Mapping[int, str],
    normalizers: Mapping[str, Normalizer] | None,
) -> dict[int, Clips]:
    """The clips of the sources whose numbers are in `splits`."""
    normalizers = statistics(config) if normalizers is None else normalizers
    spec = clip_spec(config, normalizers)
    embeddings = TextEmbeddings(config.text_embeddings) if config.text_embeddings else None
    cache_bytes = config.cache_bytes // len(splits)
    return {
        number: Clips(
            Episodes(config.sources[number].path, split, cache_bytes),
            spec,
            source=number,
            normalizers=normalizers,
            cameras=config.sources[number].cameras,
            embeddings=embeddings,
            max_bad_records=config.max_bad_records,
        )
        for number, split in splits.items()
    }


def _size(wanted: int, column: str, normalizers: Mapping[str, Normalizer]) -> int:
    """A or S: the largest of the robots, or `wanted`."""
    stats = [getattr(normalizer, column) for normalizer in normalizers.values()]
    largest = max((len(s.names) for s in stats if s is not None), default=0)
    if 0 < wanted < largest:
        raise ValueError(f"data.{column}_size is {wanted}, but a robot has {largest} dimensions.")
    return wanted or largest


def _batches(
    config: DataConfig,
    clips: Mapping[int, Clips],
    batch_size: int,
    seed: int,
    process_index: int,
    process_count: int,
) -> grain.MapDataset:
    """Endless batches of one process, of batch_size / process_count examples each."""
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size {batch_size} must be a positive multiple of the {process_count} processes."
        )
    seeds = np.random.SeedSequence(seed).generate_state(len(clips))
    examples = [
        grain.MapDataset.source(source).seed(int(source_seed)).shuffle().repeat()
        for source, source_seed in zip(clips.values(), seeds, strict=True)
    ]
    mixed = grain.MapDataset.mix(examples, [config.sources[number].weight for number in clips])
    # Parts of one batch follow each other: part p of batch n is number n * process_count + p.
    parts = mixed[:ENDLESS].batch(batch_size // process_count)
    return parts[process_index::process_count]
