"""Success rates of a policy in simulation, with intervals and videos.

    python -m jaxvp.evaluate --bundle=BUNDLE --suite=tabletop --trials=20 --out=DIR
    python -m jaxvp.evaluate --policy=expert --suite=tabletop --tasks=0,lift_tray --out=DIR
    python -m jaxvp.evaluate --check --suite=libero_object    # does the simulator work here?

Writes DIR/results.json, DIR/report.html and DIR/videos; `--compare` adds another result to the
report. Two results are comparable when their `protocol` entries are equal. Needs no model code;
`--dry_run` shows what would run.

Simulators run in processes of their own, which may crash. A command that was killed goes on when
it is repeated: finished episodes are in DIR, see `evaluation.journal`.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import jax
import rich.console
import rich.progress
import rich.table
from absl import flags
from etils import epath

from jaxvp import command
from jaxvp.data import observation, rates
from jaxvp.data.text import ByteTokenizer
from jaxvp.data.text_embeddings import TextEmbeddings
from jaxvp.errors import UserError, did_you_mean
from jaxvp.evaluation import baselines, check, compare, report, suites, workers
from jaxvp.evaluation import journal as journals
from jaxvp.evaluation.protocol import Protocol, Suite
from jaxvp.evaluation.rollout import Policy, rollouts
from jaxvp.policy import bundle as policy_bundle
from jaxvp.policy import digests
from jaxvp.policy.runner import PolicyRunner

POLICIES = ("bundle", "random", "expert", "replay")
MAX_WORKERS = 16  # Without --workers: more would be short of memory before they are of cores.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags, see `define_flags`; `suite_flags` are those of `suites.FLAGS` that were given."""

    bundle: str | None = None
    policy: str = "bundle"
    suite: str = next(iter(suites.SUITES))
    tasks: Sequence[str] = ()
    trials: int | None = None
    out: str | None = None
    seed: int | None = None
    num_envs: int | None = None
    workers: int | None = None
    step_timeout: float = 300.0
    episode_timeout: float = 3600.0
    videos: int | None = None
    imagined: int = 2
    compare: str | None = None
    suite_flags: Mapping[str, str] = dataclasses.field(default_factory=dict)
    dry_run: bool = False


def define_flags():
    """The flags of the `Settings`; not upon import, since other commands have the same."""
    default = Settings()
    text, number = flags.DEFINE_string, flags.DEFINE_integer
    text("bundle", None, "folder of the policy bundle to evaluate")
    text("policy", default.policy, f"what is evaluated: {', '.join(POLICIES)}")
    text("suite", default.suite, f"set of tasks: {', '.join(suites.SUITES)}")
    flags.DEFINE_list("tasks", [], "numbers or names of tasks of the suite; default: all")
    number("trials", None, "episodes per task; default: the protocol's")
    text("out", None, "folder for results.json, report.html and videos")
    number("seed", None,
           "of the policy's noise; default: the protocol's, which also seeds the simulator")
    number("num_envs", None, "environments; default: two a worker, so that one can simulate while "
           "the policy thinks about the other; of simulators that take little memory as many as "
           "the bundle takes at once")
    number("workers", None, "processes that simulate, 0: this one, for a debugger; default: one a "
           f"core, at most {MAX_WORKERS}")
    flags.DEFINE_float("step_timeout", default.step_timeout, "seconds for a step, or for the start "
                       "of an episode, after which a simulator counts as hung and is replaced")
    flags.DEFINE_float("episode_timeout", default.episode_timeout,
                       "the same of the seconds that it may spend on an episode")
    number("videos", None, "trials per task that are recorded, as a video and as a trace of "
           "actions and states; 0 for none; default: all")
    number("imagined", default.imagined, "of the first so many of these also the video that the "
           "policy predicts, where it can: that takes time")
    text("compare", None, "folder, or results.json, of another result to compare this one with")
    for name, about in suites.FLAGS.items():
        text(name, None, about)
    flags.DEFINE_bool("dry_run", False, "print protocol and tasks, run nothing")
    flags.DEFINE_bool("check", False, "try the simulator of --suite, by default of every suite: "
                      "packages, assets, rendering; says what to do about what is wrong")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """An evaluation whose inputs are checked."""

    settings: Settings
    suite: Suite
    protocol: Protocol
    make_suite: Callable[[], Suite]
    make_policy: Callable[[], Policy]
    manifest: policy_bundle.Manifest | None
    other: compare.Result | None

    @property
    def episodes(self) -> int:
        return len(self.protocol.tasks) * self.protocol.trials

    @property
    def num_envs(self) -> int:
        wanted = 2 * self.workers if self.manifest else self.workers
        if self.manifest and not self.suite.heavy:
            wanted = max(wanted, self.manifest.batch_size)
        return min(self.settings.num_envs or max(wanted, 1), self.episodes)

    @property
    def workers(self) -> int:
        if self.settings.workers is not None:
            return min(self.settings.workers, self.episodes)
        return min(workers.cores(), MAX_WORKERS, self.episodes)

    @property
    def header(self) -> dict:
        """All that the outcome of a trial, and what is kept of it, depends on."""
        settings, manifest = self.settings, self.manifest
        return {"policy": settings.policy, "bundle": manifest.sha256 if manifest else None,
                "seed": settings.seed, "videos": settings.videos,
                "imagined": settings.imagined, "suite_flags": dict(settings.suite_flags),
                "protocol": self.protocol.to_dict()}


