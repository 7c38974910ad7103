"""What a mixture is made of, in numbers and pictures, before anything is trained on it.

    python -m jaxvp.tools.inspect_data --config=configs/mixtures.py:vidar --out=runs/vidar
    python -m jaxvp.tools.inspect_data --config=configs/pretrain.py --out=runs/rdt \
        '--config.data.sources=({"path": "data/rdt"},)'

prints a table of the sources, the statistics of every robot and what filters have left out. With
--out it writes OUT/data.html, one page that needs nothing else: a contact sheet of each dataset,
episodes of every robot with their instruction, the frames of all cameras and plots of actions and
states. Look whether pictures are upright and their colours right, each view shows what its name
says, the text fits, an open gripper is 1, and an action comes before the state that it leads to.
"""

import base64
import collections
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import jinja2
import numpy as np
import rich.box
import rich.console
import rich.table
from absl import flags

from jaxvp import command
from jaxvp import config as config_lib
from jaxvp.data import checks, observation, rlds, statistics
from jaxvp.data.clips import Clips
from jaxvp.data.normalize import CONSTANT, Normalizer
from jaxvp.data.rlds import Episodes
from jaxvp.data.sources import DataConfig, SourceConfig, clip_spec, open_source
from jaxvp.data.text_embeddings import TextEmbeddings
from jaxvp.errors import UserError, naming

EPISODES = 4  # On the contact sheet of a dataset, and at least one of every robot,
TIMES = 8  # at so many times each.
HEIGHT = 144  # Frames are at most so high, in pixels.
POINTS = 200  # Of a plot.


def check_there(config: DataConfig):
    """Raises UserError that lists every dataset of the mixture that is not there."""
    from configs.mixtures import BUILD  # For the message only.

    paths = dict.fromkeys(source.path for source in config.sources)
    missing = []
    for path in paths:
        try:
            rlds.version_folder(path)
        except rlds.NoDataset as error:
            command = f"python -m data_builders.build {BUILD.get(path)} --out={path}"
            missing.append(command if path in BUILD else str(error))
    if missing:
        raise UserError(
            f"{len(missing)} of {len(paths)} datasets are missing. What makes them (RAW is a "
            "download):\n  " + "\n  ".join(missing))


