"""Latents of every clip, computed once, so that no training step runs the codec.

    python -m jaxvp.data.precompute --config=CONFIG --out=DIR --config.pretrained.codec=WEIGHTS

writes each source of the config as DIR/<name>: the same RLDS records without their images, and with
the feature steps/observation/latents, float16[t, h, w, c] of the clip (the config's cameras,
layout, frames and sizes) that starts at this step, at every --stride-th step, and nothing at the
others. plan.json says of which source and with which settings. A run that was stopped continues
with the files that are missing; with several processes each does its share of the files, and all
end when one fails. Text embeddings are made by jaxvp.data.text_embeddings.
"""

import contextlib
import dataclasses
import hashlib
import json
import uuid
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import rich.progress
import tensorflow_datasets as tfds
from absl import flags
from array_record.python.array_record_module import ArrayRecordWriter
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tensorflow_datasets.core import naming
from tensorflow_datasets.proto import tf_example_pb2

from jaxvp import command, distributed
from jaxvp import config as config_lib
from jaxvp import step as step_lib
from jaxvp.data import array_record, augment, mixture, rlds
from jaxvp.data.clips import Views
from jaxvp.errors import UserError
from jaxvp.errors import naming as naming_file

FEATURE = "steps/observation/latents"
WORKERS = 8  # Threads that decode images.


class Encoder:
    """A config's codec on the devices of this process.

    Attributes:
      spec: of the clips; shape: (t, h, w, c) of their latents.
      identity: what latents depend on beside the pictures, JSON values; kept with every record.
    """

    def __init__(self, config: step_lib.TrainConfig, batch_size: int):
        """Reads the weights of the codec that `config.pretrained.codec` names.

        Raises:
          ConfigError, UserError, OSError: there are none, or they do not fit.
        """
        if config.data.latents:
            raise config_lib.ConfigError("config.data.latents is set: give the config of the "
                                         "pictures that the latents are of.")
        if config.data.crop < 1:
            raise config_lib.ConfigError(f"config.data.crop is {config.data.crop}, but latents are "
                                         "of whole pictures: set it to 1.0, here and in training.")
        self.spec = spec = mixture.clip_spec(config.data)
        method = step_lib.make_method(config, dataclasses.replace(
            spec, action_size=spec.action_size or 1, state_size=spec.state_size or 1))
        self.shape, self._batch_size = method.latent_shape, batch_size
        mesh = jax.sharding.Mesh(np.array(jax.local_devices()), ("data",))
        if batch_size % mesh.size:
            raise UserError(f"--batch_size={batch_size} is not a multiple of the {mesh.size} "
                            "devices of this process.")
        self._rows, everywhere = (NamedSharding(mesh, spec) for spec in (P("data"), P()))
        abstract = jax.eval_shape(method.video_codec.init, jax.random.key(0))
        path, params = config.pretrained.get("codec", ""), {}
        if abstract:
            if not path:
                raise config_lib.ConfigError("config.pretrained.codec is empty: name the weights "
                                             "of the codec.")
            abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=everywhere), abstract)
            params, report = method.load("codec", path, abstract)
            distributed.note(f"codec from {path}: {report}")
        self._params = {"codec": params} if params else {}
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(params):
            digest.update(np.asarray(leaf).tobytes())
        self.identity = {
            "codec": dict(config.method.get("codec", {})),
            "weights": digest.hexdigest()[:16] if params else "", "layout": config.data.layout,
            "cameras": list(spec.cameras), "num_frames": spec.num_frames, "fps": spec.fps,
            "image_size": [spec.height, spec.width], "latents": list(self.shape)}
        self._encode = jax.jit(
            lambda params, clip: method.encode(params, augment.fit(clip, spec)))

    def __call__(self, clips: Iterable[Mapping]) -> list[np.ndarray]:
        """float16[t, h, w, c] of every clip."""
        encoded, batch = [], []

        def flush():
            rows = batch + batch[-1:] * (self._batch_size - len(batch))
            seen = {name: jax.device_put(np.stack([row[name] for row in rows]), self._rows)
                    for name in ("video", "view_mask")}
            latents = np.asarray(self._encode(self._params, seen), np.float16)
            encoded.extend(latents[: len(batch)])
            batch.clear()

        for clip in clips:
            batch.append(clip)
            if len(batch) == self._batch_size:
                flush()
        if batch:
            flush()
        return encoded


