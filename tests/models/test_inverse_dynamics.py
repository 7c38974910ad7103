"""Inverse dynamics: published sizes, the mask and its gradient, batch statistics."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvp.errors import UserError
from jaxvp.models import inverse_dynamics
from jaxvp.models.inverse_dynamics import InverseDynamics, ResNet, UNet, accuracy, huber
from jaxvp.rules import named_leaves

SMALL = InverseDynamics(3, unet_width=4, unet_stages=2, blocks=(1, 2), resnet_width=4)
KINDS = ("masked", "resnet", "unet")


def pictures(size=(24, 20), batch=4):
    return np.random.default_rng(0).integers(0, 256, (batch, *size, 3), np.uint8)


@functools.cache
def start(model):
    return jax.jit(model.init)(jax.random.key(0))


@functools.partial(jax.jit, static_argnums=(0, 3))
def run(model, params, x, train):
    return model(params, x, train)


def count(model):
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    return sum(leaf.size for name, leaf in named_leaves(abstract).items()
               if "statistics" not in name)


def test_the_published_size():
    """69.18 M and 23.54 M, as computed from the layers of the published code; "92M"."""
    assert count(UNet()) == 69_176_705
    assert count(ResNet(14)) == 23_536_718
    assert count(InverseDynamics(14)) == 92_713_423
    assert UNet().widths == [64, 128, 256, 512, 1024, 1024]
    shapes = jax.eval_shape(lambda params: InverseDynamics(14)(
        params, jnp.zeros((2, 518, 518, 3), jnp.uint8), False)[:2],
        jax.eval_shape(InverseDynamics(14).init, jax.random.key(0)))
    assert [x.shape for x in shapes] == [(2, 14), (2, 518, 518)]


@pytest.mark.parametrize("kind", KINDS)
def test_new_statistics_are_those_of_the_parameters(kind):
    model = dataclasses.replace(SMALL, kind=kind)
    params, x = start(model), pictures()
    actions, soft, new = run(model, params, x, True)
    assert actions.shape == (4, 3) and (soft is None) == (kind != "masked")
    expected = {name: leaf.shape for name, leaf in named_leaves(params).items()
                if "statistics" in name}
    found = named_leaves(new)
    assert {name: leaf.shape for name, leaf in found.items()} == expected and expected
    assert all(np.abs(leaf - named_leaves(params)[name]).max() > 0 for name, leaf in found.items())
    assert not named_leaves(run(model, params, x, False)[2])


def test_without_training_a_row_does_not_depend_on_the_batch():
    params, x = start(SMALL), pictures()
    whole = run(SMALL, params, x, False)[0]
    np.testing.assert_allclose(run(SMALL, params, x[1:2], False)[0][0], whole[1], atol=1e-5)
    trained = run(SMALL, params, x, True)[0]
    assert np.abs(run(SMALL, params, x[:2], True)[0] - trained[:2]).max() > 1e-3


def test_the_mask_hides_what_it_is_not_of():
    """What is masked has no influence beyond the mask; what is seen has."""
    params, x = start(SMALL), pictures()
    soft = run(SMALL, params, x, False)[1]
    assert 0 <= soft.min() < 0.5 < soft.max() <= 1
    resnet = dataclasses.replace(SMALL, kind="resnet")
    masked = inverse_dynamics.normalized(x) * (soft >= 0.5)[..., None]
    np.testing.assert_allclose(
        run(SMALL, params, x, False)[0],
        jax.jit(lambda p, x: resnet.resnet(p["resnet"], x, False)[0])(params, masked), atol=1e-5)


def test_the_gradient_of_the_mask_is_that_of_the_soft_one():
    params, x = start(SMALL), pictures(batch=2)

    @jax.jit
    def gradient(bias):
        def loss(bias):
            out = {**params["unet"]["out"], "bias": bias}
            moved = {**params, "unet": {**params["unet"], "out": out}}
            return SMALL(moved, x, False)[0].sum()
        return jax.grad(loss)(bias)

    @jax.jit
    def by_hand(bias):
        shown = inverse_dynamics.normalized(x)
        logits = SMALL.unet(params["unet"], shown, False)[0][..., 0]
        hard = ((1 + jnp.tanh(logits)) / 2 >= 0.5).astype(jnp.float32)
        to_mask = jax.grad(lambda mask: SMALL.resnet(
            params["resnet"], shown * mask[..., None], False)[0].sum())(hard)
        return (to_mask * (1 - jnp.tanh(logits) ** 2) / 2).sum()

    bias = params["unet"]["out"]["bias"]
    assert float(gradient(bias)[0]) == pytest.approx(float(by_hand(bias)), rel=1e-3)
    assert abs(float(by_hand(bias))) > 1e-6


def test_huber_is_torchs_smooth_l1():
    error = jnp.array([-3.0, -1.0, -0.5, 0.0, 0.2, 1.0, 4.0])
    np.testing.assert_allclose(huber(error), [2.5, 0.5, 0.125, 0, 0.02, 0.5, 3.5], rtol=1e-6)
    np.testing.assert_allclose(huber(error, 0.1)[-1], 0.1 * (4 - 0.05), rtol=1e-6)


def test_accuracy_wants_all_joints_and_grippers():
    error = jnp.array([[0.05, -0.05, 0.5], [0.05, 0.07, 0.0], [0.0, 0.0, -0.7]])
    grippers = np.array([False, False, True])
    assert accuracy(error, grippers).tolist() == [1, 0, 0]
    assert accuracy(error, grippers, joint=0.1, gripper=0.8).tolist() == [1, 1, 1]


def test_pictures_that_are_too_small_are_refused():
    with pytest.raises(UserError, match="both sides must be at least 32 pixels, found 24 x 40"):
        UNet().__call__({}, jnp.zeros((1, 24, 40, 3)), False)
