"""Do LIBERO's demonstrations replay? The check of every convention: gripper, actions, states.

    python benchmarks/libero_replay.py --raw=DIR --json=benchmarks/results/libero_replay.json

DIR/<suite>/<task>_demo.hdf5 are demonstrations in either layout. For each of them:
  states   every recorded state is set and rendered by the cameras, and the last recorded action
           is done in the last recorded state: the task's predicate must hold then;
  actions  the actions, through jaxvp's float32 and its gripper convention, start from the first
           recorded state: does the task's predicate hold at the end?
How long it takes is in the JSON.
"""

import argparse
import json
import multiprocessing
import os
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import h5py
import rich
from result import hardware
from rich import progress, table

from jaxvp.envs import libero
from jaxvp.evaluation.suites.libero import simulator
from jaxvp.files import find
from jaxvp.versions import versions

FLAT = 5.0  # A picture whose standard deviation is below this many grey levels shows nothing.


def replay_task(settings: argparse.Namespace, path: Path, events) -> dict:
    """Replays the demonstrations of one file; puts one event per demonstration."""
    task = path.name.removesuffix("_demo.hdf5")
    env = libero.LiberoEnv(path.parent.name, task, settings.image_size, "180")
    row = {"task": task, "demonstrations": 0, "states": 0, "rendered": 0, "ends_solved": 0}
    row |= {"actions": 0, "replays_solved": 0, "seconds_states": 0.0, "seconds_actions": 0.0}
    with h5py.File(path) as file:
        for name in libero.demonstration_names(file)[: settings.max_demonstrations]:
            states, actions = libero.demonstration(file["data"][name])
            start = time.monotonic()
            solved = False
            env.reset(states[0])
            for action in actions:
                _, solved = env.step(action)
            middle = time.monotonic()
            for state in states:
                images = env.set_state(state)["images"]
                row["rendered"] += all(images[c].std() > FLAT for c in settings.cameras)
            row["ends_solved"] += env.step(actions[-1])[1]
            row["demonstrations"] += 1
            row["replays_solved"] += solved
            row["states"] += len(states)
            row["actions"] += len(actions)
            row["seconds_actions"] += middle - start
            row["seconds_states"] += time.monotonic() - middle
            events.put(name)
    env.close()
    return row


def replay(settings: argparse.Namespace, files: list[Path]) -> list[dict]:
    """All files, `num_workers` at a time."""
    total = 0
    for path in files:
        with h5py.File(path) as file:
            total += len(libero.demonstration_names(file)[: settings.max_demonstrations])
    bar = progress.Progress(*progress.Progress.get_default_columns(), progress.MofNCompleteColumn())
    task = bar.add_task("demonstrations", total=total)
    with multiprocessing.get_context("spawn").Manager() as manager, bar:
        events = manager.Queue()

        def count():
            while events.get() is not None:
                bar.advance(task)

        counter = threading.Thread(target=count)
        counter.start()
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(settings.num_workers, context) as pool:
            try:
                jobs = [pool.submit(replay_task, settings, path, events) for path in files]
                return [job.result() for job in jobs]
            finally:
                pool.shutdown(cancel_futures=True)
                events.put(None)
                counter.join()


def report(rows: list[dict]):
    """Prints one line per task and their sum."""
    view = table.Table("task", "demos", "states", "rendered", "ends solved", "replays solved")
    total = {key: sum(row[key] for row in rows) for key in rows[0] if key != "task"}
    for row in [*rows, {"task": "all"} | total]:
        demos = row["demonstrations"]
        shares = (row["rendered"] / row["states"], row["ends_solved"] / demos)
        shares += (row["replays_solved"] / demos,)
        view.add_row(row["task"], str(demos), str(row["states"]), *(f"{x:.1%}" for x in shares))
    rich.print(view)


def main(argv: list[str]):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--raw", type=Path, required=True, help="<suite>/<task>_demo.hdf5")
    parser.add_argument("--suite", default="libero_object", choices=libero.SUITES)
    parser.add_argument("--cameras", nargs="+", default=[*libero.CAMERAS], choices=libero.CAMERAS)
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--max_tasks", type=int)
    parser.add_argument("--max_demonstrations", type=int, help="of each task")
    parser.add_argument("--num_workers", type=int, default=2, help="processes")
    parser.add_argument("--json", type=Path, help="file for the result")
    settings = parser.parse_args(argv)
    libero.setup()
    # One thread per process renders fastest when the processes use every core.
    os.environ.setdefault("LP_NUM_THREADS", "0")
    files = find(settings.raw / settings.suite, "*_demo.hdf5")[: settings.max_tasks]
    if not files:
        raise FileNotFoundError(f"{settings.raw}/{settings.suite} has no *_demo.hdf5.")
    start = time.monotonic()
    rows = replay(settings, files)
    report(rows)
    if settings.json:
        result = {
            "benchmark": "libero_replay",
            "seconds": round(time.monotonic() - start, 1),
            "num_workers": settings.num_workers,
            "image_size": settings.image_size,
            "cameras": settings.cameras,
            "hardware": hardware(), "versions": versions("numpy"),
            "simulator": simulator(),
            "tasks": rows,
        }
        settings.json.parent.mkdir(parents=True, exist_ok=True)
        settings.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
