"""The training loop: mesh, data, state, step, checkpoint, evaluate; readable top to bottom."""

import contextlib
import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxvp import checkpoint, distributed, metrics, optim, sharding
from jaxvp import config as config_lib
from jaxvp.data import mixture, observation
from jaxvp.data.clips import ClipSpec
from jaxvp.evaluation.video_quality import psnr
from jaxvp.methods import base
from jaxvp.video import write_video

# What may change when a run is continued in its workdir: what it prints and keeps, not what it is.
MAY_DIFFER = ("log_every", "validate_every", "sample_every", "save_every", "keep", "mesh",
              "data.num_threads", "data.prefetch", "data.cache_bytes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What a config file describes; unknown keys are errors.

    Attributes:
      method: "name", in the registry, and the method's own options.
      stage: one of the method's stages: what is trained, and by which loss.
      execution_horizon: of the P actions of a chunk, how many a policy executes before it looks
        again; written into bundles.
      data, optimizer, mesh: see DataConfig, OptimizerConfig, MeshConfig.
      rules: ordered (regex, partition spec) of the parameters, see `sharding.state_shardings`.
      seed: of initialisation, data order and noise.
      steps, batch_size: optimizer steps; clips per step, over all processes.
      ema: decay of the averaged parameters, which are what is evaluated and exported.
      log_every, validate_every, sample_every, save_every: in steps; 0 is never. The last step is
        validated, sampled and saved if any is.
      validation_batches, sample_clips: held-out batches that are scored, held-out clips whose
        continuation is generated.
      keep: newest checkpoints that are kept, besides the best.
      init_from: workdir or checkpoint whose parameters start this run; resume: one whose whole
        state does. See `checkpoint.restore_or_init`.
      embedded: options of the tabletop builder, which makes the first data source when it is
        absent; empty: never.
    """

    method: Mapping
    stage: str
    execution_horizon: int
    data: mixture.DataConfig
    optimizer: optim.OptimizerConfig
    mesh: sharding.MeshConfig = sharding.MeshConfig()
    rules: tuple = ()
    seed: int = 0
    steps: int
    batch_size: int
    ema: float = 0.999
    log_every: int = 20
    validate_every: int = 0
    validation_batches: int = 4
    sample_every: int = 0
    sample_clips: int = 8
    save_every: int = 1000
    keep: int = 2
    init_from: str = ""
    resume: str = ""
    embedded: Mapping = dataclasses.field(default_factory=dict)


def make_method(config: TrainConfig, spec: ClipSpec) -> base.Method:
    """The method of a config, for clips of `spec`."""
    options = {**config.method, "spec": spec, "layout": config.data.layout}
    return config_lib.build(base.get(options.pop("name", "")), options, "config.method")


def due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens after `step`."""
    return bool(every) and (step % every == 0 or step == last)


def train(raw_config: Mapping, workdir: epath.PathLike, dry_run: bool = False):
    """Trains what a config describes, in `workdir`, from wherever the run stands.

    Args:
      raw_config: the fields of TrainConfig.
      workdir: gets config.json, checkpoints/, metrics.jsonl, tensorboard/ and samples/.
      dry_run: only prints what would be trained, where it lies and how large it is.

    Raises:
      ConfigError, ValueError, FileNotFoundError: something does not fit; before any device time.
      NonFiniteError: a metric is NaN or infinite; nothing is saved after it.
    """
    config = config_lib.build(TrainConfig, raw_config, "config")
    workdir = epath.Path(workdir)
    main_process = jax.process_index() == 0
    config_lib.check_workdir(workdir, raw_config, MAY_DIFFER, write=main_process and not dry_run)
    mesh = sharding.make_mesh(config.mesh)
    everywhere = NamedSharding(mesh, P())

    # -- Data ------------------------------------------------------------------------------------
    share = jax.process_index(), jax.process_count()
    batches = mixture.train_iterator(config.data, config.batch_size, config.seed, *share)
    assets = checkpoint.run_assets(raw_config, batches.spec, batches.normalizers,
                                   batches.embodiments())

    # -- Method and state ------------------------------------------------------------------------
    method = make_method(config, batches.spec)
    root = jax.random.key(config.seed)
    frozen = method.frozen(config.stage)
    abstract_params = jax.eval_shape(method.init, root)
    rules = optim.resolve(config.optimizer, abstract_params, frozen)
    trained = optim.trainable(rules)
    tx, schedule = optim.make_optimizer(config.optimizer, abstract_params, config.steps, frozen)

    def init():
        params = method.init(root)
        return {"params": params, "ema": jax.tree.map(jnp.copy, params),
                "opt_state": tx.init(params)}

    abstract = jax.eval_shape(init)
    shardings = sharding.state_shardings(mesh, abstract, config.rules)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                            abstract, shardings)
    if dry_run:
        rich.print(optim.resolved_table(abstract_params, rules, shardings["params"]))
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract))
        distributed.note(f"State: {size / 2**20:,.1f} MiB over {mesh.size} devices. "
                         f"Clips: {batches.spec}.")
        return
    checkpoints = checkpoint.Checkpoints(workdir, config.keep)
    with jax.set_mesh(mesh):
        start = checkpoint.restore_or_init(
            checkpoints, abstract, jax.jit(init, out_shardings=shardings), config.resume,
            config.init_from)
    state = start.state
    if start.data:
        batches.set_state(start.data)

    # -- Steps -----------------------------------------------------------------------------------
    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, everywhere))
    def update(state, clip, number):
        def loss(params):
            keys = jax.random.split(jax.random.fold_in(root, number + 1), config.batch_size)
            return method.loss(optim.stop_frozen(params, trained), clip, keys, config.stage)

        (value, parts), grads = jax.value_and_grad(loss, has_aux=True)(state["params"])
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        ema = optim.ema_update(state["ema"], params, config.ema, number, trained)
        numbers = {"loss": value, **parts, "gradient_norm": optax.tree.norm(grads),
                   "learning_rate": schedule(number)}
        return {"params": params, "ema": ema, "opt_state": opt_state}, numbers

    @functools.partial(jax.jit, out_shardings=everywhere)
    def score(params, clip, number):
        keys = jax.random.split(jax.random.fold_in(root, number), config.batch_size)
        loss, parts = method.loss(params, clip, keys, config.stage)
        return {"loss": loss, **parts}

    @functools.partial(jax.jit, out_shardings=everywhere)
    def imagine(params, seen, number):
        keys = jax.random.split(jax.random.fold_in(root, number), len(seen["text"]))
        return method.imagine(params, seen, keys)

    def put(number):
        return jax.device_put(np.int32(number), everywhere)

    def validate():
        """Mean metrics of the averaged parameters on held-out batches, with always the same
        noise."""
        scores = [jax.device_get(score(state["ema"], sharding.global_batch(mesh, clip), put(i)))
                  for i, clip in enumerate(held_out())]
        return {f"validation_{name}": float(np.mean([s[name] for s in scores]))
                for name in scores[0]}

    @functools.cache
    def held_out():
        return list(mixture.validation_batches(
            config.data, config.batch_size, config.validation_batches, *share,
            normalizers=batches.normalizers))

    def sample(step):
        """Draws continuations of held-out first frames; scores them against the truth."""
        clip = held_out()[0]
        seen = sharding.global_batch(mesh, observe(clip))
        predicted = np.asarray(jax.device_get(imagine(state["ema"], seen, put(0))))
        predicted = predicted[share[0] * len(clip["text"]):][:config.sample_clips]
        layout = observation.LAYOUTS[config.data.layout]
        truth = observation.canvas(clip["video"], clip["view_mask"], layout)
        truth, there = truth[:len(predicted)], clip["frame_mask"][:len(predicted), 1:]
        if main_process:
            pairs = np.concatenate([truth, predicted], axis=2)  # The truth above.
            wide = np.concatenate(list(pairs), axis=2)
            (workdir / "samples").mkdir(exist_ok=True)
            write_video(workdir / "samples" / f"{step:07d}.mp4", wide, config.data.fps)
            writer.video(step, "truth_above_prediction", wide, config.data.fps)
        copied = np.broadcast_to(truth[:, :1], truth.shape)
        return {"psnr": psnr(predicted, truth)[:, 1:][there].mean(),
                "psnr_of_first_frame": psnr(copied, truth)[:, 1:][there].mean()}

    # -- Loop ------------------------------------------------------------------------------------
    writer = metrics.MetricWriter(workdir, config.steps, config.batch_size, start.step)
    running, window = None, []

    def collect():
        """Takes over the numbers of the step that runs; stops the run when they are not finite."""
        nonlocal running
        if running is not None:
            step, numbers = running
            window.append(jax.device_get(numbers))
            running = None
            metrics.check_finite(step, window[-1])

    # Closing the checkpoints waits for those that are being written, also when the run fails.
    with (jax.set_mesh(mesh), jax.transfer_guard("disallow"), writer,
          contextlib.closing(checkpoints)):
        for step in range(start.step + 1, config.steps + 1):
            clip = sharding.global_batch(mesh, next(batches))
            following, numbers = update(state, clip, put(step - 1))
            collect()  # Of the step before: the device is never waited for.
            state, running = following, (step, numbers)
            stop = distributed.preempted(step)
            extra = {}
            if due(step, config.validate_every, config.steps):
                extra |= validate()
            if due(step, config.sample_every, config.steps):
                extra |= sample(step)
            if extra or due(step, config.log_every, config.steps):
                collect()
                means = {name: float(np.mean([w[name] for w in window])) for name in numbers}
                writer.scalars(step, means | extra | {"bad_records": batches.bad_records})
                window.clear()
            else:
                writer.advance(step)
            if stop or due(step, config.save_every, config.steps):
                collect()
                checkpoints.save(step, state, data=batches.get_state(), assets=assets,
                                 progress=extra, validation=extra.get("validation_loss"))
            if stop and step < config.steps:
                distributed.note(f"Stopped by a signal after step {step}; it is saved.")
                break
        checkpoints.wait()


def observe(clip: Mapping) -> dict:
    """The observation that a clip starts with."""
    seen = {key: clip[key] for key in ("view_mask", "text", "state", "state_mask")}
    return {"video": clip["video"][:, :, :1], **seen}
