"""Clips: what models are trained on, cut from episodes at every start step."""

import dataclasses
import functools
import threading
from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np

from jaxvp.data import observation
from jaxvp.data.normalize import Normalizer
from jaxvp.data.rlds import BadImage, Episodes, Record, decode_image
from jaxvp.data.text import ByteTokenizer
from jaxvp.data.text_embeddings import COMMAND, TextEmbeddings


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

    @property
    def text(self) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and dtype of a clip's text: int32[M] tokens, or their bfloat16[M, D] embedding."""
        if self.text_width:
            return (self.text_length, self.text_width), np.dtype(ml_dtypes.bfloat16)
        return (self.text_length,), np.dtype(np.int32)


class Clips:
    """All clips of one source, by number: a pair (record, start step) each, no list of pairs.

    Clip i starts at step s of its record. Frame k is the step nearest to s + k * dataset fps / fps,
    the actions are s..s+P-1, the state and the text are those of s. Past the end the last frame and
    action are repeated and masked.

    An image that cannot be decoded replaces the clip by the one at the same step of the next
    record, and is counted in `bad_records`, {record: message}.
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
          max_bad_records: more records with unreadable images than this stop the run.

        Raises:
          ValueError: a camera, a normalizer or the embeddings of the texts are missing, or the
            dataset has fewer frames per second than the clip.
        """
        self.episodes, self.spec, self._source = episodes, spec, source
        self.normalizers, self._max_bad_records = normalizers, max_bad_records
        self.cameras = self._check_cameras(cameras or {})
        if missing := set(episodes.robots()) - set(normalizers):
            raise ValueError(
                f"{episodes.folder} has robots {sorted(missing)} without statistics; there are "
                f"statistics of {sorted(normalizers)}."
            )
        if (slowest := float(episodes.fps.min())) < spec.fps:
            raise ValueError(
                f"{episodes.folder} has {slowest:g} frames per second, clips want {spec.fps:g}: "
                "lower data.fps."
            )
        self._ends = np.cumsum(episodes.lengths, dtype=np.int64)
        self._text = self._text_reader(embeddings)
        self.bad_records: dict[int, str] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """One clip: the arrays of a batch without B.

        Raises:
          ValueError: the text is longer than M, or more than `max_bad_records` records are bad.
        """
        record = int(np.searchsorted(self._ends, index, side="right"))
        step = index - int(self._ends[record] - self.episodes.lengths[record])
        while True:
            try:
                return self._clip(record, min(step, int(self.episodes.lengths[record]) - 1))
            except BadImage as error:
                self._count_bad(record, str(error))
                record = (record + 1) % len(self.episodes)

    def _clip(self, record: int, step: int) -> dict[str, np.ndarray]:
        spec, steps = self.spec, self.episodes[record]
        last = int(self.episodes.lengths[record]) - 1
        stride = float(self.episodes.fps[record]) / spec.fps
        frames = step + np.floor(np.arange(spec.num_frames) * stride + 0.5).astype(np.int64)
        layout = self.episodes.text("camera_layout", record).split(",")
        view_mask = np.array([camera in layout for camera in self.cameras])
        robot = self.episodes.text("robot", record)
        instruction = steps.instruction[step].decode()
        camera_text = self.episodes.text("camera_text", record)
        clip = {
            "video": self._video(steps, np.minimum(frames, last), view_mask),
            "view_mask": view_mask,
            "frame_mask": frames <= last,
            "text": self._text(observation.describe(robot, camera_text, instruction)),
            "source": np.int32(self._source),
        }
        times = step + np.arange(spec.chunk)
        there = (times <= last) & self.episodes.has_action[record]
        normalizer = self.normalizers[robot]
        clip["action"], clip["action_mask"] = self._column(
            normalizer, "action", spec.action_size, steps.action, np.minimum(times, last), there
        )
        state, state_mask = self._column(
            normalizer, "state", spec.state_size, steps.state, np.array([step]), np.array([True])
        )
        return clip | {"state": state[0], "state_mask": state_mask[0]}

    def _video(self, steps: Record, frames: np.ndarray, view_mask: np.ndarray) -> np.ndarray:
        """uint8[V, T, H, W, 3]; only the frames of the clip are decoded, each once."""
        spec = self.spec
        shape = (len(spec.cameras), spec.num_frames, spec.height, spec.width, 3)
        video = np.full(shape, observation.MISSING, np.uint8)
        for view, camera in enumerate(self.cameras):
            if not view_mask[view]:
                continue
            for k, frame in enumerate(frames):
                if k and frame == frames[k - 1]:
                    video[view, k] = video[view, k - 1]
                    continue
                try:
                    image = decode_image(steps.images[camera][frame])
                except BadImage as error:
                    raise BadImage(
                        f"camera {camera}, step {frame} of the record: {error}"
                    ) from None
                video[view, k] = observation.resize(image, spec.height, spec.width)
        return video

    def _column(self, normalizer, column, size, values, times, there):
        """(float32[n, size], bool[n, size]) of a column at `times`, normalised and padded."""
        result = np.zeros((len(times), size), np.float32)
        mask = np.zeros((len(times), size), bool)
        if values is not None and there.any():
            dimensions = values.shape[1]
            result[:, :dimensions] = normalizer.normalize(column, values[times])
            mask[:, :dimensions] = there[:, None]
        return result, mask

    def _check_cameras(self, names: Mapping[str, str | None]) -> tuple[str | None, ...]:
        """The dataset's name of every view."""
        if unknown := set(names) - set(self.spec.cameras):
            raise ValueError(
                f"cameras of the source {self.episodes.folder} names {sorted(unknown)}: the views "
                f"are {self.spec.cameras}."
            )
        cameras = tuple(names.get(camera, camera) for camera in self.spec.cameras)
        if missing := [c for c in cameras if c is not None and c not in self.episodes.cameras]:
            raise ValueError(
                f"{self.episodes.folder} has no camera {missing[0]!r}; it has "
                f"{self.episodes.cameras}. Map views to its names in the source's `cameras`, to "
                "None for a view that it lacks."
            )
        return cameras

    def _text_reader(self, embeddings: TextEmbeddings | None) -> Callable[[str], np.ndarray]:
        """The function that turns a unified text into the clip's array."""
        spec = self.spec
        if not spec.text_width:
            return functools.lru_cache(maxsize=4096)(ByteTokenizer(spec.text_length).encode)
        if embeddings.width != spec.text_width:
            raise ValueError(f"{embeddings.folder} has embeddings of width {embeddings.width}, "
                             f"data.text_width is {spec.text_width}: set it to the former.")
        if self.episodes.digest not in embeddings.datasets:
            raise ValueError(
                f"{embeddings.folder} lacks texts of {self.episodes.folder} {self.episodes.split}: "
                f"add them with `{COMMAND.format(folder=embeddings.folder)}`.")
        return functools.partial(embeddings.lookup, length=spec.text_length)

    def _count_bad(self, record: int, message: str):
        with self._lock:
            self.bad_records.setdefault(record, f"{self.episodes.name(record)}: {message}")
            bad = list(self.bad_records.values())
        if len(bad) > self._max_bad_records or len(bad) == len(self.episodes):
            listing = "\n  ".join(bad[:10])
            raise ValueError(
                f"{len(bad)} records of {self.episodes.folder} have unreadable images; "
                f"max_bad_records is {self._max_bad_records}:\n  {listing}"
            )
