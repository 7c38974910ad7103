import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxvp import sharding
from jaxvp.sharding import MeshConfig, constrain, global_batch, make_mesh, state_shardings

PARAMS = {"video": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}, "head": jnp.ones((8, 6))}


@pytest.mark.parametrize("config, shape", [
    (MeshConfig(), (8, 1, 1, 1)),
    (MeshConfig(fsdp=2, tensor=2), (2, 2, 1, 2)),
    (MeshConfig(data=1, fsdp=-1, context=4), (1, 2, 4, 1)),
    (MeshConfig(data=2, fsdp=2, context=2), (2, 2, 2, 1)),
])
def test_mesh_shapes(config, shape):
    mesh = make_mesh(config)
    assert mesh.axis_names == ("data", "fsdp", "context", "tensor")
    assert mesh.devices.shape == shape


@pytest.mark.parametrize("config, message", [
    ({"fsdp": 3}, "fsdp=3.*does not fit 8 devices. Nearest that does: data=2, fsdp=4"),
    ({"data": 2, "fsdp": 2}, "data=2, fsdp=2, context=1, tensor=1, which does not fit 8 devices"),
    ({"fsdp": 16}, "fsdp=16.*Nearest that does: data=1, fsdp=8"),
    ({"data": -1, "fsdp": -1}, "expected at most one -1"),
])
def test_a_mesh_that_does_not_fit(config, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(MeshConfig(**config))


def test_state_follows_the_parameters():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    specs = [("video/kernel", ("fsdp", "tensor")), ("head", (("data", "fsdp"), None))]
    state = {"params": PARAMS, "ema": PARAMS, "opt_state": optax.adam(0.1).init(PARAMS)}
    shardings = state_shardings(mesh, jax.eval_shape(lambda: state), specs)
    for tree in (shardings["params"], shardings["ema"], shardings["opt_state"][0].mu):
        assert tree["video"]["kernel"].spec == P("fsdp", "tensor")
        assert tree["video"]["bias"].spec == P()
        assert tree["head"].spec == P(("data", "fsdp"), None)
    assert shardings["opt_state"][0].count.spec == P()

    placed = jax.jit(lambda: state, out_shardings=shardings)()
    kernel = placed["opt_state"][0].nu["video"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 4)}
    assert len({str(shard.index) for shard in kernel.addressable_shards}) == 4


@pytest.mark.parametrize("rule, message", [
    (("vidoe", ("fsdp",)), "sharding rules: 'vidoe' matches no parameter"),
    (("head", (None, "fsdp")), r"dimension 1 of head \(8, 6\) is not a multiple of fsdp = 4"),
    (("head", (("data", "fsdp"),)), None),
    (("head", ("model",)), "head names axis 'model'; there are"),
    (("video/bias", (None, "fsdp")), r"video/bias of shape \(8,\) has fewer dimensions"),
])
def test_rules_that_cannot_work(rule, message):
    mesh = make_mesh(MeshConfig(fsdp=4))
    if message is None:
        assert state_shardings(mesh, {"params": PARAMS}, [rule])["params"]["head"].spec
        return
    with pytest.raises(ValueError, match=message):
        state_shardings(mesh, {"params": PARAMS}, [rule])


def test_constrain_needs_no_mesh():
    x = jnp.ones((8, 4))
    assert constrain(x, ("data", "fsdp")) is x
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2))):
        placed = jax.jit(lambda x: constrain(2 * x, ("data", "fsdp")))(x)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(1, 4)}
    assert np.array_equal(placed, 2 * x)


def test_a_batch_is_split_over_data_and_fsdp():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    host = {"video": np.arange(16, dtype=np.uint8).reshape(8, 2), "mask": np.ones(8, bool)}
    batch = global_batch(mesh, host)
    assert batch["video"].sharding == sharding.batch_sharding(mesh)
    assert {shard.data.shape for shard in batch["video"].addressable_shards} == {(2, 2)}
    assert np.array_equal(batch["video"], host["video"]) and batch["mask"].dtype == bool


@pytest.mark.parametrize("host, message", [
    ({"x": np.ones(6)}, "A batch of 6 from 1 processes.*data x fsdp = 8 shards"),
    ({"x": np.ones(8), "y": np.ones(16)}, r"different lengths: \[8, 16\]"),
])
def test_a_batch_that_does_not_divide(host, message):
    with pytest.raises(ValueError, match=message):
        global_batch(make_mesh(MeshConfig()), host)


def test_a_sharded_step_computes_what_one_device_computes():
    def step(params, x):
        h = constrain(x @ params["video"]["kernel"] + params["video"]["bias"], ("data", "fsdp"))
        return jnp.mean((h @ params["head"]) ** 2)

    x = jax.random.normal(jax.random.key(0), (8, 4))
    loss, grads = jax.value_and_grad(step)(PARAMS, x)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    specs = [("video/kernel", ("fsdp", "tensor")), ("head", ("tensor",))]
    shardings = state_shardings(mesh, {"params": PARAMS}, specs)["params"]
    with jax.set_mesh(mesh):
        params, batch = jax.device_put(PARAMS, shardings), global_batch(mesh, np.asarray(x))
        sharded_loss, sharded = jax.jit(jax.value_and_grad(step))(params, batch)
    assert np.allclose(loss, sharded_loss, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(sharded), strict=True):
        assert np.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_slices_are_told_apart_by_data_alone():
    class Device(types.SimpleNamespace):
        __hash__ = object.__hash__

    devices = [Device(id=i, slice_index=i // 4, process_index=i // 4, platform="cpu",
                      device_kind="cpu", client=None) for i in range(8)]
    mesh = make_mesh(MeshConfig(data=4, fsdp=2), devices)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert [set(part.flat) for part in slices] == [{0}, {0}, {1}, {1}]
    with pytest.raises(ValueError, match="in 2 slices, of which data is a multiple. Nearest that "
                                         "does: data=2, fsdp=4"):
        make_mesh(MeshConfig(data=1, fsdp=8), devices)
