"""Text encoders."""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from jaxvp.config import PositiveInt
from jaxvp.models import module
from jaxvp.models.attention import Attention
from jaxvp.models.module import Linear

VOCABULARY = 257  # 256 bytes shifted by one; 0 is padding


@dataclasses.dataclass(frozen=True)
class ByteTextEncoder:
    """Byte embeddings, `stride` bytes merged into one token, then one attention block.

    Trained with the rest: small enough for a laptop, no vocabulary file. The merge of a group
    of bytes is CANINE's downsampling (arXiv 2103.06874) without overlap.
    """

    width: PositiveInt = 64
    stride: PositiveInt = 8
    length: PositiveInt = 96
    heads: PositiveInt = 2

    def __post_init__(self):
        module.check_multiple("text encoder", "width", self.width, self.heads, "its heads")
        module.check_multiple("text encoder", "length", self.length, self.stride, "its stride")

    @property
    def tokens(self) -> int:
        return self.length // self.stride

    def _module(self, rngs: nnx.Rngs) -> "_ByteText":
        return _ByteText(self, rngs)

    def init(self, key: jax.Array) -> dict:
        return module.init(self._module, key)

    def __call__(self, params: dict, text: jax.Array) -> jax.Array:
        """int32[B, length] (0 = padding) -> float32[B, M, width]."""
        return module.bind(self._module, params)(text)


class _ByteText(nnx.Module):
    def __init__(self, config: ByteTextEncoder, rngs: nnx.Rngs):
        self.stride = config.stride
        self.embed = nnx.Embed(VOCABULARY, config.width, rngs=rngs)
        self.merge = Linear(config.stride * config.width, config.width, rngs=rngs)
        self.position = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (config.tokens, config.width)))
        self.norm = nnx.LayerNorm(config.width, rngs=rngs)
        self.attention = Attention(config.width, config.heads, rngs=rngs)
        self.norm_out = nnx.LayerNorm(config.width, rngs=rngs)

    def __call__(self, text):
        x = self.embed(text) * (text > 0)[..., None]
        x = self.merge(rearrange(x, "b (m s) d -> b m (s d)", s=self.stride))
        x = jax.nn.gelu(x) + self.position[...]
        return self.norm_out(x + self.attention(self.norm(x))).astype(jnp.float32)
