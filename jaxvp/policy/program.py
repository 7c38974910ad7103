"""What an exported function of a bundle may do: compute, and nothing else."""

import jax.export
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import sdy, stablehlo

from jaxvp.errors import UserError

# Custom calls run native code of the process that compiles them. A Python callback's takes an
# address out of the file; these only compute: random bits on CUDA, memory (`jax.lax.empty`).
CUSTOM_CALLS = frozenset({"cu_threefry2x32_ffi", "AllocateBuffer"})
HOST = frozenset(f"stablehlo.{name}" for name in ("infeed", "outfeed", "recv", "send"))


def check(exported: jax.export.Exported, name: str):
    """Makes sure that a function is computation on one device; compiles nothing.

    Args:
      exported: the function.
      name: of its file, for messages.

    Raises:
      UserError: it cannot be read, is for several devices, has side effects, talks to the host, or
        has a custom call that is not among CUSTOM_CALLS.
    """
    if exported.nr_devices != 1:
        raise UserError(f"{name} is a function for {exported.nr_devices} devices, a policy's is "
                        "for one: export it on one device.")
    effects = [*exported.ordered_effects, *exported.unordered_effects]
    if effects:
        raise UserError(f"{name} has side effects ({', '.join(map(str, effects))}), a policy only "
                        "computes: export it without callbacks and prints.")
    found = set()

    def visit(operation):
        if operation.name == "stablehlo.custom_call":
            target = str(operation.attributes["call_target_name"]).strip('"')
            if target not in CUSTOM_CALLS:
                found.add(f"the custom call {target!r}")
        elif operation.name in HOST:
            found.add(operation.name)
        return ir.WalkResult.ADVANCE

    with ir.Context() as context:
        stablehlo.register_dialect(context)
        sdy.register_dialect(context)
        try:
            module = stablehlo.deserialize_portable_artifact(
                context, exported.mlir_module_serialized)
        except ValueError as error:
            raise UserError(f"{name} holds no program that this jax reads: {error}.") from error
        module.operation.walk(visit)
    if found:
        raise UserError(
            f"{name} contains {', '.join(sorted(found))}; a policy only computes, with no custom "
            f"calls but {', '.join(sorted(CUSTOM_CALLS))}: do not trust this bundle.")
