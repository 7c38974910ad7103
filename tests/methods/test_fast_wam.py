"""Fast-WAM: the action head sees observed frames alone; clips of two kinds share a batch."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_method import (
    HEAD,
    SPEC,
    VIDEO,
    keys,
    loss_and_gradient,
    make_clip,
    observation_of,
    parameters,
    predict,
    size,
)

from jaxvp.methods import base
from jaxvp.methods.fast_wam import FastWAM

METHOD = FastWAM(spec=SPEC, layout="bimanual", video=VIDEO, head=HEAD, taps=(0, 1), action_steps=2)
MIXED = dataclasses.replace(METHOD, video_every=3)


def test_it_is_registered():
    assert base.get("fast_wam") is FastWAM


def test_actions_depend_on_the_observed_frames_alone():
    clip, params = make_clip(), parameters(METHOD)
    features = METHOD.features(params, clip, keys(3))
    model = METHOD.video_model
    tokens = np.prod(METHOD.feature_grid)
    assert tokens * model.grid[0] == np.prod(model.grid) and features[0].shape[1] == tokens
    later = clip | {"video": clip["video"].copy()}
    later["video"][:, :, 1:] = 0
    for found, other in zip(features, METHOD.features(params, later, keys(4)), strict=True):
        np.testing.assert_array_equal(found, other)  # Whatever the noise is, too.
    later["video"][:, :, :1] = 0
    assert np.abs(features[0] - METHOD.features(params, later, keys(3))[0]).max() > 1e-3


def test_each_loss_has_clips_of_its_own():
    """Rows 0, 3, ... have the video loss, the others the action loss, as if they were alone."""
    clip, params, every = make_clip(batch=6), parameters(METHOD), keys(3, 6)
    (_, found), gradient = loss_and_gradient(MIXED, "joint", params, clip, every)
    assert {part for part in gradient if size(gradient[part])} == {"video", "text", "action"}
    video = np.arange(6) % 3 == 0

    def alone(rows, stage):
        chosen = {name: value[rows] for name, value in clip.items()}
        return loss_and_gradient(METHOD, stage, params, chosen, every[rows])[0][1]

    assert found["video_loss"] == pytest.approx(
        float(alone(video, "joint")["video_loss"]), rel=1e-5)
    assert found["action_loss"] == pytest.approx(
        float(alone(~video, "joint")["action_loss"]), rel=1e-5)


def test_the_policy_alone_is_the_joint_stage_without_its_video():
    clip, params, every = make_clip(batch=6), parameters(METHOD), keys(3, 6)
    video = np.arange(6) % 3 == 0
    now = {name: value[~video] for name, value in clip.items()}
    (loss, found), gradient = loss_and_gradient(MIXED, "policy", params, now, every[~video])
    assert set(found) == {"action_loss"} and loss == found["action_loss"]
    assert {part for part in gradient if size(gradient[part])} == {"video", "text", "action"}
    assert MIXED.stages["policy"].window.future == 0
    assert MIXED.stages["policy"].parts == MIXED.stages["joint"].parts


def test_validation_has_both_losses_of_every_clip():
    clip, params = make_clip(), parameters(METHOD)
    loss = jax.jit(lambda method, p, c, k: method.loss(p, c, k, "joint", train=False)[1],
                   static_argnums=0)
    assert loss(MIXED, params, clip, keys(3)) == loss(METHOD, params, clip, keys(3))


def test_the_stage_says_which_clips_show_the_future():
    assert MIXED.stages["joint"].future_every == 3
    assert MIXED.stages["action"].future_every == 1 == METHOD.stages["joint"].future_every


def test_action_and_video_are_predicted():
    given = observation_of(make_clip())
    outputs = predict(METHOD, ("action", "video"), parameters(METHOD), given, keys(3))
    alone = predict(METHOD, ("action",), parameters(METHOD), given, keys(3))
    np.testing.assert_allclose(outputs["action"], alone["action"], atol=1e-5)
    assert outputs["video"].shape[1] == SPEC.window.frames


def test_the_error_of_clean_actions_weighs_sigma_squared():
    """With one noise level it is the velocity's error times sigma squared."""
    params, clip = parameters(METHOD), make_clip()
    data = dataclasses.replace(METHOD, action_weight="data")
    sigma = np.full((2, 1), 0.5, np.float32)

    def loss(method):
        features = method.features(params, clip, keys(3))
        return float(method.action_loss(params, clip, keys(3), features, sigma, train=False))

    assert loss(data) == pytest.approx(0.25 * loss(METHOD), rel=1e-5) and loss(data) > 0