def prepare(settings: Settings) -> Evaluation:
    """What the settings ask for. Makes the folder `out`; loads no weights, touches no device.

    Raises:
      UserError, OSError, RuntimeError: a flag, the bundle or the simulator cannot be used.
    """
    for name, value, least in (("trials", settings.trials, 1), ("num_envs", settings.num_envs, 1),
                               ("workers", settings.workers, 0), ("videos", settings.videos, 0),
                               ("imagined", settings.imagined, 0)):
        if value is not None and value < least:
            raise UserError(f"--{name} must be at least {least}, found {value}.")
    for name in ("step_timeout", "episode_timeout"):
        if not getattr(settings, name) > 0:
            raise UserError(f"--{name} must be positive, found {getattr(settings, name)}.")
    choose("--policy", settings.policy, POLICIES)
    choose("--suite", settings.suite, suites.SUITES)
    if settings.policy == "bundle" and not settings.bundle:
        raise UserError("--bundle=DIR is missing: the policy to evaluate; or --policy=expert.")
    if settings.policy != "bundle" and settings.bundle:
        raise UserError(f"--policy={settings.policy} does not use --bundle={settings.bundle}.")
    if not settings.dry_run and not settings.out:
        raise UserError("--out=DIR is missing: the folder for results, report and videos.")
    manifest = policy_bundle.read_manifest(settings.bundle) if settings.bundle else None
    make_suite = functools.partial(suites.make, settings.suite, dict(settings.suite_flags),
                                   dict(manifest.protocol) if manifest else {})
    suite = make_suite()
    protocol = dataclasses.replace(
        suite.protocol,
        tasks=choose_tasks(settings.tasks, suite.protocol.tasks),
        trials=settings.trials or suite.protocol.trials,
    )
    if settings.seed is None:
        settings = dataclasses.replace(settings, seed=protocol.policy_seed)
    if protocol.max_trials is not None and protocol.trials > protocol.max_trials:
        raise UserError(
            f"--trials={protocol.trials}: {protocol.suite} has {protocol.max_trials} trials, "
            f"see init_states of its protocol {protocol.name}.")
    other = compare.read(settings.compare) if settings.compare else None
    if other:
        compare.check_comparable(protocol.to_dict(), settings.policy, other)
    if manifest:
        check_fit(manifest, suite, protocol)
        check_texts(settings.bundle, manifest, suite, protocol)
    make_policy = _policy_maker(settings, suite, protocol)
    evaluation = Evaluation(settings, suite, protocol, make_suite, make_policy, manifest, other)
    if not settings.dry_run:
        journals.check(Path(settings.out), evaluation.header)
        command.make_folder(settings.out)
    return evaluation


def choose(flag: str, name: str, known: Collection[str]) -> str:
    """`name`, which must be among `known`.

    Raises:
      UserError: it is not; the message suggests the nearest.
    """
    if name not in known:
        raise UserError(f"{flag}: there is no {name!r}.{did_you_mean(name, known)} There are: "
                        f"{', '.join(known)}.")
    return name


