"""Vidar (arXiv 2507.12898) on the embedded tabletop: a video model, and masked inverse dynamics.

    python -m jaxvp.main --config=configs/vidar.py                     # the video model
    python -m jaxvp.main --config=configs/vidar.py:inverse_dynamics    # apart from it, same data
    python -m jaxvp.export --workdir=runs/vidar,runs/vidar_inverse_dynamics --out=bundle
    python -m jaxvp.evaluate --bundle=bundle --suite=tabletop --out=evaluation

`unipi` trains the inverse dynamics without a mask (UniPi, arXiv 2302.00111). Learning rate, weight
decay, warm-up and the weight of the mask are the published ones, sizes and steps are for two CPU
cores. No number and no time is claimed, since none has been measured yet.
"""

from ml_collections import ConfigDict

from configs import pretrain
from jaxvp.config import complete
from jaxvp.errors import UserError
from jaxvp.step import TrainConfig

VARIANTS = ("", "inverse_dynamics", "unipi")


def get_config(variant: str = "") -> ConfigDict:
    if variant not in VARIANTS:
        raise UserError(f"configs/vidar.py:{variant}: variants are {sorted(VARIANTS)}.")
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
        config["optimizer"] = {"learning_rate": 5e-4, "warmup_steps": 300, "weight_decay": 0.01,
                               "b2": 0.999, "clip_norm": None}
        config |= {"steps": 3000, "batch_size": 128, "sample_every": 0}
    return ConfigDict(complete(TrainConfig, config))
