"""The cost of a compiled program for one device: FLOPs, HBM traffic, collectives by mesh axis, the compiler's cycles.

Loops count as often as they run, see `hlo.Program`.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

from scaling_dit.planning.hlo import Array, Instruction, Program, Visit

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Parts of a step for `Statistics.parts`. An instruction belongs to the first part whose pattern matches its scope (see
# `_part`). "optimiser" is spelled as in the JSON of saved plans.
PARTS = (
    "attention core", "projections", "MLP", "norms", "convolutions", "text encoder", "codec", "optimiser", "copies",
    "collectives", "other",
)  # fmt: skip
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "opt-barrier", "iota", "async-start", "async-update", "async-done", "copy-done",
    "add-dependency",
}  # fmt: skip
# Operations that only move data: last parts of a scope, and opcodes.
_MOVES = {
    "broadcast_in_dim", "concatenate", "copy", "dynamic_slice", "dynamic_update_slice", "gather", "pad", "reshape",
    "rev", "slice", "split", "squeeze", "transpose",
}  # fmt: skip
_MOVING = {
    "broadcast", "concatenate", "copy", "copy-start", "dynamic-slice", "dynamic-update-slice", "pad", "reshape",
    "reverse", "slice", "transpose",
}  # fmt: skip
_ATTENTION = re.compile(r"(?:^|/)\w*(?:attn|attention|splash)\w*/", re.IGNORECASE)
_PROJECTION = re.compile(r"(?:^|/)(?:qkv|kv|q|k|v|proj|out|text_kv|to_\w+|w[qkvo])/")
_SCOPES = (
    ("optimiser", re.compile(r"(?:^|/)optimizer/")),
    ("text encoder", re.compile(r"\(text_encoder\)|(?:^|/)text_encoder/")),
    ("codec", re.compile(r"\(codec\)|(?:^|/)codec/")),
    ("norms", re.compile(r"(?:^|/)\w*norm\w*/[\w;./]*$")),
    ("MLP", re.compile(r"(?:^|/)(?:mlp|ff|feed_forward|ffn|geglu|fc[12])\w*/")),
    ("convolutions", re.compile(r"conv_general_dilated|(?:^|/)\w*conv\w*/")),
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind over the same mesh axes, per step and device.

    Attributes:
      kind: one of `COLLECTIVES`.
      axes: names of the mesh axes along which data move.
      torus_axes: axes of the slice's torus along which data move; empty if the coordinates are not known.
      slices: whether they cross slices, over the data-centre network.
      asynchronous: whether they run beside the computation.
      count: number of runs in a step.
      size: bytes of the whole (gathered, or not yet reduced) arrays.
      wire: bytes that one device sends in a ring: (n - 1) / n of `size` for n devices, twice as much for an all-reduce.
    """

    kind: str
    axes: tuple[str, ...]
    torus_axes: tuple[int, ...]
    slices: bool
    asynchronous: bool
    count: int
    size: int
    wire: int


@dataclasses.dataclass(frozen=True)
class Statistics:
    """The cost of a program for one device.

    Attributes:
      flops: 2 x multiply-adds of every matrix product and convolution, without padding; includes `kernel_flops`.
      kernel_flops: FLOPs that hand-written kernels declare.
      undeclared_kernels: runs of hand-written kernels that declare no FLOPs, which `flops` lacks.
      hbm_bytes: an estimate of the bytes that all kernels read and write: an array counts once for each kernel.
      cycles: sum of the TPU compiler's estimates without collectives; 0 if it gives none.
      parts: cycles by part of the step, see `PARTS`.
      collectives: by kind, mesh axes, and whether asynchronous.
      unknown_loops: loops whose trip count could not be read, counted as running once.
    """

    flops: int
    kernel_flops: int
    undeclared_kernels: int
    hbm_bytes: int
    cycles: int
    parts: Mapping[str, int]
    collectives: tuple[Collective, ...]
    unknown_loops: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """The devices of a program's partitions.

    Attributes:
      axes: mesh axis -> size, in the order of the mesh; partition p is the p-th device of the mesh.
      coords: [partitions, n] coordinates in the slice's torus; None if not known.
      slices: [partitions] slice index of each partition; None for one slice.
    """

    axes: Mapping[str, int]
    coords: np.ndarray | None = None
    slices: np.ndarray | None = None

    @classmethod
    def of(cls, mesh: Mesh) -> "Layout":
        """The layout of a program that is compiled for a mesh."""
        devices = list(mesh.devices.flat)
        known = all(getattr(device, "coords", None) is not None for device in devices)
        coords = np.array([device.coords for device in devices]) if known else None
        slices = np.array([getattr(device, "slice_index", None) or 0 for device in devices])
        return cls(dict(mesh.shape), coords, slices)

    @property
    def size(self) -> int:
        """Number of partitions."""
        return math.prod(self.axes.values())

    def moved(self, groups: Sequence[np.ndarray]) -> tuple[tuple[str, ...], tuple[int, ...], bool]:
        """(mesh axes, torus axes, whether slices are crossed) along which the members of groups differ."""
        members = np.stack(groups)
        # [groups, n, axes]
        places = np.stack(np.unravel_index(members, tuple(self.axes.values())), -1)
        varies = (places != places[:, :1]).any((0, 1))
        torus: tuple[int, ...] = ()
        if self.coords is not None:
            at = self.coords[members]
            torus = tuple(map(int, np.flatnonzero((at != at[:, :1]).any((0, 1)))))
        crossing = self.slices is not None and bool(
            (self.slices[members] != self.slices[members][:, :1]).any()
        )
        return tuple(name for name, moves in zip(self.axes, varies, strict=True) if moves), torus, crossing


