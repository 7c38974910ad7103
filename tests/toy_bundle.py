"""A policy bundle for tests: a few sums that look at every part of an observation."""

import json
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from jaxvp.envs import tabletop
from jaxvp.policy import bundle

CHUNK, HORIZON, BATCH, TEXT = 6, 4, 3, 96
SIZE = len(tabletop.ACTION_NAMES)
WEIGHTS = np.linspace(-0.5, 0.5, SIZE * SIZE, dtype=np.float32).reshape(SIZE, SIZE)
PARAMS = {"linear": {"w": WEIGHTS}}


def act(params, observation, keys):
    state = observation["state"] * observation["state_mask"]
    seen = observation["video"].astype(jnp.float32).mean((2, 3, 4, 5)) * observation["view_mask"]
    look = seen.sum(1) / 255 + observation["text"].sum(1) / 1e4
    noise = jax.vmap(lambda key: jax.random.normal(jax.random.wrap_key_data(key), (CHUNK, SIZE)))
    mean = (state @ params["linear"]["w"])[:, None] + look[:, None, None] / 10
    return jnp.tanh(mean + 0.5 * noise(keys))


def imagine(params, observation, keys):
    return jnp.repeat(observation["video"][:, 0], 3, axis=1)


def statistics() -> dict:
    split = (name.rstrip("]").split(" [") for name in tabletop.ACTION_NAMES)
    names, units = zip(*split, strict=True)
    low, high = [-0.4, -0.4, 0.0, 0.0] * 2, [0.4, 0.4, 0.3, 1.0] * 2
    zeros = [0.0] * SIZE
    return {"names": names, "units": units, "count": 100, "min": low,
            "max": high, "mean": zeros, "std": zeros, "q01": low, "q99": high}


def manifest(**changes) -> dict:
    return {
        "method": "toy", "stage": "joint", "step": 100, "robot": tabletop.ROBOT,
        "camera_text": tabletop.CAMERA_TEXT, "layout": "bimanual",
        "cameras": list(tabletop.CAMERAS), "image_size": [16, 16], "image_orientation": "upright",
        "text_length": TEXT, "fps": tabletop.FPS, "video_fps": 5.0, "chunk": CHUNK,
        "execution_horizon": HORIZON, "batch_size": BATCH, "action_size": SIZE, "state_size": SIZE,
        "action": statistics(), "state": statistics(), "normalization": "min_max",
        "protocol": {"image_size": 32}, "git_revision": "0123abc",
        "versions": {"jax": jax.__version__}, "config": {"seed": 0}, **changes,
    }


def observation(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "video": rng.integers(0, 256, (rows, 3, 1, 16, 16, 3), np.uint8),
        "view_mask": np.ones((rows, 3), bool),
        "text": rng.integers(0, 257, (rows, TEXT), np.int32),
        "state": rng.uniform(-1, 1, (rows, SIZE)).astype(np.float32),
        "state_mask": np.ones((rows, SIZE), bool),
    }


def export(function, platforms=("cpu", "cuda", "tpu"), batch: int = BATCH) -> bytes:
    arguments = (PARAMS, observation(batch), np.zeros((batch, 2), np.uint32))
    return jax.export.export(jax.jit(function), platforms=platforms)(*arguments).serialize()


def edit(folder: Path, **changes):
    """Changes policy.json as one who wants it so: its digests fit what lies in the folder."""
    bundle.seal(folder, json.loads((folder / "policy.json").read_text()) | changes)


def write(folder: Path, **changes) -> Path:
    """A bundle in `folder`, with changes to its manifest."""
    bundle.save(folder, manifest(**changes), PARAMS, export(act), export(imagine))
    return folder
