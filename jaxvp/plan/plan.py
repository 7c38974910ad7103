"""What a config costs on a machine that nobody has to rent first.

    python -m jaxvp.plan --config=configs/pretrain.py:wan-5b --topology=v5p:8x16x16
    python -m jaxvp.plan --config=configs/pretrain.py:wan-5b --topology=v6e:16x16 --sweep
    python -m jaxvp.plan --config=configs/pretrain.py:wan-5b --topology=h200:8 --dry_run
    python -m jaxvp.plan --config=configs/pretrain.py:wan-5b --topology=v6e:1x1 --policy

Compiles the real training step with the real TPU compiler, on a CPU (extra `tpu`), and reads
memory, FLOPs, bytes and collectives from the result. `--dry_run` compiles nothing and gives the
memory, with the activations estimated, in seconds; for GPUs that is all there is. `--sweep` does
the same batch on smaller slices too and says from where on communication takes longest.

The bound is the largest of four times at full rate, as if all overlapped perfectly: the compiled
FLOPs, recomputation included; the bytes of HBM; collectives inside of a slice; those between
slices. The estimate adds what runs one after the other: each operation at the slowest of its FLOPs,
its bytes and (matrix products) the cycles that the compiler expects, and the collectives that it
did not overlap. Neither sees vector work (norms, softmax, modulation) that HBM does
not bound, what attention kernels lose against the peak, contention of collectives, waiting for the
slowest host, or the input pipeline. Nothing here was measured on a TPU.
"""

import dataclasses
import errno
import json
import math
import os
import re
import time
import types
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxvp import command, optim, rules, sharding, step
from jaxvp import config as config_lib
from jaxvp.data import sources
from jaxvp.errors import UserError, naming
from jaxvp.models import attention, transformer
from jaxvp.plan import chips, hlo_analysis, policy
from jaxvp.plan.chips import Machine
from jaxvp.plan.flops import abstract_inputs, model_flops
from jaxvp.plan.report import gib, report, report_sweep
from jaxvp.versions import versions

STATE = {"params": "parameters", "ema": "EMA", "opt_state": "optimizer"}
TRANSIENT = "activations, gradients, temporary"


@dataclasses.dataclass(kw_only=True)
class Plan:
    """What one step costs; bytes and FLOPs are per chip where nothing else is said.

    Attributes:
      topology, chips, mesh, batch_size, microbatches: what is planned.
      parameters: numbers in each part of the model.
      memory: bytes by class; host_memory: those that are in the host's.
      hbm_bytes_per_chip, hbm_capacity_bytes, fits: their sum, what there is, whether it is enough.
      model_flops: of the whole step by component, without recomputation.
      compiled_flops, bytes_moved: matrix products that the chip does, bytes of HBM that it moves.
      collectives: {kind, axes, bytes, times, seconds, background, source}, largest first.
      operations: the 20 that take longest, {name, seconds, flops, hbm, times, background, source}.
      loops: trip counts that were read.
      roofline: seconds of compute, hbm, ici, dcn and host memory, each alone at full rate.
      bound_by, step_seconds_bound, mfu_bound: the largest of them, and what follows.
      step_seconds_estimate, mfu_estimate: with what cannot overlap one after the other.
      compile_seconds: of the compiler, on this machine.
      advice: what to change where it does not fit.
    Fields of what was not compiled are None.
    """

    config: str
    topology: str
    chips: int
    mesh: dict[str, int]
    batch_size: int
    microbatches: int
    parameters: dict[str, int]
    memory: dict[str, float]
    host_memory: dict[str, float]
    hbm_bytes_per_chip: float
    hbm_capacity_bytes: float
    fits: bool
    model_flops: dict[str, float]
    compiled_flops: float | None = None
    bytes_moved: float | None = None
    collectives: list[dict] | None = None
    operations: list[dict] | None = None
    loops: dict[str, int | None] | None = None
    roofline: dict[str, float] | None = None
    bound_by: str | None = None
    step_seconds_bound: float | None = None
    mfu_bound: float | None = None
    step_seconds_estimate: float | None = None
    mfu_estimate: float | None = None
    compile_seconds: float | None = None
    advice: list[str] = dataclasses.field(default_factory=list)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def communication_bound(self) -> bool | None:
        """Whether the network takes longer than compute and HBM."""
        t = self.roofline
        return t and max(t["ici"], t["dcn"]) > max(t["compute"], t["hbm"])


