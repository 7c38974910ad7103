import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import pretrain
from jaxvp.config import build
from jaxvp.data import text_embeddings
from jaxvp.data.clips import ClipSpec
from jaxvp.methods import base, video_policy
from jaxvp.methods.video_policy import VideoPolicy
from jaxvp.models.transformer import VideoTransformer
from jaxvp.models.wan_vae import WanVAE
from jaxvp.weights import streaming

GOLDEN = Path(__file__).parents[1] / "golden"
SPEC = ClipSpec(cameras=("head", "left_wrist", "right_wrist"), num_frames=3, fps=2.0, chunk=4,
                height=16, width=16, text_length=16, action_size=2, state_size=2)
SIZES = dict(video=dict(width=16, layers=2, heads=2, ffn=32), text=dict(width=8, heads=2),
             head=dict(width=16, layers=1, heads=2), taps=(0, 1), video_steps=2, action_steps=2)
METHOD = VideoPolicy(spec=SPEC, layout="bimanual", **SIZES)
SHARED = dataclasses.replace(METHOD, features="shared", prediction="velocity", sampler="heun",
                             guidance=2.0)


def make_clip(batch=2):
    rng = np.random.default_rng(0)
    return {
        "video": rng.integers(0, 256, (batch, 3, 3, 16, 16, 3), np.uint8),
        "view_mask": np.ones((batch, 3), bool),
        "frame_mask": np.ones((batch, 3), bool),
        "text": rng.integers(1, 256, (batch, 16)).astype(np.int32),
        "action": rng.uniform(-1, 1, (batch, 4, 2)).astype(np.float32),
        "action_mask": np.ones((batch, 4, 2), bool),
        "state": rng.uniform(-1, 1, (batch, 2)).astype(np.float32),
        "state_mask": np.ones((batch, 2), bool),
    }


def observation_of(clip):
    keys = ("view_mask", "text", "state", "state_mask")
    return {"video": clip["video"][:, :, :1], **{k: clip[k] for k in keys}}


