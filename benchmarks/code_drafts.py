r"""Measures accepted lengths and speed of a light student of a pretrained model on code.

    python benchmarks/code_drafts.py --checkpoint=gemma3-270m-student --output=/tmp/code_drafts

The teacher continues prompts greedily with 96 tokens each: HumanEval's, and windows of held-out
files of the Python standard library. The accepted lengths (tokens per verification, including the
one after the draft) are computed from the drafts at each position of this text: by the student, by
the untrained student, by lookups in the text so far, and by lookups if --lookup_ngram tokens match
and otherwise by the student. Then the sampler continues --prompts of the prompts, and its text must
equal the teacher's. --turns measures the speed of whole responses at batch 1, autoregressive and
lossless in turns, with the spread of the ratios; --batch_size sets another batch size for them.
--others adds transformers (float32, torch) and llama.cpp (the quantized GGUF file), if they are
installed. The script writes code_drafts.json.
"""

import dataclasses
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from diffusiongemma import cli
from diffusiongemma.checkpoints.convert import convert
from diffusiongemma.checkpoints.load import load_model, model_directory
from diffusiongemma.data.sources import DataSpec, load_source
from diffusiongemma.diffusion.corruption import MaskedCorruption
from diffusiongemma.distillation.drafting import Drafting
from diffusiongemma.distillation.step import causal_pass
from diffusiongemma.distillation.student import frozen_params, student_params_from_teacher
from diffusiongemma.distillation.teacher import TeacherStates
from diffusiongemma.models import Gemma, for_inference, init_params
from diffusiongemma.models.denoiser import DRAFT_IDS
from diffusiongemma.sampling import PromptLookup, Sampler, SamplingConfig, pad_prompts
from diffusiongemma.sampling.drafter import LONGEST_NGRAM

_CHECKPOINT = flags.DEFINE_string('checkpoint', 'gemma3-270m-student', 'A light student.')
_OUTPUT = flags.DEFINE_string('output', None, 'Directory of the texts and the table.')
_TEACHER = flags.DEFINE_string(
    'teacher', 'gemma3-270m', 'The teacher, to measure the untrained student; empty to skip it.'
)
_ROWS = flags.DEFINE_integer('rows', 164, 'Number of prompts of each source.', lower_bound=1)
_PROMPTS = flags.DEFINE_integer(
    'prompts', 164, 'Number of prompts that the sampler continues.', lower_bound=0
)
_NGRAM = flags.DEFINE_integer(
    'lookup_ngram', 2, 'Number of matching tokens that a lookup needs.', lower_bound=1
)
_LENGTH = flags.DEFINE_integer('draft_length', 7, 'Number of tokens of a draft.', lower_bound=2)
_SHORT = flags.DEFINE_integer(
    'model_draft_length',
    3,
    'Length of drafts by the student beside lookups, timed as well; 0 to skip it.',
    lower_bound=0,
)
_TURNS = flags.DEFINE_integer(
    'turns', 0, 'Number of batches of prompts that are timed.', lower_bound=0
)
_BATCH_SIZE = flags.DEFINE_integer(
    'batch_size', 1, 'Number of prompts that are timed together; --others take them one by one.', 1
)
_OTHERS = flags.DEFINE_bool('others', False, 'Time transformers and llama.cpp too.')
_TEMPERATURE = flags.DEFINE_float(
    'temperature', 0.0, 'Temperature of the teacher and of the sampler.', 0.0
)

TOKENS = 96
BATCH = 41
BOTH = 'lookup, else student'
SOURCES = {
    'human_eval': DataSpec(kind='human_eval'),
    'python_source': DataSpec(kind='python_source', split='test'),
}


def teacher_texts(
    sampler: Sampler, params, tokenizer, prompts: list[list[int]], path: Path
) -> np.ndarray:
    """Returns greedy responses as `written` does, and caches them in the file `path`."""
    if not path.exists():
        greedy = dataclasses.replace(sampler.config, temperature=0.0)
        sampler = Sampler(sampler.model, greedy, 'autoregressive')
        np.save(path, written(sampler, params, tokenizer, prompts, seed=0)[0])
    return np.load(path)


