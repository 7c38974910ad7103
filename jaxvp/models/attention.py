"""Attention, and the rotary position embedding of Wan."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from jaxvp.models.module import Linear


@functools.lru_cache(maxsize=32)
def rope_table(t: int, h: int, w: int, head_width: int, theta: float = 10_000.0) -> np.ndarray:
    """Angles of the 3-D rotary embedding, float32[t*h*w, E/2] in radians.

    The head width is split between time, height and width as Wan does: `2 * (E // 6)` for
    height and for width, the rest for time. Computed in float64.
    """
    space = 2 * (head_width // 6)
    widths = (head_width - 2 * space, space, space)

    def angles(length, width):
        frequencies = theta ** -(np.arange(0, width, 2, dtype=np.float64) / width)
        return np.outer(np.arange(length, dtype=np.float64), frequencies)

    parts = [angles(n, width) for n, width in zip((t, h, w), widths, strict=True)]
    grid = np.meshgrid(np.arange(t), np.arange(h), np.arange(w), indexing="ij")
    table = np.concatenate([part[i.ravel()] for part, i in zip(parts, grid, strict=True)], axis=-1)
    return table.astype(np.float32)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotates the interleaved (even, odd) pairs of `x[B, N, K, E]` by `angles[N, E/2]`."""
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


class Attention(nnx.Module):
    """Multi-head attention with RMS-normalised queries and keys (Wan: over all heads' widths)."""

    def __init__(self, width: int, heads: int, *, memory_width: int | None = None,
                 dtype=jnp.float32, rngs: nnx.Rngs):
        memory_width = memory_width or width
        self.heads = heads
        self.to_q = Linear(width, width, dtype=dtype, rngs=rngs)
        self.to_k = Linear(memory_width, width, dtype=dtype, rngs=rngs)
        self.to_v = Linear(memory_width, width, dtype=dtype, rngs=rngs)
        self.to_out = Linear(width, width, dtype=dtype, rngs=rngs)
        self.norm_q = nnx.RMSNorm(width, epsilon=1e-6, dtype=dtype, rngs=rngs)
        self.norm_k = nnx.RMSNorm(width, epsilon=1e-6, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, memory: jax.Array | None = None,
                 angles: jax.Array | None = None) -> jax.Array:
        """`x[B, N, D]` attends to `memory[B, M, D']` (itself when None); `angles` rotate both."""
        memory = x if memory is None else memory
        q, k = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(memory))
        q, k, v = (rearrange(a, "b n (k e) -> b n k e", k=self.heads)
                   for a in (q, k, self.to_v(memory)))
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        out = jax.nn.dot_product_attention(q, k, v, implementation="xla")
        return self.to_out(rearrange(out, "b n k e -> b n (k e)"))
