"""What one run of a compiled XLA module does: FLOPs, bytes, collectives.

`compiled.cost_analysis()` counts the body of a loop once, also that of a scan over 40 layers. Here
every instruction counts as often as it runs: the trip counts of the loops are read from their
conditions. All numbers are per device.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

import numpy as np

from jaxvp.plan.hlo import (
    Array,
    Computation,
    Instruction,
    integers,
    parse,
    replica_groups,
    trip_count,
)

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
               "collective-permute", "collective-broadcast")
# What moves nothing by itself; the end of what was counted at its start.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "domain",
        "partition-id", "replica-id", "opt-barrier", "optimization-barrier", "async-update"}
HOST = 5  # The memory space S(5) of a layout; 0 is HBM, all others are on the chip.


@dataclasses.dataclass(frozen=True)
class Operation:
    """What one instruction does in all of its `times` runs together.

    `hbm` and `host` are bytes read and written there; `cycles` what the compiler of TPUs expects,
    0 where it does not say; `background`: it overlaps with others; `source`: the operation of the
    program that it serves.
    """

    name: str
    opcode: str
    times: int
    flops: float
    hbm: float
    host: float
    cycles: int
    background: bool
    source: str


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective and how often it runs.

    Attributes:
      kind: one of COLLECTIVES. A reduce-scatter that TPUs write as an all-reduce whose result is
        sliced is a reduce-scatter.
      bytes: of the largest array of one run on one device: the gathered one, the one to reduce.
      times: runs.
      groups: int[G, n], partitions (positions in the flattened mesh) that communicate with each
        other; for a permute its pairs.
      gathers: an all-reduce of zeros with one's own shard in them. It does what an all-gather does,
        at twice the bytes.
      background: it overlaps with computation by its own instructions.
      source: the operation of the program that it serves.
    """

    kind: str
    name: str
    bytes: float
    times: int
    groups: np.ndarray
    gathers: bool
    background: bool
    source: str


@dataclasses.dataclass
class Analysis:
    """All that one run does on one device; `loops`: name to trip count, None where it is not
    known (it then counts as one)."""

    operations: list[Operation] = dataclasses.field(default_factory=list)
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    loops: dict[str, int | None] = dataclasses.field(default_factory=dict)

    @property
    def flops(self) -> float:
        """Of matrix products and convolutions."""
        return sum(operation.flops for operation in self.operations)

    @property
    def hbm_bytes(self) -> float:
        return sum(operation.hbm for operation in self.operations)

    @property
    def host_bytes(self) -> float:
        return sum(operation.host for operation in self.operations)

    def serial_seconds(self, chip) -> float:
        """One operation after the other, each at the slowest of its FLOPs, its bytes and, of matrix
        products, the compiler's cycles, which know how they fill the matrix unit."""
        return sum(max(o.flops / chip.flops, o.hbm / chip.hbm, o.flops and o.cycles / chip.clock)
                   for o in self.operations if not o.background)


def analyze(text: str, partitions: int = 1) -> Analysis:
    """What the entry computation of a compiled module does in one run.

    Args:
      text: `compiled.as_text()` of a scheduled module.
      partitions: devices that it runs on; replica groups without members mean all of them.

    Raises:
      UserError: the text has no entry computation.
    """
    module = parse(text)
    analysis = Analysis()
    _visit(module, module.computations[module.entry], 1, False, analysis, partitions)
    return analysis


