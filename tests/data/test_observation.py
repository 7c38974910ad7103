"""The canvas and the text that every method sees."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvp.data import observation
from jaxvp.data.observation import LAYOUTS, canvas


@pytest.fixture
def video():
    """uint8[B=2, V=3, T=2, H=4, W=6, 3]"""
    return np.random.default_rng(0).integers(0, 256, (2, 3, 2, 4, 6, 3), np.uint8)


def by_hand(video, view_mask):
    """The bimanual canvas in loops over pixels."""
    b, _, t, h, w, c = video.shape
    result = np.zeros((b, t, h * 3 // 2, w, c), np.uint8)
    for i, k, y, x, channel in np.ndindex(b, t, h, w, c):
        result[i, k, y, x, channel] = video[i, 0, k, y, x, channel] if view_mask[i, 0] else 127
    for i, view, k, y, x, channel in np.ndindex(b, 2, t, h // 2, w // 2, c):
        block = video[i, view + 1, k, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2, channel]
        mean = int(block.astype(float).mean() + 0.5) if view_mask[i, view + 1] else 127
        result[i, k, h + y, view * w // 2 + x, channel] = mean
    return result


def test_bimanual_canvas(video):
    mask = np.array([[True, True, True], [True, False, True]])
    found = canvas(video, mask, LAYOUTS["bimanual"])
    assert found.dtype == np.uint8 and found.shape == (2, 2, 6, 6, 3)
    np.testing.assert_array_equal(found, by_hand(video, mask))


def test_jit_gives_the_same_picture(video):
    mask = np.array([[True, False, True], [False, True, True]])
    compiled = jax.jit(lambda v, m: canvas(v, m, LAYOUTS["bimanual"]))
    found = compiled(jnp.asarray(video), jnp.asarray(mask))
    assert found.dtype == jnp.uint8
    np.testing.assert_array_equal(found, canvas(video, mask, LAYOUTS["bimanual"]))


def test_float_canvas_is_differentiable(video):
    mask = np.ones((2, 3), bool)
    floats = jnp.asarray(video, jnp.float32)
    gradient = jax.grad(lambda v: canvas(v, jnp.asarray(mask), LAYOUTS["bimanual"]).sum())(floats)
    np.testing.assert_allclose(gradient[:, 0], 1.0)
    np.testing.assert_allclose(gradient[:, 1:], 0.25)


def test_single_wrist_canvas_leaves_the_corner_black(video):
    found = canvas(video[:, :2], np.ones((2, 2), bool), LAYOUTS["single_wrist"])
    np.testing.assert_array_equal(found[:, :, :4], video[:, 0])
    assert found.shape[2:4] == (6, 6) and not found[:, :, 4:, 3:].any()
    assert found[:, :, 4:, :3].any()


def test_views_that_do_not_fit_are_errors(video):
    with pytest.raises(ValueError, match="'head', 'left_wrist', 'right_wrist'.*found 2 views"):
        canvas(video[:, :2], np.ones((2, 2), bool), LAYOUTS["bimanual"])
    with pytest.raises(ValueError, match="left_wrist does not fit.*image_size"):
        canvas(video[:, :, :, :3], np.ones((2, 3), bool), LAYOUTS["bimanual"])


def test_text_names_robot_cameras_and_task():
    assert observation.describe("a robot", "two views", "lift") == "a robot; two views; lift"


def test_resize_is_an_area_filter_and_keeps_what_fits():
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, 4:] = 200
    assert observation.resize(image, 8, 8) is image
    small = observation.resize(image, 2, 2)
    assert small.shape == (2, 2, 3) and small[0, 0, 0] < 40 and small[0, 1, 0] > 160


def test_policies_import_nothing_of_the_training_side():
    """The evaluator's modules load without the libraries that only training has."""
    code = (
        "import sys, jaxvp.data.text, jaxvp.data.observation, jaxvp.data.normalize;"
        "heavy = {'flax', 'optax', 'grain', 'tensorflow_datasets', 'torch', 'tensorflow', 'cv2'};"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_instruction_is_cleaned_as_builders_clean_it():
    expected = "arm; one view; pick up the cup"
    for text in ("pick up the cup", " pick  up\nthe cup ", b"pick up\tthe cup"):
        assert observation.describe("arm", "one view", text) == expected
    assert observation.describe("arm", "one view", "None") == "arm; one view; "
