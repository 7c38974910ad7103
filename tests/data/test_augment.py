import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvp.data import augment, observation
from jaxvp.data.clips import ClipSpec

SPEC = ClipSpec(cameras=("a", "b"), num_frames=2, fps=1.0, chunk=1, height=16, width=24,
                text_length=1, action_size=1, state_size=1)


def gradient(batch=2, height=32, width=48):
    """Red grows to the right, green downwards: a picture says where each pixel came from."""
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([columns * 255 / width, rows * 255 / height, 0 * rows], -1).astype(np.uint8)
    return np.broadcast_to(image, (batch, 2, 2, height, width, 3))


def keys(*seeds):
    return jnp.stack([jax.random.key(seed) for seed in seeds])


def test_the_right_size_is_left_alone():
    video = gradient(height=16, width=24)
    assert augment.fit({"video": video}, SPEC, keys(0, 1))["video"] is video
    latents = {"latents": np.zeros((2, 1))}
    assert augment.fit(latents, SPEC, keys(0, 1), 0.5) == latents


def test_resizing_agrees_with_that_of_the_host():
    noise = np.random.default_rng(0).integers(0, 256, (1, 2, 2, 32, 48, 3), np.uint8)
    for video in (gradient(1), noise):
        resized = jax.jit(augment.fit, static_argnums=1)({"video": video}, SPEC)["video"]
        resized = np.asarray(resized)
        assert resized.dtype == np.uint8 and resized.shape == (1, 2, 2, 16, 24, 3)
        expected = observation.resize(video[0, 1, 1], 16, 24)
        assert np.abs(resized[0, 1, 1].astype(int) - expected).max() <= 1


def test_a_crop_is_a_part_of_the_picture_and_moves():
    video = gradient(3)
    crops = np.asarray(augment.fit({"video": video}, SPEC, keys(0, 1, 1), 0.5)["video"]).astype(int)
    spans = crops[..., -1, -1, :2] - crops[..., 0, 0, :2]
    assert np.abs(spans - 0.5 * 255 * np.array([23 / 24, 15 / 16])).max() < 4
    np.testing.assert_array_equal(crops[:, :, 0], crops[:, :, 1])  # Frames of a clip.
    np.testing.assert_array_equal(crops[1], crops[2])  # A clip's crop is that of its key.
    assert np.abs(crops[0] - crops[1]).max() > 10 and np.abs(crops[:, 0] - crops[:, 1]).max() > 10


def test_without_keys_the_middle_is_shown_at_the_size_of_training():
    """What is validated, sampled and exported: an object is as large as it was in training."""
    video = np.zeros((8, 2, 2, 32, 48, 3), np.uint8)
    video[..., 12:20, 18:30, :] = 255  # 8 rows and 12 columns in the middle.

    def extent(clip):
        return [float((np.asarray(clip["video"])[..., row, column, 0] / 255).sum(-1).mean())
                for row, column in ((slice(None), 12), (8, slice(None)))]

    trained = augment.fit({"video": video}, SPEC, keys(*range(8)), 0.8)
    assert extent(trained) == pytest.approx([5, 7.5], abs=0.4)
    middle = augment.fit({"video": video}, SPEC, crop=0.8)
    assert extent(middle) == pytest.approx([5, 7.5], abs=0.1)
    shown = np.asarray(middle["video"]).astype(int)
    assert np.abs(shown - shown[..., ::-1, ::-1, :]).max() <= 1
    half = np.asarray(augment.fit({"video": gradient(1)}, SPEC, crop=0.5)["video"]).astype(int)
    assert np.abs(half - gradient(1)[..., 8:24, 12:36, :]).max() <= 1


def test_crops_reach_every_corner_and_stay_inside():
    video = gradient(200)
    starts = np.asarray(augment.fit({"video": video}, SPEC, keys(*range(200)), 0.75)["video"])
    starts = starts[:, :, 0, 0, 0, :2].reshape(-1, 2).astype(int)
    assert (starts.min(0) <= 6).all() and (starts.max(0) >= 58).all()
    assert (starts.max(0) <= 0.25 * 255 + 6).all()


@pytest.mark.parametrize("crop", [1.0, 0.9])
def test_shapes_under_jit(crop):
    fit = jax.jit(lambda clip, keys: augment.fit(clip, SPEC, keys, crop))
    assert fit({"video": gradient()}, keys(0, 1))["video"].shape == (2, 2, 2, 16, 24, 3)
