"""What a compiled TPU program moves, read from its HLO text: collectives and memory traffic.

XLA's own `cost_analysis` takes the body of a loop once. Here each computation counts as often as
it runs, where the loop compares its counter with a constant, which all scans do; a loop whose end
is not known counts once.

The text has no stable grammar. What is read of it: `%name = shape op(operands), attributes`, the
memory space of a shape (`S(1)`: not HBM), and replica groups in their three notations.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

_BITS = {
    'pred': 8, 's4': 4, 'u4': 4, 's8': 8, 'u8': 8, 's16': 16, 'u16': 16, 's32': 32, 'u32': 32,
    's64': 64, 'u64': 64, 'bf16': 16, 'f16': 16, 'f32': 32, 'f64': 64, 'c64': 64,
}  # fmt: skip
_SHAPE = re.compile(r'\b([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\](\{[^}]*\})?')
_HEADER = re.compile(r'^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$')
_INSTRUCTION = re.compile(r'^\s*(ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$')
_COLLECTIVES = (
    'all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all',
    'collective-permute', 'collective-broadcast',
)  # fmt: skip
# Ops that move nothing themselves.
_FREE = {
    'parameter', 'tuple', 'get-tuple-element', 'bitcast', 'constant', 'while', 'conditional',
    'call', 'after-all', 'iota', 'partition-id', 'replica-id', 'opt-barrier', 'async-update',
}  # fmt: skip


# Ops that read no more of their first operand than their result.
_PICKS = ('dynamic-slice', 'slice', 'gather')


class Instruction(NamedTuple):
    """A line of HLO."""

    name: str
    is_root: bool
    shape: str
    op: str
    operands: tuple[str, ...]
    rest: str  # operands and attributes as they stand

    def called(self) -> list[str]:
        """Computations that it runs."""
        names = re.findall(r'(?:calls|to_apply|body|condition)=%?([\w.\-]+)', self.rest)
        for group in re.findall(r'branch_computations=\{([^}]*)\}', self.rest):
            names += re.findall(r'%([\w.\-]+)', group)
        return names

    @property
    def channel(self) -> str:
        """The channel of a collective; empty where it has none."""
        match = re.search(r'channel_id=(\d+)', self.rest)
        return match[1] if match else ''


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind over the same mesh axes.

    Attributes:
      kind: 'all-gather', ...
      axes: of the mesh, joined by '+'.
      count: how many run.
      sent_bytes: by one device in all of them, with ring algorithms.
    """

    kind: str
    axes: str
    count: int
    sent_bytes: float


