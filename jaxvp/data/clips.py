"""Clips: what models are trained on, cut from episodes around every step."""

import collections
import functools
import json
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import rich

from jaxvp.data import observation, rates
from jaxvp.data.normalize import Normalizer
from jaxvp.data.rlds import BadRecord, Episodes, Record, decode_image
from jaxvp.data.spec import ClipSpec, Window
from jaxvp.data.text import ByteTokenizer
from jaxvp.data.text_embeddings import COMMAND, TextEmbeddings
from jaxvp.errors import UserError


class Views:
    """The pictures of the clips of one source; every step is the now of one, or every step of which
    the builder has rendered an image.

    Attributes:
      cameras: the dataset's name of every view, None for one that it lacks.
      stride: steps from the now of one clip to that of the next.
    """

    def __init__(self, episodes: Episodes, spec: ClipSpec,
                 names: Mapping[str, str | None] | None = None):
        """Finds the cameras.

        Args:
          episodes: the data.
          spec: the arrays of a clip.
          names: view to the dataset's name for it, None for a view that the dataset lacks; by
            default the names are the same.

        Raises:
          UserError: the dataset lacks a camera, or `names` has one that is no view, or the window
            shows steps that have no image of their own.
        """
        self.episodes, self.spec, names = episodes, spec, names or {}
        if unknown := set(names) - set(spec.cameras):
            raise UserError(f"cameras of the source {episodes.folder} names {sorted(unknown)}: the "
                            f"views are {spec.cameras}.")
        self.cameras = tuple(names.get(camera, camera) for camera in spec.cameras)
        missing = [c for c in self.cameras if c is not None and c not in episodes.cameras]
        if missing:
            hint = "" if not episodes.extra else (
                f" It stores {tuple(episodes.extra)}: name them in data.extra, with "
                "data.video=False.")
            raise UserError(
                f"{episodes.folder} has no camera {missing[0]!r}; it has {episodes.cameras}. Map "
                "views to its names in the source's `cameras`, to None for a view that it "
                f"lacks.{hint}")
        if not rates.at_least(slowest := float(episodes.fps.min()), spec.window.fps):
            raise UserError(f"{episodes.folder} has {slowest:g} frames per second, clips want "
                            f"{spec.window.fps:g}: lower data.window.fps.")
        self.stride = json.loads(episodes.text("options", 0)).get("frame_stride", 1)
        if (spec.window.steps(slowest) % self.stride).any():
            raise UserError(f"{episodes.folder} has an image of every {self.stride}th step only, "
                            f"{slowest / self.stride:g} per second; clips want "
                            f"{spec.window.fps:g}: make that a whole part of it, "
                            "data.window.fps, or build with a higher --fps.")

    def fill(self, record: int, steps: Record, now: int, clip: Mapping[str, np.ndarray],
             future: bool):
        """Fills what a clip shows, up to now unless `future`: video and view_mask.

        Raises:
          BadRecord: an image cannot be read or decoded.
        """
        frames, _ = frame_steps(self.episodes, record, now, self.spec.window)
        if not future:
            frames = frames[:self.spec.window.past]
            clip["video"][:, len(frames):] = observation.MISSING
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


class Extras:
    """Arrays that jaxvp.tools.precompute stored of the clips of one source, for every `stride`-th
    step as now; attributes as of `Views`."""

    def __init__(self, episodes: Episodes, spec: ClipSpec, layout: str):
        """Looks what is stored.

        Args:
          episodes: the data.
          spec: the arrays of a clip; layout: of the canvas.

        Raises:
          UserError: an array is not stored, or was computed of other clips.
        """
        self.episodes, self.spec = episodes, spec
        if missing := set(spec.extra) - set(episodes.extra):
            raise UserError(f"{episodes.folder} stores {tuple(episodes.extra) or 'no arrays'}, not "
                            f"{min(missing)!r}, which data.extra names: run jaxvp.tools.precompute "
                            "for this config.")
        window, first = spec.window, episodes.extra[next(iter(spec.extra))]
        self.stride, self.cameras = first["stride"], tuple(first["views"])
        for name, shape in spec.extra.items():
            stored = episodes.extra[name]
            wanted = {"shape": list(shape), "layout": layout, "cameras": list(spec.cameras),
                      "image_size": [spec.height, spec.width], "past": window.past,
                      "stride": self.stride, "views": list(self.cameras)}
            differing = [f"{key} {stored[key]}, not {value}" for key, value in wanted.items()
                         if stored[key] != value]
            if not rates.same(stored["fps"], window.fps):
                differing.append(f"fps {stored['fps']}, not {window.fps}")
            if stored["future"] < window.future:
                differing.append(f"future {stored['future']}, not {window.future} or more")
            if differing:
                raise UserError(f"{episodes.folder} stores {name!r} of other clips: "
                                f"{'; '.join(differing)}. Run jaxvp.tools.precompute for this "
                                "config.")

    def fill(self, record: int, steps: Record, now: int, clip: Mapping[str, np.ndarray],
             future: bool):
        """Fills the extra arrays, which are of the whole clip, whatever `future` is; raises
        BadRecord when they cannot be read."""
        for name, shape in self.spec.extra.items():
            clip[name][...] = np.frombuffer(steps.images[name][now], np.float16).reshape(shape)


