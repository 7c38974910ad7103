"""Video files on their way into RLDS: decoded in order with PyAV, chosen by frame number or time.

Frame k is the k-th that a player shows: what an edit list cuts away is not there, and what a phone
marks as turned is turned upright. Damage that FFmpeg conceals is not noticed.
"""

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from data_builders.images import encode_jpeg
from jaxvp.errors import UserError

# Seconds. A container's clock may be as coarse as 1/1000 s, so times are off by half of that.
TOLERANCE = 6e-4

# Without the last two swscale rounds down: the picture is 1.5 levels darker.
SCALING = Interpolation.AREA | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND


class VideoError(UserError):
    """A video that cannot be read, or ends early."""


def measure(path: str | os.PathLike) -> tuple[int, float]:
    """(frames, frames per second) of a video, counted in its packets, without decoding.

    Raises:
      UserError: there is no such file.
      VideoError: it is not a video, or is cut.
    """
    times, rate = times_of(path)
    return len(times), rate


def times_of(path: str | os.PathLike) -> tuple[np.ndarray, float]:
    """(float64[frames], frames per second): when each frame is shown, seconds from the start of the
    video, or NaN where it does not say. Of its packets, without decoding.

    Raises: as `measure`.
    """
    with _opened(path) as (container, stream):
        origin = stream.start_time or 0
        ticks = [math.nan if packet.pts is None else packet.pts - origin
                 for packet in container.demux(stream) if packet.size and not packet.is_discard]
        count = len(ticks)
        rate = stream.average_rate or stream.guessed_rate
        if not rate:
            raise VideoError(f"{path} does not say how many frames per second it has.")
        # Of Matroska and WebM what is there can be read when the end is missing.
        seconds = (container.duration or 0) / av.time_base
        if "matroska" in container.format.name and count / rate < 0.9 * seconds - 0.5:
            raise VideoError(f"{path} is cut: it has {float(count / rate):.1f} of {seconds:.1f} s.")
        return np.sort(np.array(ticks) * float(stream.time_base)), float(rate)


def jpegs(path: str | os.PathLike, frames: Sequence[int], size: int) -> list[bytes]:
    """The frames with these numbers as JPEGs of size x size pixels.

    Args:
      path: the file.
      frames: ascending numbers, from 0.
      size: height and width in pixels.

    Raises:
      UserError: there is no such file.
      VideoError: it is not a video, is damaged, or has fewer frames.
      UserError: the numbers do not ascend from 0.
    """
    return _encode(_numbered(path, frames), size)


def jpegs_at(path: str | os.PathLike, times: Sequence[float], size: int) -> list[bytes]:
    """The frames that are shown at these times as JPEGs of size x size pixels.

    Args:
      path: the file; decoding starts at the key frame before the first time.
      times: ascending seconds from the start of the video.
      size: height and width in pixels.

    Raises:
      UserError: there is no such file.
      VideoError: it is not a video, is damaged, or ends before the last time.
      UserError: the times do not ascend from 0.
    """
    return _encode(_shown(path, times), size)


def _numbered(path, frames: Sequence[int]) -> Iterator[av.VideoFrame]:
    _check(path, frames)
    decoded = _frames(path, 0.0)
    index, frame = -1, None
    for number in frames:
        while index < number:
            _, frame = next(decoded, (0, None))
            if frame is None:
                raise VideoError(f"{path} has {index + 1} frames, frame {number} is wanted.")
            index += 1
        yield frame


def _shown(path, times: Sequence[float]) -> Iterator[av.VideoFrame]:
    _check(path, times)
    if not len(times):
        return
    decoded = _frames(path, float(times[0]))
    start, frame = next(decoded, (math.inf, None))
    if start > times[0] + TOLERANCE:  # Some containers seek to a later key frame.
        decoded = _frames(path, 0.0)
        start, frame = next(decoded, (0.0, None))
    if math.isnan(start):
        raise VideoError(f"{path}: its frames have no times.")
    following = next(decoded, None)
    for time in times:
        while following and following[0] <= time + TOLERANCE:
            if not following[0] > start:
                raise VideoError(f"{path}: the times of its frames do not ascend.")
            (start, frame), following = following, next(decoded, None)
        duration = float((frame.duration or 0) * frame.time_base) if frame else 0.0
        if frame is None or not following and time > start + 1.5 * duration + TOLERANCE:
            raise VideoError(f"{path} ends at {start + duration:.2f} s, {time:.2f} s is wanted.")
        yield frame


def _check(path, wanted: Sequence[float]):
    if not (np.diff(wanted, prepend=0) >= -TOLERANCE).all():
        raise UserError(f"{path}: frame numbers and times must ascend from 0.")


def _frames(path, start: float) -> Iterator[tuple[float, av.VideoFrame]]:
    """(seconds, frame) from the key frame before `start` on."""
    with _opened(path) as (container, stream):
        stream.codec_context.thread_count = 1  # Workers are processes.
        origin = stream.start_time or 0
        if start > 0:
            container.seek(origin + int(start / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            ticks = math.nan if frame.pts is None else frame.pts - origin
            yield float(ticks * stream.time_base), frame


def _encode(frames: Iterable[av.VideoFrame], size: int) -> list[bytes]:
    reformatter = VideoReformatter()  # Keeps its scaler from frame to frame.
    encoded, last = [], None
    for frame in frames:
        if frame is not last:
            last = frame
            small = reformatter.reformat(
                frame, size, size, "rgb24", interpolation=SCALING, threads=1)
            jpeg = encode_jpeg(np.rot90(small.to_ndarray(), frame.rotation // 90))
        encoded.append(jpeg)
    return encoded


@contextlib.contextmanager
def _opened(path):
    """(container, its video stream); FFmpeg's errors become ours."""
    try:
        # A title that is not UTF-8 is no reason to fail.
        with av.open(os.fspath(path), metadata_errors="replace") as container:
            stream = container.streams.best("video")
            if stream is None or stream.codec_context is None:
                raise VideoError(f"{path} has no video stream that can be decoded.")
            yield container, stream
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist.") from error
    except av.error.FFmpegError as error:
        raise VideoError(
            f"{path} is not a video that FFmpeg reads, or is damaged: {error}") from error
