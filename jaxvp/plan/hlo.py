"""The text of a compiled XLA module (`compiled.as_text()`) as computations and instructions.

Syntax: openxla.org/xla/operation_semantics; replica groups: xla/hlo/ir/mesh_and_axis.cc and
replica_group.cc of OpenXLA.
"""

import dataclasses
import functools
import math
import re

import numpy as np

BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}


@dataclasses.dataclass(frozen=True)
class Array:
    """Shape of one array; `memory` is the space that it is in, `tile` pads its minor axes."""

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    memory: int = 0

    @functools.cached_property
    def bytes(self) -> float:
        """Bytes with the padding of its tile."""
        bits = BITS.get(self.dtype)
        if bits is None:  # s32, f8e4m3fn
            bits = int(re.match(r"\D+(\d+)", self.dtype).group(1))
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

    @property
    def source(self) -> str:
        """The operation of the program that it came from; "" where the compiler made it."""
        return self.attribute(r'op_name="([^"]*)"') or ""

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
    """The position after the parenthesis that closes the one at `start`."""
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
        found.append(Array(dtype, integers(dims), integers(order),
                           integers(tile.group(1)) if tile else (),
                           int(memory.group(1)) if memory else 0))
    return tuple(found)


def integers(text: str) -> tuple[int, ...]:
    """All numbers in a text."""
    return tuple(int(number) for number in re.findall(r"\d+", text))


def replica_groups(instruction: Instruction, partitions: int) -> np.ndarray:
    """int[G, n] of a collective: lists, iota tiles `[2,4]<=[4,2]T(1,0)`, or axes of a mesh."""
    pairs = instruction.attribute(r"source_target_pairs=\{(\{[\d,{}]*\})\}")
    if pairs:
        return np.array(integers(pairs)).reshape(-1, 2)
    text = instruction.attribute(r"replica_groups=((?:mesh|\[|\{).*)") or "{}"
    mesh = re.match(r"mesh\[([^\]]*)\](?:, device_ids=\(([^{]*?)\))? \{([^}]*)\}", text)
    if mesh:
        return _mesh_groups(*mesh.groups())
    iota = re.match(r"\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?", text)
    if iota:
        return _iota(iota.group())
    groups = re.match(r"\{((?:\{[\d,]*\},?)*)\}", text)
    rows = [integers(row) for row in re.findall(r"\{([\d,]+)\}", groups.group(1))]
    return np.array(rows) if rows else np.arange(partitions)[None]


def _iota(text: str) -> np.ndarray:
    shape, source, order = re.match(
        r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    source = integers(source)
    ids = np.arange(math.prod(source)).reshape(source)
    return ids.transpose(integers(order) if order else None).reshape(integers(shape))


def _mesh_groups(axes: str, devices: str | None, grouped: str) -> np.ndarray:
    """Groups over `axis`, or over the part `axis:(size of what is major to it)size` of one."""
    sizes = {name: int(size) for name, size in re.findall(r"([^,=]+)=(\d+)", axes)}
    ids = np.arange(math.prod(sizes.values()))
    if devices:
        source = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", devices)
        if source:
            ids = ids.reshape(integers(source.group(1)))
            ids = ids.transpose(integers(source.group(2)) if source.group(2) else None)
        else:
            ids = np.array(integers(devices))
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


# Loops.

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
