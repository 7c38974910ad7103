"""The video transformer on a mesh of eight devices: equal numbers, intended communication."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxvp import rules, sharding
from jaxvp.models.transformer import WAN_RULES, VideoTransformer

MODEL = VideoTransformer(channels=4, width=32, layers=2, heads=4, ffn=48, text_width=16)
MESHES = ({"data": 8}, {"fsdp": 8}, {"context": 8}, {"data": 2, "tensor": 4},
          {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 4}, {"fsdp": 2, "context": 4},
          {"data": 2, "fsdp": 2, "context": 2}, {"fsdp": 2, "context": 2, "tensor": 2})


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
    inputs = (jax.random.normal(keys[2], (8, 3, 16, 8, 4)),
              1000 * jax.random.uniform(keys[3], (8, 3)),
              jax.random.normal(keys[4], (8, 5, 16)))
    return params, inputs


@pytest.fixture(scope="module")
def expected(state):
    return jax.jit(jax.value_and_grad(functools.partial(loss, MODEL)))(state[0], *state[1])


def compiled(mesh, params, inputs, model=MODEL):
    """The gradient step, and its arguments where they belong."""
    specs = rules.match(params, WAN_RULES, (), "WAN_RULES")
    shardings = [NamedSharding(mesh, jax.P(*specs[name])) for name in rules.named_leaves(params)]
    shardings = jax.tree.unflatten(jax.tree.structure(params), shardings)
    params = jax.device_put(params, shardings)
    inputs = jax.device_put(inputs, sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(functools.partial(loss, model)),
                       out_shardings=(None, shardings)).lower(params, *inputs).compile()
    return step, params, inputs


def make_mesh(**sizes):
    return sharding.make_mesh(sharding.MeshConfig(**{"data": 1, **sizes}))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_sharded_equals_unsharded(state, expected, sizes):
    step, params, inputs = compiled(make_mesh(**sizes), *state)
    value, grads = step(params, *inputs)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    for wanted, found, param in zip(*map(jax.tree.leaves, (expected[1], grads, params)),
                                    strict=True):
        assert found.sharding.is_equivalent_to(param.sharding, param.ndim)
        assert np.abs(found - wanted).max() < 1e-5 * max(1e-3, np.abs(wanted).max())


def collectives(text):
    """[(kind, shapes, name of the operation)] of compiled HLO."""
    found = []
    for line in text.splitlines():
        kind = re.search(r"= (.*?) (all-gather|all-reduce|all-to-all|reduce-scatter)\(", line)
        if kind and "{{0},{1}" not in line:
            shapes = [tuple(map(int, shape.split(","))) if shape else ()
                      for shape in re.findall(r"\[([\d,]*)\]\{", kind[1])]
            name = re.search(r'op_name="([^"]*)"', line)
            found.append((kind[2], shapes, name[1] if name else ""))
    return found


def test_fsdp_gathers_weights_in_the_loop_and_never_activations(state):
    step, *_ = compiled(make_mesh(fsdp=8), *state)
    found = collectives(step.as_text())
    gathered = [shape for kind, shapes, name in found for shape in shapes
                if kind == "all-gather" and "while/body" in name]
    kernels = {x.shape[1:] for name, x in rules.named_leaves(state[0]["blocks"]).items()
               if name.endswith("kernel")}
    assert {shape[-2:] for shape in gathered} == kernels  # One block's, not the stack of them.
    tokens = 96
    assert not any(tokens in shape for kind, shapes, _ in found for shape in shapes)


def test_context_exchanges_heads_and_never_gathers_tokens(state):
    step, *_ = compiled(make_mesh(fsdp=4, context=2), *state)
    found = collectives(step.as_text())
    assert any(kind == "all-to-all" for kind, *_ in found)
    batch, tokens, width = 2, 96, 32
    for kind, shapes, name in found:
        for shape in shapes:
            whole = kind in ("all-gather", "all-reduce") and len(shape) > 2
            assert not (whole and int(np.prod(shape)) >= batch * tokens * width), (kind, shape, name)


def test_no_gathered_weights_are_kept_for_the_backward_pass(state):
    """Of stacked arrays that are whole along fsdp, there are only activations."""
    step, params, _ = compiled(make_mesh(fsdp=8), *state)
    layers = MODEL.layers
    kernels = {x.shape for name, x in rules.named_leaves(params["blocks"]).items()
               if name.endswith("kernel")}
    shapes = {tuple(map(int, s.split(","))) for s in re.findall(r"f32\[([\d,]+)\]", step.as_text())}
    assert all(shape not in shapes for shape in kernels if shape[0] == layers)