def choose_tasks(wanted: Sequence[str], tasks: Sequence[str]) -> tuple[str, ...]:
    """The tasks with these names or numbers, in the suite's order; all if `wanted` is empty.

    Raises:
      UserError: there is no such task.
    """
    chosen = set()
    for name in wanted:
        if name.isdecimal() and int(name) >= len(tasks):
            raise UserError(f"--tasks: there is no task {name}, the numbers are 0 to "
                            f"{len(tasks) - 1}: {', '.join(tasks)}.")
        chosen.add(tasks[int(name)] if name.isdecimal() else choose("--tasks", name, tasks))
    return tuple(task for task in tasks if not chosen or task in chosen)


def check_fit(manifest: policy_bundle.Manifest, suite: Suite, protocol: Protocol):
    """Makes sure that the bundle's policy means by its inputs and outputs what the suite does.

    Raises:
      UserError: it does not.
    """
    fps = protocol.fps if rates.same(manifest.fps, protocol.fps) else manifest.fps
    absent = [c for c in manifest.cameras if c is not None and c not in protocol.cameras]
    for what, ours, theirs in (
        ("actions", manifest.dimensions("action"), protocol.action),
        ("state", manifest.dimensions("state"), protocol.state if manifest.state else ()),
        ("robot", manifest.robot, protocol.robot),
        ("actions per second", fps, protocol.fps),
        ("cameras that are absent", tuple(absent), ()),
    ):
        if ours != theirs:
            raise UserError(
                f"The bundle does not fit --suite={protocol.suite}: {what}: the bundle has {ours}, "
                f"the suite {theirs}. Choose the suite of the data that it was trained on."
            )


def check_texts(bundle: str, manifest: policy_bundle.Manifest, suite: Suite, protocol: Protocol):
    """Makes sure that the policy can read the instruction of every task.

    Raises:
      UserError: one is too long, or has no embedding in the bundle.
    """
    texts = [observation.describe(manifest.robot, manifest.camera_text, suite.instruction(task))
             for task in protocol.tasks]
    if not manifest.spec.text_width:
        for text in texts:
            ByteTokenizer.check(text, manifest.spec.text_length)
        return
    digests.check_files(epath.Path(bundle).resolve(), manifest.files, "text_embeddings")
    embeddings = TextEmbeddings(Path(bundle) / "text_embeddings")
    missing = [text for text in texts if text not in embeddings]
    if missing:
        raise UserError(
            f"{embeddings.folder} has no embedding of {len(missing)} of the {len(texts)} texts of "
            f"--suite={protocol.suite}, such as {missing[0]!r}: add them to the folder that the "
            "training's config.data.text_embeddings names, and export again.")
    for text in texts:
        embeddings.lookup(text, manifest.spec.text_length)


def _policy_maker(settings: Settings, suite: Suite, protocol: Protocol) -> Callable[[], Policy]:
    if settings.policy == "random":
        return lambda: baselines.RandomPolicy(protocol, settings.seed)
    if settings.policy == "expert":
        if not suite.has_expert:
            raise UserError(f"{settings.suite} has no scripted expert: use --policy=replay.")
        return baselines.ExpertPolicy
    if settings.policy == "replay":
        found = {task: suite.demonstrations(task, protocol.trials) for task in protocol.tasks}
        return lambda: baselines.ReplayPolicy(found)
    return lambda: PolicyRunner(policy_bundle.load(settings.bundle), settings.seed)