def make_plan(config: step.TrainConfig, machine: Machine, name: str = "", dry_run: bool = False,
              model: Mapping[str, float] | None = None) -> Plan:
    """Plans the training step of `config` on `machine`.

    Args:
      config: of the run.
      machine: from `chips.parse`.
      name: of the config, for the report.
      dry_run: compile nothing.
      model: the `model_flops` of another plan of the same config.

    Raises:
      ConfigError, UserError: config and machine do not fit each other, or the TPU compiler is
        missing.
    """
    spec = sources.clip_spec(config.data)
    for size in ("action_size", "state_size"):
        if not getattr(spec, size):
            raise UserError(f"config.data.{size} is 0, the largest of the data; a plan reads no "
                            f"data: set it in the config.")
    dry_run = dry_run or not machine.chip.axes
    mesh = _abstract_mesh(config.mesh, machine) if dry_run else \
        sharding.make_mesh(config.mesh, machine.devices())
    built = step.build(config, spec, mesh)
    sizes = rules.named_leaves(built.abstract["params"])
    parameters = {}
    for leaf_name, leaf in sizes.items():
        part = leaf_name.partition("/")[0]
        parameters[part] = parameters.get(part, 0) + leaf.size
    model = model or {component: value * config.batch_size
                      for component, value in model_flops(config, built).items()}
    memory, host = _state_bytes(built.abstract)
    plan = Plan(
        config=name, topology=str(machine), chips=machine.chips, mesh=dict(mesh.shape),
        batch_size=config.batch_size, microbatches=config.microbatches, parameters=parameters,
        memory=memory, host_memory=host, hbm_bytes_per_chip=0.0,
        hbm_capacity_bytes=machine.chip.hbm_bytes, fits=False, model_flops=dict(model),
        versions=versions("jax", "jaxlib", "libtpu"))
    if dry_run:
        memory["gradients (estimate)"] = sum(
            _shard_bytes(leaf) for leaf, rule in zip(
                jax.tree.leaves(built.abstract["params"]), jax.tree.leaves(built.rules),
                strict=True) if rule.multiplier is not None)
        memory["activations (estimate)"] = _activation_bytes(config, built)
    elif sum(memory.values()) <= plan.hbm_capacity_bytes:  # Else there is nothing to compile for.
        _compile(plan, config, built, machine)
    plan.hbm_bytes_per_chip = sum(memory.values())
    plan.fits = plan.hbm_bytes_per_chip <= plan.hbm_capacity_bytes
    if not plan.fits:
        plan.advice = advice(plan, config, built)
    return plan


