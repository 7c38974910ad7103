"""Numbers, images and videos of a run: console, TensorBoard and `<workdir>/metrics.jsonl`."""

import collections
import io
import json
import math
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait

import jax
import numpy as np
import rich
from etils import epath
from PIL import Image
from rich import progress
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from jaxvp.errors import UserError


class NonFiniteError(UserError):
    """A metric is NaN or infinite; the message names it and the step."""


def check_finite(step: int, metrics: Mapping[str, float]):
    """Raises NonFiniteError when a metric (a number on the host) is not finite."""
    bad = {name: float(value) for name, value in metrics.items() if not math.isfinite(value)}
    if bad:
        values = ", ".join(f"{name} = {value}" for name, value in bad.items())
        raise NonFiniteError(
            f"Step {step}: {values}. Try a lower config.optimizer.learning_rate or a smaller "
            "clip_norm; the last checkpoint in the workdir is from before.")


class MetricWriter:
    """Writes in the background, on process 0 only; a failure is raised by the next call."""

    def __init__(self, workdir: epath.PathLike, total_steps: int, batch_size: int, start: int = 0):
        """Continues the files in `workdir` at step `start`; what they have after it is dropped.

        Args:
          workdir: the folder of the run.
          total_steps: length of the run, for the progress bar.
          batch_size: clips per step of all processes together.
          start: steps finished before.
        """
        self._active = jax.process_index() == 0
        if not self._active:
            return
        self._batch_size, self._step, self._time = batch_size, start, time.perf_counter()
        path = epath.Path(workdir) / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _keep_until(path, start)
        self._file = path.open("a")
        board = path.parent / "tensorboard"
        board.mkdir(exist_ok=True)
        # A name of its own for every start, also within a second.
        self._board = EventsWriter(f"{board}/{len(list(board.iterdir())):04d}.events")
        # TensorBoard leaves out what earlier files have from this step on.
        self._board.write_event(Event(step=start + 1, wall_time=time.time(),
                                      session_log=SessionLog(status=SessionLog.START)))
        self._worker, self._pending = ThreadPoolExecutor(1), collections.deque()
        console = rich.get_console()
        self._bar = progress.Progress(
            "[progress.description]{task.description}", progress.BarColumn(),
            progress.MofNCompleteColumn(), "{task.fields[status]}", progress.TimeElapsedColumn(),
            "<", progress.TimeRemainingColumn(), console=console,
            disable=not console.is_terminal)
        self._task = self._bar.add_task("train", total=total_steps, completed=start, status="")
        self._bar.start()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def advance(self, step: int):
        """Moves the progress bar to `step` finished steps."""
        if self._active:
            self._bar.update(self._task, completed=step)

    def scalars(self, step: int, metrics: Mapping[str, float]):
        """Writes numbers on the host and the clips per second since the last call."""
        if not self._active:
            return
        now = time.perf_counter()
        if step > self._step:
            rate = (step - self._step) * self._batch_size / (now - self._time)
            metrics = {**metrics, "clips_per_second": rate}
            self._step, self._time = step, now
        metrics = {name: float(value) for name, value in metrics.items()}
        status = "  ".join(f"{name.replace('_', ' ')} {x:.4g}" for name, x in metrics.items())
        self._bar.update(self._task, completed=step, status=status)
        if self._bar.disable:
            self._bar.console.print(f"step {step}  {status}", soft_wrap=True, highlight=False)
        self._submit(self._write_scalars, step, metrics, time.time())

    def video(self, step: int, name: str, video: np.ndarray, fps: float):
        """Writes uint8[T, H, W, 3] to TensorBoard, as a GIF that repeats."""
        if self._active:
            if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3:
                raise ValueError(f"{name}: expected uint8 RGB frames [T, H, W, 3], found "
                                 f"{video.dtype}{list(video.shape)}.")
            self._submit(self._write_video, step, name, video, fps)

    def flush(self):
        """Returns when everything so far is in the files: to be called before a checkpoint, after
        which a run that is killed continues."""
        if self._active:
            self._submit(self._board.flush)
            wait(self._pending)
            self._raise_failures()

    def close(self):
        """Returns when everything is written."""
        if not self._active:
            return
        self._bar.stop()
        self._worker.shutdown()
        self._board.close()
        self._file.close()
        self._raise_failures()

    def _submit(self, function, *arguments):
        self._raise_failures()
        self._pending.append(self._worker.submit(function, *arguments))

    def _raise_failures(self):
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()

    def _write_scalars(self, step: int, metrics: Mapping[str, float], when: float):
        # JSON has no NaN; the row that says so is the one that is looked for.
        values = {k: v if math.isfinite(v) else str(v) for k, v in metrics.items()}
        self._file.write(json.dumps({"step": step, "time": round(when, 3), **values}) + "\n")
        self._file.flush()
        self._write_summary(step, when, [
            Summary.Value(tag=name, simple_value=value)
            for name, value in metrics.items() if math.isfinite(value)])

    def _write_video(self, step: int, name: str, frames: np.ndarray, fps: float):
        images, data = [Image.fromarray(frame) for frame in frames], io.BytesIO()
        images[0].save(data, "GIF", save_all=True, append_images=images[1:], loop=0,
                       duration=round(1000 / fps))
        image = Summary.Image(height=frames.shape[1], width=frames.shape[2], colorspace=3,
                              encoded_image_string=data.getvalue())
        self._write_summary(step, time.time(), [Summary.Value(tag=name, image=image)])

    def _write_summary(self, step: int, when: float, values: list[Summary.Value]):
        self._board.write_event(Event(step=step, wall_time=when, summary=Summary(value=values)))


def _keep_until(path: epath.Path, step: int):
    """Drops the lines of a metrics file after a step, and half a line of a run that was killed."""
    text, rows = path.read_text(), []
    for line in text.splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["step"] <= step:
            rows.append(line)
    if (kept := "".join(rows)) != text:
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(kept)
        partial.replace(path)
