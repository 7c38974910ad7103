"""Pretraining: the embedded tabletop from nothing, and Wan on robot video.

    python -m jaxvp.main --config=configs/pretrain.py                # the embedded tabletop
    python -m jaxvp.main --config=configs/pretrain.py:all            # larger pictures, an hour
    python -m jaxvp.main --config=configs/pretrain.py:wan-5b --config.init_from.video=WAN \
        --config.init_from.codec=WAN_VAE

The default trains Fast-WAM on the 13 seen tasks of the tabletop, video and actions at once, on two
CPU cores: launch/local.sh; time and success are in docs/results.md. Its choices follow a first
study, whose single effects benchmarks/studies/tabletop_recipe.py measures again: demonstrations
without noise, both losses as the error of what is clean, features that the action loss trains, many
small steps of Muon, each of eight clips of video and 32 of one frame.

`all` is the same with pictures of 64 pixels, a wider network, more demonstrations, and a third of
the clips of video, for about an hour; no number is claimed, since none has been measured yet.

`wan-1.3b`, `wan-5b` and `wan-14b` continue Wan's video pretraining on robot video, with Vidar's
mixture (arXiv 2507.12898, see configs/mixtures.py): three views on one canvas, 17 frames at 8 per
second, learning rate and warm-up of Vidar. Texts are embedded beforehand with `python -m
jaxvp.tools.embed_texts`; latents may be, so that no step runs the codec:

    python -m jaxvp.tools.precompute --config=configs/pretrain.py:wan-5b --out=data/latents \
        --config.init_from.codec=WAN_VAE

and then `wan-5b-latents`. `wan-14b-720p` is the longest clip that Wan knows, 75,600 tokens of one
camera, from datasets built with --image_size=720 --fps=16. What they cost where is computed, not
measured: `python -m jaxvp.plan`, benchmarks/results/plan_*.json.
"""

from collections.abc import Mapping

from ml_collections import ConfigDict

from configs.mixtures import clips
from jaxvp.config import complete
from jaxvp.errors import UserError
from jaxvp.step import TrainConfig

# Codec version; clips in a batch: for 256 chips, so many tokens each that the network keeps up.
WAN = {
    "wan-1.3b": {"size": "wan-1.3b", "version": "2.1", "batch_size": 512},
    "wan-5b": {"size": "wan-5b", "version": "2.2", "batch_size": 2048},
    "wan-14b": {"size": "wan-14b", "version": "2.1", "batch_size": 512},
    "wan-14b-720p": {
        "size": "wan-14b", "version": "2.1", "batch_size": 16,  # For 64 chips.
        "data": clips("video", future=80, chunk=16, image_size=(720, 1280), fps=16.0),
        "mesh": {"data": -1, "fsdp": 16, "context": 4}, "remat": "full"},
}
ROBOT = clips("vidar", future=16, chunk=16, image_size=256)
# XLA reduces gradients shard by shard where fsdp spans at most two axes of a v5p torus.
MESH = {"data": -1, "fsdp": 16}
# Latents of a robot clip by codec version.
LATENTS = {"2.1": (5, 48, 32, 16), "2.2": (5, 24, 16, 48)}
STORED = {f"{name}-latents": options for name, options in WAN.items() if "data" not in options}


def get_config(variant: str = "") -> ConfigDict:
    if variant in WAN:
        config = wan(**WAN[variant])
    elif variant in STORED:
        config = wan(**STORED[variant], stored=True)
    elif variant == "":
        config = tabletop()
    elif variant == "all":
        config = tabletop()
        config["method"]["video"]["transformer"] |= {"width": 192, "heads": 3, "ffn": 768}
        config["method"]["video_every"] = 3
        config["data"] |= {"sources": ({"path": "data/tabletop_all"},), "image_size": 64}
        config["embedded"] |= {"path": "data/tabletop_all", "episodes": 6500, "image_size": 64}
        config |= {"steps": 10_000, "batch_size": 36}
    else:
        known = sorted({"", "all", *WAN, *STORED})
        raise UserError(f"configs/pretrain.py:{variant}: variants are {known}.")
    return ConfigDict(complete(TrainConfig, config))


