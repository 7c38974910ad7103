"""Codecs: video to latents and back."""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange


@dataclasses.dataclass(frozen=True)
class PixelCodec:
    """Space-to-depth of `patch` x `patch` pixels: no parameters, exact inverse.

    Latents are float32 in [-1, 1], one latent frame per video frame.
    """

    patch: int = 4

    @property
    def channels(self) -> int:
        return 3 * self.patch**2

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(t, h, w, c) of a video of `frames` x `height` x `width` pixels.

        Raises ValueError when a side is not a multiple of the patch.
        """
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"PixelCodec(patch={self.patch}): video sides must be multiples of the patch, "
                f"got {height} x {width}")
        return frames, height // self.patch, width // self.patch, self.channels

    def encode(self, video: jax.Array) -> jax.Array:
        """uint8 (or float in [0, 255]) [B, T, H, W, 3] -> float32[B, t, h, w, c] in [-1, 1]."""
        x = video.astype(jnp.float32) / 127.5 - 1.0
        return rearrange(x, "b t (h p) (w q) c -> b t h w (p q c)", p=self.patch, q=self.patch)

    def decode(self, latents: jax.Array) -> jax.Array:
        """float32[B, t, h, w, c] -> uint8[B, T, H, W, 3]; values outside [-1, 1] are clipped."""
        x = rearrange(latents, "b t h w (p q c) -> b t (h p) (w q) c", p=self.patch, q=self.patch)
        return jnp.clip(jnp.round((x + 1.0) * 127.5), 0, 255).astype(jnp.uint8)
