"""Pictures on the device: resized from the size in which they are loaded, and cropped."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxvp.data.clips import ClipSpec


def fit(clip: Mapping, spec: ClipSpec, keys: jax.Array | None = None, crop: float = 1.0) -> dict:
    """The batch `clip` with its views at the size of `spec`, resized bilinearly, antialiased.

    Args:
      clip: video uint8[B, V, T, H', W', 3] of any size; a batch of latents stays as it is.
      spec: has the H and W that are wanted.
      keys: one a clip. With them, as in training, each view shows a part of its picture that is
        drawn, the same in all frames; without them, everywhere else, it shows the middle.
      crop: `DataConfig.crop`, height and width of that part as shares of the picture's, in (0, 1].
        A model that was trained on parts must see objects at the size that they have there.

    Returns:
      `clip` with video uint8[B, V, T, H, W, 3].
    """
    size = spec.height, spec.width
    if "video" not in clip or (clip["video"].shape[3:5] == size and crop == 1.0):
        return dict(clip)
    video = clip["video"]
    batch, views, frames, *source, _ = video.shape
    start = jnp.full((batch, views, 2), (1.0 - crop) / 2)
    if keys is not None and crop < 1.0:  # Apart from the keys of the noise.
        start = jax.vmap(lambda key: jax.random.uniform(
            jax.random.fold_in(key, 1), (views, 2), maxval=1.0 - crop))(keys)

    def view(video, start):
        """float32[T, H', W', 3] -> [T, H, W, 3], the part that begins at `start`, in shares."""
        scale = jnp.array([to / (crop * of) for to, of in zip(size, source, strict=True)])
        shift = -start * scale * jnp.array(source, jnp.float32)
        return jax.image.scale_and_translate(
            video, (frames, *size, 3), (1, 2), scale, shift, "linear", antialias=True)

    resized = jax.vmap(jax.vmap(view))(video.astype(jnp.float32), start)
    return {**clip, "video": jnp.clip(jnp.round(resized), 0, 255).astype(jnp.uint8)}
