"""The video transformer on a mesh of eight devices: equal numbers, intended communication."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxvp import rules, sharding
from jaxvp.models.attention import BlockCausal
from jaxvp.models.transformer import WAN_RULES, VideoTransformer
from jaxvp.plan import hlo, hlo_analysis

MODEL = VideoTransformer(channels=4, width=32, layers=2, heads=4, ffn=48, text_width=16)
BATCH, TOKENS = 8, 96
MESHES = {"fsdp": {"fsdp": 8}, "context": {"fsdp": 2, "context": 4},
          "all": {"fsdp": 2, "context": 2, "tensor": 2}}


def loss(model, params, latents, timestep, text):
    velocity, features = model(params, latents, timestep, text, taps=(0,))
    return jnp.square(velocity - 1).mean() + jnp.square(features[0]).mean()


@pytest.fixture(scope="module")
def state():
    keys = jax.random.split(jax.random.key(0), 5)
    params = MODEL.init(keys[0])
    head = params["head"]["proj_out"]
    head["kernel"] = 0.1 * jax.random.normal(keys[1], head["kernel"].shape)
    # Three frames of 32 tokens: no context axis divides the frames.
    inputs = (jax.random.normal(keys[2], (BATCH, 3, 16, 8, 4)),
              1000 * jax.random.uniform(keys[3], (BATCH, 3)),
              jax.random.normal(keys[4], (BATCH, 5, 16)))
    return params, inputs


@pytest.fixture(scope="module")
def expected(state):
    return jax.jit(jax.value_and_grad(functools.partial(loss, MODEL)))(state[0], *state[1])


@pytest.fixture(scope="module")
def compiled(state):
    """Name of a mesh -> its gradient step, and the arguments where they belong."""
    @functools.cache
    def compile(name):
        mesh = sharding.make_mesh(sharding.MeshConfig(**{"data": 1, **MESHES[name]}))
        params, inputs = state
        specs = rules.match(params, WAN_RULES, (), "WAN_RULES")
        shardings = jax.tree.unflatten(jax.tree.structure(params), [
            NamedSharding(mesh, jax.P(*specs[name])) for name in rules.named_leaves(params)])
        params = jax.device_put(params, shardings)
        inputs = jax.device_put(inputs, sharding.batch_sharding(mesh))
        with jax.set_mesh(mesh):
            step = jax.jit(jax.value_and_grad(functools.partial(loss, MODEL)),
                           out_shardings=(None, shardings)).lower(params, *inputs).compile()
        return step, params, inputs

    return compile


@pytest.mark.parametrize("mesh", MESHES)
def test_sharded_equals_unsharded(compiled, expected, mesh):
    step, params, inputs = compiled(mesh)
    value, grads = step(params, *inputs)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    for wanted, found, param in zip(*map(jax.tree.leaves, (expected[1], grads, params)),
                                    strict=True):
        assert found.sharding.is_equivalent_to(param.sharding, param.ndim)
        assert np.abs(found - wanted).max() < 1e-5 * max(1e-3, np.abs(wanted).max())


CAUSAL = BlockCausal(32)  # A frame; the shards of a context are parts of it, or more.


@pytest.mark.parametrize("heads", [4, 2], ids=["ulysses", "gathered"])
def test_sharded_masks_and_caches_equal_unsharded(state, heads):
    """Velocity, cache and gradients: all frames at once, and the last from caches."""
    model = dataclasses.replace(MODEL, heads=heads)
    params, (latents, timestep, text) = state

    def cached(params):
        memory = model.text_cache(params, text)
        *_, past = model(params, latents[:, :2], timestep[:, :2], memory, velocity=False,
                         mask=CAUSAL, keep=True)
        velocity, _ = model(params, latents[:, 2:], timestep[:, 2:], memory, past=past)
        return jnp.square(velocity - 1).mean(), (velocity, past)

    def whole(params):
        velocity, _, past = model(params, latents, timestep, text, mask=CAUSAL, keep=True)
        past = jax.tree.map(lambda x: x[:, :, :64], past)
        return jnp.square(velocity[:, 2:] - 1).mean(), (velocity[:, 2:], past)

    expected = jax.jit(jax.grad(whole, has_aux=True))(params)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, **MESHES["context"]))
    with jax.set_mesh(mesh):
        for function in (cached, whole) if heads == 4 else (cached,):
            found = jax.jit(jax.grad(function, has_aux=True))(params)
            for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
                assert np.abs(a - b).max() < 1e-5 * max(1, np.abs(b).max())


def collectives(text):
    """[(kind, shapes, name of the operation)] of compiled HLO, between several devices."""
    found = []
    for computation in hlo.parse(text).computations.values():
        for instruction in computation.instructions.values():
            if (instruction.opcode in hlo_analysis.COLLECTIVES
                    and hlo.replica_groups(instruction, 8).shape[1] > 1):
                shapes = [array.dims for array in instruction.type]
                name = instruction.attribute(r'op_name="([^"]*)"') or ""
                found.append((instruction.opcode, shapes, name))
    return found


def test_fsdp_gathers_weights_in_the_loop_and_never_activations(state, compiled):
    found = collectives(compiled("fsdp")[0].as_text())
    gathered = [shape for kind, shapes, name in found for shape in shapes
                if kind == "all-gather" and "while/body" in name]
    kernels = {x.shape[1:] for name, x in rules.named_leaves(state[0]["blocks"]).items()
               if name.endswith("kernel")}
    assert {shape[-2:] for shape in gathered} == kernels
    assert all(np.prod(shape[:-2]) == 1 for shape in gathered)  # One block's, not all of them.
    assert not any(TOKENS in shape for _, shapes, _ in found for shape in shapes)


@pytest.mark.parametrize("mesh", ["context", "all"])
def test_context_exchanges_heads_and_never_gathers_tokens(compiled, mesh):
    found = collectives(compiled(mesh)[0].as_text())
    assert any(kind == "all-to-all" for kind, *_ in found)
    batch = BATCH // MESHES[mesh]["fsdp"]
    for kind, shapes, name in found:
        for shape in shapes:
            assert kind != "all-gather" or np.prod(shape) < batch * TOKENS * MODEL.width, name


def test_no_gathered_weights_are_kept_for_the_backward_pass(state, compiled):
    """Of all the layers' kernels, no device ever holds a whole stack."""
    shapes = {tuple(map(int, shape.split(",")))
              for shape in re.findall(r"f32\[([\d,]+)\]", compiled("fsdp")[0].as_text())}
    for name, x in rules.named_leaves(state[0]["blocks"]).items():
        assert not name.endswith("kernel") or x.shape not in shapes, name
