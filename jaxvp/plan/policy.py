"""What a policy costs on a chip that is not here: memory and time of one call, by mode."""

import time
from collections.abc import Mapping

import jax
import rich.console
import rich.table
from jax.sharding import SingleDeviceSharding

from jaxvp import export, step
from jaxvp.data import sources
from jaxvp.errors import UserError
from jaxvp.models import attention
from jaxvp.plan import hlo_analysis
from jaxvp.plan.chips import GIB, Machine
from jaxvp.policy.bundle import function_name
from jaxvp.versions import versions


def make_plan(config: step.TrainConfig, machine: Machine, name: str = "") -> dict:
    """Compiles what a bundle of `config` would compute for one robot, each mode for one chip.

    Returns:
      JSON values: config, topology, versions, chunk (actions of a call), capacity in bytes, and
      for each mode `parameters`, `memory` in bytes, `fits`, `flops`, `hbm_bytes`, the larger of
      their two times at full rate, `seconds_bound` (of "compute" or "hbm", `bound_by`), and
      `seconds_estimate`, the same of every operation, added up; or `reason` where the compiler
      refuses it.

    Raises:
      UserError: `machine` is not one TPU chip, or there is no compiler for it.
    """
    if machine.chips != 1:
        raise UserError(f"--policy: a bundle's functions are for one chip, found {machine}: take "
                        "v6e:1x1.")
    device = SingleDeviceSharding(machine.devices()[0])
    spec = export.policy_spec(config, sources.clip_spec(config.data))
    method = step.make_method(config, spec)
    params = export.abstract_params(method)
    return {"config": name, "topology": str(machine), "chunk": spec.window.chunk,
            "capacity": machine.chip.hbm_bytes, "versions": versions("jax", "jaxlib", "libtpu"),
            "modes": {function_name(mode): _mode(method, mode, config, params, device, machine)
                      for mode in method.modes}}


def _mode(method, mode, config: step.TrainConfig, params: Mapping, device, machine: Machine
          ) -> dict:
    function, arguments = export.mode_function(method, mode, 1, config.data.crop)
    with attention.portable():
        read = export.parts_read(function, params, *arguments)
        here = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
            ({part: params[part] for part in params if part in read}, *arguments))
        start = time.perf_counter()
        try:
            compiled = jax.jit(function).lower(*here).compile()
        except jax.errors.JaxRuntimeError as error:
            return {"fits": False, "reason": " ".join(str(error).split())[:300]}
    used, chip = compiled.memory_analysis(), machine.chip
    memory = (used.argument_size_in_bytes + used.temp_size_in_bytes + used.output_size_in_bytes
              + used.generated_code_size_in_bytes)
    found = hlo_analysis.analyze(compiled.as_text())
    times = {"compute": found.flops / chip.flops, "hbm": found.hbm_bytes / chip.hbm}
    bound_by = max(times, key=times.get)
    return {"parameters": sum(leaf.size for leaf in jax.tree.leaves(here[0])), "memory": memory,
            "fits": memory <= chip.hbm_bytes, "flops": found.flops, "hbm_bytes": found.hbm_bytes,
            "bound_by": bound_by, "seconds_bound": times[bound_by],
            "seconds_estimate": max(times[bound_by], found.serial_seconds(chip)),
            "loops": found.loops, "compile_seconds": time.perf_counter() - start}


def report(plan: Mapping, console: rich.console.Console):
    """Prints a plan as a table."""
    console.print(f"{plan['config']} on {plan['topology']}, one robot, chunks of {plan['chunk']} "
                  f"actions, {plan['capacity'] / GIB:.1f} GiB of memory")
    table = rich.table.Table("function", "parameters", "GiB", "TFLOP", "at least", "estimate")
    for name, mode in plan["modes"].items():
        title = name.partition(".")[0]
        if "memory" not in mode:
            table.add_row(title, "", "does not fit")
            continue
        table.add_row(title, f"{mode['parameters']:,}", f"{mode['memory'] / GIB:.2f}",
                      f"{mode['flops'] / 1e12:.3g}",
                      f"{1e3 * mode['seconds_bound']:,.1f} ms ({mode['bound_by']})",
                      f"{1e3 * mode['seconds_estimate']:,.1f} ms")
    console.print(table)
