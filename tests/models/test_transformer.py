import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvp.models.transformer import REMAT, VideoTransformer, sinusoid

MODEL = VideoTransformer(channels=12, width=32, layers=3, heads=2, ffn=48, text_width=8)

run = jax.jit(VideoTransformer.__call__, static_argnums=0, static_argnames="taps")


@pytest.fixture(scope="module")
def start():
    return jax.jit(MODEL.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def params(start):
    # The head starts at zero, which would hide everything before it.
    head = start["head"]
    kernel = 0.1 * jax.random.normal(jax.random.key(1), head["proj_out"]["kernel"].shape)
    return start | {"head": head | {"proj_out": head["proj_out"] | {"kernel": kernel}}}


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(2), 3)
    latents = jax.random.normal(keys[0], (2, 3, 4, 6, 12))
    timestep = 1000 * jax.random.uniform(keys[1], (2, 3))
    return latents, timestep, jax.random.normal(keys[2], (2, 5, 8))


def test_output_is_zero_at_initialisation(start, inputs):
    out, features = run(MODEL, start, *inputs)
    assert out.shape == (2, 3, 4, 6, 12) and out.dtype == jnp.float32
    assert not out.any() and not features


def test_timestep_per_sample_frame_and_token_agree(params, inputs):
    latents, _, text = inputs
    tokens = 3 * 2 * 3
    per_sample = jnp.array([100.0, 900.0])
    expected, _ = run(MODEL, params, latents, per_sample, text)
    for groups in (3, tokens):
        out, _ = run(MODEL, params, latents, jnp.repeat(per_sample[:, None], groups, 1), text)
        np.testing.assert_allclose(out, expected, atol=1e-5)


def test_a_frames_own_timestep_changes_the_output(params, inputs):
    latents, timestep, text = inputs
    base, _ = run(MODEL, params, latents, timestep, text)
    other, _ = run(MODEL, params, latents, timestep.at[:, 1].add(300.0), text)
    assert jnp.abs(base - other).max() > 1e-3


def test_taps_are_the_blocks_outputs_and_change_nothing(params, inputs):
    base, _ = run(MODEL, params, *inputs)
    out, features = run(MODEL, params, *inputs, taps=(0, 2))
    np.testing.assert_allclose(out, base, atol=1e-5)
    assert set(features) == {0, 2} and features[0].shape == (2, 18, 32)
    one = {**params, "blocks": jax.tree.map(lambda p: p[:1], params["blocks"])}
    short = VideoTransformer(channels=12, width=32, layers=1, heads=2, ffn=48, text_width=8)
    np.testing.assert_allclose(run(short, one, *inputs, taps=(0,))[1][0], features[0], atol=1e-5)


def test_text_and_place_matter(params, inputs):
    latents, timestep, text = inputs
    base, _ = run(MODEL, params, latents, timestep, text)
    assert jnp.abs(run(MODEL, params, latents, timestep, -text)[0] - base).max() > 1e-3
    mirrored, _ = run(MODEL, params, latents[:, :, :, ::-1], timestep, text)
    assert jnp.abs(mirrored[:, :, :, ::-1] - base).max() > 1e-3


def test_samples_do_not_depend_on_the_batch(params, inputs):
    both, _ = run(MODEL, params, *inputs)
    alone, _ = run(MODEL, params, *(x[:1] for x in inputs))
    np.testing.assert_allclose(both[:1], alone, atol=1e-5)


@pytest.mark.parametrize("change", [{"unroll": 3}, *({"remat": name} for name in REMAT)])
def test_compilation_options_keep_the_gradient(params, inputs, change):
    def loss(p, model):
        return jnp.square(model(p, *inputs)[0] - 1).mean()

    other = VideoTransformer(**{**MODEL.__dict__, **change})
    grads = jax.jit(jax.grad(loss), static_argnums=1)
    for a, b in zip(*(jax.tree.leaves(grads(params, m)) for m in (MODEL, other)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_bfloat16_stays_close_and_returns_float32(params, inputs):
    half = VideoTransformer(**{**MODEL.__dict__, "dtype": "bfloat16"})
    out, _ = run(half, params, *inputs)
    assert out.dtype == jnp.float32
    assert jnp.abs(out - run(MODEL, params, *inputs)[0]).max() < 0.1


def test_sinusoid_has_cosines_first():
    table = sinusoid(jnp.array([0.0, 7.0]), 8)
    np.testing.assert_allclose(table[0], [1, 1, 1, 1, 0, 0, 0, 0])
    frequencies = 10_000.0 ** (-np.arange(4) / 4)
    expected = np.concatenate([np.cos(7 * frequencies), np.sin(7 * frequencies)])
    np.testing.assert_allclose(table[1], expected, atol=1e-6)


def test_bad_sizes_are_named(params, inputs):
    latents, timestep, text = inputs
    with pytest.raises(ValueError, match="multiples of patch"):
        MODEL(params, latents[:, :, :3], timestep, text)
    with pytest.raises(ValueError, match="taps"):
        MODEL(params, *inputs, taps=(3,))
    with pytest.raises(ValueError, match="heads"):
        VideoTransformer(channels=4, width=30, heads=4)
    with pytest.raises(ValueError, match="timesteps do not divide"):
        MODEL(params, latents, jnp.ones((2, 4)), text)
