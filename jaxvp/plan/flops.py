"""Floating-point operations of a training step as the mathematics ask for them: no recomputation,
two for each multiplication in a matrix product or convolution (padding left out), nothing for the
rest."""

import collections
import dataclasses
import math

import jax
from jax.interpreters import partial_eval
from jax.sharding import AbstractMesh

from jaxvp import optim, sharding, step
from jaxvp.models import attention, transformer
from jaxvp.plan import hlo_analysis

REST = "all else"
JAX_SCOPES = ("checkpoint", "rematted_computation")


def model_flops(config: step.TrainConfig, built: step.Step) -> collections.Counter:
    """FLOPs of one clip's forward and backward pass, by component.

    Traced from the loss of the stage, differentiated without remat, with all the scores of an
    attention at once.

    Args:
      config: of the run; built: its step, on any mesh.

    Returns:
      {component: FLOPs}, as `traced_flops`; the sum is what the MFU counts.
    """
    method, trained = built.method, optim.trainable(built.rules)
    params, clip, keys = abstract_inputs(built, 1)

    def gradient(params, clip, keys):
        def loss(params):
            return method.loss(optim.stop_frozen(params, trained), clip, keys, config.stage,
                               train=True)[0]
        return jax.grad(loss)(params)

    with transformer.override_remat("none"), attention.override("xla"):
        return traced_flops(gradient, params, clip, keys)


def abstract_inputs(built: step.Step, rows: int) -> tuple[dict, dict, jax.Array]:
    """Parameters, clip and keys of the loss of `rows` clips, as ShapeDtypeStructs that are
    nowhere."""
    nowhere = AbstractMesh((1,) * len(sharding.AXES), sharding.AXES)
    fitted = dataclasses.replace(built.spec, source_size=())
    arrays = built.abstract["params"], step.abstract_clip(fitted, rows, nowhere)
    return (*jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays),
            jax.eval_shape(lambda: step.clip_keys(0, 0, rows)))


def traced_flops(function, *arguments) -> collections.Counter:
    """FLOPs of the matrix products and convolutions of a function that are needed for its result.

    Args:
      function: of arrays.
      arguments: arrays or ShapeDtypeStructs.

    Returns:
      {component: FLOPs}, largest first: by `jax.named_scope`, the names of nested scopes with a
      space between them, and REST for what is outside of all.
    """
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return collections.Counter(dict(_count(needed, ()).most_common()))


def _scopes(equation, outer: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the scopes that an equation is in, outermost first.

    Transformations wrap names, as in "transpose(jvp(video))/self-attention"; einsum and remat add
    names of their own, which are left out.
    """
    names = [name.rpartition("(")[2].rstrip(")")
             for name in str(equation.source_info.name_stack).split("/")]
    names = [name for name in names if name and "->" not in name and name not in JAX_SCOPES]
    return tuple(dict.fromkeys((*outer, *names)))


def _count(jaxpr, outer: tuple[str, ...]) -> collections.Counter:
    total = collections.Counter()

    def add(jaxpr, times=1):
        for component, flops in _count(jaxpr, scopes).items():
            total[component] += times * flops

    for equation in jaxpr.eqns:
        name, values, scopes = equation.primitive.name, equation.params, _scopes(equation, outer)
        component = " ".join(scopes) or REST
        if name == "dot_general":
            (contracted, _), _ = values["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            out = math.prod(equation.outvars[0].aval.shape)
            total[component] += 2.0 * out * math.prod(shape[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            total[component] += _convolution(equation)
        elif name == "scan":
            add(values["jaxpr"].jaxpr, values["length"])
        elif name == "cond":
            branches = [_count(branch.jaxpr, scopes) for branch in values["branches"]]
            total.update(max(branches, key=collections.Counter.total))
        elif name == "shard_map":
            add(values["jaxpr"], values["mesh"].size)
        else:
            for value in values.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    add(inner)
    return total


def _convolution(equation) -> float:
    """FLOPs of a convolution, padding left out."""
    values = equation.params
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
    return flops / values["batch_group_count"]