def statistics(program: Program, layout: Layout) -> Statistics:
    """Counts a program that was compiled for `layout.size` devices."""
    flops = kernel_flops = undeclared = hbm = 0
    parts: collections.Counter[str] = collections.Counter(dict.fromkeys(PARTS, 0))
    sums: dict[tuple, list[int]] = {}
    for visit in program.walk():
        instruction, times = visit.instruction, visit.times
        opcode = instruction.opcode.removesuffix("-start")
        if opcode in ("dot", "convolution"):
            operands = [operand.arrays for operand in program.operands(visit)]
            product = _dot_flops if opcode == "dot" else _convolution_flops
            flops += times * product(instruction, *(arrays[0] for arrays in operands[:2]))
        elif collective := collective_of(program, visit, layout):
            *key, count, size, wire = dataclasses.astuple(collective)
            entry = sums.setdefault(tuple(key), [0, 0, 0])
            for place, value in enumerate((count, size, wire)):
                entry[place] += value * times
        elif opcode == "custom-call" and _is_kernel(instruction):
            declared = re.search(r'"flops":"?(\d+)', instruction.attributes)
            undeclared += times * (declared is None)
            kernel_flops += times * (int(declared[1]) if declared else 0)
        if not visit.fused:
            hbm += times * hbm_bytes(program, visit)
        if cycles := cycles_of(instruction):
            parts[_part(program, instruction)] += times * cycles
    rows = [Collective(*key, *entry) for key, entry in sorted(sums.items(), key=lambda item: -item[1][1])]
    total = flops + kernel_flops
    return Statistics(
        total,
        kernel_flops,
        undeclared,
        hbm,
        sum(parts.values()),
        dict(parts),
        tuple(rows),
        program.unknown_loops,
    )


def cycles_of(instruction: Instruction) -> int:
    """The cycles that the TPU compiler expects for one instruction; 0 if it gives none."""
    cycles = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
    # Elements of a kernel's result repeat its estimate. For SparseCores the compiler gives 2^63 - 1.
    known = cycles and instruction.opcode != "get-tuple-element" and int(cycles[1]) < 2**62
    return int(cycles[1]) if cycles and known else 0


def _is_kernel(instruction: Instruction) -> bool:
    target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    return target is not None and target[1] in (
        "tpu_custom_call",
        "__gpu$xla.gpu.triton",
        "__cudnn$fmhaSoftmax",
    )


def _dot_flops(dot: Instruction, left: Array, right: Array) -> int:
    contracting = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.attributes)
    axes = map(int, filter(None, contracting[1].split(","))) if contracting else ()
    return 2 * math.prod(dot.arrays[0].dims) * math.prod(left.dims[axis] for axis in axes)


