"""LIBERO fine-tuning, both parts at once, from the video transformer of configs/pretrain.py.

    python -m data_builders.build libero --raw_dir=DEMOS --suites=libero_object --replay=states \
        --image_size=64 --libero_assets=ASSETS --out=data/libero_object
    python -m jaxvp.main --config=configs/libero.py

A few minutes on two CPU cores, to show that the way is complete. Its success rate is in the README,
as it is: do not expect a good policy of so few steps.
"""

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
    config.steps = 160
    config.batch_size = 16
    config.optimizer.warmup_steps = 24
    config.validate_every = 80
    config.validation_batches = 2
    config.sample_every = 160
    config.save_every = 80
    return config