@functools.cache
def parameters(method):
    """Random everywhere, the output layers (zero at first) too."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype),
                        jax.eval_shape(method.init, jax.random.key(0)))


@functools.cache
def start():
    return jax.jit(METHOD.init)(jax.random.key(0))


@functools.partial(jax.jit, static_argnums=(0, 1))
def loss_and_gradient(method, stage, params, clip, key):
    keys = jax.random.split(key, len(clip["text"]))
    return jax.value_and_grad(lambda p: method.loss(p, clip, keys, stage), has_aux=True)(params)


@functools.partial(jax.jit, static_argnums=0)
def act(method, params, observation, keys):
    return method.act(params, observation, keys)


def size(tree):
    return sum(float(jnp.abs(x).sum()) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("method", [METHOD, SHARED], ids=["noise", "shared"])
def test_action_loss_never_reaches_the_video_transformer(method):
    _, grads = loss_and_gradient(
        method, "action", parameters(method), make_clip(), jax.random.key(2))
    assert size(grads["video"]) == 0 and size(grads["text"]) == 0 and size(grads["action"]) > 0


def test_video_stage_trains_video_and_text_only():
    _, grads = loss_and_gradient(
        METHOD, "video", parameters(METHOD), make_clip(), jax.random.key(2))
    assert size(grads["video"]) > 0 and size(grads["text"]) > 0 and size(grads["action"]) == 0


def test_joint_trains_everything_and_adds_the_losses():
    (total, metrics), grads = loss_and_gradient(
        METHOD, "joint", parameters(METHOD), make_clip(), jax.random.key(2))
    assert all(size(grads[part]) > 0 for part in ("video", "text", "action"))
    assert total == pytest.approx(float(sum(metrics.values())))
    assert set(metrics) == {"video_loss", "action_loss"}


def test_frozen_names_what_a_stage_leaves_alone():
    assert METHOD.frozen("joint") == ()
    assert METHOD.frozen("action") == ("text/.*", "video/.*")
    with pytest.raises(ValueError, match="video_policy has stages"):
        METHOD.frozen("vidoe")


def test_masked_frames_and_actions_do_not_count():
    clip, key = make_clip(), jax.random.key(3)
    clip["frame_mask"][:, 2:] = False
    clip["action_mask"][:, 2:] = False

    def losses():
        # The predictions for what counts see the noisy rest, but not at initialisation, where
        # they do not depend on the input at all.
        return loss_and_gradient(METHOD, "joint", start(), clip, key)[0][1]

    before = losses()
    clip["video"][:, :, 2] = 255 - clip["video"][:, :, 2]
    clip["action"][:, 2:] *= -1
    after = losses()
    for name in ("video_loss", "action_loss"):
        assert before[name] == pytest.approx(float(after[name]), rel=1e-5) and before[name] > 0
    clip["video"][:, :, 1] = 255 - clip["video"][:, :, 1]
    clip["action"][:, :2] += 0.5
    changed = losses()
    for name in ("video_loss", "action_loss"):
        assert abs(changed[name] - after[name]) > 1e-3


def test_residual_prediction_starts_as_the_copy_of_the_first_frame():
    observation = observation_of(make_clip())
    method = dataclasses.replace(METHOD, video_steps=8)
    video = jax.jit(method.imagine)(start(), observation, jax.random.split(jax.random.key(5), 2))
    assert video.shape == (2, 3, 24, 16, 3) and video.dtype == jnp.uint8
    np.testing.assert_array_equal(video[:, 1], video[:, 0])
    np.testing.assert_array_equal(video[:, 0, :16], observation["video"][:, 0, 0])


@pytest.mark.parametrize("method", [METHOD, SHARED], ids=["noise", "shared"])
def test_a_row_depends_on_its_own_key_only(method):
    params, observation = parameters(method), observation_of(make_clip(3))
    keys = jax.random.split(jax.random.key(7), 3)
    actions = act(method, params, observation, keys)
    assert actions.shape == (3, 4, 2) and actions.dtype == jnp.float32
    turned = {k: v[::-1] for k, v in observation.items()}
    np.testing.assert_allclose(act(method, params, turned, keys[::-1])[::-1], actions, atol=1e-5)
    other = act(method, params, observation, keys.at[0].set(jax.random.key(9)))
    assert jnp.abs(other[0] - actions[0]).max() > 1e-4
    np.testing.assert_allclose(other[1:], actions[1:], atol=1e-5)


def test_state_that_is_masked_is_not_seen():
    params, observation = parameters(METHOD), observation_of(make_clip(3))
    keys = jax.random.split(jax.random.key(7), 3)
    seen = act(METHOD, params, observation, keys)
    observation["state_mask"] = np.zeros((3, 2), bool)
    hidden = act(METHOD, params, observation, keys)
    observation["state"] = observation["state"] + 1
    assert jnp.abs(seen - hidden).max() > 1e-4
    np.testing.assert_array_equal(act(METHOD, params, observation, keys), hidden)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="config.method.features: expected one of"):
        build(VideoPolicy, {**SIZES, "spec": SPEC, "layout": "bimanual", "features": "both"},
              "config.method")
    with pytest.raises(ValueError, match="widht"):
        VideoPolicy(spec=SPEC, layout="bimanual", **{**SIZES, "video": dict(widht=16)})
    with pytest.raises(ValueError, match="did you mean 'video_policy'"):
        base.get("video_polcy")


def test_state_dropout_hides_the_state():
    """Dropped for every clip, the state reaches the loss through nothing."""
    method = dataclasses.replace(METHOD, state_dropout=1.0)
    params, clip, key = parameters(METHOD), make_clip(), jax.random.key(2)
    (hidden, _), grads = loss_and_gradient(method, "action", params, clip, key)
    assert size(grads["action"]["stem"]["state_1"]["kernel"]) == 0
    (seen, _), _ = loss_and_gradient(METHOD, "action", params, clip, key)
    assert hidden != pytest.approx(float(seen))
    clip["state"] = clip["state"] + 1
    assert loss_and_gradient(method, "action", params, clip, key)[0][0] == hidden


def test_latent_frames_count_when_all_their_frames_do():
    method = dataclasses.replace(METHOD, spec=dataclasses.replace(SPEC, num_frames=9, height=32,
                                                                  width=32),
                                 codec={"name": "wan", "width": 8, "decoder_width": 8})
    mask = np.ones((3, 9), bool)
    mask[1, 5:] = mask[2, 8:] = False
    np.testing.assert_array_equal(
        method._latent_mask(mask), [[True, True, True], [True, True, False], [True, True, False]])


def test_an_action_head_needs_actions():
    spec = dataclasses.replace(METHOD.spec, action_size=0)
    with pytest.raises(ValueError, match="config.data.action_size is 0, and the data has no act"):
        dataclasses.replace(METHOD, spec=spec)


def test_wans_autoencoder_and_embedded_text():
    """The shape of Wan in small: latents of a VAE that is not trained, text that is embedded."""
    spec = dataclasses.replace(SPEC, num_frames=5, height=32, width=32, text_length=4,
                               text_width=6)
    method = dataclasses.replace(METHOD, spec=spec, prediction="velocity", sampler="unipc", text={},
                                 text_tokens=8,
                                 codec={"name": "wan", "width": 8, "decoder_width": 8})
    assert method.latent_shape == (2, 6, 4, 16) and method.frozen("video") == (
        "action/.*", "codec/.*", "text/.*")
    rng = np.random.default_rng(0)
    clip = make_clip() | {
        "video": rng.integers(0, 256, (2, 3, 5, 32, 32, 3), np.uint8),
        "frame_mask": np.ones((2, 5), bool),
        "text": rng.normal(size=(2, 4, 6)).astype(jnp.bfloat16)}
    params = parameters(method)
    assert set(params) == {"video", "action", "codec", "text"}
    (loss, _), grads = loss_and_gradient(method, "video", params, clip, jax.random.key(2))
    assert np.isfinite(loss) and size(grads["video"]) > 0 and size(grads["codec"]) == 0
    clip["text"] = -clip["text"]
    assert loss_and_gradient(method, "video", params, clip, jax.random.key(2))[0][0] != loss
    keys = jax.random.split(jax.random.key(5), 2)
    video = jax.jit(method.imagine)(params, observation_of(clip), keys)
    assert video.shape == (2, 5, 48, 32, 3) and video.dtype == jnp.uint8


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """What diffusers' pipeline made with a tiny Wan, that model as a method, and its weights."""
    golden = dict(np.load(GOLDEN / "pipeline.npz"))
    weights = {k.removeprefix("weights/"): x for k, x in golden.items() if "weights/" in k}
    folder = tmp_path_factory.mktemp("wan")
    streaming.write_file(folder / "model.safetensors",
                         {k: (x.shape, x.dtype) for k, x in weights.items()}, weights.get)
    (folder / "config.json").write_text(str(golden["config"]))
    spec = ClipSpec(cameras=("agentview",), num_frames=9, fps=2.0, chunk=4, height=32, width=48,
                    text_length=5, text_width=8, action_size=2, state_size=2)
    method = VideoPolicy(
        spec=spec, layout="single", codec={"name": "wan"}, taps=(0,), prediction="velocity",
        video=dict(width=24, layers=2, heads=2, ffn=32, frequency_width=32, epsilon=0.01),
        head=SIZES["head"], timesteps="integer", sampler="unipc", video_steps=6, shift=5.0,
        guidance=3.0)
    video, _ = method.load("video", folder, None)
    return golden, method, {"video": video, "text": {"empty": golden["empty"][0]}}, folder


