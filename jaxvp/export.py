"""Makes a policy bundle of a training run:

    python -m jaxvp.export --workdir=DIR --out=BUNDLE
"""

import dataclasses

import jax
import jax.export
import numpy as np
from absl import flags
from etils import epath

from jaxvp import checkpoint, command
from jaxvp import config as config_lib
from jaxvp.data import augment, checks
from jaxvp.data.clips import ClipSpec
from jaxvp.data.text_embeddings import TextEmbeddings
from jaxvp.errors import UserError
from jaxvp.methods.base import Method
from jaxvp.models import attention
from jaxvp.policy import bundle, program
from jaxvp.rules import named_leaves
from jaxvp.step import TrainConfig, make_method

PLATFORMS = ("cpu", "cuda", "tpu")
ASSETS = {"config", "spec", "normalizers", "embodiments", "versions", "git_revision"}


def export(workdir: epath.PathLike, out: epath.PathLike, batch_size: int, robot: str | None = None):
    """Writes the bundle of the averaged parameters in `workdir` to `out`.

    Raises:
      CheckpointError, UserError: no checkpoint, or one of another version; no empty folder, no such
        robot, a stage that trains no policy.
      OSError: the bundle cannot be written.
    """
    if batch_size < 1:
        raise UserError(f"--batch_size must be at least 1, found {batch_size}.")
    assets, config, spec = read_assets(workdir)
    step = checkpoint.restore_json(workdir, "progress")["step"]
    spec, crop = dataclasses.replace(spec, latents=()), config.data.crop  # A policy sees pictures.
    # The runner resizes a picture to this; of a larger one a part is as sharp as in training.
    image_size = (crop < 1 and spec.source_size) or (spec.height, spec.width)
    robots = [name for name, n in assets["normalizers"].items() if n["action"]]
    if robot is None and len(robots) == 1:
        robot = robots[0]
    if robot not in robots:
        raise UserError(
            f"--robot={robot}: {workdir} was trained on the actions of {robots}; name one.")
    normalizer, embodiment = assets["normalizers"][robot], assets["embodiments"][robot]
    method = make_method(config, spec)
    if config.stage not in method.policy_stages:
        raise UserError(
            f"{workdir} is of the stage {config.stage!r}, which trains no policy: train one from "
            f"it, with config.stage one of {method.policy_stages} and config.init_from={workdir}.")
    params = checkpoint.restore_params(workdir)
    check_params(workdir, method, params)
    if spec.text_width:
        TextEmbeddings(config.data.text_embeddings)  # Not there: said before anything is made.
    bundle.claim(out)

    views = len(spec.cameras)
    row = {
        "video": ((views, 1, *image_size, 3), np.uint8),
        "view_mask": ((views,), np.bool_),
        "text": spec.text,
        "state": ((spec.state_size,), np.float32),
        "state_mask": ((spec.state_size,), np.bool_),
    }
    seen = {name: jax.ShapeDtypeStruct((batch_size, *shape), dtype)
            for name, (shape, dtype) in row.items()}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    keys = jax.ShapeDtypeStruct((batch_size, 2), np.uint32)

    def exported(function):
        def call(params, seen, keys):
            seen = augment.fit(seen, spec, crop=crop)
            return function(params, seen, jax.random.wrap_key_data(keys))
        with attention.portable():
            made = jax.export.export(jax.jit(call), platforms=PLATFORMS)(shapes, seen, keys)
        program.check(made, f"{config.method['name']}.{function.__name__}")
        return made.serialize()

    options = embodiment["options"]
    manifest = {
        "method": config.method["name"], "stage": config.stage, "step": step,
        "robot": robot, "camera_text": embodiment["camera_text"], "layout": config.data.layout,
        "cameras": embodiment["cameras"], "image_size": image_size,
        "image_orientation": "upright", "text_length": spec.text_length,
        "text_width": spec.text_width,
        "fps": embodiment["fps"], "video_fps": spec.fps, "chunk": spec.chunk,
        "execution_horizon": config.execution_horizon, "batch_size": batch_size,
        "action_size": spec.action_size, "state_size": spec.state_size,
        "action": normalizer["action"], "state": normalizer["state"],
        "normalization": normalizer["mode"],
        "protocol": {name: options[name] for name in checks.PROTOCOL if name in options},
        "git_revision": assets["git_revision"], "versions": assets["versions"],
        "config": assets["config"],
    }
    bundle.save(out, manifest, params, exported(method.act), exported(method.imagine),
                config.data.text_embeddings)
    print(f"{out}: {manifest['method']} after step {step} of stage {config.stage}, for {robot}.")


def read_assets(workdir: epath.PathLike) -> tuple[dict, TrainConfig, ClipSpec]:
    """The assets of a checkpoint, see `checkpoint.run_assets`, and the config and spec in them.

    Raises:
      CheckpointError, UserError: there is no checkpoint, or one of another version of jaxvp.
    """
    assets = checkpoint.restore_json(workdir, "assets")
    if absent := ASSETS - assets.keys():
        raise UserError(f"{workdir} was written by another version of jaxvp, without "
                        f"{', '.join(sorted(absent))}: use that one, or train again.")
    written = f"{workdir} of jaxvp {assets['versions']['jaxvp']} {assets['git_revision'][:12]}"
    return (assets, config_lib.build(TrainConfig, assets["config"], f"{written}: config"),
            config_lib.build(ClipSpec, assets["spec"], f"{written}: spec"))


def check_params(workdir: epath.PathLike, method: Method, params: dict):
    """Raises UserError unless the parameters are those of the method as it is now."""
    wanted, found = ({name: leaf.shape for name, leaf in named_leaves(tree).items()} for tree in
                     (jax.eval_shape(method.init, jax.random.key(0)), params))
    for name in sorted(wanted | found):
        if wanted.get(name) != found.get(name):
            raise UserError(
                f"{workdir} was written by another version of jaxvp, with other parameters, such "
                f"as {name}: expected {wanted.get(name, 'none')}, found {found.get(name, 'none')}. "
                "Use that one, or train again.")


def start(settings):
    """Exports what the flags say."""
    export(settings.workdir, settings.out, settings.batch_size, settings.robot)


def run():
    """Entry point `jaxvp-export`."""
    flags.DEFINE_string("workdir", None, "Workdir of a training run, or one of its checkpoints.")
    flags.DEFINE_string("out", None, "Folder of the bundle; it must be empty or absent.")
    flags.DEFINE_integer("batch_size", 16, "Rows of the exported functions.", lower_bound=1)
    flags.DEFINE_string("robot", None, "Which robot, when the run was trained on several.")
    flags.mark_flags_as_required(["workdir", "out"])
    command.run(start)


if __name__ == "__main__":
    run()
