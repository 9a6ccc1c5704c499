"""Sets of characters as ranges of code points, and their conversion to UTF-8 byte ranges.

Surrogates (U+D800 to U+DFFF) cannot be encoded in UTF-8 and belong to no set.
"""

import functools
from collections.abc import Iterable, Iterator

Ranges = tuple[tuple[int, int], ...]

MAX_CODE_POINT = 0x10FFFF
SURROGATES = (0xD800, 0xDFFF)


def complement(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Returns the characters outside the ranges, which may overlap and be in any order."""
    result, start = [], 0
    beyond = (MAX_CODE_POINT + 1, MAX_CODE_POINT + 1)
    for low, high in sorted([*ranges, SURROGATES, beyond]):
        if start < low:
            result.append((start, low - 1))
        start = max(start, high + 1)
    return tuple(result)


def normalized(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Returns the same characters as sorted ranges that do not touch, without surrogates."""
    return complement(complement(ranges))


@functools.cache
def products(ranges: Ranges) -> tuple[Ranges, ...]:
    """Returns the UTF-8 encodings of the characters as products of byte ranges, one per byte."""
    return tuple(bytes_ for low, high in ranges for bytes_ in _products(low, high))


def _products(low: int, high: int) -> Iterator[Ranges]:
    """Yields the UTF-8 encodings of a range of code points as products of byte ranges.

    A range is one product if its ends have the same number of bytes and, after the first byte in
    which they differ, cover every possible byte.
    """
    cuts = [limit for limit in (0x7F, 0x7FF, 0xFFFF) if low <= limit < high]
    for bits in (6, 12, 18):  # each byte after the first holds 6 bits
        mask = (1 << bits) - 1
        if not cuts and low & ~mask != high & ~mask:
            if low & mask:
                cuts = [low | mask]
            elif high & mask != mask:
                cuts = [(high & ~mask) - 1]
    if cuts:
        yield from _products(low, cuts[0])
        yield from _products(cuts[0] + 1, high)
    else:
        yield tuple(zip(chr(low).encode(), chr(high).encode(), strict=True))
