import jax
import jax.numpy as jnp
import numpy as np

from jaxvp.models import module
from jaxvp.models.attention import Attention, rope_table, rotate


def test_rope_matches_complex_rotation():
    t, h, w, width = 2, 3, 4, 16
    x = np.random.default_rng(0).normal(size=(1, t * h * w, 2, width)).astype(np.float32)
    out = np.asarray(rotate(jnp.asarray(x), jnp.asarray(rope_table(t, h, w, width))))
    space = 2 * (width // 6)
    widths = (width - 2 * space, space, space)
    for n in range(t * h * w):
        place = np.unravel_index(n, (t, h, w))
        angles = np.concatenate([
            p * 10_000.0 ** (-np.arange(0, d, 2) / d) for p, d in zip(place, widths, strict=True)])
        pairs = x[0, n, :, 0::2] + 1j * x[0, n, :, 1::2]
        expected = pairs * np.exp(1j * angles)
        np.testing.assert_allclose(out[0, n, :, 0::2], expected.real, atol=1e-5)
        np.testing.assert_allclose(out[0, n, :, 1::2], expected.imag, atol=1e-5)


def test_rotated_products_depend_on_distance_only():
    angles = jnp.asarray(rope_table(1, 1, 9, 12))
    q, k = jax.random.normal(jax.random.key(0), (2, 12))
    q, k = (rotate(jnp.broadcast_to(a, (1, 9, 1, 12)), angles)[0, :, 0] for a in (q, k))
    products = q @ k.T
    np.testing.assert_allclose(products[2, 5], products[4, 7], atol=1e-5)


def test_attention_is_softmax_of_normalised_heads():
    key = jax.random.key(0)
    def factory(rngs):
        return Attention(8, 2, memory_width=6, rngs=rngs)
    params = module.init(factory, key)
    x, memory = jax.random.normal(key, (1, 3, 8)), jax.random.normal(key, (1, 4, 6))
    out = module.bind(factory, params)(x, memory)

    def linear(name, a):
        return a @ params[name]["kernel"] + params[name]["bias"]

    def rms(name, a):
        return a / np.sqrt(np.mean(a**2, -1, keepdims=True) + 1e-6) * params[name]["scale"]

    q, k = rms("norm_q", linear("to_q", x[0])), rms("norm_k", linear("to_k", memory[0]))
    v, heads = linear("to_v", memory[0]), []
    for s in (slice(0, 4), slice(4, 8)):
        heads.append(jax.nn.softmax(q[:, s] @ k[:, s].T / 2.0) @ v[:, s])
    expected = linear("to_out", np.concatenate(heads, -1))
    np.testing.assert_allclose(out[0], expected, atol=1e-5)
