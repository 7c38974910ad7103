"""The encoder of UMT5 (arXiv 2304.09151), which reads the text for Wan."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from jaxvp.models import module
from jaxvp.models.module import Linear


@dataclasses.dataclass(frozen=True)
class UMT5Encoder:
    """T5's encoder (arXiv 1910.10683, v1.1) with a relative position bias in every layer.

    Defaults are UMT5-XXL's, 5.7 B parameters. The residual stream, norms and softmax are float32.

    Attributes:
      width: D; layers: L; heads, head_width: K and E, whose product need not be D.
      ffn: width of the gated GELU; vocabulary: number of tokens, of which 0 is padding.
      buckets, max_distance: of the position bias; farther than that is all the same.
      epsilon: added to the mean square in every norm.
      dtype: of matrix products.
    """

    width: int = 4096
    layers: int = 24
    heads: int = 64
    head_width: int = 64
    ffn: int = 10240
    vocabulary: int = 256384
    buckets: int = 32
    max_distance: int = 128
    epsilon: float = 1e-6
    dtype: jax.typing.DTypeLike = jnp.float32

    def _block(self, rngs: nnx.Rngs) -> "_Block":
        return _Block(self, rngs)

    def _embed(self, rngs: nnx.Rngs) -> nnx.Embed:
        return nnx.Embed(self.vocabulary, self.width, rngs=rngs)

    def _norm(self, rngs: nnx.Rngs) -> nnx.RMSNorm:
        return nnx.RMSNorm(self.width, epsilon=self.epsilon, dtype=jnp.float32, rngs=rngs)

    def init(self, key: jax.Array) -> dict:
        """Random parameters, float32; `blocks` are stacked, with a leading axis L."""
        parts = {"embed": self._embed, "blocks": self._block, "norm": self._norm}
        return module.init_parts(parts, key, self.layers)

    def __call__(self, params: dict, tokens: jax.Array) -> jax.Array:
        """int32[B, M] -> float32[B, M, D]; padding is not attended to, and its rows are 0."""
        there = tokens > 0
        buckets = relative_buckets(tokens.shape[1], self.buckets, self.max_distance)

        def block(x, params):
            return module.bind(self._block, params)(x, there, buckets), None

        x = module.bind(self._embed, params["embed"])(tokens).astype(jnp.float32)
        x, _ = jax.lax.scan(block, x, params["blocks"])
        return module.bind(self._norm, params["norm"])(x) * there[..., None]


def relative_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """T5's bucket of every (query, key), int32[length, length], in both directions.

    Half of the buckets are for keys after the query. Half of each half are single distances, the
    others grow with their logarithm up to `max_distance`.
    """
    position = np.arange(length)
    distance = position[None, :] - position[:, None]
    half, exact = buckets // 2, buckets // 4
    far = np.maximum(np.abs(distance), exact).astype(np.float32)  # As torch: it decides borders.
    growth = np.log(far / np.float32(exact)) / np.float32(np.log(max_distance / exact))
    far = np.minimum(exact + (growth * (half - exact)).astype(np.int32), half - 1)
    near = np.abs(distance)
    return (np.where(near < exact, near, far) + half * (distance > 0)).astype(np.int32)


class _Block(nnx.Module):
    def __init__(self, config: UMT5Encoder, rngs: nnx.Rngs):
        inner, self.heads = config.heads * config.head_width, config.heads

        def linear(size, out):
            return Linear(size, out, use_bias=False, dtype=config.dtype, rngs=rngs)

        self.norm_1, self.norm_2 = config._norm(rngs), config._norm(rngs)
        self.to_q, self.to_k, self.to_v = (linear(config.width, inner) for _ in range(3))
        self.to_out = linear(inner, config.width)
        self.position_bias = nnx.Embed(config.buckets, config.heads, rngs=rngs)
        self.ffn_gate = linear(config.width, config.ffn)
        self.ffn_1 = linear(config.width, config.ffn)
        self.ffn_2 = linear(config.ffn, config.width)

    def __call__(self, x, there, buckets):
        y = self.norm_1(x)
        q, k, v = (rearrange(to(y), "b m (k e) -> b m k e", k=self.heads)
                   for to in (self.to_q, self.to_k, self.to_v))
        bias = rearrange(self.position_bias(buckets).astype(jnp.float32), "m n k -> 1 k m n")
        out = jax.nn.dot_product_attention(  # T5 does not divide by sqrt(E).
            q, k, v, bias, there[:, None, None], scale=1.0, implementation="xla")
        x = x + self.to_out(rearrange(out, "b m k e -> b m (k e)"))
        y = self.norm_2(x)
        return x + self.ffn_2(jax.nn.gelu(self.ffn_gate(y)) * self.ffn_1(y))
