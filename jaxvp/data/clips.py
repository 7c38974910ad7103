"""Clips: what models are trained on, cut from episodes at every start step."""

import collections
import dataclasses
import functools
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import rich

from jaxvp.data import observation, rates
from jaxvp.data.normalize import Normalizer
from jaxvp.data.rlds import BadRecord, Episodes, Record, decode_image
from jaxvp.data.text import ByteTokenizer
from jaxvp.data.text_embeddings import COMMAND, TextEmbeddings
from jaxvp.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipSpec:
    """The shape of every clip.

    Attributes:
      cameras: the V views, in canvas order.
      num_frames: T; fps: frames per second of the video, at most the dataset's.
      chunk: P, actions at the dataset's rate.
      height, width: H, W of every view.
      text_length: M.
      action_size, state_size: A and S, the largest of the mixture; smaller ones are padded and
        masked.
      text_width: D of embedded text; 0: text is bytes.
      source_size: (H, W) of the views as they are loaded, which the device resizes; (): as above.
      latents: (t, h, w, c) of stored latents, which stand in for the video; (): there are none.
    """

    cameras: tuple[str, ...]
    num_frames: int
    fps: float
    chunk: int
    height: int
    width: int
    text_length: int
    action_size: int
    state_size: int
    text_width: int = 0
    source_size: tuple[int, ...] = ()
    latents: tuple[int, ...] = ()

    @property
    def text(self) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and dtype of a clip's text: int32[M] tokens, or their bfloat16[M, D] embedding."""
        if self.text_width:
            return (self.text_length, self.text_width), np.dtype(ml_dtypes.bfloat16)
        return (self.text_length,), np.dtype(np.int32)

    @property
    def arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and dtype of what a clip consists of."""
        views, size = len(self.cameras), self.source_size or (self.height, self.width)
        pictures = {"latents": (self.latents, np.float16)} if self.latents else {
            "video": ((views, self.num_frames, *size, 3), np.uint8),
            "view_mask": ((views,), bool)}
        return pictures | {
            "frame_mask": ((self.num_frames,), bool),
            "text": self.text,
            "action": ((self.chunk, self.action_size), np.float32),
            "action_mask": ((self.chunk, self.action_size), bool),
            "state": ((self.state_size,), np.float32),
            "state_mask": ((self.state_size,), bool),
            "source": ((), np.int32),
        }

    def empty(self, *batch: int) -> dict[str, np.ndarray]:
        """The arrays of a clip, or of a batch of them, to be filled."""
        return {name: np.empty((*batch, *shape), dtype)
                for name, (shape, dtype) in self.arrays.items()}


class Views:
    """The pictures of the clips of one source, which has one at every step.

    Attributes:
      cameras: the dataset's name of every view, None for one that it lacks.
      stride: steps from one clip to the next.
    """

    stride = 1

    def __init__(self, episodes: Episodes, spec: ClipSpec,
                 names: Mapping[str, str | None] | None = None):
        """Raises UserError when the dataset lacks a camera, or frames per second.

        Args:
          episodes: the data.
          spec: shapes.
          names: view to the dataset's name for it, None for a view that the dataset lacks; by
            default the names are the same.
        """
        self.episodes, self.spec = episodes, spec
        names = names or {}
        if unknown := set(names) - set(spec.cameras):
            raise UserError(
                f"cameras of the source {episodes.folder} names {sorted(unknown)}: the views are "
                f"{spec.cameras}."
            )
        self.cameras = tuple(names.get(camera, camera) for camera in spec.cameras)
        missing = [c for c in self.cameras if c is not None and c not in episodes.cameras]
        if missing:
            raise UserError(
                f"{episodes.folder} has no camera {missing[0]!r}; it has {episodes.cameras}. Map "
                "views to its names in the source's `cameras`, to None for a view that it lacks."
            )
        if not rates.at_least(slowest := float(episodes.fps.min()), spec.fps):
            raise UserError(
                f"{episodes.folder} has {slowest:g} frames per second, clips want {spec.fps:g}: "
                "lower data.fps."
            )

    def fill(self, record: int, steps: Record, step: int, clip: Mapping[str, np.ndarray]):
        """Fills what a clip that begins at `step` shows: video, view_mask and frame_mask.

        Raises:
          BadRecord: an image cannot be read or decoded.
        """
        frames, clip["frame_mask"][:] = _frames(self.episodes, record, step, self.spec)
        layout = self.episodes.text("camera_layout", record).split(",")
        video = clip["video"]
        for view, camera in enumerate(self.cameras):
            clip["view_mask"][view] = camera in layout
            if camera not in layout:
                video[view] = observation.MISSING
                continue
            for k, frame in enumerate(frames):
                if k and frame == frames[k - 1]:
                    video[view, k] = video[view, k - 1]
                    continue
                try:
                    image = decode_image(steps.images[camera][frame], video[view, k])
                except BadRecord as error:
                    raise BadRecord(
                        f"camera {camera}, step {frame} of the record: {error}"
                    ) from None
                if not np.may_share_memory(image, video):
                    video[view, k] = observation.resize(image, *video.shape[2:4])


class Latents:
    """The same of a source that jaxvp.data.precompute wrote: latents in place of pictures."""

    def __init__(self, episodes: Episodes, spec: ClipSpec):
        """Raises UserError when they were made for other clips."""
        self.episodes, self.spec = episodes, spec
        stored = episodes.stored_latents
        self.stride, self.cameras = stored["stride"], tuple(stored["views"])
        wanted = {"cameras": list(spec.cameras), "num_frames": spec.num_frames, "fps": spec.fps,
                  "image_size": [spec.height, spec.width], "latents": list(spec.latents)}
        differing = [f"{name} {stored[name]}, not {value}" for name, value in wanted.items()
                     if not (rates.same(stored[name], value) if name == "fps"
                             else stored[name] == value)]
        if differing:
            raise UserError(f"{episodes.folder} holds latents of other clips: "
                            f"{'; '.join(differing)}. Run jaxvp.data.precompute for this config.")

    def fill(self, record: int, steps: Record, step: int, clip: Mapping[str, np.ndarray]):
        """Fills latents and frame_mask; raises BadRecord when they cannot be read."""
        _, clip["frame_mask"][:] = _frames(self.episodes, record, step, self.spec)
        data = np.frombuffer(steps.images["latents"][step], np.float16)
        clip["latents"][...] = data.reshape(self.spec.latents)


def _frames(episodes: Episodes, record: int, step: int, spec: ClipSpec):
    """(steps that a clip shows, whether they are before the end of the record) for T frames."""
    last, rate = int(episodes.lengths[record]) - 1, float(episodes.fps[record]) / spec.fps
    frames = step + np.floor(np.arange(spec.num_frames) * rate + 0.5).astype(np.int64)
    return np.minimum(frames, last).tolist(), frames <= last


class Clips:
    """All clips of one source, by number: a pair (record, start step) each, no list of pairs.

    Clip i starts at step s of its record: any step, or any that has latents. Frame k is the step
    nearest to s + k * dataset fps / fps, the actions are s..s+P-1, the state and the text are those
    of s. Past the end the last frame and action are repeated and masked.

    What cannot be read or decoded replaces the clip by the one at the same step of the next
    record; its record is counted in `bad_records`, {number in the split: message}.
    """

    def __init__(
        self,
        episodes: Episodes,
        spec: ClipSpec,
        *,
        source: int,
        normalizers: Mapping[str, Normalizer],
        cameras: Mapping[str, str | None] | None = None,
        embeddings: TextEmbeddings | None = None,
        max_bad_records: int = 10,
    ):
        """Prepares the clips of `episodes`.

        Args:
          episodes: the data.
          spec: shapes, the same for all sources of a mixture.
          source: the number of this source in the mixture.
          normalizers: of every robot in the data.
          cameras: view to the dataset's name for it, None for a view that the dataset lacks; by
            default the names are the same.
          embeddings: of the texts, when the spec has a text_width.
          max_bad_records: more records that cannot be read than this stop the run.

        Raises:
          UserError: a camera, a normalizer or the embeddings of the texts are missing, or the
            dataset has fewer frames per second than the clip, or latents of other clips, or more
            than `max_bad_records` bad records are known.
        """
        self.episodes, self.spec, self._source = episodes, spec, source
        self.normalizers, self._max_bad_records = normalizers, max_bad_records
        self._pictures = (Latents(episodes, spec) if spec.latents
                          else Views(episodes, spec, cameras))
        self.cameras = self._pictures.cameras
        if missing := set(episodes.robots()) - set(normalizers):
            raise UserError(
                f"{episodes.folder} has robots {sorted(missing)} without statistics; there are "
                f"statistics of {sorted(normalizers)}."
            )
        self._counts = -(-episodes.lengths // self._pictures.stride)
        self._ends = np.cumsum(self._counts, dtype=np.int64)
        self._text = self._text_reader(embeddings)
        self.bad_records: dict[int, str] = dict(episodes.damaged)
        self._lock = threading.Lock()
        self._check_bad_records()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """One clip: the arrays of a batch without B; raises as `fill`."""
        clip = self.spec.empty()
        self.fill(index, clip)
        return clip

    def fill(self, index: int, clip: Mapping[str, np.ndarray]):
        """Writes one clip into arrays, such as rows of those of a batch.

        Raises:
          UserError: the text is longer than M, or more than `max_bad_records` records are bad.
        """
        record = int(np.searchsorted(self._ends, index, side="right"))
        start = index - int(self._ends[record] - self._counts[record])
        while True:
            step = min(start, int(self._counts[record]) - 1) * self._pictures.stride
            try:
                return self._fill(record, step, clip)
            except BadRecord as error:
                self._count_bad(record, str(error))
                record = (record + 1) % len(self.episodes)

    def _fill(self, record: int, step: int, clip: Mapping[str, np.ndarray]):
        spec, steps = self.spec, self.episodes[record]
        last = int(self.episodes.lengths[record]) - 1
        robot = self.episodes.text("robot", record)
        instruction = steps.instruction[step].decode()
        camera_text = self.episodes.text("camera_text", record)
        self._pictures.fill(record, steps, step, clip)
        clip["text"][:] = self._text(observation.describe(robot, camera_text, instruction))
        clip["source"][...] = self._source
        times = step + np.arange(spec.chunk)
        there = (times <= last) & self.episodes.has_action[record]
        normalizer = self.normalizers[robot]
        self._fill_column(normalizer, "action", steps.action, np.minimum(times, last), there, clip)
        self._fill_column(normalizer, "state", steps.state, step, True, clip)

    def _fill_column(self, normalizer: Normalizer, column: str, values: np.ndarray | None,
                     times: np.ndarray | int, there: np.ndarray | bool,
                     clip: Mapping[str, np.ndarray]):
        """Fills a column and its mask with the values at `times`, normalised and padded."""
        result, mask = clip[column], clip[f"{column}_mask"]
        result[...], mask[...] = 0, False
        if values is not None and np.any(there):
            dimensions = values.shape[1]
            result[..., :dimensions] = normalizer.normalize(column, values[times])
            mask[..., :dimensions] = np.asarray(there)[..., None]

    def _text_reader(self, embeddings: TextEmbeddings | None) -> Callable[[str], np.ndarray]:
        """The function that turns a unified text into the clip's array."""
        spec = self.spec
        if not spec.text_width:
            return functools.lru_cache(maxsize=4096)(ByteTokenizer(spec.text_length).encode)
        if embeddings.width != spec.text_width:
            raise UserError(f"{embeddings.folder} has embeddings of width {embeddings.width}, "
                            f"data.text_width is {spec.text_width}: set it to the former.")
        if self.episodes.digest not in embeddings.datasets:
            raise UserError(
                f"{embeddings.folder} lacks texts of {self.episodes.folder} {self.episodes.split}: "
                f"add them with `{COMMAND.format(folder=embeddings.folder)}`.")
        return functools.partial(embeddings.lookup, length=spec.text_length)

    def _count_bad(self, record: int, message: str):
        number, message = int(self.episodes.rows["number"][record]), (
            f"{self.episodes.name(record)}: {message}")
        with self._lock:
            if number not in self.bad_records:
                self.bad_records[number] = message
                rich.get_console().print(f"Skipped {message}", markup=False, highlight=False,
                                         soft_wrap=True)
            self._check_bad_records()

    def _check_bad_records(self):
        bad = list(self.bad_records.values())
        readable = len(self.episodes) + len(self.episodes.damaged) - len(bad)
        if len(bad) > self._max_bad_records or not readable:
            listing = "\n  ".join(bad[:10])
            raise UserError(
                f"{len(bad)} records of {self.episodes.folder} are unreadable; "
                f"max_bad_records is {self._max_bad_records}:\n  {listing}"
            )


