"""Weighted mixtures of datasets as batches of clips, the same order on any number of processes.

The order of the examples is a function of the seed alone: every source is shuffled by a
permutation, anew in every epoch, and the sources are interleaved by weight. Batch n is the next
`batch_size` examples, process p takes the p-th part of it, and the state of the iterator is the
number of batches. Grain makes this order, of numbers of clips; several threads then read the clips
of a batch straight into its arrays.
"""

import functools
import json
from collections.abc import Mapping, Sequence

import grain
import numpy as np

from jaxvp.data import checks, mirror, statistics
from jaxvp.data.clips import BatchReader, Clips
from jaxvp.data.normalize import Normalizer
from jaxvp.data.rlds import Episodes
from jaxvp.data.sources import DataConfig, clip_spec, held_out, open_source
from jaxvp.data.spec import Window
from jaxvp.data.text_embeddings import TextEmbeddings
from jaxvp.errors import UserError

# Examples of a run; with sys.maxsize, Grain's own infinity, the length of batches of one overflows.
ENDLESS = 1 << 60


class BatchIterator:
    """Batches of clips of one process, without end; dicts of NumPy arrays with B = its share.

    Attributes:
      spec: the arrays of a clip.
    """

    def __init__(self, batches: grain.MapDataset, sources: Sequence[Clips], batch_size: int, read):
        self._batches, self._sources, self._batch_size = batches, sources, batch_size
        self._read, self._iterator = read, None
        self.spec = sources[0].spec
        self._digest = statistics.digest([source.episodes for source in sources])
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

    def _seek(self, step: int):
        if self._iterator is not None:
            self._iterator.close()  # Or it goes on to make the batches that it has begun.
        self._step = step
        self._iterator = iter(self._batches[step:].to_iter_dataset(self._read))


class Mixture:
    """The data of a config, opened.

    Attributes:
      config: the DataConfig.
      normalizers: robot to the normalizer that clips go through.
      spec: the arrays of clips with the window of the config; A and S are the largest of the
        robots where the config leaves them open.
      notes: what a user should know of the data.
    """

    def __init__(self, config: DataConfig, known: Mapping[str, Normalizer] | None = None):
        """Opens all sources; reads texts and columns where that has not been done before.

        Args:
          config: the data.
          known: robot to normalizer, of a checkpoint; normalizers of other robots come from the
            data.

        Raises:
          UserError: a dataset is absent, damaged or does not fit the config, or a text is too
            long, or a robot's records differ, or no record is as long as a clip or a chunk.
        """
        self.config = config
        self._embeddings = (
            TextEmbeddings(config.text_embeddings) if config.text_embeddings else None)
        self._train = dict(enumerate(open_source(config, source) for source in config.sources))
        checks.check_robots(self._train.values())
        found = statistics.of_sources(config.normalization, list(self._train.values()))
        self.normalizers, self.notes = statistics.known(found, known or {})
        self.spec = clip_spec(config, self.normalizers)
        self.notes += checks.check_lengths(self.spec.window, self._train.values())
        self._whole = self._checked(self._train)

    def train(self, window: Window, batch_size: int, seed: int, process_index: int = 0,
              process_count: int = 1, future_every: int = 1) -> BatchIterator:
        """Training batches.

        Args:
          window: what the clips show; the config's window covers it.
          batch_size: examples per step of all processes together.
          seed: of the order.
          process_index, process_count: which part of every batch this process makes.
          future_every: see `methods.base.Stage`.

        Raises:
          UserError: a batch is larger than the data, or does not divide among the processes, or the
            config's window does not cover this one.
        """
        config, clips = self.config, self._clips(self._train, window)
        if (total := sum(map(len, clips.values()))) < batch_size:
            raise UserError(f"batch_size is {batch_size}, but the data has only {total} clips.")
        # A thread of Grain waits for a batch; the threads that make it are `BatchReader`'s.
        ahead = config.prefetch if config.num_threads else 0
        if batch_size // process_count % future_every:
            raise UserError(f"batch_size is {batch_size}, over {process_count} processes: expected "
                            f"a multiple of {future_every} in each, since one clip of "
                            f"{future_every} shows the future.")
        batches = _batches(config, clips, batch_size, seed, process_index, process_count, ahead + 2,
                           future_every)
        read = grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)
        return BatchIterator(batches, list(clips.values()), batch_size, read)

    def validation(self, window: Window, batch_size: int, num_batches: int, process_index: int = 0,
                   process_count: int = 1) -> grain.MapDataset:
        """`num_batches` held-out batches, always the same: index it or iterate over it. Arguments
        as for `train`, errors as of `held_out`."""
        clips = self._clips(self._held_out, window)
        batches = _batches(self.config, clips, batch_size, 0, process_index, process_count)
        return batches[:num_batches]

    @functools.cached_property
    def _held_out(self) -> dict[int, Episodes]:
        opened, notes = held_out(self.config, self.normalizers)
        self.notes += notes
        self._checked(opened)
        return opened

    def mirrors(self) -> mirror.Tables | None:
        """What clips are flipped by, where the config flips any; errors as of `mirror.tables`."""
        if not self.config.augmentation.flip:
            return None
        robots = [episodes.robots() for episodes in self._train.values()]
        return mirror.tables(self.spec, robots, self.normalizers)

    def embodiments(self) -> dict[str, dict]:
        """Robot to what a policy for it must know of its data, as JSON values.

        camera_text; fps of control; cameras, the dataset's name of every view, None for one that it
        lacks; options, which the builder was given. Of the robot's first record.
        """
        found = {}
        for clips in self._whole.values():
            for robot in clips.episodes.robots():
                record = int(clips.episodes.records_of(robot)[0])
                found.setdefault(robot, {
                    "camera_text": clips.episodes.text("camera_text", record),
                    "fps": float(clips.episodes.fps[record]),
                    "cameras": list(clips.cameras),
                    "options": json.loads(clips.episodes.text("options", record)),
                })
        return found

    def _clips(self, opened: Mapping[int, Episodes], window: Window) -> dict[int, Clips]:
        """The clips of sources, by their numbers, as a window shows them."""
        config, spec = self.config, self.spec.narrow(window)
        return {
            number: Clips(
                episodes, spec, source=number, layout=config.layout, normalizers=self.normalizers,
                cameras=config.sources[number].cameras, embeddings=self._embeddings,
                max_bad_records=config.max_bad_records)
            for number, episodes in opened.items()}

    def _checked(self, opened: Mapping[int, Episodes]) -> dict[int, Clips]:
        """The clips as the config's window shows them; what does not fit it fails here."""
        clips = self._clips(opened, self.spec.window)
        for episodes in opened.values():
            checks.check_texts(episodes, self.spec.text_length, self._embeddings)
        return clips


