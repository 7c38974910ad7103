"""What a config trains, where it lies, and the one step that does it: train.py runs it, plan.py
compiles it for machines that are not there."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated

import jax
import jax.numpy as jnp
import optax
import rich
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxvp import chips, distributed, optim, sharding
from jaxvp import config as config_lib
from jaxvp.config import NonNegativeInt, PositiveInt, Range, Seed
from jaxvp.data import augment, mixture
from jaxvp.data.clips import ClipSpec
from jaxvp.errors import UserError
from jaxvp.methods import base


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What a config file describes; unknown keys are errors.

    Attributes:
      method: "name", in the registry, and the method's own options.
      stage: one of the method's stages: what is trained, and by which loss.
      execution_horizon: of the P actions of a chunk, how many, at most P, a policy executes before
        it looks again; written into bundles.
      data, optimizer, mesh: see DataConfig, OptimizerConfig, MeshConfig.
      rules: ordered (regex, partition spec) of the parameters, see `sharding.state_shardings`;
        default: the method's own.
      offload_optimizer: keep the optimizer's state in host memory between its updates.
      seed: of initialisation, data order and noise.
      steps, batch_size: optimizer steps; clips per step, over all processes.
      microbatches: parts of a batch that go one after the other; gradients are added up.
      ema: decay of the averaged parameters, which are what is evaluated and exported.
      log_every, validate_every, sample_every, save_every: in steps; 0 is never. The last step is
        validated, sampled and saved if any is.
      validation_batches, sample_clips: held-out batches that are scored, held-out clips whose
        continuation is generated.
      keep: newest checkpoints that are kept, besides the best.
      init_from: workdir or checkpoint whose parameters start this run; resume: one whose whole
        state does. See `checkpoint.restore_or_init`.
      pretrained: part of the method ("video", "codec") to the weights that a new run takes it
        from, see `base.Method.load`; "": none. What `init_from` has of it comes on top.
      embedded: "path" and the options of the tabletop builder, which makes the dataset there when
        a source has just this path and nothing is there; empty: never.
    """

    method: Mapping
    stage: str
    execution_horizon: PositiveInt
    data: mixture.DataConfig
    optimizer: optim.OptimizerConfig
    mesh: sharding.MeshConfig = sharding.MeshConfig()
    rules: tuple | None = None
    offload_optimizer: bool = False
    seed: Seed = 0
    steps: PositiveInt
    batch_size: PositiveInt
    microbatches: PositiveInt = 1
    ema: Annotated[float, Range(ge=0, lt=1)] = 0.999
    log_every: NonNegativeInt = 20
    validate_every: NonNegativeInt = 0
    validation_batches: PositiveInt = 4
    sample_every: NonNegativeInt = 0
    sample_clips: PositiveInt = 8
    save_every: NonNegativeInt = 1000
    keep: PositiveInt = 2
    init_from: str = ""
    resume: str = ""
    pretrained: Mapping = dataclasses.field(default_factory=dict)
    embedded: Mapping = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.execution_horizon > self.data.chunk:
            raise config_lib.ConfigError(
                f"config.execution_horizon is {self.execution_horizon}: expected at most "
                f"config.data.chunk = {self.data.chunk}.")
        if self.embedded and "path" not in self.embedded:
            raise config_lib.ConfigError("config.embedded.path is missing: where the tabletop "
                                         "dataset is built.")


