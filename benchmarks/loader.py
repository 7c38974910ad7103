"""Batches of clips: jaxvp, and beside it the same episodes as mp4, and plain TFDS.

    python benchmarks/loader.py --json=benchmarks/results/loader_cpu.json

makes episodes of two cameras in a temporary folder (moving textured pictures of 256 x 256 pixels,
30 steps a second, 25 kB each as JPEG of quality 95) and draws clips of 16 frames, 10 a second, at
random steps of them. Each side runs in a process of its own, which it has to itself, in turns:
ABCABC, each with the same number of threads. All files are in the page cache.

jaxvp: `Mixture.train`, the way training reads.
mp4: the layout of LeRobot v3, one file of a camera for all episodes, encoded as LeRobot does (AV1,
a key frame at every second frame, crf 30). Read as LeRobot does with PyAV: a file is opened for
every clip, decoded from the key frame before the clip to its end, and all frames become RGB. What
LeRobot does beyond that, to float32, is left out.
tfds: `tfds.builder_from_directory(...).as_data_source("train")[i]["steps"][k]` for the steps of the
clip.

Frames are counted once: past the end of an episode a clip repeats the last.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np
from result import hardware, save

from jaxvp.versions import versions

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("jaxvp", "mp4", "tfds")
CAMERAS = ("head", "wrist")
SIZE, FPS, FRAMES = 256, 30, 16
DATASET, VIDEO = "rlds/1.0.0", "videos/observation.images.{}/chunk-000/file-000.mp4"


def texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """uint8[size, size, 3]: patches, grain and fine grain."""
    layers = [
        cv2.resize(rng.normal(0, strength, (size // cell, size // cell, 3)).astype(np.float32),
                   (size, size), interpolation=cv2.INTER_CUBIC)
        for cell, strength in ((64, 60), (8, 25), (4, 15))
    ]
    return np.clip(sum(layers) + 128, 0, 255).astype(np.uint8)


def pictures(episode: int, camera: str, steps: int):
    """uint8[256, 256, 3] of every step: the camera moves, and something before it."""
    rng = np.random.default_rng([episode, CAMERAS.index(camera)])
    background, thing = texture(rng, 4 * SIZE), texture(rng, SIZE // 2)
    for step in range(steps):
        top, left = (round(1.5 * SIZE * (1 + np.sin(step * speed))) for speed in (0.011, 0.007))
        image = background[top : top + SIZE, left : left + SIZE].copy()
        top, left = (round(SIZE / 4 * (1 + np.sin(step * speed))) for speed in (0.05, 0.08))
        image[top : top + SIZE // 2, left : left + SIZE // 2] = thing
        yield image


def make(folder: Path, options: argparse.Namespace):
    """Writes the episodes as RLDS and as videos."""
    os.environ["SVT_LOG"] = "1"  # The encoder is quiet.
    import av

    from data_builders import episode, images, writer
    from data_builders.builder import Builder

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Pictures(Builder):
        """Moving textured pictures."""

        name: ClassVar[str] = "pictures"
        version: ClassVar[str] = "1.0.0"
        items_per_shard: ClassVar[int] = 8

        def features(self):
            names = [f"d{i}" for i in range(8)]
            return episode.features(dict.fromkeys(CAMERAS, (SIZE, SIZE)), names, names)

        def items(self):
            return list(range(options.episodes))

        def build(self, item):
            columns = np.random.default_rng(item).normal(size=(2, options.steps, 8))
            yield episode.Episode(
                dataset=self.name, episode_id=str(item), robot="robot", camera_text="two views",
                images={camera: [images.encode_jpeg(image) for image in
                                 pictures(item, camera, options.steps)] for camera in CAMERAS},
                state=columns[0], action=columns[1], instruction="put the cup on the plate",
                fps=float(FPS), source="made", options=self.options())

    builder = Pictures(val_fraction=0.0)
    items = builder.items()
    incomplete = writer.open_folder(builder, items, folder / "rlds")
    shards = writer.make_shards(builder, items)
    for shard in shards:
        writer.write_shard(builder, shard, incomplete)
    writer.finish(builder, shards, incomplete)
    for camera in CAMERAS:
        path = folder / VIDEO.format(camera)
        path.parent.mkdir(parents=True)
        with av.open(str(path), "w") as container:
            stream = container.add_stream(options.codec, FPS, options={"g": "2", "crf": "30"})
            stream.width = stream.height = SIZE
            stream.pix_fmt = "yuv420p"
            for item in items:
                for image in pictures(item, camera, options.steps):
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
            container.mux(stream.encode())


def config(folder: Path, options: argparse.Namespace):
    from jaxvp.data.sources import DataConfig
    from jaxvp.data.spec import Window

    return DataConfig(sources=({"path": str(folder / DATASET)},), image_size=SIZE, cameras=CAMERAS,
                      window=Window(fps=options.fps, future=FRAMES - 1, chunk=FRAMES),
                      layout="single", num_threads=options.threads)


def jaxvp_batches(folder: Path, options: argparse.Namespace):
    """(uint8[B, V, T, H, W, 3], number of frames of one view that are no repetitions)."""
    from jaxvp.data.mixture import Mixture

    data = Mixture(config(folder, options))
    for batch in data.train(data.spec.window, options.batch, seed=0):
        yield batch["video"], int(batch["frame_mask"].sum())


def in_batches(read, options: argparse.Namespace):
    """As `jaxvp_batches`: read(episode, steps) gives [V, T, H, W, 3]."""
    rng, offsets = np.random.default_rng(0), np.arange(FRAMES) * FPS / options.fps
    offsets, last = np.floor(offsets + 0.5).astype(int), options.steps - 1

    def clip(start: int):
        steps = start % options.steps + offsets
        return read(start // options.steps, np.minimum(steps, last)), int((steps <= last).sum())

    with ThreadPoolExecutor(options.threads) as pool:
        def submit():
            starts = rng.integers(0, options.episodes * options.steps, options.batch)
            return [pool.submit(clip, int(start)) for start in starts]

        ahead = submit()
        while True:
            jobs, ahead = ahead, submit()
            clips, counts = zip(*(job.result() for job in jobs), strict=True)
            yield np.stack(clips), sum(counts)


def mp4_batches(folder: Path, options: argparse.Namespace):
    import av

    def view(camera: str, times: np.ndarray) -> np.ndarray:
        with av.open(str(folder / VIDEO.format(camera))) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            container.seek(int(times[0] / stream.time_base), stream=stream)
            images, loaded = [], []
            for frame in container.decode(stream):
                images.append(frame.to_ndarray(format="rgb24"))
                loaded.append(frame.time)
                if frame.time >= times[-1] - 1e-6:
                    break
        nearest = np.abs(times[:, None] - np.array(loaded)).argmin(1)
        return np.stack([images[i] for i in nearest])

    def read(episode: int, steps: np.ndarray) -> np.ndarray:
        times = (episode * options.steps + steps) / FPS
        return np.stack([view(camera, times) for camera in CAMERAS])

    return in_batches(read, options)


def tfds_batches(folder: Path, options: argparse.Namespace):
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory(folder / DATASET).as_data_source("train")

    def read(episode: int, steps: np.ndarray) -> np.ndarray:
        record = source[episode]["steps"]
        loaded = [record[int(step)]["observation"] for step in steps]
        return np.stack([[images[camera] for images in loaded] for camera in CAMERAS])

    return in_batches(read, options)


def run_side(options: argparse.Namespace) -> dict:
    """Times one side; what it prints is its result."""
    batches = globals()[f"{options.side}_batches"](options.data, options)
    first = next(batches)[0][0].copy()
    startup = time.time() - options.started
    for _ in range(4):  # What was made ahead while nobody took anything.
        next(batches)
    frames, clips, start, cpu = 0, 0, time.perf_counter(), time.process_time()
    while clips < options.clips:
        video, count = next(batches)
        frames, clips = frames + count * len(CAMERAS), clips + len(video)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = peak_rss()
    check(first, options)
    return {"seconds": seconds, "frames": frames, "clips": clips, "cpu_seconds": cpu,
            "startup_seconds": startup, "peak_rss_bytes": peak}


def peak_rss() -> int:
    """In bytes, of this process alone: `resource` gives the parent's when that was larger."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def check(clip: np.ndarray, options: argparse.Namespace):
    """Raises AssertionError when uint8[V, T, H, W, 3] is no clip of the episodes."""
    offset = round(FPS / options.fps * 2)
    for episode in range(options.episodes):
        truth = [list(pictures(episode, camera, options.steps)) for camera in CAMERAS]
        errors = [np.abs(image[::4, ::4].astype(int) - clip[0, 0, ::4, ::4]).mean()
                  for image in truth[0]]
        step = int(np.argmin(errors))
        if errors[step] < 8:
            later = min(step + offset, options.steps - 1)
            pairs = [(clip[1, 0], truth[1][step]), (clip[0, 2], truth[0][later]),
                     (clip[1, 2], truth[1][later])]
            assert all(np.abs(a.astype(int) - b).mean() < 8 for a, b in pairs), (episode, step)
            return
    raise AssertionError("no step of no episode shows the first picture")


