"""Inverse dynamics: what a robot does, read off one picture of it.

The masked inverse dynamics model of Vidar (arXiv 2507.12898, section 3.2): a U-Net chooses the
pixels that matter, a ResNet reads the actions off what is left. Sizes are those of the published
code: 92.7 M parameters in all, for pictures of 518 x 518 pixels, normalised by ImageNet's mean and
standard deviation, so that what is masked has the mean colour. Parameters are plain nested dicts;
batch statistics are as `models.batch_norm` says.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxvp.config import PositiveInt, Share
from jaxvp.errors import UserError
from jaxvp.models import batch_norm

# Of RGB in [0, 1], ImageNet's.
MEAN, DEVIATION = (np.array(x, np.float32) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def normalized(video: jax.Array) -> jax.Array:
    """uint8[..., 3] -> float32, with ImageNet's mean 0 and deviation 1."""
    return (video.astype(jnp.float32) / 255.0 - MEAN) / DEVIATION


@dataclasses.dataclass(frozen=True)
class UNet:
    """Pictures to `outputs` numbers a pixel (arXiv 1505.04597, with batch normalisation).

    Attributes:
      outputs: channels of the output.
      width: channels at full size; they double with every stage but the last.
      stages: how often the size is halved.
    """

    outputs: PositiveInt = 1
    width: PositiveInt = 64
    stages: PositiveInt = 5

    @property
    def widths(self) -> list[int]:
        """Channels at full size, at half of it, and so on."""
        return [self.width * 2 ** min(i, self.stages - 1) for i in range(self.stages + 1)]

    def init(self, key: jax.Array) -> dict:
        keys = iter(jax.random.split(key, 2 * self.stages + 2))
        widths = self.widths
        params = {"down_0": _double_init(next(keys), 3, widths[0], widths[0])}
        for i in range(self.stages):
            params[f"down_{i + 1}"] = _double_init(
                next(keys), widths[i], widths[i + 1], widths[i + 1])
        below = widths[-1]
        for i in reversed(range(self.stages)):
            both, out = below + widths[i], max(self.width, widths[i] // 2)
            params[f"up_{i}"], below = _double_init(next(keys), both, both // 2, out), out
        return params | {"out": {"kernel": _kernel(next(keys), 1, below, self.outputs),
                                 "bias": jnp.zeros(self.outputs)}}

    def __call__(self, params: dict, x: jax.Array, train: bool) -> tuple[jax.Array, dict]:
        """float32[B, H, W, 3] -> float32[B, H, W, outputs] and new statistics.

        Raises:
          UserError: the sides are too small to be halved so often.
        """
        if min(x.shape[1:3]) < 2**self.stages:
            raise UserError(f"The U-Net halves pictures {self.stages} times: both sides must be at "
                            f"least {2**self.stages} pixels, found {x.shape[1]} x {x.shape[2]}.")
        new, skips = {}, []
        for i in range(self.stages + 1):
            name = f"down_{i}"
            x, new[name] = _double(params[name], _pool(x, 2, 2) if i else x, train)
            skips.append(x)
        skips.pop()
        for i in reversed(range(self.stages)):
            skip, name = skips.pop(), f"up_{i}"
            x = jax.image.resize(x, (*skip.shape[:3], x.shape[3]), "linear")
            x, new[name] = _double(params[name], jnp.concatenate([skip, x], axis=-1), train)
        return _conv(x, params["out"]["kernel"]) + params["out"]["bias"], new


@dataclasses.dataclass(frozen=True)
class ResNet:
    """Pictures to numbers (arXiv 1512.03385); the default is ResNet-50.

    As in the published code of Vidar, no ReLU follows the first normalisation of a block.

    Attributes:
      outputs: numbers of a picture.
      blocks: bottleneck blocks of each stage, which halves the size.
      width: of the first stage, doubled by every other; a block's output is four times as wide.
    """

    outputs: PositiveInt
    blocks: tuple[PositiveInt, ...] = (3, 4, 6, 3)
    width: PositiveInt = 64

    def _block_widths(self) -> list[tuple[str, int, int, int]]:
        """(name, channels in, width, stride) of every block."""
        found, channels = [], self.width
        for stage, count in enumerate(self.blocks):
            width = self.width * 2**stage
            for i in range(count):
                found.append((f"block_{stage}_{i}", channels, width, 2 if stage and not i else 1))
                channels = 4 * width
        return found

    def init(self, key: jax.Array) -> dict:
        blocks = self._block_widths()
        keys = iter(jax.random.split(key, 4 * len(blocks) + 2))
        params = {"stem": _unit_init(next(keys), 7, 3, self.width)}
        for name, channels, width, _ in blocks:
            params[name] = {"conv_1": _unit_init(next(keys), 1, channels, width),
                            "conv_2": _unit_init(next(keys), 3, width, width),
                            "conv_3": _unit_init(next(keys), 1, width, 4 * width)}
            if name.endswith("_0"):
                params[name]["skip"] = _unit_init(next(keys), 1, channels, 4 * width)
        last = 4 * blocks[-1][2]
        kernel = jax.random.normal(next(keys), (last, self.outputs)) / np.sqrt(last)
        return params | {"head": {"kernel": kernel, "bias": jnp.zeros(self.outputs)}}

    def __call__(self, params: dict, x: jax.Array, train: bool) -> tuple[jax.Array, dict]:
        """float32[B, H, W, 3] -> float32[B, outputs] and new statistics."""
        new = {}
        x, new["stem"] = _unit(params["stem"], x, train, stride=2)
        x = _pool(x, 3, 2)
        for name, _, _, stride in self._block_widths():
            block, found, skip = params[name], {}, x
            y, found["conv_1"] = _unit(block["conv_1"], x, train, relu=False)
            y, found["conv_2"] = _unit(block["conv_2"], y, train, stride=stride)
            y, found["conv_3"] = _unit(block["conv_3"], y, train, relu=False)
            if "skip" in block:
                skip, found["skip"] = _unit(block["skip"], x, train, stride=stride, relu=False)
            x, new[name] = jax.nn.relu(y + skip), found
        return x.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"], new


@dataclasses.dataclass(frozen=True)
class InverseDynamics:
    """Pictures of a robot to its actions, masked or not.

    Attributes:
      outputs: dimensions of an action.
      kind: what the ResNet sees: "masked", the U-Net's mask of the picture (MIDM); "resnet", the
        picture; "unet", three channels that the U-Net makes of it, through tanh, an ablation.
      threshold: of the mask, which is 0 or 1; its gradient is that of the soft mask.
      unet_width, unet_stages: see `UNet`; blocks, resnet_width: see `ResNet`.
    """

    outputs: PositiveInt
    kind: Literal["masked", "resnet", "unet"] = "masked"
    threshold: Share = 0.5
    unet_width: PositiveInt = 64
    unet_stages: PositiveInt = 5
    blocks: tuple[PositiveInt, ...] = (3, 4, 6, 3)
    resnet_width: PositiveInt = 64

    @property
    def unet(self) -> UNet:
        return UNet(1 if self.kind == "masked" else 3, self.unet_width, self.unet_stages)

    @property
    def resnet(self) -> ResNet:
        return ResNet(self.outputs, tuple(self.blocks), self.resnet_width)

    def init(self, key: jax.Array) -> dict:
        first, second = jax.random.split(key)
        params = {"resnet": self.resnet.init(first)}
        return params if self.kind == "resnet" else params | {"unet": self.unet.init(second)}

    def __call__(self, params: dict, pictures: jax.Array, train: bool
                 ) -> tuple[jax.Array, jax.Array | None, dict]:
        """What the robot does in each picture.

        Args:
          params: from `init`.
          pictures: uint8[B, H, W, 3].
          train: see `batch_norm.normalize`.

        Returns:
          float32[B, outputs], of about unit scale; the soft mask float32[B, H, W] in [0, 1], None
          without one; new statistics, a tree like a part of the parameters.
        """
        x, soft, new = normalized(pictures), None, {}
        if self.kind != "resnet":
            made, new["unet"] = self.unet(params["unet"], x, train)
            x = jnp.tanh(made)
        if self.kind == "masked":
            soft = (1.0 + x[..., 0]) / 2.0
            hard = (soft >= self.threshold).astype(soft.dtype)
            # Straight through: the value of the hard mask, the gradient of the soft one.
            x = normalized(pictures) * (soft + jax.lax.stop_gradient(hard - soft))[..., None]
        actions, new["resnet"] = self.resnet(params["resnet"], x, train)
        return actions, soft, new


def huber(error: jax.Array, delta: float = 1.0) -> jax.Array:
    """Elementwise: error^2 / 2 up to `delta`, then linear (PyTorch's SmoothL1 for delta 1)."""
    size = jnp.abs(error)
    return jnp.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))