def mesh_axes(groups: np.ndarray, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ.

    Args:
      groups: as `Collective.groups`.
      mesh: axis names to sizes, in order.
    """
    where = np.stack(np.unravel_index(groups, tuple(mesh.values())))
    differs = (where != where[..., :1]).any((1, 2))
    return tuple(axis for axis, yes in zip(mesh, differs, strict=True) if yes)


# Execution.

def _visit(module, computation, times, fused, analysis, partitions, background=False):
    """Adds what `times` runs of a computation do; returns the FLOPs of one run of a fusion."""
    flops = 0.0
    for instruction in computation.instructions.values():
        opcode = instruction.opcode
        here = _flops(computation, instruction)
        if opcode == "while":
            body = module.computations[instruction.called("body")]
            trips = trip_count(module, computation, instruction)
            analysis.loops[instruction.name] = trips
            _visit(module, body, times * (trips or 1), False, analysis, partitions)
            continue
        if opcode == "conditional":  # An upper bound: all branches.
            for name in re.findall(r"%([\w.\-]+)", instruction.attribute(
                    r"branch_computations=\{([^}]*)\}") or "") or [
                    instruction.called("true_computation"),
                    instruction.called("false_computation")]:
                _visit(module, module.computations[name], times, False, analysis, partitions)
            continue
        if opcode in ("call", "async-start"):
            inner = instruction.called("to_apply") or instruction.called("calls")
            _visit(module, module.computations[inner], times, False, analysis, partitions,
                   background or opcode == "async-start")
            continue
        if opcode == "fusion":
            inner = module.computations[instruction.called("calls")]
            here = _visit(module, inner, times, True, analysis, partitions)
        if opcode.removesuffix("-start") in COLLECTIVES:
            _collective(module, computation, instruction, times, fused, analysis, partitions,
                        background)
        flops += here
        if fused:
            continue
        late = background or opcode.endswith("-start")
        hbm, host = _traffic(module, computation, instruction)
        cycles = int(instruction.attribute(r'"estimated_cycles":"(\d+)"') or 0)
        if here or hbm or host or cycles:
            analysis.operations.append(Operation(
                instruction.name, opcode, times, times * here, times * hbm, times * host,
                times * cycles, late, instruction.source))
    return flops


def _collective(module, computation, instruction, times, fused, analysis, partitions,
                background):
    chain = "chain_id=" in instruction.rest
    if chain and not any("AsyncCollectiveStart" in other.rest
                         for other in computation.instructions.values()):
        return  # A later part of one that is spread over several fusions.
    kind = instruction.opcode.removesuffix("-start")
    operands = [computation.instructions[name] for name in instruction.operands]
    payload = [array for operand in operands for array in operand.type]
    if kind in ("all-gather", "all-reduce"):
        payload = instruction.type
        if instruction.opcode == "all-gather-start":  # (operands, results)
            payload = payload[len(operands):2 * len(operands)]
    gathers = False
    if kind == "all-reduce":
        if fused and _only_sliced(computation, instruction.name):
            kind = "reduce-scatter"
        gathers = any(_is_shard_in_zeros(module, computation, operand) for operand in operands)
    asynchronous = (background or instruction.opcode.endswith("-start")
                    or chain)
    analysis.collectives.append(Collective(
        kind, instruction.name, sum(array.bytes for array in payload), times,
        replica_groups(instruction, partitions), gathers, asynchronous,
        instruction.source))


def _only_sliced(computation: Computation, name: str) -> bool:
    return all(user.opcode == "dynamic-slice" or user.opcode in ("get-tuple-element", "bitcast")
               and _only_sliced(computation, user.name) for user in computation.users(name))


def _is_shard_in_zeros(module, computation, instruction) -> bool:
    """Whether the instruction writes a slice into a broadcast constant."""
    while instruction.opcode in ("bitcast", "copy", "convert"):
        instruction = computation.instructions[instruction.operands[0]]
    if instruction.opcode == "fusion":
        inner = module.computations[instruction.called("calls")]
        root = _through_bitcasts(inner, inner.root)
        if root.opcode != "dynamic-update-slice":
            return False
        target = _through_bitcasts(inner, inner.instructions[root.operands[0]])
        if target.opcode == "parameter":
            target = computation.instructions[instruction.operands[int(target.literal)]]
    elif instruction.opcode == "dynamic-update-slice":
        target = computation.instructions[instruction.operands[0]]
    else:
        return False
    return target.opcode == "broadcast"


def _through_bitcasts(computation, instruction) -> Instruction:
    while instruction.opcode in ("bitcast", "convert"):
        instruction = computation.instructions[instruction.operands[0]]
    return instruction


# Work of one instruction.

def _flops(computation: Computation, instruction: Instruction) -> float:
    """Two for each multiplication of a dot, a convolution or an attention kernel."""
    if instruction.opcode == "custom-call":
        return _attention_flops(computation, instruction)
    if instruction.opcode not in ("dot", "convolution"):
        return 0.0
    left, right = (computation.instructions[name].type[0].dims for name in instruction.operands)
    out = math.prod(instruction.type[0].dims)
    if instruction.opcode == "dot":
        contracted = integers(instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or "")
        return 2.0 * out * math.prod(left[axis] for axis in contracted)
    labels = instruction.attribute(r"dim_labels=([\w?]+_[\w?]+->[\w?]+)")
    left_labels, right_labels, out_labels = re.split(r"_|->", labels)
    flops = 2.0 * out * right[right_labels.index("i")]
    flops /= int(instruction.attribute(r"batch_group_count=(\d+)") or 1)
    window = instruction.attribute(r"window=\{([^}]*)\}") or ""
    fields = dict(field.split("=") for field in window.split())
    for number, label in enumerate(filter(str.isdigit, left_labels)):
        size = left[left_labels.index(label)]
        count = instruction.type[0].dims[out_labels.index(label)]
        kernel = right[right_labels.index(label)]

        def field(name, default, number=number):
            return fields[name].split("x")[number] if name in fields else default

        low = int(str(field("pad", "0_0")).split("_")[0])
        stride, dilate, spread = (int(field(name, 1)) for name in
                                  ("stride", "lhs_dilate", "rhs_dilate"))
        flops *= taps(size, count, kernel, stride, low, dilate, spread) / count
    return flops


def _attention_flops(computation: Computation, instruction: Instruction) -> float:
    """Of JAX's splash attention on TPU: products of [N, E] with [M, E], by the kernel's name."""
    kernel = re.match(r"(splash_mha_(?:fwd|dq|dkv))", instruction.name)
    if not kernel:
        return 0.0
    q, k = [array.dims for name in instruction.operands
            for array in computation.instructions[name].type
            if len(array.dims) > 2 and not re.match(r"[su]\d", array.dtype)][:2]
    products = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}[kernel.group(1)]
    gradients = [a for a in instruction.type if a.dims in (q, k)]
    if kernel.group(1) == "splash_mha_dkv" and len(gradients) > 2:  # The fused one does dq too.
        products = 5
    return 2.0 * products * math.prod(q) * k[-2]


@functools.lru_cache(maxsize=1024)
def taps(size, count, kernel, stride, low, dilate, spread) -> int:
    """Pairs (output, tap of the kernel) along one axis that meet an element of the input, and not
    padding or the zeros between; batched products are written as such convolutions."""
    if kernel == 1 and low == 0 and dilate == 1:
        return count
    at = np.arange(count)[:, None] * stride + np.arange(kernel) * spread - low
    return int(((at >= 0) & (at < size * dilate) & (at % dilate == 0)).sum())


def _traffic(module, computation, instruction) -> tuple[float, float]:
    """Bytes in HBM and in host memory that one run reads and writes; what is on the chip is free,
    of a slice only the slice moves."""
    opcode = instruction.opcode
    if opcode in FREE or opcode.endswith("-done") or not instruction.type:
        return 0.0, 0.0
    operands = [computation.instructions[name] for name in instruction.operands]
    inputs = [array for operand in operands for array in operand.type]
    results = list(instruction.type)
    if opcode == "custom-call" and not operands:  # AllocateBuffer
        return 0.0, 0.0
    if opcode in ("dynamic-slice", "slice", "gather"):
        inputs = [dataclasses.replace(results[0], memory=inputs[0].memory)]
    elif opcode in ("dynamic-update-slice", "scatter"):
        update = inputs[-1] if opcode == "scatter" else inputs[1]
        inputs, results = [update], [dataclasses.replace(update, memory=results[0].memory)]
    elif opcode in ("copy-start", "slice-start"):  # (result, operand, ..), ((operand), result, ..)
        results = [results[opcode == "slice-start"]]
        inputs = [dataclasses.replace(results[0], memory=inputs[0].memory)]
    elif opcode.endswith("-start"):  # (operands, results, state)
        results = results[len(inputs):2 * len(inputs)]
    elif opcode == "fusion":
        inner = module.computations[instruction.called("calls")]
        inputs = [a for i, operand in enumerate(operands) for a in _read(inner, i, operand)]
        aliased = re.findall(r"\{(\d*)\}: \((\d+), \{", instruction.rest)
        passed = {int(index) for index, _ in aliased if index}
        results = [a for i, array in enumerate(results) if i not in passed
                   for a in [_written(inner, i, array)]]
    totals = {0: 0.0, HOST: 0.0}
    for array in (*inputs, *results):
        if array.memory in totals:
            totals[array.memory] += array.bytes
    return totals[0], totals[HOST]


def _read(inner: Computation, number: int, operand: Instruction) -> list[Array]:
    """What a fusion reads of its operand: slices of it, nothing where it only writes into it."""
    if len(operand.type) != 1 or number not in inner.parameters:
        return []
    whole, parts, names = operand.type[0], [], [inner.parameters[number]]
    while names:
        name = names.pop()
        for user in inner.users(name):
            if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
                parts.append(dataclasses.replace(user.type[0], memory=whole.memory))
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                pass
            elif user.opcode == "bitcast":
                names.append(user.name)
            elif user.opcode == "tuple" or user.opcode in COLLECTIVES:
                pass  # Passed on; a collective inside of a fusion is counted as such.
            else:
                return [whole]
    return parts


def _written(inner: Computation, index: int, array: Array) -> Array:
    """What a fusion writes of result `index`: the update, where that is all."""
    root = inner.root
    if root.opcode == "tuple":
        root = inner.instructions[root.operands[index]]
    root = _through_bitcasts(inner, root)
    if root.opcode == "dynamic-update-slice":
        update = inner.instructions[root.operands[1]].type[0]
        return dataclasses.replace(update, memory=array.memory, dtype=array.dtype)
    return array
