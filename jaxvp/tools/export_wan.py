"""A training run's video transformer as weights that diffusers reads.

    python -m jaxvp.tools.export_wan --workdir=runs/pretrain --out=FOLDER

writes its averaged parameters as a folder for `diffusers.WanTransformer3DModel.from_pretrained`.
"""

from absl import flags
from etils import epath

from jaxvp import checkpoint, command
from jaxvp.errors import UserError
from jaxvp.export import read_assets
from jaxvp.step import make_method
from jaxvp.weights import wan


def export(workdir: epath.PathLike, out: epath.PathLike, dtype: str, part: str = ""):
    """Writes a video transformer of a run; see `wan.save`.

    Args:
      workdir: of the run, or one of its checkpoints.
      out: folder, without safetensors in it yet.
      dtype: of the weights.
      part: of the method's `video_models`; "": the only one.

    Raises:
      UserError: the run has no such video model, or several and none is named.
    """
    method, params = make_method(*read_assets(workdir)[1:]), checkpoint.restore_params(workdir)
    models = {name: model for name, model in method.video_models.items() if name in params}
    if part not in models and (part or len(models) != 1):
        raise UserError(f"--part={part}: {workdir} has the video models {sorted(models)}; expected "
                        "one of them.")
    (name,) = [part] if part else models
    network = models[name].network
    wan.save(params[name], network, out, dtype=dtype)
    print(f"{out}: {network.parameter_count:,} parameters of {name!r} in {dtype}, for diffusers' "
          "WanTransformer3DModel.")


def start(settings):
    """Exports what the flags say."""
    export(settings.workdir, settings.out, settings.dtype, settings.part)


def run():
    """The command; see the module's docstring."""
    flags.DEFINE_string("workdir", None, "Workdir of a training run, or one of its checkpoints.")
    flags.DEFINE_string("out", None, "Folder for the weights; without safetensors in it yet.")
    flags.DEFINE_enum("dtype", "float32", ("float32", "bfloat16"), "Of the weights.")
    flags.DEFINE_string("part", "", "Which video model, when the method has several.")
    flags.mark_flags_as_required(["workdir", "out"])
    command.run(start)


if __name__ == "__main__":
    run()
