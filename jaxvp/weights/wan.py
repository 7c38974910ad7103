"""Wan's transformer weights in (original and diffusers spelling) and out (diffusers).

    python -m jaxvp.weights.wan --workdir=runs/pretrain --out=FOLDER

exports the averaged parameters of a training run's video transformer as a folder that
`diffusers.WanTransformer3DModel.from_pretrained` reads. Key names: Wan-Video/Wan2.1
wan/modules/model.py; huggingface/diffusers scripts/convert_wan_to_diffusers.py.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
from absl import flags

from jaxvp import command
from jaxvp.errors import UserError
from jaxvp.files import find
from jaxvp.models.transformer import SIZES, VideoTransformer
from jaxvp.rules import named_leaves
from jaxvp.weights import streaming
from jaxvp.weights.streaming import Plan, Report, Stored, Tensors

# {ours: (diffusers, original)}; the original numbers its norms otherwise, in the order of use
# norm1, norm3, norm2.
MODULES = {
    "stem/patch_embedding": ("patch_embedding", "patch_embedding"),
    "stem/time_1": ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    "stem/time_2": ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    "stem/time_proj": ("condition_embedder.time_proj", "time_projection.1"),
    "stem/text_1": ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    "stem/text_2": ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    "blocks": ("blocks.{}", "blocks.{}"),
    **{f"blocks/{attention}/{ours}": (f"blocks.{{}}.{attention}.{diffusers}",
                                      f"blocks.{{}}.{original_attention}.{original}")
       for attention, original_attention in (("attn1", "self_attn"), ("attn2", "cross_attn"))
       for ours, diffusers, original in (
           ("to_q", "to_q", "q"), ("to_k", "to_k", "k"), ("to_v", "to_v", "v"),
           ("to_out", "to_out.0", "o"), ("norm_q", "norm_q", "norm_q"),
           ("norm_k", "norm_k", "norm_k"))},
    "blocks/norm2": ("blocks.{}.norm2", "blocks.{}.norm3"),
    "blocks/ffn_1": ("blocks.{}.ffn.net.0.proj", "blocks.{}.ffn.0"),
    "blocks/ffn_2": ("blocks.{}.ffn.net.2", "blocks.{}.ffn.2"),
    "head": ("", "head"),
    "head/proj_out": ("proj_out", "head.head"),
}
SPELLINGS = {"diffusers": "condition_embedder.time_proj.weight",
             "original": "time_projection.1.weight"}


def plan(transformer: VideoTransformer, spelling: str = "diffusers") -> Plan:
    """Where every parameter of the transformer lies in Wan's files, in one of SPELLINGS."""
    column = list(SPELLINGS).index(spelling)
    found = {}
    for name in named_leaves(jax.eval_shape(transformer.init, jax.random.key(0))):
        module, leaf = name.rsplit("/", 1)
        key, pattern, sizes = MODULES[module][column], "", {}
        if leaf == "scale_shift_table":
            leaf, pattern = ("modulation" if column else leaf), "1 s d -> s d"
        elif module == "stem/patch_embedding" and leaf == "kernel":
            leaf, pattern = "weight", "d c i j k -> (i j k c) d"
            sizes = dict(zip("ijk", transformer.patch, strict=True))
        elif leaf in ("kernel", "scale"):
            leaf, pattern = "weight", "o i -> i o" if leaf == "kernel" else ""
        key = f"{key}.{leaf}".removeprefix(".")
        layers = range(transformer.layers)
        keys = tuple(key.format(i) for i in layers) if name.startswith("blocks/") else key
        found[name] = Stored(keys, pattern, sizes)
    return found


def load(path: str | Path, transformer: VideoTransformer, abstract=None, *,
         absent: Sequence[str] = (), init: Callable[[], dict] | None = None
         ) -> tuple[dict, Report]:
    """Parameters of a Wan transformer, read from its safetensors; a host reads its shards only.

    Args:
      path: file, index, folder, or a pipeline's folder with these in `transformer/`; in the
        original or the diffusers spelling.
      transformer: of the size of the weights.
      abstract: like `transformer.init`: jax.ShapeDtypeStruct (dtype, sharding) or arrays that lie
        as the result shall; by default float32 on the default device.
      absent, init: see `streaming.load`: parameters that may be in no file are initialised.

    Raises:
      UserError: there is nothing to read, it is damaged, or of another size
        (the message names the one that fits). Before anything but headers is read.
    """
    path = Path(path)
    if not find(path, "*.safetensors*") and (path / "transformer").is_dir():
        path = path / "transformer"
    tensors = Tensors(path)
    spelling = next((s for s, key in SPELLINGS.items() if key in tensors), None)
    if spelling is None:
        raise UserError(f"{path} is not a Wan transformer: it has neither "
                        f"{' nor '.join(SPELLINGS.values())}, but "
                        f"{streaming.listed(sorted(tensors))}.")
    _check_sizes(tensors, transformer)
    if abstract is None:
        abstract = jax.eval_shape(transformer.init, jax.random.key(0))
    return streaming.load(tensors, plan(transformer, spelling), abstract, absent=absent, init=init)


