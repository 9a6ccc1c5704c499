"""Generates the teacher's answers to batches of prompts, and its distributions for each token."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusiongemma.data.packing import RESPONSE_IDS, Document, tokenize
from diffusiongemma.data.sources import DataSpec
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.distillation.teacher import TopKDistribution
from diffusiongemma.errors import check_range
from diffusiongemma.models.transformer import Gemma
from diffusiongemma.parallel import batch_sharding, param_shardings, processes
from diffusiongemma.sampling import Sampler, SamplingConfig, decode_responses, pad_prompts

Example = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class TargetsConfig:
    """Settings for the teacher's answers (`config.targets`).

    Attributes:
      source: the prompts. The responses of the source are ignored unless `sequence_level` is
        False.
      batch_size: the number of prompts answered at once, over all devices; a multiple of
        data x fsdp x expert of the mesh.
      max_new_tokens: the maximum length of an answer, including thoughts; longer answers are
        dropped, not truncated, unless `keep_unfinished` is set.
      temperature: the sampling temperature; 0 is greedy.
      prompt_multiple: prompts are padded to a multiple of this number of tokens, which limits the
        number of compiled programs.
      top_k_logits: k, the number of most likely teacher tokens that are stored for each token of a
        response; training then needs no teacher in memory. 0 stores none.
      sequence_level: True trains on the teacher's answers. False trains on the responses of the
        source, for an ablation or if these already come from the teacher.
      keep_unfinished: keeps answers that reach max_new_tokens without a stop token. A pretrained
        model continues a text and rarely ends it. The examples then store token ids.
    """

    source: DataSpec
    batch_size: int = 128
    max_new_tokens: int = 256
    temperature: float = 0.0
    prompt_multiple: int = 64
    top_k_logits: int = 0
    sequence_level: bool = True
    keep_unfinished: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.source, DataSpec):
            object.__setattr__(self, 'source', DataSpec.from_config(self.source))
        for name, least in (('batch_size', 1), ('prompt_multiple', 1), ('top_k_logits', 0)):
            check_range(name, getattr(self, name), least)
        check_range('max_new_tokens', self.max_new_tokens, 1)
        check_range('temperature', self.temperature, 0)


class Answerer:
    """A generator of answers on a mesh, with sharded parameters and batches sharded by rows."""

    def __init__(
        self,
        model: Gemma,
        params: Any,
        tokenizer: Tokenizer,
        config: TargetsConfig,
        mesh: jax.sharding.Mesh,
        seed: int,
    ) -> None:
        """Places the parameters on the mesh.

        Raises:
          ValueError: if the mesh does not divide the batch.
        """
        self._model, self._tokenizer, self._config = model, tokenizer, config
        self._rows = batch_sharding(mesh, config.batch_size)
        self._params = processes.in_shards(params, param_shardings(model, mesh))
        self._key = jax.random.key(seed)
        sampling = SamplingConfig.for_tokenizer(
            tokenizer, max_new_tokens=config.max_new_tokens, temperature=config.temperature
        )
        self._sampler = Sampler(model, sampling, mode='autoregressive')

    def __call__(
        self, indices: Sequence[int], examples: Sequence[Mapping[str, Any]]
    ) -> tuple[list[Example], int]:
        """Answers up to `batch_size` prompts.

        Args:
          indices: the indices of the prompts in their source; an answer depends only on the seed
            and the index of its prompt.
          examples: the examples {'prompt', 'response', ...}.

        Returns:
          The usable examples {'index', 'prompt', 'response'}, with `TEACHER_KEYS` (see
          `data.packing`) if top_k_logits > 0; and the number of generated tokens.
        """
        rows = [
            {'index': index, 'prompt': example['prompt'], 'response': example['response']}
            for index, example in zip(indices, examples, strict=True)
        ]
        num_tokens = 0
        if self._config.sequence_level:
            rows, num_tokens = self._answered([row for row in rows if self._has_room(row)])
        if self._config.top_k_logits and rows:
            rows = self._with_teacher(rows)
        return rows, num_tokens

    def _has_room(self, row: Example) -> bool:
        limit = self._model.config.max_positions
        length = len(self._tokenizer.format_prompt(row['prompt']))
        return limit is None or length + self._config.max_new_tokens <= limit

    def _answered(self, rows: list[Example]) -> tuple[list[Example], int]:
        """Returns the rows with the teacher's finished responses, and the number of all tokens."""
        if not rows:
            return [], 0
        prompts = [self._tokenizer.format_prompt(row['prompt']) for row in rows]
        tokens, lengths = self._padded(prompts)
        indices = np.asarray(self._filled([row['index'] for row in rows]), np.int32)
        tokens, lengths, indices = processes.in_shards((tokens, lengths, indices), self._rows)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(self._key, indices)  # [B]
        output = processes.on_host(self._sampler(self._params, tokens, lengths, rng=keys))
        texts = decode_responses(self._tokenizer, output)
        num_tokens = int(np.sum(output.lengths[: len(rows)]))
        if self._config.keep_unfinished:
            responses = zip(rows, texts, output.tokens, output.lengths, strict=False)
            return [
                row | {'response': text, RESPONSE_IDS: ids[:length].astype(np.int32)}
                for row, text, ids, length in responses
            ], num_tokens
        last = output.tokens[np.arange(len(texts)), output.lengths - 1]
        ended = [
            row | {'response': text}
            for row, text, token, ids in zip(rows, texts, last, output.tokens, strict=False)
            if token in self._tokenizer.stop_ids and (text or not self._has_thoughts(ids))
        ]
        return ended, num_tokens

    def _has_thoughts(self, ids: np.ndarray) -> bool:
        """Returns whether a response [T] has thoughts; one with only thoughts is not usable."""
        return bool(self._tokenizer.split_thoughts(ids.tolist())[0])

    def _with_teacher(self, rows: list[Example]) -> list[Example]:
        """Returns the rows with `TEACHER_KEYS`, without documents that the teacher can't encode."""
        limit = self._model.config.max_positions or np.inf
        pairs = [(row, tokenize(row, self._tokenizer)) for row in rows]
        pairs = [(row, document) for row, document in pairs if len(document.tokens) <= limit]
        if not pairs:
            return []
        top = self._most_likely([document for _, document in pairs])
        return [
            row
            | {
                'teacher_ids': top.ids[i, : len(document.response)],
                'teacher_log_probs': top.log_probs[i, : len(document.response)],
                'teacher_log_rest': top.log_rest[i, : len(document.response)],
            }
            for i, (row, document) in enumerate(pairs)
        ]

    def _most_likely(self, documents: list[Document]) -> TopKDistribution:
        """Returns the distribution at each token of each response, [B, R] as numpy arrays."""
        multiple = self._config.prompt_multiple
        tokens, _ = self._padded([document.tokens for document in documents])
        longest = max(len(document.response) for document in documents)
        width = -(-longest // multiple) * multiple  # limits the number of compiled shapes
        first = self._filled([document.prompt_length - 1 for document in documents])
        places = np.minimum(np.asarray(first)[:, None] + np.arange(width), tokens.shape[1] - 1)
        tokens, places = processes.in_shards((tokens, places), self._rows)
        top = top_k_at(self._model, self._params, tokens, places, self._config.top_k_logits)
        distribution: TopKDistribution = processes.on_host(top)
        return distribution

    def _padded(self, rows: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Returns padded tokens [batch_size, P] and their lengths [batch_size], see `_filled`."""
        multiple = self._config.prompt_multiple
        return pad_prompts(self._filled(rows), self._tokenizer.pad_id, multiple=multiple)

    def _filled(self, rows: Sequence[Any]) -> list[Any]:
        """Returns the rows, with the last one repeated until there are `batch_size`."""
        return [*rows, *[rows[-1]] * (self._config.batch_size - len(rows))]


@functools.partial(jax.jit, static_argnames=('model', 'k'))
def top_k_at(
    model: Gemma, params: Any, tokens: jax.Array, places: jax.Array, k: int
) -> TopKDistribution:
    """Returns the k most likely next tokens at some positions of rows, by one causal pass.

    The head runs on one position of each row at a time, because all logits at once could need
    many times the memory of sampling.

    Args:
      model: an AR Gemma.
      params: the parameters of the model.
      tokens: [B, L] int32, right-padded.
      places: [B, R] int32, positions in the rows.
      k: the number of tokens per distribution.

    Returns:
      The distributions of the tokens after `places`, [B, R].
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    variables = {'params': params}
    hidden, _ = model.apply(
        variables, tokens, positions, jnp.ones_like(tokens), method='encode'
    )  # [B, L, D]
    hidden = jnp.take_along_axis(hidden, places[..., None], axis=1)  # [B, R, D]

    def at_one_place(hidden: jax.Array) -> TopKDistribution:
        return TopKDistribution.of(model.apply(variables, hidden, method='unembed'), k)  # [B, k]

    by_place = jax.lax.map(at_one_place, hidden.swapaxes(0, 1))  # leaves [R, B, ...]
    by_row: TopKDistribution = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), by_place)
    return by_row
