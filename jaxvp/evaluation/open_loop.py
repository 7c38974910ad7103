"""A policy on held-out data, without a simulator: errors of its actions, quality of its video.

    python -m jaxvp.evaluation.open_loop --bundle=BUNDLE --data=DIR --out=OUT

At steps drawn from the held-out episodes of a dataset the policy sees what was recorded there, and
what it predicts is compared with what followed:

- the mean absolute error of its actions, by dimension, in the dimension's unit, and by step of the
  chunk; next to that of three predictors that look at no picture: `state` holds the current state,
  of dimensions that the state has under the same name and unit; `previous` repeats the last action;
  `mean` is the training data's mean action;
- PSNR and SSIM of its video, next to a copy of the last observed frame.

Writes OUT/open_loop.json and OUT/open_loop.txt. A small error does not make a policy succeed: in
closed loop errors add up, and there are several ways to do a task. A policy that remembers earlier
calls is asked as at the start of an episode. `--dry_run` checks bundle and data only.
"""

import dataclasses
import io
import json
from pathlib import Path

import jax
import numpy as np
import rich.console
import rich.progress
import rich.table
from absl import flags

from jaxvp import command
from jaxvp.data import checks, rates, rlds
from jaxvp.data.clips import Clips
from jaxvp.data.normalize import CONSTANT
from jaxvp.data.rlds import Episodes
from jaxvp.data.spec import observe
from jaxvp.data.text_embeddings import TextEmbeddings
from jaxvp.errors import UserError, naming
from jaxvp.evaluation import report, video_quality
from jaxvp.policy import bundle as policy_bundle
from jaxvp.policy import video as policy_video
from jaxvp.policy.bundle import Bundle, Manifest, imagines
from jaxvp.versions import versions