def accuracy(error: jax.Array, grippers: np.ndarray, joint: float = 0.06, gripper: float = 0.6
             ) -> jax.Array:
    """float32[B], 1 where every joint is off by less than `joint`, and every gripper by less than
    `gripper`, in SI units (Vidar's measure; its thresholds are not those of all its scripts).

    Args:
      error: float32[B, A] in SI units; grippers: bool[A].
    """
    return (jnp.abs(error) < jnp.where(grippers, gripper, joint)).all(-1).astype(jnp.float32)


# Convolutions of [B, H, W, C] by kernels [k, k, C, C'].

def _kernel(key: jax.Array, size: int, inputs: int, outputs: int) -> jax.Array:
    """He's initialisation by what comes out (arXiv 1502.01852)."""
    scale = np.sqrt(2.0 / (size * size * outputs))
    return scale * jax.random.normal(key, (size, size, inputs, outputs))


def _conv(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    pad = kernel.shape[0] // 2
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), [(pad, pad)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _pool(x: jax.Array, size: int, stride: int) -> jax.Array:
    pad = (size - 1) // 2
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, size, size, 1),
                                 (1, stride, stride, 1), [(0, 0), (pad, pad), (pad, pad), (0, 0)])


def _unit_init(key: jax.Array, size: int, inputs: int, outputs: int) -> dict:
    return {"kernel": _kernel(key, size, inputs, outputs), "norm": batch_norm.init(outputs)}


def _unit(params: dict, x: jax.Array, train: bool, stride: int = 1, relu: bool = True
          ) -> tuple[jax.Array, dict]:
    """Convolution, batch normalisation, ReLU; and new statistics."""
    x, new = batch_norm.normalize(params["norm"], _conv(x, params["kernel"], stride), train)
    return jax.nn.relu(x) if relu else x, {"norm": new}


def _double_init(key: jax.Array, inputs: int, between: int, outputs: int) -> dict:
    first, second = jax.random.split(key)
    return {"conv_1": _unit_init(first, 3, inputs, between),
            "conv_2": _unit_init(second, 3, between, outputs)}


def _double(params: dict, x: jax.Array, train: bool) -> tuple[jax.Array, dict]:
    x, first = _unit(params["conv_1"], x, train)
    x, second = _unit(params["conv_2"], x, train)
    return x, {"conv_1": first, "conv_2": second}
