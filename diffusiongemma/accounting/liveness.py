"""Finds the buffers of a compiled program that are alive at once, from its scheduled HLO text.

The text lists instructions in the order in which they run, but not the addresses of their results.
This module assumes that a result occupies a separate buffer from its instruction until its last
use, that views, tuples and loops pass buffers on, and that an elementwise fusion reuses the buffer
of an operand that has no later use. The compiler does the same where it can, so the result is close
to the compiler's, but not equal to it.
"""

import collections
from collections.abc import Callable

from diffusiongemma.accounting.hlo import Instruction, Program, arrays_of

# Ops whose result is in the buffer of an operand.
_PASSED_ON = {
    'bitcast', 'get-tuple-element', 'tuple', 'while', 'opt-barrier', 'copy-done', 'async-done',
    'all-gather-done', 'all-reduce-done', 'dynamic-update-slice', 'add-dependency',
}  # fmt: skip
# Ops that may write their result into the buffer of an operand that has no later use.
_IN_PLACE = {'fusion', 'add', 'multiply', 'subtract', 'copy'}


def peak_bytes(program: Program, counts: Callable[[str], float]) -> float:
    """Returns the maximum bytes of buffers that are alive at once, without the arguments.

    Args:
      program: the scheduled HLO.
      counts: returns the bytes of an array from its shape as HLO writes it ('f32[8,4]{1,0}'), or 0
        for an array that does not count.
    """
    peaks: dict[str, float] = {}

    def computation_peak(name: str) -> float:
        if name not in peaks:
            peaks[name] = 0.0
            instructions = program.computations.get(name, [])
            peaks[name] = _Schedule(instructions, counts, inner).peak()
        return peaks[name]

    def inner(instruction: Instruction) -> float:
        if instruction.op not in ('while', 'conditional', 'call'):
            return 0.0
        return max((computation_peak(name) for name in instruction.called()), default=0.0)

    return computation_peak(program.entry)


class _Schedule:
    """The buffers of one computation.

    It maps the name of each instruction to the buffers of the arrays of its result.
    """

    def __init__(
        self,
        instructions: list[Instruction],
        counts: Callable[[str], float],
        inner: Callable[[Instruction], float],
    ) -> None:
        self._instructions = instructions
        self._inner = inner
        self._buffers: dict[str, list[int]] = {}
        self._size: dict[int, float] = {}
        self._last: dict[int, int] = {}
        for number, instruction in enumerate(instructions):
            sizes = [counts(shape) for shape in arrays_of(instruction.shape)]
            self._buffers[instruction.name] = self._results(instruction, sizes)
            for name in instruction.operands:
                for buffer in self._buffers.get(name, ()):
                    self._last[buffer] = number
        for instruction in instructions:
            if instruction.is_root:  # the result of a loop is in the buffer of its argument
                for buffer in self._buffers[instruction.name]:
                    self._size[buffer] = 0.0

    def _results(self, instruction: Instruction, sizes: list[float]) -> list[int]:
        """Returns the buffers of an instruction's results, which are new or an operand's."""
        operands = [self._buffers.get(name, []) for name in instruction.operands]
        if instruction.op == 'parameter':
            return [self._new(0.0) for _ in sizes]
        if instruction.op in _PASSED_ON and operands:
            passed = [buffer for buffers in operands for buffer in buffers]
            if instruction.op == 'get-tuple-element':
                index = int(instruction.tail.split('index=')[1].split(',')[0].split(' ')[0])
                first = len(arrays_of(instruction.shape))
                return operands[0][index : index + first] if first == 1 else operands[0]
            return passed[: len(sizes)]
        return [self._new(size) for size in sizes]

    def _new(self, size: float) -> int:
        """Returns a new buffer with a number of bytes."""
        self._size[len(self._size)] = size
        return len(self._size) - 1

    def peak(self) -> float:
        """Returns the maximum bytes that are alive at once."""
        ending: dict[int, list[int]] = collections.defaultdict(list)
        for buffer, number in self._last.items():
            ending[number].append(buffer)
        alive: set[int] = set()
        now = most = 0.0
        for number, instruction in enumerate(self._instructions):
            dying = [buffer for buffer in ending[number] if buffer in alive]
            new = [b for b in self._buffers[instruction.name] if b not in alive]
            freed_bytes = sum(self._size[b] for b in dying)
            new_bytes = sum(self._size[b] for b in new)
            kept_bytes = freed_bytes if instruction.op not in _IN_PLACE else 0.0
            most = max(most, now + new_bytes - freed_bytes + kept_bytes + self._inner(instruction))
            now += new_bytes - freed_bytes
            alive |= set(new)
            alive -= set(dying)
        return most
