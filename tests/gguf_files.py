"""Writes tiny GGUF files for tests with llama.cpp's package.

Tensor names come from the package's table and metadata follows llama.cpp's converter, so that the
reader is tested against files that do not depend on this project's code.
"""

from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

from diffusiongemma.models.config import SLIDING, ModelConfig

F32 = gguf.GGMLQuantizationType.F32
# These special and user-defined pieces are as in Gemma: runs of blanks and newlines, and a tag.
SPECIALS = ('<pad>', '<eos>', '<bos>', '<unk>', '<mask>', '<start_of_turn>', '<end_of_turn>')
USER_DEFINED = ('\n', '\n\n', '\n\n\n', '  ', '   ', '    ', '\t\t', '<table>')
WORDS = ('\u2581t', 'he', '\u2581the', 'in', 'er', '\u2581a', 'on', '00', '\u2581\u2581x')


def vocabulary(size: int) -> tuple[list[str], list[float], list[int]]:
    """Returns pieces, scores and types: specials, user-defined ones, bytes, merges, characters."""
    letters = [chr(i) for i in range(33, 127)] + ['\u2581', '\u00e9', '\u4e2d', '\U0001f600']
    groups = (
        (SPECIALS, 3), (USER_DEFINED, 4), ([f'<0x{b:02X}>' for b in range(256)], 6),
        (WORDS, 1), (letters, 1),
    )  # fmt: skip
    pieces = [piece for group, _ in groups for piece in group]
    types = [kind for group, kind in groups for _ in group]
    pieces += [f'<unused{i}>' for i in range(size - len(pieces))]
    types += [3] * (size - len(types))
    order = iter(range(size))
    return pieces, [-float(next(order)) if kind == 1 else -1000.0 for kind in types], types


VOCAB_SIZE = 400


def write_gguf(
    path: Path,
    published: Path,
    config: ModelConfig,
    *,
    types: dict | None = None,
    leave_out: tuple[str, ...] = (),
    change=None,
) -> Path:
    """Writes the tensors of a published checkpoint as llama.cpp's converter does.

    Args:
      path: the path of the new file.
      published: a directory with model.safetensors.
      config: the config of the autoregressive model.
      types: the quantization type of tensors by GGUF name; the default is float32.
      leave_out: GGUF names of tensors and metadata keys that are not written.
      change: a function that is called with the writer at the end, to write more.
    """
    gemma3 = config.norm_scale_offset == 1.0
    arch = 'gemma3' if gemma3 else 'gemma4'
    writer = gguf.GGUFWriter(path, arch)
    _write_config(writer, config, gemma3)
    _write_vocabulary(writer, gemma3, leave_out)
    kind = gguf.MODEL_ARCH.GEMMA3 if gemma3 else gguf.MODEL_ARCH.GEMMA4
    names = gguf.get_tensor_name_map(kind, config.num_layers)
    for name, value in load_file(published / 'model.safetensors').items():
        stored = _gguf_name(names, name)
        if stored in leave_out:
            continue
        value = value + 1 if gemma3 and name.endswith('norm.weight') else value
        qtype = (types or {}).get(stored, F32)
        data = np.ascontiguousarray(value, np.float32).reshape(value.shape or (1,))
        data = data if qtype == F32 else gguf.quants.quantize(data, qtype)
        writer.add_tensor(stored, data, raw_dtype=qtype)
    if not gemma3:
        half = config.full.head_dim // 2
        rotated = int(half * config.full.rope_fraction)
        factors = np.array([1.0] * rotated + [1e30] * (half - rotated), np.float32)
        writer.add_tensor('rope_freqs.weight', factors)
    if change is not None:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_name(names, name: str) -> str:
    name = name.replace('model.language_model.', 'model.')
    if name.endswith('router.scale'):
        return names.get_name(name.replace('.scale', '.proj')) + '.scale'
    if name.endswith('router.per_expert_scale'):
        return (
            names.get_name(name.replace('router.per_expert_scale', 'experts.down_proj')) + '.scale'
        )
    found = names.get_name(name, try_suffixes=('.weight',))
    return found if found.endswith('.weight') else f'{found}.weight'


def _write_config(writer, config: ModelConfig, gemma3: bool) -> None:
    sliding, full = config.sliding, config.full
    is_sliding = [kind == SLIDING for kind in config.layer_types]
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_sliding_window(sliding.window)
    writer.add_key_length(full.head_dim)
    writer.add_value_length(full.head_dim)
    writer.add_rope_freq_base(full.rope_theta)
    writer.add_rope_freq_base_swa(sliding.rope_theta)
    writer.add_sliding_window_pattern(is_sliding)
    if config.final_logit_softcap is not None:
        writer.add_final_logit_softcapping(config.final_logit_softcap)
    if gemma3:
        writer.add_feed_forward_length(config.ffn_width)
        writer.add_head_count_kv(sliding.num_kv_heads)
        if full.rope_scale != 1.0:
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(full.rope_scale)
        return
    own = config.num_layers - config.num_kv_shared_layers
    widths = [config.ffn_width] * own
    widths += [config.kv_shared_ffn_width or config.ffn_width] * config.num_kv_shared_layers
    writer.add_feed_forward_length(widths)
    writer.add_head_count_kv([(sliding if s else full).num_kv_heads for s in is_sliding])
    writer.add_shared_kv_layers(config.num_kv_shared_layers)
    writer.add_key_length_swa(sliding.head_dim)
    writer.add_value_length_swa(sliding.head_dim)
    writer.add_rope_dimension_count(full.head_dim)
    writer.add_rope_dimension_count_swa(sliding.head_dim)
    writer.add_embedding_length_per_layer_input(config.per_layer.width if config.per_layer else 0)
    if config.moe is not None:
        writer.add_expert_count(config.moe.num_experts)
        writer.add_expert_used_count(config.moe.top_k)
        writer.add_expert_feed_forward_length(config.moe.expert_width)


def _write_vocabulary(writer, gemma3: bool, leave_out: tuple[str, ...]) -> None:
    pieces, scores, types = vocabulary(VOCAB_SIZE)
    writer.add_tokenizer_model('llama' if gemma3 else 'gemma4')
    if 'tokenizer.ggml.tokens' not in leave_out:
        writer.add_token_list(pieces)
    writer.add_token_types(types)
    if gemma3:
        writer.add_token_scores(scores)
    else:
        writer.add_token_scores([-1000.0] * len(pieces))
        writer.add_token_merges([' '.join(pair) for pair in merges(pieces, scores, types)])
    writer.add_add_space_prefix(False)


def merges(pieces, scores, types) -> list[tuple[str, str]]:
    """Returns all pairs that merge into a normal piece, sorted by score, as in transformers."""
    id_of = {piece: i for i, piece in enumerate(pieces)}
    found = []
    for piece, score, kind in zip(pieces, scores, types, strict=True):
        for i in range(1, len(piece)) if kind == 1 else ():
            left, right = piece[:i], piece[i:]
            if left in id_of and right in id_of:
                found.append((-score, len(left), len(right), left, right))
    return [pair[3:] for pair in sorted(found)]