def imagined(golden, method, params, monkeypatch):
    """Latents of the method from the pipeline's noise, picture and texts."""
    monkeypatch.setattr(video_policy, "_rows", lambda keys, shape: jnp.asarray(golden["noise"]))
    monkeypatch.setattr(WanVAE, "decode", lambda self, params, latents: latents)
    observation = {"latents": golden["noise"][:, :1], "text": golden["text"]}
    return jax.jit(method.imagine)(params, observation, jax.random.split(jax.random.key(0), 1))


def test_latents_are_those_of_the_pipeline(pipeline, monkeypatch):
    """The same weights, noise, picture, texts, steps, shift and guidance."""
    golden, method, params, _ = pipeline
    expected = golden["latents"]
    latents = imagined(golden, method, params, monkeypatch)
    assert np.linalg.norm(latents - expected) < 1e-5 * np.linalg.norm(expected)
    method = dataclasses.replace(method, timesteps="continuous")
    other = imagined(golden, method, params, monkeypatch)
    assert np.linalg.norm(other - expected) > 1e-3 * np.linalg.norm(expected)


def test_training_tells_of_sigma_as_sampling_does(pipeline, monkeypatch):
    golden, method, params, _ = pipeline
    seen = []
    monkeypatch.setattr(VideoTransformer, "__call__",
                        lambda self, params, latents, timestep, *rest: (
                            seen.append(timestep), (latents, {0: None}))[1])
    sigma = jnp.array([0.0, 0.2345, 0.9999, 1.0])
    first = jnp.zeros((4, 1, 4, 6, 16))
    for name, values in (("integer", [0, 234, 999, 999]),
                         ("continuous", [0, 234.5, 999.9, 1000])):
        made = dataclasses.replace(method, timesteps=name)
        made._video(params, first, jnp.zeros((4, 3, 4, 6, 16)), sigma, None)
        assert seen[-1].shape == (4, 3) and not seen[-1][:, 0].any()
        np.testing.assert_allclose(seen[-1][:, 1:], np.repeat(np.array(values)[:, None], 2, 1),
                                   rtol=1e-6)


