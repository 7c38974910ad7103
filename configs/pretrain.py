"""Video pretraining on the embedded tabletop."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict({
        "method": {
            "name": "video_policy",
            "video": {"width": 128, "layers": 4, "heads": 2, "ffn": 512, "unroll": 4},
            "text": {"width": 64, "stride": 8},
            "head": {"width": 128, "layers": 3, "heads": 4},
            "taps": (1, 3),
            "shift": 3.0,
            "action_draws": 2,
        },
        "stage": "video",
        "execution_horizon": 8,
        "data": {
            "sources": ({"path": "data/tabletop"},),
            "num_frames": 4,
            "fps": 2.5,
            "chunk": 12,
            "image_size": 32,
            "text_length": 96,
            "num_threads": 1,
        },
        "embedded": {"episodes": 800, "tasks": ("core",), "image_size": 32},
        "optimizer": {"learning_rate": 2e-3, "warmup_steps": 60, "weight_decay": 0.01,
                      "final": 0.02},
        "steps": 1500,
        "batch_size": 32,
        "ema": 0.995,
        "log_every": 25,
        "validate_every": 250,
        "validation_batches": 4,
        "sample_every": 500,
        "save_every": 500,
    })
