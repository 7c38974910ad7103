"""Video pretraining on the embedded tabletop.

    python -m jaxvp.main --config=configs/pretrain.py
    python -m jaxvp.main --config=configs/pretrain.py:all

The default has two tasks, `lift_tray` (both arms) and `red_on_plate`, and is cut to what two CPU
cores learn in minutes: time and numbers are in the README, measured by launch/local.sh. `all` has
the 13 seen tasks and six times the steps; it has not been run to its end, so it has no number.
"""

from ml_collections import ConfigDict

VARIANTS = {
    "": {"path": "data/tabletop", "tasks": ("core",), "episodes": 1000, "steps": 1400},
    "all": {"path": "data/tabletop_all", "tasks": ("seen",), "episodes": 6500, "steps": 8400},
}


def get_config(variant: str = "") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"configs/pretrain.py:{variant}: variants are {sorted(VARIANTS)}.")
    chosen = VARIANTS[variant]
    return ConfigDict({
        "method": {
            "name": "video_policy",
            "video": {"width": 128, "layers": 4, "heads": 2, "ffn": 512, "unroll": 4},
            "text": {"width": 64, "stride": 8},
            "head": {"width": 128, "layers": 3, "heads": 4},
            "taps": (1, 3),
            "shift": 3.0,
            "video_steps": 2,  # The future is nearly determined here: more steps add grain.
            "action_draws": 2,
            "state_dropout": 0.3,
        },
        "stage": "video",
        "execution_horizon": 4,
        "data": {
            "sources": ({"path": chosen["path"]},),
            "num_frames": 4,
            "fps": 2.5,
            "chunk": 12,
            "image_size": 32,
            "text_length": 96,
            "num_threads": 1,
        },
        "embedded": {
            "episodes": chosen["episodes"], "tasks": chosen["tasks"], "image_size": 32},
        "optimizer": {"learning_rate": 2e-3, "warmup_steps": 70, "weight_decay": 0.01,
                      "final": 0.02},
        "steps": chosen["steps"],
        "batch_size": 32,
        "ema": 0.995,
        "log_every": 25,
        "validate_every": 250,
        "validation_batches": 4,
        "sample_every": 500,
        "save_every": 500,
    })