def test_weights_that_do_not_fit_say_which_config_does(pipeline):
    """The default config is not of Wan's size: `--config.pretrained.video` alone is no way."""
    config = pretrain.get_config()
    config.pretrained.video = str(pipeline[-1])
    options = {k: v for k, v in config.method.to_dict().items() if k != "name"}
    method = VideoPolicy(spec=SPEC, layout="bimanual", **options)
    with pytest.raises(ValueError, match=r"^config.pretrained.video: .* has channels 16, .* the "
                                         "model channels 48.*configs/pretrain.py:wan-1.3b"):
        method.load("video", config.pretrained.video, None)
    method = dataclasses.replace(METHOD, video={"size": "wan-7m"})
    with pytest.raises(ValueError, match="config.pretrained.video: .*what fits is") as error:
        method.load("video", config.pretrained.video, None)
    assert "configs/" not in str(error.value)


def test_dropped_text_is_the_empty_one(tmp_path):
    """As Wan was trained; guidance compares with it too."""
    rows = {"": np.array([[1.0, -2.0, 0.5]]), "lift": np.ones((2, 3))}
    text_embeddings.add(tmp_path, rows, "toy", 3, lambda texts: [rows[text] for text in texts])
    spec = dataclasses.replace(SPEC, text_length=4, text_width=3)
    method = dataclasses.replace(METHOD, spec=spec, text={}, text_dropout=1.0, text_tokens=6)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.ShapeDtypeStruct((1, 3), np.float32, sharding=place)
    loaded, _ = method.load("text", str(tmp_path), {"empty": abstract})
    np.testing.assert_array_equal(loaded["empty"], rows[""])
    params = parameters(method) | {"text": loaded}
    empty, lift = (np.tile(text_embeddings.TextEmbeddings(tmp_path).lookup(text, 4), (2, 1, 1))
                   for text in rows)
    all_dropped, none = (
        loss_and_gradient(m, "video", params, make_clip() | {"text": text}, jax.random.key(0))[0][0]
        for m, text in ((method, lift), (dataclasses.replace(method, text_dropout=0.0), empty)))
    assert all_dropped == none
    first, seen, unseen = method._observe(params, observation_of(make_clip() | {"text": empty}))
    np.testing.assert_array_equal(seen, unseen)
    assert unseen.shape == (2, 6, 3)


def test_stored_latents_stand_in_for_the_video():
    """Loss, imagination and actions are the same, up to the float16 of what is stored."""
    clip, params, method = make_clip(), parameters(METHOD), METHOD
    latents = np.asarray(method.encode(params, clip), np.float16)
    stored = {k: v for k, v in clip.items() if k not in ("video", "view_mask")}
    stored["latents"] = latents
    key, keys = jax.random.key(3), jax.random.split(jax.random.key(4), 2)
    for stage in method.stages:
        (expected, _), gradient = loss_and_gradient(method, stage, params, clip, key)
        (found, _), other = loss_and_gradient(method, stage, params, stored, key)
        np.testing.assert_allclose(found, expected, rtol=1e-3)
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(b, a, rtol=0.05, atol=0.01 * np.abs(a).max() + 1e-7)
    seen = {k: stored[k] for k in ("text", "state", "state_mask")} | {"latents": latents[:, :1]}
    np.testing.assert_allclose(method.act(params, seen, keys),
                               method.act(params, observation_of(clip), keys), atol=0.02)
    shown = np.asarray(method.shown(params, stored)).astype(int)
    truth = np.asarray(method.shown(params, clip)).astype(int)
    assert shown.shape == truth.shape == (2, 3, 24, 16, 3) and np.abs(shown - truth).max() <= 1


def test_latents_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"config.data.latents=\(3, 6, 4, 16\): clips of this size "
                                         r"have latents of \(3, 6, 4, 48\)"):
        dataclasses.replace(METHOD, spec=dataclasses.replace(SPEC, latents=(3, 6, 4, 16)))
