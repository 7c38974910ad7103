"""One file per training run; `get_config()` returns the fields of `jaxvp.step.TrainConfig`."""