class BatchReader:
    """Makes batches of the clips of several sources; its threads fill the rows of one."""

    def __init__(self, clips: Mapping[int, Clips], num_threads: int, kept: int):
        """`kept`: batches whose memory is used again when nothing refers to them any more; the
        kernel clears new memory, which takes a seventh of the time of decoding into it."""
        self._clips = clips
        self._map = ThreadPoolExecutor(num_threads).map if num_threads else map
        self._kept, self._lock = collections.deque(maxlen=kept), threading.Lock()

    def __call__(self, addresses: Sequence[tuple[int, int]]) -> dict[str, np.ndarray]:
        """A batch of the clips with these numbers of sources and clips."""
        batch = self._empty(len(addresses))

        def fill(row):
            source, clip = addresses[row]
            self._clips[source].fill(
                clip, {name: values[row, ...] for name, values in batch.items()})

        for _ in self._map(fill, range(len(addresses))):
            pass
        return batch

    def _empty(self, size: int) -> dict[str, np.ndarray]:
        with self._lock:
            batch = next((kept for kept in self._kept if _references(kept) == UNUSED), None)
            if batch is None:
                batch = next(iter(self._clips.values())).spec.empty(size)
                self._kept.append(batch)
            return dict(batch)


def _references(arrays: Mapping[str, np.ndarray]) -> int:
    """The most references that there are to one of the arrays; a view is one, and so is a device
    that still reads it."""
    return max(sys.getrefcount(array) for array in arrays.values())


UNUSED = _references({"": np.empty(0)})
