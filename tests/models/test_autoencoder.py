import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvp.models.autoencoder import PixelCodec, from_uint8, to_uint8


def test_pixel_codec_is_exact():
    video = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 12, 3), np.uint8)
    codec = PixelCodec(4)
    params = codec.init(jax.random.key(0))
    assert params == {}
    latents = jax.jit(codec.encode)(params, video)
    assert latents.shape == (2, *codec.latent_shape(3, 8, 12)) == (2, 3, 2, 3, 48)
    assert latents.shape[-1] == codec.channels
    assert latents.dtype == jnp.float32 and np.abs(latents).max() <= 1
    np.testing.assert_array_equal(jax.jit(codec.decode)(params, latents), video)


def test_pixel_codec_keeps_patches_together():
    video = np.zeros((1, 1, 8, 8, 3), np.uint8)
    video[:, :, :4, 4:] = 255
    latents = PixelCodec(4).encode({}, video)
    np.testing.assert_array_equal(latents[0, 0].mean(-1), [[-1, 1], [-1, -1]])


def test_first_frames_alone_give_the_first_latent():
    video = np.random.default_rng(0).integers(0, 256, (1, 3, 4, 4, 3), np.uint8)
    codec = PixelCodec(4)
    np.testing.assert_array_equal(codec.encode({}, video[:, :codec.first_frames]),
                                  codec.encode({}, video)[:, :1])


@pytest.mark.parametrize("size, nearest", [((9, 8), "8 x 8"), ((8, 15), "8 x 16"),
                                           ((1, 8), "4 x 8"), ((0, 8), "4 x 8")])
def test_pixel_codec_names_bad_sizes(size, nearest):
    with pytest.raises(ValueError, match=rf"multiples of 4 pixels, got {size[0]} x {size[1]}\. "
                                         rf"Nearest: {nearest}"):
        PixelCodec(4).latent_shape(1, *size)


def test_uint8_survives_and_is_clipped():
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(from_uint8(levels)), levels)
    np.testing.assert_array_equal(to_uint8(jnp.array([-1.5, 1.5])), [0, 255])