def save(params: dict, transformer: VideoTransformer, folder: str | Path, *,
         shard_bytes: int = 5 * 10**9, dtype=None):
    """Writes what `diffusers.WanTransformer3DModel.from_pretrained(folder)` reads.

    Args:
      params: of the transformer, sharded or not; every process calls this.
      transformer: whose they are.
      folder: gets config.json and safetensors.
      shard_bytes, dtype: see `streaming.save`.

    Raises:
      UserError: the folder already holds safetensors.
    """
    streaming.save(params, plan(transformer), folder, shard_bytes=shard_bytes, dtype=dtype)
    if jax.process_index() == 0:
        text = json.dumps(diffusers_config(transformer), indent=2)
        (Path(folder) / "config.json").write_text(text + "\n")


def diffusers_config(transformer: VideoTransformer) -> dict:
    """Arguments of diffusers' WanTransformer3DModel."""
    return {
        "_class_name": "WanTransformer3DModel", "added_kv_proj_dim": None, "image_dim": None,
        "attention_head_dim": transformer.width // transformer.heads,
        "cross_attn_norm": True, "eps": 1e-6, "ffn_dim": transformer.ffn,
        "freq_dim": transformer.frequency_width, "in_channels": transformer.channels,
        "num_attention_heads": transformer.heads, "num_layers": transformer.layers,
        "out_channels": transformer.channels, "patch_size": list(transformer.patch),
        "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024,
        "text_dim": transformer.text_width,
    }


def stored_sizes(tensors: Tensors) -> dict:
    """Fields of the VideoTransformer whose weights these are, read from their shapes (and the
    number of heads from the config.json beside them, where there is one)."""
    def shape(diffusers, original):
        return tensors[diffusers if diffusers in tensors else original].shape

    patch = tensors["patch_embedding.weight"].shape
    blocks = {key.split(".")[1] for key in tensors if key.startswith("blocks.")}
    sizes = {"channels": patch[1], "patch": tuple(patch[2:]), "width": patch[0],
             "layers": len(blocks),
             "ffn": shape("blocks.0.ffn.net.0.proj.weight", "blocks.0.ffn.0.weight")[0],
             "text_width": shape(*(f"{m}.weight" for m in MODULES["stem/text_1"]))[1],
             "frequency_width": shape(*(f"{m}.weight" for m in MODULES["stem/time_1"]))[1]}
    folder = tensors.path if tensors.path.is_dir() else tensors.path.parent
    if (config := folder / "config.json").is_file():
        described = json.loads(config.read_text())
        heads = described.get("num_attention_heads", described.get("num_heads"))
        sizes |= {} if heads is None else {"heads": heads}
    return sizes


def _check_sizes(tensors: Tensors, transformer: VideoTransformer):
    """Raises UserError when the weights are of another size; says of which."""
    def differing(sizes: Mapping) -> dict:
        return {name: value for name, value in found.items()
                if name in sizes and sizes[name] != value}

    try:
        found = stored_sizes(tensors)
    except (KeyError, IndexError, json.JSONDecodeError) as error:
        raise UserError(f"{tensors.path} is not a whole Wan transformer: {error!r}.") from error
    if wrong := differing(vars(transformer)):
        fits = next((f"size='{name}'" for name, sizes in SIZES.items() if not differing(sizes)),
                    ", ".join(f"{name}={value}" for name, value in found.items()))
        raise UserError(
            f"{tensors.path} has {', '.join(f'{name} {value}' for name, value in wrong.items())}, "
            f"the model {', '.join(f'{name} {getattr(transformer, name)}' for name in wrong)}: "
            f"what fits is {fits}.")


def export(workdir: str | Path, out: str | Path, dtype: str):
    """Writes the averaged parameters of a run's video transformer; see `save`."""
    from jaxvp import checkpoint
    from jaxvp import config as config_lib
    from jaxvp.data.clips import ClipSpec
    from jaxvp.step import TrainConfig, make_method

    assets = checkpoint.restore_json(workdir, "assets")
    method = make_method(config_lib.build(TrainConfig, assets["config"], "config"),
                         config_lib.build(ClipSpec, assets["spec"], "spec"))
    save(checkpoint.restore_params(workdir)["video"], method.transformer, out, dtype=dtype)
    print(f"{out}: {method.transformer.parameter_count:,} parameters in {dtype}, for diffusers' "
          "WanTransformer3DModel.")


def start(settings):
    """Exports what the flags say."""
    export(settings.workdir, settings.out, settings.dtype)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Workdir of a training run, or one of its checkpoints.")
    flags.DEFINE_string("out", None, "Folder for the weights; without safetensors in it yet.")
    flags.DEFINE_enum("dtype", "float32", ("float32", "bfloat16"), "Of the weights.")
    flags.mark_flags_as_required(["workdir", "out"])
    command.run(start)
