"""Trains what --config says: `python -m jaxvp.main --config=configs/pretrain.py`."""

import pathlib

import jax
from absl import flags

from jaxvp import command, distributed, step
from jaxvp import config as config_lib
from jaxvp.data import rlds
from jaxvp.data.sources import clip_spec
from jaxvp.step import TrainConfig
from jaxvp.train import check, train


def start(settings):
    """Trains what the flags say."""
    with distributed.processes(settings.silence):
        config = settings.config
        name = command.config_name().replace(".py:", "_").removesuffix(".py")
        workdir = settings.workdir or pathlib.Path("runs") / name
        built = config_lib.build(TrainConfig, config, "config")
        mesh = check(built, workdir)  # Before data is made.
        if settings.dry_run and embedded_is_absent(built):  # What can be known without the data.
            distributed.note(f"{built.embedded['path']} is absent: a run builds it first.")
            return step.build(built, clip_spec(built.data), mesh).describe()
        if built.embedded:
            if jax.process_index() == 0 and embedded_is_absent(built):
                build_embedded(built)
            distributed.together("embedded data")
        train(config, workdir, settings.dry_run)


def embedded_is_absent(config: TrainConfig) -> bool:
    """Whether a source is the config's embedded dataset, and there is nothing at its path."""
    path = config.embedded and pathlib.Path(config.embedded["path"])
    if path not in [pathlib.Path(source.path) for source in config.data.sources]:
        return False
    try:
        rlds.version_folder(path)
    except rlds.NoDataset:
        return True
    return False


def build_embedded(config: TrainConfig):
    """Builds the tabletop dataset at the path that `config.embedded` says."""
    from data_builders.build import build
    from data_builders.tabletop.tabletop import Builder

    options = dict(config.embedded)
    path = pathlib.Path(options.pop("path"))
    distributed.note(f"{path} is absent: building the embedded dataset.")
    builder = config_lib.build(Builder, options, "config.embedded")
    build(builder, builder.items(), path, num_workers=2)


def run():
    """Entry point `jaxvp-train`."""
    command.define_config()
    flags.DEFINE_string(
        "workdir", None, "Folder of the run; default: runs/NAME for configs/NAME.py, "
        "runs/NAME_VARIANT for configs/NAME.py:VARIANT. A run that "
        "is there already is continued.")
    flags.DEFINE_float(
        "silence", 60, "Of several processes: seconds without a sign of life after which one "
        "counts as dead and the others end. They notice at once when a process alone dies.",
        lower_bound=1)
    flags.DEFINE_bool("dry_run", False, "Print what would be trained, and its size; stop.")
    command.run(start)


if __name__ == "__main__":
    run()
