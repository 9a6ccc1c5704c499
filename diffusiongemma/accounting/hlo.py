"""Counts the collectives and the memory traffic of a compiled TPU program from its HLO text.

XLA's own `cost_analysis` takes the body of a loop once. This module counts each computation as
often as it runs, if the loop compares its counter with a constant, as all scans do. A loop with an
unknown number of iterations counts once.

The text has no stable grammar. This module relies on `%name = shape op(operands), attributes`, on
the memory space of a shape (`S(1)` is not HBM), and on the three notations of replica groups.
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
# Ops that do not move data themselves.
_FREE = {
    'parameter', 'tuple', 'get-tuple-element', 'bitcast', 'constant', 'while', 'conditional',
    'call', 'after-all', 'iota', 'partition-id', 'replica-id', 'opt-barrier', 'async-update',
}  # fmt: skip


# Ops that read only as many bytes of their first operand as their result has.
_SLICES = ('dynamic-slice', 'slice', 'gather')


class Instruction(NamedTuple):
    """An instruction, which is one line of HLO.

    Attributes:
      name: the name of its result.
      is_root: whether its result is that of the computation.
      shape: the shape of its result as HLO writes it, which may be a tuple.
      op: the operation, such as 'fusion'.
      operands: the names of its operands.
      tail: the end of the line, with operands and attributes.
    """

    name: str
    is_root: bool
    shape: str
    op: str
    operands: tuple[str, ...]
    tail: str

    def called(self) -> list[str]:
        """Returns the names of the computations that the instruction runs."""
        names = re.findall(r'(?:calls|to_apply|body|condition)=%?([\w.\-]+)', self.tail)
        for group in re.findall(r'branch_computations=\{([^}]*)\}', self.tail):
            names += re.findall(r'%([\w.\-]+)', group)
        return names

    @property
    def channel(self) -> str:
        """Returns the channel of a collective, or '' if it has none."""
        match = re.search(r'channel_id=(\d+)', self.tail)
        return match[1] if match else ''


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind along the same mesh axes.

    Attributes:
      kind: the operation, such as 'all-gather'.
      axes: the names of the mesh axes, joined by '+'.
      count: the number of collectives that run.
      sent_bytes: the bytes that one device sends in all of them, with ring algorithms.
    """

    kind: str
    axes: str
    count: int
    sent_bytes: float


class Program:
    """A compiled module, parsed from its HLO text.

    Attributes:
      computations: the instructions of each computation by its name, in the order of the text.
      entry: the name of the computation that runs first.
    """

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
                root, name, shape, op, tail = match.groups()
                operands = tuple(re.findall(r'%([\w.\-]+)', _argument_list(tail)))
                current.append(Instruction(name, bool(root), shape, op, operands, tail))

    @functools.cached_property
    def runs(self) -> dict[str, int]:
        """Returns the number of times that each computation runs."""
        counts: dict[str, int] = collections.Counter()
        pending = [(self.entry, 1)]
        while pending:
            name, times = pending.pop()
            counts[name] += times
            for instruction in self.computations.get(name, ()):
                inner = times * self.trips(instruction)
                pending += [(called, inner) for called in instruction.called()]
        return dict(counts)

    def trips(self, instruction: Instruction) -> int:
        """Returns the number of iterations of a loop, or 1 if it is not known.

        It is known from an attribute of the loop, or if the condition is `counter < constant`.
        """
        if match := re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.tail):
            return int(match[1])
        condition = re.search(r'condition=%?([\w.\-]+)', instruction.tail)
        body = self.computations.get(condition[1], []) if condition else []
        limits = [
            int(match[1])
            for instruction in body
            if instruction.op == 'constant' and instruction.shape.startswith('s32[]')
            if (match := re.match(r'(\d+)\)', instruction.tail))
        ]
        less = any('direction=LT' in instruction.tail for instruction in body)
        return limits[0] if less and len(limits) == 1 else 1

    def collectives(self, mesh_shape: Mapping[str, int]) -> list[Collective]:
        """Returns the collectives by kind and mesh axes, sorted by descending sent bytes.

        Args:
          mesh_shape: the size of each mesh axis, in the order of the mesh.
        """
        counted, shared = set(), self._shared_channels()
        totals: dict[tuple[str, str], tuple[int, float]] = {}
        for name, instructions in self.computations.items():
            if not self.runs.get(name):
                continue
            for instruction in instructions:
                kind, channel = instruction.op.removesuffix('-start'), instruction.channel
                # A collective that overlaps with other work appears in several computations.
                if kind not in _COLLECTIVES or channel in counted:
                    continue
                if channel and channel not in shared:
                    counted.add(channel)
                axes, size = _group_axes(instruction.tail, mesh_shape)
                if size == 1:
                    continue
                # An all-reduce whose result is split over the devices is one fused computation.
                if name.startswith('all-reduce-scatter'):
                    kind = 'reduce-scatter'
                shapes = {i.name: i.shape for i in instructions}
                operands = sum(_bytes(shapes.get(x, '')) for x in instruction.operands)
                # The result of an asynchronous start holds the operand too.
                largest = max(_bytes(part) for part in arrays_of(instruction.shape))
                sent = _sent_bytes(kind, operands or largest, largest, size)
                count, sent_bytes = totals.get((kind, axes), (0, 0.0))
                runs = self.runs[name]
                totals[kind, axes] = (count + runs, sent_bytes + runs * sent)
        collectives = [Collective(*key, *total) for key, total in totals.items()]
        return sorted(collectives, key=lambda collective: -collective.sent_bytes)

    def _shared_channels(self) -> set[str]:
        """Returns the channels that several collectives of one computation use, as in shard_map."""
        shared = set()
        for instructions in self.computations.values():
            used = [i.channel for i in instructions if not i.op.endswith('-done')]
            shared |= {channel for channel in used if channel and used.count(channel) > 1}
        return shared

    def hbm_bytes(self) -> float:
        """Returns the HBM traffic in bytes: operands and results of each operation count once."""
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
        """Returns the HBM bytes of one operation; slices read only the bytes of their result."""
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
            inner_shapes = {i.name: i.shape for i in inner}
            return sum(self._traffic(i, inner_shapes) for i in inner if i.op not in _FREE)
        if instruction.op != 'fusion' or not inner:
            operands = sum(_bytes(shapes.get(x, ''), hbm=True) for x in instruction.operands)
            return operands + _bytes(instruction.shape, hbm=True)
        return _fusion_reads(inner, instruction, shapes) + _fusion_writes(inner, instruction)


