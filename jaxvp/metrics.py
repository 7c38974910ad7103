"""Numbers, images and videos of a run: console, TensorBoard and `<workdir>/metrics.jsonl`."""

import collections
import io
import json
import math
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import rich
import tensorboardX
from etils import epath
from PIL import Image
from rich import progress
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
        kept = _rows_until(path, start) if path.exists() else []
        path.write_text("".join(kept))
        self._file = path.open("a")
        self._board = tensorboardX.SummaryWriter(str(path.parent / "tensorboard"),
                                                 purge_step=start + 1 if start else None)
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

    def image(self, step: int, name: str, image: np.ndarray):
        """Writes uint8[H, W, 3] to TensorBoard."""
        if self._active:
            self._show(step, name, np.asarray(image)[None], 1.0)

    def video(self, step: int, name: str, video: np.ndarray, fps: float):
        """Writes uint8[T, H, W, 3] to TensorBoard, as a GIF that repeats."""
        if self._active:
            self._show(step, name, np.asarray(video), fps)

    def close(self):
        """Returns when everything is written."""
        if not self._active:
            return
        self._bar.stop()
        self._worker.shutdown()
        self._board.close()
        self._file.close()
        self._raise_failures()

    def _show(self, step: int, name: str, frames: np.ndarray, fps: float):
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise ValueError(f"{name}: expected uint8 RGB frames [T, H, W, 3], found "
                             f"{frames.dtype}{list(frames.shape)}.")
        self._submit(self._write_frames, step, name, frames, fps)

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
        for name, value in metrics.items():
            if math.isfinite(value):
                self._board.add_scalar(name, value, step)

    def _write_frames(self, step: int, name: str, frames: np.ndarray, fps: float):
        images, data = [Image.fromarray(frame) for frame in frames], io.BytesIO()
        if len(images) == 1:
            images[0].save(data, "PNG")
        else:
            images[0].save(data, "GIF", save_all=True, append_images=images[1:], loop=0,
                           duration=round(1000 / fps))
        image = Summary.Image(height=frames.shape[1], width=frames.shape[2], colorspace=3,
                              encoded_image_string=data.getvalue())
        summary = Summary(value=[Summary.Value(tag=name, image=image)])
        self._board.file_writer.add_summary(summary, step)


def _rows_until(path: epath.Path, step: int) -> list[str]:
    """Lines of a metrics file up to a step; half a line, of a run that was killed, is dropped."""
    rows = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["step"] <= step:
            rows.append(line)
    return rows
