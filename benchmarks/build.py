"""Conversion of robot video to RLDS: three cameras, H.264 of 640 x 480 in, JPEG of 256 x 256 out.

    python benchmarks/build.py --json=benchmarks/results/build_cpu.json

It makes its own raw data in a temporary folder: textured pictures that move, with the noise of a
sensor, one MP4 per camera and episode beside the states and actions. Then it converts them as
`python -m data_builders.build` does, --turns times, start and end of the processes included.
"""

import argparse
import dataclasses
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import av
import cv2
import numpy as np
from result import hardware, save

from data_builders import build, builder, episode, video
from jaxvp.versions import versions

CAMERAS = ("head", "left_wrist", "right_wrist")
HEIGHT, WIDTH, FPS, STEPS, JOINTS = 480, 640, 30, 200, 14
DISTINCT = 3  # Episodes that are encoded; the others are copies.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Builder(builder.RawBuilder):
    """The raw data of this benchmark: RAW/<episode>/{columns.npz, <camera>.mp4}."""

    name = "benchmark"
    version = "1.0.0"
    items_per_shard = 2

    def features(self):
        names = [f"joint_{joint} [rad]" for joint in range(JOINTS)]
        return episode.features(
            dict.fromkeys(CAMERAS, (self.image_size, self.image_size)), names, names)

    def items(self) -> list[str]:
        return sorted(path.name for path in self.path().iterdir())

    def build(self, item: str):
        with np.load(self.path(item, "columns.npz")) as file:
            state, action = file["state"], file["action"]
        paths = {camera: self.path(item, f"{camera}.mp4") for camera in CAMERAS}
        frames = {camera: video.measure(path)[0] for camera, path in paths.items()}
        length, notes = episode.shortest(states=len(state), **frames)
        self.admit(length, FPS, len(paths))
        steps = self.kept(length, FPS, action[:length])
        yield episode.Episode(
            dataset=self.name,
            episode_id=item,
            robot="two arms",
            images={camera: video.jpegs(path, steps, self.image_size)
                    for camera, path in paths.items()},
            camera_text="a head view and two wrist views",
            state=state[steps],
            action=episode.accumulate(action[:length], steps),
            instruction="stack the cups",
            fps=self.rate(FPS),
            source=item,
            options=self.options(),
            notes=notes,
        )


def texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """float32[height, width, 3] with detail of every size, 0 to 255."""
    image = np.zeros((height, width, 3), np.float32)
    for size in (4, 8, 16, 32, 64, 128):
        coarse = rng.random((height // size + 2, width // size + 2, 3), np.float32)
        image += size**0.5 * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return 255 * (image - image.min()) / (image.max() - image.min())


def write_video(path: Path, rng: np.random.Generator):
    """A background that pans under two objects that circle, and noise of two grey levels."""
    background, objects = texture(rng, HEIGHT + 60, WIDTH + 200), texture(rng, 120, 240)
    noise = rng.normal(0, 2, (HEIGHT + 64, WIDTH + 64, 3)).astype(np.float32)
    with av.open(str(path), "w") as container:
        options = {"preset": "veryfast", "crf": "18"}
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for step in range(STEPS):
            y, x = step * 50 // STEPS, step * 190 // STEPS
            picture = background[y : y + HEIGHT, x : x + WIDTH].copy()
            for number in range(2):
                angle = step / 15 + 2 * number
                y, x = int(180 + 150 * np.sin(angle)), int(260 + 220 * np.cos(angle))
                picture[y : y + 120, x : x + 120] = objects[:, 120 * number : 120 * number + 120]
            y, x = rng.integers(0, 64, 2)
            picture += noise[y : y + HEIGHT, x : x + WIDTH]
            frame = av.VideoFrame.from_ndarray(picture.clip(0, 255).astype(np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def make_raw(folder: Path, episodes: int):
    for number in range(episodes):
        target = folder / f"{number:04d}"
        if number >= DISTINCT:
            shutil.copytree(folder / f"{number % DISTINCT:04d}", target)
            continue
        target.mkdir(parents=True)
        rng = np.random.default_rng(number)
        columns = rng.normal(size=(2, STEPS, JOINTS)).cumsum(1).astype(np.float32)
        np.savez(target / "columns.npz", state=columns[0], action=columns[1])
        for camera in CAMERAS:
            write_video(target / f"{camera}.mp4", rng)


def size_of(folder: Path) -> float:
    """Megabytes of its files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def measure(settings: argparse.Namespace) -> dict:
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        raw, seconds = Path(folder, "raw"), []
        make_raw(raw, settings.episodes)
        maker = Builder(raw=str(raw))
        for turn in range(settings.turns):
            start = time.monotonic()
            made, report = build.build(
                maker, maker.items(), Path(folder, f"out{turn}"), settings.num_workers)
            seconds.append(time.monotonic() - start)
        assert report.kept == settings.episodes and report.steps == STEPS * settings.episodes
        frames, median = report.steps * len(CAMERAS), statistics.median(seconds)
        return {
            "benchmark": "build",
            "raw": f"{settings.episodes} episodes of {STEPS} steps, {len(CAMERAS)} cameras, "
                   f"H.264 {WIDTH} x {HEIGHT}, {FPS} fps",
            "num_workers": settings.num_workers,
            "frames": frames,
            "seconds": [round(value, 2) for value in seconds],
            "frames_per_second": round(frames / median, 1),
            "episodes_per_second": round(settings.episodes / median, 2),
            "raw_megabytes": round(size_of(raw), 1),
            "rlds_megabytes": round(size_of(made), 1),
            "load_before": [round(value, 2) for value in load],
            "hardware": hardware(),
            "versions": versions("av", "opencv-python-headless", "tensorflow-datasets",
                                 "array-record", "protobuf"),
        }


def main(argv: list[str]):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--episodes", type=int, default=24)
    parser.add_argument("--num_workers", type=int, default=2, help="processes")
    parser.add_argument("--turns", type=int, default=3, help="the median counts")
    parser.add_argument("--json", type=Path, help="file for the result")
    settings = parser.parse_args(argv)
    save(measure(settings), settings.json)


if __name__ == "__main__":
    main(sys.argv[1:])
