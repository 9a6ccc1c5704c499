"""K/V caches of prompt prefixes, which later prompts with the same prefix reuse.

`PrefixCache` stores prefixes that the prompts of an engine share, `ConversationCache` the turns of
one conversation.
"""

import collections
import functools
from collections.abc import Sequence

import jax
import numpy as np

from diffusiongemma.models.arrays import Params
from diffusiongemma.models.cache import KVCache
from diffusiongemma.sampling import passes
from diffusiongemma.sampling.interface import CausalModel

_MAX_HASHES = 4096  # the number of recent prefixes whose hashes are stored


class PrefixCache:
    """A store of the K/V caches of prompt prefixes that consist of whole blocks of tokens.

    A prompt that is longer than a block is always encoded block by block with the same program, so
    the stored prefixes do not change responses. For each prompt, the longest prefix that it shares
    with an earlier prompt is stored; if there are too many, the least recently used one is
    removed.

    Attributes:
      block: the number of tokens of a block.
      encoded: the number of tokens that were encoded in blocks so far.
      reused: the number of tokens that were taken from stored caches so far.
    """

    def __init__(
        self, model: CausalModel, params: Params, *, block: int, entries: int, capacity: int
    ) -> None:
        """Creates an empty store; nothing is allocated before the first prompt.

        Args:
          model: the model whose causal pass encodes the prompts.
          params: the parameters of the model.
          block: the number of tokens of a block.
          entries: the maximum number of stored caches.
          capacity: the number of tokens that each cache has room for.
        """
        self.block, self.encoded, self.reused = block, 0, 0
        self._model, self._params = model, params
        self._entries, self._capacity = entries, capacity
        self._caches: collections.OrderedDict[tuple[int, ...], KVCache] = collections.OrderedDict()
        self._hashes: collections.OrderedDict[int, None] = collections.OrderedDict()

    def before(self, prompt: Sequence[int]) -> tuple[KVCache | None, int]:
        """Encodes the leading blocks of a prompt, except for those in a stored cache.

        The last token of the prompt is never included.

        Returns:
          The cache of one row, which must not be modified because it may be stored, and the number
          of tokens in it; None and 0 if the prompt is not longer than a block.
        """
        prompt = tuple(prompt)
        ends = range(self.block, len(prompt), self.block)
        shared = max((end for end in ends if hash(prompt[:end]) in self._hashes), default=0)
        for end in ends:
            self._hashes[hash(prompt[:end])] = None
        while len(self._hashes) > _MAX_HASHES:
            self._hashes.popitem(last=False)
        cached = max((end for end in ends if prompt[:end] in self._caches), default=0)
        cache = None
        if cached:
            self._caches.move_to_end(prompt[:cached])
            cache = self._caches[prompt[:cached]]
            self.reused += cached
        for end in ends:
            if end <= cached:
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
        """Stores a cache; if there are too many, removes the least recently used one."""
        self._caches[prefix] = cache
        if len(self._caches) > self._entries:
            self._caches.popitem(last=False)


class ConversationCache:
    """A store of the K/V caches of one conversation, which its next prompt continues.

        cache = ConversationCache(model, params, capacity=engine.capacity)
        engine.submit(prompt, conversation=cache)

    A request with this store reuses the longest stored text that its prompt starts with, and adds
    its prompt and its complete text. Responses are equal up to the order of float sums, because
    the tokens are encoded in different pieces. A cache with sliding windows cannot be shortened
    (see `KVCache`), so one text is stored for each position that a later prompt may continue.

    Attributes:
      capacity: the number of tokens that each cache has room for, equal to that of the engine.
      encoded: the number of prompt tokens that were encoded so far.
      reused: the number of prompt tokens that were taken from stored caches so far.
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
        """Creates an empty store; nothing is allocated before the first prompt.

        Args:
          model: the model whose causal pass encodes the prompts.
          params: the parameters of the model.
          capacity: the maximum number of tokens of a prompt and its response.
          unseen: the number of tokens at the end of each prompt that later prompts do not contain,
            such as an empty thought channel. The tokens before them are encoded separately, and
            their cache is stored.
          multiple: separately encoded tokens are padded to this length times a power of two.
          chunk: the maximum number of tokens per pass, see `SamplingConfig.prefill_chunk`.
        """
        self.capacity, self.encoded, self.reused = capacity, 0, 0
        self._model, self._params, self._unseen = model, params, unseen
        self._multiple, self._chunk = multiple, chunk
        self._caches: dict[tuple[int, ...], KVCache] = {}

    def before(self, prompt: Sequence[int]) -> tuple[KVCache | None, int]:
        """Returns a cache of the longest stored prefix of a prompt.

        The last token of the prompt is never included. With `unseen`, the tokens before the last
        `unseen` ones are encoded and stored first.

        Returns:
          The cache of one row, which must not be modified because it is stored, and the number of
          tokens in it; None and 0 if there is no stored prefix.
        """
        cached, cache = self._longest(prompt[:-1])
        self.reused += cached
        self.encoded += len(prompt) - cached
        end = len(prompt) - self._unseen
        if self._unseen and end > cached:
            if cache is None:
                cache = _empty(self._model, self._params, self.capacity)
            width = padded_width(end - cached, self._multiple, self.capacity)
            tokens = np.zeros((1, width), np.int32)
            tokens[0, : end - cached] = prompt[cached:end]
            lengths = np.array([end - cached], np.int32)
            cache = _encode(self._model, self._params, cache, tokens, lengths, self._chunk)
            self.keep(prompt[:end], cache)
            cached = end
        return cache, cached

    def keep(self, text: Sequence[int], cache: KVCache) -> None:
        """Stores the cache of one row, which contains a text or its first tokens."""
        self._caches[tuple(text[: int(cache.lengths[0])])] = cache

    def held(self, text: Sequence[int]) -> int:
        """Returns the number of leading tokens of a text that are stored."""
        return self._longest(text)[0]

    def forget_but(self, text: Sequence[int]) -> None:
        """Removes all caches except for the one of the longest stored prefix of a text."""
        length, cache = self._longest(text)
        self._caches = {} if cache is None else {tuple(text[:length]): cache}

    def _longest(self, text: Sequence[int]) -> tuple[int, KVCache | None]:
        """Returns the length and the cache of the longest stored prefix of a text."""
        text = tuple(text)
        prefixes = [prefix for prefix in self._caches if prefix == text[: len(prefix)]]
        if not prefixes:
            return 0, None
        longest = max(prefixes, key=len)
        return len(longest), self._caches[longest]


def padded_width(length: int, multiple: int, most: int) -> int:
    """Returns the smallest `multiple` times a power of two that is >= length, at most `most`.

    With few different widths, few shapes are compiled.
    """
    blocks = -(-length // multiple)
    width: int = multiple * 2 ** int(np.ceil(np.log2(blocks)))
    return min(width, most)


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
