"""The diffusion action head: a transformer over the action chunk that looks at video features."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from jaxvp.config import NonNegativeInt, PositiveInt
from jaxvp.models import module
from jaxvp.models.attention import Attention
from jaxvp.models.module import Linear
from jaxvp.models.transformer import layer_norm, sinusoid


def position_table(t: int, h: int, w: int, width: int) -> np.ndarray:
    """Sines and cosines of each token's normalised (t, h, w) place, float32[t*h*w, 3 * width].

    Rotary embeddings tell distances only; the head must know where a thing is.
    """
    def embed(n):
        place = (np.arange(n) + 0.5) / n
        angles = np.pi * place[:, None] * 2.0 ** np.linspace(-1, math.log2(max(n, 2)), width // 2)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)

    grid = np.meshgrid(np.arange(t), np.arange(h), np.arange(w), indexing="ij")
    parts = [embed(n)[i.ravel()] for n, i in zip((t, h, w), grid, strict=True)]
    return np.concatenate(parts, axis=-1).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class ActionHead:
    """Sizes of the head.

    Attributes:
      chunk, action_size, state_size: P, A, S; state_size 0 leaves proprioception out.
      feature_width, taps: width of the video features and how many blocks are tapped.
      width, layers, heads: of the head's own transformer.
      frequency_width: width of the timestep's sinusoid, even.
    """

    chunk: PositiveInt
    action_size: PositiveInt
    state_size: NonNegativeInt
    feature_width: PositiveInt
    taps: PositiveInt
    width: PositiveInt = 128
    layers: PositiveInt = 4
    heads: PositiveInt = 4
    frequency_width: PositiveInt = 128

    def __post_init__(self):
        module.check_multiple("action head", "width", self.width, self.heads, "its heads")
        module.check_multiple("action head", "frequency_width", self.frequency_width, 2)

    def init(self, key: jax.Array) -> dict:
        parts = {"stem": self._stem, "blocks": self._block, "head": self._out}
        return module.init_parts(parts, key, self.layers)

    def memory(self, params: dict, features: list[jax.Array],
               grid: tuple[int, int, int]) -> jax.Array:
        """Tapped features, a list of [B, N, D], on a (t, h, w) grid -> what the head attends to."""
        return module.bind(self._stem, params["stem"]).memory(features, grid)

    def __call__(self, params: dict, actions: jax.Array, sigma: jax.Array, memory: jax.Array,
                 state: jax.Array) -> jax.Array:
        """Clean chunks from noisy ones; R chunks of one sample share its features.

        Args:
          actions: float32[B, R, P, A], noisy.
          sigma: float32[B, R] in [0, 1].
          memory: from `memory`.
          state: float32[B, S], normalised and zero where it is not known.

        Returns:
          float32[B, R, P, A].
        """
        x, time = module.bind(self._stem, params["stem"])(actions, sigma, state)

        def step(x, block):
            return module.bind(self._block, block)(x, time, memory), None

        x, _ = jax.lax.scan(step, x, params["blocks"], unroll=self.layers)  # Few and small.
        return module.bind(self._out, params["head"])(x, time)

    def _stem(self, rngs):
        return _Stem(self, rngs)

    def _block(self, rngs):
        return _Block(self, rngs)

    def _out(self, rngs):
        return _Out(self, rngs)


class _Stem(nnx.Module):
    def __init__(self, config: ActionHead, rngs: nnx.Rngs):
        width = config.width
        self.frequency_width = config.frequency_width
        self.action = Linear(config.action_size, width, rngs=rngs)
        self.position = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (config.chunk, width)))
        if config.state_size:
            self.state_1 = Linear(config.state_size, width, rngs=rngs)
            self.state_2 = Linear(width, width, rngs=rngs)
        self.has_state = bool(config.state_size)
        self.time_1 = Linear(config.frequency_width, width, rngs=rngs)
        self.time_2 = Linear(width, width, rngs=rngs)
        self.place_width = 16
        self.place = Linear(3 * self.place_width, width, rngs=rngs)
        self.features = Linear(config.taps * config.feature_width, width, rngs=rngs)

    def memory(self, features, grid):
        x = jnp.concatenate([layer_norm(f) for f in features], axis=-1)
        places = jnp.asarray(position_table(*grid, self.place_width))
        return layer_norm(self.features(x) + self.place(places))

    def __call__(self, actions, sigma, state):
        time = sinusoid(1000.0 * sigma, self.frequency_width)
        time = self.time_2(jax.nn.silu(self.time_1(time)))
        x = self.action(actions) + self.position[...]
        if self.has_state:
            state = self.state_2(jax.nn.silu(self.state_1(state)))
            x = x + state[:, None, None]
            time = time + state[:, None]
        return x, jax.nn.silu(time)


class _Block(nnx.Module):
    """Self-attention in a chunk, cross-attention to the video, feed-forward (DiT modulation)."""

    def __init__(self, config: ActionHead, rngs: nnx.Rngs):
        width = config.width
        self.modulation = Linear(width, 6 * width, rngs=rngs)
        self.attn1 = Attention(width, config.heads, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.attn2 = Attention(width, config.heads, rngs=rngs)
        self.ffn_1 = Linear(width, 4 * width, rngs=rngs)
        self.ffn_2 = Linear(4 * width, width, rngs=rngs)

    def __call__(self, x, time, memory):
        repeats = x.shape[1]
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(
            self.modulation(time)[:, :, None], 6, axis=-1)
        h = rearrange(layer_norm(x) * (1 + scale1) + shift1, "b r p d -> (b r) p d")
        x = x + gate1 * rearrange(self.attn1(h), "(b r) p d -> b r p d", r=repeats)
        h = self.attn2(rearrange(self.norm2(x), "b r p d -> b (r p) d"), memory)
        x = x + rearrange(h, "b (r p) d -> b r p d", r=repeats)
        h = layer_norm(x) * (1 + scale2) + shift2
        return x + gate2 * self.ffn_2(jax.nn.gelu(self.ffn_1(h), approximate=True))


class _Out(nnx.Module):
    def __init__(self, config: ActionHead, rngs: nnx.Rngs):
        self.modulation = Linear(config.width, 2 * config.width, rngs=rngs)
        self.out = Linear(config.width, config.action_size,
                              kernel_init=nnx.initializers.zeros_init(), rngs=rngs)

    def __call__(self, x, time):
        shift, scale = jnp.split(self.modulation(time)[:, :, None], 2, axis=-1)
        return self.out(layer_norm(x) * (1 + scale) + shift)