@dataclasses.dataclass(frozen=True)
class Step:
    """A config on a mesh.

    Attributes:
      method: what is trained; mesh: on what.
      abstract: the state {"params", "ema", "opt_state"} as ShapeDtypeStructs with shardings. The
        averages, "ema", are of the parts of the parameters of which something is trained.
      init: () -> state, jitted: every leaf is made where it lies.
      update: (state, clip, number) -> (state, metrics), jitted, the state donated; `number` counts
        the updates that were done before.
      rules: tree like the parameters of `optim.Rule`.
    """

    method: base.Method
    mesh: jax.sharding.Mesh
    abstract: dict
    init: Callable
    update: Callable
    rules: dict

    def describe(self):
        """Prints what is trained and where it lies."""
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract["params"])
        rich.print(optim.resolved_table(self.abstract["params"], self.rules, shardings))
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.abstract))
        distributed.note(f"State: {size / 2**20:,.1f} MiB over {self.mesh.size} devices.")

    def start(self, pretrained: Mapping[str, str]) -> dict:
        """The state before the first update; the parts of the parameters that `pretrained` names
        are read from files, before anything else is made.

        Raises:
          ConfigError, UserError, OSError: the method has no such part, or the files do not fit it.
        """
        loaded, parts = {}, self.abstract["params"]
        for part, path in pretrained.items():
            if not path:
                continue
            if part not in parts:
                raise config_lib.ConfigError(f"config.pretrained.{part}: the method has the parts "
                                             f"{sorted(parts)}.")
            loaded[part], report = self.method.load(part, path, parts[part])
            distributed.note(f"{part} from {path}: {report}")
        state = self.init()
        for part, params in loaded.items():
            state["params"][part] = params
            if part in state["ema"]:
                state["ema"][part] = jax.tree.map(jnp.copy, params)  # Both are donated.
        if loaded:
            fresh = sorted(set(parts) - set(loaded))
            distributed.note(f"Initialised at random: {', '.join(fresh) or 'nothing'}.")
        return state


def averaged(state: Mapping) -> dict:
    """The parameters that are evaluated and exported: averages, and what is not trained."""
    return {**state["params"], **state["ema"]}


def make_method(config: TrainConfig, spec: ClipSpec) -> base.Method:
    """The method of a config, for clips of `spec`."""
    options = {**config.method, "spec": spec, "layout": config.data.layout}
    return config_lib.build(base.get(options.pop("name", "")), options, "config.method")


def clip_keys(seed: int, number: jax.Array, batch_size: int) -> jax.Array:
    """One PRNG key for each clip of batch `number`: the same wherever and beside whom it lies."""
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), number), batch_size)


def build(config: TrainConfig, spec: ClipSpec, mesh: jax.sharding.Mesh) -> Step:
    """The step of `config` for clips of `spec`; compiles nothing.

    Raises:
      ConfigError, UserError: something of the config does not fit something else.
    """
    check_batch(config, mesh)
    method = make_method(config, spec)
    frozen = method.frozen(config.stage)
    abstract_params = jax.eval_shape(lambda: method.init(jax.random.key(config.seed)))
    rules = optim.resolve(config.optimizer, abstract_params, frozen)
    trained = optim.trainable(rules)
    tx, schedule = optim.make_optimizer(config.optimizer, abstract_params, config.steps, frozen)

    learning = [part for part, leaves in trained.items() if any(jax.tree.leaves(leaves))]

    def init():
        params = method.init(jax.random.key(config.seed))
        return {"params": params, "ema": {part: jax.tree.map(jnp.copy, params[part])
                                          for part in learning}, "opt_state": tx.init(params)}

    abstract = jax.eval_shape(init)
    specs = method.sharding_rules if config.rules is None else config.rules
    on_device = sharding.state_shardings(mesh, abstract, specs)
    shardings = on_device
    if config.offload_optimizer:
        shardings = on_device | {"opt_state": jax.tree.map(
            lambda s: s.with_memory_kind("pinned_host"), on_device["opt_state"])}
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                            abstract, shardings)

    def update(state, clip, number):
        def loss(params, clip, keys):
            return method.loss(optim.stop_frozen(params, trained), clip, keys, config.stage)

        keys = clip_keys(config.seed, number + 1, config.batch_size)
        clip = augment.fit(clip, spec, keys, config.data.crop)
        (value, parts), grads = gradients(
            loss, state["params"], clip, keys, config.microbatches, on_device["params"])
        opt_state = jax.device_put(state["opt_state"], on_device["opt_state"]) \
            if config.offload_optimizer else state["opt_state"]
        updates, opt_state = tx.update(grads, opt_state, state["params"])
        params = optax.apply_updates(state["params"], updates)
        ema = {part: optim.ema_update(state["ema"][part], params[part], config.ema, number,
                                      trained[part]) for part in learning}
        numbers = {"loss": value, **parts, "gradient_norm": optax.tree.norm(grads),
                   "learning_rate": schedule(number)}
        return {"params": params, "ema": ema, "opt_state": opt_state}, numbers

    on_tpu = isinstance(mesh, jax.sharding.Mesh) and mesh.devices.flat[0].platform == "tpu"
    jitted = jax.jit(update, donate_argnums=0, out_shardings=(shardings, NamedSharding(mesh, P())),
                     compiler_options=chips.TPU_COMPILER_OPTIONS if on_tpu else None)
    return Step(method, mesh, abstract, jax.jit(init, out_shardings=shardings), jitted, rules)


