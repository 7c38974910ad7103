import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_method import PAST, SPEC, VIDEO, WAN_VAE, keys, make_clip, observation_of, size

from configs import vpp
from jaxvp.data import text_embeddings
from jaxvp.diffusion.samplers import SAMPLERS
from jaxvp.methods import video_model
from jaxvp.methods.video_model import VideoModel
from jaxvp.models.transformer import VideoTransformer
from jaxvp.models.wan_vae import WanVAE
from jaxvp.weights import streaming

GOLDEN = Path(__file__).parents[1] / "golden"
MODEL = VideoModel(spec=SPEC, layout="bimanual", **VIDEO)
SEES_TWO = dataclasses.replace(MODEL, spec=dataclasses.replace(SPEC, window=PAST))
VELOCITY = dataclasses.replace(MODEL, prediction="velocity")
# Wan's codec, with two observed latent frames of three: frames 1 to 5 of 9.
WAN = dataclasses.replace(
    MODEL, codec=WAN_VAE, spec=dataclasses.replace(
        SPEC, window=dataclasses.replace(PAST, past=5, future=4), height=32, width=32))


@functools.cache
def parameters(model):
    """Random everywhere, the output layer (zero at first) too."""
    rng = np.random.default_rng(1)
    abstract = {part: jax.eval_shape(functools.partial(model.init, part), jax.random.key(0))
                for part in (model.part, "text", "codec")}
    return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), abstract)


@functools.cache
def start(model):
    return {part: jax.jit(functools.partial(model.init, part))(jax.random.key(0))
            for part in (model.part, "text", "codec")}


@functools.partial(jax.jit, static_argnums=(0, 4))
def rows(model, params, clip, keys, train=True):
    return model.loss(params, clip, keys, train)[0]


@functools.partial(jax.jit, static_argnums=0)
def sample(model, params, observation, keys):
    return model.decode(params, model.sample(params, observation, keys))


def test_a_rows_loss_and_sample_depend_on_its_own_clip_and_key_only():
    params, clip, many = parameters(MODEL), make_clip(batch=3), keys(3, 3)
    losses = rows(MODEL, params, clip, many)
    assert losses.shape == (3,) and len(set(losses.tolist())) == 3
    turned = {name: value[::-1] for name, value in clip.items()}
    np.testing.assert_allclose(
        rows(MODEL, params, turned, many[::-1])[::-1], losses, rtol=1e-5)
    other = rows(MODEL, params, clip, many.at[0].set(jax.random.key(9)))
    assert abs(other[0] - losses[0]) > 1e-4
    np.testing.assert_allclose(other[1:], losses[1:], rtol=1e-5)
    seen = observation_of(clip)
    video = sample(MODEL, params, seen, many).astype(int)
    other = sample(MODEL, params, {name: value[::-1] for name, value in seen.items()}, many[::-1])
    assert np.abs(other[::-1].astype(int) - video).max() <= 1


def test_masked_frames_do_not_count():
    """The predictions for what counts see the noisy rest, but not at initialisation, where they do
    not depend on the input at all."""
    clip, params = make_clip(), start(MODEL)
    clip["frame_mask"][:, 2:] = False
    before = rows(MODEL, params, clip, keys(3))
    clip["video"][:, :, 2] = 255 - clip["video"][:, :, 2]
    np.testing.assert_allclose(rows(MODEL, params, clip, keys(3)), before, rtol=1e-5)
    assert (before > 0).all()
    clip["video"][:, :, 1] = 255 - clip["video"][:, :, 1]
    assert (np.abs(rows(MODEL, params, clip, keys(3)) - before) > 1e-3).all()
    clip["frame_mask"][:] = False
    np.testing.assert_array_equal(rows(MODEL, params, clip, keys(3)), 0)


def test_a_masked_view_is_not_seen():
    clip, params = make_clip(), parameters(MODEL)
    clip["view_mask"][:, 2] = False
    before = rows(MODEL, params, clip, keys(3))
    clip["video"][:, 2] = 255 - clip["video"][:, 2]
    np.testing.assert_array_equal(rows(MODEL, params, clip, keys(3)), before)


def test_latent_frames_count_when_all_their_frames_do():
    mask = np.ones((3, 9), bool)
    mask[1, 5:] = mask[2, 8:] = False
    np.testing.assert_array_equal(
        WAN.latent_mask(mask), [[True, True, True], [True, True, False], [True, True, False]])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_residual_prediction_starts_as_the_copy_of_the_last_observed_frame(sampler):
    clip = make_clip(SEES_TWO.spec)
    model = dataclasses.replace(SEES_TWO, steps=8, sampler=sampler)
    video = sample(model, start(SEES_TWO), observation_of(clip, model.spec), keys(5))
    assert video.shape == (2, 4, 24, 16, 3) and video.dtype == jnp.uint8
    np.testing.assert_array_equal(video[:, :2, :16], clip["video"][:, 0, :2])
    assert (video[:, 0] != video[:, 1]).any()
    for frame in (2, 3):
        np.testing.assert_array_equal(video[:, frame], video[:, 1])


