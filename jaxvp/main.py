"""Trains what --config says: `python -m jaxvp.main --config=configs/pretrain.py`."""

import pathlib

import jax
from absl import flags

from jaxvp import command, distributed
from jaxvp import config as config_lib
from jaxvp.step import TrainConfig
from jaxvp.train import check, train


def start(settings):
    """Trains what the flags say."""
    with distributed.processes(settings.silence):
        config = settings.config
        name = command.config_name().replace(".py:", "_").removesuffix(".py")
        workdir = settings.workdir or pathlib.Path("runs") / name
        check(config_lib.build(TrainConfig, config, "config"), workdir)  # Before data is made.
        if config.get("embedded"):
            if jax.process_index() == 0:
                build_embedded(config)
            distributed.together("embedded data")
        train(config, workdir, settings.dry_run)


def build_embedded(config):
    """Builds the tabletop dataset at the first source's path when there is none."""
    from data_builders.build import build
    from data_builders.tabletop.tabletop import Builder

    path = pathlib.Path(config.data.sources[0]["path"])
    if not any(path.glob("*/dataset_info.json")):
        distributed.note(f"{path} is absent: building the embedded dataset.")
        builder = config_lib.build(Builder, config.embedded, "config.embedded")
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
