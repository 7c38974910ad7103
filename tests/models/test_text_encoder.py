import jax
import jax.numpy as jnp
import pytest

from jaxvp.models.text_encoder import ByteTextEncoder


def test_tokens_follow_the_text():
    encoder = ByteTextEncoder(width=16, stride=4, length=12)
    params = encoder.init(jax.random.key(0))
    text = jnp.zeros((2, 12), jnp.int32).at[1, :3].set(jnp.array([66, 67, 256]))
    out = encoder(params, text)
    assert out.shape == (2, 3, 16) and out.dtype == jnp.float32
    assert jnp.abs(out[0] - out[1]).max() > 1e-2


def test_sizes_that_do_not_divide():
    with pytest.raises(ValueError, match="length 12 must be a multiple of 5, its stride"):
        ByteTextEncoder(stride=5, length=12)
    with pytest.raises(ValueError, match="text encoder: width 10 must be a multiple of 4, its hea"):
        ByteTextEncoder(width=10, heads=4)
