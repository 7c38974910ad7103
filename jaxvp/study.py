"""Studies: a table of trainings on the same budget, with several seeds, and what follows from it.

    python -m jaxvp.study video_helps
    python -m jaxvp.study video_helps --quick      # minutes: does it run?

NAME is that of a file of benchmarks/studies/, which says what is trained and evaluated. Every
training, export and evaluation is a command of its own, printed as it begins; what is done is found
in `--out` and not done again, so that a study that was stopped goes on when it is repeated.
`--rows` and `--seeds` choose a part. At the end, and with `--table` at once, it prints the table of
what there is and writes it to `--json`, by default study.json in `--out`.
"""

import dataclasses
import importlib
import json
import math
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence

import numpy as np
import rich.table
from absl import flags

from jaxvp import command, files
from jaxvp.errors import UserError, did_you_mean
from jaxvp.evaluation.report import hardware, wilson
from jaxvp.versions import versions

STUDIES = "benchmarks.studies"
VIDEO = ("video", "text")  # The parts that a run takes over from the one before.


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: a config file, with its variant, and the keys that it changes."""

    config: str
    changes: Mapping[str, object] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Row:
    """What is compared.

    Attributes:
      about: what it is, for the table.
      runs: trainings in turn, each with the video model of the one before; the last is evaluated.
    """

    about: str
    runs: tuple[Run, ...]


@dataclasses.dataclass(frozen=True)
class Claim:
    """That one row has a higher success rate than another.

    Attributes:
      text: the claim in words.
      better, worse: names of rows; suite: where; tasks: of it, (): all.
    """

    text: str
    better: str
    worse: str
    suite: str
    tasks: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Study:
    """A table.

    Attributes:
      question: what it asks.
      data: folder to the arguments of data_builders.build that make it.
      rows: name to Row; claims: what they are compared for.
      suites: name to trials a task.
      seeds: of every row.
    """

    question: str
    data: Mapping[str, tuple[str, ...]]
    rows: Mapping[str, Row]
    claims: Sequence[Claim]
    suites: Mapping[str, int]
    seeds: int


def load(name: str, quick: bool) -> Study:
    """The study `name` of benchmarks/studies/; raises UserError when there is none."""
    folder = pathlib.Path(STUDIES.replace(".", "/"))
    names = [path.stem for path in files.find(folder, "[!_]*.py")]
    if name not in names:
        raise UserError(f"NAME: there is no study {name!r}.{did_you_mean(name, names)} There are "
                        f"{', '.join(names) or 'none'} in {folder}, of jaxvp's own checkout.")
    return importlib.import_module(f"{STUDIES}.{name}").study(quick)


def run(study: Study, out: pathlib.Path, rows: Sequence[str], seeds: Sequence[int]):
    """Does what is not done yet; raises UserError when a command fails."""
    for path, arguments in study.data.items():
        if not files.find(path, "*/dataset_info.json"):
            _call("data_builders.build", *arguments, f"--out={path}")
    for seed in seeds:  # First all rows once: a study that is stopped can still be read.
        for name in rows:
            _row(study, study.rows[name], out / name / str(seed), seed)


def _row(study: Study, row: Row, folder: pathlib.Path, seed: int):
    before = ""
    for number, training in enumerate(row.runs):
        workdir = folder / f"run{number}"
        if not (workdir / "done").exists():
            changes = {"seed": seed, **training.changes}
            _call("jaxvp.main", f"--config={training.config}", f"--workdir={workdir}",
                  *(f"--config.{key}={value}" for key, value in changes.items()),
                  *(f"--config.init_from.{part}={before}" for part in VIDEO if before))
            (workdir / "done").touch()
        before = workdir
    bundle = folder / "bundle"
    if not (bundle / "policy.json").exists():
        _call("jaxvp.export", f"--workdir={before}", f"--out={bundle}")
    for suite, trials in study.suites.items():
        if not (folder / suite / "results.json").exists():
            _call("jaxvp.evaluate", f"--bundle={bundle}", f"--suite={suite}", f"--trials={trials}",
                  "--videos=0", f"--out={folder / suite}")


def _call(*words: str):
    print("\n$ python -m", *words, flush=True)
    if status := subprocess.run([sys.executable, "-m", *words]).returncode:
        raise UserError(f"The command above ended with status {status}; when its fault is mended, "
                        "repeat this one: what is done is not done again.")


def table(study: Study, out: pathlib.Path) -> dict:
    """What there is in `out`, as JSON values: rates with 95 % intervals, and the claims.

    An interval of a rate is Wilson's of all trials of all seeds. A difference is of the same trials
    of the same seeds: its mean with 1.96 standard errors. A claim "holds" when this interval is
    above 0 and every seed agrees, "is reversed" in the opposite case; else it is "open".
    """
    found = {name: {suite: _results(out / name, suite) for suite in study.suites}
             for name in study.rows}
    rows = {}
    for name, row in study.rows.items():
        suites = {suite: _rates(results) for suite, results in found[name].items() if results}
        rows[name] = {"about": row.about, "suites": suites,
                      "training_seconds": _seconds(out / name)}
    claims = [{"claim": claim.text, **_difference(
        found[claim.better][claim.suite], found[claim.worse][claim.suite], claim.tasks)}
        for claim in study.claims]
    return {"question": study.question, "rows": rows, "claims": claims,
            "data": {path: " ".join(words) for path, words in study.data.items()},
            "hardware": hardware(),
            "versions": versions("jax", "flax", "optax", "numpy")}


def _results(folder: pathlib.Path, suite: str) -> dict[int, dict]:
    """Seed to results.json."""
    found = {int(file.parts[-3]): json.loads(file.read_text())
             for file in files.find(folder, f"*/{suite}/results.json")}
    return dict(sorted(found.items()))


def _seconds(folder: pathlib.Path) -> dict[int, float]:
    """Seed to what the trainings took, from the first line of their metrics to the last."""
    found = {}
    for file in files.find(folder, "*/run*/metrics.jsonl"):
        times = [json.loads(line)["time"] for line in file.read_text().splitlines()]
        seed = int(file.parts[-3])
        found[seed] = round(found.get(seed, 0) + times[-1] - times[0])
    return found


def _rates(results: Mapping[int, dict]) -> dict:
    counts = [[(task["name"], task["successes"], task["trials"]) for task in result["tasks"]]
              for result in results.values()]
    successes, trials = (sum(task[i] for tasks in counts for task in tasks) for i in (1, 2))
    return {
        "rate": successes / trials, "interval": list(wilson(successes, trials)),
        "successes": successes, "trials": trials,
        "seeds": {seed: result["success_rate"] for seed, result in results.items()},
        "tasks": {tasks[0][0]: sum(task[1] for task in tasks)
                  for tasks in zip(*counts, strict=True)},
        "git_revisions": sorted({result["bundle"]["git_revision"] for result in results.values()}),
        "protocol": next(iter(results.values()))["protocol"],
    }


def _difference(better: Mapping[int, dict], worse: Mapping[int, dict], tasks: Sequence[str]
                ) -> dict:
    seeds = sorted(better.keys() & worse.keys())
    means, differences = {}, []
    for seed in seeds:
        one, other = ({(row["task"], row["trial"]): row["success"] for row in result["episodes"]
                       if not tasks or row["task"] in tasks}
                      for result in (better[seed], worse[seed]))
        of_seed = [float(one[key]) - float(other[key]) for key in sorted(one.keys() & other.keys())]
        means[seed], differences = float(np.mean(of_seed)), differences + of_seed
    if not differences:
        return {"verdict": "not measured"}
    mean = float(np.mean(differences))
    error = 1.96 * float(np.std(differences)) / math.sqrt(len(differences))
    signs = {np.sign(value) for value in means.values()}
    verdict = ("holds" if mean > error and signs == {1} else
               "is reversed" if mean < -error and signs == {-1} else "open")
    return {"verdict": verdict, "difference": mean, "interval": [mean - error, mean + error],
            "seeds": means, "trials": len(differences)}


def show(found: Mapping):
    """Prints the table and the claims."""
    suites = list(dict.fromkeys(suite for row in found["rows"].values() for suite in row["suites"]))
    grid = rich.table.Table("row", *suites, "training", title=found["question"])
    for row in found["rows"].values():
        cells = []
        for suite in suites:
            rates = row["suites"].get(suite)
            cells.append(f"{rates['rate']:.0%} ({rates['interval'][0]:.0%} - "
                         f"{rates['interval'][1]:.0%}), {len(rates['seeds'])} seeds"
                         if rates else "")
        seconds = row["training_seconds"].values()
        grid.add_row(row["about"], *cells, f"{np.mean(list(seconds)):.0f} s" if seconds else "")
    rich.print(grid)
    for claim in found["claims"]:
        numbers = ""
        if "difference" in claim:
            low, high = claim["interval"]
            numbers = f": {claim['difference']:+.1%} ({low:+.1%} to {high:+.1%})"
        print(f"{claim['claim']} {claim['verdict'].upper()}{numbers}")


def define_flags():
    """The flags of this command."""
    flags.DEFINE_string("out", None, "folder of the runs; default: runs/studies/NAME")
    flags.DEFINE_list("rows", [], "names of rows; default: all")
    flags.DEFINE_integer("seeds", None, "how many seeds; default: the study's", lower_bound=1)
    flags.DEFINE_string("json", None, "file of the table; default: study.json in --out")
    flags.DEFINE_bool("quick", False, "a few steps, one seed: to see that it runs")
    flags.DEFINE_bool("table", False, "run nothing, print the table of what there is")


def start(values, name: str):
    """Does what the flags say."""
    study = load(name, values.quick)
    for row in values.rows:
        if row not in study.rows:
            raise UserError(f"--rows: there is no {row!r}.{did_you_mean(row, study.rows)} There "
                            f"are {', '.join(study.rows)}.")
    out = pathlib.Path(values.out or f"runs/studies/{name}{'_quick' * values.quick}")
    command.make_folder(out)
    if not values.table:
        run(study, out, values.rows or list(study.rows), range(values.seeds or study.seeds))
    found = {"study": name, **table(study, out)}
    file = pathlib.Path(values.json or out / "study.json")
    command.make_folder(file.parent)
    file.write_text(json.dumps(found, indent=2) + "\n")
    show(found)


if __name__ == "__main__":
    define_flags()
    command.run(start, word="NAME")
