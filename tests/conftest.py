"""Every test sees eight CPU devices, whatever the machine has; JAX_PLATFORMS=cuda is for -m gpu."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
