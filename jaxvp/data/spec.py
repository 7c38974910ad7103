"""What a clip is, and what an observation is: the one definition of their arrays. NumPy only.

A clip is what a window around "now", a step of an episode, shows of it. An observation is the same
clip cut off at now: what a policy sees when it acts.
"""

import dataclasses
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from jaxvp.config import NonNegativeInt, PositiveFloat, PositiveInt
from jaxvp.errors import UserError

Arrays = dict[str, tuple[tuple[int, ...], np.dtype]]  # Name to shape and dtype.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
    """What is seen around now.

    Attributes:
      fps: frames per second of the video, at most the dataset's.
      past: frames observed; the last of them is now.
      future: frames after now.
      past_actions: actions before now, at the dataset's rate.
      chunk: P, actions from now on, at the dataset's rate.
    """

    fps: PositiveFloat
    past: PositiveInt = 1
    future: NonNegativeInt = 0
    past_actions: NonNegativeInt = 0
    chunk: NonNegativeInt = 0

    @property
    def frames(self) -> int:
        """T, past and future."""
        return self.past + self.future

    def steps(self, fps: float) -> np.ndarray:
        """int64[T], the steps of its frames in a dataset of `fps`, counted from now: the nearest
        to the times of the frames, of two equally near ones the later."""
        frames = np.arange(1 - self.past, self.future + 1)
        return np.floor(frames * (fps / self.fps) + 0.5).astype(np.int64)

    def covers(self, other: "Window") -> bool:
        """Whether this window sees all that `other` sees."""
        return self.fps == other.fps and all(
            getattr(self, name) >= getattr(other, name)
            for name in ("past", "future", "past_actions", "chunk"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipSpec:
    """The arrays of every clip.

    Attributes:
      cameras: the V views, in canvas order.
      window: what is seen around now.
      height, width: H, W of every view.
      text_length: M.
      action_size, state_size: A and S, the largest of the mixture; smaller ones are padded and
        masked.
      text_width: D of embedded text; 0: text is bytes.
      source_size: (H, W) of the views as they are loaded, which the device resizes; (): as above.
      extra: name to shape of the float16 arrays (latents, features) that are stored with the data,
        for the clip whose now is a certain step; of the whole clip, whatever `window` is.
      video: whether clips have pictures; when not, they have `extra` instead.
    """

    cameras: tuple[str, ...]
    window: Window
    height: PositiveInt
    width: PositiveInt
    text_length: PositiveInt
    action_size: NonNegativeInt
    state_size: NonNegativeInt
    text_width: NonNegativeInt = 0
    source_size: tuple[PositiveInt, ...] = ()
    extra: Mapping[str, tuple[PositiveInt, ...]] = dataclasses.field(default_factory=dict)
    video: bool = True

    def __post_init__(self):
        object.__setattr__(self, "extra", {k: tuple(v) for k, v in self.extra.items()})
        if not (self.video or self.extra):
            raise UserError("data.video is False and data.extra is {}: a clip needs pictures, or "
                            "stored arrays instead of them.")

    def __hash__(self):  # A dict has none.
        return hash((self.cameras, self.window, tuple(sorted(self.extra.items()))))

    @property
    def text(self) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and dtype of the text: int32[M] tokens, or their bfloat16[M, D] embedding."""
        if self.text_width:
            return (self.text_length, self.text_width), np.dtype(ml_dtypes.bfloat16)
        return (self.text_length,), np.dtype(np.int32)

    @property
    def arrays(self) -> Arrays:
        """Shapes and dtypes of a clip's arrays, by name. A column without rows is left out."""
        window = self.window
        steps = window.past_actions + window.chunk
        return self._seen(window.frames, steps, self.video) | {
            name: (shape, np.dtype(np.float16)) for name, shape in self.extra.items()
        } | {"source": ((), np.dtype(np.int32))}

    @property
    def observation(self) -> Arrays:
        """The same of an observation: a clip up to now, always with pictures, without stored arrays
        and source."""
        return self._seen(self.window.past, self.window.past_actions, video=True)

    def _seen(self, frames: int, actions: int, video: bool) -> Arrays:
        """The arrays that clips and observations have alike, of so many frames and actions."""
        views, size = len(self.cameras), self.source_size or (self.height, self.width)
        pictures = {"video": ((views, frames, *size, 3), np.dtype(np.uint8)),
                    "view_mask": ((views,), np.dtype(bool))}
        columns = {"state": (self.window.past, self.state_size),
                   "action": (actions, self.action_size)}
        result = (pictures if video else {}) | {
            "frame_mask": ((frames,), np.dtype(bool)), "text": self.text}
        for name, shape in columns.items():
            if shape[0]:
                result[name] = shape, np.dtype(np.float32)
                result[f"{name}_mask"] = shape, np.dtype(bool)
        return result

    def narrow(self, window: Window) -> "ClipSpec":
        """The same clips as a smaller window shows them.

        Raises:
          UserError: the window shows more than this spec's.
        """
        if not self.window.covers(window):
            raise UserError(f"data.window is {self.window}, but a stage wants to see {window}.")
        return dataclasses.replace(self, window=window)

    def empty(self, *batch: int) -> dict[str, np.ndarray]:
        """The arrays of a clip, or of a batch of them, to be filled."""
        return {name: np.empty((*batch, *shape), dtype)
                for name, (shape, dtype) in self.arrays.items()}


def observe(clip: Mapping, window: Window) -> dict:
    """The observation of a batch of clips [B, ...]: their arrays up to now.

    Stored arrays stay whole: a model with a causal codec takes what it may see of them.

    Args:
      clip: the arrays of a batch; window: of these clips.
    """
    lengths = {"video": (2, window.past), "frame_mask": (1, window.past),
               "action": (1, window.past_actions), "action_mask": (1, window.past_actions)}
    seen = {name: value for name, value in clip.items() if name != "source"}
    for name, (axis, length) in lengths.items():
        if name in seen:
            value = seen.pop(name)
            if length:
                seen[name] = value[(slice(None),) * axis + (slice(length),)]
    return seen