# Held-out data of the kind that a policy was trained on is rarely outside of its range.
MOST_OUTSIDE = 0.1
MARGIN = 0.05  # Of the range.
PREDICTORS = ("policy", "state", "previous", "mean")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags, see `define_flags`."""

    bundle: str | None = None
    data: str | None = None
    split: str = "val"
    clips: int = 256
    out: str | None = None
    seed: int = 0
    dry_run: bool = False


def define_flags():
    """The flags of the `Settings`; not upon import, since other commands have the same."""
    default = Settings()
    flags.DEFINE_string("bundle", None, "folder of the policy bundle")
    flags.DEFINE_string("data", None, "folder of a dataset in RLDS, as data_builders write it")
    flags.DEFINE_string("split", default.split, "of the dataset, which the policy did not see")
    flags.DEFINE_integer("clips", default.clips, "steps at which the policy is asked", 1)
    flags.DEFINE_string("out", None, "folder for open_loop.json and open_loop.txt")
    flags.DEFINE_integer("seed", default.seed, "of the choice of steps and the policy's noise",
                         lower_bound=0, upper_bound=2**32 - 1)
    flags.DEFINE_bool("dry_run", False, "check bundle and data, run nothing")


def open_data(path: str, split: str, bundle: str, manifest: Manifest) -> Clips:
    """The clips of a split as the bundle's policy sees them; loads no weights.

    Raises:
      UserError: the split is absent or damaged, or its robot, dimensions, statistics, rate, cameras
        or texts are not those that the bundle is for.
    """
    episodes, robot = Episodes(path, split), manifest.robot
    where = f"{episodes.folder} {split}"
    if episodes.damaged:
        raise UserError(f"{where}: {next(iter(episodes.damaged.values()))}")
    if robot not in episodes.robots():
        raise UserError(f"{where} is of {', '.join(episodes.robots())}, {bundle} was trained on "
                        f"the actions of {robot}: choose data of that robot.")
    episodes = episodes.only(episodes.where("robot", lambda name: name == robot)
                             & episodes.has_action)
    if not len(episodes):
        raise UserError(f"{where} has no actions of {robot}: there is nothing to compare with.")
    for column in ("action", "state") if manifest.state else ("action",):
        stats = getattr(manifest, column)
        found = episodes.names[column], episodes.units[column]
        if found != (stats.names, stats.units):
            raise UserError(f"{where} has the {column} {found}, {bundle} {stats.names, stats.units}"
                            ": they do not mean the same.")
    absent = [c for c in manifest.cameras if c and c not in episodes.cameras]
    for what, ours, theirs, same in (
            ("steps per second", manifest.fps, float(episodes.fps.min()), rates.same),
            ("steps per second", manifest.fps, float(episodes.fps.max()), rates.same),
            ("cameras that are absent", absent, [], list.__eq__)):
        if not same(ours, theirs):
            raise UserError(f"{where} does not fit {bundle}: {what}: the bundle has {ours}, the "
                            f"data {theirs}.")
    check_range(episodes, manifest, where, bundle)
    spec, embeddings = manifest.spec, None
    if spec.text_width:
        embeddings = TextEmbeddings(Path(bundle) / "text_embeddings")
    checks.check_texts(episodes, spec.text_length, embeddings)
    return Clips(episodes, spec, source=0, layout=manifest.layout,
                 normalizers={robot: manifest.normalizer}, embeddings=embeddings,
                 cameras=dict(zip(spec.cameras, manifest.cameras, strict=True)), max_bad_records=0)


def check_range(episodes: Episodes, manifest: Manifest, where: str, bundle: str):
    """Raises UserError where many values of a dimension are outside of the range that the bundle's
    statistics say: the same name means something else there."""
    for column in ("action", "state") if manifest.state else ("action",):
        stats = getattr(manifest, column)
        values = np.concatenate([getattr(episodes.columns(record), column)
                                 for record in range(len(episodes))])
        low, high = np.array(stats.min), np.array(stats.max)
        margin = np.maximum(MARGIN * (high - low), CONSTANT)
        outside = ((values < low - margin) | (values > high + margin)).mean(0)
        if outside.max() > MOST_OUTSIDE:
            k = int(outside.argmax())
            raise UserError(
                f"{where}: {column} {manifest.dimensions(column)[k]} is in "
                f"{values[:, k].min():.4g} .. {values[:, k].max():.4g}, for {outside[k]:.0%} of "
                f"the steps outside of {low[k]:.4g} .. {high[k]:.4g}, the range of the statistics "
                f"of {bundle}: it was trained on data with another meaning or unit of it.")


def choose(clips: Clips, number: int, seed: int) -> np.ndarray:
    """The numbers of at most so many clips, drawn without replacement, in order."""
    drawn = np.random.default_rng(seed).permutation(len(clips))[:number]
    return np.sort(drawn)


def compare(bundle: Bundle, clips: Clips, chosen: np.ndarray, seed: int) -> dict:
    """What the policy predicts at the chosen clips, and what followed.

    Returns:
      `action`, float32[n, P, A] in SI units, of "policy", "truth" and each trivial predictor (NaN
      in dimensions that it knows nothing of), and `there`, bool[n, P]; for a bundle that predicts
      video `video`, see `video_quality.scores`, and `frames_there`, bool[n, future].
    """
    manifest, window, episodes = bundle.manifest, clips.spec.window, clips.episodes
    modes = {}  # In order: of actions, those of the policy count.
    if any(map(imagines, manifest.modes)):
        modes[policy_video.mode(manifest, str(bundle.path))] = None
    modes[manifest.acting] = None
    parts = []
    for start in rich.progress.track(range(0, len(chosen), manifest.batch_size), "Predicting"):
        numbers = chosen[start : start + manifest.batch_size]
        rows = [clips[number] for number in numbers]
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        keys = np.array([[seed, number] for number in numbers], np.uint32)
        outputs = {}
        for _, wanted in modes:
            outputs |= bundle.predict(observe(batch, window), keys, wanted,
                                      bundle.initial_carry(len(rows)))[0]
        actions = outputs["action"][..., :len(manifest.action.names)]
        places = [clips.place(number) for number in numbers]
        part = {"action": {"policy": manifest.normalizer.unnormalize("action", actions),
                           **_stacked([_recorded(episodes, manifest, *place, window.chunk)
                                       for place in places])}}
        part["there"] = np.array([now + np.arange(window.chunk) < episodes.lengths[record]
                                  for record, now in places])
        if "video" in outputs:
            truth = policy_video.shown(manifest, batch)
            part["video"] = video_quality.scores(outputs["video"], truth, window.past)
            part["frames_there"] = batch["frame_mask"][:, window.past:]
        parts.append(part)
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def _recorded(episodes: Episodes, manifest: Manifest, record: int, now: int, chunk: int) -> dict:
    """What was done from a step on, and what the trivial predictors say of it; float32[P, A]."""
    steps, stats = episodes[record], manifest.action
    actions, nothing = steps.action, np.full(len(stats.names), np.nan, np.float32)
    hold = nothing.copy()
    if steps.state is not None:
        columns = zip(episodes.names["state"], episodes.units["state"], strict=True)
        state = dict(zip(columns, steps.state[now], strict=True))
        keys = zip(stats.names, stats.units, strict=True)
        hold = np.array([state.get(key, np.nan) for key in keys], np.float32)
    trivial = {"state": hold, "previous": actions[now - 1] if now else nothing,
               "mean": np.array(stats.mean, np.float32)}
    last = np.minimum(now + np.arange(chunk), len(actions) - 1)
    return {"truth": actions[last]} | {
        name: np.broadcast_to(value, (chunk, len(value))) for name, value in trivial.items()}


def _stacked(rows: list[dict]) -> dict:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def action_errors(manifest: Manifest, found: dict) -> dict:
    """Mean absolute errors of what `compare` found, over the steps that the episodes have.

    Returns:
      `names` of the A dimensions with units; of each predictor `error`, A numbers in these units,
      `error_by_step`, the same [P, A], and over the dimensions that move, in standard deviations of
      the training data, `relative`, one number, and `relative_by_step`, P numbers. None where there
      is nothing to compare.
    """
    there, truth = found["there"], found["action"]["truth"]
    std = np.array(manifest.action.std)
    scale = np.where(std > CONSTANT, std, np.nan)
    result = {"names": list(manifest.dimensions("action"))}
    for name in PREDICTORS:
        error = np.abs(found["action"][name].astype(np.float64) - truth)
        error[~there] = np.nan
        by_step, scaled = _mean(error, 0), error / scale
        # A mean over fewer dimensions is not comparable with the others'.
        if np.isnan(found["action"][name][..., std > CONSTANT]).all((0, 1)).any():
            scaled = np.full_like(error, np.nan)
        result[name] = {
            "error": _plain(_mean(error, (0, 1))), "error_by_step": _plain(by_step),
            "relative": _plain(_mean(scaled, None)),
            "relative_by_step": _plain(_mean(scaled, (0, 2)))}
    return result


def _mean(values: np.ndarray, axis) -> np.ndarray:
    """The mean of what is not NaN; NaN of nothing, without a warning."""
    known = ~np.isnan(values)
    count = known.sum(axis)
    total = np.where(known, values, 0).sum(axis)
    return np.where(count, total / np.maximum(count, 1), np.nan)


def _plain(values: np.ndarray):
    """Nested lists, None for NaN."""
    if values.ndim:
        return [_plain(value) for value in values]
    return None if np.isnan(values) else float(values)


def tables(found: dict) -> list[rich.table.Table]:
    """What open_loop.json says, for reading."""
    errors = found["action"]
    by_dimension = rich.table.Table("action", *PREDICTORS, title="Mean absolute error")
    for k, name in enumerate(errors["names"]):
        by_dimension.add_row(name, *(_shown(errors[p]["error"][k]) for p in PREDICTORS))
    by_dimension.add_section()
    by_dimension.add_row("all [std]", *(_shown(errors[p]["relative"]) for p in PREDICTORS))
    by_step = rich.table.Table("step of the chunk", *PREDICTORS,
                               title="Mean absolute error, all dimensions, in standard deviations")
    for k in range(len(errors["policy"]["relative_by_step"])):
        by_step.add_row(str(k), *(_shown(errors[p]["relative_by_step"][k]) for p in PREDICTORS))
    video = [video_quality.table(found["video"], "Video")] if found["video"] else []
    return [by_dimension, by_step, *video]


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def run_settings(settings: Settings, console: rich.console.Console):
    """Checks the inputs, then evaluates and writes the results.

    Raises:
      UserError, OSError: a flag, the bundle or the data cannot be used.
    """
    for name, what in (("bundle", "the policy to evaluate"), ("data", "the dataset"),
                       ("out", "the folder for the results")):
        if not getattr(settings, name) and not (name == "out" and settings.dry_run):
            raise UserError(f"--{name}=DIR is missing: {what}.")
    manifest = policy_bundle.read_manifest(settings.bundle)
    splits = rlds.splits(settings.data)
    if settings.split not in splits:
        raise UserError(f"{settings.data} has no split {settings.split!r}, but {', '.join(splits)}:"
                        " name the one that was held out with --split.")
    clips = open_data(settings.data, settings.split, settings.bundle, manifest)
    chosen = choose(clips, settings.clips, settings.seed)
    console.print(f"{clips.episodes.folder} {settings.split}: {len(chosen)} of {len(clips)} steps "
                  f"of {len(clips.episodes)} records.", soft_wrap=True)
    if settings.dry_run:
        return
    out = Path(settings.out)
    if (out / "open_loop.json").exists():
        raise UserError(f"--out={out} holds another result: choose a new one.")
    command.make_folder(out)
    found = compare(policy_bundle.load(settings.bundle), clips, chosen, settings.seed)
    result = {
        "bundle": {"path": settings.bundle, "method": manifest.method, "stage": manifest.stage,
                   "step": manifest.step, "sha256": manifest.sha256},
        "data": {"path": str(clips.episodes.folder), "split": settings.split,
                 "digest": clips.episodes.digest, "records": len(clips.episodes)},
        "clips": len(chosen), "seed": settings.seed,
        "action": action_errors(manifest, found),
        "video": video_quality.by_frame(
            found["video"], found["frames_there"], manifest.spec.window.past
        ) if "video" in found else None,
        "hardware": report.hardware(),
        "versions": versions(*report.PACKAGES),
    }
    text = rich.console.Console(file=io.StringIO(), width=120, markup=False, emoji=False)
    for table in tables(result):
        console.print(table)
        text.print(table)
    for name, content in (("open_loop.json", json.dumps(result, indent=2) + "\n"),
                          ("open_loop.txt", text.file.getvalue())):
        with naming(out / name):
            (out / name).write_text(content)
    console.print(f"{out / 'open_loop.txt'}\n{out / 'open_loop.json'}", soft_wrap=True)


def start(values):
    """Evaluates what the flags say."""
    settings = Settings(**{field.name: values[field.name].value
                           for field in dataclasses.fields(Settings)})
    run_settings(settings, command.console())


if __name__ == "__main__":
    define_flags()
    command.run(start)
