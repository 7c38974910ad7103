"""What an evaluation writes: results.json, report.html, videos.

    python -m jaxvp.evaluation.report --results=DIR --compare=OTHER --out=comparison.html

writes the report of a finished evaluation again, compared with another one of the same protocol.
docs/evaluation.md says how to read it, docs/results.schema.json what results.json holds.
"""

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags

from jaxvp import command
from jaxvp.errors import UserError, naming
from jaxvp.evaluation import compare, page
from jaxvp.evaluation.protocol import Protocol
from jaxvp.versions import versions

PACKAGES = ("jax", "jaxlib", "orbax-checkpoint", "numpy")


def wilson(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval (1927) of a success rate, 95 % for the default z.

    Unlike the normal approximation it is never empty and never leaves [0, 1], also for few trials
    and for rates of 0 and 1.

    Raises:
      UserError: not 0 <= successes <= trials, or no trials.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"An interval needs 0 <= successes <= trials, found {successes}/{trials}.")
    rate, correction = successes / trials, z * z / trials
    centre = rate + correction / 2
    half = z * math.sqrt(rate * (1 - rate) / trials + correction / (4 * trials))
    low, high = (centre - half) / (1 + correction), (centre + half) / (1 + correction)
    return max(0.0, low), min(1.0, high)


def hardware() -> str:
    """Where this runs."""
    return f"{os.cpu_count()} cores, {platform.machine()}, {jax.devices()[0].device_kind}"


def latency(seconds: Sequence[float]) -> dict | None:
    """Mean and percentiles of the calls of a stage, in milliseconds; None if it never ran."""
    if not len(seconds):
        return None
    return {
        "calls": len(seconds),
        "mean_ms": float(np.mean(seconds) * 1e3),
        **{f"p{q}_ms": float(np.percentile(seconds, q) * 1e3) for q in (50, 95, 99)},
    }


def results(protocol: Protocol, rows: Sequence[Mapping], **about) -> dict:
    """What results.json says.

    Args:
      protocol: what was run.
      rows: one per episode, see docs/results.schema.json.
      about: further entries, such as policy and seed, as JSON values.

    Returns:
      What docs/results.schema.json describes, with what is in `about`.
    """
    order = {task: number for number, task in enumerate(protocol.tasks)}
    rows = sorted(rows, key=lambda row: (order[row["task"]], row["trial"]))
    tasks = []
    for task in protocol.tasks:
        outcomes = [row["success"] for row in rows if row["task"] == task]
        tasks.append({
            "name": task,
            "trials": len(outcomes),
            "successes": sum(outcomes),
            "interval": list(wilson(sum(outcomes), len(outcomes))),
        })
    successes = sum(row["success"] for row in rows)
    return {
        "format": compare.FORMAT,
        "success_rate": successes / len(rows),
        "interval": list(wilson(successes, len(rows))),
        "tasks": tasks,
        **about,
        "protocol": protocol.to_dict(),
        "hardware": hardware(),
        "versions": versions(*PACKAGES),
        "episodes": rows,
    }


def write(out: Path, found: Mapping, other: compare.Result | None = None):
    """Writes report.html, then results.json, whole: with it the evaluation is finished.

    Args:
      out: the folder.
      found: `results(...)`.
      other: what it is compared with; `compare.check_comparable` has passed.
    """
    page.write(out / "report.html", compare.Result(out, found), other)
    with naming(unfinished := out / "results.json.incomplete"):
        unfinished.write_text(json.dumps(found, indent=2) + "\n")
    unfinished.replace(out / "results.json")


def define_flags():
    """The flags of this command."""
    text = flags.DEFINE_string
    text("results", None, "folder of a finished evaluation", required=True)
    text("compare", None, "folder, or results.json, of another one of the same protocol")
    text("out", None, "the page to write; default: report.html in the folder of --results")


def start(values):
    """Writes the page that the flags ask for."""
    this = compare.read(values.results)
    other = compare.read(values.compare) if values.compare else None
    if other:
        compare.check_comparable(this.found["protocol"], this.found["policy"], other)
    file = Path(values.out or this.folder / "report.html")
    if file.suffix != ".html":
        raise UserError(f"--out={file} must be the name of an .html file.")
    command.make_folder(file.parent)
    page.write(file, this, other)
    console = command.console()
    if other:
        console.print(str(compare.pair(this.found, other.found)), soft_wrap=True)
    console.print(str(file), soft_wrap=True)


if __name__ == "__main__":
    define_flags()
    command.run(start)
