"""The video transformer: Wan-shaped (arXiv 2503.20314; Wan 2.2 for per-token timesteps)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx

from jaxvp.models import module
from jaxvp.models.attention import Attention, rope_table
from jaxvp.models.module import Linear


def sinusoid(timestep: jax.Array, width: int) -> jax.Array:
    """Embedding of a timestep in [0, 1000]: cosines, then sines; float32[..., width]."""
    frequencies = jnp.exp(-math.log(10_000.0) * jnp.arange(width // 2) / (width // 2))
    angles = timestep[..., None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def layer_norm(x: jax.Array) -> jax.Array:
    """LayerNorm without affine parameters, in float32 (epsilon 1e-6)."""
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)


def expand(modulation: jax.Array, tokens: int) -> jax.Array:
    """[B, G, ...] of one timestep per group -> [B, N, ...]: groups are equal runs of tokens."""
    return repeat(modulation, "b g ... -> b (g n) ...", n=tokens // modulation.shape[1])


@dataclasses.dataclass(frozen=True)
class VideoTransformer:
    """Sizes of a video transformer; parameters live outside, in a nested dict.

    Attributes:
      channels: latent channels c, in and out.
      patch: (t, h, w) latents merged into one token.
      width, layers, heads, ffn: D, L, K and the width of the feed-forward layer.
      text_width: width of the text encoder's tokens.
      frequency_width: width of the timestep's sinusoid.
      dtype: of the matmuls; normalisation, modulation and residuals of them stay float32.
      remat: recompute each block in the backward pass.
      unroll: blocks per iteration of the scan; more compile time, less copying on a CPU.
    """

    channels: int
    patch: tuple[int, int, int] = (1, 2, 2)
    width: int = 128
    layers: int = 6
    heads: int = 4
    ffn: int = 512
    text_width: int = 64
    frequency_width: int = 256
    dtype: str = "float32"
    remat: bool = False
    unroll: int = 1

    def __post_init__(self):
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"width {self.width} must be an even multiple of heads {self.heads}")

    def tokens(self, t: int, h: int, w: int) -> tuple[int, int, int]:
        """Token grid of a latent grid; raises ValueError when the patch does not divide it."""
        if any(n % p for n, p in zip((t, h, w), self.patch, strict=True)):
            raise ValueError(f"latents of {t} x {h} x {w} are not multiples of patch {self.patch}")
        return tuple(n // p for n, p in zip((t, h, w), self.patch, strict=True))

    def init(self, key: jax.Array) -> dict:
        """{"stem": ..., "blocks": leaves with a leading axis L, "head": ...}."""
        stem, blocks, head = jax.random.split(key, 3)
        return {
            "stem": module.init(self._stem, stem),
            "blocks": module.init_stacked(self._block, blocks, self.layers),
            "head": module.init(self._head, head),
        }

    def __call__(self, params: dict, latents: jax.Array, timestep: jax.Array, text: jax.Array,
                 taps: tuple[int, ...] = ()) -> tuple[jax.Array, dict[int, jax.Array]]:
        """Predicts from noisy latents.

        Args:
          params: from `init`.
          latents: float32[B, t, h, w, c].
          timestep: float32 in [0, 1000]: [B], or [B, G] with one value per equal run of tokens
            (G = latent frames gives the clean first frame its own timestep 0; G = N is per token).
          text: float32[B, M, text_width]; padding rows are not masked, as in Wan.
          taps: numbers of the blocks whose output is wanted (0 .. layers - 1).

        Returns:
          float32[B, t, h, w, c] and {tap: [B, N, D]}.
        """
        if any(not 0 <= tap < self.layers for tap in taps):
            raise ValueError(f"taps {taps}: blocks are numbered 0 to {self.layers - 1}")
        grid = self.tokens(*latents.shape[1:4])
        timestep = timestep[:, None] if timestep.ndim == 1 else timestep
        pt, ph, pw = self.patch
        x = rearrange(latents, "b (t i) (h j) (w k) c -> b (t h w) (i j k c)", i=pt, j=ph, k=pw)
        if x.shape[1] % timestep.shape[1]:
            raise ValueError(f"{timestep.shape[1]} timesteps do not divide {x.shape[1]} tokens")
        x, time, modulation, text = module.bind(self._stem, params["stem"])(x, timestep, text)
        angles = jnp.asarray(rope_table(*grid, self.width // self.heads))

        def step(x, block):
            return module.bind(self._block, block)(x, modulation, text, angles), None

        if self.remat:
            step = jax.checkpoint(step)
        features, start = {}, 0
        for stop in sorted({tap + 1 for tap in taps} | {self.layers}):
            # One scan up to each tap: what lies behind the last used tap is dead code under jit.
            segment = jax.tree.map(lambda p, a=start, b=stop: p[a:b], params["blocks"])
            x, _ = jax.lax.scan(step, x, segment, unroll=self.unroll)
            features[stop - 1], start = x, stop
        out = module.bind(self._head, params["head"])(x, time)
        out = rearrange(out, "b (t h w) (i j k c) -> b (t i) (h j) (w k) c",
                        t=grid[0], h=grid[1], w=grid[2], i=pt, j=ph, k=pw)
        return out, {tap: features[tap] for tap in taps}

    def _stem(self, rngs):
        return _Stem(self, rngs)

    def _block(self, rngs):
        return _Block(self, rngs)

    def _head(self, rngs):
        return _Head(self, rngs)


class _Stem(nnx.Module):
    """Patch, timestep and text embeddings."""

    def __init__(self, config: VideoTransformer, rngs: nnx.Rngs):
        width = config.width
        self.patch_embedding = Linear(
            config.channels * math.prod(config.patch), width, dtype=config.dtype, rngs=rngs)
        self.time_1 = Linear(config.frequency_width, width, rngs=rngs)
        self.time_2 = Linear(width, width, rngs=rngs)
        self.time_proj = Linear(width, 6 * width, rngs=rngs)
        self.text_1 = Linear(config.text_width, width, dtype=config.dtype, rngs=rngs)
        self.text_2 = Linear(width, width, dtype=config.dtype, rngs=rngs)

    def __call__(self, x, timestep, text):
        time = sinusoid(timestep, self.time_1.in_features)
        time = self.time_2(jax.nn.silu(self.time_1(time)))
        modulation = rearrange(self.time_proj(jax.nn.silu(time)), "b g (s d) -> b g s d", s=6)
        text = self.text_2(jax.nn.gelu(self.text_1(text), approximate=True))
        return self.patch_embedding(x), time, modulation, text


class _Block(nnx.Module):
    """Self-attention, cross-attention to text, feed-forward; modulated by the timestep."""

    def __init__(self, config: VideoTransformer, rngs: nnx.Rngs):
        width, dtype = config.width, config.dtype
        self.scale_shift_table = nnx.Param(
            jax.random.normal(rngs.params(), (6, width)) / math.sqrt(width))
        self.attn1 = Attention(width, config.heads, dtype=dtype, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs)
        self.attn2 = Attention(width, config.heads, dtype=dtype, rngs=rngs)
        self.ffn_1 = Linear(width, config.ffn, dtype=dtype, rngs=rngs)
        self.ffn_2 = Linear(config.ffn, width, dtype=dtype, rngs=rngs)

    def __call__(self, x, modulation, text, angles):
        tokens, dtype = x.shape[1], x.dtype
        table = expand(modulation + self.scale_shift_table[...], tokens)
        shift1, scale1, gate1, shift2, scale2, gate2 = (table[:, :, i] for i in range(6))
        h = (layer_norm(x) * (1 + scale1) + shift1).astype(dtype)
        x = (x + gate1 * self.attn1(h, angles=angles)).astype(dtype)
        x = x + self.attn2(self.norm2(x).astype(dtype), text)
        h = (layer_norm(x) * (1 + scale2) + shift2).astype(dtype)
        h = self.ffn_2(jax.nn.gelu(self.ffn_1(h), approximate=True))
        return (x + gate2 * h).astype(dtype)


class _Head(nnx.Module):
    """Modulated norm and the projection to patches; zero at the start of training."""

    def __init__(self, config: VideoTransformer, rngs: nnx.Rngs):
        self.scale_shift_table = nnx.Param(
            jax.random.normal(rngs.params(), (2, config.width)) / math.sqrt(config.width))
        self.proj_out = Linear(
            config.width, config.channels * math.prod(config.patch),
            kernel_init=nnx.initializers.zeros_init(), dtype=config.dtype, rngs=rngs)

    def __call__(self, x, time):
        table = expand(time[:, :, None] + self.scale_shift_table[...], x.shape[1])
        x = layer_norm(x) * (1 + table[:, :, 1]) + table[:, :, 0]
        return self.proj_out(x).astype(jnp.float32)
