"""Video Policy: "Video Generators are Robot Policies" (arXiv 2508.00795), on rectified flow.

A video transformer learns to go on from the observed frames; an action head denoises a chunk of
actions while it looks at the video transformer's features: video and action together, at one noise
level. Two stages (`video`, then `action` with the video transformer frozen, so that the action
loss never reaches it) or `joint`, in which it does, as in the released joint configuration. The
paper's EDM becomes rectified flow, its U-Nets transformers, its frames-as-views the unified canvas
(Vidar, arXiv 2507.12898).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxvp.config import NonNegativeInt, Share, build
from jaxvp.diffusion import flow_matching as flow
from jaxvp.diffusion.samplers import SAMPLERS
from jaxvp.errors import UserError
from jaxvp.methods.base import Stage, bernoulli_rows, normal_rows, split_keys
from jaxvp.methods.video_model import VideoMethod
from jaxvp.models.action_head import ActionHead

SEES = ("observation",)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class VideoPolicy(VideoMethod):
    """The method; see the module's docstring.

    Attributes:
      head: fields of ActionHead; what follows from the data and the video model is filled in.
      taps: blocks of the video transformer that the head sees.
      proprioception: whether the head gets the state, of all observed frames.
      state_dropout: share of clips whose state is hidden from the head in training; a head that
        always has it learns to go where such a state usually goes, and not to look.
      action_weight: what the action loss is the error of: "velocity", or "data", the clean actions,
        which counts small noise levels less, by sigma squared. The head learns what the video
        decides at large ones; at small ones it only has to keep what it is given.
    """

    head: Mapping
    taps: tuple[NonNegativeInt, ...] = (2, 4)
    proprioception: bool = True
    state_dropout: Share = 0.0
    action_weight: Literal["velocity", "data"] = "velocity"

    modes: ClassVar = ((SEES, ("action",)), (SEES, ("video",)), (SEES, ("action", "video")))

    def __post_init__(self):
        if not self.spec.action_size:
            raise UserError("config.data.action_size is 0, and the data has no actions: set it to "
                            "the dimensions of the robot that the action head is for.")
        blocks = range(self.video_model.network.layers)
        if not self.taps or len(set(self.taps)) < len(self.taps) or set(self.taps) - set(blocks):
            raise UserError(f"config.method.taps={self.taps}: expected different blocks of the "
                            f"video transformer, 0 to {blocks[-1]}, and at least one.")
        _ = self.action_head  # Wrong sizes fail here, not on the device.

    @functools.cached_property
    def action_head(self) -> ActionHead:
        states = self.spec.window.past * self.spec.state_size if self.proprioception else 0
        sizes = {**self.head, "chunk": self.spec.window.chunk,
                 "action_size": self.spec.action_size, "state_size": states,
                 "feature_width": self.video_model.network.width, "taps": len(self.taps)}
        return build(ActionHead, sizes, "config.method.head")

    @property
    def stages(self) -> dict[str, Stage]:
        video, window = self.video_model, self.spec.window
        no_actions = dataclasses.replace(window, past_actions=0, chunk=0)
        return {
            "video": Stage(trains=video.trains, reads=video.reads, window=no_actions),
            "action": Stage(trains=("action",), reads=video.trains + video.reads, window=window),
            "joint": Stage(trains=(*video.trains, "action"), reads=video.reads, window=window)}

    def init(self, part, key):
        return self.action_head.init(key) if part == "action" else super().init(part, key)

    def loss(self, params, clip, keys, stage, train):
        video_keys, action_keys = split_keys(keys, 2)
        model, metrics = self.video_model, {}
        if stage == "action":
            draw = model.draw(params, clip, video_keys, train=False)  # The head is not guided.
            _, features = jax.lax.stop_gradient(model.denoise(
                params, draw.data[:, :model.observed], draw.noisy, draw.sigma, draw.text,
                self.taps, velocity=False))
        else:
            taps = self.taps if stage == "joint" else ()
            rows, features, draw = model.loss(params, clip, video_keys, train, taps)
            metrics["video_loss"] = rows.mean()
        if stage != "video":
            metrics["action_loss"] = self.action_loss(
                params, clip, action_keys, features, draw.sigma[:, None], train)
        return sum(metrics.values()), metrics, {}

    def predict(self, params, given, keys, wanted, carry):
        video_keys, action_keys = split_keys(keys, 2)
        model = self.video_model
        if "action" not in wanted:
            latents = model.sample(params, given, video_keys)
            return {"video": model.decode(params, latents)}, carry
        velocity = model.velocity(params, given, self.taps)

        def both(x, sigma):
            out, features = velocity(x[0], sigma)
            memory = self.memory(params, features)
            return out, self.action_velocity(params, given, x[1], sigma, memory)

        start = model.noise(video_keys), self.action_noise(action_keys, 1)
        latents, actions = SAMPLERS[model.sampler](both, start, model.schedule)
        outputs = {"action": actions[:, 0]}
        if "video" in wanted:
            outputs["video"] = model.decode(params, model.keep_seen(params, given, latents))
        return outputs, carry

    # The action head, for VPP too.

    def memory(self, params: dict, features: list[jax.Array]) -> jax.Array:
        """What the head attends to, of the taps' features [B, N, D]."""
        with jax.named_scope("action"):
            return self.action_head.memory(params["action"], features, self.feature_grid)

    @property
    def feature_grid(self) -> tuple[int, int, int]:
        """Along t, h and w, of the tokens whose features the head sees."""
        return self.video_model.grid

    def action_noise(self, keys: jax.Array, draws: int) -> jax.Array:
        """Standard normal chunks, float32[B, draws, P, A]."""
        return normal_rows(keys, (draws, self.spec.window.chunk, self.spec.action_size))

    def action_velocity(self, params: dict, given: Mapping, noisy: jax.Array, sigma: jax.Array,
                        memory: jax.Array, hidden: jax.Array | bool = False) -> jax.Array:
        """Velocity of noisy chunks.

        The head predicts clean actions: what it outputs is then smooth in what it sees.

        Args:
          given: has state and state_mask, [B, past, S].
          noisy: float32[B, R, P, A], R chunks of one clip; sigma: scalar or float32[B, R].
          memory: from `memory`.
          hidden: bool[B, 1], rows whose state the head must do without.
        """
        state = (given["state"] * given["state_mask"]).reshape(len(noisy), -1)
        sigma = jnp.broadcast_to(sigma, noisy.shape[:2])
        with jax.named_scope("action"):
            clean = self.action_head(
                params["action"], noisy, sigma, memory, jnp.where(hidden, 0.0, state))
        return flow.velocity_from_data(noisy, clean, sigma)

    def action_loss(self, params: dict, clip: Mapping, keys: jax.Array,
                    features: list[jax.Array], sigma: jax.Array, train: bool) -> jax.Array:
        """Mean squared error of chunks at `sigma`, float32[B, R], weighted by `action_weight`."""
        noise_keys, state_keys = split_keys(keys, 2)
        past = self.spec.window.past_actions
        actions, mask = (clip[name][:, None, past:] for name in ("action", "action_mask"))
        noisy = flow.interpolate(actions, self.action_noise(noise_keys, sigma.shape[1]), sigma)
        hidden = bernoulli_rows(state_keys, self.state_dropout) if train else False
        velocity = self.action_velocity(
            params, clip, noisy, sigma, self.memory(params, features), hidden)
        error = velocity - flow.velocity_from_data(noisy, actions, sigma)
        if self.action_weight == "data":
            error = error * jnp.maximum(sigma, flow.FLOOR)[..., None, None]
        return flow.masked_mse(error, jnp.broadcast_to(mask, error.shape)).mean()
