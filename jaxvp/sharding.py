"""The device mesh, and which parameter and which batch dimension is on which of its axes.

Axes, slowest network first: `data` replicates parameters, `fsdp` shards parameters and batch,
`context` shards tokens, `tensor` shards widths. XLA adds the communication (axis type Auto).
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxvp import rules
from jaxvp.config import PositiveInt
from jaxvp.errors import UserError

AXES = ("data", "fsdp", "context", "tensor")
BATCH = ("data", "fsdp")

_replica = contextvars.ContextVar("replica", default=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis; one of them may be -1, all the devices that the others leave."""

    data: PositiveInt | Literal[-1] = -1
    fsdp: PositiveInt | Literal[-1] = 1
    context: PositiveInt | Literal[-1] = 1
    tensor: PositiveInt | Literal[-1] = 1

    def __post_init__(self):
        sizes = dataclasses.astuple(self)
        if sizes.count(-1) > 1:
            raise UserError(f"config.mesh is {_show(sizes)}: expected at most one -1.")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh of all devices with the axes AXES; make it current with `jax.set_mesh`.

    Devices of several TPU slices, whose network is the slow one, are told apart by `data` alone.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or `data` is no multiple of
        the slices; names the nearest that do.
    """
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    sizes = dataclasses.astuple(config)
    fixed = math.prod(size for size in sizes if size != -1)
    shape = tuple(len(devices) // fixed if size == -1 else size for size in sizes)
    if math.prod(shape) != len(devices) or shape[0] % slices:
        def distance(other):
            pairs = zip(sizes, other, strict=True)
            return sum(abs(math.log(b / a)) for a, b in pairs if a != -1)
        fitting = (s for s in _factorizations(len(devices), len(AXES)) if s[0] % slices == 0)
        several = f" in {slices} slices, of which data is a multiple" if slices > 1 else ""
        nearest = _show(min(fitting, key=distance))
        raise UserError(f"config.mesh is {_show(sizes)}, which does not fit {len(devices)} "
                        f"devices{several}. Nearest that does: {nearest}.")
    types = (AxisType.Auto,) * len(AXES)
    if slices == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_hybrid_device_mesh(
            (shape[0] // slices, *shape[1:]), (slices, 1, 1, 1), devices,
            allow_split_physical_axes=True)
    return jax.sharding.Mesh(grid, AXES, axis_types=types)


def state_shardings(mesh: jax.sharding.Mesh, state: dict,
                    specs: Sequence[tuple[str, Sequence]]) -> dict:
    """Where every leaf of a training state is placed.

    Args:
      mesh: from `make_mesh`.
      state: {"params": tree, ...} of arrays or ShapeDtypeStructs. Outside of params, a leaf whose
        name ends with that of a parameter of its shape is placed as the parameter is (EMA, moments
        of the optimizer); any other is replicated.
      specs: ordered (regex of a parameter's whole name, spec); a spec has one entry per dimension,
        the name of an axis, a tuple of names or None. No match: replicated.

    Returns:
      A tree like `state` of NamedShardings.

    Raises:
      UserError: a rule matches nothing, names an unknown axis, or does not divide a dimension.
    """
    params = rules.named_leaves(state["params"])
    matched = rules.match(state["params"], specs, (), "sharding rules")
    resolved = {name: _check(mesh, name, params[name].shape, P(*spec))
                for name, spec in matched.items()}

    def spec_of(path, leaf):
        parts = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        for start in range(1, len(parts)):
            name = "/".join(parts[start:])
            if name in params and params[name].shape == leaf.shape:
                return NamedSharding(mesh, resolved[name])
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(spec_of, state)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The sharding of anything whose first dimension is the batch."""
    return NamedSharding(mesh, P(BATCH))


def constrain(x: jax.Array, *spec) -> jax.Array:
    """`x` laid out as `spec` on the current mesh; `x` itself where no mesh is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, present(*spec))


def present(*spec) -> P:
    """`spec` without what the current mesh does not split: axes of size 1, and inside of
    `one_replica` the axis `data`."""
    shape = jax.sharding.get_abstract_mesh().shape

    def split(axis):
        return shape.get(axis, 1) > 1 and not (axis == "data" and _replica.get())

    kept = []
    for entry in spec:
        axes = tuple(filter(split, (entry,) if isinstance(entry, str) else entry or ()))
        kept.append(axes if len(axes) > 1 else axes[0] if axes else None)
    return P(*kept)


@contextlib.contextmanager
def one_replica():
    """While tracing: the arrays belong to one of the `data` replicas, `vmap` maps over them."""
    token = _replica.set(True)
    try:
        yield
    finally:
        _replica.reset(token)


def global_batch(mesh: jax.sharding.Mesh, host_batch):
    """One global batch from the arrays [B / processes, ...] that every process holds.

    Raises:
      UserError: the batch or the processes do not divide evenly among the mesh's batch axes.
    """
    shards, processes = math.prod(mesh.shape[axis] for axis in BATCH), jax.process_count()
    sizes = {len(leaf) for leaf in jax.tree.leaves(host_batch)}
    if len(sizes) != 1:
        raise ValueError(f"Arrays of one batch have different lengths: {sorted(sizes)}.")
    batch = sizes.pop() * processes
    if batch % shards or shards % processes:
        raise UserError(f"A batch of {batch} from {processes} processes does not divide evenly "
                        f"among data x fsdp = {shards} shards: choose multiples.")
    sharding = batch_sharding(mesh)
    with jax.transfer_guard_host_to_device("allow"):  # JAX calls it explicit on one process only.
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x),
                            host_batch)


def replicated(mesh: jax.sharding.Mesh, value) -> jax.Array:
    """A number or NumPy array that every process has the same of, on all devices. (`device_put`
    would compare it over all processes, each time.)"""
    value = np.asarray(value)
    with jax.transfer_guard_host_to_device("allow"):
        return jax.make_array_from_process_local_data(NamedSharding(mesh, P()), value, value.shape)


def _check(mesh, name: str, shape: tuple[int, ...], spec: P) -> P:
    if len(spec) > len(shape):
        raise UserError(f"sharding rules: {name} of shape {shape} has fewer dimensions than "
                        f"{spec}.")
    for dimension, (size, axes) in enumerate(zip(shape, spec, strict=False)):
        axes = () if axes is None else (axes,) if isinstance(axes, str) else axes
        for axis in axes:
            if axis not in mesh.shape:
                raise UserError(f"sharding rules: {name} names axis {axis!r}; there are {AXES}.")
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if size % parts:
            raise UserError(f"sharding rules: dimension {dimension} of {name} {shape} is not a "
                            f"multiple of {' x '.join(axes)} = {parts}.")
    return spec


def _factorizations(number: int, count: int):
    """All tuples of `count` positive integers whose product is `number`."""
    if count == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            for rest in _factorizations(number // first, count - 1):
                yield first, *rest


def _show(sizes: Sequence[int]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
