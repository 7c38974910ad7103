"""The video generator that methods share: codec, text, transformer and rectified flow.

It goes on from the observed frames: their latents stay clean, at timestep 0, and attend to nothing
but what a clip shows (Wan 2.2 TI2V; the canvas is Vidar's, arXiv 2507.12898).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxvp.config import NonNegativeFloat, PositiveFloat, PositiveInt, Share, build
from jaxvp.diffusion import flow_matching as flow
from jaxvp.diffusion.samplers import SAMPLERS, TIMESTEPS, guided, sigmas
from jaxvp.errors import UserError
from jaxvp.methods import base
from jaxvp.methods.base import bernoulli_rows, normal_rows, split_keys
from jaxvp.methods.latent_space import LatentSpace
from jaxvp.models.transformer import WAN_RULES, VideoTransformer, resolve_size
from jaxvp.weights import wan


class Draw(NamedTuple):
    """A batch of clips on its way between data and noise.

    Attributes:
      data, noise: latents float32[B, t, h, w, c]; noisy: between them, at `sigma` float32[B].
      text: float32[B, M, D], of which some rows are the empty text in training.
    """

    data: jax.Array
    noise: jax.Array
    noisy: jax.Array
    sigma: jax.Array
    text: jax.Array


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class VideoModel(LatentSpace):
    """Sizes and objective; parameters are {`part`: the transformer, "text", "codec"}.

    Attributes:
      part: name of the transformer's parameters. Several video models of a method share text and
        codec.
      transformer: fields of VideoTransformer, or `size`, the name of one.
      prediction: 'velocity' (Wan), or 'residual': the network predicts how the clean video differs
        from the last observed frame, and the velocity follows (see flow.velocity_from_data).
      sigma, shift: training distribution of noise levels and its shift, which is the sampler's too.
      weight: what the loss is the error of: "velocity", or "data", the clean video, which counts
        small noise levels less, by sigma squared: for few steps of the sampler, what the network
        makes of large ones is what is seen.
      timesteps: how the transformer is told of a sigma, in TIMESTEPS: 'continuous', or 'integer',
        as the samplers of Wan's releases tell its weights. The same in training as in sampling, so
        that a network never sees another timestep of a sigma than it learnt from.
      text_dropout: share of clips whose text is emptied in training, for guidance.
      sampler, steps, guidance: of `sample`.
    """

    transformer: Mapping
    prediction: Literal["velocity", "residual"] = "residual"
    sigma: Literal["logit_normal", "uniform"] = "logit_normal"
    shift: PositiveFloat = 1.0
    weight: Literal["velocity", "data"] = "velocity"
    timesteps: Literal[*TIMESTEPS] = "continuous"
    text_dropout: Share = 0.1
    sampler: Literal[*SAMPLERS] = "euler"
    steps: PositiveInt = 10
    guidance: NonNegativeFloat = 1.0

    def __post_init__(self):
        super().__post_init__()
        _ = self.grid  # Wrong sizes fail here, not on the device.

    # Parts.

    @functools.cached_property
    def network(self) -> VideoTransformer:
        sizes = {**resolve_size(self.transformer), "channels": self.video_codec.channels,
                 "text_width": self.spec.text_width or self.text_encoder.width}
        return build(VideoTransformer, sizes, f"config.method.{self.part}.transformer")

    @functools.cached_property
    def grid(self) -> tuple[int, int, int]:
        """Tokens of a clip along t, h and w."""
        return self.network.tokens(*self.latent_shape[:3])

    # What a method hands on.

    @property
    def trains(self) -> tuple[str, ...]:
        """Parts that video trains; of embedded texts, only the empty one is kept, as it is."""
        return (self.part,) if self.spec.text_width else (self.part, "text")

    @property
    def reads(self) -> tuple[str, ...]:
        """Parts that it needs in addition."""
        return ("text", "codec") if self.spec.text_width else ("codec",)

    @property
    def sharding_rules(self) -> tuple:
        return tuple((f"{self.part}/{regex}", spec) for regex, spec in WAN_RULES)

    def init(self, part: str, key: jax.Array) -> dict:
        return self.network.init(key) if part == self.part else super().init(part, key)

    def load(self, part: str, path: str, abstract: dict) -> tuple[dict, object]:
        """Wan's transformer, and what a LatentSpace has; see `Method.load`."""
        if part != self.part:
            return super().load(part, path, abstract)
        try:
            return wan.load(path, self.network, abstract)
        except UserError as error:
            hint = "" if "size" in self.transformer else (
                " The video transformers of configs/pretrain.py:wan-1.3b, :wan-5b and :wan-14b "
                f"have the sizes of Wan's weights; config.method.{self.part}.transformer has "
                "others.")
            raise UserError(f"config.init_from.{part}: {error}{hint}") from error

    # Training.

    def noise(self, keys: jax.Array) -> jax.Array:
        """Standard normal latents, float32[B, t, h, w, c]."""
        return normal_rows(keys, self.latent_shape)

    def draw(self, params: dict, clip: Mapping, keys: jax.Array, train: bool) -> Draw:
        """Clips at random noise levels."""
        noise_keys, sigma_keys, text_keys = split_keys(keys, 3)
        data, noise, text = self.encode(params, clip), self.noise(noise_keys), clip["text"]
        sigma = jax.vmap(lambda key: flow.sample_sigma(key, (), self.sigma, self.shift))(sigma_keys)
        if train:
            dropped = bernoulli_rows(text_keys, self.text_dropout)
            dropped = dropped.reshape(len(data), *[1] * (text.ndim - 1))
            text = jnp.where(dropped, self.empty(params, text), text)
        return Draw(data, noise, flow.interpolate(data, noise, sigma), sigma,
                    self.embed(params, text))

    def denoise(self, params: dict, seen: jax.Array, noisy: jax.Array, sigma: jax.Array,
                text: jax.Array, taps: tuple[int, ...] = (), velocity: bool = True
                ) -> tuple[jax.Array | None, list[jax.Array]]:
        """What the network makes of noisy latents.

        Args:
          params: has `part`.
          seen: float32[B, o, h, w, c], the observed latents, which replace the first ones.
          noisy: float32[B, t, h, w, c]; sigma: float32[B].
          text: from `embed`.
          taps: blocks whose output is wanted.
          velocity: False: only the features are wanted.

        Returns:
          Velocity, float32[B, t, h, w, c], or None; and [B, N, D] of each tap.
        """
        noisy = jnp.concatenate([seen, noisy[:, seen.shape[1]:]], axis=1)
        timestep = TIMESTEPS[self.timesteps](sigma)[:, None]
        timestep = jnp.repeat(timestep, noisy.shape[1], axis=1).at[:, :seen.shape[1]].set(0.0)
        with jax.named_scope(self.part):
            out, features = self.network(
                params[self.part], noisy, timestep, text, taps, velocity)
        if velocity and self.prediction == "residual":
            out = flow.velocity_from_data(noisy, seen[:, -1:] + out, sigma)
        return out, [features[tap] for tap in taps]

    def loss(self, params: dict, clip: Mapping, keys: jax.Array, train: bool,
             taps: tuple[int, ...] = ()) -> tuple[jax.Array, list[jax.Array], Draw]:
        """Mean squared error of the velocity of what is not observed (SD3, arXiv 2403.03206),
        weighted by `weight`.

        Returns:
          float32[B], a clip's error, 0 where none of its frames counts; features of the taps; and
          the draw that they are of.
        """
        draw = self.draw(params, clip, keys, train)
        seen = draw.data[:, :self.observed]
        out, features = self.denoise(params, seen, draw.noisy, draw.sigma, draw.text, taps)
        target = draw.noise - draw.data
        if self.prediction == "residual":  # With the same floor on sigma as the prediction.
            target = flow.velocity_from_data(draw.noisy, draw.data, draw.sigma)
        mask = self.latent_mask(clip["frame_mask"]).at[:, :self.observed].set(False)
        error = out - target
        if self.weight == "data":
            error = error * jnp.maximum(draw.sigma, flow.FLOOR)[:, None, None, None, None]
        return flow.masked_mse(error, mask), features, draw

    # Generation.

    def velocity(self, params: dict, given: Mapping, taps: tuple[int, ...] = ()):
        """The function (latents, sigma scalar) -> (guided velocity, features of the taps) that
        goes on from an observation; `guided` by the empty text (arXiv 2207.12598)."""
        seen = self.seen(params, given)
        text = self.embed(params, given["text"])
        empty = self.embed(params, self.empty(params, given["text"]))

        def velocity(x, sigma):
            level = jnp.full(len(x), sigma)
            out, features = self.denoise(params, seen, x, level, text, taps)
            if self.guidance != 1.0:
                without = self.denoise(params, seen, x, level, empty)[0]
                out = guided(out, without, self.guidance)
            return out, features

        return velocity

    def sample(self, params: dict, given: Mapping, keys: jax.Array) -> jax.Array:
        """Latents float32[B, t, h, w, c] that go on from an observation."""
        velocity = self.velocity(params, given)
        latents = SAMPLERS[self.sampler](
            lambda x, sigma: velocity(x, sigma)[0], self.noise(keys), self.schedule)
        return self.keep_seen(params, given, latents)

    @property
    def schedule(self):
        """Noise levels of `sample`, float32[steps + 1]."""
        return sigmas(self.steps, self.shift)

    def keep_seen(self, params: dict, given: Mapping, latents: jax.Array) -> jax.Array:
        """`latents` with the observed ones in place of what was made of them."""
        return latents.at[:, :self.observed].set(self.seen(params, given))


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class VideoMethod(base.Method):
    """A method with one video model, and with parts of its own.

    Attributes:
      video: fields of VideoModel.
    """

    video: Mapping

    @functools.cached_property
    def video_model(self) -> VideoModel:
        return build(VideoModel, {**self.video, "spec": self.spec, "layout": self.layout},
                     "config.method.video")

    @functools.cached_property
    def video_models(self) -> dict[str, VideoModel]:
        return {"video": self.video_model}

    @property
    def extras(self):
        return self.video_model.extras

    @property
    def sharding_rules(self) -> tuple:
        return self.video_model.sharding_rules

    def init(self, part, key):
        return self.video_model.init(part, key)

    def load(self, part, path, abstract):
        model = self.video_model
        if part not in model.trains + model.reads:
            return super().load(part, path, abstract)
        return model.load(part, path, abstract)

    def render(self, params, clip):
        return self.video_model.render(params, clip)