def _abstract_mesh(config: sharding.MeshConfig, machine: Machine) -> AbstractMesh:
    sizes = dataclasses.astuple(config)
    left = machine.chips // math.prod(size for size in sizes if size != -1)
    shape = tuple(left if size == -1 else size for size in sizes)
    if math.prod(shape) != machine.chips or shape[0] % machine.slices:
        absent = [types.SimpleNamespace(slice_index=i) for i in range(machine.slices)]
        sharding.make_mesh(config, absent * (machine.chips // machine.slices))  # Raises.
    return AbstractMesh(shape, sharding.AXES, (AxisType.Auto,) * len(shape))


# Memory.

def _shard_bytes(leaf: jax.ShapeDtypeStruct) -> float:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _state_bytes(abstract: Mapping) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes per chip of the classes of the state, in HBM and in host memory."""
    memory, host = {}, {}
    for key, label in STATE.items():
        leaves = jax.tree.leaves(abstract[key])
        offloaded = [leaf for leaf in leaves if leaf.sharding.memory_kind == "pinned_host"]
        memory[label] = sum(map(_shard_bytes, leaves)) - sum(map(_shard_bytes, offloaded))
        if offloaded:
            host[label] = sum(map(_shard_bytes, offloaded))
    return memory, host


def _activation_bytes(config: step.TrainConfig, built: step.Step) -> float:
    """Bytes per chip that the forward pass keeps for the backward pass, as differentiation finds
    them, before the compiler; with remat also what one block has while it is computed again."""
    kept = _residuals(config, built)
    if recomputing := [model.network.layers for model in _video_models(built).values()
                       if model.network.remat != "none"]:
        with transformer.override_remat("none"):
            kept += _residuals(config, built) / min(recomputing)
    return kept


def _residuals(config: step.TrainConfig, built: step.Step) -> float:
    mesh, method = built.mesh, built.method
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = max(1, config.batch_size // (shards * config.microbatches))
    trained = optim.trainable(built.rules)

    def residuals(params, clip, keys):
        return jax.vjp(lambda p: method.loss(optim.stop_frozen(p, trained), clip, keys,
                                             config.stage, train=True)[0], params)[1]

    params, clip, keys = abstract_inputs(built, rows)
    with attention.override("chunked"):  # As on accelerators, it never keeps its scores.
        kept = jax.tree.leaves(jax.eval_shape(residuals, params, clip, keys))
    weights = {leaf.shape for leaf in jax.tree.leaves(params)}
    return sum(leaf.size * leaf.dtype.itemsize / mesh.shape["context"] for leaf in kept
               if leaf.shape not in weights)


def _video_models(built: step.Step) -> dict:
    """The video models of the stage, by part."""
    return {part: model for part, model in built.method.video_models.items()
            if part in built.stage.parts}


# The compiled step.

def _compile(plan: Plan, config, built, machine: Machine):
    """Fills in what only the compiler knows."""
    everywhere = NamedSharding(built.mesh, P())
    clip = step.abstract_clip(built.spec, config.batch_size, built.mesh)
    number = jax.ShapeDtypeStruct((), np.int32, sharding=everywhere)
    with jax.set_mesh(built.mesh):
        lowered = built.update.lower(built.abstract, clip, number)
        start = time.perf_counter()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            plan.compile_seconds = time.perf_counter() - start
            plan.memory[TRANSIENT] = _needed(str(error), sum(plan.memory.values()))
            return
    plan.compile_seconds = time.perf_counter() - start
    used = compiled.memory_analysis()
    known = sum(plan.memory.values())
    plan.memory["batch, padding"] = max(0.0, used.argument_size_in_bytes - known)
    plan.memory[TRANSIENT] = float(
        used.temp_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes)
    plan.memory["program"] = float(used.generated_code_size_in_bytes)
    if used.host_temp_size_in_bytes:
        plan.host_memory[TRANSIENT] = float(used.host_temp_size_in_bytes)
    roofline(plan, hlo_analysis.analyze(compiled.as_text(), machine.chips), machine, built.mesh)


def _needed(message: str, state: float) -> float:
    """Bytes over the state in the compiler's complaint that memory is short; other complaints
    are raised again."""
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    found = re.search(r"Used ([\d.]+)([KMGT]?) of", message)
    if found:
        return max(0.0, float(found.group(1)) * units[found.group(2)] - state)
    found = re.search(r"temporaries \(([\d.]+)([KMGT]?)\)", message)
    if not found:
        raise UserError(f"The step does not compile: {message}")
    return float(found.group(1)) * units[found.group(2)]


def roofline(plan: Plan, analysis: hlo_analysis.Analysis, machine: Machine,
             mesh: jax.sharding.Mesh):
    """Fills in times, MFU and collectives from what the compiled step does."""
    chip = machine.chip
    devices = mesh.devices.flatten()
    where = np.array([getattr(device, "coords", (0,)) for device in devices])
    slices = np.array([getattr(device, "slice_index", None) or 0 for device in devices])
    ici = dcn = blocking = 0.0
    plan.collectives = []
    for collective in analysis.collectives:
        groups = collective.groups
        near, far = machine.network_seconds(
            collective.kind, collective.bytes, where[groups], slices[groups])
        ici, dcn = ici + near * collective.times, dcn + far * collective.times
        if not collective.background:
            blocking += (near + far) * collective.times
        plan.collectives.append({
            "kind": collective.kind + (" (gathers)" if collective.gathers else ""),
            "axes": hlo_analysis.mesh_axes(groups, mesh.shape), "bytes": collective.bytes,
            "times": collective.times, "seconds": (near + far) * collective.times,
            "background": collective.background, "source": collective.source})
    plan.collectives.sort(key=lambda c: -c["seconds"])
    longest = sorted(
        analysis.operations, key=lambda o: -max(o.flops / chip.flops, o.hbm / chip.hbm))
    plan.operations = [
        {"name": o.name, "seconds": max(o.flops / chip.flops, o.hbm / chip.hbm), "flops": o.flops,
         "hbm": o.hbm, "times": o.times, "background": o.background, "source": o.source}
        for o in longest[:20]]
    plan.loops, plan.compiled_flops = analysis.loops, analysis.flops
    plan.bytes_moved = analysis.hbm_bytes
    plan.roofline = {"compute": analysis.flops / chip.flops, "hbm": analysis.hbm_bytes / chip.hbm,
                     "ici": ici, "dcn": dcn, "host": analysis.host_bytes / chip.host}
    plan.bound_by = max(plan.roofline, key=plan.roofline.get)
    plan.step_seconds_bound = plan.roofline[plan.bound_by]
    plan.step_seconds_estimate = max(
        plan.step_seconds_bound, analysis.serial_seconds(chip) + blocking)
    ideal = sum(plan.model_flops.values()) / (plan.chips * chip.flops)
    plan.mfu_bound = ideal / plan.step_seconds_bound
    plan.mfu_estimate = ideal / plan.step_seconds_estimate


def advice(plan: Plan, config: step.TrainConfig, built: step.Step) -> list[str]:
    """What to change so that the step fits, what helps most first; GiB are per chip."""
    mesh, memory, capacity = plan.mesh, plan.memory, plan.hbm_capacity_bytes
    state = sum(memory.get(label, 0.0) for label in STATE.values())
    rest = plan.hbm_bytes_per_chip - state
    shards = mesh["data"] * mesh["fsdp"]
    rows = config.batch_size // (shards * config.microbatches)
    found = []

    def say(saved, text):
        found.append((saved, text))

    if mesh["data"] > 1:
        say(state * (1 - 1 / mesh["data"]),
            f"config.mesh.data=1, fsdp={shards}: the state shrinks from {gib(state)} to "
            f"{gib(state / mesh['data'])}.")
    if not config.offload_optimizer and memory.get("optimizer"):
        say(memory["optimizer"], f"config.offload_optimizer=True: {gib(memory['optimizer'])} of "
            "optimizer move to the host.")
    if rows > 1:
        factor = next((f for f in (2, 4, 8, 16, 32, 64) if rows % f == 0 and
                       state + rest / f <= capacity), rows)
        say(rest * (1 - 1 / factor),
            f"config.microbatches={config.microbatches * factor}: {rows // factor} instead of "
            f"{rows} clips per chip at a time; activations shrink about {factor} times.")
    for part, model in _video_models(built).items():
        if model.network.remat != "full":
            say(rest / 2, f"config.method.{part}.transformer.remat='full': only the inputs of "
                "blocks are kept.")
    if rows <= 1:
        say(rest / 2, f"config.mesh.context={2 * mesh['context']}: tokens of a clip over twice as "
            "many chips.")
    least = math.ceil(state * plan.chips / capacity * 1.25)
    if state > 0.8 * capacity:
        say(state / 2, f"More chips: the state alone fills {state / capacity:.0%} of one; with "
            f"fsdp over {least} chips it fills 80 %.")
    return [text for _, text in sorted(found, key=lambda item: -item[0])]


def to_json(plan: Plan) -> dict:
    """The plan as JSON values."""
    return dataclasses.asdict(plan) | {"communication_bound": plan.communication_bound}


# The command.

def start(settings):
    """Plans what the flags say."""
    machine = chips.parse(settings.topology, settings.slices)
    if settings.json:
        _check_file(Path(settings.json))
    console = command.console()
    if not machine.chip.axes and not settings.dry_run:
        console.print(f"{machine}: absent GPUs cannot be compiled for; this is --dry_run.")
    config = config_lib.build(step.TrainConfig, settings.config, "config")
    name = command.config_name()
    if settings.policy:
        plan = policy.make_plan(config, machine, name)
        policy.report(plan, console)
        return _write(settings.json, plan)
    plan = make_plan(config, machine, name, settings.dry_run)
    report(plan, console)
    result = to_json(plan)
    if settings.sweep:
        plans = []
        for smaller in chips.smaller(machine)[:-1]:
            try:
                plans.append((smaller, make_plan(config, smaller, name, settings.dry_run,
                                                 plan.model_flops)))
            except UserError as error:
                plans.append((smaller, str(error)))
        plans.append((machine, plan))
        report_sweep(plans, console)
        result["sweep"] = [{"topology": str(m), "chips": m.chips, "error": p}
                           if isinstance(p, str) else to_json(p) for m, p in plans]
    return _write(settings.json, result)


def _write(path: str | None, result: Mapping):
    if path:
        with naming(path):
            Path(path).write_text(json.dumps(result, indent=2, default=_plain) + "\n")


def _check_file(path: Path):
    """Raises OSError where a file cannot be written; before minutes of compilation."""
    command.make_folder(path.parent)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)


def _plain(value):
    return value.item() if isinstance(value, np.generic) else str(value)


def run():
    """Entry point `jaxvp-plan`."""
    jax.config.update("jax_platforms", "cpu")  # Whatever is here: it is not what is planned for.
    command.define_config("What is planned")
    flags.DEFINE_string("topology", None, "v5p:8x16x16, v6e:16x16, v5e:16x16 (chips along the axes "
                        "of the torus), h100:64, h200:8")
    flags.DEFINE_integer("slices", 1, "TPU slices of that topology, connected by DCN")
    flags.DEFINE_bool("dry_run", False, "compile nothing: only memory and model FLOPs")
    flags.DEFINE_bool("sweep", False, "plan smaller slices of the chip too")
    flags.DEFINE_bool("policy", False, "plan a call of the policy instead of a training step; of "
                      "one chip")
    flags.DEFINE_string("json", None, "file to write the plan to")
    flags.mark_flag_as_required("topology")
    command.run(start)


if __name__ == "__main__":
    run()