def student_hits(model, params, prompts, texts, length: int, pad_id: int) -> np.ndarray:
    """Returns which draft tokens of the student are accepted, [rows, TOKENS, length] bool.

    The value at [r, i, k] tells whether, with token i of the text pending, draft token k equals
    the text's, given that the previous draft tokens do.
    """
    objective = Drafting(corruption=MaskedCorruption(model.config.mask_id), canvas_length=length)

    @jax.jit
    def hits(params: Any, batch: dict, anchors: jax.Array) -> jax.Array:
        hidden, prefix = causal_pass(model, params, batch)
        noise = jnp.full((*anchors.shape, length), model.config.mask_id, jnp.int32)
        states = TeacherStates(hidden=hidden, values=None, read=None)
        draft = objective.draft(model, params, anchors, noise, batch, prefix, states)
        return draft.hits & draft.valid

    accepted, rows = [], 4
    width = -(-max(map(len, prompts)) // 64) * 64 + TOKENS
    for first in range(0, len(prompts), rows):
        tokens = np.full((rows, width), pad_id, np.int32)
        segments, anchors = np.zeros((rows, width), np.int32), np.zeros((rows, TOKENS), np.int32)
        for r, (prompt, text) in enumerate(
            zip(prompts[first : first + rows], texts[first : first + rows], strict=True)
        ):
            whole = [*prompt, *text[text >= 0]]
            tokens[r, : len(whole)], segments[r, : len(whole)] = whole, 1
            anchors[r] = np.minimum(len(prompt) + np.arange(TOKENS), len(whole) - 1)
        batch = {
            'tokens': tokens,
            'segment_ids': segments,
            'positions': np.broadcast_to(np.arange(width, dtype=np.int32), tokens.shape),
            'target_mask': segments > 0,
        }
        accepted.append(np.asarray(hits(params, batch, anchors)))
    return np.concatenate(accepted)[: len(prompts)]


def lookup_hits(prompts, texts, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns `student_hits` for lookups, and the numbers of matching tokens [rows, TOKENS]."""
    source = PromptLookup(length, LONGEST_NGRAM)
    width = max(map(len, prompts)) + TOKENS
    find = jax.jit(source.find)
    hits = np.zeros((len(prompts), TOKENS, length), bool)
    matched = np.zeros((len(prompts), TOKENS), np.int32)
    for r, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        whole = np.zeros(width, np.int32)
        whole[: len(prompt)], whole[len(prompt) : len(prompt) + TOKENS] = prompt, text
        history = np.broadcast_to(whole, (TOKENS, width))
        drafts, matched[r] = find(history, len(prompt) + 1 + np.arange(TOKENS))
        after = np.pad(text, (0, length + 1), constant_values=-1)
        ahead = np.arange(TOKENS)[:, None] + 1 + np.arange(length)
        hits[r] = np.asarray(drafts) == after[ahead]
    return hits, matched


def accepted_length(hits: np.ndarray, texts: np.ndarray) -> float:
    """Returns tokens per verification if the texts are written with drafts accepted at `hits`."""
    tokens = verifications = 0
    for row, text in zip(np.cumprod(hits, axis=-1).sum(axis=-1), texts, strict=True):
        place, end = 0, int((text >= 0).sum())
        while place < end:
            place, verifications = place + 1 + int(row[place]), verifications + 1
        tokens += end
    return tokens / max(verifications, 1)


def written(sampler: Sampler, params, tokenizer, prompts, seed: int) -> tuple[np.ndarray, Any]:
    """Returns responses [rows, TOKENS], -1 after their end, and summed accepted-length counts."""
    texts, counts = [], 0
    for first in range(0, len(prompts), BATCH):
        rows = prompts[first : first + BATCH]
        print(f'{sampler.mode}: prompts from {first} of {len(prompts)}', flush=True)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), first), len(rows))
        tokens, lengths = pad_prompts(rows, tokenizer.pad_id, multiple=128)
        output = sampler(params, tokens, lengths, rng=keys)
        places = np.arange(TOKENS)
        text = np.where(places < np.asarray(output.lengths)[:, None], output.tokens, -1)
        texts.append(text.astype(np.int32))
        if output.accepted_lengths is not None:
            counts = counts + np.asarray(output.accepted_lengths).sum(axis=0)
    return np.concatenate(texts), counts


def timed(
    samplers: dict[str, tuple[Sampler, Any]],
    others: dict[str, Any],
    tokenizer,
    prompts: list[list[int]],
    batch_size: int,
) -> dict[str, Any]:
    """Returns milliseconds per token of whole responses, timed in turns, and ratios with spread."""
    seconds: dict[str, list[float]] = {name: [] for name in (*samplers, *others)}
    batches = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
    for number, batch in enumerate([batches[0], *batches]):  # the first run compiles
        tokens, lengths = pad_prompts(batch, tokenizer.pad_id, multiple=256)
        for name, (sampler, params) in samplers.items():
            start = time.perf_counter()
            output = jax.block_until_ready(sampler(params, tokens, lengths, rng=jax.random.key(0)))
            count = int(np.sum(output.lengths))
            if number:
                seconds[name].append((time.perf_counter() - start) / count)
        for name, write in others.items():
            start = time.perf_counter()
            count = sum(len(write(prompt)) for prompt in batch)
            if number:
                seconds[name].append((time.perf_counter() - start) / count)
    base = np.asarray(seconds['autoregressive'])
    return {
        'batch_size': batch_size,
        'ms_per_token': {who: float(np.median(times) * 1e3) for who, times in seconds.items()},
        'speedup_10_50_90': {
            who: np.percentile(base / np.asarray(times), (10, 50, 90)).round(2).tolist()
            for who, times in seconds.items()
        },
    }


def other_writers(directory: Path) -> dict[str, Any]:
    """Returns functions from prompt tokens to a greedy continuation, for installed libraries."""
    writers, name = {}, _TEACHER.value or _TEACHER.default
    if importlib.util.find_spec('transformers') is not None:
        import torch
        from transformers import Gemma3ForCausalLM

        if not (directory / 'config.json').exists():
            convert(name, directory, 'hf')
        theirs = Gemma3ForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

        @torch.no_grad()
        def with_torch(prompt: list[int]) -> list[int]:
            tokens = theirs.generate(
                torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False, pad_token_id=0
            )
            return tokens[0, len(prompt) :].tolist()

        writers['transformers'] = with_torch
    if importlib.util.find_spec('llama_cpp') is not None:
        from llama_cpp import Llama

        llama = Llama(str(model_directory(name)), n_ctx=1024, n_threads=2, verbose=False)

        def with_llama(prompt: list[int]) -> list[int]:
            llama.reset()
            tokens = []
            for token in llama.generate(prompt, temp=0.0, repeat_penalty=1.0):
                tokens.append(token)
                if len(tokens) == TOKENS or token == llama.token_eos():
                    return tokens
            return tokens

        writers['llama.cpp'] = with_llama
    return writers


class Models:
    """The checkpoint, its teacher, and their samplers.

    Attributes:
      model, params, tokenizer: the light student.
      students: parameters by name: the student, and the untrained start if --teacher is not empty.
      samplers: samplers with their parameters by name, in the layout of inference.
    """

    def __init__(self) -> None:
        self.model, self.params, self.tokenizer = load_model(_CHECKPOINT.value)
        model, params = for_inference(self.model, self.params)
        teacher, teacher_params = for_inference(
            Gemma(self.model.config.autoregressive, self.model.dtype),
            {name: self.params[name] for name in ('embedder', 'backbone')},
        )
        self.students = {'student': self.params}
        if _TEACHER.value:
            self.students['untrained start'] = self._untrained(tuple(teacher_params))
        config = SamplingConfig.for_tokenizer(
            self.tokenizer, max_new_tokens=TOKENS, temperature=_TEMPERATURE.value
        )
        lookups = dataclasses.replace(config, drafts=PromptLookup(_LENGTH.value, LONGEST_NGRAM))
        drafting = dataclasses.replace(config, draft_length=_LENGTH.value)
        both = dataclasses.replace(drafting, lookup_ngram=_NGRAM.value)
        self.samplers = {
            'autoregressive': (Sampler(teacher, config, 'autoregressive'), teacher_params),
            'lookup': (Sampler(teacher, lookups, 'lossless'), teacher_params),
            'student': (Sampler(model, drafting, 'lossless'), params),
            BOTH: (Sampler(model, both, 'lossless'), params),
        }
        if _SHORT.value:
            short = dataclasses.replace(both, model_draft_length=_SHORT.value)
            self.samplers[f'{BOTH} by {_SHORT.value}'] = Sampler(model, short, 'lossless'), params

    def _untrained(self, teacher_names: tuple[str, ...]) -> Any:
        """Returns the parameters of a student that was initialized and not trained."""
        fresh = init_params(self.model, jax.random.key(0))
        teacher_params = load_model(_TEACHER.value)[1]
        start = student_params_from_teacher(fresh, teacher_params, self.model.config)
        frozen = frozen_params(self.model.config, self.params, self.params.get(DRAFT_IDS))
        names = (*teacher_names, DRAFT_IDS)
        return start | {name: frozen[name] for name in names if name in frozen}

    def accepted_lengths(self, prompts: list[list[int]], texts: np.ndarray) -> dict[str, float]:
        """Returns the accepted lengths of all kinds of drafts on texts of the teacher."""
        lookup, matched = lookup_hits(prompts, texts, _LENGTH.value)
        lengths = {'lookup': accepted_length(lookup, texts)}
        uses_lookup = (matched >= _NGRAM.value)[..., None]
        for who, params in self.students.items():
            pad_id = self.tokenizer.pad_id
            hits = student_hits(self.model, params, prompts, texts, _LENGTH.value, pad_id)
            lengths[who] = accepted_length(hits, texts)
            mixed = accepted_length(np.where(uses_lookup, lookup, hits), texts)
            lengths[f'lookup, else {who}'] = mixed
        return lengths

    def written_by_sampler(self, prompts: list[list[int]], texts: np.ndarray) -> dict[str, Any]:
        """Returns a comparison of the texts of lossless and autoregressive decoding."""
        lossless, counts = written(*self.samplers[BOTH], self.tokenizer, prompts, seed=0)
        if _TEMPERATURE.value > 0:
            plain = self.samplers['autoregressive']
            texts, _ = written(*plain, self.tokenizer, prompts, seed=0)
        return {
            'temperature': _TEMPERATURE.value,
            'rows_equal': int((lossless == texts[: len(prompts)]).all(axis=1).sum()),
            'rows': len(prompts),
            'accepted_length_of_the_sampler': float(counts @ np.arange(len(counts)) / counts.sum()),
        }


def main(argv: list[str]) -> None:
    del argv
    output = Path(_OUTPUT.value)
    output.mkdir(parents=True, exist_ok=True)
    models = Models()
    tokenizer = models.tokenizer
    others = other_writers(output / 'published') if _OTHERS.value else {}
    results: dict[str, Any] = {}
    for name, spec in SOURCES.items():
        source = load_source(spec)
        prompts = [
            tokenizer.format_prompt(source[i]['prompt'])
            for i in range(min(_ROWS.value, len(source)))
        ]
        path = output / f'{name}_{len(prompts)}.npy'
        texts = teacher_texts(*models.samplers['autoregressive'], tokenizer, prompts, path)
        known = np.isin(texts[texts >= 0], np.asarray(models.params.get(DRAFT_IDS, np.arange(1))))
        results[name] = {
            'accepted_length': models.accepted_lengths(prompts, texts),
            'draft_vocabulary_coverage': known.mean(),
        }
        if _PROMPTS.value:
            results[name] |= models.written_by_sampler(prompts[: _PROMPTS.value], texts)
        if _TURNS.value:
            timed_prompts = prompts[: _TURNS.value * _BATCH_SIZE.value]
            results[name] |= timed(
                models.samplers, others, tokenizer, timed_prompts, _BATCH_SIZE.value
            )
        (output / 'code_drafts.json').write_text(json.dumps(results, indent=2) + '\n')
    table = Table('accepted length, greedy', *SOURCES)
    for who in results['human_eval']['accepted_length']:
        values = [results[name]['accepted_length'][who] for name in SOURCES]
        table.add_row(who, *(f'{value:.2f}' for value in values))
    Console().print(table)
    print(json.dumps(results))


if __name__ == '__main__':
    flags.mark_flags_as_required(['output'])
    cli.run_main(main)
