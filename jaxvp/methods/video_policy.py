"""Video Policy: "Video Generators are Robot Policies" (arXiv 2508.00795), on rectified flow.

A video transformer learns to go on from the first frame; an action head denoises a chunk of
actions while it looks at the video transformer's features. Two stages (`video`, then `action`
with the video transformer frozen, so that the action loss never reaches it) or `joint`, in which
it does, as in the released joint configuration. The paper's EDM becomes rectified flow, its
U-Nets transformers, its frames-as-views the unified canvas (Vidar, arXiv 2507.12898).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from jaxvp.config import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Share, build
from jaxvp.data.clips import ClipSpec
from jaxvp.data.observation import LAYOUTS, canvas
from jaxvp.data.text_embeddings import TextEmbeddings
from jaxvp.diffusion import flow_matching as flow
from jaxvp.diffusion.samplers import SAMPLERS, TIMESTEPS, guided, sigmas
from jaxvp.errors import UserError
from jaxvp.models.action_head import ActionHead
from jaxvp.models.autoencoder import Codec, PixelCodec
from jaxvp.models.text_encoder import ByteTextEncoder
from jaxvp.models.transformer import WAN_RULES, VideoTransformer, resolve_size
from jaxvp.models.wan_vae import WanVAE
from jaxvp.weights import wan, wan_vae

CODECS = {"pixel": PixelCodec, "wan": WanVAE}


@dataclasses.dataclass(frozen=True, eq=False)  # hashable by identity: static under jit
class VideoPolicy:
    """The method; see the module's docstring.

    Attributes:
      spec: sizes of the clips; layout: a name in `observation.LAYOUTS`.
      video, text, head: sizes of VideoTransformer (or `size`, the name of one), ByteTextEncoder
        and ActionHead; what follows from the data and from each other is filled in. Clips whose
        text is embedded already need no text encoder.
      text_tokens: embedded texts are padded with zeros to so many tokens; Wan was trained on 512.
      codec: "name", in CODECS, and the options of that codec, which is never trained.
      taps: blocks of the video transformer that the head sees.
      proprioception: whether the head gets the state.
      prediction: 'velocity' (Wan), or 'residual': the network predicts how the clean video
        differs from its first frame, and the velocity follows (see flow.velocity_from_data).
      features: 'shared' denoises video and action together at one sigma (the paper);
        'noise' takes the features of a single pass at sigma 1 (VPP, arXiv 2412.14803), which
        costs one pass of the video transformer per chunk.
      sigma, shift: training distribution of noise levels, and its shift for the video; the
        sampler's schedule has the same shift. action_shift: that of the actions, where they have
        a sigma of their own, with features 'noise'.
      timesteps: how the video transformer is told of a sigma, in TIMESTEPS: 'continuous', or
        'integer', as the samplers of Wan's releases tell its weights. The same in training as in
        sampling, so that a network never sees another timestep of a sigma than it learnt from.
      text_dropout: share of clips whose text is emptied, for guidance.
      action_draws: noise levels per clip in the action loss (they share the video's features).
      state_dropout: share of clips whose state is hidden from the head in training; a head that
        always has it learns to go where such a state usually goes, and not to look.
      sampler, video_steps, action_steps, guidance: of `imagine` and `act`.
    """

    spec: ClipSpec
    layout: str
    video: Mapping
    head: Mapping
    text: Mapping = dataclasses.field(default_factory=dict)
    text_tokens: NonNegativeInt = 0
    codec: Mapping = dataclasses.field(default_factory=lambda: {"name": "pixel"})
    taps: tuple[NonNegativeInt, ...] = (2, 4)
    proprioception: bool = True
    prediction: Literal["velocity", "residual"] = "residual"
    features: Literal["shared", "noise"] = "noise"
    sigma: Literal["logit_normal", "uniform"] = "logit_normal"
    shift: PositiveFloat = 1.0
    timesteps: Literal[*TIMESTEPS] = "continuous"
    text_dropout: Share = 0.1
    action_draws: PositiveInt = 4
    action_shift: PositiveFloat = 1.0
    state_dropout: Share = 0.0
    sampler: Literal[*SAMPLERS] = "euler"
    video_steps: PositiveInt = 10
    action_steps: PositiveInt = 10
    guidance: NonNegativeFloat = 1.0

    stages = ("video", "action", "joint")
    policy_stages = ("action", "joint")
    sharding_rules = tuple((f"video/{regex}", spec) for regex, spec in WAN_RULES)

    def __post_init__(self):
        if not self.spec.action_size:
            raise UserError("config.data.action_size is 0, and the data has no actions: set it to "
                            "the dimensions of the robot that the action head is for.")
        blocks = range(self.transformer.layers)
        if not self.taps or len(set(self.taps)) < len(self.taps) or set(self.taps) - set(blocks):
            raise UserError(f"config.method.taps={self.taps}: expected different blocks of the "
                            f"video transformer, 0 to {blocks[-1]}, and at least one.")
        _ = self.grid, self.action_head  # wrong sizes fail here, not on the device
        if (stored := tuple(self.spec.latents)) not in ((), self.latent_shape):
            raise UserError(f"config.data.latents={stored}: clips of this size have "
                            f"latents of {self.latent_shape}")

    # Parts.

    @functools.cached_property
    def video_codec(self) -> Codec:
        options = dict(self.codec)
        name = options.pop("name", None)
        if name not in CODECS:
            raise UserError(f"config.method.codec.name={name!r}: expected one of {tuple(CODECS)}")
        return build(CODECS[name], options, "config.method.codec")

    @functools.cached_property
    def latent_shape(self) -> tuple[int, int, int, int]:
        s = self.spec
        size = (1, len(s.cameras), s.num_frames, s.height, s.width, 3)
        frame = jax.eval_shape(self._canvas, jax.ShapeDtypeStruct(size, jnp.uint8),
                               jax.ShapeDtypeStruct(size[:2], bool))
        return self.video_codec.latent_shape(*frame.shape[1:4])

    @functools.cached_property
    def grid(self) -> tuple[int, int, int]:
        return self.transformer.tokens(*self.latent_shape[:3])

    @functools.cached_property
    def text_encoder(self) -> ByteTextEncoder:
        return build(ByteTextEncoder, {**self.text, "length": self.spec.text_length},
                     "config.method.text")

    @functools.cached_property
    def transformer(self) -> VideoTransformer:
        sizes = {**resolve_size(self.video), "channels": self.video_codec.channels,
                 "text_width": self.spec.text_width or self.text_encoder.width}
        return build(VideoTransformer, sizes, "config.method.video")

    @functools.cached_property
    def action_head(self) -> ActionHead:
        sizes = {**self.head, "chunk": self.spec.chunk, "action_size": self.spec.action_size,
                 "state_size": self.spec.state_size if self.proprioception else 0,
                 "feature_width": self.transformer.width, "taps": len(self.taps)}
        return build(ActionHead, sizes, "config.method.head")

    # The Method interface.

    def init(self, key: jax.Array) -> dict:
        text, video, action = jax.random.split(key, 3)
        # Of embedded texts, only that of the empty one, which guidance and dropped texts need.
        params = {"video": self.transformer.init(video), "action": self.action_head.init(action),
                  "text": {"empty": jnp.zeros((1, self.spec.text_width))} if self.spec.text_width
                  else self.text_encoder.init(text),
                  "codec": self.video_codec.init(jax.random.fold_in(key, 3))}
        return {part: values for part, values in params.items() if values}

    def frozen(self, stage: str) -> tuple[str, ...]:
        if stage not in self.stages:
            raise UserError(f"config.stage={stage!r}: video_policy has stages {self.stages}")
        frozen = {"video": {"action"}, "action": {"video", "text"}, "joint": set()}[stage]
        frozen |= {"codec", "text"} if self.spec.text_width else {"codec"}
        parts = jax.eval_shape(self.init, jax.random.key(0))
        return tuple(f"{part}/.*" for part in sorted(parts) if part in frozen)

    def load(self, part, path, abstract):
        if part == "video":
            try:
                return wan.load(path, self.transformer, abstract)
            except UserError as error:
                hint = "" if "size" in self.video else (
                    " The video transformers of configs/pretrain.py:wan-1.3b, :wan-5b and :wan-14b "
                    "have the sizes of Wan's weights; config.method.video has others.")
                raise UserError(f"config.pretrained.video: {error}{hint}") from error
        if part == "codec" and isinstance(self.video_codec, WanVAE):
            return wan_vae.load(path, self.video_codec, abstract)
        if part == "text" and self.spec.text_width:
            leaf = abstract["empty"]
            empty = TextEmbeddings(path).lookup("", len(leaf)).astype(leaf.dtype)
            return {"empty": jax.make_array_from_callback(
                leaf.shape, leaf.sharding, empty.__getitem__)}, "the empty text"
        raise UserError(f"config.pretrained.{part}: there are weights of 'video', of 'codec' "
                        "where that is 'wan', and of 'text' (the folder of text embeddings) where "
                        "texts are embedded.")

    def loss(self, params, clip, keys, stage):
        noise_keys, sigma_keys, text_keys, action_keys = _split(keys, 4)
        data = self._encode(params, clip)
        batch = data.shape[0]
        noise = _rows(noise_keys, data.shape[1:])
        if stage == "action" and self.features == "noise":
            sigma = jnp.ones(batch)
        else:
            sigma = self._sigma(sigma_keys, (), self.shift)
        text = clip["text"]
        if stage != "action":
            dropped = _drop(text_keys, self.text_dropout)
            text = jnp.where(dropped.reshape(batch, *[1] * (text.ndim - 1)),
                             self._empty(params, text), text)
        text = self._text(params, text)

        noisy = flow.interpolate(data, noise, sigma)
        prediction, features = self._video(
            params, data[:, :1], noisy, sigma, text, velocity=stage != "action")
        if stage == "action":
            features = jax.lax.stop_gradient(features)
        loss, metrics = 0.0, {}
        if stage != "action":
            # In units of velocity, whatever the network predicts.
            error = prediction - (noise - data)
            if self.prediction == "residual":
                error = flow.velocity_from_data(data, self._clean(data, prediction), sigma)
            mask = self._latent_mask(clip["frame_mask"]).at[:, 0].set(False)
            metrics["video_loss"] = flow.masked_mse(error, mask).mean()
            loss = loss + metrics["video_loss"]
        if stage != "video":
            if stage == "joint" and self.features == "noise":
                noisy, sigma = noise, jnp.ones(batch)
                _, features = self._video(params, data[:, :1], noisy, sigma, text, velocity=False)
            metrics["action_loss"] = self._action_loss(params, clip, action_keys, sigma, features)
            loss = loss + metrics["action_loss"]
        return loss, metrics

    def shown(self, params, clip):
        if "latents" in clip:
            return self.video_codec.decode(params.get("codec", {}), self._encode(params, clip))
        return self._canvas(clip["video"], clip["view_mask"])

    def encode(self, params, clip):
        """Latents, float32[B, t, h, w, c], of a clip's or an observation's video."""
        video = self._canvas(clip["video"], clip["view_mask"])
        return jax.lax.stop_gradient(self.video_codec.encode(params.get("codec", {}), video))

    def imagine(self, params, observation, keys):
        first, text, empty = self._observe(params, observation)
        t, h, w, c = self.latent_shape
        noise = _rows(keys, (t, h, w, c))

        def velocity(x, sigma):
            return self._guided_velocity(params, first, x, sigma, text, empty)[0]

        schedule = sigmas(self.video_steps, self.shift)
        latents = SAMPLERS[self.sampler](velocity, noise, schedule)
        return self.video_codec.decode(params.get("codec", {}), latents.at[:, :1].set(first))

    def act(self, params, observation, keys):
        first, text, empty = self._observe(params, observation)
        video_keys, action_keys = _split(keys, 2)
        video = _rows(video_keys, self.latent_shape)
        actions = _rows(action_keys, (1, self.spec.chunk, self.spec.action_size))
        state = observation["state"] * observation["state_mask"]

        def head(actions, sigma, memory):
            return self._action_velocity(
                params, actions, jnp.full(actions.shape[:2], sigma), memory, state)

        solve = SAMPLERS[self.sampler]
        if self.features == "noise":
            schedule = sigmas(self.action_steps, self.action_shift)
            level = jnp.ones(len(video))
            _, features = self._video(params, first, video, level, text, velocity=False)
            memory = self._memory(params, features)
            return solve(lambda x, sigma: head(x, sigma, memory), actions, schedule)[:, 0]

        def velocity(x, sigma):
            v, features = self._guided_velocity(params, first, x[0], sigma, text, empty)
            return v, head(x[1], sigma, self._memory(params, features))

        schedule = sigmas(self.action_steps, self.shift)
        return solve(velocity, (video, actions), schedule)[1][:, 0]

    # Inside.

    def _sigma(self, keys, shape, shift):
        return jax.vmap(lambda key: flow.sample_sigma(key, shape, self.sigma, shift))(keys)

    def _canvas(self, video, view_mask):
        return canvas(video, view_mask, LAYOUTS[self.layout])

    def _encode(self, params, clip):
        stored = clip.get("latents")
        return self.encode(params, clip) if stored is None else stored.astype(jnp.float32)

    def _text(self, params, text):
        if self.spec.text_width:
            missing = max(0, self.text_tokens - self.spec.text_length)
            return jnp.pad(text.astype(jnp.float32), ((0, 0), (0, missing), (0, 0)))
        return self.text_encoder(params["text"], text)

    def _empty(self, params, text):
        """The empty text in the form of `text`, tokens or embeddings."""
        if not self.spec.text_width:
            return jnp.zeros_like(text)
        empty = params["text"]["empty"].astype(text.dtype)
        return jnp.broadcast_to(
            jnp.pad(empty, ((0, text.shape[1] - len(empty)), (0, 0))), text.shape)

    def _latent_mask(self, frame_mask):
        """bool[B, T] of frames -> bool[B, t] of latent frames, of which each frame must count."""
        first, t = self.video_codec.first_frames, self.latent_shape[0]
        if t == frame_mask.shape[1]:
            return frame_mask
        rest = frame_mask[:, first:].reshape(len(frame_mask), t - 1, -1)
        return jnp.concatenate([frame_mask[:, :first].all(1, keepdims=True), rest.all(2)], axis=1)

    def _observe(self, params, observation):
        first = self._encode(params, observation)
        text = self._text(params, observation["text"])
        empty = self._text(params, self._empty(params, observation["text"]))
        return first, text, empty

    def _video(self, params, first, noisy, sigma, text, velocity=True):
        """Network output and tapped features; the first frame is clean, at timestep 0 (TI2V)."""
        noisy = jnp.concatenate([first, noisy[:, 1:]], axis=1)
        timestep = TIMESTEPS[self.timesteps](sigma)[:, None]
        timestep = jnp.repeat(timestep, noisy.shape[1], axis=1).at[:, 0].set(0.0)
        out, features = self.transformer(
            params["video"], noisy, timestep, text, self.taps, velocity)
        return out, [features[tap] for tap in self.taps]

    def _clean(self, data, prediction):
        return data[:, :1] + prediction

    def _guided_velocity(self, params, first, x, sigma, text, empty):
        """Velocity of the video and the features of the pass that saw the text."""
        level = jnp.full(len(x), sigma)
        out, features = self._video(params, first, x, level, text)
        if self.guidance != 1.0:
            out = guided(out, self._video(params, first, x, level, empty)[0], self.guidance)
        if self.prediction == "residual":
            out = flow.velocity_from_data(x, self._clean(first, out), level)
        return out, features

    def _memory(self, params, features):
        return self.action_head.memory(params["action"], features, self.grid)

    def _action_velocity(self, params, noisy, sigma, memory, state):
        """The head predicts clean actions: what it outputs is then smooth in what it sees."""
        clean = self.action_head(params["action"], noisy, sigma, memory, state)
        return flow.velocity_from_data(noisy, clean, sigma)

    def _action_loss(self, params, clip, keys, sigma, features):
        draws = 1 if self.features == "shared" else self.action_draws
        noise_keys, sigma_keys, state_keys = _split(keys, 3)
        actions = clip["action"][:, None]
        noise = _rows(noise_keys, (draws, *actions.shape[2:]))
        if self.features == "shared":
            sigma = sigma[:, None]
        else:
            sigma = self._sigma(sigma_keys, (draws,), self.action_shift)
        noisy = flow.interpolate(actions, noise, sigma)
        state = clip["state"] * clip["state_mask"]
        state = jnp.where(_drop(state_keys, self.state_dropout), 0.0, state)
        memory = self._memory(params, features)
        velocity = self._action_velocity(params, noisy, sigma, memory, state)
        mask = jnp.broadcast_to(clip["action_mask"][:, None], velocity.shape)
        error = velocity - flow.velocity_from_data(noisy, actions, sigma)
        return flow.masked_mse(error, mask).mean()


def _split(keys: jax.Array, number: int) -> jax.Array:
    """Keys [number, B] from one key a row."""
    return jax.vmap(lambda key: jax.random.split(key, number), out_axes=1)(keys)


def _drop(keys: jax.Array, rate: float) -> jax.Array:
    """bool[B, 1]: which rows to hide something of."""
    return jax.vmap(lambda key: jax.random.bernoulli(key, rate, (1,)))(keys)


def _rows(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise [B, *shape], each row from its own key."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