class Program:
    """The text of a compiled module."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ''
        current: list[Instruction] = []
        for line in text.splitlines():
            header = _HEADER.match(line)
            if header:
                current = self.computations.setdefault(header[1], [])
                if line.startswith('ENTRY'):
                    self.entry = header[1]
            elif match := _INSTRUCTION.match(line):
                root, name, shape, op, rest = match.groups()
                operands = tuple(re.findall(r'%([\w.\-]+)', _argument_list(rest)))
                current.append(Instruction(name, bool(root), shape, op, operands, rest))

    @functools.cached_property
    def runs(self) -> dict[str, int]:
        """How often each computation runs."""
        counts: dict[str, int] = collections.Counter()
        pending = [(self.entry, 1)]
        while pending:
            name, times = pending.pop()
            counts[name] += times
            for instruction in self.computations.get(name, ()):
                inner = times * (self.trips(instruction))
                pending += [(called, inner) for called in instruction.called()]
        return dict(counts)

    def trips(self, instruction: Instruction) -> int:
        """How often a loop runs that says so or whose condition is `counter < constant`; else 1."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.rest):
            return int(known[1])
        condition = re.search(r'condition=%?([\w.\-]+)', instruction.rest)
        body = self.computations.get(condition[1], []) if condition else []
        limits = [
            int(match[1])
            for instruction in body
            if instruction.op == 'constant' and instruction.shape.startswith('s32[]')
            if (match := re.match(r'(\d+)\)', instruction.rest))
        ]
        less = any('direction=LT' in instruction.rest for instruction in body)
        return limits[0] if less and len(limits) == 1 else 1

    def collectives(self, mesh_shape: Mapping[str, int]) -> list[Collective]:
        """What the devices send to each other, by kind and mesh axes, the most first.

        Args:
          mesh_shape: axes of the mesh and their sizes, in its order.
        """
        seen, shared = set(), self._shared_channels()
        totals: dict[tuple, list] = collections.defaultdict(lambda: [0, 0.0])
        for name, instructions in self.computations.items():
            if not self.runs.get(name):
                continue
            for instruction in instructions:
                kind, channel = instruction.op.removesuffix('-start'), instruction.channel
                # Overlapped with other work, one collective stands in several computations.
                if kind not in _COLLECTIVES or channel in seen:
                    continue
                if channel and channel not in shared:
                    seen.add(channel)
                axes, size = _group_axes(instruction.rest, mesh_shape)
                if size == 1:
                    continue
                # An all-reduce of which each device keeps a part is one fused computation.
                if name.startswith('all-reduce-scatter'):
                    kind = 'reduce-scatter'
                shapes = {i.name: i.shape for i in instructions}
                operands = sum(_bytes(shapes.get(x, '')) for x in instruction.operands)
                # The result of an asynchronous start holds the operand too.
                largest = max(_bytes(part) for part in arrays_of(instruction.shape))
                sent = _sent_bytes(kind, operands or largest, largest, size)
                total = totals[kind, axes]
                total[0] += self.runs[name]
                total[1] += self.runs[name] * sent
        found = [Collective(*key, *total) for key, total in totals.items()]
        return sorted(found, key=lambda collective: -collective.sent_bytes)

    def _shared_channels(self) -> set[str]:
        """Channels that several collectives of one computation use, as those of a shard_map do."""
        shared = set()
        for instructions in self.computations.values():
            used = [i.channel for i in instructions if not i.op.endswith('-done')]
            shared |= {channel for channel in used if channel and used.count(channel) > 1}
        return shared

    def hbm_bytes(self) -> float:
        """Bytes read from and written to HBM, each operand and result of each operation once."""
        fused = {
            called
            for instructions in self.computations.values()
            for instruction in instructions
            if instruction.op not in ('while', 'conditional', 'call')
            for called in instruction.called()
        }
        return float(
            sum(
                self.runs.get(name, 0) * self._traffic(instruction, shapes)
                for name, instructions in self.computations.items()
                if name not in fused
                for shapes in [{i.name: i.shape for i in instructions}]
                for instruction in instructions
                if instruction.op not in _FREE and not instruction.op.endswith('-done')
            )
        )

    def _traffic(self, instruction: Instruction, shapes: Mapping[str, str]) -> float:
        """HBM bytes of one operation, of which slices touch only what they cut out."""
        if instruction.op in ('dynamic-slice', 'slice'):
            return _bytes(instruction.shape) + _bytes(instruction.shape, hbm=True)
        if instruction.op == 'slice-start':  # (operands, result, context)
            result = arrays_of(instruction.shape)[len(instruction.operands)]
            return _bytes(result) + _bytes(result, hbm=True)
        if instruction.op == 'dynamic-update-slice':
            return 2 * _bytes(shapes.get(instruction.operands[1], ''), hbm=True)
        if instruction.op == 'copy-start':  # (destination, source, context)
            return sum(_bytes(part, hbm=True) for part in arrays_of(instruction.shape)[:2])
        inner = self.computations.get((instruction.called() or [''])[0], [])
        if instruction.op == 'async-start':  # its result holds its operands too
            own = {i.name: i.shape for i in inner}
            return sum(self._traffic(i, own) for i in inner if i.op not in _FREE)
        if instruction.op != 'fusion' or not inner:
            operands = sum(_bytes(shapes.get(x, ''), hbm=True) for x in instruction.operands)
            return operands + _bytes(instruction.shape, hbm=True)
        return _fusion_reads(inner, instruction, shapes) + _fusion_writes(inner, instruction)


def _fusion_reads(
    inner: list[Instruction], fusion: Instruction, shapes: Mapping[str, str]
) -> float:
    total = 0.0
    parameters = {i.name: int(i.rest.split(')')[0]) for i in inner if i.op == 'parameter'}
    for name, number in parameters.items():
        if number >= len(fusion.operands):
            continue
        full = _bytes(shapes.get(fusion.operands[number], ''), hbm=True)
        users = [i for i in inner if name in i.operands]
        if full and users and all(i.op in _PICKS and i.operands[0] == name for i in users):
            full = min(full, sum(_bytes(i.shape) for i in users))
        elif users and all(i.op == 'dynamic-update-slice' and i.operands[0] == name for i in users):
            full = 0  # written in place
        total += full
    return total