def precompute(source: mixture.SourceConfig, encoder: Encoder, out: Path, stride: int) -> Path:
    """Writes one source with its latents, unless they are there; returns the folder of the dataset.

    Raises:
      UserError: what is there has another plan or none, finished or not.
      UserError: the processes do not share `out`, or differ in their settings.
      UserError, OSError: the source cannot be read, or `out` not written.
    """
    original = rlds.version_folder(source.path)
    info = tfds.builder_from_directory(original).info
    splits = [split for split in info.splits.values()
              if split.name in (source.split, source.validation_split)]
    episodes = {split.name: rlds.Episodes(original, split.name) for split in splits}
    for part in episodes.values():
        if part.damaged:
            raise UserError(f"{next(iter(part.damaged.values()))}: build the dataset again.")
    settings = encoder.identity | {"stride": stride, "views": [
        source.cameras.get(camera, camera) for camera in encoder.spec.cameras]}
    plan = json.dumps(settings | {"source": {name: part.digest for name, part in episodes.items()}},
                      sort_keys=True)

    final = out / original.name
    folder = final.with_name(f"{final.name}.incomplete")
    if final.exists():
        if _plan_in(final) != plan:
            raise UserError(f"{final} exists already, and not with these settings of this source, "
                            "see its plan.json: choose another --out or delete it.")
        distributed.note(f"{final} is finished.")
        return final
    if folder.exists() and _plan_in(folder) not in ("", plan):
        raise UserError(f"{folder} is left from a run with other settings or another source, see "
                        "its plan.json: repeat that run to finish it, or delete the folder.")
    distributed.together(f"start {final}")  # All have looked before one writes.
    folder.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        for partial in folder.glob("*.partial"):  # Of a run that was killed.
            partial.unlink()
        partial = folder / "plan.json.partial"
        partial.write_text(plan)
        partial.rename(folder / "plan.json")
    distributed.together(f"write {final}")
    if _plan_in(folder) != plan:
        raise UserError(f"{folder}/plan.json is not what process {jax.process_index()} would "
                        "write: start all processes with the same flags, on one shared --out.")

    number = 0
    for split in splits:
        views = Views(episodes[split.name], encoder.spec, source.cameras)
        ends = np.cumsum(split.shard_lengths)
        for end, count, path in zip(ends, split.shard_lengths, split.filepaths, strict=True):
            number += 1
            target = folder / Path(path).name
            if target.exists() or number % jax.process_count() != jax.process_index():
                continue
            records = range(int(end) - count, int(end))
            _write(target, records, views, encoder, settings)
    distributed.together(f"finish {final}")
    if jax.process_index() == 0:
        _finish(folder, final, info, splits, encoder.shape)
    distributed.together(f"leave {final}")
    return final


def _plan_in(folder: Path) -> str | None:
    """The plan of what is in a folder: "" if nothing is, None if nobody knows."""
    if (folder / "plan.json").exists():
        return (folder / "plan.json").read_text()
    return None if any(file.suffix != ".partial" for file in folder.iterdir()) else ""


def _write(target: Path, records: range, views: Views, encoder: Encoder, settings: dict):
    """One file: the records without their images, with latents."""
    partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}.partial")
    try:
        with _writing(target):
            writer = ArrayRecordWriter(str(partial), array_record.OPTIONS)
        with ThreadPoolExecutor(WORKERS) as pool:
            for record in rich.progress.track(records, target.name, disable=len(records) < 4):
                data = _encoded(record, views, encoder, settings, pool)
                with _writing(target):
                    writer.write(data)
        with _writing(target):
            writer.close()
        partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(target: Path):
    try:
        yield
    except RuntimeError as error:  # Of ArrayRecord, also for a full disk.
        raise UserError(f"{target} cannot be written: {error}") from error