def evaluate(evaluation: Evaluation, policy: Policy, console: rich.console.Console) -> dict:
    """Runs the episodes that are not finished yet, writes videos and report, returns what
    results.json says."""
    settings, protocol = evaluation.settings, evaluation.protocol
    started, simulator = time.perf_counter(), []
    instructions = {task: evaluation.suite.instruction(task) for task in protocol.tasks}
    with contextlib.ExitStack() as stack:
        journal = stack.enter_context(journals.Journal(Path(settings.out), evaluation.header))
        rows = journal.rows
        done = {(row["task"], row["trial"]) for row in rows}
        if rows:
            console.print(f"{settings.out} has {len(rows)} of {evaluation.episodes} episodes: the "
                          "others are run.", soft_wrap=True)
        processes = None
        if evaluation.workers and len(done) < evaluation.episodes:
            processes = stack.enter_context(workers.Workers(
                evaluation.make_suite, protocol, evaluation.workers, settings.step_timeout,
                settings.episode_timeout))
        progress = stack.enter_context(rich.progress.Progress(
            rich.progress.TextColumn("{task.description}", markup=False),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(),
            console=console,
        ))
        bar = progress.add_task(protocol.suite, total=evaluation.episodes, completed=len(rows))
        for episode in rollouts(evaluation.suite, protocol, policy, evaluation.num_envs,
                                settings.videos, num_imagined=settings.imagined,
                                workers=processes, done=done):
            simulator += episode.seconds
            journal.add(episode, instructions[episode.task], protocol)
            successes = sum(row["success"] for row in rows)
            progress.update(bar, advance=1, description=(
                f"{protocol.suite}: {successes}/{len(rows)} successful "
                f"({successes / len(rows):.0%})"))
    manifest = evaluation.manifest
    bundle = manifest and {
        "path": settings.bundle,
        "method": manifest.method,
        "stage": manifest.stage,
        "step": manifest.step,
        "execution_horizon": manifest.execution_horizon,
        "batch_size": manifest.batch_size,
        "device": jax.devices()[0].device_kind,
        "git_revision": manifest.git_revision,
    }
    found = report.results(
        protocol, rows,
        policy=settings.policy, bundle=bundle, seed=settings.seed, num_envs=evaluation.num_envs,
        workers=evaluation.workers, wall_time_s=time.perf_counter() - started,
        latency={stage: report.latency(seconds) for stage, seconds in
                 {**policy.latencies, "simulator": simulator}.items()},
    )
    report.write(Path(settings.out), found, evaluation.other)
    return found


def print_evaluation(evaluation: Evaluation, console: rich.console.Console):
    """What would run."""
    table = rich.table.Table("protocol", "")
    for name, value in evaluation.protocol.to_dict().items():
        if name != "tasks":
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            table.add_row(name, text)
    console.print(table)
    for task in evaluation.protocol.tasks:
        number = evaluation.suite.protocol.tasks.index(task)
        console.print(f"{number:3d} {task}: {evaluation.suite.instruction(task)}", soft_wrap=True)


def print_results(found: dict, out: Path, console: rich.console.Console,
                  other: compare.Result | None = None):
    """Success rates, how they compare with an other result, and where the files are."""
    table = rich.table.Table("task", "successes", "rate", "95 % interval")
    every = {"name": "all tasks", "interval": found["interval"], "trials": len(found["episodes"]),
             "successes": sum(task["successes"] for task in found["tasks"])}
    for task in (*found["tasks"], every):
        if task is every:
            table.add_section()
        low, high = task["interval"]
        table.add_row(task["name"], f"{task['successes']}/{task['trials']}",
                      f"{task['successes'] / task['trials']:.1%}", f"{low:.1%} - {high:.1%}")
    console.print(table)
    for stage, times in found["latency"].items():
        if times:
            console.print("{}: median {p50_ms:.1f} ms, 95th percentile {p95_ms:.1f} ms of {calls}"
                          .format(stage, **times))
    if other:
        console.print(f"{other.folder}: {compare.pair(found, other.found)}", soft_wrap=True)
    console.print(f"{out / 'report.html'}\n{out / 'results.json'}", soft_wrap=True)


def start(values):
    """Evaluates what the flags say."""
    console = command.console()
    if values.check:
        choose("--suite", values.suite, suites.SUITES)
        return check.run([values.suite] if values["suite"].present else [], console)
    names = {field.name for field in dataclasses.fields(Settings)} - {"suite_flags"}
    given = {name: values[name].value for name in suites.FLAGS if values[name].value is not None}
    settings = Settings(**{name: values[name].value for name in names}, suite_flags=given)
    evaluation = prepare(settings)
    if settings.dry_run:
        return print_evaluation(evaluation, console)
    found = evaluate(evaluation, evaluation.make_policy(), console)
    print_results(found, Path(settings.out), console, evaluation.other)


def run():
    """The command `jaxvp-evaluate`."""
    define_flags()
    command.run(start)


if __name__ == "__main__":
    run()