def test_observed_latents_are_clean_at_timestep_0_and_the_rest_is_not(monkeypatch):
    """Of two observed frames both: in training, when sampling, and for features alone."""
    calls, params = [], parameters(SEES_TWO)
    clip = jax.tree.map(jnp.asarray, make_clip(SEES_TWO.spec))
    true = VideoTransformer.__call__

    def spy(self, params, latents, timestep, *rest):
        calls.append((latents, timestep))
        return true(self, params, latents, timestep, *rest)

    monkeypatch.setattr(VideoTransformer, "__call__", spy)
    observed = SEES_TWO.encode(params, clip)[:, :2]
    SEES_TWO.loss(params, clip, keys(3), train=True)
    velocity = SEES_TWO.velocity(params, observation_of(clip, SEES_TWO.spec))
    velocity(SEES_TWO.noise(keys(4)), jnp.float32(0.7))
    assert len(calls) == 2
    for latents, timestep in calls:
        assert timestep.shape == (2, 4) and (timestep[:, 2:] > 0).all()
        np.testing.assert_array_equal(timestep[:, :2], 0)
        np.testing.assert_array_equal(latents[:, :2], observed)


def test_observed_frames_are_no_target():
    """Neither their mask nor their place in the noisy latents matters to the loss."""
    params, clip = parameters(SEES_TWO), make_clip(SEES_TWO.spec)
    before = rows(SEES_TWO, params, clip, keys(3))
    clip["frame_mask"][:, :2] = False
    np.testing.assert_array_equal(rows(SEES_TWO, params, clip, keys(3)), before)
    clip["video"][:, :, 0] = 255 - clip["video"][:, :, 0]
    assert (np.abs(rows(SEES_TWO, params, clip, keys(3)) - before) > 1e-5).all()  # It is seen.


@pytest.mark.parametrize("model", [MODEL, VELOCITY], ids=["residual", "velocity"])
def test_the_error_of_the_clean_video_weighs_sigma_squared(model):
    params, clip, every = parameters(model), make_clip(batch=3), keys(3, 3)
    sigma = model.draw(params, clip, every, train=True).sigma
    data = dataclasses.replace(model, weight="data")
    np.testing.assert_allclose(rows(data, params, clip, every),
                               sigma**2 * rows(model, params, clip, every), rtol=1e-4)


@pytest.mark.parametrize("model", [SEES_TWO, WAN], ids=["pixel", "wan"])
def test_an_observation_alone_is_encoded_as_in_its_clip(model):
    params, clip = start(model), make_clip(model.spec)
    assert model.observed == 2
    whole = jax.jit(model.encode)(params, clip)
    alone = jax.jit(model.seen)(params, observation_of(clip, model.spec))
    assert whole.shape[1:] == model.latent_shape and alone.shape[1] == 2
    np.testing.assert_allclose(alone, whole[:, :2], atol=1e-5)


def test_observed_frames_fill_whole_latent_frames():
    window = dataclasses.replace(WAN.spec.window, past=4, future=5)
    with pytest.raises(ValueError, match=r"must have 4k \+ 1 frames, got 4. Nearest: 5"):
        dataclasses.replace(WAN, spec=dataclasses.replace(WAN.spec, window=window))


def test_text_is_dropped_in_training_only():
    """Dropped for every clip, it is the empty one; validation hides nothing."""
    params, clip = parameters(MODEL), make_clip()
    always, never = (dataclasses.replace(MODEL, text_dropout=share) for share in (1.0, 0.0))
    dropped = rows(always, params, clip, keys(3))
    seen = rows(never, params, clip, keys(3))
    assert (np.abs(dropped - seen) > 1e-6).all()
    np.testing.assert_array_equal(
        rows(never, params, clip | {"text": np.zeros_like(clip["text"])}, keys(3)), dropped)
    np.testing.assert_array_equal(rows(always, params, clip, keys(3), False), seen)


def test_guidance_goes_on_from_the_empty_text():
    params, seen = parameters(VELOCITY), observation_of(make_clip())
    x, sigma = VELOCITY.noise(keys(4)), jnp.float32(0.7)
    made = {scale: dataclasses.replace(VELOCITY, guidance=scale).velocity(params, seen)(x, sigma)[0]
            for scale in (1.0, 3.0)}
    empty = seen | {"text": np.zeros_like(seen["text"])}
    without = VELOCITY.velocity(params, empty)(x, sigma)[0]
    assert np.abs(made[1.0] - without).max() > 1e-4
    np.testing.assert_allclose(made[3.0], without + 3.0 * (made[1.0] - without), atol=1e-4)