def _encoded(record: int, views: Views, encoder: Encoder, settings: dict,
             pool: ThreadPoolExecutor) -> bytes:
    """A record with latents in place of images."""
    episodes = views.episodes
    steps, length = episodes[record], int(episodes.lengths[record])

    def clip(start):
        arrays = encoder.spec.empty()
        try:
            views.fill(record, steps, start, arrays)
        except rlds.BadRecord as error:
            raise UserError(f"{episodes.name(record)}: {error}. Build the dataset "
                            "again.") from error
        return arrays

    starts = range(0, length, settings["stride"])
    latents = dict(zip(starts, encoder(pool.map(clip, starts)), strict=True))
    example = tf_example_pb2.Example.FromString(episodes.raw(record))
    feature = example.features.feature
    for camera in episodes.cameras:
        del feature[f"steps/observation/{camera}"]
    feature[FEATURE].bytes_list.value.extend(
        latents[step].tobytes() if step in latents else b"" for step in range(length))
    options = feature["episode_metadata/options"].bytes_list
    options.value[0] = json.dumps(
        json.loads(options.value[0]) | {"latents": settings}, sort_keys=True).encode()
    return example.SerializeToString(deterministic=True)


def _finish(folder: Path, final: Path, info, splits, shape):
    steps = dict(info.features["steps"].feature)
    observation = {name: feature for name, feature in steps["observation"].items()
                   if not isinstance(feature, tfds.features.Image)}
    observation["latents"] = tfds.features.Tensor(
        shape=(None, *shape[1:]), dtype=np.float16, encoding="bytes",
        doc="of the clip that starts here; no frames: none does")
    steps["observation"] = observation
    features = tfds.features.FeaturesDict(
        {"steps": tfds.features.Dataset(steps),
         "episode_metadata": info.features["episode_metadata"]})
    split_infos = []
    for split in splits:
        template = naming.ShardedFileTemplate(
            data_dir=folder, dataset_name=info.name, split=split.name,
            filetype_suffix="array_record")
        size = sum((folder / Path(path).name).stat().st_size for path in split.filepaths)
        split_infos.append(tfds.core.SplitInfo(
            name=split.name, shard_lengths=split.shard_lengths, num_bytes=size,
            filename_template=template))
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=features, split_infos=split_infos, version=str(info.version),
        filename_template=template, check_data=False, description=info.description, homepage="")
    folder.rename(final)


def start(settings):
    """What the command does with its flags, in every process; when one fails, all end."""
    with distributed.processes():
        write(settings)


def write(settings):
    """Writes every source of the config.

    Raises:
      ConfigError, UserError, OSError: see Encoder and `precompute`.
    """
    config = config_lib.build(step_lib.TrainConfig, settings.config, "config")
    # Of DIR/NAME/VERSION and DIR/NAME alike, NAME.
    names = [rlds.version_folder(source.path).parent.name for source in config.data.sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"Several sources are in folders named {', '.join(twice)}, and would "
                        f"become one in --out={settings.out}: run the command for one at a time.")
    encoder = Encoder(config, settings.batch_size)
    console = command.console()
    for source, name in zip(config.data.sources, names, strict=True):
        with naming_file(Path(settings.out, name)):
            folder = precompute(source, encoder, Path(settings.out, name), settings.stride)
        console.print(f"{source.path}: {folder}", soft_wrap=True)
    console.print(f"data: {{latents: {encoder.shape}}}, and these sources.", soft_wrap=True)


def run():
    command.define_config("The run that the latents are for")
    flags.DEFINE_string("out", None, "folder of the datasets")
    flags.DEFINE_integer("stride", 4, "steps from one clip to the next", lower_bound=1)
    flags.DEFINE_integer("batch_size", 16, "clips that are encoded together", lower_bound=1)
    flags.mark_flag_as_required("out")
    command.run(start, "repeat the command to continue with the files that are missing")


if __name__ == "__main__":
    run()
