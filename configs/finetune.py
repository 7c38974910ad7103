"""Action head on the frozen video transformer of configs/pretrain.py.

    python -m jaxvp.main --config=configs/finetune.py
    python -m jaxvp.main --config=configs/finetune.py:untuned
    python -m jaxvp.main --config=configs/finetune.py:all       # after configs/pretrain.py:all

`untuned` is the same head on a video transformer that has never seen video ("no video tuning" of
Video Policy): the ablation that tells what the first stage is worth. Time and numbers are in the
README. `all`: 19 minutes on two CPU cores that were also busy with other work; 37 % success over 13
tasks, 20 trials each (benchmarks/results/tabletop_all.json).
"""

from ml_collections import ConfigDict

from configs import pretrain
from jaxvp.errors import UserError

VARIANTS = {
    "": {"init_from": {"*": "runs/pretrain"}, "steps": 2600},
    "untuned": {"steps": 2600},
    "all": {"init_from": {"*": "runs/pretrain_all"}, "steps": 5400},
}


def get_config(variant: str = "") -> ConfigDict:
    if variant not in VARIANTS:
        raise UserError(f"configs/finetune.py:{variant}: variants are {sorted(VARIANTS)}.")
    config = pretrain.get_config("all" if variant == "all" else "")
    config.stage = "action"
    config.update(VARIANTS[variant])
    config.optimizer.warmup_steps = 90
    config.ema = 0.99
    config.sample_every = 0
    config.validate_every = 600
    return config