def chosen(episodes: Episodes) -> list[int]:
    """Records for the contact sheet, drawn always the same: of every robot as many, and of few with
    the same instruction."""
    robots = episodes.robots()
    each, result = max(1, EPISODES // len(robots)), []
    for robot in robots:
        times, drawn = collections.Counter(), []
        of_robot = np.random.default_rng(0).permutation(episodes.records_of(robot))
        for record in of_robot[: 4 * each].tolist():
            text = episodes.columns(record).instruction[0]
            drawn.append((times[text], record))
            times[text] += 1
        result += [record for _, record in sorted(drawn)[:each]]
    return result


def sheet(episodes: Episodes, record: int, normalizer: Normalizer) -> dict:
    """What the page shows of a record: see the template."""
    steps, fps = episodes[record], float(episodes.fps[record])
    length = int(episodes.lengths[record])
    times = np.linspace(0, length - 1, TIMES).astype(int)
    words = [text.decode() for text in steps.instruction]
    changes = [i for i in range(length) if not i or words[i] != words[i - 1]]
    start = int(episodes.offsets[record])
    return {
        "name": episodes.text("episode_id", record) + (f", from step {start}" if start else ""),
        "robot": episodes.text("robot", record),
        "seconds": length / fps,
        "fps": f"{fps:g}",
        "texts": [(i / fps, words[i]) for i in changes],
        "times": (times / fps).tolist(),
        "cameras": [{"name": camera} | strip(steps.images[camera], times.tolist())
                    for camera in episodes.text("camera_layout", record).split(",")
                    if camera in episodes.cameras],
        "plots": plots(steps.action if episodes.has_action[record] else None, steps.state,
                       normalizer),
    }


def strip(frames: Sequence[bytes], times: Sequence[int]) -> dict:
    """{images: data URLs of some frames, few: they have few pixels}, or {images: (), error}."""
    urls = []
    for time in times:
        try:
            image = rlds.decode_image(frames[time])
        except rlds.BadRecord as error:
            return {"images": (), "error": f"unreadable: {error}"}
        height, width = image.shape[:2]
        scale = min(1, HEIGHT / height)
        image = observation.resize(image, round(height * scale), round(width * scale))
        quality = cv2.IMWRITE_JPEG_QUALITY, 90
        jpeg = cv2.imencode(".jpg", image[..., ::-1], quality)[1].tobytes()
        urls.append(f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}")
    return {"images": urls, "few": height < 100}


def plots(action: np.ndarray | None, state: np.ndarray | None, normalizer: Normalizer
          ) -> list[dict]:
    """One plot for each dimension; action and state of the same name share one.

    The vertical range is that of the robot's statistics, so that episodes can be compared.
    """
    found: dict[str, dict] = {}
    for column, values in (("action", action), ("state", state)):
        stats = getattr(normalizer, column)
        for i, name in enumerate(stats.names if values is not None else ()):
            plot = found.setdefault(name, {
                "name": name, "unit": stats.units[i], "low": stats.min[i], "high": stats.max[i],
                "action": None, "state": None})
            plot["low"] = min(plot["low"], stats.min[i])
            plot["high"] = max(plot["high"], stats.max[i])
            plot[column] = values[:, i]
    for plot in found.values():
        for column in ("action", "state"):
            if plot[column] is not None:
                plot[column] = svg_path(plot[column], plot["low"], plot["high"])
    return list(found.values())


def svg_path(values: np.ndarray, low: float, high: float) -> str:
    """A polyline in a picture of 100 x 40, `low` near its bottom; a constant is in the middle."""
    steps = np.unique(np.linspace(0, len(values) - 1, POINTS).astype(int))
    x = 100 * steps / max(1, len(values) - 1)
    y = np.full(len(steps), 20.0)
    if high - low >= CONSTANT:
        y = 37 - 34 * (values[steps] - low) / (high - low)
    return "M" + "L".join(f"{a:.4g} {b:.4g}" for a, b in zip(x, y, strict=True))


def inspect(config: DataConfig) -> dict:
    """What is trained on, as the page and the tables say it.

    Returns:
      `sources`, one mapping each, and `robots`: name to {"action": its statistics or None, "state":
      the same}.

    Raises:
      UserError: a dataset is absent or damaged, or filters leave nothing of it.
    """
    check_there(config)
    opened = [open_source(config, source) for source in config.sources]
    normalizers = statistics.of_sources(config.normalization, opened)
    # Clips are not read here, so the embeddings of their texts need not be there yet.
    spec = clip_spec(dataclasses.replace(config, text_embeddings=""), normalizers)
    sources, alike = [], []
    for number, (source, episodes) in enumerate(zip(config.sources, opened, strict=True)):
        try:
            Clips(episodes, spec, source=number, layout=config.layout, normalizers=normalizers,
                  cameras=source.cameras, max_bad_records=config.max_bad_records)
            checks.check_robots([*alike, episodes])
            alike.append(episodes)
            check_texts(config, source, episodes)
            problem = None
        except UserError as error:
            problem = str(error)
        sources.append(facts(episodes, {v: source.cameras.get(v, v) for v in spec.cameras}) | {
            "path": source.path, "split": source.split, "problem": problem,
            "left_out": left_out(config, source, episodes),
            "sheet": [sheet(episodes, record, normalizers[episodes.text("robot", record)])
                      for record in chosen(episodes)]})
    weights = [source.weight or found["frames"]
               for source, found in zip(config.sources, sources, strict=True)]
    for weight, found in zip(weights, sources, strict=True):
        found["share"] = weight / sum(weights)
    robots = {robot: {column: getattr(normalizer, column) for column in ("action", "state")}
              for robot, normalizer in normalizers.items()}
    return {"sources": sources, "robots": robots}


def check_texts(config: DataConfig, source: SourceConfig, episodes: Episodes):
    """Raises UserError when a text of the source, or of what is held out of it, is too long, or is
    not among its embeddings; where those are still to be made, there is nothing to check."""
    embeddings = None
    if config.text_embeddings:
        if not Path(config.text_embeddings, "index.json").exists():
            return
        embeddings = TextEmbeddings(config.text_embeddings)
    splits = [episodes]
    if source.validation_fraction or source.validation_split in rlds.splits(source.path):
        splits.append(open_source(config, source, held_out=True))
    for split in splits:
        checks.check_texts(split, config.text_length, embeddings)


def facts(episodes: Episodes, cameras: Mapping[str, str | None]) -> dict:
    """The numbers of a source, with `cameras` for the views."""
    def texts(name):
        """{text: number of records}."""
        _, first, counts = np.unique(episodes.rows["texts"][name], return_index=True,
                                     return_counts=True)
        return {episodes.text(name, record): count
                for record, count in zip(first.tolist(), counts.tolist(), strict=True)}

    def share(camera):
        """Of the clips, which a camera is in."""
        there = episodes.where("camera_layout", lambda layout: camera in layout.split(","))
        return float(np.average(there, weights=episodes.lengths))

    rates = np.unique(episodes.fps)
    acting = episodes.has_action.mean()
    return {
        "dataset": ", ".join(texts("dataset")),
        "episodes": count(episodes),
        "hours": float((episodes.lengths / episodes.fps).sum() / 3600),
        "frames": int(episodes.lengths.sum()),
        "fps": " – ".join(dict.fromkeys(f"{rate:g}" for rate in (rates[0], rates[-1]))),
        "robots": list(texts("robot")),
        "camera_texts": list(texts("camera_text")),
        "views": [(view, camera, share(camera)) for view, camera in cameras.items()],
        "unused": [camera for camera in episodes.cameras if camera not in cameras.values()],
        "actions": "yes" if acting == 1 else f"{100 * acting:.0f} %" if acting else "no",
    }


def left_out(config: DataConfig, source: SourceConfig, episodes: Episodes) -> dict[str, int]:
    """Episodes that are left out, by reason: each filter as if there were no other."""
    off = {"robots": (), "min_views": 0, "min_seconds": 0.0, "validation_fraction": 0.0}
    used = {name: getattr(source, name) for name in off if getattr(source, name) != off[name]}
    found = {}
    if used:
        bare = dataclasses.replace(source, **off)
        total = count(open_source(config, bare))
        for name, value in used.items():
            kept = open_source(config, dataclasses.replace(bare, **{name: value}))
            found[f"by {name} {value}"] = total - count(kept)
    found["unreadable when read (records)"] = len(episodes.damaged)
    path = episodes.folder / "build_report.json"
    report = json.loads(path.read_text()) if path.exists() else {"skipped": {}, "unreadable": ()}
    built = report["skipped"] | {"unreadable": len(report["unreadable"])}
    found |= {f"when built: {reason}": number for reason, number in built.items()}
    return {reason: number for reason, number in found.items() if number}


def count(episodes: Episodes) -> int:
    """How many episodes, which may be of several records each."""
    return len(np.unique(episodes.rows["texts"]["episode_id"]))


def tables(found: Mapping, console: rich.console.Console):
    """Prints what `inspect` found."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    for name in ("source", "episodes", "hours", "clips", "fps", "actions", "share"):
        table.add_column(name, justify="left" if name == "source" else "right", overflow="fold")
    for source in found["sources"]:
        table.add_row(source["path"], f"{source['episodes']:,}", f"{source['hours']:,.2f}",
                      f"{source['frames']:,}", source["fps"], source["actions"],
                      f"{100 * source['share']:.1f} %")
    console.print(table)
    console.print("A clip starts at every frame. Share: of a batch, on average.\n")
    for source in found["sources"]:
        views = [f"{view} = {camera} in {100 * there:.1f} % of the clips" if camera else
                 f"{view} = masked" for view, camera, there in source["views"]]
        console.print(f"{source['path']}: {source['dataset']}", style="bold")
        console.print(f"  {'; '.join(source['robots'])}\n  {', '.join(views)}")
        for reason, number in source["left_out"].items():
            console.print(f"  {number:,} left out {reason}")
        if source["problem"]:
            console.print(f"  cannot be trained on: {source['problem']}", style="bold red")
    for robot, columns in found["robots"].items():
        for column, stats in columns.items():
            table = rich.table.Table(title=f"{robot}: {column}", box=rich.box.SIMPLE_HEAD,
                                     title_justify="left")
            for name in ("dimension", "unit", "min", "max", "mean", "std"):
                table.add_column(name, justify="left" if name in ("dimension", "unit") else "right")
            for i, name in enumerate(stats.names if stats else ()):
                numbers = (stats.min[i], stats.max[i], stats.mean[i], stats.std[i])
                table.add_row(name, stats.units[i], *(f"{n:.3g}" for n in numbers))
            console.print(table if stats else f"{robot}: no {column}")


def write(out: Path, found: Mapping, name: str, config: DataConfig):
    """Writes the page OUT/data.html."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jaxvp.tools", "."), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    window = config.window
    clip = (f"{window.past} + {window.future} frames at {window.fps:g} fps, "
            f"{window.past_actions} + {window.chunk} actions, layout {config.layout}")
    page = environment.get_template("inspect_data.html.j2").render(**found, name=name, clip=clip)
    out.mkdir(parents=True, exist_ok=True)
    with naming(out / "data.html"):
        (out / "data.html").write_text(page)


def start(settings):
    """Inspects what the flags say."""
    config = config_lib.build(DataConfig, settings.config.data, "config.data")
    console = command.console()
    if settings.out:
        command.make_folder(settings.out)
    found = inspect(config)
    tables(found, console)
    if settings.out:
        write(Path(settings.out), found, command.config_name(), config)
        console.print(f"Look at {settings.out}/data.html", soft_wrap=True)


def run():
    """The command; see the module's docstring."""
    command.define_config("Whose data is looked at")
    flags.DEFINE_string("out", None, "Folder to write data.html into.")
    command.run(start)


if __name__ == "__main__":
    run()
