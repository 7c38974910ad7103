"""Methods so small that they compile in seconds, and what their tests share."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxvp.data.spec import ClipSpec, Window, observe

SPEC = ClipSpec(cameras=("head", "left_wrist", "right_wrist"),
                window=Window(fps=2.0, past=1, future=2, chunk=4), height=16, width=16,
                text_length=16, action_size=2, state_size=2)
# Two observed frames, and two actions before now.
PAST = Window(fps=2.0, past=2, future=2, past_actions=2, chunk=4)
VIDEO = {"transformer": dict(width=16, layers=2, heads=2, ffn=32),
         "text": dict(width=8, heads=2), "steps": 2}
HEAD = dict(width=16, layers=1, heads=2)
WAN_VAE = {"name": "wan", "width": 8, "decoder_width": 8}


def make_clip(spec=SPEC, batch=2):
    """Random clips of `spec`, of which everything counts."""
    rng = np.random.default_rng(0)

    def make(shape, dtype):
        shape = (batch, *shape)
        if dtype == np.bool_:
            return np.ones(shape, bool)
        if dtype in (np.float32, np.float16):
            return rng.uniform(-1, 1, shape).astype(dtype)
        if dtype == ml_dtypes.bfloat16:
            return rng.normal(size=shape).astype(dtype)
        return rng.integers(1, 255, shape).astype(dtype)

    return {name: make(*array) for name, array in spec.arrays.items()}


def observation_of(clip, spec=SPEC):
    return observe(clip, spec.window)


def parts_of(method):
    """All parts, of whatever stage."""
    return sorted({part for stage in method.stages.values() for part in stage.parts})


@functools.cache
def parameters(method):
    """Random everywhere, the output layers (zero at first) too."""
    rng = np.random.default_rng(1)
    abstract = {part: jax.eval_shape(functools.partial(method.init, part), jax.random.key(0))
                for part in parts_of(method)}
    return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), abstract)


@functools.cache
def start(method):
    """As a run would start."""
    return jax.jit(lambda key: {part: method.init(part, key) for part in parts_of(method)})(
        jax.random.key(0))


@functools.partial(jax.jit, static_argnums=(0, 1, 5))
def loss_and_gradient(method, stage, params, clip, keys, train=True):
    """((loss, metrics), gradient of the loss by all parameters)."""
    def loss(params):
        value, metrics, statistics = method.loss(params, clip, keys, stage, train)
        assert statistics == {}
        return value, metrics
    return jax.value_and_grad(loss, has_aux=True)(params)


@functools.partial(jax.jit, static_argnums=(0, 1))
def predict(method, wanted, params, observation, keys):
    return method.predict(params, observation, keys, wanted, method.initial_carry(len(keys)))[0]


def keys(seed, batch=2):
    return jax.random.split(jax.random.key(seed), batch)


def size(tree):
    return sum(float(jnp.abs(x).sum()) for x in jax.tree.leaves(tree))
