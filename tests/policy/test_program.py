"""Exported functions that do more than compute: refused before anything is compiled."""

import dataclasses

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import toy_bundle

from jaxvp.errors import UserError
from jaxvp.policy import bundle, program

ACT, IMAGINE = toy_bundle.ACT, toy_bundle.IMAGINE


def exported(function, platforms=("cpu",), allow=()):
    checks = [jax.export.DisabledSafetyCheck.custom_call(target) for target in allow]
    return jax.export.export(jax.jit(function), platforms=platforms, disabled_checks=checks)(
        toy_bundle.PARAMS, *toy_bundle.arguments())


def calling(target: str, where=lambda call, x: call(x), mode=ACT, **attributes):
    """The toy policy with a custom call in it."""
    def predict(*arguments):
        outputs, carry = toy_bundle.predict(*arguments, mode[1])
        y, = outputs.values()
        call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(y.shape, y.dtype))
        return {mode[1][0]: where(lambda x: call(x, **attributes), y)}, carry
    return exported(predict, allow=[target])


def in_a_loop(call, x):
    return jax.lax.fori_loop(0, 3, lambda i, x: call(x), x)


# Loading the callbacks ends the process: they take an address out of the file.
@pytest.mark.parametrize("target, attributes", [
    ("xla_ffi_python_cpu_callback", {"index": np.uint64(5)}),
    ("xla_ffi_partitioned_python_cpu_callback", {"index": np.uint64(5)}),
    ("xla_python_cpu_callback", {"descriptor": np.uint64(5)}),
    ("CustomSPMDPartitioning", {}),
    ("somebody\"s", {}),
])
@pytest.mark.parametrize("where", [lambda call, x: call(x), in_a_loop], ids=["top", "loop"])
def test_custom_calls(tmp_path, target, attributes, where):
    data = calling(target, where, **attributes).serialize()
    bundle.save(tmp_path / "bad", toy_bundle.manifest(), toy_bundle.PARAMS, {ACT: data})
    with pytest.raises(UserError, match="-action.stablehlo contains the custom call .*not trust"):
        bundle.load(tmp_path / "bad")


def test_every_mode_is_looked_at(tmp_path):
    data = calling("xla_ffi_python_cpu_callback", mode=IMAGINE, index=np.uint64(5)).serialize()
    bundle.save(tmp_path / "bad", toy_bundle.manifest(), toy_bundle.PARAMS,
                toy_bundle.functions() | {IMAGINE: data})
    loaded = bundle.load(tmp_path / "bad")
    given, keys, carry = toy_bundle.arguments()
    with pytest.raises(UserError, match="observation-video.stablehlo contains the custom call"):
        loaded.predict(given, keys, ("video",), carry)


def test_several_devices():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))

    def act(*arguments):
        y = toy_bundle.predict(*arguments, ("action",))[0]["action"]
        return jax.lax.with_sharding_constraint(jnp.concatenate([y, y]), rows)

    with pytest.raises(UserError, match="a function for 2 devices"):
        program.check(exported(act), "act.stablehlo")


def test_side_effects():
    made = dataclasses.replace(exported(toy_bundle.function(ACT)), ordered_effects=("IO",))
    with pytest.raises(UserError, match="has side effects .IO."):
        program.check(made, "act.stablehlo")


@pytest.mark.parametrize("platforms", [("cpu",), ("cuda",), ("tpu",), ("cpu", "cuda", "tpu")])
def test_what_jax_itself_makes_of_networks(platforms):
    """Random bits of every kind, and what lowers to more than plain operations."""
    def act(params, observation, keys, carry):
        x = observation["state"][:, 0]
        key = jax.random.wrap_key_data(keys[0])
        rbg = jax.random.key(0, impl="rbg")
        image = observation["video"][:, 0, 0].astype(jnp.float32)
        return (jax.random.normal(key, x.shape) + jax.random.truncated_normal(rbg, -1, 1, x.shape)
                + jax.scipy.special.erf(x) + jnp.cumsum(x, 1) + jnp.sort(x)
                + jax.lax.top_k(x, 1)[0] + jax.nn.gelu(x, approximate=False)
                + jax.image.resize(image, (len(x), 4, 4, 3), "linear").mean((1, 2, 3))[:, None]
                + jax.lax.empty(x.shape, jnp.float32))

    program.check(exported(act, platforms), "act.stablehlo")
