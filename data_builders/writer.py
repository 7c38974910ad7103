"""Writing RLDS as TFDS ArrayRecord from many processes, without TensorFlow.

A dataset is built in `<out>/<version>.incomplete`: one task writes one whole shard into `shards/`,
then its report (JSON). The parent gives the shards their TFDS names, writes the metadata and
renames the folder, so that a half-written dataset never looks like one. A build that was stopped
goes on with the shards that have no report yet.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core import example_serializer, naming

from data_builders import episode
from data_builders.builder import Builder, Skip
from data_builders.episode import Episode
from jaxvp.data import array_record
from jaxvp.errors import UserError

# Of the machine or the code, not of an item. All else is the item's: a download holds what nobody
# thought of, and a build of days goes on.
FATAL = (MemoryError, ImportError, NameError, NotImplementedError)


class WriteError(UserError):
    """The folder of a build cannot be written: its disk is full, or it is gone."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """The items that become one file, in order."""

    split: str
    index: int
    items: tuple

    def path(self, folder: Path) -> Path:
        return folder / "shards" / f"{self.split}-{self.index:05d}"

    def report_path(self, folder: Path) -> Path:
        return self.path(folder).with_suffix(".json")


@dataclasses.dataclass
class Report:
    """What became of the items: episodes `kept`, `skipped` by reason, those kept with a repair by
    kind in `notes`, those kept without images of a camera in `missing`; `unreadable` lists {item,
    error}."""

    items: int = 0
    kept: int = 0
    records: int = 0
    steps: int = 0
    num_bytes: int = 0
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    notes: dict[str, int] = dataclasses.field(default_factory=dict)
    missing: dict[str, int] = dataclasses.field(default_factory=dict)
    unreadable: list[dict[str, str]] = dataclasses.field(default_factory=list)

    def add(self, other: "Report"):
        for name in ("items", "kept", "records", "steps", "num_bytes"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("skipped", "notes", "missing"):
            counts = collections.Counter(getattr(self, name)) + collections.Counter(
                getattr(other, name))
            setattr(self, name, dict(counts))
        self.unreadable += other.unreadable


def make_shards(builder: Builder, items: Sequence) -> list[Shard]:
    """Every item in its split, in shards of `items_per_shard`, however many workers there are.

    Of items with the same `episode_id` the first is taken.
    """
    splits: dict[str, list] = {}
    unique: dict[str, Hashable] = {}
    for item in items:
        unique.setdefault(builder.episode_id(item), item)
    for item in unique.values():
        splits.setdefault(builder.split(item), []).append(item)
    size = builder.items_per_shard
    return [
        Shard(split, start // size, tuple(members[start : start + size]))
        for split, members in sorted(splits.items())
        for start in range(0, len(members), size)
    ]


def check_cameras(features: tfds.features.FeaturesDict, report: Report):
    """Raises UserError when no kept episode has a camera: all of its images would be grey."""
    absent = [camera for camera in episode.cameras(features)
              if report.missing.get(camera) == report.kept]
    if report.kept and absent:
        raise UserError(f"None of {report.kept} episodes has images of {', '.join(absent)}: "
                        "complete the download, or leave that out by --cameras.")


def records(
    builder: Builder, features: tfds.features.FeaturesDict, item, report: Report
) -> Iterator[dict]:
    """The records of the episodes of an item; `report` counts what became of them.

    Raises:
      FATAL: with a note that names the item.
    """

    def build():  # A generator, whatever the builder has: it ends when it raises.
        yield from builder.build(item)

    episodes = build()
    while True:
        try:
            made = next(episodes, None)
            parts = made.records(features) if isinstance(made, Episode) else []
        except Skip as skip:
            made, parts = skip, []
        except FATAL as error:
            error.add_note(f"The item was {item!r}.")
            raise
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            report.unreadable.append({"item": str(item), "error": text})
            continue
        if made is None:
            break
        if isinstance(made, Skip):
            report.add(Report(skipped={str(made): 1}))
            continue
        texts = [text for part in parts for text in part["steps"]["language_instruction"]]
        notes = dict.fromkeys(made.notes, 1)
        if any(texts) and not all(texts):
            notes["some steps have no instruction"] = 1
        missing = {camera: 1 for camera in episode.cameras(features) if camera not in made.images}
        report.add(Report(kept=1, records=len(parts), notes=notes, missing=missing))
        for part in parts:
            report.steps += len(part["steps"]["is_first"])
            yield part
    report.items += 1


def encoder(features: tfds.features.FeaturesDict) -> Callable[[dict], bytes]:
    """Serializes records."""
    # Not tfds ShardWriter.write: it keeps every record of the shard in memory to count them.
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())

    def encode(record: dict) -> bytes:
        proto = serializer.get_tf_example(features.encode_example(record))
        return proto.SerializeToString(deterministic=True)  # Same options, same bytes.

    return encode


def write_shard(
    builder: Builder, shard: Shard, folder: Path,
    progress: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Builds the items of one shard into one ArrayRecord file and writes its report last.

    `progress` is called after each record and each item. Two processes may build the same shard,
    as Beam sometimes does: both write the same, and one is the last.

    Raises:
      WriteError: the folder cannot be written.
    """
    features, report = builder.features(), Report()
    encode = encoder(features)
    partial = shard.path(folder).with_suffix(f".{uuid.uuid4().hex}.partial")
    try:
        with _writing(folder):
            sink = ArrayRecordWriter(str(partial), array_record.OPTIONS)
        for item in shard.items:
            for record in records(builder, features, item, report):
                data = encode(record)
                with _writing(folder):
                    sink.write(data)
                progress(report)
            progress(report)
        with _writing(folder):
            sink.close()
            report.num_bytes = partial.stat().st_size
            os.replace(partial, shard.path(folder))
            _write(shard.report_path(folder), json.dumps(dataclasses.asdict(report)))
    finally:
        partial.unlink(missing_ok=True)
    return report


