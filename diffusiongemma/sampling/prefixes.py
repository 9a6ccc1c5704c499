"""Beginnings that prompts share are encoded once: their K/V caches are kept."""

import collections
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from diffusiongemma.models.arrays import Params
from diffusiongemma.models.cache import KVCache
from diffusiongemma.sampling import passes
from diffusiongemma.sampling.passes import CausalModel

_SEEN = 4096  # beginnings that are remembered, as hashes


class PrefixCache:
    """The K/V caches of some beginnings of prompts, each of whole blocks of tokens.

    A prompt that is longer than a block is always encoded block by block, by one program, whether
    its beginning is kept or not: so what is kept changes no response. Kept is the longest
    beginning that a prompt shares with an earlier one; of too many, the one unused for longest
    goes.

    Attributes:
      block: tokens of a block.
      encoded: tokens of blocks that were encoded so far.
      reused: tokens of blocks that were not, since they were kept.
    """

    def __init__(
        self, model: CausalModel, params: Params, *, block: int, entries: int, capacity: int
    ) -> None:
        """Allocates nothing before the first prompt.

        Args:
          model: its causal pass encodes.
          params: its parameters.
          block: tokens of a block.
          entries: caches to keep.
          capacity: tokens that each of them has room for.
        """
        self.block, self.encoded, self.reused = block, 0, 0
        self._model, self._params = model, params
        self._entries, self._capacity = entries, capacity
        self._kept: collections.OrderedDict[tuple[int, ...], KVCache] = collections.OrderedDict()
        self._seen: collections.OrderedDict[int, None] = collections.OrderedDict()

    def before(self, prompt: Sequence[int]) -> tuple[KVCache | None, int]:
        """The cache of one row with all blocks of a prompt but the last tokens, at least one.

        Returns:
          The cache, which others read too, and how many tokens it holds; None and 0 where the
          prompt is no longer than a block.
        """
        prompt = tuple(prompt)
        ends = range(self.block, len(prompt), self.block)
        shared = max((end for end in ends if hash(prompt[:end]) in self._seen), default=0)
        for end in ends:
            self._seen[hash(prompt[:end])] = None
        while len(self._seen) > _SEEN:
            self._seen.popitem(last=False)
        done = max((end for end in ends if prompt[:end] in self._kept), default=0)
        cache = None
        if done:
            self._kept.move_to_end(prompt[:done])
            cache = self._kept[prompt[:done]]
            self.reused += done
        for end in ends:
            if end <= done:
                continue
            if cache is None:
                cache = _empty(self._model, self._params, self._capacity)
            tokens = np.asarray(prompt[end - self.block : end], np.int32)[None]
            cache = _encode(self._model, self._params, cache, tokens)
            self.encoded += self.block
            if end == shared:
                self._keep(prompt[:end], cache)
        return cache, ends[-1] if len(ends) else 0

    def _keep(self, prefix: tuple[int, ...], cache: KVCache) -> None:
        self._kept[prefix] = cache
        if len(self._kept) > self._entries:
            self._kept.popitem(last=False)


@functools.partial(jax.jit, static_argnames=('model', 'capacity'))
def _empty(model: CausalModel, params: Params, capacity: int) -> KVCache:
    return passes.empty_cache(model, params, 1, capacity)


@functools.partial(jax.jit, static_argnames='model')
def _encode(model: CausalModel, params: Params, cache: KVCache, tokens: jax.Array) -> KVCache:
    """Appends tokens [1, T] to the cache."""
    lengths = jnp.full((1,), tokens.shape[1], jnp.int32)
    return passes.prefill(model, params, cache, tokens, lengths)[1]
