"""VPP (arXiv 2412.14803) on the embedded tabletop: a video transformer, then an action head on it.

    python -m jaxvp.main --config=configs/vpp.py             # the video transformer
    python -m jaxvp.main --config=configs/vpp.py:action      # then the head, from runs/vpp
    python -m jaxvp.main --config=configs/vpp.py:untuned
    python -m jaxvp.export --workdir=runs/vpp_action --out=bundle
    python -m jaxvp.evaluate --bundle=bundle --suite=tabletop_core --trials=50 --out=evaluation

Two tasks, `lift_tray` (both arms) and `red_on_plate`, from demonstrations with noise. `untuned` is
the same head on a video transformer that has never seen video ("no video tuning" of Video Policy):
the ablation that tells what the first stage is worth. Numbers are in docs/results.md.
"""

from ml_collections import ConfigDict

from configs import pretrain
from jaxvp.config import complete
from jaxvp.errors import UserError
from jaxvp.step import TrainConfig

VARIANTS = ("", "action", "untuned")


def get_config(variant: str = "") -> ConfigDict:
    if variant not in VARIANTS:
        raise UserError(f"configs/vpp.py:{variant}: variants are {sorted(VARIANTS)}.")
    config = pretrain.tabletop()
    for name in ("video_every", "action_weight", "action_shift", "action_steps"):
        del config["method"][name]
    config["method"] |= {"name": "vpp", "action_draws": 2}
    config["method"]["video"] |= {"codec": {"name": "pixel", "patch": 4}, "weight": "velocity"}
    config["data"]["sources"] = ({"path": "data/tabletop_core"},)
    config["embedded"] |= {"path": "data/tabletop_core", "episodes": 1000, "tasks": ("core",),
                           "disturbance": 0.01, "wander": 0.01}
    del config["optimizer"]["muon"]
    config |= {"batch_size": 32, "log_every": 25, "save_every": 500}
    if variant:
        config |= {"stage": "action", "steps": 2600, "ema": 0.99, "validate_every": 600,
                   "sample_every": 0}
        config["optimizer"]["warmup_steps"] = 90
        config["init_from"]["*"] = "runs/vpp" if variant == "action" else ""
    else:
        config |= {"stage": "video", "steps": 1400, "ema": 0.995, "validate_every": 250,
                   "sample_every": 500}
        config["optimizer"]["warmup_steps"] = 70
    return ConfigDict(complete(TrainConfig, config))
