"""Runs so small that they compile and train in seconds."""

import functools
import json

import orbax.checkpoint as ocp

from configs import pretrain
from jaxvp.rules import named_leaves

SMALL = {
    "method.video.width": 16, "method.video.ffn": 32, "method.video.layers": 2,
    "method.video.unroll": 1, "method.taps": (0, 1), "method.text.width": 8,
    "method.head.width": 16, "method.head.layers": 1, "method.head.heads": 2,
    "method.video_steps": 2, "method.action_steps": 2, "data.image_size": 16,
    "data.num_frames": 3, "data.chunk": 4, "execution_horizon": 2, "embedded": {},
    "optimizer.warmup_steps": 1, "batch_size": 8, "log_every": 1, "validate_every": 0,
    "validation_batches": 1, "sample_every": 0, "sample_clips": 2, "save_every": 3, "keep": 9,
}


def config_of(dataset, base=pretrain, **changes):
    config = base.get_config()
    for key, value in (SMALL | {"steps": 4} | changes).items():
        with config.unlocked(), config.ignore_type():
            *path, last = key.split(".")
            functools.reduce(getattr, path, config)[last] = value
    config.data.sources = ({"path": dataset},)
    return config


def weights(workdir, step, item="params"):
    with ocp.StandardCheckpointer() as reader:
        return named_leaves(reader.restore(workdir / "checkpoints" / str(step) / item))


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def write_config(config, workdir):
    """A config as a file beside its workdir, for a command."""
    file = workdir.with_suffix(".py")
    file.write_text("from ml_collections import ConfigDict\n\n\n"
                    f"def get_config():\n    return ConfigDict({config.to_dict()!r})\n")
    return file