def gradients(loss: Callable, params, clip: Mapping, keys: jax.Array, microbatches: int,
              shardings):
    """Value, metrics and gradients of the mean of `loss(params, clip, keys)` over the batch.

    With microbatches, every `data` replica adds up gradients of its own, and they are reduced over
    the replicas once, after the last: the sums have a leading dimension that lies on `data`.

    Args:
      loss: returns (scalar, metrics), means over the rows that it is given.
      clip, keys: arrays [B, ...].
      shardings: of the parameters, and so of the gradients.
    """
    grad = jax.value_and_grad(loss, has_aux=True)
    if microbatches == 1:
        return grad(params, clip, keys)
    replicas = jax.sharding.get_abstract_mesh().shape.get("data", 1)

    def split(x):  # Rows stay on their device: those of a microbatch are a stride apart.
        parts = x.reshape(replicas, -1, microbatches, *x.shape[1:])
        return sharding.constrain(jnp.moveaxis(parts, 2, 0), None, "data", "fsdp")

    def replica(clip, keys):
        with sharding.one_replica():
            return grad(params, clip, keys)

    def add(total, part):
        new = jax.vmap(replica, spmd_axis_name="data")(*part)
        value, grads = jax.tree.map(jnp.add, total, new)
        return (value, place(grads)), None

    def place(grads):
        return jax.tree.map(lambda g, s: sharding.constrain(g, "data", *s.spec), grads, shardings)

    parts = jax.tree.map(split, (clip, keys))
    shapes = jax.eval_shape(jax.vmap(replica), *jax.tree.map(lambda x: x[0], parts))
    value, grads = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(add, (value, place(grads)), parts)
    return jax.tree.map(lambda x: x.sum(0) / (replicas * microbatches), total)


def check_batch(config: TrainConfig, mesh: jax.sharding.Mesh):
    """Raises UserError when the batch does not divide among devices and microbatches."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    unit = shards * config.microbatches
    if config.batch_size % unit:
        nearest = max(1, round(config.batch_size / unit)) * unit
        raise UserError(
            f"config.batch_size is {config.batch_size}: expected a multiple of data x fsdp x "
            f"microbatches = {shards} x {config.microbatches}; the nearest is {nearest}.")


def check_data(config: TrainConfig, batches: mixture.BatchIterator):
    """Opens what is validated on as validation will, and says what is to be known of the data.

    Raises:
      UserError: as `mixture.validation_batches`; what it would raise after hours of training.
    """
    notes = list(batches.notes)
    if config.validate_every or config.sample_every:
        robots = batches.normalizers
        notes += mixture.held_out(config.data, robots)[1]
        mixture.validation_batches(config.data, config.batch_size, config.validation_batches,
                                   normalizers=robots)
    for note in notes:
        distributed.note(note)


def abstract_clip(spec: ClipSpec, batch_size: int, mesh: jax.sharding.Mesh) -> dict:
    """A batch of clips as ShapeDtypeStructs with shardings."""
    where = sharding.batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=where)
            for name, (shape, dtype) in spec.arrays.items()}
