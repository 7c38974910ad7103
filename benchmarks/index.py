"""How long a large dataset takes to open, and its statistics; no image is decoded for either.

    python benchmarks/index.py --json=benchmarks/results/index_cpu.json

Writes 100,000 steps in a temporary folder (200 episodes, two cameras, images of a few bytes that
cannot be decoded), and times the index, made in the build, and the statistics. Then gives the
dataset the index of a million episodes, without their records, and times `Mixture.train`
with a resume in the middle, in a process of its own, whose peak memory it takes; statistics and
texts of the million are given.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
from result import hardware, save

from jaxvp.versions import versions

ROOT = Path(__file__).resolve().parents[1]
EPISODES, STEPS, MILLION = 200, 500, 1_000_000
OPEN = """
import json, re, sys, time
from jaxvp.data import checks, statistics
from jaxvp.data.mixture import Mixture
from jaxvp.data.sources import DataConfig
from jaxvp.data.spec import Window
# They read columns, once, and there are no records to read them of.
statistics.compute = lambda sources: {"robot": json.loads(sys.argv[2])}
checks.texts_of = lambda episodes: {"robot; two views; play"}
source = {"path": sys.argv[1], "min_seconds": 1.0, "validation_split": "",
          "validation_fraction": 0.01}
config = DataConfig(sources=(source,), window=Window(fps=10, future=15, chunk=16), image_size=256,
                    layout="single", cameras=("head", "wrist"))
start = time.perf_counter()
batches = Mixture(config).train(config.window, 8, 0)
batches.set_state({**batches.get_state(), "step": 10**6})
seconds = time.perf_counter() - start
peak = re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]
print(json.dumps({"million_open_seconds": seconds, "million_peak_rss_bytes": 1024 * int(peak)}))
"""


def make(out: Path) -> Path:
    from data_builders import build, episode
    from data_builders.builder import Builder

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Columns(Builder):
        """Random actions and states."""

        name: ClassVar[str] = "columns"
        version: ClassVar[str] = "1.0.0"

        def features(self):
            names = [f"d{i}" for i in range(14)]
            return episode.features({"head": (None, None), "wrist": (None, None)}, names, names)

        def items(self):
            return list(range(EPISODES))

        def build(self, item):
            columns = np.random.default_rng(item).normal(size=(2, STEPS, 14))
            yield episode.Episode(
                dataset=self.name, episode_id=str(item), robot="robot", camera_text="two views",
                images={camera: [b"no image"] * STEPS for camera in ("head", "wrist")},
                state=columns[0], action=columns[1], instruction="play", fps=30.0, source="made",
                options=self.options())

    builder, writer = Columns(val_fraction=0.0), build.writer
    folder = writer.open_folder(builder, builder.items(), out)
    shards = writer.make_shards(builder, builder.items())
    for shard in shards:
        writer.write_shard(builder, shard, folder)
    return writer.finish(builder, shards, folder)[0]


def simulate(folder: Path):
    """Gives the dataset the index of a million records, which are not there."""
    from jaxvp.data.record_index import Index, Texts

    (stored,) = (folder / ".jaxvp").glob("index-train-*")
    index = Index.load(stored)
    rows = np.resize(index.rows, MILLION)
    rows["number"] = rows["texts"]["episode_id"] = np.arange(MILLION)
    names = Texts.of([f"2024-03-01-12-00-00/episode_{i:07d}" for i in range(MILLION)])
    dataclasses.replace(index, rows=rows, texts=index.texts | {"episode_id": names}).save(stored)
    path = folder / "dataset_info.json"
    info = json.loads(path.read_text())
    shards = info["splits"][0]["shardLengths"]
    info["splits"][0]["shardLengths"] = [str(MILLION // len(shards))] * len(shards)
    path.write_text(json.dumps(info))


def measure(out: Path) -> dict:
    from jaxvp.data import rlds, statistics

    folder = make(out)
    start = time.perf_counter()
    episodes = rlds.Episodes(folder, "train")
    index = time.perf_counter() - start
    start = time.perf_counter()
    (normalizer,) = statistics.of_sources("min_max", [episodes]).values()
    seconds = time.perf_counter() - start
    simulate(folder)
    command = [sys.executable, "-c", OPEN, str(folder), json.dumps(normalizer.to_dict())]
    found = subprocess.run(command, capture_output=True, text=True, check=True,
                           env={**os.environ, "PYTHONPATH": str(ROOT)}).stdout
    return {
        "benchmark": "index", "steps": EPISODES * STEPS, "index_seconds": index,
        "statistics_seconds": seconds, **json.loads(found.splitlines()[-1]),
        "hardware": hardware(), "versions": versions("grain", "numpy", "array-record")}


def main(argv: list[str]):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--json", type=Path, help="file for the result")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        save(measure(Path(folder)), options.json)


if __name__ == "__main__":
    main(sys.argv[1:])