def _fusion_reads(
    inner: list[Instruction], fusion: Instruction, shapes: Mapping[str, str]
) -> float:
    """Returns the HBM bytes that a fusion reads."""
    total = 0.0
    parameters = {i.name: int(i.tail.split(')')[0]) for i in inner if i.op == 'parameter'}
    for name, number in parameters.items():
        if number >= len(fusion.operands):
            continue
        full = _bytes(shapes.get(fusion.operands[number], ''), hbm=True)
        users = [i for i in inner if name in i.operands]
        if full and users and all(i.op in _SLICES and i.operands[0] == name for i in users):
            full = min(full, sum(_bytes(i.shape) for i in users))
        elif users and all(i.op == 'dynamic-update-slice' and i.operands[0] == name for i in users):
            full = 0  # written in place
        total += full
    return total


def _fusion_writes(inner: list[Instruction], fusion: Instruction) -> float:
    """Returns the HBM bytes that a fusion writes; in-place updates write only the new part."""
    by_name = {i.name: i for i in inner}
    roots = [i for i in inner if i.is_root]
    if roots and roots[0].op == 'tuple':
        roots = [by_name[name] for name in roots[0].operands if name in by_name]
    updates = [i for i in roots if i.op == 'dynamic-update-slice']
    if len(updates) == len(roots):
        return sum(_bytes(by_name[i.operands[1]].shape) for i in updates if len(i.operands) > 1)
    return _bytes(fusion.shape, hbm=True)


def _argument_list(tail: str) -> str:
    """Returns the text before the parenthesis that closes the operands."""
    depth = 1
    for place, character in enumerate(tail):
        depth += (character == '(') - (character == ')')
        if not depth:
            return tail[:place]
    return tail


def arrays_of(shape: str) -> list[str]:
    """Returns the arrays of a shape, which may be a tuple."""
    return [match[0] for match in _SHAPE.finditer(shape)] or ['']


def dimensions(shape: str) -> list[int]:
    """Returns the sizes of an array's dimensions; the list is empty for a scalar."""
    match = _SHAPE.search(shape)
    return [int(size) for size in match[2].split(',') if size] if match else []


def _bytes(shape: str, *, hbm: bool = False) -> float:
    """Returns the bytes of all arrays of a shape, or only of those in HBM."""
    total = 0.0
    for match in _SHAPE.finditer(shape):
        dtype, sizes, layout = match.groups()
        if hbm and layout and re.search(r'S\([1-9]\d*\)', layout):
            continue
        bits = _BITS.get(dtype, 8 if dtype.startswith('f8') else 0)
        total += bits / 8 * math.prod(int(size) for size in sizes.split(',') if size)
    return total


def _sent_bytes(kind: str, operand: float, result: float, size: int) -> float:
    """Returns the bytes that each of `size` devices sends with a ring algorithm."""
    share = (size - 1) / size
    if kind == 'all-gather':
        return result * share
    if kind == 'all-reduce':
        return 2 * operand * share
    if kind in ('collective-permute', 'collective-broadcast'):
        return operand
    return operand * share


def _group_axes(tail: str, mesh_shape: Mapping[str, int]) -> tuple[str, int]:
    """Returns the mesh axes along which a collective runs, and the number of devices in a group."""
    groups = list(_groups(tail, math.prod(mesh_shape.values())))
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


def _groups(tail: str, num_devices: int) -> Iterator[list[int]]:
    """Yields groups of device numbers from replica groups, or the pairs of a permutation."""
    if match := re.search(r'(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}', tail):
        for group in re.findall(r'\{([\d,]*)\}', match[1]):
            yield [int(number) for number in group.split(',') if number]
    elif match := re.search(r'replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)', tail):
        shape, _, iota = match[1].partition('<=')
        yield from _iota(iota).reshape(_numbers(shape)).tolist()
    elif match := re.search(
        r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^ ]*)\))? \{([^}]*)\}', tail
    ):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        ids = _iota(match[2]) if match[2] else np.arange(num_devices)
        along = [list(axes).index(name) for name in re.findall(r"'(\w+)'", match[3])]
        places = np.moveaxis(ids.reshape(list(axes.values())), along, range(-len(along), 0))
        size = math.prod(list(axes.values())[i] for i in along)
        yield from places.reshape(-1, size).tolist()


def _iota(text: str) -> np.ndarray:
    """Returns 0, 1, ... as an array from '[2,4]T(1,0)', which is [2, 4] and then transposed."""
    sizes, _, order = text.partition('T(')
    shape = _numbers(sizes)
    array = np.arange(math.prod(shape)).reshape(shape)
    return array.transpose(_numbers(order)) if order else array


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r'\d+', text)]
