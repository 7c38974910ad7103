"""What one run of a compiled XLA module does, read from its text (`compiled.as_text()`).

`compiled.cost_analysis()` counts the body of a loop once, also that of a scan over 40 layers. Here
every instruction counts as often as it runs: the trip counts of the loops are read from their
conditions. All numbers are those of one device. Syntax: openxla.org/xla/operation_semantics;
replica groups: xla/hlo/ir/mesh_and_axis.cc, replica_group.cc.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
               "collective-permute", "collective-broadcast")
# What moves nothing by itself; the end of what was counted at its start.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "domain",
        "partition-id", "replica-id", "opt-barrier", "optimization-barrier", "async-update"}
BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}
HOST = 5  # The memory space S(5) of a layout; 0 is HBM, all others are on the chip.


@dataclasses.dataclass(frozen=True)
class Array:
    """Shape of one array; `memory` is the space that it lies in, `tile` pads its minor axes."""

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    memory: int = 0

    @functools.cached_property
    def bytes(self) -> float:
        """Bytes with the padding of its tile."""
        bits = BITS.get(self.dtype) or int(re.sub(r"^\D+(\d+).*", r"\1", self.dtype) or 0) \
            if self.dtype not in ("token", "opaque") else 0
        dims = [self.dims[axis] for axis in reversed(self.order)] if self.order else [*self.dims]
        if self.dims and len(self.tile) <= len(dims):
            for i, unit in enumerate(reversed(self.tile), 1):
                dims[-i] = -(-dims[-i] // unit) * unit
        return math.prod(dims) * bits / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: name, arrays of its result, operation, names of its operands, and the rest."""

    name: str
    type: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    rest: str
    literal: str = ""

    def attribute(self, pattern: str) -> str | None:
        """The group of `pattern` in the attributes; None when it is not there."""
        found = re.search(pattern, self.rest)
        return found and found.group(1)

    def called(self, role: str) -> str | None:
        """Name of the computation that has a role: calls, body, condition, to_apply."""
        return self.attribute(rf"\b{role}=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in order; the last, or the one that is marked, is the root."""

    name: str
    instructions: dict[str, Instruction]
    root: Instruction

    @functools.cached_property
    def parameters(self) -> dict[int, str]:
        return {int(i.literal): i.name for i in self.instructions.values()
                if i.opcode == "parameter"}

    def users(self, name: str) -> list[Instruction]:
        return [i for i in self.instructions.values() if name in i.operands]


@dataclasses.dataclass(frozen=True)
class Module:
    computations: dict[str, Computation]
    entry: str


@dataclasses.dataclass(frozen=True)
class Operation:
    """What one instruction does in all of its `times` runs together.

    `hbm` and `host` are bytes read and written there; `background`: it runs beside others.
    """

    name: str
    opcode: str
    times: int
    flops: float
    hbm: float
    host: float
    background: bool


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


def analyze(text: str, partitions: int = 1) -> Analysis:
    """What the entry computation of a compiled module does in one run.

    Args:
      text: `compiled.as_text()` of a scheduled module.
      partitions: devices that it runs on; replica groups without members mean all of them.

    Raises:
      ValueError: the text has no entry computation.
    """
    module = parse(text)
    analysis = Analysis()
    _visit(module, module.computations[module.entry], 1, False, analysis, partitions)
    return analysis


def parse(text: str) -> Module:
    """The computations of a module; ValueError when there is no entry computation."""
    computations, entry, name, lines = {}, "", "", []
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*->.*\{$", line) if not name else None
        if header:
            name, lines = header.group(2), []
            entry = name if header.group(1) else entry
        elif name and re.match(r"\}(\s*//.*)?$", line):
            found = {(i := _instruction(line)).name: i for line in lines}
            root = next((n for n, line in zip(found, lines, strict=True)
                         if line.lstrip().startswith("ROOT ")), next(reversed(found)))
            computations[name], name = Computation(name, found, found[root]), ""
        elif name and re.match(r"\s*(ROOT )?%?[\w.\-]+ = ", line):
            lines.append(line)
        elif name:  # Metadata of a kernel go on in lines of their own.
            lines[-1] += line
    if not entry:
        raise ValueError("This is not the text of a compiled XLA module: no ENTRY computation.")
    return Module(computations, entry)


def mesh_axes(groups: np.ndarray, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ.

    Args:
      groups: as `Collective.groups`.
      mesh: axis names to sizes, in order.
    """
    where = np.stack(np.unravel_index(groups, tuple(mesh.values())))
    differs = (where != where[..., :1]).any((1, 2))
    return tuple(axis for axis, yes in zip(mesh, differs, strict=True) if yes)


# Text.

def _instruction(line: str) -> Instruction:
    start = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line)
    at = start.end()
    end = _closing(line, at) if line[at] == "(" else line.index(" ", at)
    type_text, rest = line[at:end], line[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    close = _closing("(" + rest, 0) - 2
    inside, rest = rest[:close], rest[close + 1:]
    return Instruction(start.group(1), _arrays(type_text), opcode,
                       tuple(re.findall(r"%([\w.\-]+)", inside)), rest, inside)


def _closing(text: str, start: int) -> int:
    """The position behind the parenthesis that closes the one at `start`."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if not depth:
            return at + 1
    raise ValueError(f"A parenthesis does not close: {text[:200]}")


@functools.lru_cache(maxsize=4096)
def _arrays(text: str) -> tuple[Array, ...]:
    found = []
    for dtype, dims, layout in re.findall(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?", text):
        order, _, tiling = layout.partition(":")
        tile = re.search(r"T\(([\d,]+)\)", tiling)
        memory = re.search(r"S\((\d+)\)", tiling)
        found.append(Array(dtype, _integers(dims), _integers(order),
                           _integers(tile.group(1)) if tile else (),
                           int(memory.group(1)) if memory else 0))
    return tuple(found)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


def replica_groups(instruction: Instruction, partitions: int) -> np.ndarray:
    """int[G, n] of a collective: lists, iota tiles `[2,4]<=[4,2]T(1,0)`, or axes of a mesh."""
    pairs = instruction.attribute(r"source_target_pairs=\{(\{[\d,{}]*\})\}")
    if pairs:
        return np.array(_integers(pairs)).reshape(-1, 2)
    text = instruction.attribute(r"replica_groups=((?:mesh|\[|\{).*)") or "{}"
    mesh = re.match(r"mesh\[([^\]]*)\](?:, device_ids=\(([^{]*?)\))? \{([^}]*)\}", text)
    if mesh:
        return _mesh_groups(*mesh.groups())
    iota = re.match(r"\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?", text)
    if iota:
        return _iota(iota.group())
    groups = re.match(r"\{((?:\{[\d,]*\},?)*)\}", text)
    rows = [_integers(row) for row in re.findall(r"\{([\d,]+)\}", groups.group(1))]
    return np.array(rows) if rows else np.arange(partitions)[None]


def _iota(text: str) -> np.ndarray:
    shape, source, order = re.match(
        r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    source = _integers(source)
    ids = np.arange(math.prod(source)).reshape(source)
    return ids.transpose(_integers(order) if order else None).reshape(_integers(shape))


def _mesh_groups(axes: str, devices: str | None, grouped: str) -> np.ndarray:
    """Groups over `axis`, or over the part `axis:(size of what is major to it)size` of one."""
    sizes = {name: int(size) for name, size in re.findall(r"([^,=]+)=(\d+)", axes)}
    ids = np.arange(math.prod(sizes.values()))
    if devices:
        source = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", devices)
        if source:
            ids = ids.reshape(_integers(source.group(1)))
            ids = ids.transpose(_integers(source.group(2)) if source.group(2) else None)
        else:
            ids = np.array(_integers(devices))
    parts, chosen = [], []
    wanted = re.findall(r"([^,:]+)(?::\((\d+)\)(\d+))?", grouped)
    for name, size in sizes.items():
        cuts = sorted({1, size} | {c for n, before, width in wanted if n == name and before
                                   for c in (int(before), int(before) * int(width))})
        for low, high in zip(cuts, cuts[1:], strict=False):
            for n, before, width in wanted:
                if n == name and (not before or (int(before), int(before) * int(width))
                                  == (low, high)):
                    chosen.append(len(parts))
            parts.append(high // low)
    ids = np.moveaxis(ids.reshape(parts), chosen, range(-len(chosen), 0))
    return ids.reshape(-1, math.prod(parts[i] for i in chosen))


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
        if here or hbm or host:
            analysis.operations.append(Operation(instruction.name, opcode, times, times * here,
                                                 times * hbm, times * host, late))
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
        instruction.attribute(r'op_name="([^"]*)"') or ""))


def _only_sliced(computation: Computation, name: str) -> bool:
    return all(user.opcode == "dynamic-slice" or user.opcode in ("get-tuple-element", "bitcast")
               and _only_sliced(computation, user.name) for user in computation.users(name))


def _is_shard_in_zeros(module, computation, instruction) -> bool:
    """Whether the instruction writes a slice into a broadcast constant."""
    while instruction.opcode in ("bitcast", "copy", "convert"):
        instruction = computation.instructions[instruction.operands[0]]
    if instruction.opcode == "fusion":
        inner = module.computations[instruction.called("calls")]
        root = _behind_bitcasts(inner, inner.root)
        if root.opcode != "dynamic-update-slice":
            return False
        target = _behind_bitcasts(inner, inner.instructions[root.operands[0]])
        if target.opcode == "parameter":
            target = computation.instructions[instruction.operands[int(target.literal)]]
    elif instruction.opcode == "dynamic-update-slice":
        target = computation.instructions[instruction.operands[0]]
    else:
        return False
    return target.opcode == "broadcast"


def _behind_bitcasts(computation, instruction) -> Instruction:
    while instruction.opcode in ("bitcast", "convert"):
        instruction = computation.instructions[instruction.operands[0]]
    return instruction


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How often a `while` runs: known to the compiler, or (bound - start) / step of a counter that
    its condition compares with a constant; None for any other condition."""
    known = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"\}')
    if known:
        return int(known)
    condition = module.computations[loop.called("condition")]
    body = module.computations[loop.called("body")]
    root, constant = condition.root, functools.partial(_constant, module)
    if root.opcode == "fusion":
        inner = module.computations[root.called("calls")]
        outer = [condition.instructions[name] for name in root.operands]
        names = {inner.parameters[i]: operand for i, operand in enumerate(outer)}
        root, sides = inner.root, [names.get(n, inner.instructions[n]) for n in inner.root.operands]
    else:
        sides = [condition.instructions[name] for name in root.operands]
    direction = root.attribute(r"direction=(\w+)")
    if root.opcode != "compare" or direction not in ("LT", "LE", "NE", "GT", "GE"):
        return None
    counter = next((s for s in sides if s.opcode == "get-tuple-element"), None)
    bound = next((c for s in sides if (c := constant(condition, s)) is not None), None)
    if counter is None or bound is None or not loop.operands:
        return None
    index = int(counter.attribute(r"index=(\d+)"))
    initial = computation.instructions[loop.operands[0]]
    start = (constant(computation, computation.instructions[initial.operands[index]])
             if initial.opcode == "tuple" else None)
    step = _step(module, body, index)
    if start is None or not step:
        return None
    length = abs(bound - start) + (direction in ("LE", "GE"))
    return -(-length // abs(step))


def _constant(module, computation, instruction) -> int | None:
    while instruction.opcode in ("copy", "bitcast", "convert"):
        instruction = computation.instructions[instruction.operands[0]]
    if instruction.opcode == "fusion" and not instruction.operands:
        inner = module.computations[instruction.called("calls")]
        return _constant(module, inner, inner.root)
    if instruction.opcode != "constant":
        return None
    return int(instruction.literal) if re.fullmatch(r"-?\d+", instruction.literal) else None


def _step(module, body, index: int) -> int | None:
    """What the body of a loop adds to element `index` of its state."""
    if body.root.opcode != "tuple":
        return None
    new = body.instructions[body.root.operands[index]]
    scope = body
    while new.opcode in ("copy", "bitcast"):
        new = body.instructions[new.operands[0]]
    if new.opcode == "fusion":
        scope = module.computations[new.called("calls")]
        new = scope.root
    if new.opcode not in ("add", "subtract"):
        return None
    values = [_constant(module, scope, scope.instructions[name]) for name in new.operands]
    value = next((v for v in values if v is not None), None)
    return value if new.opcode == "add" or value is None else -value


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
        contracted = _integers(instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or "")
        return 2.0 * out * math.prod(left[axis] for axis in contracted)
    labels = instruction.attribute(r"dim_labels=([\w?]+_[\w?]+->[\w?]+)")
    left_labels, right_labels, out_labels = re.split(r"_|->", labels)
    flops = 2.0 * out * right[right_labels.index("i")]
    flops /= int(instruction.attribute(r"batch_group_count=(\d+)") or 1)
    window = instruction.attribute(r"window=\{([^}]*)\}") or ""
    fields = dict(field.split("=") for field in window.split())
    for number, label in enumerate(l for l in left_labels if l.isdigit()):
        size = left[left_labels.index(label)]
        count, kernel = instruction.type[0].dims[out_labels.index(label)], \
            right[right_labels.index(label)]

        def field(name, default, number=number):
            return fields[name].split("x")[number] if name in fields else default

        low = int(str(field("pad", "0_0")).split("_")[0])
        stride, dilate, spread = (int(field(name, 1)) for name in
                                  ("stride", "lhs_dilate", "rhs_dilate"))
        flops *= _taps(size, count, kernel, stride, low, dilate, spread) / count
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
def _taps(size, count, kernel, stride, low, dilate, spread) -> int:
    """Pairs (output, tap of the kernel) along one axis that meet an element of the input, and not
    padding or the zeros between; batched products are written as such convolutions."""
    if kernel == 1 and low == 0 and dilate == 1:
        return count
    at = np.arange(count)[:, None] * stride + np.arange(kernel) * spread - low
    return int(((at >= 0) & (at < size * dilate) & (at % dilate == 0)).sum())


def _traffic(module, computation, instruction) -> tuple[float, float]:
    """Bytes in HBM and in host memory that one run reads and writes; what lies on the chip is free,
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
    elif opcode in ("copy-start", "slice-start"):
        results = results[:1]
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
    root = _behind_bitcasts(inner, root)
    if root.opcode == "dynamic-update-slice":
        update = inner.instructions[root.operands[1]].type[0]
        return dataclasses.replace(update, memory=array.memory, dtype=array.dtype)
    return array
