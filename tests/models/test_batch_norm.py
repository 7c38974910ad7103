import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxvp.models import batch_norm


def make(shape=(8, 3, 4)):
    rng = np.random.default_rng(0)
    params = {"scale": rng.normal(size=4), "bias": rng.normal(size=4),
              "statistics": {"mean": rng.normal(size=4), "variance": rng.uniform(1, 2, 4)}}
    x = 3 + 2 * rng.normal(size=shape)
    return jax.tree.map(np.float32, params), np.float32(x)


def closed_form(params, x, mean, variance):
    return (x - mean) / np.sqrt(variance + 1e-5) * params["scale"] + params["bias"]


def test_training_normalises_by_the_batch_and_moves_the_statistics():
    params, x = make()
    out, new = batch_norm.normalize(params, x, train=True, momentum=0.75)
    mean, variance = x.mean((0, 1), np.float64), x.var((0, 1), dtype=np.float64)
    np.testing.assert_allclose(out, closed_form(params, x, mean, variance), atol=1e-5)
    old = params["statistics"]
    np.testing.assert_allclose(
        new["statistics"]["mean"], 0.75 * old["mean"] + 0.25 * mean, rtol=1e-5)
    np.testing.assert_allclose(
        new["statistics"]["variance"], 0.75 * old["variance"] + 0.25 * variance, rtol=1e-5)


def test_without_training_the_running_statistics_count_and_stay():
    params, x = make()
    out, new = batch_norm.normalize(params, x, train=False)
    np.testing.assert_allclose(out, closed_form(params, x, **params["statistics"]), atol=1e-5)
    assert new == {}
    alone, _ = batch_norm.normalize(params, x[:1], train=False)
    np.testing.assert_array_equal(alone, out[:1])  # A row does not depend on its batch.


def test_it_starts_as_the_identity():
    _, x = make()
    out, _ = batch_norm.normalize(batch_norm.init(4), x, train=False)
    np.testing.assert_allclose(out, x, rtol=1e-5)


def test_gradients_go_through_the_batch_and_not_through_the_new_statistics():
    params, x = make((8, 4))

    def loss(params, x):
        out, new = batch_norm.normalize(params, x, train=True)
        return (out**3).sum() + sum(leaf.sum() for leaf in jax.tree.leaves(new))

    grads, by_x = jax.grad(loss, argnums=(0, 1))(params, x)
    assert jnp.abs(grads["scale"]).min() > 0 and jnp.abs(grads["bias"]).min() > 0
    # A shift or a stretch of the whole batch changes nothing.
    np.testing.assert_allclose(by_x.sum(0), 0, atol=1e-3)
    np.testing.assert_allclose((by_x * (x - x.mean(0))).sum(0), 0, atol=1e-3)
    assert jnp.abs(by_x).max() > 0.1


def test_statistics_are_float32_whatever_the_network_computes_in():
    """The mean of many bfloat16 values near 256 is not 256."""
    params = batch_norm.init(1)
    x = jnp.asarray(np.tile([256.0, 258.0], 5000)[:, None], jnp.bfloat16)
    out, new = batch_norm.normalize(params, x, train=True, momentum=0.0)
    assert out.dtype == jnp.bfloat16
    assert new["statistics"]["mean"][0] == pytest.approx(257.0, abs=1e-3)
    assert new["statistics"]["variance"][0] == pytest.approx(1.0, abs=1e-3)


def test_they_are_of_the_global_batch():
    """Each device has two rows; all give what one device would."""
    params, x = make((16, 4))
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    spread = jax.device_put(x, NamedSharding(mesh, P("data")))
    function = jax.jit(lambda x: batch_norm.normalize(params, x, train=True))
    for a, b in zip(jax.tree.leaves(function(spread)), jax.tree.leaves(function(x)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