@contextlib.contextmanager
def _writing(folder: Path):
    try:
        yield
    except (OSError, RuntimeError) as error:  # ArrayRecord raises RuntimeError.
        raise WriteError(
            f"{folder} cannot be written: {error}. It keeps the finished shards: make room there "
            "and repeat the command to continue."
        ) from error


def _write(path: Path, text: str):
    """Writes a file that is there as a whole or not at all."""
    partial = path.with_suffix(f".{uuid.uuid4().hex}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def finished(shard: Shard, folder: Path) -> Report | None:
    """The report of a shard that an earlier run has finished."""
    path = shard.report_path(folder)
    return Report(**json.loads(path.read_text())) if path.exists() else None


def open_folder(builder: Builder, items: Sequence, out: Path) -> Path:
    """Makes `<out>/<version>.incomplete`, or takes the one that the same build has left.

    Raises:
      UserError: the dataset is there already, or the incomplete folder belongs to another
        build.
      WriteError: the folder cannot be written.
    """
    final = out / builder.version
    if final.exists():
        raise UserError(f"{final} exists already: choose another --out or delete it.")
    folder = out / f"{builder.version}.incomplete"
    digest = hashlib.sha256(repr(items).encode()).hexdigest()
    text = json.dumps(_identity(builder) | {"items": digest}, sort_keys=True)
    path = folder / "shards" / "recipe.json"
    if path.exists() and path.read_text() != text:
        raise UserError(
            f"{folder} is left from a build with other options or items, see {path}: "
            "repeat that build to finish it, or delete the folder."
        )
    if not path.exists() and any(file.suffix != ".partial" for file in path.parent.glob("*")):
        raise UserError(f"{folder} holds shards, but no {path.name} that says of which build: "
                        "delete the folder.")
    with _writing(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        for partial in path.parent.glob("*.partial"):  # Of workers that were killed.
            partial.unlink()
        _write(path, text)
    return folder


def _identity(builder: Builder) -> dict:
    return {"name": builder.name, "version": builder.version, "options": builder.options()}


def finish(
    builder: Builder, shards: Sequence[Shard], folder: Path, duplicates: int = 0
) -> tuple[Path, Report]:
    """Completes the dataset: file names, metadata, `build_report.json`, the folder's final name.

    Args:
      duplicates: items that `make_shards` left out, for the report.

    Returns:
      The final folder and the sum of the shards' reports.

    Raises:
      UserError: no episode was kept, or none that is has a camera of the features.
      WriteError: the folder cannot be written.
    """
    total, reports = Report(), {shard: finished(shard, folder) for shard in shards}
    for report in reports.values():
        total.add(report)
    if duplicates:
        total.add(Report(items=duplicates, skipped={"duplicate episode id": duplicates}))
    if not total.records:
        reasons = [f"{count} skipped: {reason}" for reason, count in total.skipped.items()]
        reasons += [f"{entry['item']}: {entry['error']}" for entry in total.unreadable[:3]]
        raise UserError(
            f"No episode of {total.items} was kept, so nothing is written. {'; '.join(reasons)}"
        )
    try:
        check_cameras(builder.features(), total)
    except UserError as error:
        raise UserError(f"{error} Delete {folder} before.") from error
    with _writing(folder):
        split_infos = []
        for split in sorted({shard.split for shard in shards}):
            kept = [shard for shard in shards if shard.split == split and reports[shard].records]
            if kept:
                split_infos.append(_named(builder, split, kept, reports, folder))
        tfds.folder_dataset.write_metadata(
            data_dir=folder,
            features=builder.features(),
            split_infos=split_infos,
            version=builder.version,
            filename_template=split_infos[0].filename_template,
            check_data=False,
            description=type(builder).__doc__ or builder.name,
            homepage="",
        )
        summary = _identity(builder) | dataclasses.asdict(total)
        _write(folder / "build_report.json", json.dumps(summary, indent=2))
        final = folder.with_name(builder.version)
        os.replace(folder, final)
        shutil.rmtree(final / "shards")  # Last: it has the reports, which a second try needs.
    return final, total


def _named(builder: Builder, split: str, shards: Sequence[Shard], reports: dict, folder: Path):
    """Gives the files of a split their TFDS names; returns its SplitInfo."""
    template = naming.ShardedFileTemplate(
        data_dir=folder, dataset_name=builder.name, split=split, filetype_suffix="array_record"
    )
    for index, shard in enumerate(shards):
        # After a kill between these renames the source is gone and the target is there.
        if shard.path(folder).exists():
            name = template.sharded_filepath(shard_index=index, num_shards=len(shards))
            os.replace(shard.path(folder), name)
    return tfds.core.SplitInfo(
        name=split,
        shard_lengths=[reports[shard].records for shard in shards],
        num_bytes=sum(reports[shard].num_bytes for shard in shards),
        filename_template=template,
    )
