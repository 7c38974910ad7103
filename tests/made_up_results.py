"""Made-up evaluations with real files, for tests of the report."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np

from jaxvp.evaluation import report
from jaxvp.evaluation.suites.tabletop import TabletopSuite
from jaxvp.video import write_video

TASKS = {"lift_tray": "lift the tray", "red_on_plate": "put the red block on the plate"}
LATENCY = {"preprocess": report.latency([0.001, 0.002]), "act": report.latency([0.04] * 9 + [0.1]),
           "simulator": report.latency([0.01] * 50)}


def protocol(tasks, trials):
    rules = TabletopSuite("tabletop").protocol
    return dataclasses.replace(rules, tasks=tuple(tasks), trials=trials)


def row(task, trial, success, **changes):
    """One without files."""
    return {"task": task, "instruction": TASKS.get(task, task), "trial": trial, "success": success,
            "steps": 20 + trial, "wall_s": 1.5, "restarts": 0, "video": None, "imagined": None,
            "trace": None} | changes


def outcomes(tasks, trials, share, seed=0):
    """(task, trial) to success."""
    draws = np.random.default_rng(seed).random((len(tasks), trials)) < share
    return {(task, trial): bool(draws[number, trial])
            for number, task in enumerate(tasks) for trial in range(trials)}


def results(success, tasks=None, **changes):
    """What results.json says, of episodes without files.

    Args:
      success: (task, trial) to success.
      tasks: their instructions.
      changes: other entries.
    """
    tasks = tasks or {task: TASKS[task] for task, _ in success}
    rows = [row(task, trial, done, instruction=tasks[task])
            for (task, trial), done in success.items()]
    trials = len(rows) // len(tasks)
    about = {"policy": "random", "bundle": None, "seed": 0, "num_envs": 2, "workers": 2,
             "wall_time_s": 1.5,
             "latency": LATENCY} | changes
    return report.results(protocol(tasks, trials), rows, **about)


def video(frames, value, size=(24, 16)):
    """A block that moves over a plain ground."""
    pixels = np.full((frames, *size, 3), value, np.uint8)
    for number, frame in enumerate(pixels):
        x = number * (size[1] - 4) // frames
        frame[size[0] // 2:size[0] // 2 + 4, x:x + 4] = 230, 60, 40
    return pixels


def trace(steps, names=("x [m]", "gripper [0 closed .. 1 open]"), call_every=4):
    wave = np.sin(np.linspace(0, 6, steps)[:, None] + np.arange(len(names))).tolist()
    return {"action": {"names": names, "values": wave},
            "state": {"names": names[:1], "values": [[0.9 * values[0]] for values in wave]},
            "calls": list(range(0, steps, call_every))}


def add_files(out: Path, found, imagined=True, traced=True, frames=5):
    """Gives every episode its files."""
    (out / "made").mkdir(parents=True)
    kinds = {"video": video(frames, 60), "imagined": video(frames, 110)}
    for name, pixels in kinds.items():
        write_video(out / "made" / f"{name}.mp4", pixels, 10)
    for episode in found["episodes"]:
        stem = f"{episode['task']}/{episode['trial']:03d}"
        for name, folder, wanted in (("video", "videos", True), ("imagined", "imagined", imagined)):
            if wanted:
                episode[name] = f"{folder}/{stem}.mp4"
                (out / episode[name]).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(out / "made" / f"{name}.mp4", out / episode[name])
        if traced:
            episode["trace"] = f"traces/{stem}.json"
            (out / episode["trace"]).parent.mkdir(parents=True, exist_ok=True)
            (out / episode["trace"]).write_text(json.dumps(trace(episode["steps"])))
    return found