def side(name: str, folder: Path, options: argparse.Namespace) -> dict:
    """Runs one side in a process; what it printed last is its result."""
    command = [sys.executable, __file__, f"--side={name}", f"--data={folder}",
               f"--started={time.time()}"]
    command += [f"--{key}={getattr(options, key)}" for key in (
        "episodes", "steps", "fps", "clips", "batch", "threads")]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True,
                            env={**os.environ, "PYTHONPATH": str(ROOT)})
    if result.returncode:
        sys.exit(f"error: the side {name!r} stopped with status {result.returncode}.")
    return json.loads(result.stdout.splitlines()[-1])


def compare(folder: Path, options: argparse.Namespace) -> dict:
    """All sides in turns, as the JSON of the result."""
    from jaxvp.data.mixture import Mixture

    make(folder, options)
    start = time.perf_counter()
    Mixture(config(folder, options))
    index_seconds = time.perf_counter() - start
    load = os.getloadavg()[0]
    turns = {name: [] for name in SIDES}
    for _ in range(options.turns):
        for name in SIDES:
            turns[name].append(side(name, folder, options))
    sizes = [sum(file.stat().st_size for file in (folder / part).rglob("*.*") if file.is_file())
             for part in ("rlds", "videos")]
    frames = options.episodes * options.steps * len(CAMERAS)
    result = {
        "benchmark": "loader", "episodes": options.episodes, "steps_per_episode": options.steps,
        "cameras": len(CAMERAS), "image_size": SIZE, "frames_per_clip": FRAMES,
        "dataset_fps": FPS, "clip_fps": options.fps, "batch": options.batch,
        "threads": options.threads, "codec": options.codec,
        "jpeg_bytes_per_frame": sizes[0] / frames, "mp4_bytes_per_frame": sizes[1] / frames,
        "index_and_statistics_seconds": index_seconds, "load_before": load,
        "load_after": os.getloadavg()[0],
        "hardware": hardware(),
        "versions": versions("grain", "numpy", "simplejpeg", "opencv-python-headless", "av",
                             "tensorflow-datasets", "array-record")}
    for name, found in turns.items():
        total = {key: sum(turn[key] for turn in found)
                 for key in ("seconds", "frames", "clips", "cpu_seconds")}
        result[name] = {
            "frames_per_second": total["frames"] / total["seconds"],
            "clips_per_second": total["clips"] / total["seconds"],
            "cpu_seconds_per_clip": total["cpu_seconds"] / total["clips"],
            "startup_seconds": min(turn["startup_seconds"] for turn in found),
            "peak_rss_bytes": max(turn["peak_rss_bytes"] for turn in found)}
    for name in SIDES[1:]:
        rates = [result[which]["frames_per_second"] for which in ("jaxvp", name)]
        result[f"ratio_{name}"] = rates[0] / rates[1]
    return result


def main(argv: list[str]):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--episodes", type=int, default=16)
    parser.add_argument("--steps", type=int, default=600, help="of an episode")
    parser.add_argument("--fps", type=float, default=10, help="of clips; 30: every frame")
    parser.add_argument("--clips", type=int, default=256, help="timed in a turn")
    parser.add_argument("--turns", type=int, default=2, help="of each side")
    parser.add_argument("--batch", type=int, default=8, help="clips")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--codec", default="libsvtav1", choices=("libsvtav1", "libx264"))
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.side:
        print(json.dumps(run_side(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        save(compare(Path(folder), options), options.json)


if __name__ == "__main__":
    main(sys.argv[1:])