def _convolution_flops(convolution: Instruction, left: Array, right: Array) -> int:
    """2 x multiply-adds. Positions of the window on padding or between dilated inputs do not count.

    On TPU every matrix product is a convolution; one over a batch is written with a window as large as the batch of
    which one place meets data.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    if labels is None:
        return 0
    inputs, kernel, outputs = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", convolution.attributes)
    fields = dict(field.split("=") for field in window[1].split()) if window else {}
    groups = {
        name: int(count)
        for name, count in re.findall(
            r"(feature_group_count|batch_group_count)=(\d+)", convolution.attributes
        )
    }
    out = convolution.arrays[0].dims
    macs = left.dims[inputs.index("f")] // groups.get("feature_group_count", 1)
    macs *= right.dims[kernel.index("o")] * left.dims[inputs.index("b")] // groups.get("batch_group_count", 1)
    for axis, label in enumerate(sorted(label for label in outputs if label.isdigit())):

        def field(name: str, default: str, axis: int = axis) -> int:
            return int(fields[name].split("x")[axis].split("_")[0]) if name in fields else int(default)

        macs *= places_that_meet(
            left.dims[inputs.index(label)],
            right.dims[kernel.index(label)],
            out[outputs.index(label)],
            stride=field("stride", "1"),
            pad=field("pad", "0"),
            spread=field("lhs_dilate", "1"),
            dilation=field("rhs_dilate", "1"),
        )
    return 2 * macs


def places_that_meet(
    size: int, taps: int, outputs: int, stride: int = 1, pad: int = 0, spread: int = 1, dilation: int = 1
) -> int:
    """The number of pairs (output, tap) of a convolution along one axis whose tap lies on an input value.

    Tap k of output o lies at o * stride - pad + k * dilation. Input values lie at 0, spread, 2 spread, ...

    Args:
      size: number of input values.
    """
    first = np.arange(outputs) * stride - pad
    low = np.maximum(0, -(first // dilation))
    high = np.minimum(taps - 1, ((size - 1) * spread - first) // dilation)
    # From `start` on one in `every` of these taps lies on an input value, or none does.
    common = math.gcd(dilation, spread)
    every = spread // common
    start = (-first // common) * pow(dilation // common, -1, every) % every
    count = (high - start) // every - (low - 1 - start) // every
    return int(np.where((first % common == 0) & (high >= low), count, 0).sum())


def collective_of(program: Program, visit: Visit, layout: Layout) -> Collective | None:
    """The collective that an instruction is or starts; None for any other instruction."""
    instruction, kind = visit.instruction, visit.instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES or visit.repeated:
        return None
    taken = sum(operand.size for operand in program.operands(visit))
    groups = _groups(instruction.attributes, layout.size)
    n = max(map(len, groups))
    size = taken * n if kind == "all-gather" else taken
    # On TPUs an all-reduce whose result is only sliced is inside a fusion of this name and moves half the bytes.
    if kind == "all-reduce" and visit.fused and visit.computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    wire = size if kind == "collective-permute" else size * (n - 1) * (2 if kind == "all-reduce" else 1) // n
    asynchronous = visit.asynchronous or instruction.opcode.endswith("-start")
    return Collective(kind, *layout.moved(groups), asynchronous, 1, size, wire)


def _groups(attributes: str, world: int) -> list[np.ndarray]:
    """The groups of devices that exchange data. XLA has four notations for them."""
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes)
    if pairs:
        return [np.array(pair, int) for pair in re.findall(r"(\d+),(\d+)", pairs[1])]
    listed = re.search(r"replica_groups=\{((?:\{[\d,]+\},?)+)\}", attributes)
    if listed:
        return [np.array(group.split(","), int) for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        devices = np.arange(world).reshape([int(size) for size in iota[3].split(",")])
        order = [int(axis) for axis in iota[4].split(",")] if iota[4] else list(range(devices.ndim))
        return list(devices.transpose(order).reshape(int(iota[1]), int(iota[2])))
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}", attributes)
    # mesh['a'=4,'b'=16] {'b'}: one group for each position on the other axes.
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        names, used = list(sizes), re.findall(r"'(\w+)'", mesh[3])
        devices = _device_ids(mesh[2] or "", world).reshape(list(sizes.values()))
        others = [axis for axis, name in enumerate(names) if name not in used]
        inside = [names.index(name) for name in used]
        return list(devices.transpose(others + inside).reshape(-1, math.prod(sizes[name] for name in used)))
    return [np.arange(world)]


def _device_ids(text: str, world: int) -> np.ndarray:
    """The order of the devices of a mesh: "" for 0, 1, ..., else "[2,4]T(1,0)" or the numbers themselves."""
    turned = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if turned:
        devices = np.arange(world).reshape([int(size) for size in turned[1].split(",")])
        return devices.transpose([int(axis) for axis in turned[2].split(",")]) if turned[2] else devices
    return np.array(text.split(","), int) if text else np.arange(world)


def hbm_bytes(program: Program, visit: Visit) -> int:
    """Bytes that one instruction reads from and writes to HBM. Of a sliced or updated array only that part counts."""
    instruction = visit.instruction
    if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
        return 0
    operands = program.operands(visit)
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * _in_hbm(instruction)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _in_hbm(operands[1])
    if instruction.opcode == "copy-start":
        return sum(array.size for array in instruction.arrays[:2] if array.in_hbm)
    if instruction.opcode != "fusion":
        return _in_hbm(instruction) + sum(map(_in_hbm, operands))
    body = program.computations.get(instruction.called[0], []) if instruction.called else []
    by_name = {inner.name: inner for inner in body}
    parameters = {inner.value: inner for inner in body if inner.opcode == "parameter"}
    total = 0
    for place, operand in enumerate(operands):
        inner = parameters.get(place)
        if any(array.in_hbm for array in operand.arrays):
            total += _read(inner, body, program) if inner is not None else operand.size
    return total + _written(instruction, body, by_name)


def _written(fusion: Instruction, body: Sequence[Instruction], by_name: Mapping[str, Instruction]) -> int:
    """Bytes that a fusion writes. Of a result that is an array with a slice replaced only the slice counts."""
    root = next((inner for inner in body if inner.root), None)
    results = [] if root is None else [root]
    if root is not None and root.opcode == "tuple":
        results = [by_name[name] for name in root.operands]
    if len(results) != len(fusion.arrays):
        return _in_hbm(fusion)
    total = 0
    for result, array in zip(results, fusion.arrays, strict=True):
        while result.opcode == "bitcast" and result.operands[0] in by_name:
            result = by_name[result.operands[0]]
        if result.opcode == "dynamic-update-slice":
            total += by_name[result.operands[1]].size
        elif array.in_hbm:
            total += array.size
    return total


def _read(parameter: Instruction, body: Sequence[Instruction], program: Program) -> int:
    """Bytes that a fusion reads of one parameter. If it is only sliced or updated, only that part counts."""
    by_name = {inner.name: inner for inner in body}
    names, total = [parameter.name], 0
    # The list grows by other names of the parameter.
    for name in names:
        users = [inner for inner in body if name in inner.operands]
        if not users:
            return parameter.size
        for user in users:
            inside = program.computations.get(user.called[0], []) if user.opcode == "fusion" else []
            if user.opcode == "bitcast":
                names.append(user.name)
            elif user.opcode in ("dynamic-slice", "slice", "gather"):
                total += user.size
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                total += by_name[user.operands[1]].size
            elif inside:
                places = [place for place, operand in enumerate(user.operands) if operand == name]
                given = [inner for inner in inside if inner.opcode == "parameter" and inner.value in places]
                total += sum(_read(inner, inside, program) for inner in given)
            else:
                return parameter.size
    return min(parameter.size, total)


def _in_hbm(instruction: Instruction) -> int:
    return sum(array.size for array in instruction.arrays if array.in_hbm)


def _part(program: Program, instruction: Instruction) -> str:
    """The part of the step that an instruction belongs to, by the scope of the instruction or of its main product."""
    body = [
        inner
        for name in (instruction.called if instruction.opcode == "fusion" else ())
        for inner in program.computations.get(name, ())
    ]
    products = [inner for inner in body if inner.opcode in ("dot", "convolution")]
    exchanges = any(inner.opcode.removesuffix("-start") in COLLECTIVES for inner in (instruction, *body))
    if exchanges and not products:
        return "collectives"
    scope = next((inner.scope for inner in products if inner.scope), instruction.scope)
    scope = scope or next((inner.scope for inner in reversed(body) if inner.scope), "")
    scope = scope.partition(";")[0].replace("while/body/closed_call/", "")
    is_product = bool(products) or instruction.opcode in ("dot", "convolution", "custom-call")
    if re.search(r"(?:^|/)optimizer/", scope):
        return "optimiser"
    if not is_product and (instruction.opcode in _MOVING or not scope or scope.rpartition("/")[2] in _MOVES):
        return "copies"
    for part, pattern in _SCOPES:
        if pattern.search(scope):
            return part
    attention = _ATTENTION.search(scope)
    if attention:
        return "projections" if _PROJECTION.search(scope[attention.end() - 1 :]) else "attention core"
    return "projections" if is_product else "other"
