"""K/V caches that are kept, so that later prompts which begin with the same tokens go on from them.

`PrefixCache` keeps what the prompts of an engine share, `ConversationCache` the turns of one
conversation.
"""

import collections
import functools
from collections.abc import Sequence

import jax
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
            lengths = np.array([self.block], np.int32)
            cache = _encode(self._model, self._params, cache, tokens, lengths)
            self.encoded += self.block
            if end == shared:
                self._keep(prompt[:end], cache)
        return cache, ends[-1] if len(ends) else 0

    def _keep(self, prefix: tuple[int, ...], cache: KVCache) -> None:
        self._kept[prefix] = cache
        if len(self._kept) > self._entries:
            self._kept.popitem(last=False)


class ConversationCache:
    """The K/V caches of one conversation, from which its next prompt goes on.

        cache = ConversationCache(model, params, capacity=engine.capacity)
        engine.submit(prompt, conversation=cache)

    A request that names it goes on from the longest text in it that its prompt begins with, and
    leaves its prompt and its whole text in it. What is encoded in other pieces is the same up to
    the order of float sums. A cache with windows can't be shortened (`KVCache`), hence a text for
    each place where a later prompt may go on.

    Attributes:
      capacity: tokens that each text has room for, that of the engine.
      encoded: tokens of prompts that were encoded so far.
      reused: tokens of prompts that were not, since they were kept.
    """

    def __init__(
        self,
        model: CausalModel,
        params: Params,
        *,
        capacity: int,
        unseen: int = 0,
        multiple: int = 64,
        chunk: int | None = None,
    ) -> None:
        """Allocates nothing before the first prompt.

        Args:
          model: its causal pass encodes.
          params: its parameters.
          capacity: tokens of a prompt and its response.
          unseen: tokens at the end of each prompt that later prompts do not hold, such as an empty
            thought channel: what is before them is encoded by itself, and kept.
          multiple: what is encoded by itself is padded to this number times a power of two.
          chunk: as `SamplingConfig.prefill_chunk`.
        """
        self.capacity, self.encoded, self.reused = capacity, 0, 0
        self._model, self._params, self._unseen = model, params, unseen
        self._multiple, self._chunk = multiple, chunk
        self._kept: dict[tuple[int, ...], KVCache] = {}

    def before(self, prompt: Sequence[int]) -> tuple[KVCache | None, int]:
        """The cache of one row with a beginning of a prompt that lacks at least the last token.

        Returns:
          The cache, which others read too, and how many tokens it holds; None and 0 where nothing
          is kept that the prompt begins with.
        """
        done, cache = self._longest(prompt[:-1])
        self.reused += done
        self.encoded += len(prompt) - done
        end = len(prompt) - self._unseen
        if self._unseen and end > done:
            if cache is None:
                cache = _empty(self._model, self._params, self.capacity)
            width = padded_width(end - done, self._multiple, self.capacity)
            tokens = np.zeros((1, width), np.int32)
            tokens[0, : end - done] = prompt[done:end]
            lengths = np.array([end - done], np.int32)
            cache = _encode(self._model, self._params, cache, tokens, lengths, self._chunk)
            self.keep(prompt[:end], cache)
            done = end
        return cache, done

    def keep(self, text: Sequence[int], cache: KVCache) -> None:
        """Keeps the cache of one row, which holds a text or its first tokens."""
        self._kept[tuple(text[: int(cache.lengths[0])])] = cache

    def held(self, text: Sequence[int]) -> int:
        """How many of the first tokens of a text are kept."""
        return self._longest(text)[0]

    def forget_but(self, text: Sequence[int]) -> None:
        """Forgets all but the longest beginning of a text."""
        done, cache = self._longest(text)
        self._kept = {} if cache is None else {tuple(text[:done]): cache}

    def _longest(self, text: Sequence[int]) -> tuple[int, KVCache | None]:
        """The longest kept text that another begins with: its length and its cache."""
        text = tuple(text)
        found = [kept for kept in self._kept if kept == text[: len(kept)]]
        if not found:
            return 0, None
        longest = max(found, key=len)
        return len(longest), self._kept[longest]


def padded_width(length: int, multiple: int, most: int) -> int:
    """`multiple` times a power of two, at least `length` and at most `most`: few shapes compile."""
    blocks = -(-length // multiple)
    return min(multiple * 2 ** int(np.ceil(np.log2(blocks))), most)


@functools.partial(jax.jit, static_argnames=('model', 'capacity'))
def _empty(model: CausalModel, params: Params, capacity: int) -> KVCache:
    return passes.empty_cache(model, params, 1, capacity)


@functools.partial(jax.jit, static_argnames=('model', 'chunk'))
def _encode(
    model: CausalModel,
    params: Params,
    cache: KVCache,
    tokens: jax.Array,
    lengths: jax.Array,
    chunk: int | None = None,
) -> KVCache:
    """Appends the first `lengths` [1] of tokens [1, T] to the cache."""
    return passes.prefill(model, params, cache, tokens, lengths, chunk)[1]
