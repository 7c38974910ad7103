"""LIBERO fine-tuning, both parts at once, from the video transformer of configs/pretrain.py."""

from ml_collections import ConfigDict

from configs import pretrain


def get_config() -> ConfigDict:
    config = pretrain.get_config()
    config.stage = "joint"
    config.init_from = "runs/pretrain"
    config.embedded = {}
    config.data = {
        "sources": ({"path": "data/libero_object"},),
        "layout": "single_wrist",
        "num_frames": 4,
        "fps": 5.0,
        "chunk": 12,
        "image_size": 64,
        "text_length": 96,
        "action_size": 8,  # One more than LIBERO has, so that the tabletop's action head fits.
        "num_threads": 1,
    }
    config.optimizer.learning_rate = 1e-3
    config.steps = 600
    config.batch_size = 16
    config.validate_every = 200
    config.sample_every = 600
    config.save_every = 300
    return config