def _batches(
    config: DataConfig,
    clips: Mapping[int, Clips],
    batch_size: int,
    seed: int,
    process_index: int,
    process_count: int,
    kept: int = 0,
    future_every: int = 1,
) -> grain.MapDataset:
    """Endless batches of one process, of batch_size / process_count examples each; `kept` and
    `future_every` as for `BatchReader`."""
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch_size {batch_size} must be a positive multiple of the {process_count} processes."
        )

    def parts(rows: int, seed, acting: bool = False) -> grain.MapDataset:
        # Parts of one batch follow each other: part p of batch n is number n * process_count + p.
        examples = _examples(config, clips, seed, acting)
        return examples[:ENDLESS].batch(rows, batch_fn=list)[process_index::process_count]

    rows = batch_size // process_count
    if future_every == 1:
        addresses = parts(rows, seed)
    else:
        videos = parts(rows // future_every, seed)
        actions = parts(rows - rows // future_every, [seed, 1], acting=True)
        addresses = grain.MapDataset.range(len(actions)).map(
            lambda number: _interleaved(videos[number], actions[number]))
    return addresses.map(BatchReader(clips, config.num_threads, kept, future_every))


def _examples(config: DataConfig, clips: Mapping[int, Clips], seed, acting: bool
              ) -> grain.MapDataset:
    """The endless order of clips as (number of the source, number of the clip) of all of them, or
    of those of records with actions."""
    counts = {number: source.acting if acting else len(source) for number, source in clips.items()}
    if not any(counts.values()):
        raise UserError(f"No record of {', '.join(str(c.episodes.folder) for c in clips.values())} "
                        "has actions to train on: add a source that has some.")
    seeds = np.random.SeedSequence(seed).generate_state(len(clips))
    examples, weights = [], []
    for (number, count), source_seed in zip(counts.items(), seeds, strict=True):
        if count:
            examples.append(
                grain.MapDataset.range(count).seed(int(source_seed)).shuffle().repeat().map(
                    functools.partial(_address, number, clips[number] if acting else None)))
            weights.append(config.sources[number].weight or count)
    return grain.MapDataset.mix(examples, weights)


def _address(number: int, acting: Clips | None, clip: int) -> tuple[int, int]:
    return number, acting.acting_clip(clip) if acting else clip


def _interleaved(videos: list, actions: list) -> list:
    """One of `videos` before each of as many equal runs of `actions`."""
    run = len(actions) // len(videos)
    return [address for i, video in enumerate(videos)
            for address in (video, *actions[i * run:(i + 1) * run])]
