"""Action head on the frozen video transformer of configs/pretrain.py."""

from ml_collections import ConfigDict

from configs import pretrain


def get_config() -> ConfigDict:
    config = pretrain.get_config()
    config.stage = "action"
    config.init_from = "runs/pretrain"
    config.steps = 700
    config.batch_size = 64
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 35
    config.sample_every = 0
    return config
