"""Converts a raw dataset to RLDS.

    python -m data_builders.build --list                               # all builders
    python -m data_builders.build NAME --help                          # options of one
    python -m data_builders.build NAME --raw=DIR --dry_run             # what the raw folder holds
    python -m data_builders.build NAME --raw=DIR --out=DIR [--num_workers=8] [options]

The dataset appears as OUT/<version> when it is complete. A build that was stopped continues when
the same command is run again. Large datasets are built by Apache Beam, see data_builders/beam.py.
"""

import argparse
import dataclasses
import datetime
import importlib
import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
import typing
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from pathlib import Path

import rich.progress

from data_builders import writer
from data_builders.builder import Builder
from jaxvp.data import rlds
from jaxvp.errors import UserError, did_you_mean, one_line_errors

# A dry run builds as many items as it can in this time, at most so many.
SAMPLE_SECONDS, SAMPLE_ITEMS = 20, 16


def builder_names() -> list[str]:
    """Folders NAME next to this file that hold NAME.py."""
    folders = Path(__file__).parent.iterdir()
    return sorted(folder.name for folder in folders if (folder / f"{folder.name}.py").exists())


def builder_class(name: str) -> type[Builder]:
    """The class `Builder` of `data_builders/NAME/NAME.py`.

    Raises:
      UserError: there is no such builder; the message suggests the nearest name.
      ImportError: it needs a package that is not installed; the message says which.
    """
    names = builder_names()
    if name not in names:
        raise UserError(f"No builder {name!r}.{did_you_mean(name, names)} There are: "
                        f"{', '.join(names)}.")
    try:
        return importlib.import_module(f"data_builders.{name}.{name}").Builder
    except ModuleNotFoundError as error:
        package = error.name.split(".")[0]
        if package in ("data_builders", "jaxvp"):
            raise
        raise UserError(f"{name} needs `pip install {package}`") from error