def test_features_do_not_depend_on_whether_the_velocity_is_wanted():
    params, clip = parameters(MODEL), make_clip()
    draw = MODEL.draw(params, clip, keys(3), train=False)
    given = params, draw.data[:, :1], draw.noisy, draw.sigma, draw.text, (1, 0)
    velocity, features = MODEL.denoise(*given)
    nothing, alone = MODEL.denoise(*given, velocity=False)
    assert velocity.shape == draw.noisy.shape and nothing is None
    for a, b in zip(features, alone, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert np.abs(features[0] - features[1]).max() > 0.1


def test_a_codec_is_not_trained_and_embedded_texts_are_read():
    """The shape of Wan in small: latents of a VAE, text that is embedded."""
    spec = dataclasses.replace(WAN.spec, text_length=4, text_width=6)
    model = dataclasses.replace(WAN, spec=spec, text={}, text_tokens=8, sampler="unipc",
                                prediction="velocity", part="world")
    assert model.latent_shape == (3, 6, 4, 16)
    assert (model.trains, model.reads) == (("world",), ("text", "codec"))
    assert all(rule.startswith("world/") for rule, _ in model.sharding_rules)
    params, clip = parameters(model), make_clip(spec)
    loss, grads = jax.jit(jax.value_and_grad(
        lambda p: model.loss(p, clip, keys(2), train=True)[0].sum()))(params)
    assert np.isfinite(loss) and size(grads["world"]) > 0 and size(grads["codec"]) == 0
    before = rows(model, params, clip, keys(2), False)
    assert (rows(model, params, clip | {"text": -clip["text"]}, keys(2), False) != before).all()
    video = sample(model, params, observation_of(clip, spec), keys(5))
    assert video.shape == (2, 9, 48, 32, 3) and video.dtype == jnp.uint8


def test_parts_of_texts_that_are_bytes():
    assert (MODEL.trains, MODEL.reads) == (("video", "text"), ("codec",))


def test_dropped_text_is_the_embedding_of_the_empty_one(tmp_path):
    """As Wan was trained; guidance compares with it too."""
    embedded = {"": np.array([[1.0, -2.0, 0.5]]), "lift": np.ones((2, 3))}
    text_embeddings.add(tmp_path, embedded, "toy", 3, lambda texts: [embedded[t] for t in texts])
    model = dataclasses.replace(
        MODEL, spec=dataclasses.replace(SPEC, text_length=4, text_width=3), text={},
        text_dropout=1.0, text_tokens=6)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.ShapeDtypeStruct((1, 3), np.float32, sharding=place)
    loaded, _ = model.load("text", str(tmp_path), {"empty": abstract})
    np.testing.assert_array_equal(loaded["empty"], embedded[""])
    params = parameters(model) | {"text": loaded}
    empty, lift = (np.tile(text_embeddings.TextEmbeddings(tmp_path).lookup(text, 4), (2, 1, 1))
                   for text in embedded)
    clip = make_clip(model.spec)
    np.testing.assert_array_equal(
        rows(model, params, clip | {"text": lift}, keys(0)),
        rows(dataclasses.replace(model, text_dropout=0.0), params, clip | {"text": empty}, keys(0)))
    unseen = model.embed(params, model.empty(params, lift))
    assert unseen.shape == (2, 6, 3)
    np.testing.assert_array_equal(unseen, model.embed(params, empty))


def test_stored_latents_stand_in_for_the_video():
    """Loss, samples and what is shown are the same, up to the float16 of what is stored."""
    params, clip = parameters(SEES_TWO), make_clip(SEES_TWO.spec)
    extra = SEES_TWO.extras["latents"]
    assert extra.shape == (4, 6, 4, 48) and extra.parts == ("codec",)
    latents = np.asarray(extra.compute(params, clip), np.float16)
    spec = dataclasses.replace(SEES_TWO.spec, video=False, extra={"latents": extra.shape})
    model = dataclasses.replace(SEES_TWO, spec=spec)
    stored = {name: clip[name] for name in spec.arrays if name != "latents"} | {"latents": latents}
    assert "video" not in stored
    np.testing.assert_allclose(rows(model, params, stored, keys(3)),
                               rows(SEES_TWO, params, clip, keys(3)), rtol=1e-3)
    seen = observation_of(stored, spec)
    assert seen["latents"].shape[1] == 4
    np.testing.assert_allclose(model.seen(params, seen),
                               SEES_TWO.seen(params, observation_of(clip, spec)), atol=1e-3)
    shown, truth = (np.asarray(model.render(params, c)).astype(int) for c in (stored, clip))
    assert shown.shape == truth.shape == (2, 4, 24, 16, 3) and np.abs(shown - truth).max() <= 1


def test_latents_of_another_shape_are_refused():
    spec = dataclasses.replace(SPEC, extra={"latents": (3, 6, 4, 16)})
    with pytest.raises(ValueError, match=r"config.data.extra.latents=\(3, 6, 4, 16\): clips of this"
                                         r" size have latents of \(3, 6, 4, 48\)"):
        dataclasses.replace(MODEL, spec=spec)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """What diffusers' pipeline made with a tiny Wan, that model, and its weights."""
    golden = dict(np.load(GOLDEN / "pipeline.npz"))
    weights = {k.removeprefix("weights/"): x for k, x in golden.items() if "weights/" in k}
    folder = tmp_path_factory.mktemp("wan")
    streaming.write_file(folder / "model.safetensors",
                         {k: (x.shape, x.dtype) for k, x in weights.items()}, weights.get)
    (folder / "config.json").write_text(str(golden["config"]))
    spec = dataclasses.replace(
        SPEC, cameras=("agentview",), window=dataclasses.replace(SPEC.window, future=8), height=32,
        width=48, text_length=5, text_width=8)
    model = VideoModel(
        spec=spec, layout="single", codec={"name": "wan"}, prediction="velocity",
        transformer=dict(width=24, layers=2, heads=2, ffn=32, frequency_width=32, epsilon=0.01),
        timesteps="integer", sampler="unipc", steps=6, shift=5.0, guidance=3.0)
    video, _ = model.load("video", folder, None)
    return golden, model, {"video": video, "text": {"empty": golden["empty"][0]}}, folder


def imagined(golden, model, params, monkeypatch):
    """Latents from the pipeline's noise, picture and texts."""
    monkeypatch.setattr(video_model, "normal_rows", lambda keys, shape: jnp.asarray(
        golden["noise"]))
    monkeypatch.setattr(WanVAE, "decode", lambda self, params, latents: latents)
    seen = {"latents": golden["noise"][:, :1], "text": golden["text"],
            "frame_mask": np.ones((1, 1), bool)}
    return sample(model, params, seen, keys(0, 1))


def test_latents_are_those_of_the_pipeline(pipeline, monkeypatch):
    """The same weights, noise, picture, texts, steps, shift and guidance."""
    golden, model, params, _ = pipeline
    expected = golden["latents"]
    latents = imagined(golden, model, params, monkeypatch)
    assert np.linalg.norm(latents - expected) < 1e-5 * np.linalg.norm(expected)
    model = dataclasses.replace(model, timesteps="continuous")
    other = imagined(golden, model, params, monkeypatch)
    assert np.linalg.norm(other - expected) > 1e-3 * np.linalg.norm(expected)


def test_training_tells_of_sigma_as_sampling_does(pipeline, monkeypatch):
    _, model, params, _ = pipeline
    seen = []
    monkeypatch.setattr(VideoTransformer, "__call__",
                        lambda self, params, latents, timestep, *rest: (
                            seen.append(timestep), (latents, {}))[1])
    sigma = jnp.array([0.0, 0.2345, 0.9999, 1.0])
    first = jnp.zeros((4, 1, 4, 6, 16))
    for name, values in (("integer", [0, 234, 999, 999]),
                         ("continuous", [0, 234.5, 999.9, 1000])):
        made = dataclasses.replace(model, timesteps=name)
        made.denoise(params, first, jnp.zeros((4, 3, 4, 6, 16)), sigma, None)
        assert seen[-1].shape == (4, 3) and not seen[-1][:, 0].any()
        np.testing.assert_allclose(seen[-1][:, 1:], np.repeat(np.array(values)[:, None], 2, 1),
                                   rtol=1e-6)


def test_weights_that_do_not_fit_say_which_config_does(pipeline):
    """The default config is not of Wan's size: `--config.init_from.video` alone is no way."""
    folder = str(pipeline[-1])
    video = vpp.get_config().method.video.to_dict()
    model = VideoModel(spec=SPEC, layout="bimanual", **video)
    with pytest.raises(ValueError, match=r"^config.init_from.video: .* has channels 16, .* the "
                                         "model channels 48.*configs/pretrain.py:wan-1.3b"):
        model.load("video", folder, None)
    model = dataclasses.replace(MODEL, transformer={"size": "wan-7m"})
    with pytest.raises(ValueError, match="config.init_from.video: .*what fits is") as error:
        model.load("video", folder, None)
    assert "configs/" not in str(error.value)
    with pytest.raises(ValueError, match="config.init_from.codec: there are published weights of"):
        model.load("codec", folder, None)  # Pixels.


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="config.method.world.transformer.widht does not exist"):
        dataclasses.replace(MODEL, part="world", transformer={"widht": 16})
    with pytest.raises(ValueError, match="config.method.video.codec.name='wam'"):
        dataclasses.replace(MODEL, codec={"name": "wam"})
