import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvp.models.autoencoder import PixelCodec


def test_pixel_codec_is_exact():
    video = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 12, 3), np.uint8)
    codec = PixelCodec(4)
    latents = jax.jit(codec.encode)(video)
    assert latents.shape == (2, *codec.latent_shape(3, 8, 12)) == (2, 3, 2, 3, 48)
    assert jnp.abs(latents).max() <= 1 + 1e-6
    np.testing.assert_array_equal(jax.jit(codec.decode)(latents), video)


def test_pixel_codec_keeps_patches_together():
    video = np.zeros((1, 1, 8, 8, 3), np.uint8)
    video[0, 0, :4, 4:] = 255
    latents = PixelCodec(4).encode(video)
    assert (latents[0, 0, 0, 1] == 1).all() and (latents[0, 0, 1] == -1).all()


def test_pixel_codec_names_bad_sizes():
    with pytest.raises(ValueError, match="multiples of the patch, got 9 x 8"):
        PixelCodec(4).latent_shape(1, 9, 8)
