"""Vidar: a video, and what to do to make it so."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_method import (
    SPEC,
    VIDEO,
    keys,
    make_clip,
    observation_of,
    parameters,
    predict,
    start,
)

from jaxvp.errors import UserError
from jaxvp.methods import base, vidar
from jaxvp.methods.vidar import PART, Vidar
from jaxvp.rules import named_leaves

SPEC = dataclasses.replace(SPEC, window=dataclasses.replace(SPEC.window, past_actions=1))
INVERSE = dict(unet_width=4, unet_stages=2, blocks=(1, 1), resnet_width=4)
METHOD = Vidar(spec=SPEC, layout="bimanual", video=VIDEO, inverse=INVERSE)
SQUARE = dataclasses.replace(METHOD, picture_size=16)


def clip_of(stage, batch=4):
    return make_clip(SPEC.narrow(METHOD.stages[stage].window), batch)


def loss_and_gradient(method, stage, params, clip, train=True):
    def loss(params):
        value, metrics, new = method.loss(params, clip, keys(3, len(clip["text"])), stage, train)
        return value, (metrics, new)
    (value, found), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return value, *found, gradient


def test_it_is_registered():
    assert base.get("vidar") is Vidar


def test_inverse_dynamics_learns_the_action_before_a_picture():
    params, clip = start(METHOD), clip_of(PART)
    assert clip["action"].shape == (4, 1, 2) and clip["video"].shape[2] == 1
    value, metrics, new, gradient = loss_and_gradient(METHOD, PART, params, clip)
    assert value == pytest.approx(
        float(metrics["action_loss"]), abs=METHOD.mask_weight) and value > metrics["action_loss"]
    assert 0 < metrics["mask_share"] < 1
    statistics = {name for name in named_leaves(params) if "statistics" in name}
    assert set(named_leaves(new)) == statistics and statistics
    moved = {name.partition("/")[0] for name, leaf in named_leaves(gradient).items()
             if np.abs(leaf).max() > 0}
    assert moved == {PART}
    clip["action_mask"][1] = False
    clip["action"][1] = 9.0
    other = loss_and_gradient(METHOD, PART, params, clip)[1]["action_loss"]
    rest = {name: np.delete(array, 1, 0) for name, array in clip.items()}
    assert loss_and_gradient(METHOD, PART, params, rest, False)[2] == {}
    assert other < metrics["action_loss"]


def test_a_policy_does_what_it_imagines():
    given, params = observation_of(make_clip(SPEC), SPEC), parameters(METHOD)
    outputs = predict(METHOD, ("action", "video"), params, given, keys(3))
    assert outputs["action"].shape == (2, 4, 2) and outputs["video"].shape[:2] == (2, 3)
    read = jax.jit(METHOD.read)(params, outputs["video"])
    np.testing.assert_allclose(outputs["action"], read, rtol=1e-4, atol=1e-5)
    frames = np.asarray(outputs["video"])
    alone = jax.jit(lambda p, x: METHOD.inverse_dynamics(p[PART], x, False)[0])
    np.testing.assert_allclose(outputs["action"][:, 3], alone(params, frames[:, 2]), rtol=1e-4,
                               atol=1e-5)
    np.testing.assert_allclose(outputs["action"][:, 1], alone(params, frames[:, 1]), rtol=1e-4,
                               atol=1e-5)


@pytest.mark.parametrize("frames, chunk", [(2, 1), (4, 12), (3, 7), (5, 4)])
def test_actions_between_frames_are_on_the_line(frames, chunk):
    weights = vidar.between(frames, chunk)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
    times = weights @ np.arange(frames)
    np.testing.assert_allclose(times, np.arange(1, chunk + 1) * (frames - 1) / chunk, atol=1e-6)


def test_pictures_of_another_size():
    canvas = np.full((2, 24, 16, 3), 80, np.uint8)
    assert METHOD.pictures(canvas) is canvas
    assert SQUARE.pictures(canvas).shape == (2, 16, 16, 3) and (SQUARE.pictures(canvas) == 80).all()
    loss_and_gradient(SQUARE, PART, start(METHOD), clip_of(PART))


@pytest.mark.parametrize("changes, message", [
    ({"past_actions": 0}, "window.past_actions is 0"), ({"future": 0}, "future 0")])
def test_a_window_without_what_it_learns_is_refused(changes, message):
    spec = dataclasses.replace(SPEC, window=dataclasses.replace(SPEC.window, **changes))
    with pytest.raises(UserError, match=message):
        dataclasses.replace(METHOD, spec=spec)
