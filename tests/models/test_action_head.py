import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvp.models.action_head import ActionHead, position_table

HEAD = ActionHead(chunk=4, action_size=3, state_size=2, feature_width=8, taps=2, width=16, layers=2,
                  heads=2)


@pytest.mark.parametrize("changes", [{"heads": 3}, {"frequency_width": 9}])
def test_sizes_that_do_not_divide(changes):
    with pytest.raises(ValueError, match="action head: .* must be a multiple of"):
        dataclasses.replace(HEAD, **changes)


@functools.partial(jax.jit, static_argnums=0)
def run(head, params, actions, sigma, features, state):
    memory = head.memory(params, features, (1, 2, 3))
    return head(params, actions, sigma, memory, state)


@pytest.fixture(scope="module")
def setup():
    keys = jax.random.split(jax.random.key(0), 6)
    params = jax.jit(HEAD.init)(keys[0])
    shape = params["head"]["out"]["kernel"].shape
    params["head"]["out"]["kernel"] = jax.random.normal(keys[1], shape)
    features = [jax.random.normal(k, (2, 6, 8)) for k in jax.random.split(keys[2])]
    actions = jax.random.normal(keys[3], (2, 5, 4, 3))
    sigma = jax.random.uniform(keys[4], (2, 5))
    return params, features, actions, sigma, jax.random.normal(keys[5], (2, 2))


def test_chunks_of_one_sample_are_independent(setup):
    params, features, actions, sigma, state = setup
    together = run(HEAD, params, actions, sigma, features, state)
    assert together.shape == actions.shape
    alone = run(HEAD, params, actions[:, 2:3], sigma[:, 2:3], features, state)
    np.testing.assert_allclose(together[:, 2:3], alone, atol=1e-5)


@pytest.mark.parametrize("which", ["features", "sigma", "state", "place"])
def test_every_input_matters(setup, which):
    params, features, actions, sigma, state = setup
    base = run(HEAD, params, actions, sigma, features, state)
    if which == "features":
        features = [features[0], -features[1]]
    elif which == "place":  # the same features elsewhere: rotary distances could not tell
        features = [f[:, ::-1] for f in features]
    elif which == "sigma":
        sigma = 1 - sigma
    else:
        state = -state
    other = run(HEAD, params, actions, sigma, features, state)
    assert jnp.abs(base - other).max() > 1e-3


def test_no_state_input(setup):
    _, features, actions, sigma, _ = setup
    head = ActionHead(**{**HEAD.__dict__, "state_size": 0})
    params = jax.jit(head.init)(jax.random.key(0))
    assert "state_1" not in params["stem"]
    out = run(head, params, actions, sigma, features, None)
    assert out.shape == actions.shape


def test_position_table_tells_places_apart():
    table = position_table(2, 3, 4, 8)
    assert table.shape == (24, 24)
    distances = np.linalg.norm(table[:, None] - table[None], axis=-1) + np.eye(24)
    assert distances.min() > 0.1
