"""Vidar (arXiv 2507.12898), a video model and masked inverse dynamics: on the embedded tabletop,
and as published, on Wan 2.2 5B.

    python -m jaxvp.main --config=configs/vidar.py                     # the video model
    python -m jaxvp.main --config=configs/vidar.py:inverse_dynamics    # apart from it, same data
    python -m jaxvp.export --workdir=runs/vidar,runs/vidar_inverse_dynamics --out=bundle
    python -m jaxvp.evaluate --bundle=bundle --suite=tabletop --out=evaluation

`unipi` trains the inverse dynamics without a mask (UniPi, arXiv 2302.00111). Learning rate, weight
decay, warm-up and the weight of the mask are the published ones, sizes and steps are for two CPU
cores. No number and no time is claimed, since none has been measured yet.

`wan-5b` is the paper's pretraining: its mixture (configs/mixtures.py), clips of 61 frames at 8 per
second, learning rate 2e-5 after 200 steps, weight decay 0.1, batch 128, 10,000 steps; then
`wan-5b-target`, 12,000 steps on data/target, the episodes of one robot, and on the same
`wan-5b-inverse_dynamics`, 60,000 steps. The canvas is 640 x 768, not 640 x 736: ours of three views
of 640 x 480, of which the paper's pads its 720 rows to 736, would not be whole patches.

    python -m jaxvp.main --config=configs/vidar.py:wan-5b --config.init_from.video=WAN \
        --config.init_from.codec=WAN_VAE
    python -m jaxvp.main --config=configs/vidar.py:wan-5b-target     # from runs/vidar_wan-5b
    python -m jaxvp.main --config=configs/vidar.py:wan-5b-inverse_dynamics
    python -m jaxvp.plan --config=configs/vidar.py:wan-5b --topology=v5p:4x4x4
"""

from ml_collections import ConfigDict

from configs import pretrain
from configs.mixtures import clips
from jaxvp.config import complete
from jaxvp.errors import UserError
from jaxvp.step import TrainConfig

WAN = ("wan-5b", "wan-5b-target", "wan-5b-inverse_dynamics")
VARIANTS = ("", "inverse_dynamics", "unipi", *WAN)
# Vidar's, of inverse dynamics.
OPTIMIZER = {"learning_rate": 5e-4, "weight_decay": 0.01, "b2": 0.999, "clip_norm": None}


def get_config(variant: str = "") -> ConfigDict:
    if variant not in VARIANTS:
        raise UserError(f"configs/vidar.py:{variant}: variants are {sorted(VARIANTS)}.")
    config = wan(variant) if variant in WAN else tabletop(variant)
    return ConfigDict(complete(TrainConfig, config))


def tabletop(variant: str) -> dict:
    config = pretrain.tabletop()
    config["method"] = {
        "name": "vidar",
        "video": config["method"]["video"],
        "inverse": {"kind": "resnet" if variant == "unipi" else "masked", "unet_width": 8,
                    "unet_stages": 3, "blocks": (1, 1, 1), "resnet_width": 16},
        "mask_weight": 3e-3,
    }
    config["data"]["normalization"] = "mean_std"  # The actions are z-scored.
    config["data"]["window"]["past_actions"] = 1
    config["stage"] = "video"
    config |= {"steps": 4000, "batch_size": 16}
    if variant:
        config["stage"] = "inverse_dynamics"
        config["optimizer"] = OPTIMIZER | {"warmup_steps": 300}
        config |= {"steps": 3000, "batch_size": 128, "sample_every": 0}
    return config


def wan(variant: str) -> dict:
    data = clips("vidar", future=60, chunk=225, image_size=(512, 640))  # 7.5 s at 30 actions each.
    data["window"]["past_actions"] = 1
    config = pretrain.wan("wan-5b", "2.2", batch_size=128, data=data, remat="full")
    video = config["method"]["video"]
    config["method"] = {"name": "vidar", "video": video, "inverse": {}, "picture_size": 518}
    config["data"]["normalization"] = "mean_std"
    config["execution_horizon"] = 225  # A whole video, open loop.
    if variant != "wan-5b":
        config["data"]["sources"] = ({"path": "data/target"},)
    if variant == "wan-5b-target":
        config["init_from"]["*"] = "runs/vidar_wan-5b"
        config["steps"] = 12_000
    if variant == "wan-5b-inverse_dynamics":
        config["stage"], config["init_from"] = "inverse_dynamics", {}
        config["optimizer"] = OPTIMIZER | {"warmup_steps": 6000}
        config |= {"steps": 60_000, "sample_every": 0}
    return config