def list_builders():
    """Prints one line for each builder."""
    for name in builder_names():
        try:
            text = (builder_class(name).__doc__ or "").partition("\n")[0]
        except UserError as error:
            text = f"({error})"
        print(f"{name:24} {text}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"error: {message} (--help lists the options)\n")


def add_options(parser: argparse.ArgumentParser, cls: type[Builder]):
    """One flag per field of the builder; tuples are comma-separated, booleans get a --no- form."""
    types = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        settings = {"help": field.metadata.get("help", " ")}
        if field.default is not dataclasses.MISSING:
            shown = ",".join(field.default) if isinstance(field.default, tuple) else field.default
            settings |= {"default": field.default, "help": f"{settings['help']} [{shown}]"}
        settings["help"] = settings["help"].replace("%", "%%")  # argparse formats it.
        if types[field.name] is bool:
            settings["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(types[field.name]) is tuple:
            settings["type"] = lambda text: tuple(part for part in text.split(",") if part)
        else:
            settings["type"] = types[field.name]
        parser.add_argument(f"--{field.name}", **settings)


def parse(argv: list[str]) -> tuple[argparse.Namespace, Builder]:
    """The command line as (settings of the build, builder)."""
    if not argv or argv[0].startswith("-"):
        sys.exit(f"{__doc__}\nBuilders: {', '.join(builder_names())}")
    cls = builder_class(argv[0])
    parser = _Parser(f"data_builders.build {argv[0]}", description=cls.__doc__, allow_abbrev=False)
    flag = parser.add_argument
    flag("--out", type=Path, help="the dataset becomes OUT/<version>")
    flag("--num_workers", type=int, default=2, help="processes [%(default)s]")
    flag("--max_episodes", type=int, help="build only the first MAX_EPISODES items")
    flag("--dry_run", action="store_true",
         help="print what the raw folder holds, from a sample of its items; write nothing")
    flag("--beam", type=shlex.split, metavar="FLAGS",
         help="build on Apache Beam with these flags of it, see data_builders/beam.py")
    add_options(parser, cls)
    settings, unknown = parser.parse_known_args(argv[1:])
    if unknown:
        flags = [f"--{name}" for name in vars(settings)]
        hint = did_you_mean(unknown[0].split("=")[0], flags, str)
        parser.error(f"unknown {unknown[0]}.{hint} There are: {', '.join(flags)}.")
    for field in dataclasses.fields(cls):
        if field.default is dataclasses.MISSING and not getattr(settings, field.name):
            parser.error(f"--{field.name} is missing: {field.metadata['help']}")
    if settings.out is None and not settings.dry_run:
        parser.error("--out is missing: the folder that the dataset is written into")
    for name in ("num_workers", "max_episodes"):
        if (value := getattr(settings, name)) is not None and value < 1:
            parser.error(f"--{name} must be at least 1, found {value}")
    options = {field.name: getattr(settings, field.name) for field in dataclasses.fields(cls)}
    return settings, cls(**options)


def dry_run(builder: Builder, items: list, num_workers: int):
    """Builds a sample of the items, evenly spaced, and prints what they are; writes nothing.

    Raises:
      UserError: the sample is all there is, and none of its episodes has some camera.
    """
    shards = writer.make_shards(builder, items)
    unique = [item for shard in shards for item in shard.items]
    print(f"{builder.name} {builder.version}: {len(items)} items in {len(shards)} shards"
          f"{_duplicates(items, unique)}")
    features = builder.features()
    steps, report = features["steps"].feature, writer.Report()
    for name, feature in steps["observation"].items():
        text = feature.doc.desc if name == "state" else f"camera {list(feature.shape)}"
        print(f"  {name}: {text}")
    print(f"  action: {steps['action'].doc.desc if 'action' in steps else 'none'}")
    encode, first, start = writer.encoder(features), None, time.monotonic()
    for item in unique[:: len(unique) // SAMPLE_ITEMS + 1]:
        lengths = []
        for record in writer.records(builder, features, item, report):
            report.num_bytes += len(encode(record))
            first = first or (item, record, lengths)
            lengths.append(len(record["steps"]["is_first"]))
        seconds = time.monotonic() - start
        if seconds > SAMPLE_SECONDS:
            break
    print_report(report)
    if first:
        item, record, lengths = first
        print(f"item {item}: records of {lengths} steps, "
              f"instruction {record['steps']['language_instruction'][0]!r}")
        for name, value in record["episode_metadata"].items():
            print(f"  {name}: {value}")
    if report.items:
        scale = len(unique) / report.items
        left = datetime.timedelta(seconds=round(seconds * scale / num_workers))
        if report.items == len(unique):
            writer.check_cameras(features, report)
        print(f"all {len(unique)} items: about {report.num_bytes * scale / 1e9:.3f} GB, {left} "
              f"(hours:minutes:seconds) with {num_workers} workers")


def _duplicates(items: Sequence, unique: Sequence) -> str:
    count = len(items) - len(unique)
    return f", without {count} of the same episode id as others" if count else ""


def print_report(report: writer.Report):
    """Prints how many episodes are kept, skipped by reason, repaired by kind, without a camera, and
    unreadable."""
    total = report.kept + sum(report.skipped.values()) + len(report.unreadable)
    print(f"{report.kept} of {total} episodes kept, {report.records} records, {report.steps} steps,"
          f" {report.num_bytes / 1e6:.1f} MB, of {report.items} items")
    for reason, count in report.skipped.items():
        print(f"  skipped {count}: {reason}")
    for kind, count in report.notes.items():
        print(f"  repaired {count}: {kind}")
    for camera, count in report.missing.items():
        print(f"  {camera}: {count} of {report.kept} episodes have no images of it")
    for entry in report.unreadable[:20]:
        print(f"  unreadable {entry['item']}: {entry['error']}")
    if len(report.unreadable) > 20:
        print(f"  unreadable: {len(report.unreadable) - 20} more, see build_report.json")


# In a worker: items and episodes done, by shard. Each shard has one writer, so there is no lock,
# which a worker that is killed would keep.
_counts = None


def _start_worker(counts):
    global _counts
    _counts = counts
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ends at once, and without a traceback.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(builder: Builder, number: int, shard: writer.Shard, folder: Path):
    def progress(report: writer.Report):
        _counts[2 * number : 2 * number + 2] = report.items, report.kept

    writer.write_shard(builder, shard, folder, progress)


def build(
    builder: Builder, items: list, out: Path, num_workers: int = 2,
    beam_flags: Sequence[str] | None = None,
) -> tuple[Path, writer.Report]:
    """Builds `items` into `<out>/<builder.version>` with `num_workers` processes, or on Beam.

    Returns:
      The folder of the dataset and the report, which is also in `build_report.json` there.

    Raises:
      UserError: the dataset exists, or `out` holds an unfinished build with other options.
      UserError: no episode was kept, or none of those has some camera.
      RuntimeError: a worker died, or the disk is full; the finished shards stay for the next run.
      ImportError: Beam is not installed.
    """
    folder = writer.open_folder(builder, items, out)
    shards = writer.make_shards(builder, items)
    todo = [shard for shard in shards if writer.finished(shard, folder) is None]
    if beam_flags is not None:
        try:
            from data_builders import beam
        except ModuleNotFoundError as error:
            raise UserError(f"--beam needs `launch/install.sh beam`: {error}") from error
        beam.write_shards(builder, todo, folder, beam_flags)
    else:
        _build_in_processes(builder, shards, todo, folder, num_workers)
    duplicates = len(items) - sum(len(shard.items) for shard in shards)
    return writer.finish(builder, shards, folder, duplicates)


def _build_in_processes(
    builder: Builder, shards: Sequence[writer.Shard], todo: Sequence[writer.Shard], folder: Path,
    num_workers: int,
):
    total, left = (sum(len(shard.items) for shard in part) for part in (shards, todo))
    context = multiprocessing.get_context("spawn")  # A forked child of a threaded process may hang.
    counts = context.RawArray("l", 2 * len(todo))
    bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("items, {task.fields[rate]:.1f} episodes/s, left"),
        rich.progress.TimeRemainingColumn(),
        speed_estimate_period=600,
    )
    task = bar.add_task(builder.name, total=total, completed=total - left, rate=0.0)

    with bar:
        pool = ProcessPoolExecutor(
            min(num_workers, len(todo) or 1), context, _start_worker, (counts,)
        )
        try:
            waiting = {
                pool.submit(_work, builder, number, shard, folder)
                for number, shard in enumerate(todo)
            }
            while waiting:
                ended, waiting = wait(waiting, timeout=0.2, return_when=FIRST_EXCEPTION)
                for future in ended:
                    future.result()
                bar.update(task, completed=total - left + sum(counts[::2]),
                           rate=sum(counts[1::2]) / bar.tasks[0].elapsed)
        except BrokenProcessPool as error:
            raise UserError(
                "A worker process died, often for lack of memory. Repeat the command, with a "
                f"smaller --num_workers, to continue: {folder} keeps the finished shards."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def main(argv: list[str]):
    if argv == ["--list"]:
        return list_builders()
    settings, builder = parse(argv)
    items = list(builder.items())[: settings.max_episodes]
    if settings.dry_run:
        return dry_run(builder, items, settings.num_workers)
    folder, report = build(builder, items, settings.out, settings.num_workers, settings.beam)
    print(folder)
    print_report(report)
    for split in rlds.splits(folder):  # Reads every record back, and leaves the index for readers.
        episodes = rlds.Episodes(folder, split)
        print(f"  {split}: {len(episodes)} records, {episodes.lengths.sum()} steps, readable")


if __name__ == "__main__":
    with one_line_errors("repeat the command to continue with the shards that are missing"):
        main(sys.argv[1:])
