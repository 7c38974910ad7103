"""Vidar: "Embodied video diffusion" and a masked inverse dynamics model (arXiv 2507.12898).

A video model of the unified canvas goes on from what is observed; it knows no actions. A model of
inverse dynamics reads the action that led to it off each picture, alone. A policy is one after the
other: it imagines a video, and does what it sees there. Stages: `video`, on the mixture and then on
the target robot, and `inverse_dynamics`, on the target robot's data alone. UniPi (arXiv 2302.00111)
is the same with `inverse.kind` "resnet".

Actions are absolute positions, so that one picture tells them. Those between two frames lie on the
line between theirs.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxvp.config import NonNegativeFloat, NonNegativeInt, PositiveFloat, build
from jaxvp.diffusion.flow_matching import masked_mse
from jaxvp.errors import UserError
from jaxvp.methods.base import Stage
from jaxvp.methods.video_model import VideoMethod
from jaxvp.models.inverse_dynamics import InverseDynamics, huber

SEES = ("observation",)
PART = "inverse_dynamics"


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Vidar(VideoMethod):
    """The method; see the module's docstring.

    Attributes:
      inverse: fields of InverseDynamics.
      mask_weight: lambda, of the soft mask's mean in the loss.
      huber_delta: where the loss of actions becomes linear.
      picture_size: H = W of what the inverse dynamics model sees, 518 in the paper; 0: the canvas
        as it is.
    """

    inverse: Mapping = dataclasses.field(default_factory=dict)
    mask_weight: NonNegativeFloat = 3e-3
    huber_delta: PositiveFloat = 1.0
    picture_size: NonNegativeInt = 0

    modes: ClassVar = ((SEES, ("action",)), (SEES, ("video",)), (SEES, ("action", "video")))

    def __post_init__(self):
        window = self.spec.window
        if not self.spec.action_size:
            raise UserError("config.data.action_size is 0, and the data has no actions: set it to "
                            "the dimensions of the robot that is to act.")
        if not window.past_actions or not window.future:
            raise UserError(
                f"config.data.window.past_actions is {window.past_actions}, future "
                f"{window.future}: expected at least 1 each, since the model of inverse dynamics "
                "learns the action before each picture, and a policy does what it imagines.")
        _ = self.video_model, self.inverse_dynamics  # Wrong sizes fail here, not on the device.

    @functools.cached_property
    def inverse_dynamics(self) -> InverseDynamics:
        return build(InverseDynamics, {**self.inverse, "outputs": self.spec.action_size},
                     "config.method.inverse")

    @property
    def stages(self) -> dict[str, Stage]:
        video, window = self.video_model, self.spec.window
        alone = dataclasses.replace(window, past_actions=0, chunk=0)
        now = dataclasses.replace(window, past=1, future=0, past_actions=1, chunk=0)
        return {"video": Stage(trains=video.trains, reads=video.reads, window=alone),
                PART: Stage(trains=(PART,), reads=() if self.spec.video else ("codec",),
                            window=now)}

    def init(self, part, key):
        return self.inverse_dynamics.init(key) if part == PART else super().init(part, key)

    def loss(self, params, clip, keys, stage, train):
        if stage == "video":
            loss = self.video_model.loss(params, clip, keys, train)[0].mean()
            return loss, {"video_loss": loss}, {}
        actions, soft, new = self.inverse_dynamics(
            params[PART], self.pictures(self.render(params, clip)[:, 0]), train)
        target, mask = clip["action"][:, -1], clip["action_mask"][:, -1]
        error = actions - target
        loss = masked_mean(huber(error, self.huber_delta), mask).mean()
        metrics = {"action_loss": loss, "action_error": masked_mse(error, mask).mean()}
        if soft is not None:
            # 0 or 1: the mask has collapsed, and the weight of its mean is too large or too small.
            metrics["mask_share"] = (soft >= self.inverse_dynamics.threshold).mean()
            loss = loss + self.mask_weight * soft.mean()
        return loss, metrics, {PART: new} if train else {}

    def predict(self, params, given, keys, wanted, carry):
        model = self.video_model
        video, outputs = model.decode(params, model.sample(params, given, keys)), {}
        if "action" in wanted:
            outputs["action"] = self.read(params, video[:, self.spec.window.past - 1:])
        if "video" in wanted:
            outputs["video"] = video
        return outputs, carry

    def read(self, params: dict, video: jax.Array) -> jax.Array:
        """The chunk of actions, float32[B, P, A], that leads through uint8[B, 1 + future, H', W',
        3], the canvas of now and later, whose last frame is at the end of the chunk."""
        frames = video.shape[1]
        pictures = self.pictures(video.reshape(-1, *video.shape[2:]))
        actions = self.inverse_dynamics(params[PART], pictures, train=False)[0]
        return jnp.einsum("pf,bfa->bpa", between(frames, self.spec.window.chunk),
                          actions.reshape(len(video), frames, -1))

    def pictures(self, canvas: jax.Array) -> jax.Array:
        """uint8[B, H', W', 3] -> uint8[B, H, W, 3] of `picture_size`, its aspect not kept."""
        if not self.picture_size:
            return canvas
        shape = (len(canvas), self.picture_size, self.picture_size, 3)
        resized = jax.image.resize(canvas.astype(jnp.float32), shape, "linear")
        return jnp.clip(jnp.round(resized), 0, 255).astype(jnp.uint8)


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """float32[B]: the mean of each row [B, A] where it counts, 0 where nothing does."""
    return (values * mask).sum(-1) / jnp.maximum(mask.sum(-1), 1)


def between(frames: int, chunk: int) -> np.ndarray:
    """float32[P, F], how much of the action of each of F frames is in each of P actions: that of a
    frame is the one before it, so the last action is the last frame's."""
    place = np.arange(1, chunk + 1) * (frames - 1) / chunk
    return np.maximum(0, 1 - np.abs(place[:, None] - np.arange(frames))).astype(np.float32)