def tabletop() -> dict:
    return {
        "method": {
            "name": "fast_wam",
            "video": {
                "transformer": {"width": 128, "layers": 4, "heads": 2, "ffn": 512, "unroll": 4},
                "codec": {"name": "pixel", "patch": 8},
                "text": {"width": 64, "stride": 8},
                "weight": "data",
                "shift": 3.0,
                "steps": 2,  # The future is nearly determined here: more steps add grain.
            },
            "head": {"width": 128, "layers": 3, "heads": 4},
            "taps": (1, 3),
            "video_every": 5,
            "action_weight": "data",
            "action_shift": 3.0,
            "action_steps": 4,
            "state_dropout": 0.3,
        },
        "init_from": {"*": "", "video": "", "codec": "", "text": ""},
        "stage": "joint",
        "execution_horizon": 4,
        "data": {
            "sources": ({"path": "data/tabletop"},),
            "window": {"fps": 2.5, "past": 1, "future": 3, "past_actions": 0, "chunk": 12},
            "image_size": 32,
            "text_length": 96,
            "action_size": 8,
            "state_size": 8,
            "num_threads": 1,
        },
        "embedded": {"path": "data/tabletop", "episodes": 3900, "tasks": ("seen",),
                     "image_size": 32},
        "optimizer": {"learning_rate": 2e-3, "warmup_steps": 300, "weight_decay": 0.01,
                      "final": 0.02,
                      "muon": (r".*/blocks/(attn[12]/to_(q|k|v|out)|ffn_[12])/kernel",)},
        "steps": 6000,
        "batch_size": 40,
        "ema": 0.99,
        "log_every": 50,
        "validate_every": 1000,
        "validation_batches": 4,
        "sample_every": 2000,
        "save_every": 1000,
    }


def wan(size: str, version: str, batch_size: int, data: Mapping = ROBOT,
        mesh: Mapping = MESH, remat: str = "dots", stored: bool = False) -> dict:
    if stored:
        sources = [{**source, "path": source["path"].replace("data/", "data/latents/")}
                   for source in data["sources"]]
        data = {**data, "sources": sources, "extra": {"latents": LATENTS[version]}, "video": False}
    return {
        "method": {
            "name": "video_policy",
            "video": {
                "transformer": {"size": size, "dtype": "bfloat16", "remat": remat},
                "codec": {"name": "wan", "version": version, "dtype": "bfloat16",
                          # Whole clips take more memory.
                          "streaming": data["window"]["future"] > 32},
                "text_tokens": 512,
                "prediction": "velocity",
                "sigma": "uniform",
                "shift": 5.0,
                "timesteps": "integer",
                "sampler": "unipc",
                "steps": 50,
                "guidance": 5.0,
            },
            "head": {"width": 512, "layers": 8, "heads": 8},
            "taps": (9, 19),
            # As on the tabletop: small noise levels, where the head has only to keep what it is
            # given, would outweigh all others, and a head that always has the state does not look.
            "action_weight": "data",
            "state_dropout": 0.3,
        },
        "init_from": {"*": "", "video": "", "codec": "", "text": "data/text_embeddings"},
        "stage": "video",
        "execution_horizon": 8,
        "data": {
            **data,
            "text_length": 128,
            "text_embeddings": "data/text_embeddings",
            "action_size": 48,  # EgoDex: wrists and fingertips.
            "state_size": 48,
            "num_threads": 16,
        },
        "mesh": dict(mesh),
        "optimizer": {"learning_rate": 2e-5, "schedule": "constant", "warmup_steps": 200,
                      "weight_decay": 0.1},
        "steps": 10_000,
        "batch_size": batch_size,
        "ema": 0.999,
        "log_every": 20,
        "validate_every": 500,
        "sample_every": 1000,
        "save_every": 500,
    }
