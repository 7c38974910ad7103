"""Do all tasks of LIBERO and LIBERO-PRO start and move? One line a suite.

    python benchmarks/libero_reset.py --json=benchmarks/results/libero_reset.json

Each task is reset from its first official initial state and moved for a few steps; one image of
each camera is rendered. A task counts when its state is the official one after the reset, when its
images show something, when it moves and when it is not solved by doing nothing. The file is written
after every suite; suites that it has, whole and of the same simulator, are not done again.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from result import hardware
from rich.console import Console

from jaxvp.envs import libero
from jaxvp.evaluation.suites.libero import simulator
from jaxvp.versions import versions

FLAT = 5.0  # A picture whose standard deviation is below this many grey levels shows nothing.
STEPS = 5
FORWARD = np.array([1, 0, 0, 0, 0, 0, 1], np.float32)


def try_task(suite: str, task: str) -> str:
    """What is wrong with a task; "" for nothing."""
    env = libero.LiberoEnv(suite, task, image_size=64)
    try:
        start = libero.init_states(suite, task)[0]
        first = env.reset(start)
        shown = {camera: image.std() for camera, image in first["images"].items()}
        found = env._env.sim.get_state().flatten()
        for _ in range(STEPS):
            last, solved = env.step(FORWARD)
        faults = {
            "another state": not np.array_equal(found, start),
            "no picture": min(shown.values()) < FLAT,
            "no motion": np.abs(last["state"] - first["state"])[:3].max() < 0.01,
            "state is not finite": not np.isfinite(last["state"]).all(),
            "solved by nothing": solved,
        }
        return ", ".join(name for name, present in faults.items() if present)
    finally:
        env.close()


def main(argv: list[str]):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--suites", nargs="+", default=[*libero.SUITES], choices=libero.SUITES)
    parser.add_argument("--max_tasks", type=int, help="of each suite")
    parser.add_argument("--json", type=Path, help="file for the result")
    settings = parser.parse_args(argv)
    libero.setup()
    console = Console()
    for suite in settings.suites:
        begin, faults = time.monotonic(), {}
        tasks = libero.tasks(suite)[: settings.max_tasks]
        if read(settings.json).get(suite, {"tasks": 0})["tasks"] == len(tasks):
            continue
        for task in tasks:
            if fault := try_task(suite, task):
                faults[task] = fault
        row = {"tasks": len(tasks), "started": len(tasks) - len(faults), "faults": faults,
               "seconds": round(time.monotonic() - begin, 1)}
        console.print(suite, row, soft_wrap=True)
        if settings.json:
            write(settings.json, {**read(settings.json), suite: row})


def read(path: Path | None) -> dict:
    """Suite to row, of the suites that are done, by this simulator."""
    found = json.loads(path.read_text()) if path and path.exists() else {}
    return found["suites"] if found.get("simulator") == simulator() else {}


def write(path: Path, rows: dict):
    result = {
        "benchmark": "libero_reset", "steps": STEPS,
        "tasks": sum(row["tasks"] for row in rows.values()),
        "started": sum(row["started"] for row in rows.values()),
        "hardware": hardware(), "versions": versions("numpy"), "simulator": simulator(),
        "suites": {suite: rows[suite] for suite in libero.SUITES if suite in rows},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
