"""The declarations of all weights of a model.

A declaration states the input and output axes of a weight, the logical name of each axis (which
`parallel/sharding.py` maps to mesh axes), and the published tensor that contains it. The code that
creates, shards, transposes, quantizes, adapts, imports and exports weights uses it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from diffusiongemma.models.arrays import Params


@dataclasses.dataclass(frozen=True)
class Weight:
    """The declaration of a parameter, in all layers that have it.

    Its axes are the map axes, the input axes and the output axes, in this order; stacked layers add
    a leading axis. In the published format a kernel is a matrix [maps, outputs, inputs]; other
    weights keep their axes, with all but the first merged if there are three.

    Attributes:
      outputs: logical names of the axes that a matmul with tokens returns; for a weight that is not
        a kernel (a table, a scale, a scalar), of all axes.
      inputs: logical names of the axes that are contracted with the tokens.
      maps: logical names of the axes over several kernels (experts).
      large: whether it is a large kernel of a layer, which sampling may transpose and quantize and
        which Muon orthogonalizes.
      published: the name of its tensor after `layers.N.`, or after the prefix of the backbone for a
        weight outside of the layers; None if no published format has it.
      part: (index, number), if the tensor contains several kernels with the same inputs.
      of_encoder: whether DiffusionGemma publishes it with the encoder.
    """

    outputs: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    maps: tuple[str, ...] = ()
    large: bool = False
    published: str | None = None
    part: tuple[int, int] = (0, 1)
    of_encoder: bool = False

    @property
    def axes(self) -> tuple[str, ...]:
        """Returns the logical names of the axes."""
        return self.maps + self.inputs + self.outputs

    def outputs_first(self, of_axes: Sequence[Any]) -> tuple[Any, ...]:
        """Returns values per axis with outputs before inputs, as in `Execution.output_major`."""
        first, last = len(self.maps), len(self.maps) + len(self.inputs)
        return (*of_axes[:first], *of_axes[last:], *of_axes[first:last])

    def input_axes(self, ndim: int, *, output_major: bool = False) -> tuple[int, ...]:
        """Returns the input axes of this weight in an array that may have stacked axes before them.

        Args:
          ndim: the number of dimensions of the array, including stacked axes.
          output_major: whether the array has its output axes first (`Execution.output_major`).
        """
        last = ndim - (0 if output_major else len(self.outputs))
        return tuple(range(last - len(self.inputs), last))


def _scale(published: str) -> Weight:
    return Weight(('norm',), published=published)


def _kernel(inputs: str, outputs: str, published: str, **fields: Any) -> Weight:
    """Returns the declaration of a large kernel; axis names are separated by spaces."""
    return Weight(
        tuple(outputs.split()), tuple(inputs.split()), large=True, published=published, **fields
    )


# The key is the end of a parameter's path; the longest matching key applies.
WEIGHTS = {
    'embedder/embedding': Weight(('vocab', 'embed'), published='embed_tokens.weight'),
    'attention/query': _kernel('qkv_embed', 'heads head_dim', 'self_attn.q_proj.weight'),
    'attention/key': _kernel('qkv_embed', 'kv_heads head_dim', 'self_attn.k_proj.weight'),
    'attention/value': _kernel('qkv_embed', 'kv_heads head_dim', 'self_attn.v_proj.weight'),
    'attention/output': _kernel('heads head_dim', 'o_embed', 'self_attn.o_proj.weight'),
    'attention/query_norm/scale': _scale('self_attn.q_norm.weight'),
    'attention/key_norm/scale': _scale('self_attn.k_norm.weight'),
    'mlp/gate': _kernel('mlp_embed', 'mlp', 'mlp.gate_proj.weight'),
    'mlp/up': _kernel('mlp_embed', 'mlp', 'mlp.up_proj.weight'),
    'mlp/down': _kernel('mlp', 'mlp_embed', 'mlp.down_proj.weight'),
    'experts/gate': _kernel(
        'expert_embed', 'expert_mlp', 'experts.gate_up_proj', part=(0, 2), maps=('experts',)
    ),
    'experts/up': _kernel(
        'expert_embed', 'expert_mlp', 'experts.gate_up_proj', part=(1, 2), maps=('experts',)
    ),
    'experts/down': _kernel('expert_mlp', 'expert_embed', 'experts.down_proj', maps=('experts',)),
    'router/kernel': Weight(
        ('router_experts',), ('router_embed',), published='router.proj.weight'
    ),
    'router/scale': _scale('router.scale'),
    'router/per_expert_scale': Weight(('router_experts',), published='router.per_expert_scale'),
    'pre_attention_norm/scale': _scale('input_layernorm.weight'),
    'post_attention_norm/scale': _scale('post_attention_layernorm.weight'),
    'pre_ffn_norm/scale': _scale('pre_feedforward_layernorm.weight'),
    'post_ffn_norm/scale': _scale('post_feedforward_layernorm.weight'),
    'post_mlp_norm/scale': _scale('post_feedforward_layernorm_1.weight'),
    'post_moe_norm/scale': _scale('post_feedforward_layernorm_2.weight'),
    'pre_moe_norm/scale': _scale('pre_feedforward_layernorm_2.weight'),
    'post_per_layer_norm/scale': _scale('post_per_layer_input_norm.weight'),
    'final_norm/scale': _scale('norm.weight'),
    'norm/scale': Weight(('norm',)),  # any norm without a more specific entry
    'encode_scalar': Weight(published='layer_scalar', of_encoder=True),
    'denoise_scalar': Weight(published='layer_scalar'),
    # Per-layer embeddings of E2B and E4B.
    'per_layer/gate': Weight(
        ('per_layer',), ('per_layer_embed',), published='per_layer_input_gate.weight'
    ),
    'per_layer/projection': Weight(
        ('per_layer_embed',), ('per_layer',), published='per_layer_projection.weight'
    ),
    'per_layer_embedder/embedding': Weight(
        ('vocab', 'layers', 'table_embed'), published='embed_tokens_per_layer.weight'
    ),
    'per_layer_embedder/projection': Weight(
        ('layers', 'per_layer'), ('per_layer_embed',), published='per_layer_model_projection.weight'
    ),
    'per_layer_embedder/projection_norm/scale': _scale('per_layer_projection_norm.weight'),
    # Weights of the denoiser.
    'self_conditioning/pre_norm/scale': _scale('self_conditioning.pre_norm.weight'),
    'self_conditioning/mlp/gate': _kernel('mlp_embed', 'mlp', 'self_conditioning.gate_proj.weight'),
    'self_conditioning/mlp/up': _kernel('mlp_embed', 'mlp', 'self_conditioning.up_proj.weight'),
    'self_conditioning/mlp/down': _kernel('mlp', 'mlp_embed', 'self_conditioning.down_proj.weight'),
    'teacher_state/kernel': Weight(('draft_input',), ('state_embed',)),
    'serial/previous': Weight(('vocab', 'serial_rank')),
    'serial/following': Weight(('vocab',), ('serial_rank',)),
    'draft_head': Weight(('vocab', 'embed')),
}  # fmt: skip


def weight_at(path: Sequence[str]) -> Weight | None:
    """Returns the declaration of the parameter at a path, or None."""
    for length in (3, 2, 1):
        declaration = WEIGHTS.get('/'.join(path[-length:]))
        if declaration is not None:
            return declaration
    return None


def map_kernels(change: Callable[[Any, Weight], Any], params: Params) -> Params:
    """Returns the parameters with each large kernel replaced by `change(kernel, weight)`.

    Args:
      change: a function of a kernel and its declaration.
      params: a nested dict of arrays, with layers stacked or not.
    """

    flat = flatten_dict(params)
    for path, leaf in flat.items():
        weight = weight_at(path)
        if weight is not None and weight.large:
            flat[path] = change(leaf, weight)
    tree: Params = unflatten_dict(flat)
    return tree