def frame_steps(episodes: Episodes, record: int, now: int, window: Window
                ) -> tuple[list[int], np.ndarray]:
    """The steps of a record that the T frames of a clip show, and bool[T], whether the record has
    them: before its beginning and after its end, its nearest step is shown instead."""
    last = int(episodes.lengths[record]) - 1
    steps = now + window.steps(float(episodes.fps[record]))
    return _clamp(steps, last).tolist(), (steps >= 0) & (steps <= last)


def _clamp(steps: np.ndarray, last: int) -> np.ndarray:
    return np.minimum(np.maximum(steps, 0), last)  # np.clip takes three times as long.


class Clips:
    """All clips of one source, by number: a pair (record, now) each, no list of pairs.

    The now of a clip is a step s of its record: any step, or any that arrays are stored for, or
    that has an image of its own (the option frame_stride of its builder). Frame k, from 1 - past to
    future, is the step nearest to s + k * dataset fps / fps; states are those of the observed
    frames, actions those of s - past_actions .. s + P - 1, the text is that of s.
    What is before the beginning or after the end of the record is its nearest step, masked; actions
    before the beginning are 0, as a policy gets them: the first action would tell what to predict.

    A clip that cannot be read or decoded is replaced by the one at the same step of the next
    record; its record is counted in `bad_records`, {number in the split: message}.
    """

    def __init__(
        self,
        episodes: Episodes,
        spec: ClipSpec,
        *,
        source: int,
        layout: str,
        normalizers: Mapping[str, Normalizer],
        cameras: Mapping[str, str | None] | None = None,
        embeddings: TextEmbeddings | None = None,
        max_bad_records: int = 10,
    ):
        """Prepares the clips of `episodes`.

        Args:
          episodes: the data.
          spec: the arrays of a clip, the same for all sources of a mixture.
          source: the number of this source in the mixture.
          layout: of the canvas, a name in `observation.LAYOUTS`.
          normalizers: of every robot in the data.
          cameras: view to the dataset's name for it, None for a view that the dataset lacks; by
            default the names are the same.
          embeddings: of the texts, when the spec has a text_width.
          max_bad_records: more records that cannot be read than this stop the run.

        Raises:
          UserError: a camera, a normalizer or the embeddings of the texts are missing, or the
            dataset has fewer frames per second than the clip, or stores arrays of other clips, or
            more than `max_bad_records` bad records are known.
        """
        self.episodes, self.spec, self._source = episodes, spec, source
        self.normalizers, self._max_bad_records = normalizers, max_bad_records
        self._parts = [Views(episodes, spec, cameras)] if spec.video else []
        self._parts += [Extras(episodes, spec, layout)] if spec.extra else []
        self.cameras, self._stride = self._parts[-1].cameras, self._parts[-1].stride
        if self._parts[0].cameras != self.cameras:
            raise UserError(f"{episodes.folder} stores arrays of the cameras {self.cameras}, but "
                            f"the source's `cameras` are {self._parts[0].cameras}.")
        if self._stride % self._parts[0].stride:
            raise UserError(f"{episodes.folder} has an image of every {self._parts[0].stride}th "
                            f"step only, and stores arrays of every {self._stride}th.")
        if missing := set(episodes.robots()) - set(normalizers):
            raise UserError(
                f"{episodes.folder} has robots {sorted(missing)} without statistics; there are "
                f"statistics of {sorted(normalizers)}."
            )
        self._counts = -(-episodes.lengths // self._stride)
        self._ends = np.cumsum(self._counts, dtype=np.int64)
        self._text = self._text_reader(embeddings)
        self.bad_records: dict[int, str] = dict(episodes.damaged)
        self._lock = threading.Lock()
        self._check_bad_records()

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def acting(self) -> int:
        """The number of clips of records with actions."""
        return int(self._acting[1][-1]) if len(self._acting[1]) else 0

    def acting_clip(self, index: int) -> int:
        """The number among all clips of the `index`-th of those of records with actions."""
        records, ends = self._acting
        place = int(np.searchsorted(ends, index, side="right"))
        return int(self._ends[records[place]]) - (int(ends[place]) - index)

    @functools.cached_property
    def _acting(self) -> tuple[np.ndarray, np.ndarray]:
        """The records with actions, and where the clips of each end among theirs."""
        records = np.flatnonzero(self.episodes.has_action)
        return records, np.cumsum(self._counts[records], dtype=np.int64)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """One clip: the arrays of a batch without B; raises as `fill`."""
        clip = self.spec.empty()
        self.fill(index, clip)
        return clip

    def fill(self, index: int, clip: Mapping[str, np.ndarray], future: bool = True):
        """Writes one clip into arrays, such as rows of those of a batch; without `future`, its
        frames after now are masked.

        Raises:
          UserError: the text is longer than M, or more than `max_bad_records` records are bad.
        """
        record, now = self.place(index)
        while True:
            step = min(now, (int(self._counts[record]) - 1) * self._stride)
            try:
                return self._fill(record, step, clip, future)
            except BadRecord as error:
                self._count_bad(record, str(error))
                record = (record + 1) % len(self.episodes)

    def place(self, index: int) -> tuple[int, int]:
        """The record of a clip, and the step of it that is its now."""
        record = int(np.searchsorted(self._ends, index, side="right"))
        return record, (index - int(self._ends[record] - self._counts[record])) * self._stride

    def _fill(self, record: int, now: int, clip: Mapping[str, np.ndarray], future: bool):
        window, steps = self.spec.window, self.episodes[record]
        last = int(self.episodes.lengths[record]) - 1
        robot = self.episodes.text("robot", record)
        instruction = steps.instruction[now].decode()
        camera_text = self.episodes.text("camera_text", record)
        for part in self._parts:
            part.fill(record, steps, now, clip, future)
        frames, clip["frame_mask"][:] = frame_steps(self.episodes, record, now, window)
        if not future:
            clip["frame_mask"][window.past:] = False
        clip["text"][:] = self._text(observation.describe(robot, camera_text, instruction))
        clip["source"][...] = self._source
        times = now + np.arange(-window.past_actions, window.chunk)
        there = (times >= 0) & (times <= last) & self.episodes.has_action[record]
        normalizer = self.normalizers[robot]
        self._fill_column(normalizer, "action", steps.action, _clamp(times, last), there, clip)
        self._fill_column(normalizer, "state", steps.state, frames[:window.past],
                          clip["frame_mask"][:window.past], clip)
        if "action" in clip:
            clip["action"][:max(0, window.past_actions - now)] = 0

    def _fill_column(self, normalizer: Normalizer, column: str, values: np.ndarray | None,
                     times: Sequence[int], there: np.ndarray, clip: Mapping[str, np.ndarray]):
        """Fills a column and its mask with the values at `times`, normalised and padded; `there`:
        whether the record has them. A clip without the column stays so."""
        if column not in clip:
            return
        result, mask = clip[column], clip[f"{column}_mask"]
        result[...], mask[...] = 0, False
        if values is not None and there.any():
            dimensions = values.shape[1]
            result[:, :dimensions] = normalizer.normalize(column, values[times])
            mask[:, :dimensions] = there[:, None]

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

    def __init__(self, clips: Mapping[int, Clips], num_threads: int, kept: int,
                 future_every: int = 1):
        """`kept`: how many batches keep their memory, to be used again when nothing refers to them
        any more; the kernel clears new memory, which takes a seventh of the time of decoding.
        `future_every`: see `methods.base.Stage`."""
        self._clips, self._future_every = clips, future_every
        self._map = ThreadPoolExecutor(num_threads).map if num_threads else map
        self._kept, self._lock = collections.deque(maxlen=kept), threading.Lock()

    def __call__(self, addresses: Sequence[tuple[int, int]]) -> dict[str, np.ndarray]:
        """The batch of these clips, each given by the numbers of its source and of the clip."""
        batch = self._empty(len(addresses))

        def fill(row):
            source, clip = addresses[row]
            self._clips[source].fill(
                clip, {name: values[row, ...] for name, values in batch.items()},
                row % self._future_every == 0)

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
    """The number of references to the array that has most; a view is one, and so is a device that
    still reads it."""
    return max(sys.getrefcount(array) for array in arrays.values())


UNUSED = _references({"": np.empty(0)})