def _fusion_writes(inner: list[Instruction], fusion: Instruction) -> float:
    by_name = {i.name: i for i in inner}
    roots = [i for i in inner if i.is_root]
    if roots and roots[0].op == 'tuple':
        roots = [by_name[name] for name in roots[0].operands if name in by_name]
    updates = [i for i in roots if i.op == 'dynamic-update-slice']
    if len(updates) == len(roots):
        return sum(_bytes(by_name[i.operands[1]].shape) for i in updates if len(i.operands) > 1)
    return _bytes(fusion.shape, hbm=True)


def _argument_list(rest: str) -> str:
    """What stands before the parenthesis that closes the operands."""
    depth = 1
    for place, character in enumerate(rest):
        depth += (character == '(') - (character == ')')
        if not depth:
            return rest[:place]
    return rest


def arrays_of(shape: str) -> list[str]:
    """The arrays of a shape, which may be a tuple."""
    return [match[0] for match in _SHAPE.finditer(shape)] or ['']


def dimensions(shape: str) -> list[int]:
    """Sizes of an array's dimensions; none for a scalar."""
    match = _SHAPE.search(shape)
    return [int(size) for size in match[2].split(',') if size] if match else []


def _bytes(shape: str, *, hbm: bool = False) -> float:
    """Of all arrays of a shape, or of those in HBM."""
    total = 0.0
    for match in _SHAPE.finditer(shape):
        dtype, sizes, layout = match.groups()
        if hbm and layout and re.search(r'S\([1-9]\d*\)', layout):
            continue
        bits = _BITS.get(dtype, 8 if dtype.startswith('f8') else 0)
        total += bits / 8 * math.prod(int(size) for size in sizes.split(',') if size)
    return total


def _sent_bytes(kind: str, operand: float, result: float, size: int) -> float:
    """What one of `size` devices sends in a ring."""
    share = (size - 1) / size
    if kind == 'all-gather':
        return result * share
    if kind == 'all-reduce':
        return 2 * operand * share
    if kind in ('collective-permute', 'collective-broadcast'):
        return operand
    return operand * share


def _group_axes(rest: str, mesh_shape: Mapping[str, int]) -> tuple[str, int]:
    """The mesh axes along which a collective runs, and the devices in a group."""
    groups = list(_groups(rest, math.prod(mesh_shape.values())))
    if not groups:
        return '+'.join(name for name, size in mesh_shape.items() if size > 1), math.prod(
            mesh_shape.values()
        )
    varying, sizes = set(), list(mesh_shape.values())
    for group in groups:
        places = np.array(np.unravel_index(np.asarray(group), sizes))
        varying |= set(np.flatnonzero((places != places[:, :1]).any(axis=1)).tolist())
    names = [name for i, name in enumerate(mesh_shape) if i in varying]
    return '+'.join(names), max(map(len, groups))


def _groups(rest: str, num_devices: int) -> Iterator[list[int]]:
    """Groups of device numbers: of replica_groups, or the pairs of a permutation."""
    if match := re.search(r'(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}', rest):
        for group in re.findall(r'\{([\d,]*)\}', match[1]):
            yield [int(number) for number in group.split(',') if number]
    elif match := re.search(r'replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)', rest):
        shape, _, iota = match[1].partition('<=')
        yield from _iota(iota).reshape(_numbers(shape)).tolist()
    elif match := re.search(
        r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^ ]*)\))? \{([^}]*)\}', rest
    ):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        ids = _iota(match[2]) if match[2] else np.arange(num_devices)
        along = [list(axes).index(name) for name in re.findall(r"'(\w+)'", match[3])]
        places = np.moveaxis(ids.reshape(list(axes.values())), along, range(-len(along), 0))
        size = math.prod(list(axes.values())[i] for i in along)
        yield from places.reshape(-1, size).tolist()


def _iota(text: str) -> np.ndarray:
    """'[2,4]T(1,0)': 0.. in that shape, transposed."""
    sizes, _, order = text.partition('T(')
    shape = _numbers(sizes)
    array = np.arange(math.prod(shape)).reshape(shape)
    return array.transpose(_numbers(order)) if order else array


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r'\d+', text)]
