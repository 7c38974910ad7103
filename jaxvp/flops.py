"""Floating-point operations of a training step as the mathematics ask for them: no recomputation,
two for each multiplication in a matrix product or convolution (padding left out), nothing for the
rest."""

import dataclasses
import math

import jax
from jax.interpreters import partial_eval
from jax.sharding import AbstractMesh

from jaxvp import hlo_analysis, optim, sharding, step
from jaxvp.data.clips import ClipSpec


def model_flops(config: step.TrainConfig, spec: ClipSpec) -> dict[str, float]:
    """FLOPs of one clip's forward and backward pass, by component.

    The blocks of the video transformer by closed form, one pass (three forward passes' worth where
    they are trained, one where they are frozen); the codec, which is never trained, and all the
    rest (text, embeddings, heads, other passes) from the program, differentiated without remat.

    Returns:
      {component: FLOPs}; the sum is what the MFU counts.
    """
    video = {**config.method["video"], "remat": "none", "attention": "xla"}
    method = step.make_method(
        dataclasses.replace(config, method={**config.method, "video": video}), spec)
    params = jax.eval_shape(lambda: method.init(jax.random.key(0)))
    trained = optim.trainable(
        optim.resolve(config.optimizer, params, method.frozen(config.stage)))
    nowhere = AbstractMesh((1,) * len(sharding.AXES), sharding.AXES)
    clip = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
                        step.abstract_clip(
                            dataclasses.replace(spec, source_size=()), 1, nowhere))
    keys = jax.eval_shape(lambda: step.clip_keys(0, 0, 1))

    def gradient(params, clip, keys):
        def loss(params):
            return method.loss(optim.stop_frozen(params, trained), clip, keys, config.stage)[0]
        return jax.grad(loss)(params)

    total = traced_flops(gradient, params, clip, keys)
    passes, blocks = 3, method.transformer.layers
    if not any(jax.tree.leaves(trained["video"])):
        passes, blocks = 1, max(method.taps) + 1  # Only for its features.
    text = (max(spec.text_length, method.text_tokens) if spec.text_width
            else method.text_encoder.tokens)
    parts = {f"video {name}": passes * flops for name, flops in
             method.transformer.flops(math.prod(method.grid), text, blocks).items()}
    if not spec.latents:
        frames = jax.eval_shape(method.shown, params, clip)
        parts["codec"] = traced_flops(method.video_codec.encode, params.get("codec", {}), frames)
    return parts | {"all else": total - sum(parts.values())}


def traced_flops(function, *arguments) -> float:
    """FLOPs of the matrix products and convolutions of a function that are needed for its result.

    Args:
      function: of arrays.
      arguments: arrays or ShapeDtypeStructs.
    """
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _count(needed)


def _count(jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, values = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = values["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            out = math.prod(equation.outvars[0].aval.shape)
            total += 2.0 * out * math.prod(shape[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            numbers = values["dimension_numbers"]
            image, kernel = (x.aval.shape for x in equation.invars)
            out = equation.outvars[0].aval.shape
            flops = 2.0 * math.prod(out) * kernel[numbers.rhs_spec[1]]
            for axis, (low, _) in enumerate(values["padding"], 2):
                size, count, taps = (shape[spec[axis]] for shape, spec in zip(
                    (image, out, kernel), (numbers.lhs_spec, numbers.out_spec, numbers.rhs_spec),
                    strict=True))
                stride, dilate, spread = (values[key][axis - 2] for key in (
                    "window_strides", "lhs_dilation", "rhs_dilation"))
                met = hlo_analysis.taps(size, count, taps, stride, low, dilate, spread)
                flops *= met / max(count, 1)  # A codec that streams has convolutions of no frames.
            total += flops / values["batch_group_count"]
        elif name == "scan":
            total += values["length"] * _count(values["jaxpr"].jaxpr)
        elif name == "cond":
            total += max(_count(branch.jaxpr) for branch in values["branches"])
        elif name == "shard_map":
            total += values["mesh"].size * _count(values["jaxpr"])
        else:
            total += sum(_count(getattr(value, "jaxpr", value)) for value in values.values()
                         if hasattr(getattr(value, "jaxpr", value), "eqns"))
    return total

