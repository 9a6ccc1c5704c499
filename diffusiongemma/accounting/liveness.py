"""Which buffers of a compiled program are alive at the same time, from its scheduled HLO text.

The text gives instructions in the order in which they run, but not where the compiler put their
results. Here a result takes memory of its own from its instruction to its last use. Views, tuples
and loops pass buffers on, and an elementwise fusion writes over an operand that ends with it, as
the compiler arranges where it can: so the figure is near to the compiler's and not equal to it.
"""

import collections
from collections.abc import Callable

from diffusiongemma.accounting.hlo import Instruction, Program, arrays_of

# Ops whose result lies where an operand lies.
_PASSED_ON = {
    'bitcast', 'get-tuple-element', 'tuple', 'while', 'opt-barrier', 'copy-done', 'async-done',
    'all-gather-done', 'all-reduce-done', 'dynamic-update-slice', 'add-dependency',
}  # fmt: skip
_IN_PLACE = {'fusion', 'add', 'multiply', 'subtract', 'copy'}


def peak_bytes(program: Program, counts: Callable[[str], float]) -> float:
    """Returns the most bytes of buffers beside the arguments that are alive at once.

    Args:
      program: scheduled HLO.
      counts: bytes of an array by its shape as HLO writes it ('f32[8,4]{1,0}'); 0 leaves it out.
    """
    known: dict[str, float] = {}

    def of_computation(name: str) -> float:
        if name not in known:
            known[name] = 0.0
            instructions = program.computations.get(name, [])
            known[name] = _Schedule(instructions, counts, inner).peak()
        return known[name]

    def inner(instruction: Instruction) -> float:
        if instruction.op not in ('while', 'conditional', 'call'):
            return 0.0
        return max((of_computation(name) for name in instruction.called()), default=0.0)

    return of_computation(program.entry)


class _Schedule:
    """The buffers of one computation: a list of arrays for each name, by the buffer they are in."""

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
            if instruction.is_root:  # a loop's result lies where its argument does
                for buffer in self._buffers[instruction.name]:
                    self._size[buffer] = 0.0

    def _results(self, instruction: Instruction, sizes: list[float]) -> list[int]:
        operands = [self._buffers.get(name, []) for name in instruction.operands]
        if instruction.op == 'parameter':
            return [self._new(0.0) for _ in sizes]
        if instruction.op in _PASSED_ON and operands:
            passed = [buffer for buffers in operands for buffer in buffers]
            if instruction.op == 'get-tuple-element':
                index = int(instruction.rest.split('index=')[1].split(',')[0].split(' ')[0])
                first = len(arrays_of(instruction.shape))
                return operands[0][index : index + first] if first == 1 else operands[0]
            return passed[: len(sizes)] if len(passed) >= len(sizes) else passed
        return [self._new(size) for size in sizes]

    def _new(self, size: float) -> int:
        self._size[len(self._size)] = size
        return len(self._size) - 1

    def peak(self) -> float:
        """Goes through the schedule."""
        ending: dict[int, list[int]] = collections.defaultdict(list)
        for buffer, number in self._last.items():
            ending[number].append(buffer)
        alive: set[int] = set()
        now = most = 0.0
        for number, instruction in enumerate(self._instructions):
            ended = [buffer for buffer in ending[number] if buffer in alive]
            made = [b for b in self._buffers[instruction.name] if b not in alive]
            before = sum(self._size[b] for b in ended)
            added = sum(self._size[b] for b in made)
            kept = before if instruction.op not in _IN_PLACE else 0.0
            most = max(most, now + added - before + kept + self._inner(instruction))
            now += added - before
            alive |= set(made)
            alive -= set(ended)
        return most
